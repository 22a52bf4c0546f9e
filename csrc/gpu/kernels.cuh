// The GPU kernels: loops around arithmetic.h. nvcc compiles them with launch.cu, NVRTC at run time for
// kernels/nvrtc.py, and the tests' emulator as plain C++ (tests/emulator.cpp). Hence no header but our own, and one
// struct as sole argument.
//
// A block walks kChunk elements: the same sums for the same input whatever the card. Each thread takes 16 bytes of each
// buffer at a time, and issues the loads of several copies before it uses the first. There is no prologue: the first
// loads are the buffers'; codes and rules come while those are on their way, and are kept while a tile's code is that
// of the last. Registers are held down so that several blocks share a multiprocessor.
#pragma once
#include "rows.cuh"

namespace hta::gpu {

HTA_INLINE constexpr int64_t blocks(int64_t n) { return (n + kChunk - 1) / kChunk; }

#ifdef HTA_MIRROR  // what nvrtc.py takes these to be
constexpr int64_t kMirror[] = {HTA_MIRROR};
constexpr int64_t kOwn[] = {kThreads, kChunk, sizeof(StepArgs<float>), sizeof(PenaltyArgs<float>), sizeof(BatchArgs<float>)};
template <int... k> constexpr bool mirrored() { return sizeof(kOwn) == sizeof(kMirror) && ((kOwn[k] == kMirror[k]) && ...); }
static_assert(mirrored<0, 1, 2, 3, 4>(), "nvrtc.py is of another version than args.h and rows.cuh");
#endif

// Adds up each thread's two sums in an order that never changes; thread 0 returns with the block's.
HTA_DEVICE void add_up(double sums[2]) {
  __shared__ double of_warp[2][kThreads / 32];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    for (int distance = 16; distance > 0; distance /= 2) sums[s] += __shfl_down_sync(0xffffffffu, sums[s], distance);
    if (threadIdx.x % 32 == 0) of_warp[s][threadIdx.x / 32] = sums[s];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int s = 0; s < 2; ++s) {
    sums[s] = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sums[s] += of_warp[s][warp];
  }
}

HTA_DEVICE void leave_sums(double* partial, double anchored, double pairs) {
  double sums[2] = {anchored, pairs};
  add_up(sums);
  if (threadIdx.x != 0) return;
  partial[2 * blockIdx.x] = sums[0];
  partial[2 * blockIdx.x + 1] = sums[1];
}

// ------------------------------------------------------------------------------------------------------ tiles' rules

// The group and the labels of one thread's lanes, a byte each. A code that names what is not there reads something
// harmless: nobody has looked at it before.
template <int kLanes> struct Bytes { using type = uint32_t; };
template <> struct Bytes<2> { using type = uint16_t; };
template <> struct Bytes<8> { using type = uint64_t; };

template <int kLanes>
struct Labels {
  int32_t group = 0;
  bool mixed = false;
  typename Bytes<kLanes>::type packed = 0;

  template <class Group>
  HTA_DEVICE Labels(Group lanes, const Pattern& pattern, int64_t groups, int32_t blocks, int64_t i) {
    int32_t uniform = 0;
    const uint8_t* bytes = pattern.bytes ? pattern.bytes + i : nullptr;
    if (pattern.codes) {
      const Pack<int32_t, 2> code = load<2>(pattern.codes + 2 * (i / kTile));
      group = code.lane[0] >= 0 && code.lane[0] < groups ? code.lane[0] : 0;
      uniform = code.lane[1];
      bytes = uniform < 0 && ~uniform < pattern.rows ? pattern.bytes + kTile * ~uniform + i % kTile : nullptr;
      mixed = uniform == kHashed && pattern.seed;
    }
    if (mixed) {
      const HashKeys keys = hash_keys(*pattern.seed, i / kTile);
      for (int lane = 0; lane < kLanes; ++lane)
        packed |= typename Bytes<kLanes>::type(hashed_label(keys, uint32_t(i % kTile + lane), uint32_t(blocks))) << (8 * lane);
    } else if (bytes) {
      mixed = true;
      if (kLanes == 1) packed = *bytes;
      else load_labels(lanes, bytes, packed);
    } else {
      packed = uniform >= 0 && uniform <= blocks ? uniform : 0;
    }
  }

  HTA_DEVICE int32_t of(int lane, int32_t blocks) const {
    const int32_t label = int32_t(packed >> (8 * lane)) & 0xff;
    return label <= blocks ? label : blocks;
  }
};

