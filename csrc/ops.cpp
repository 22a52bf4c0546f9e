// The ops' CPU and CUDA entries, bound through PyTorch's stable ABI: one build serves later releases of torch, and a
// build with CUDA code loads beside a CPU-only torch as well.
//
// The schemas stand in hta_fused/ops.py, beside the fake kernels and the checks that users meet. What is checked here
// only keeps a direct call of torch.ops.hta_fused.* from reading or writing beyond a buffer.
#include <torch/csrc/stable/accelerator.h>
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
template <> constexpr ScalarType kTypeOf<hta::Half> = ScalarType::Half;
template <> constexpr ScalarType kTypeOf<hta::BFloat16> = ScalarType::BFloat16;
template <> constexpr ScalarType kTypeOf<int32_t> = ScalarType::Int;
template <> constexpr ScalarType kTypeOf<int64_t> = ScalarType::Long;
template <> constexpr ScalarType kTypeOf<uint8_t> = ScalarType::Byte;
template <> constexpr ScalarType kTypeOf<bool> = ScalarType::Bool;

// Where an op's tensors must all be: its first one's device.
class Place {
 public:
  explicit Place(const Tensor& first) : on_cpu_(first.is_cpu()), device_(first.get_device()) {}

  // The data of a dense tensor of type T with at least n elements.
  template <class T>
  T* data(const Tensor& tensor, int64_t n, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cpu() == on_cpu_ && tensor.get_device() == device_ && tensor.scalar_type() == kTypeOf<T> &&
                        tensor.is_contiguous() && tensor.numel() >= n,
                    name, " must be a contiguous tensor of the op's dtype and device with at least ", n, " elements");
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
  template <class T>
  T* data(Optional tensor, int64_t n, const char* name) const {
    return tensor ? data<T>(*tensor, n, name) : nullptr;
  }

  hta::Scalar scalar(Optional tensor, const char* name) const {
    if (!tensor) return {nullptr, nullptr};
    if (tensor->scalar_type() == ScalarType::Double) return {nullptr, data<double>(*tensor, 1, name)};
    return {data<float>(*tensor, 1, name), nullptr};
  }

  // On a GPU nobody looks at the codes here: that would wait for the device. Its kernels take care themselves.
  hta::Pattern pattern(Optional codes, Optional labels, int64_t n, int64_t groups) const {
    const int64_t tiles = (n + hta::kTile - 1) / hta::kTile;
    if (!codes) return {nullptr, data<uint8_t>(labels, n, "labels"), 0};
    const auto* code = data<int32_t>(*codes, 2 * tiles, "codes");
    const int64_t rows = labels ? labels->numel() / hta::kTile : 0;
    for (int64_t tile = 0; on_cpu_ && tile < tiles; ++tile) {  // 8 bytes of each 44 KiB
      const int64_t group = code[2 * tile], label = code[2 * tile + 1];
      STD_TORCH_CHECK(0 <= group && group < groups && label < hta::kLabels && ~label < rows,
                      "codes of tile ", tile, " name a group, a label or a row of labels that is not there");
    }
    return {code, data<uint8_t>(labels, rows * hta::kTile, "labels"), rows};
  }

 private:
  bool on_cpu_;
  int32_t device_;
};

template <class T, class G>
hta::StepArgs<T, G> step_args(const Tensor& theta, const Tensor& eta, const Tensor& grad_theta, const Tensor& grad_eta,
                              Optional momentum_theta, Optional momentum_eta, Optional low_theta, Optional low_eta,
                              Optional anchor, Optional codes, Optional labels, const Tensor& hyper,
                              const Tensor& tables, Optional grad_scale, Optional found_inf, const Tensor& stats) {
  const Place place(theta);
  const int64_t n = theta.numel(), groups = hyper.numel() / hta::kHyper;
  hta::StepArgs<T, G> args{};
  args.theta = place.data<T>(theta, n, "theta");
  args.eta = place.data<T>(eta, n, "eta");
  args.g_theta = place.data<G>(grad_theta, n, "grad_theta");
  args.g_eta = place.data<G>(grad_eta, n, "grad_eta");
  args.v_theta = place.data<T>(momentum_theta, n, "momentum_theta");
  args.v_eta = place.data<T>(momentum_eta, n, "momentum_eta");
  STD_TORCH_CHECK(!args.v_theta == !args.v_eta, "momentum_theta and momentum_eta must both be given, or neither");
  args.low_theta = place.data<G>(low_theta, n, "low_theta");
  args.low_eta = place.data<G>(low_eta, n, "low_eta");
  STD_TORCH_CHECK(!args.low_theta == !args.low_eta, "low_theta and low_eta must both be given, or neither");
  args.anchor = place.data<T>(anchor, n, "anchor");
  args.pattern = place.pattern(codes, labels, n, groups);
  args.hyper = place.data<double>(hyper, groups * hta::kHyper, "hyper");
  args.tables = place.data<double>(tables, groups * hta::kLabels * hta::kTable, "tables");
  args.groups = groups;
  args.n = n;
  args.grad_scale = place.scalar(grad_scale, "grad_scale");
  args.found_inf = place.scalar(found_inf, "found_inf");
  args.stats = place.data<double>(stats, 4, "stats");
  return args;
}

