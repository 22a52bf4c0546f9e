// The loops of the CPU kernels over one range of elements. Included by cpu.cpp once per instruction set.
// No include guard, and no includes: the compiler's target is set around it.
namespace hta::cpu::HTA_ISA {

// One register of elements, kBytes wide (cpu.cpp sets HTA_BYTES beside HTA_ISA).
constexpr int kBytes = HTA_BYTES;
template <class T> struct Lanes {
  static constexpr int kCount = kBytes / sizeof(T);
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T V __attribute__((vector_size(kBytes)));
  typedef T Unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
  typedef Integer Mask __attribute__((vector_size(kBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kCount), aligned(1), may_alias));
};

template <class V, class T> HTA_INLINE V load(const T* p) {
  if constexpr (std::is_same_v<V, T>) return *p;
  else return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <class V, class T> HTA_INLINE void store(T* p, V value) {
  if constexpr (std::is_same_v<V, T>) *p = value;
  else *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = value;
}

// Hardware prefetchers lose some of this many streams at each page; asking 1 KiB ahead took the step from 39 to 46 GB/s
// on two cores of a Xeon. A prefetch past the end of a buffer is harmless.
constexpr int64_t kAhead = 1024;
template <class... T> HTA_INLINE void prefetch(int64_t i, const T*... streams) {
  (__builtin_prefetch(reinterpret_cast<const char*>(streams + i) + kAhead), ...);
}

// Each lane's own rule, chosen by its label among the three that start at `rules`.
template <class V, class T> HTA_INLINE Rule<V> mix(const Rule<T>* rules, const uint8_t* labels) {
  if constexpr (std::is_same_v<V, T>) {
    return rules[std::min<int>(*labels, kLabels - 1)];
  } else {
    using L = Lanes<T>;
    const auto label = __builtin_convertvector(*reinterpret_cast<const typename L::Bytes*>(labels), typename L::Mask);
    const auto one = label == 1, two = label > 1;
    const auto pick = [&](T zero, T first, T second) __attribute__((always_inline)) {
      const V none = V{} + zero, in_theta = V{} + first, in_eta = V{} + second;
      return one ? in_theta : (two ? in_eta : none);
    };
    Rule<V> rule;
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 3; ++i) rule.k[j][i] = pick(rules[0].k[j][i], rules[1].k[j][i], rules[2].k[j][i]);
    rule.anchored_theta = pick(T(0), T(1), T(0));
    rule.anchored_eta = pick(T(0), T(0), T(1));
    return rule;
  }
}

template <class V> HTA_INLINE void flush(double out[3], const Sums<V>& sums) {
  if constexpr (std::is_arithmetic_v<V>) {
    out[0] += sums.anchor;
    out[1] += sums.distance;
    out[2] += sums.poison;
  } else {
    constexpr int kCount = sizeof(V) / sizeof(sums.anchor[0]);
    for (int lane = 0; lane < kCount; ++lane) {
      out[0] += sums.anchor[lane];
      out[1] += sums.distance[lane];
      out[2] += sums.poison[lane];
    }
  }
}

// Calls body(lane type, index, rule, sums) for every element of [begin, end), tile by tile: whole lane groups, then
// single elements. `rules` holds kLabels rules for each group. Sums are kept in T within a tile, in double beyond.
template <class T, class Body>
HTA_INLINE void over_tiles(const Pattern& pattern, const Rule<T>* rules, int64_t begin, int64_t end, double out[3],
                           const Body& body) {
  using V = typename Lanes<T>::V;
  constexpr int kCount = Lanes<T>::kCount;
  out[0] = out[1] = out[2] = 0;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t stop = std::min(tile + kTile, end);
    int32_t group = 0, label = 0;
    const uint8_t* labels = nullptr;  // of this tile
    if (pattern.codes) {
      group = pattern.codes[2 * (tile / kTile)];
      label = pattern.codes[2 * (tile / kTile) + 1];
      if (label < 0) labels = pattern.labels + kTile * ~label;
    } else if (pattern.labels) {
      labels = pattern.labels + tile;
    }
    const Rule<T>* of_group = rules + group * kLabels;
    Sums<V> sums{};
    Sums<T> rest{};
    int64_t i = tile;
    if (labels) {
      for (; i + kCount <= stop; i += kCount) body(V{}, i, group, mix<V>(of_group, labels + (i - tile)), sums);
      for (; i < stop; ++i) body(T{}, i, group, mix<T>(of_group, labels + (i - tile)), rest);
    } else {
      const Rule<T> rule = of_group[label];
      for (; i + kCount <= stop; i += kCount) body(V{}, i, group, rule, sums);
      for (; i < stop; ++i) body(T{}, i, group, rule, rest);
    }
    flush(out, sums);
    flush(out, rest);
  }
}