template <class A>
HTA_DEVICE Rule<A> rule_of(const A* group, int32_t m, int32_t label, int32_t j) {
  const A* r = group + kNumbers + (label * (m + 1) + j) * kRule;
  return {r[0], r[1], r[2], r[3], r[4]};
}

// Calls body(lane, rule) with row j's rule for each lane.
template <int kLanes, class A, class Body>
HTA_DEVICE void each_lane(const Labels<kLanes>& labels, const A* group, int32_t m, int32_t blocks, int32_t j, const Body& body) {
  Rule<A> rule = rule_of(group, m, labels.of(0, blocks), j);
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lane > 0 && labels.mixed) rule = rule_of(group, m, labels.of(lane, blocks), j);
    body(lane, rule);
  }
}

// ---------------------------------------------------------------------------------------------------------------- step

template <class T, class G>
HTA_DEVICE bool skipped(const StepArgs<T, G>& args) {
  return args.found_inf.get(0) != 0 || (args.guard && *args.nonfinite);
}

// What is read of some copies at once.
template <class T, class G, class P, int kCount, class Group>
struct Batch {
  Loaded<T, Group> x[kCount], state[kCount][P::kStates];
  Loaded<G, Group> g[kCount];

  HTA_DEVICE void read(const StepArgs<T, G>& args, Group lanes, bool proposes, int32_t base, int64_t i) {
    const Rows<T, G> rows{args};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int32_t j = base + k;
      if (j >= args.m) continue;
      x[k] = load(lanes, rows.copy(j), i);
      if (!proposes) continue;
      g[k] = load(lanes, rows.grad(j), i);
#pragma unroll
      for (int buffer = 0; buffer < P::kStates; ++buffer)
        state[k][buffer] = args.states[0] ? load(lanes, rows.state(buffer, j), i) : Loaded<T, Group>{};
    }
  }
};

// Blocks that are to share a multiprocessor, which is what registers are held down to; and copies whose loads are all
// issued before the first is used. Pairs under SGD get 64 registers: four blocks, a copy at a time.
template <class T, class P, int kCopies>
constexpr bool kSmall = sizeof(T) == 4 && kCopies == 2 && P::kStates == 1;
#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 800;
#endif
// Kernels of formats that need more than 128 registers: all of Pascal's, and those for any number of copies on Blackwell.
template <class P, int kCopies, bool kExplicit>
constexpr bool kAlone = kArch < 700 || (kArch >= 1000 && kCopies == 0) || (kExplicit && P::kStates > 1);
template <class T, class G, class P, int kCopies, bool kExplicit>
constexpr int kBlocks = kInFormats<T> ? (kAlone<P, kCopies, kExplicit> ? 1 : 2) : kSmall<T, P, kCopies> ? (sizeof(G) == sizeof(T) ? 4 : 3) : 2;
template <class T, class P, int kCopies>
constexpr int kTogether = kCopies == 0 || kSmall<T, P, kCopies> || kInFormats<T> ? 1 : kCopies == 2 ? 2 : (kCopies == 4 ? 4 : 2) / P::kStates;

