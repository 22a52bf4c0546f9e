// The GPU kernels: loops around homotopy.h. nvcc compiles them with cuda.cu, NVRTC at run time for nvrtc_ops.py, and
// the tests' emulator as plain C++ (tests/emulator.cpp). Hence no header but our own, and one struct as sole argument.
//
// A block walks kChunk elements: the same sums for the same input whatever the card. Each thread takes 16 bytes of
// each buffer at a time, and issues all these loads before it uses the first. Registers are held down so
// that two blocks or three share a multiprocessor: one loads while another computes.
#pragma once
#include "kernels.h"

#ifndef HTA_DEVICE
#define HTA_DEVICE __device__ __forceinline__
#endif

namespace hta::gpu {

constexpr int kThreads = 256;
constexpr int kChunkTiles = 4;
constexpr int64_t kChunk = kChunkTiles * kTile;
constexpr int kCoefficients = kHyper + kLabels * kTable;  // what one parameter group has

HTA_INLINE constexpr int64_t blocks(int64_t n) { return (n + kChunk - 1) / kChunk; }

#ifdef HTA_MIRROR  // what nvrtc_ops.py takes these to be
constexpr int64_t kMirror[] = {HTA_MIRROR};
constexpr int64_t kOwn[] = {kThreads, kChunk, kTile, sizeof(StepArgs<float>), sizeof(PenaltyArgs<float>), sizeof(BatchArgs<float>)};
template <int... k> constexpr bool mirrored() { return sizeof(kOwn) == sizeof(kMirror) && ((kOwn[k] == kMirror[k]) && ...); }
static_assert(mirrored<0, 1, 2, 3, 4, 5>(), "nvrtc_ops.py is of another version than kernels.h and cuda.cuh");
#endif

// ---------------------------------------------------------------------------------------------------------------- types

template <class T> struct Arithmetic { using type = T; };
template <> struct Arithmetic<Half> { using type = float; };
template <> struct Arithmetic<BFloat16> { using type = float; };

HTA_DEVICE float widen(float x) { return x; }
HTA_DEVICE double widen(double x) { return x; }
HTA_DEVICE float widen(BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
HTA_DEVICE float widen(Half x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return __builtin_bit_cast(_Float16, x.bits);
#endif
}

template <class T> HTA_DEVICE T narrow(typename Arithmetic<T>::type x) { return x; }
template <> HTA_DEVICE BFloat16 narrow<BFloat16>(float x) {  // to nearest, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <> HTA_DEVICE Half narrow<Half>(float x) {
#ifdef __CUDA_ARCH__
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  return {__builtin_bit_cast(uint16_t, _Float16(x))};
#endif
}

// What one thread takes of one buffer.
template <class T, int kLanes>
struct alignas(sizeof(T) * kLanes < 16 ? sizeof(T) * kLanes : 16) Pack {
  T lane[kLanes];
};

template <class T> constexpr int kLanesOf = 16 / sizeof(T);

template <int kLanes, class T>
HTA_DEVICE Pack<T, kLanes> load(const T* p) {
  return *reinterpret_cast<const Pack<T, kLanes>*>(p);
}

template <int kLanes, class T>
HTA_DEVICE void store(T* p, const Pack<T, kLanes>& pack) {
  *reinterpret_cast<Pack<T, kLanes>*>(p) = pack;
}

template <int kCount> struct Lanes { static constexpr int count = kCount; };

template <class... T>
HTA_DEVICE bool aligned(const T*... pointers) {  // null is
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls body(lanes, index) for every element of [begin, end): in groups of kLanes where `wide`, the rest one by one.
template <int kLanes, class Body>
HTA_DEVICE void each_group(int64_t begin, int64_t end, bool wide, const Body& body) {
  const int64_t whole = wide ? end - (end - begin) % kLanes : begin;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x * kLanes; i < whole; i += kThreads * kLanes) body(Lanes<kLanes>{}, i);
#pragma unroll 1
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) body(Lanes<1>{}, i);
}

// --------------------------------------------------------------------------------------------------------------- blocks

// Adds up each thread's three sums in an order that never changes; thread 0 returns with the block's.
HTA_DEVICE void add_up(double sums[3]) {
  __shared__ double of_warp[3][kThreads / 32];
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    for (int distance = 16; distance > 0; distance /= 2) sums[s] += __shfl_down_sync(0xffffffffu, sums[s], distance);
    if (threadIdx.x % 32 == 0) of_warp[s][threadIdx.x / 32] = sums[s];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int s = 0; s < 3; ++s) {
    sums[s] = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sums[s] += of_warp[s][warp];
  }
}