template <bool kMomentum, bool kAnchor, class T>
void step_range(const StepArgs<T>& args, const Hyper<T>* hyper, const Rule<T>* rules, int64_t begin, int64_t end,
                double out[3]) {
  const StepArgs<T> a = args;  // a local copy cannot alias what is stored to
  const T inverse_scale = T(1.0 / a.grad_scale.get(1));
  over_tiles(a.pattern, rules, begin, end, out, [&](auto lanes, int64_t i, int32_t group, const auto& rule, auto& sums) __attribute__((always_inline)) {
    using V = decltype(lanes);
    prefetch(i, a.theta, a.eta, a.g_theta, a.g_eta);
    if (kMomentum) prefetch(i, a.v_theta, a.v_eta);
    if (kAnchor) prefetch(i, a.anchor);
    V theta = load<V>(a.theta + i), eta = load<V>(a.eta + i);
    const V g_theta = load<V>(a.g_theta + i) * inverse_scale, g_eta = load<V>(a.g_eta + i) * inverse_scale;
    V v_theta = kMomentum ? load<V>(a.v_theta + i) : V{}, v_eta = kMomentum ? load<V>(a.v_eta + i) : V{};
    const V anchor = kAnchor ? load<V>(a.anchor + i) : V{};
    hta::step<kMomentum>(theta, eta, g_theta, g_eta, v_theta, v_eta, anchor, hyper[group], rule, sums);
    store(a.theta + i, theta);
    store(a.eta + i, eta);
    if (kMomentum) {
      store(a.v_theta + i, v_theta);
      store(a.v_eta + i, v_eta);
    }
  });
}

template <bool kAnchor, class T>
void penalty_range(const PenaltyArgs<T>& args, int64_t begin, int64_t end, double out[3]) {
  const PenaltyArgs<T> a = args;
  const T pull = T(2 * a.L), couple = T(2 / a.L);
  const Rule<T> rules[kLabels] = {{{}, T(0), T(0)}, {{}, T(1), T(0)}, {{}, T(0), T(1)}};
  over_tiles(a.pattern, rules, begin, end, out, [&](auto lanes, int64_t i, int32_t, const auto& rule, auto& sums) __attribute__((always_inline)) {
    using V = decltype(lanes);
    prefetch(i, a.theta, a.eta);
    if (kAnchor) prefetch(i, a.anchor);
    const V theta = load<V>(a.theta + i), eta = load<V>(a.eta + i);
    const V anchor = kAnchor ? load<V>(a.anchor + i) : V{};
    V g_theta, g_eta;
    penalty_gradient(g_theta, g_eta, theta, eta, anchor, pull, couple, rule);
    add_squares(sums, theta, eta, anchor, rule);
    if (a.accumulate) {
      g_theta += load<V>(a.g_theta + i);
      g_eta += load<V>(a.g_eta + i);
    }
    store(a.g_theta + i, g_theta);
    store(a.g_eta + i, g_eta);
  });
}

// NaN if any of [begin, end) of x or y is not finite, else 0.
template <class T>
double poison_range(const T* x, const T* y, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::V;
  constexpr int kCount = Lanes<T>::kCount;
  V in_x{}, in_y{};
  T rest{};
  int64_t i = begin;
  for (; i + kCount <= end; i += kCount) {
    prefetch(i, x, y);
    const V a = load<V>(x + i), b = load<V>(y + i);
    in_x += a - a;
    in_y += b - b;
  }
  for (; i < end; ++i) rest += (x[i] - x[i]) + (y[i] - y[i]);
  double sum = rest;
  for (int lane = 0; lane < kCount; ++lane) sum += in_x[lane] + in_y[lane];
  return sum;
}

}  // namespace hta::cpu::HTA_ISA