// Up to kCopies copies, whose proposals stay in registers. 0: any number, proposed twice: once for the sum, and once
// more, out of the cache, for good. Only such kernels know the explicit mode, and the phases by themselves.
template <class T, class G, class P, int kCopies, bool kExplicit>
__global__ void __launch_bounds__(kThreads, kBlocks<T, G, P, kCopies, kExplicit>) step_kernel(const StepArgs<T, G> args) {
  using A = arithmetic_t<T>;
  constexpr int kHeld = kCopies ? kCopies : 1, kAtOnce = kTogether<T, P, kCopies>;
  const int32_t m = args.m, blocks = kCopies ? m : args.blocks, end = kCopies ? kCopies : m;
  const bool skip = skipped(args), proposes = kCopies || args.phase & kPropose, shares = kCopies || args.phase & kShare;
  const A inverse_scale = A(1.0 / args.grad_scale.get(1)), part = A(1) / A(m);
  const Rows<T, G> rows{args};
  const bool wide = aligned(m, [&](int j) { return rows.copy(j); }) && aligned(proposes ? m : 0, [&](int j) { return rows.grad(j); }) &&
                    aligned(m, [&](int j) { return rows.low(j); }) &&
                    aligned(proposes ? P::kStates * m : 0, [&](int row) { return rows.state(0, row); }) &&
                    aligned(rows.anchor()) && aligned(rows.centre()) && aligned(rows.sums()) && aligned(args.pattern.bytes);
  const Noise<T> noise(args);
  A anchored = 0, pairs = 0, poison = 0;
  // Eight lanes of AdamW would not fit the registers.
  constexpr int kMost = sizeof(T) == 2 && (P::kStates > 1 || kExplicit) ? 4 : kLanesOf<T>;
  each_group_of<T, kMost>(args.n, wide, [&](auto lanes, int64_t i) {
    using Group = decltype(lanes);
    constexpr int kLanes = Group::count;
    Batch<T, G, P, kAtOnce, Group> batch;
    Loaded<T, Group> loaded_anchor{}, loaded_sum{};
    batch.read(args, lanes, proposes, 0, i);
    if (args.anchor) loaded_anchor = load(lanes, rows.anchor(), i);
    if (!proposes) loaded_sum = load(lanes, rows.sums(), i);
    if (skip) return;
    const Labels<kLanes> labels(lanes, args.pattern, args.groups, blocks, i);
    const A* const group = args.rules + labels.group * rules_width(m, blocks);
    const auto& number = *reinterpret_cast<const typename P::template Numbers<A>*>(group);

    const auto anchor = opened(rows.anchor(), loaded_anchor), zeroth_copy = opened(rows.copy(0), batch.x[0]);
    auto sum = opened(rows.sums(), loaded_sum);
    const auto random = noise.of(i);

    A a[kHeld][kLanes], z[kLanes], s[kLanes], first[kLanes], gaps[kLanes], reads[kLanes], squares[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      z[lane] = widen(anchor.lane[lane]);
      s[lane] = widen(sum.lane[lane]);
      first[lane] = widen(zeroth_copy.lane[lane]);
      gaps[lane] = reads[lane] = squares[lane] = 0;
    }
    if (kExplicit) {
#pragma unroll 1
      for (int32_t j = 0; j < m; ++j) {
        const auto copy = opened(rows.copy(j), load(lanes, rows.copy(j), i));
        each_lane(labels, group, m, blocks, j, [&](int lane, const Rule<A>& rule) {
          const A value = widen(copy.lane[lane]);
          s[lane] += rule.read * value;
          gaps[lane] += rule.read * (value - first[lane]);
          reads[lane] += rule.read;
        });
      }
    }
    // The proposal of copy base + k, from the batch; its state, where it is for good.
    const auto propose = [&](int32_t base, int k, A* mine, bool for_good) {
      const int32_t j = base + k;
      const auto copy = opened(rows.copy(j), batch.x[k]);
      if (!proposes) {
        for (int lane = 0; lane < kLanes; ++lane) mine[lane] = widen(copy.lane[lane]);
        return;
      }
      const auto grad = opened(rows.grad(j), batch.g[k]);
      Pack<T, kLanes> held[P::kStates];
      for (int buffer = 0; buffer < P::kStates; ++buffer) held[buffer] = opened(rows.state(buffer, j), batch.state[k][buffer]);
      const A scale = inverse_scale * number.sign;
      each_lane(labels, group, m, blocks, j, [&](int lane, const Rule<A>& rule) {
        const A x = widen(copy.lane[lane]);
        A g = A(widen(grad.lane[lane])) * scale;
        poison += g - g;
        if (kExplicit) g += quadratic_gradient(x, x - first[lane], gaps[lane], reads[lane], z[lane], rule);
        A state[P::kStates];
        for (int buffer = 0; buffer < P::kStates; ++buffer) state[buffer] = widen(held[buffer].lane[lane]);
        mine[lane] = P::propose(x, g, state, number);
        for (int buffer = 0; buffer < P::kStates; ++buffer) held[buffer].lane[lane] = narrow<T>(state[buffer]);
        if (!kExplicit && (kCopies || !for_good)) s[lane] += rule.read * mine[lane];
      });
      for (int buffer = 0; for_good && args.states[0] && buffer < P::kStates; ++buffer)
        store(lanes, rows.state(buffer, j), i, held[buffer], random.of((1 + buffer) * m + j));
    };
#pragma unroll
    for (int32_t base = 0; base < end; base += kAtOnce) {
      if (base) batch.read(args, lanes, proposes, base, i);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (base + k < m) propose(base, k, a[kCopies ? base + k : 0], kCopies);
    }
    if (!kCopies && args.sums && proposes) {
      for (int lane = 0; lane < kLanes; ++lane) sum.lane[lane] = narrow<T>(s[lane]);
      store(lanes, rows.sums(), i, sum);
    }

    A zeroth[kLanes], apart[kLanes];  // where the copies do not stay in registers
    for (int lane = 0; lane < kLanes; ++lane) apart[lane] = 0;
#pragma unroll
    for (int32_t j = 0; j < end; ++j) {
      if (j >= m) continue;
      A* const mine = a[kCopies ? j : 0];
      if (!kCopies) {
        batch.read(args, lanes, proposes, j, i);
        propose(j, 0, mine, true);
      }
      Pack<T, kLanes> x;
      Pack<G, kLanes> low;  // of another type than the copies, or not wanted
      each_lane(labels, group, m, blocks, j, [&](int lane, const Rule<A>& rule) {
        if (shares && !kExplicit) mine[lane] = shared(mine[lane], s[lane], z[lane], rule);
        if (lanes.has(lane)) anchored += rule.anchored * ((mine[lane] - z[lane]) * (mine[lane] - z[lane]));
        if (!kCopies) {
          if (j == 0) zeroth[lane] = mine[lane];
          const A gap = mine[lane] - zeroth[lane];
          apart[lane] += gap;
          squares[lane] += gap * gap;
        }
        x.lane[lane] = narrow<T>(mine[lane]);
        low.lane[lane] = narrow<G>(mine[lane]);
      });
      store(lanes, rows.copy(j), i, x, random.of(j));
      if ((sizeof(G) != sizeof(T) || kInFormats<T>) && args.low[0]) store(lanes, rows.low(j), i, low);
    }
    // sum_{i<j} (x_i - x_j)^2 = m sum_j (x_j - mean)^2 = m sum_j (x_j - x_0)^2 - (sum_j (x_j - x_0))^2
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!lanes.has(lane)) continue;
      if (!kCopies) pairs += A(m) * squares[lane] - apart[lane] * apart[lane];
      A gaps_sum = 0;
#pragma unroll
      for (int j = 1; j < kCopies; ++j)
        if (j < m) gaps_sum += a[j][lane] - a[0][lane];
      if (kCopies == 2) pairs += gaps_sum * gaps_sum;
#pragma unroll
      for (int j = 0; kCopies > 2 && j < kCopies; ++j) {
        const A gap = (a[j][lane] - a[0][lane]) - part * gaps_sum;
        if (j < m) pairs += A(m) * (gap * gap);
      }
    }
    if (args.centre && shares) {
      auto centre = opened(rows.centre(), load(lanes, rows.centre(), i));
      each_lane(labels, group, m, blocks, m, [&](int lane, const Rule<A>& rule) {
        centre.lane[lane] = narrow<T>(shared(A(widen(centre.lane[lane])), s[lane], z[lane], rule));
      });
      store(lanes, rows.centre(), i, centre, random.of(3 * m));
    }
  });
  if (skip) return;
  if (poison != poison) args.nonfinite[1] = 1;  // every thread that finds one writes the same; no block of this kernel reads it
  leave_sums(args.partial, anchored, pairs);
}

