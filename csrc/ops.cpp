// The ops' CPU entries, bound through PyTorch's stable ABI: one build serves later releases of torch.
//
// The schemas stand in hta_fused/ops.py, beside the fake kernels and the checks that users meet. What is checked here
// only keeps a direct call of torch.ops.hta_fused.* from reading or writing beyond a buffer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = const std::optional<Tensor>&;

template <class T> constexpr ScalarType kTypeOf = ScalarType::Undefined;
template <> constexpr ScalarType kTypeOf<float> = ScalarType::Float;
template <> constexpr ScalarType kTypeOf<double> = ScalarType::Double;
template <> constexpr ScalarType kTypeOf<int32_t> = ScalarType::Int;
template <> constexpr ScalarType kTypeOf<uint8_t> = ScalarType::Byte;

// The data of a dense tensor of type T with at least n elements.
template <class T>
T* data(const Tensor& tensor, int64_t n, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == kTypeOf<T> && tensor.is_contiguous() && tensor.numel() >= n,
                  name, " must be a contiguous CPU tensor of the op's dtype with at least ", n, " elements");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* data(Optional tensor, int64_t n, const char* name) {
  return tensor ? data<T>(*tensor, n, name) : nullptr;
}

hta::Pattern pattern(Optional codes, Optional labels, int64_t n, int64_t groups) {
  const int64_t tiles = (n + hta::kTile - 1) / hta::kTile;
  if (!codes) return {nullptr, data<uint8_t>(labels, n, "labels")};
  const auto* code = data<int32_t>(*codes, 2 * tiles, "codes");
  const int64_t rows = labels ? labels->numel() / hta::kTile : 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {  // 8 bytes of each 44 KiB
    const int64_t group = code[2 * tile], label = code[2 * tile + 1];
    STD_TORCH_CHECK(0 <= group && group < groups && label < hta::kLabels && ~label < rows,
                    "codes of tile ", tile, " name a group, a label or a row of labels that is not there");
  }
  return {code, data<uint8_t>(labels, rows * hta::kTile, "labels")};
}

double scalar(const Tensor& tensor, const char* name) {
  if (tensor.scalar_type() == ScalarType::Double) return *data<double>(tensor, 1, name);
  return *data<float>(tensor, 1, name);
}

template <class T>
void coupled_step(Tensor& theta, Tensor& eta, const Tensor& grad_theta, const Tensor& grad_eta, Optional momentum_theta,
          Optional momentum_eta, Optional anchor, Optional codes, Optional labels, const Tensor& hyper,
          const Tensor& tables, Optional grad_scale, Optional found_inf, Tensor& stats, bool skip_nonfinite) {
  const int64_t n = theta.numel();
  const int64_t groups = hyper.numel() / hta::kHyper;
  hta::StepArgs<T> args;
  args.theta = data<T>(theta, n, "theta");
  args.eta = data<T>(eta, n, "eta");
  args.g_theta = data<T>(grad_theta, n, "grad_theta");
  args.g_eta = data<T>(grad_eta, n, "grad_eta");
  args.v_theta = data<T>(momentum_theta, n, "momentum_theta");
  args.v_eta = data<T>(momentum_eta, n, "momentum_eta");
  STD_TORCH_CHECK(!args.v_theta == !args.v_eta, "momentum_theta and momentum_eta must both be given, or neither");
  args.anchor = data<T>(anchor, n, "anchor");
  args.pattern = pattern(codes, labels, n, groups);
  args.hyper = data<double>(hyper, groups * hta::kHyper, "hyper");
  args.tables = data<double>(tables, groups * hta::kLabels * 6, "tables");
  args.groups = groups;
  args.n = n;
  args.inverse_scale = grad_scale ? T(1.0 / scalar(*grad_scale, "grad_scale")) : T(1);
  auto* out = data<double>(stats, 4, "stats");

  bool skip = found_inf && scalar(*found_inf, "found_inf") != 0;
  if (!skip && skip_nonfinite) skip = !hta::cpu::all_finite(args.g_theta, args.g_eta, n);
  if (skip) {
    out[2] = 1;
    out[3] += 1;
    return;
  }
  double sums[3];
  hta::cpu::step(args, sums);
  out[0] = sums[0];
  out[1] = sums[1];
  out[2] = sums[2] == 0 ? 0 : 1;
}

