// The ops' CPU and CUDA entries, bound through PyTorch's stable ABI: one build serves later releases of torch, and a
// build with CUDA code loads beside a CPU-only torch as well.
//
// The schemas stand in hta_fused/kernels, beside the fake kernels and the checks that users meet. What is checked here
// only keeps a direct call of torch.ops.hta_fused.* from reading or writing beyond a buffer.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "args.h"
#ifdef HTA_WITH_CUDA
#include "gpu/stream.h"
#endif

// libstdc++ asks glibc 2.32 and later for this. Answered here (never alone), the extension loads with torch's own glibc, 2.28.
extern "C" {
char __libc_single_threaded = 0;
}

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
template <> constexpr ScalarType kTypeOf<int8_t> = ScalarType::Char;
template <> constexpr ScalarType kTypeOf<bool> = ScalarType::Bool;

// Where an op's tensors must all be: its first one's device.
class Place {
 public:
  explicit Place(const Tensor& first) : on_cpu_(first.is_cpu()), device_(first.get_device()) {}

  bool here(const Tensor& tensor, ScalarType type) const {
    return tensor.is_cpu() == on_cpu_ && tensor.get_device() == device_ && tensor.scalar_type() == type;
  }

  // The data of a dense tensor of type T with at least n elements.
  template <class T>
  T* data(const Tensor& tensor, int64_t n, const char* name) const {
    STD_TORCH_CHECK(here(tensor, kTypeOf<T>) && tensor.is_contiguous() && tensor.numel() >= n,
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

  // The rows of a list: a 1-D tensor is one; a 2-D tensor holds several, whose starts may lie anywhere apart.
  template <class T>
  int64_t rows(const std::vector<Tensor>& list, int64_t n, T** out, int64_t limit, const char* name) const {
    return rows(list, n, out, limit, name, kTypeOf<std::remove_const_t<T>>, sizeof(T));
  }
  template <class T>  // of another type than T: Packed
  int64_t rows(const std::vector<Tensor>& list, int64_t n, T** out, int64_t limit, const char* name, ScalarType type,
               int64_t bytes) const {
    int64_t count = 0;
    for (const Tensor& tensor : list) {
      const int64_t held = tensor.dim() > 1 ? tensor.size(0) : 1, stride = held > 1 ? tensor.stride(0) : n;
      STD_TORCH_CHECK(here(tensor, type) && tensor.numel() == held * n && tensor.dim() <= 2 &&
                          (n < 2 || tensor.stride(tensor.dim() - 1) == 1) && stride >= n,
                      name, " must be tensors of the op's dtype and device whose rows hold ", n, " contiguous elements");
      char* const start = static_cast<char*>(tensor.mutable_data_ptr());
      for (int64_t row = 0; row < held; ++row, ++count) {
        STD_TORCH_CHECK(count < limit, name, " must have at most ", limit, " rows");
        out[count] = reinterpret_cast<T*>(start + row * stride * bytes);
      }
    }
    return count;
  }

  // On a GPU nobody looks at the codes here: that would wait for the device. Its kernels take care themselves.
  hta::Pattern pattern(Optional codes, Optional bytes, Optional seed, int64_t n, int64_t blocks, int64_t groups) const {
    const int64_t tiles = (n + hta::kTile - 1) / hta::kTile;
    if (!codes) return {nullptr, data<uint8_t>(bytes, n, "labels"), nullptr, 0};
    const auto* code = data<int32_t>(*codes, 2 * tiles, "codes");
    const int64_t rows = bytes ? bytes->numel() / hta::kTile : 0;
    for (int64_t tile = 0; on_cpu_ && tile < tiles; ++tile) {  // 8 bytes of each 44 KiB
      const int64_t group = code[2 * tile], label = code[2 * tile + 1];
      STD_TORCH_CHECK(0 <= group && group < groups && ~label < rows &&
                          (label <= blocks || (label == hta::kHashed && seed)),
                      "codes of tile ", tile, " name a group, a label or a row of labels that is not there");
    }
    return {code, data<uint8_t>(bytes, rows * hta::kTile, "labels"), data<int64_t>(seed, 1, "seed"), rows};
  }

 private:
  bool on_cpu_;
  int32_t device_;
};

// How many rows a list has, and how many elements a row: a 1-D tensor is a row, a 2-D tensor holds several.
std::pair<int64_t, int64_t> shape_of(const std::vector<Tensor>& copies) {
  STD_TORCH_CHECK(!copies.empty(), "copies must hold at least one tensor");
  int64_t m = 0;
  for (const Tensor& copy : copies) {
    STD_TORCH_CHECK(copy.dim() == 1 || copy.dim() == 2, "copies must be 1-D or 2-D tensors");
    m += copy.dim() > 1 ? copy.size(0) : 1;
  }
  return {m, copies[0].size(copies[0].dim() - 1)};
}

// How a tensor's float32 numbers lie in memory.
struct Stored {
  hta::Format format;
  ScalarType type;
  int64_t bytes;
};

Stored stored(const Tensor& tensor, const char* name, bool split = false) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::BFloat16) return {split ? hta::kSplitBFloat16 : hta::kBFloat16, type, 2};
  if (type == ScalarType::Half) return {split ? hta::kSplitHalf : hta::kHalf, type, 2};
  STD_TORCH_CHECK(!split, name, " with corrections must be bfloat16 or float16");
  if (type == ScalarType::Byte) return {hta::kSigned8, type, 1};
  STD_TORCH_CHECK(type == ScalarType::Float, name, " must be float32, or in one of its formats");
  return {hta::kFloat32, type, 4};
}