// The guard's pass: sets the flag where a gradient is not finite.
template <class T, class G>
__global__ void __launch_bounds__(kThreads, 2) guard_kernel(const StepArgs<T, G> args) {
  arithmetic_t<G> poison = 0;
  const Rows<T, G> rows{args};
  const bool wide = aligned(args.m, [&](int j) { return rows.grad(j); });
  each_group_of<G, kLanesOf<G>>(args.n, wide, [&](auto lanes, int64_t i) {
#pragma unroll 4
    for (int32_t j = 0; j < args.m; ++j) {
      const auto g = opened(rows.grad(j), load(lanes, rows.grad(j), i));
      for (int lane = 0; lane < lanes.count; ++lane) {
        const auto value = widen(g.lane[lane]);
        poison += value - value;
      }
    }
  });
  if (poison != poison) *args.nonfinite = 1;
}

// The second stage of the sums, in one block.
HTA_DEVICE void add_blocks(const double* partial, int64_t n, double sums[2]) {
  sums[0] = sums[1] = 0;
  for (int64_t block = threadIdx.x; block < blocks(n); block += kThreads)
    for (int s = 0; s < 2; ++s) sums[s] += partial[2 * block + s];
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
  double sums[2] = {0, 0};
  add_blocks(args.partial, args.n, sums);
  if (threadIdx.x != 0) return;
  args.stats[0] = sums[0];
  args.stats[1] = sums[1];
  args.stats[2] = args.nonfinite[0] || args.nonfinite[1] ? 1 : 0;
}

// ------------------------------------------------------------------------------------------------------------- penalty