template <class A>
HTA_DEVICE Rule<A> rule_of(const A* coefficients, int label) {
  const A* k = coefficients + kHyper + kTable * label;
  return {{{k[0], k[1], k[2]}, {k[3], k[4], k[5]}}, A(label == 1), A(label == 2)};
}

// Calls body(lanes, index, coefficients, rule, sums) for each group of lanes of this block's chunk, and leaves the
// block's sums. rule(lane) is the lane's. Coefficients go through shared memory, converted once a block.
template <int kLanes, class A, class Body>
HTA_DEVICE void over_chunk(const Pattern& pattern, const double* hyper, const double* tables, int64_t groups, int64_t n,
                           bool wide, double* partial, const Body& body) {
  __shared__ A coefficients[kChunkTiles][kCoefficients];
  __shared__ int32_t label_of[kChunkTiles];
  __shared__ const uint8_t* labels_of[kChunkTiles];
  const int64_t begin = blockIdx.x * kChunk, end = begin + kChunk < n ? begin + kChunk : n;

  for (int at = threadIdx.x; at < kChunkTiles * kCoefficients; at += kThreads) {
    const int slot = at / kCoefficients, which = at % kCoefficients;
    const int64_t tile = begin / kTile + slot;
    if (tile * kTile >= n) break;
    // A code that names what is not there reads something harmless: nobody has looked at it before.
    int64_t group = pattern.codes ? pattern.codes[2 * tile] : 0;
    if (group < 0 || group >= groups) group = 0;
    const double* from = which < kHyper ? hyper + group * kHyper + which
                                        : tables + group * (kLabels * kTable) + which - kHyper;
    coefficients[slot][which] = hyper ? A(*from) : A(0);
    if (which != 0) continue;
    int32_t label = pattern.codes ? pattern.codes[2 * tile + 1] : 0;
    const uint8_t* labels = nullptr;
    if (pattern.codes) {
      if (label < 0 && ~label < pattern.rows) labels = pattern.labels + kTile * ~label;
      if (label < 0 || label >= kLabels) label = 0;
    } else if (pattern.labels) {
      labels = pattern.labels + kTile * tile;
    }
    label_of[slot] = label;
    labels_of[slot] = labels;
  }
  __syncthreads();

  double sums[3] = {0, 0, 0};
  each_group<kLanes>(begin, end, wide, [&](auto lanes, int64_t i) {
    const int slot = int((i - begin) / kTile);
    const A* of_tile = coefficients[slot];
    Sums<A> group{};
    if (const uint8_t* labels = labels_of[slot]) {
      labels += i % kTile;
      body(lanes, i, of_tile, [&](int lane) { return rule_of(of_tile, labels[lane] < kLabels ? labels[lane] : kLabels - 1); }, group);
    } else {
      const Rule<A> rule = rule_of(of_tile, label_of[slot]);
      body(lanes, i, of_tile, [&](int) { return rule; }, group);
    }
    sums[0] += group.anchor;
    sums[1] += group.distance;
    sums[2] += group.poison;
  });
  add_up(sums);
  if (threadIdx.x == 0)
    for (int s = 0; s < 3; ++s) partial[3 * blockIdx.x + s] = sums[s];
}

// -------------------------------------------------------------------------------------------------------------- kernels

template <class T, class G>
HTA_DEVICE bool skipped(const StepArgs<T, G>& args) {
  return args.found_inf.get(0) != 0 || (args.nonfinite && *args.nonfinite);
}