// The rows of a step's buffers, of T and G or as they are stored.
template <class T, class G>
void find_rows(const Place& place, hta::StepArgs<T, G>& args, int64_t m, int64_t n, const std::vector<Tensor>& copies,
               const std::vector<Tensor>& grads, const std::vector<Tensor>& states, const std::vector<Tensor>& low,
               Optional anchor, Optional centre, Optional sums, const std::vector<Tensor>& corrections,
               const std::vector<Tensor>& scales, Optional noise) {
  const bool proposes = args.phase & hta::kPropose;
  int64_t held = 0, grads_held = m;
  int64_t low_held = 0;
  if constexpr (std::is_same_v<T, hta::Packed>) {
    const auto rows = [&](const std::vector<Tensor>& list, hta::Packed** out, int64_t limit, const char* name, bool split = false) {
      const Stored as = stored(list[0], name, split);
      STD_TORCH_CHECK(as.format != hta::kSigned8 || &list == &states, name, " must not be in bytes");
      return std::make_pair(place.rows(list, n, out, limit, name, as.type, as.bytes), as);
    };
    const auto one = [&](Optional tensor, const char* name) -> hta::Packed* {
      if (!tensor) return nullptr;
      const Stored as = stored(*tensor, name);
      STD_TORCH_CHECK(as.format != hta::kSigned8 && tensor->dim() == 1, name, " must be 1-D, and not in bytes");
      hta::Packed* row = nullptr;
      place.rows({*tensor}, n, &row, 1, name, as.type, as.bytes);
      args.anchor_format = as.format;
      return row;
    };
    args.copies_format = rows(copies, args.copies, hta::kMaxCopies, "copies", !corrections.empty()).second.format;
    if (!corrections.empty())
      STD_TORCH_CHECK(place.rows(corrections, n, args.corrections, hta::kMaxCopies, "corrections") == m,
                      "corrections must have ", m, " rows");
    args.noise = place.data<int64_t>(noise, 1, "noise");
    if (proposes && !grads.empty()) {
      const auto [count, as] = rows(grads, const_cast<hta::Packed**>(args.grads), hta::kMaxCopies, "grads");
      grads_held = count, args.grads_format = as.format;
    }
    if (proposes && !states.empty()) {
      const auto [count, as] = rows(states, args.states, 2 * hta::kMaxCopies, "states");
      held = count, args.states_format = as.format;
      const int64_t blocks = (n + hta::kScaled - 1) / hta::kScaled;
      STD_TORCH_CHECK(as.format != hta::kSigned8 || (noise && place.rows(scales, blocks, args.scales, 2 * hta::kMaxCopies, "scales") == held),
                      "states in bytes must come with noise, and with ", held, " rows of scales");
    }
    if (!low.empty()) {
      const auto [count, as] = rows(low, args.low, hta::kMaxCopies, "low");
      STD_TORCH_CHECK(grads.empty() || as.format == args.grads_format, "low must be of the gradients' dtype");
      low_held = count, args.grads_format = as.format;
    }
    args.anchor = one(anchor, "anchor");
    args.centre = one(centre, "centre");
    STD_TORCH_CHECK(!anchor || !centre || anchor->scalar_type() == centre->scalar_type(), "centre must be of the anchor's dtype");
    args.sums = reinterpret_cast<hta::Packed*>(place.data<float>(sums, n, "sums"));
  } else {
    STD_TORCH_CHECK(corrections.empty() && scales.empty(), "corrections and scales are for copies and states in other formats");
    place.rows(copies, n, args.copies, hta::kMaxCopies, "copies");
    if (proposes) {
      grads_held = place.rows(grads, n, args.grads, hta::kMaxCopies, "grads");
      held = place.rows(states, n, args.states, 2 * hta::kMaxCopies, "states");
    }
    low_held = place.rows(low, n, args.low, hta::kMaxCopies, "low");
    args.anchor = place.data<T>(anchor, n, "anchor");
    args.centre = place.data<T>(centre, n, "centre");
    args.sums = place.data<T>(sums, n, "sums");
  }
  STD_TORCH_CHECK(!proposes || (grads_held == m && !grads.empty()), "grads must have ", m, " rows");
  STD_TORCH_CHECK(!proposes || (args.proposal == hta::kAdamW ? held == 2 * m : held == m || held == 0), "states must have ", m,
                  args.proposal == hta::kAdamW ? " rows twice" : " rows or none", ", got ", held);
  STD_TORCH_CHECK(low_held == m || low_held == 0, "low must have ", m, " rows or none, got ", low_held);
}