template <class T>
double add_penalty(const Tensor& theta, const Tensor& eta, Optional anchor, Optional codes, Optional labels, double L,
               Tensor& grad_theta, Tensor& grad_eta, bool accumulate) {
  const int64_t n = theta.numel();
  hta::PenaltyArgs<T> args;
  args.theta = data<T>(theta, n, "theta");
  args.eta = data<T>(eta, n, "eta");
  args.anchor = data<T>(anchor, n, "anchor");
  args.g_theta = data<T>(grad_theta, n, "grad_theta");
  args.g_eta = data<T>(grad_eta, n, "grad_eta");
  args.pattern = pattern(codes, labels, n, 1);
  args.pull = 2 * L;
  args.couple = 2 / L;
  args.accumulate = accumulate;
  args.n = n;
  double sums[3];
  hta::cpu::penalty(args, sums);
  return L * sums[0] + sums[1] / L;
}

// float and double take the same path.
#define HTA_DISPATCH(tensor, call)                                                                       \
  [&] {                                                                                                  \
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double, \
                    "hta_fused's CPU kernels take float32 and float64");                                 \
    if (tensor.scalar_type() == ScalarType::Float) {                                                     \
      using T = float;                                                                                   \
      return call;                                                                                       \
    }                                                                                                    \
    using T = double;                                                                                    \
    return call;                                                                                         \
  }()

void step_(Tensor theta, Tensor eta, Tensor grad_theta, Tensor grad_eta, std::optional<Tensor> momentum_theta,
           std::optional<Tensor> momentum_eta, std::optional<Tensor> anchor, std::optional<Tensor> codes,
           std::optional<Tensor> labels, Tensor hyper, Tensor tables, std::optional<Tensor> grad_scale,
           std::optional<Tensor> found_inf, Tensor stats, bool skip_nonfinite) {
  HTA_DISPATCH(theta, coupled_step<T>(theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta, anchor, codes, labels,
                              hyper, tables, grad_scale, found_inf, stats, skip_nonfinite));
}

std::tuple<Tensor, Tensor, Tensor> penalty(Tensor theta, Tensor eta, std::optional<Tensor> anchor,
                                           std::optional<Tensor> codes, std::optional<Tensor> labels, double L) {
  Tensor grad_theta = torch::stable::empty_like(theta), grad_eta = torch::stable::empty_like(eta);
  const double value = HTA_DISPATCH(theta, add_penalty<T>(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, false));
  Tensor out = torch::stable::new_empty(theta, {});
  torch::stable::fill_(out, value);
  return {out, grad_theta, grad_eta};
}

Tensor penalty_accumulate_(Tensor grad_theta, Tensor grad_eta, Tensor theta, Tensor eta, std::optional<Tensor> anchor,
                           std::optional<Tensor> codes, std::optional<Tensor> labels, double L) {
  const double value = HTA_DISPATCH(theta, add_penalty<T>(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, true));
  Tensor out = torch::stable::new_empty(theta, {});
  torch::stable::fill_(out, value);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hta_fused, CPU, m) {
  m.impl("step_", TORCH_BOX(&step_));
  m.impl("penalty", TORCH_BOX(&penalty));
  m.impl("penalty_accumulate_", TORCH_BOX(&penalty_accumulate_));
}

// What ops.py asks through ctypes.
extern "C" __attribute__((visibility("default"))) const char* hta_instruction_set() { return hta::cpu::instruction_set(); }
extern "C" __attribute__((visibility("default"))) int64_t hta_tile() { return hta::kTile; }