template <class T, class G, bool kMomentum>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2) step_kernel(const StepArgs<T, G> args) {
  using A = typename Arithmetic<T>::type;
  if (skipped(args)) return;
  __shared__ A inverse_scale;
  if (threadIdx.x == 0) inverse_scale = A(1.0 / args.grad_scale.get(1));  // read after over_chunk's first barrier
  const bool wide = aligned(args.theta, args.eta, args.g_theta, args.g_eta, args.v_theta, args.v_eta, args.anchor,
                            args.low_theta, args.low_eta);
  over_chunk<kLanesOf<T>, A>(
      args.pattern, args.hyper, args.tables, args.groups, args.n, wide, args.partial,
      [&](auto lanes, int64_t i, const A* h, const auto& rule, Sums<A>& sums) {
        constexpr int kLanes = decltype(lanes)::count;
        auto theta = load<kLanes>(args.theta + i), eta = load<kLanes>(args.eta + i);
        const auto g_theta = load<kLanes>(args.g_theta + i);
        const auto g_eta = load<kLanes>(args.g_eta + i);
        Pack<T, kLanes> v_theta{}, v_eta{}, anchor{};
        Pack<G, kLanes> low_theta{}, low_eta{};
        if (kMomentum) {
          v_theta = load<kLanes>(args.v_theta + i);
          v_eta = load<kLanes>(args.v_eta + i);
        }
        if (args.anchor) anchor = load<kLanes>(args.anchor + i);
        const Hyper<A> hyper{h[0], h[1], h[2], h[3], h[4], h[5]};
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          A x = widen(theta.lane[lane]), y = widen(eta.lane[lane]);
          A v_x = widen(v_theta.lane[lane]), v_y = widen(v_eta.lane[lane]);
          hta::step<kMomentum>(x, y, A(widen(g_theta.lane[lane]) * inverse_scale), A(widen(g_eta.lane[lane]) * inverse_scale),
                               v_x, v_y, A(widen(anchor.lane[lane])), hyper, rule(lane), sums);
          theta.lane[lane] = narrow<T>(x);
          eta.lane[lane] = narrow<T>(y);
          low_theta.lane[lane] = narrow<G>(x);
          low_eta.lane[lane] = narrow<G>(y);
          if (kMomentum) {
            v_theta.lane[lane] = narrow<T>(v_x);
            v_eta.lane[lane] = narrow<T>(v_y);
          }
        }
        store(args.theta + i, theta);
        store(args.eta + i, eta);
        if (kMomentum) {
          store(args.v_theta + i, v_theta);
          store(args.v_eta + i, v_eta);
        }
        if (args.low_theta) {
          store(args.low_theta + i, low_theta);
          store(args.low_eta + i, low_eta);
        }
      });
}

// The guard's pass: sets the flag where a gradient is not finite. Every block that finds one writes the same 1.
template <class T, class G>
__global__ void __launch_bounds__(kThreads, 2) guard_kernel(const StepArgs<T, G> args) {
  const int64_t begin = blockIdx.x * kChunk, end = begin + kChunk < args.n ? begin + kChunk : args.n;
  typename Arithmetic<G>::type poison = 0;
  each_group<kLanesOf<G>>(begin, end, aligned(args.g_theta, args.g_eta), [&](auto lanes, int64_t i) {
    constexpr int kLanes = decltype(lanes)::count;
    const auto x = load<kLanes>(args.g_theta + i), y = load<kLanes>(args.g_eta + i);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto a = widen(x.lane[lane]), b = widen(y.lane[lane]);
      poison += (a - a) + (b - b);
    }
  });
  if (poison != poison) *args.nonfinite = 1;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) penalty_kernel(const PenaltyArgs<T> args) {
  using A = typename Arithmetic<T>::type;
  const A pull = A(2 * args.L), couple = A(2 / args.L);
  const bool wide = aligned(args.theta, args.eta, args.anchor, args.g_theta, args.g_eta);
  over_chunk<kLanesOf<T>, A>(
      args.pattern, nullptr, nullptr, 1, args.n, wide, args.partial,
      [&](auto lanes, int64_t i, const A*, const auto& rule, Sums<A>& sums) {
        constexpr int kLanes = decltype(lanes)::count;
        const auto theta = load<kLanes>(args.theta + i), eta = load<kLanes>(args.eta + i);
        Pack<T, kLanes> anchor{}, g_theta{}, g_eta{};
        if (args.anchor) anchor = load<kLanes>(args.anchor + i);
        if (args.accumulate) {
          g_theta = load<kLanes>(args.g_theta + i);
          g_eta = load<kLanes>(args.g_eta + i);
        }
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          const A x = widen(theta.lane[lane]), y = widen(eta.lane[lane]), z = widen(anchor.lane[lane]);
          const Rule<A> own = rule(lane);
          A in_theta, in_eta;
          penalty_gradient(in_theta, in_eta, x, y, z, pull, couple, own);
          add_squares(sums, x, y, z, own);
          g_theta.lane[lane] = narrow<T>(args.accumulate ? in_theta + widen(g_theta.lane[lane]) : in_theta);
          g_eta.lane[lane] = narrow<T>(args.accumulate ? in_eta + widen(g_eta.lane[lane]) : in_eta);
        }
        store(args.g_theta + i, g_theta);
        store(args.g_eta + i, g_eta);
      });
}