template <class T, class G>
hta::StepArgs<T, G> step_args(const std::vector<Tensor>& copies, const std::vector<Tensor>& grads,
                              const std::vector<Tensor>& states, const std::vector<Tensor>& low, Optional anchor,
                              Optional centre, Optional sums, Optional codes, Optional labels, Optional seed,
                              const Tensor& rules, Optional grad_scale, Optional found_inf, const Tensor& stats,
                              int64_t proposal, bool explicit_mode, bool guard, int64_t phase,
                              const std::vector<Tensor>& corrections, const std::vector<Tensor>& scales, Optional noise) {
  const Place place(copies[0]);
  const auto [m, n] = shape_of(copies);
  STD_TORCH_CHECK(rules.dim() == 2 && rules.size(0) > 0, "rules must be a 2-D tensor, a row for each group");
  const int64_t groups = rules.size(0), width = rules.size(1);
  const int64_t blocks = (width - hta::kNumbers) / ((m + 1) * hta::kRule) - 1;
  hta::StepArgs<T, G> args{};
  STD_TORCH_CHECK(m <= blocks && blocks <= hta::kMaxCopies && hta::rules_width(m, blocks) == width,
                  "rules must have rows of ", hta::rules_width(m, m), " numbers, got ", width);
  STD_TORCH_CHECK(proposal == hta::kSgd || proposal == hta::kAdamW, "proposal must be 0 or 1, got ", proposal);
  STD_TORCH_CHECK(0 < phase && phase < 4, "phase must be 1, 2 or 3, got ", phase);
  STD_TORCH_CHECK(phase == 3 || sums, "sums must be given where a phase is done alone");
  args.proposal = proposal;
  args.phase = phase;
  find_rows(place, args, m, n, copies, grads, states, low, anchor, centre, sums, corrections, scales, noise);
  args.pattern = place.pattern(codes, labels, seed, n, blocks, groups);
  args.rules = place.data<hta::arithmetic_t<T>>(rules, groups * width, "rules");
  args.groups = groups;
  args.n = n;
  args.grad_scale = place.scalar(grad_scale, "grad_scale");
  args.found_inf = place.scalar(found_inf, "found_inf");
  args.stats = place.data<double>(stats, 4, "stats");
  args.m = m;
  args.blocks = blocks;
  args.explicit_mode = explicit_mode;
  args.guard = guard;
  return args;
}