template <class T>
hta::PenaltyArgs<T> penalty_args(const Tensor& theta, const Tensor& eta, Optional anchor, Optional codes,
                                 Optional labels, double L, const Tensor& grad_theta, const Tensor& grad_eta,
                                 bool accumulate, const Tensor& value) {
  const Place place(theta);
  const int64_t n = theta.numel();
  hta::PenaltyArgs<T> args{};
  args.theta = place.data<T>(theta, n, "theta");
  args.eta = place.data<T>(eta, n, "eta");
  args.anchor = place.data<T>(anchor, n, "anchor");
  args.g_theta = place.data<T>(grad_theta, n, "grad_theta");
  args.g_eta = place.data<T>(grad_eta, n, "grad_eta");
  args.pattern = place.pattern(codes, labels, n, 1);
  args.L = L;
  args.accumulate = accumulate;
  args.n = n;
  args.value = place.data<T>(value, 1, "value");
  return args;
}

// ----------------------------------------------------------------------------------------------------------------- CPU

template <class T>
void on_cpu(const hta::StepArgs<T>& args, bool skip_nonfinite) {
  bool skip = args.found_inf.get(0) != 0;
  if (!skip && skip_nonfinite) skip = !hta::cpu::all_finite(args.g_theta, args.g_eta, args.n);
  if (skip) {
    args.stats[2] = 1;
    args.stats[3] += 1;
    return;
  }
  double sums[3];
  hta::cpu::step(args, sums);
  args.stats[0] = sums[0];
  args.stats[1] = sums[1];
  args.stats[2] = sums[2] == 0 ? 0 : 1;
}

template <class T>
void on_cpu(const hta::PenaltyArgs<T>& args) {
  double sums[3];
  hta::cpu::penalty(args, sums);
  *args.value = T(args.L * sums[0] + sums[1] / args.L);
}

// ---------------------------------------------------------------------------------------------------------------- CUDA

#ifdef HTA_WITH_CUDA
// A CPU-only torch lacks it; there no tensor is on a GPU, and nothing here is called.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

template <class Launch>
void on_gpu(const Tensor& first, const Launch& launch) {
  const int32_t device = first.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "torch does not name the current CUDA stream");
  const char* error = launch(stream);
  STD_TORCH_CHECK(!error, "hta_fused's CUDA kernel was not launched: ", error);
}

Tensor scratch(const Tensor& theta) {
  return torch::stable::new_empty(theta, {hta::gpu::scratch(theta.numel())}, ScalarType::Double);
}
#endif

template <class T, class G>
void run(const Tensor& theta, const hta::StepArgs<T, G>& args, bool skip_nonfinite) {
  if constexpr (std::is_same_v<T, G> && (std::is_same_v<T, float> || std::is_same_v<T, double>))
    if (theta.is_cpu()) return on_cpu(args, skip_nonfinite);
#ifdef HTA_WITH_CUDA
  if (theta.is_cuda()) {
    const Tensor room = scratch(theta);
    return on_gpu(theta, [&](void* stream) {
      return hta::gpu::step(args, static_cast<double*>(room.mutable_data_ptr()), skip_nonfinite, stream);
    });
  }
#endif
  STD_TORCH_CHECK(false, "hta_fused has no kernel for this dtype on this device");
}

template <class T>
void run(const Tensor& theta, const hta::PenaltyArgs<T>& args) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
    if (theta.is_cpu()) return on_cpu(args);
#ifdef HTA_WITH_CUDA
  if (theta.is_cuda()) {
    const Tensor room = scratch(theta);
    return on_gpu(theta, [&](void* stream) {
      return hta::gpu::penalty(args, static_cast<double*>(room.mutable_data_ptr()), stream);
    });
  }
#endif
  STD_TORCH_CHECK(false, "hta_fused has no kernel for this dtype on this device");
}

// ------------------------------------------------------------------------------------------------------------- the ops

// Calls call(T{}) with the type of a tensor's elements.
template <class Call>
void by_type(const Tensor& tensor, const Call& call) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return call(float{});
  if (type == ScalarType::Double) return call(double{});
  if (type == ScalarType::Half) return call(hta::Half{});
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "hta_fused's kernels take float32, float64, float16 and bfloat16");
  call(hta::BFloat16{});
}