// The second stage of the sums, in one block.
HTA_DEVICE void add_blocks(const double* partial, int64_t n, double sums[3]) {
  sums[0] = sums[1] = sums[2] = 0;
  for (int64_t block = threadIdx.x; block < blocks(n); block += kThreads)
    for (int s = 0; s < 3; ++s) sums[s] += partial[3 * block + s];
  add_up(sums);
}

template <class T, class G>
__global__ void __launch_bounds__(kThreads, 2) step_end_kernel(const StepArgs<T, G> args) {
  if (skipped(args)) {
    if (threadIdx.x == 0) {
      args.stats[2] = 1;
      args.stats[3] += 1;
    }
    return;
  }
  double sums[3];
  add_blocks(args.partial, args.n, sums);
  if (threadIdx.x != 0) return;
  args.stats[0] = sums[0];
  args.stats[1] = sums[1];
  args.stats[2] = sums[2] == 0 ? 0 : 1;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) penalty_end_kernel(const PenaltyArgs<T> args) {
  double sums[3];
  add_blocks(args.partial, args.n, sums);
  if (threadIdx.x == 0)
    *args.value = narrow<T>(typename Arithmetic<T>::type(args.L * sums[0] + sums[1] / args.L));
}

// A thread makes one pixel, in all its channels.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) batch_kernel(const BatchArgs<T> args) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, pixels = args.height * args.width;
  if (at >= args.size * pixels) return;
  const int64_t n = at / pixels, y = at % pixels / args.width, x = at % args.width, chosen = *args.position + n;
  if (chosen >= args.count) return;
  const int64_t image = args.order[chosen];
  if (at % pixels == 0) args.out_labels[n] = args.labels[image];
  const int64_t row = y + args.offsets[chosen] - args.padding;
  const int64_t column = (args.mirrored[chosen] ? args.width - 1 - x : x) + args.offsets[args.count + chosen] - args.padding;
  const bool inside = row >= 0 && row < args.height && column >= 0 && column < args.width;
  T* out = args.out + n * args.strides[0] + y * args.strides[2] + x * args.strides[3];
  for (int64_t c = 0; c < args.channels; ++c) {
    const float pixel = inside ? args.images[(image * args.channels + c) * pixels + row * args.width + column] : 0;
    out[c * args.strides[1]] = narrow<T>(typename Arithmetic<T>::type(pixel * args.scale[c] + args.shift[c]));
  }
}

}  // namespace hta::gpu

// Every kernel there is, each handed to X in parentheses.
#define HTA_STEP_KERNELS(X, T, G) \
  X((step_kernel<T, G, true>)) X((step_kernel<T, G, false>)) X((guard_kernel<T, G>)) X((step_end_kernel<T, G>))
#define HTA_TYPE_KERNELS(X, T) \
  HTA_STEP_KERNELS(X, T, T) X((penalty_kernel<T>)) X((penalty_end_kernel<T>)) X((batch_kernel<T>))
#define HTA_KERNELS(X)         \
  HTA_TYPE_KERNELS(X, float)   \
  HTA_TYPE_KERNELS(X, double)  \
  HTA_TYPE_KERNELS(X, Half)    \
  HTA_TYPE_KERNELS(X, BFloat16)\
  HTA_STEP_KERNELS(X, float, Half) HTA_STEP_KERNELS(X, float, BFloat16)