template <class T>
hta::PenaltyArgs<T> penalty_args(const std::vector<Tensor>& copies, const std::vector<Tensor>& grads, Optional anchor,
                                 Optional codes, Optional labels, Optional seed, const Tensor& rules, bool accumulate,
                                 const Tensor& value) {
  const Place place(copies[0]);
  const auto [m, n] = shape_of(copies);
  hta::PenaltyArgs<T> args{};
  place.rows(copies, n, args.copies, hta::kMaxCopies, "copies");
  STD_TORCH_CHECK(place.rows(grads, n, args.grads, hta::kMaxCopies, "grads") == m, "grads must have ", m, " rows");
  args.anchor = place.data<T>(anchor, n, "anchor");
  args.pattern = place.pattern(codes, labels, seed, n, m, 1);
  args.rules = place.data<hta::arithmetic_t<T>>(rules, hta::rules_width(m, m), "rules");
  args.n = n;
  args.m = m;
  args.accumulate = accumulate;
  args.value = place.data<T>(value, 1, "value");
  return args;
}

// ----------------------------------------------------------------------------------------------------------------- CPU

template <class T>
void on_cpu(const hta::StepArgs<T>& args) {
  bool skip = args.found_inf.get(0) != 0;
  if (!skip && args.guard && (args.phase & hta::kPropose)) skip = !hta::cpu::all_finite(args);
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
  *args.value = T(hta::cpu::penalty(args));
}

// ---------------------------------------------------------------------------------------------------------------- CUDA

#ifdef HTA_WITH_CUDA
template <class Launch>
void on_gpu(const Tensor& first, const Launch& launch) {
  const int32_t device = first.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  const auto current = hta::gpu::current_stream();
  STD_TORCH_CHECK(current && current(device, &stream) == 0, "torch does not name the current CUDA stream");
  const char* error = launch(stream);
  STD_TORCH_CHECK(!error, "hta_fused's CUDA kernel was not launched: ", error);
}

Tensor scratch(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {hta::gpu::scratch(n)}, ScalarType::Double);
}
#endif

template <class T, class G>
void run(const Tensor& like, const hta::StepArgs<T, G>& args) {
  if constexpr (std::is_same_v<T, G> && !std::is_same_v<T, hta::Half> && !std::is_same_v<T, hta::BFloat16>)
    if (like.is_cpu()) return on_cpu(args);
#ifdef HTA_WITH_CUDA
  if (like.is_cuda()) {
    const Tensor room = scratch(like, args.n);
    return on_gpu(like, [&](void* stream) {
      return hta::gpu::step(args, static_cast<double*>(room.mutable_data_ptr()), stream);
    });
  }
#endif
  STD_TORCH_CHECK(false, "hta_fused has no kernel for this dtype on this device");
}

template <class T>
void run(const Tensor& like, const hta::PenaltyArgs<T>& args) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
    if (like.is_cpu()) return on_cpu(args);