void step_(Tensor theta, Tensor eta, Tensor grad_theta, Tensor grad_eta, std::optional<Tensor> momentum_theta,
           std::optional<Tensor> momentum_eta, std::optional<Tensor> low_theta, std::optional<Tensor> low_eta,
           std::optional<Tensor> anchor, std::optional<Tensor> codes, std::optional<Tensor> labels, Tensor hyper,
           Tensor tables, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, Tensor stats,
           bool skip_nonfinite) {
  const auto with = [&](auto t, auto g) {
    run(theta, step_args<decltype(t), decltype(g)>(theta, eta, grad_theta, grad_eta, momentum_theta, momentum_eta,
                                                   low_theta, low_eta, anchor, codes, labels, hyper, tables, grad_scale,
                                                   found_inf, stats),
        skip_nonfinite);
  };
  const ScalarType of_copies = theta.scalar_type(), of_grads = grad_theta.scalar_type();
  if (of_copies == ScalarType::Float && of_grads == ScalarType::Half) return with(float{}, hta::Half{});
  if (of_copies == ScalarType::Float && of_grads == ScalarType::BFloat16) return with(float{}, hta::BFloat16{});
  by_type(theta, [&](auto t) { with(t, t); });
}

void add_penalty(const Tensor& theta, const Tensor& eta, Optional anchor, Optional codes, Optional labels, double L,
                 const Tensor& grad_theta, const Tensor& grad_eta, bool accumulate, const Tensor& value) {
  by_type(theta, [&](auto t) {
    run(theta, penalty_args<decltype(t)>(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, accumulate, value));
  });
}

std::tuple<Tensor, Tensor, Tensor> penalty(Tensor theta, Tensor eta, std::optional<Tensor> anchor,
                                           std::optional<Tensor> codes, std::optional<Tensor> labels, double L) {
  Tensor grad_theta = torch::stable::empty_like(theta), grad_eta = torch::stable::empty_like(eta);
  Tensor value = torch::stable::new_empty(theta, {});
  add_penalty(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, false, value);
  return {value, grad_theta, grad_eta};
}

Tensor penalty_accumulate_(Tensor grad_theta, Tensor grad_eta, Tensor theta, Tensor eta, std::optional<Tensor> anchor,
                           std::optional<Tensor> codes, std::optional<Tensor> labels, double L) {
  Tensor value = torch::stable::new_empty(theta, {});
  add_penalty(theta, eta, anchor, codes, labels, L, grad_theta, grad_eta, true, value);
  return value;
}

#ifdef HTA_WITH_CUDA
void batch_(Tensor out, Tensor out_labels, Tensor images, Tensor labels, Tensor order, Tensor offsets, Tensor mirrored,
            Tensor scale, Tensor shift, Tensor position, int64_t padding) {
  const Place place(out);
  by_type(out, [&](auto t) {
    using T = decltype(t);
    STD_TORCH_CHECK(out.is_cuda() && out.scalar_type() == kTypeOf<T> && out.dim() == 4, "out must be a 4-D CUDA tensor");
    hta::BatchArgs<T> args{};
    args.out = static_cast<T*>(out.mutable_data_ptr());
    for (int d = 0; d < 4; ++d) args.strides[d] = out.stride(d);
    args.size = out.size(0);
    args.channels = out.size(1);
    args.height = out.size(2);
    args.width = out.size(3);
    args.count = order.numel();
    args.padding = padding;
    args.images = place.data<uint8_t>(images, labels.numel() * args.channels * args.height * args.width, "images");
    args.out_labels = place.data<int64_t>(out_labels, args.size, "out_labels");
    args.labels = place.data<int64_t>(labels, 0, "labels");
    args.order = place.data<int64_t>(order, args.count, "order");
    args.offsets = place.data<int64_t>(offsets, 2 * args.count, "offsets");
    args.mirrored = reinterpret_cast<const uint8_t*>(place.data<bool>(mirrored, args.count, "mirrored"));
    args.scale = place.data<float>(scale, args.channels, "scale");
    args.shift = place.data<float>(shift, args.channels, "shift");
    args.position = place.data<int64_t>(position, 1, "position");
    on_gpu(out, [&](void* stream) { return hta::gpu::batch(args, stream); });
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hta_fused, CPU, m) {
  m.impl("step_", TORCH_BOX(&step_));
  m.impl("penalty", TORCH_BOX(&penalty));
  m.impl("penalty_accumulate_", TORCH_BOX(&penalty_accumulate_));
}

#ifdef HTA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(hta_fused, CUDA, m) {
  m.impl("step_", TORCH_BOX(&step_));
  m.impl("penalty", TORCH_BOX(&penalty));
  m.impl("penalty_accumulate_", TORCH_BOX(&penalty_accumulate_));
  m.impl("batch_", TORCH_BOX(&batch_));
}
#define HTA_CUDA_TARGETS_OR_NULL HTA_CUDA_TARGETS
#else
#define HTA_CUDA_TARGETS_OR_NULL nullptr
#endif

// What ops.py asks through ctypes. The CUDA targets: "75 80 90 120+PTX", or null.
#define HTA_EXPORT extern "C" __attribute__((visibility("default")))
HTA_EXPORT const char* hta_instruction_set() { return hta::cpu::instruction_set(); }
HTA_EXPORT const char* hta_cuda_targets() { return HTA_CUDA_TARGETS_OR_NULL; }
HTA_EXPORT int64_t hta_tile() { return hta::kTile; }