template <class T>
__global__ void __launch_bounds__(kThreads, 2) penalty_kernel(const PenaltyArgs<T> args) {
  using A = arithmetic_t<T>;
  const int32_t m = args.m;
  const bool wide = aligned(m, [&](int j) { return args.copies[j]; }) && aligned(m, [&](int j) { return args.grads[j]; }) &&
                    aligned(args.anchor) && aligned(args.pattern.bytes);
  A energy = 0;
  each_group<kLanesOf<T>>(args.n, wide, [&](auto lanes, int64_t i) {
    constexpr int kLanes = decltype(lanes)::count;
    Pack<T, kLanes> anchor{}, zero = load<kLanes>(args.copies[0] + i);
    if (args.anchor) anchor = load<kLanes>(args.anchor + i);
    const Labels<kLanes> labels(lanes, args.pattern, 1, m, i);
    A gaps[kLanes], reads[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) gaps[lane] = reads[lane] = 0;
#pragma unroll 2
    for (int32_t j = 0; j < m; ++j) {
      const auto x = load<kLanes>(args.copies[j] + i);
      each_lane(labels, args.rules, m, m, j, [&](int lane, const Rule<A>& rule) {
        gaps[lane] += rule.read * (A(widen(x.lane[lane])) - A(widen(zero.lane[lane])));
        reads[lane] += rule.read;
      });
    }
#pragma unroll 2
    for (int32_t j = 0; j < m; ++j) {
      const auto copy = load<kLanes>(args.copies[j] + i);
      Pack<T, kLanes> g{};
      if (args.accumulate) g = load<kLanes>(args.grads[j] + i);
      each_lane(labels, args.rules, m, m, j, [&](int lane, const Rule<A>& rule) {
        const A x = widen(copy.lane[lane]), z = widen(anchor.lane[lane]), gap = x - A(widen(zero.lane[lane]));
        const A gradient = quadratic_gradient(x, gap, gaps[lane], reads[lane], z, rule);
        // Over all j the squares of the distances to the mean, times m, are those of the pairs' distances.
        const A off = gap - gaps[lane] / reads[lane];
        energy += A(0.5) * (rule.pull * ((x - z) * (x - z)) + rule.share * (reads[lane] * (off * off)));
        g.lane[lane] = narrow<T>(args.accumulate ? gradient + A(widen(g.lane[lane])) : gradient);
      });
      store(args.grads[j] + i, g);
    }
  });
  leave_sums(args.partial, energy, 0);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) penalty_end_kernel(const PenaltyArgs<T> args) {
  double sums[2];
  add_blocks(args.partial, args.n, sums);
  if (threadIdx.x == 0) *args.value = narrow<T>(arithmetic_t<T>(sums[0]));
}

// --------------------------------------------------------------------------------------------------------------- batch

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
    out[c * args.strides[1]] = narrow<T>(arithmetic_t<T>(pixel * args.scale[c] + args.shift[c]));
  }
}

}  // namespace hta::gpu

// Every kernel there is, each handed to X in parentheses. Float32 copies have instances for up to 2, 4 and 8 copies.
#define HTA_PROPOSAL_KERNELS(X, T, G, P) \
  X((step_kernel<T, G, P, 2, false>)) X((step_kernel<T, G, P, 0, false>)) X((step_kernel<T, G, P, 0, true>))
#define HTA_STEP_KERNELS(X, T, G) \
  HTA_PROPOSAL_KERNELS(X, T, G, Sgd) HTA_PROPOSAL_KERNELS(X, T, G, AdamW) X((guard_kernel<T, G>)) X((step_end_kernel<T, G>))
#define HTA_FLOAT_KERNELS(X, G)                                                                              \
  HTA_STEP_KERNELS(X, float, G) X((step_kernel<float, G, Sgd, 4, false>)) X((step_kernel<float, G, Sgd, 8, false>)) \
  X((step_kernel<float, G, AdamW, 4, false>)) X((step_kernel<float, G, AdamW, 8, false>))
#define HTA_OTHER_KERNELS(X, T) X((penalty_kernel<T>)) X((penalty_end_kernel<T>)) X((batch_kernel<T>))
#define HTA_KERNELS(X)                                                                                       \
  HTA_FLOAT_KERNELS(X, float) HTA_FLOAT_KERNELS(X, Half) HTA_FLOAT_KERNELS(X, BFloat16)                      \
  HTA_STEP_KERNELS(X, Packed, Packed)                                                                        \
  HTA_STEP_KERNELS(X, double, double) HTA_STEP_KERNELS(X, Half, Half) HTA_STEP_KERNELS(X, BFloat16, BFloat16) \
  HTA_OTHER_KERNELS(X, float) HTA_OTHER_KERNELS(X, double) HTA_OTHER_KERNELS(X, Half) HTA_OTHER_KERNELS(X, BFloat16)