#ifdef HTA_WITH_CUDA
  if (like.is_cuda()) {
    const Tensor room = scratch(like, args.n);
    return on_gpu(like, [&](void* stream) {
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

void step_(std::vector<Tensor> copies, std::vector<Tensor> grads, std::vector<Tensor> states, std::vector<Tensor> low,
           std::optional<Tensor> anchor, std::optional<Tensor> centre, std::optional<Tensor> sums,
           std::optional<Tensor> codes, std::optional<Tensor> labels, std::optional<Tensor> seed, Tensor rules,
           std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, Tensor stats, int64_t proposal,
           bool explicit_mode, bool skip_nonfinite, int64_t phase, std::vector<Tensor> corrections,
           std::vector<Tensor> scales, std::optional<Tensor> noise) {
  shape_of(copies);
  const auto with = [&](auto t, auto g) {
    run(copies[0], step_args<decltype(t), decltype(g)>(copies, grads, states, low, anchor, centre, sums, codes, labels,
                                                       seed, rules, grad_scale, found_inf, stats, proposal,
                                                       explicit_mode, skip_nonfinite, phase, corrections, scales, noise));
  };
  const ScalarType of_copies = copies[0].scalar_type();
  const ScalarType of_grads = !low.empty() ? low[0].scalar_type() : grads.empty() ? of_copies : grads[0].scalar_type();
  const bool of_one = corrections.empty() && (states.empty() || states[0].scalar_type() == of_copies) &&
                      (!anchor || anchor->scalar_type() == of_copies) && (!centre || centre->scalar_type() == of_copies);
  if (!of_one || (copies[0].is_cpu() && of_grads != of_copies)) return with(hta::Packed{}, hta::Packed{});
  if (of_copies == ScalarType::Float && of_grads == ScalarType::Half) return with(float{}, hta::Half{});
  if (of_copies == ScalarType::Float && of_grads == ScalarType::BFloat16) return with(float{}, hta::BFloat16{});
  by_type(copies[0], [&](auto t) { with(t, t); });
}

// The value, and [m, ...] gradients.
std::tuple<Tensor, Tensor> penalty(std::vector<Tensor> copies, std::optional<Tensor> anchor,
                                   std::optional<Tensor> codes, std::optional<Tensor> labels,
                                   std::optional<Tensor> seed, Tensor rules) {
  const auto [m, n] = shape_of(copies);
  Tensor grads = torch::stable::new_empty(copies[0], {m, n}), value = torch::stable::new_empty(copies[0], {});
  by_type(copies[0], [&](auto t) {
    run(copies[0], penalty_args<decltype(t)>(copies, {grads}, anchor, codes, labels, seed, rules, false, value));
  });
  return {value, grads};
}

Tensor penalty_accumulate_(std::vector<Tensor> grads, std::vector<Tensor> copies, std::optional<Tensor> anchor,
                           std::optional<Tensor> codes, std::optional<Tensor> labels, std::optional<Tensor> seed,
                           Tensor rules) {
  shape_of(copies);
  Tensor value = torch::stable::new_empty(copies[0], {});
  by_type(copies[0], [&](auto t) {
    run(copies[0], penalty_args<decltype(t)>(copies, grads, anchor, codes, labels, seed, rules, true, value));
  });
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

// What kernels/__init__.py asks through ctypes. The CUDA targets: "75 80 90 120+PTX", or null.
#define HTA_EXPORT extern "C" __attribute__((visibility("default")))
HTA_EXPORT const char* hta_instruction_set() { return hta::cpu::instruction_set(); }
HTA_EXPORT const char* hta_cuda_targets() { return HTA_CUDA_TARGETS_OR_NULL; }
HTA_EXPORT const char* hta_layout() {
  static const std::string layout = std::to_string(hta::kTile) + " " + std::to_string(hta::kNumbers) + " " +
                                    std::to_string(hta::kRule) + " " + std::to_string(hta::kHashed) + " " +
                                    std::to_string(hta::kScaled);
  return layout.c_str();
}
