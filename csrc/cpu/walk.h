// The CPU kernels over a range of tiles. Included by kernels.cpp once per instruction set; hence no include guard, and
// no includes: the compiler's target is set around it.
//
// Two ways through the same arithmetic. A whole step goes through all copies together, element by element. But 17 streams
// through memory (AdamW, four copies) run at full speed and 25 do not (SGD, eight). So of more than four copies all but
// four propose before, row by row through a block of kBlock tiles, and leave their proposals in their rows, which the
// cache still holds when all are taken together. What must look at all copies before they propose, or is cut at the sum
// s, goes row by row to the end, while s and what else the copies share waits in the cache.
namespace hta::cpu::HTA_ISA {

template <class T> constexpr int64_t kLine = 64 / sizeof(T);  // elements of a line of the cache

// One register of elements, kBytes wide (kernels.cpp sets HTA_BYTES beside HTA_ISA).
constexpr int kBytes = HTA_BYTES;
template <class T> struct Lanes {
  static constexpr int kCount = kBytes / sizeof(T);
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T V __attribute__((vector_size(kBytes)));
  typedef T Unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
  typedef Integer Index __attribute__((vector_size(kBytes)));
};

template <class V, class T> HTA_INLINE V load(const T* p) {
  if constexpr (std::is_same_v<V, T>) return *p;
  else return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <class V, class T> HTA_INLINE void store(T* p, V value) {
  if constexpr (std::is_same_v<V, T>) *p = value;
  else *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = value;
}

// Hardware prefetchers lose some of many streams at each page; six lane groups ahead was the best of several distances.
constexpr int64_t kAhead = 6 * kBytes;

// What comes kAhead further, once for each line; a prefetch past the end of a buffer is harmless.
template <class T, class... Rest> HTA_INLINE void prefetch(int64_t i, const T* stream, const Rest*... rest) {
  if (i % kLine<T> == 0) __builtin_prefetch(reinterpret_cast<const char*>(stream + i) + kAhead);
  if constexpr (sizeof...(rest)) prefetch(i, rest...);
}

// kCount bytes as integers. GCC 12 would move them one by one, or in halves.
template <class T> HTA_INLINE typename Lanes<T>::Index widen(const uint8_t* p) {
  using Index = typename Lanes<T>::Index;
#if HTA_BYTES == 64
  if constexpr (sizeof(T) == 4) return Index(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  return Index(_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif HTA_BYTES == 32
  if constexpr (sizeof(T) == 4) return Index(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return Index(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(Lanes<T>::kCount), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Index);
#endif
}

// GCC 12 compares, and then blends.
template <class T> HTA_INLINE typename Lanes<T>::Index smaller(typename Lanes<T>::Index a, typename Lanes<T>::Index b) {
  using Index = typename Lanes<T>::Index;
#if HTA_BYTES == 64
  if constexpr (sizeof(T) == 4) return Index(_mm512_min_epi32(__m512i(a), __m512i(b)));
#elif HTA_BYTES == 32
  if constexpr (sizeof(T) == 4) return Index(_mm256_min_epi32(__m256i(a), __m256i(b)));
#endif
  return a < b ? a : b;
}

// Calls body(lane type, i) for i in [0, count): whole lines, lane groups, then single elements. The loop's own counting,
// and prefetches, are once for a line, where a core's instructions are the limit.
template <class T, class Body> HTA_INLINE void each(int64_t count, const Body& body) {
  constexpr int kCount = Lanes<T>::kCount;
  int64_t i = 0;
  if constexpr (kCount < kLine<T>)
    for (; i + kLine<T> <= count; i += kLine<T>)
      HTA_UNROLL for (int64_t lane = 0; lane < kLine<T>; lane += kCount) body(typename Lanes<T>::V{}, i + lane);
  for (; i + kCount <= count; i += kCount) body(typename Lanes<T>::V{}, i);
  for (; i < count; ++i) body(T{}, i);
}

// The same with a body in two halves: the second is handed what the first has returned, while the first is at the lane group
// after it. A core looks some hundred instructions ahead. Half as long a chain of results that wait for each other lets it
// find twice as many that do not.
template <class T, class First, class Second>
HTA_INLINE void each_in_halves(int64_t count, const First& first, const Second& second) {
  using V = typename Lanes<T>::V;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const int64_t whole = count / kCount * kCount;
  if (whole > 0) {
    auto held = first(V{}, 0);
    const auto next = [&](int64_t i) __attribute__((always_inline)) {
      const auto following = first(V{}, i);
      second(V{}, i - kCount, held);
      held = following;
    };
    int64_t i = kCount;
    for (; i + kLine<T> <= whole; i += kLine<T>)
      HTA_UNROLL for (int64_t lane = 0; lane < kLine<T>; lane += kCount) next(i + lane);
    for (; i < whole; i += kCount) next(i);
    second(V{}, whole - kCount, held);
  }
  for (int64_t i = whole; i < count; ++i) second(T{}, i, first(T{}, i));
}

// A sum over lane groups and single elements.
template <class T> struct Sum {
  typename Lanes<T>::V lanes{};
  T rest{};
  HTA_INLINE void add(T value) { rest += value; }
  HTA_INLINE void add(typename Lanes<T>::V value) { lanes += value; }
  HTA_INLINE double total() const {  // in pairs: a chain of additions would take as long as a tile's arithmetic
    constexpr int kCount = Lanes<T>::kCount;
    T part[kCount];
    for (int lane = 0; lane < kCount; ++lane) part[lane] = lanes[lane];
    for (int half = kCount / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
    return double(part[0]) + rest;
  }
};

// ------------------------------------------------------------------------------------------------- a tile and its rules

// Whether a hash fills a lane, so that labels can be hashed in the registers that ask for them.
template <class T> constexpr bool kHashes = sizeof(T) == sizeof(uint32_t);

// The labels of a tile that mixes them. Apart, so that a loop can hold them: of all else in memory the compiler must
// think that the loop's stores change it.
struct Labels {
  const uint8_t* bytes;  // or null: they are hashed
  int64_t seed, tile;    // of the first
  HashKeys keys;         // of the tile that the loop is in
  int32_t count;         // how many there are to choose from
};

template <class T> struct Tile {
  alignas(64) T s[kTile];      // the sum: of the proposals, or in explicit mode of the copies
  alignas(64) T gaps[kTile];   // sum_i read_i (x_i - x_0) for gradients, sum_i (x_i - x_0) for statistics
  alignas(64) T reads[kTile];  // sum_i read_i
  uint8_t hashed[kTile];       // labels
  alignas(64) static constexpr T zeros[kTile] = {};
  const T* numbers;  // the group's
  int32_t m;
  int32_t uniform;  // the tile's label, or -1
  Labels labels;
  const T* anchor;  // of this tile; zeros where there is none
  int64_t start, count;

  // once: each label is asked for a single time, so that hashed ones need not be kept.
  void open(const Pattern& pattern, const T* rules, int32_t copies, int32_t blocks, const T* anchors, int64_t start_, int64_t end,
            bool once = false) {
    m = copies, labels.count = blocks + 1, start = start_, count = std::min(kTile, end - start);
    anchor = anchors ? anchors + start : zeros;
    const int64_t at = start / kTile;
    const int32_t group = pattern.codes ? pattern.codes[2 * at] : 0;
    uniform = pattern.codes ? pattern.codes[2 * at + 1] : pattern.bytes ? -1 : 0;
    numbers = rules + group * rules_width(m, blocks);
    if (uniform < 0) {
      labels.bytes = pattern.bytes + kTile * (pattern.codes ? ~uniform : at);
      uniform = -1;
      for (int64_t i = 0; i < kTile; i += 64) __builtin_prefetch(labels.bytes + kTile + i);  // the next mixed tile's
    } else if (uniform == kHashed) {
      uniform = -1, labels.bytes = nullptr, labels.seed = *pattern.seed, labels.tile = at;
      if (once && kHashes<T>) return;
      labels.bytes = hashed;
      const HashKeys keys = hash_keys(*pattern.seed, at);
      for (uint32_t i = 0; i < kTile; ++i) hashed[i] = hashed_label(keys, i, uint32_t(blocks));
    }
  }

  // Up to `end`, as far as tiles are of one label, or hashed, or their labels' bytes follow each other: where
  // memory is the limit, a loop that ends and begins again costs up to three hundred nanoseconds.
  void extend(const Pattern& pattern, int64_t end) {
    if (anchor == zeros || (uniform < 0 && labels.bytes == hashed)) return;
    const int32_t* const codes = pattern.codes;
    const int32_t next = uniform < 0 && labels.bytes ? -1 : 0;  // a row of bytes has its number's complement for a code
    const auto alike = [&](int64_t at) {
      return !codes || (codes[2 * at] == codes[2 * at - 2] && codes[2 * at + 1] == codes[2 * at - 1] + next);
    };
    while (start + count < end && alike((start + count) / kTile)) count = std::min(count + kTile, end - start);
  }

  // s is taken from where a phase left it, or begins at zero.
  void clear(const T* sums, bool gradients) {
    if (sums) std::copy(sums + start, sums + start + count, s);
    else std::fill(s, s + count, T(0));
    if (!gradients) return;
    std::fill(gaps, gaps + count, T(0));
    std::fill(reads, reads + count, T(0));
  }

  const T* rule(int32_t of_label, int32_t j) const { return numbers + kNumbers + (of_label * (m + 1) + j) * kRule; }
};

// This thread's room for a block of tiles. Not inlined: its address would be asked for anew at each look at a tile, by a
// call that all vector registers must be saved for.
template <class T> [[gnu::noinline]] Tile<T>* own_tiles() {
  static thread_local Tile<T> tiles[kBlock];
  return tiles;
}

// One row's rule over a tile: the same for all elements, or each element's own, looked up by its label.
template <class T> struct Uniform {
  Rule<T> rule;
  Uniform() = default;
  Uniform(const Tile<T>& tile, int32_t j) {
    const T* r = tile.rule(tile.uniform, j);
    rule = {r[0], r[1], r[2], r[3], r[4]};
  }
  template <class V> static HTA_INLINE int label(Labels&, int64_t) { return 0; }
  HTA_INLINE const Rule<T>& at(int) const { return rule; }
};

// kLabels: how many there are, where that is known.
template <class T, int kLabels = 0> struct Mixed {
  using V = typename Lanes<T>::V;
  using Integer = typename Lanes<T>::Integer;
  using Index = typename Lanes<T>::Index;
  static constexpr int kCount = Lanes<T>::kCount;
  static constexpr int kParts = ((kLabels ? kLabels : kMaxCopies + 1) + kCount - 1) / kCount;  // registers for a number of all labels
  alignas(64) T table[kRule][kParts * kCount];
  int32_t runtime_labels;

  Mixed() = default;
  Mixed(const Tile<T>& tile, int32_t j) : runtime_labels(tile.labels.count) {
    for (int l = 0; l < tile.labels.count; ++l)
      for (int k = 0; k < kRule; ++k) table[k][l] = tile.rule(l, j)[k];
  }

  // To be asked for in the elements' order. A label above the range is the last.
  template <class W> static HTA_INLINE auto label(Labels& labels, int64_t i) {
    const int32_t count = kLabels ? kLabels : labels.count;
    if constexpr (kHashes<T>) {
      if (!labels.bytes) {
        if (i % kTile == 0) labels.keys = hash_keys(labels.seed, labels.tile + i / kTile);
        return hashed<W>(labels.keys, i % kTile, count);
      }
    }
    if constexpr (std::is_same_v<W, T>) return Integer(std::min<int32_t>(labels.bytes[i], count - 1));
    else return smaller<T>(widen<T>(labels.bytes + i), Index{} + Integer(count - 1));
  }

  template <class W> static HTA_INLINE auto hashed(HashKeys keys, int64_t i, int32_t count) {
    constexpr bool kAlone = std::is_same_v<W, T>;
    auto at = typename Words<W>::U{} + uint32_t(i);
    if constexpr (!kAlone) at ^= *reinterpret_cast<const typename Words<W>::U*>(kFrom0);  // i is a multiple of their number
    return std::conditional_t<kAlone, Integer, Index>(hashed_label(keys, at, uint32_t(count - 1)));
  }

  HTA_INLINE Rule<T> at(Integer l) const { return {table[0][l], table[1][l], table[2][l], table[3][l], table[4][l]}; }
  HTA_INLINE Rule<V> at(Index l) const { return {pick(0, l), pick(1, l), pick(2, l), pick(3, l), pick(4, l)}; }

  HTA_INLINE V pick(int k, Index l) const {
    const int labels = kLabels ? kLabels : runtime_labels;
    V result;
    if constexpr (HTA_SHUFFLES) {  // one instruction for each register of labels
      result = HTA_SHUFFLE(load<V>(table[k]), l);
      for (int part = 1; part * kCount < labels; ++part)
        result = l < part * kCount ? result : HTA_SHUFFLE(load<V>(table[k] + part * kCount), l);
    } else {
      Index bits{};
      for (int other = 0; other < labels; ++other) bits |= Index(V{} + table[k][other]) & (l == other);
      result = V(bits);
    }
    return result;
  }
};

// ---------------------------------------------------------------------------------------------------------------- step

// NaN if any of [begin, end) of a row, times scale, is not finite, else 0.
template <class T>
double poison_range(const T* x, int64_t begin, int64_t end, T scale = 1) {
  Sum<T> poison;
  const T* const row = x + begin;
  each<T>(end - begin, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    prefetch(i, row);
    const auto value = load<decltype(lanes)>(row + i) * scale;
    poison.add(value - value);
  });
  return poison.total();
}

// Where s, and a look for what is not finite, come later.
struct NoRules {};
struct NoSum {
  template <class V> HTA_INLINE void add(V) const {}
};

// One copy's proposals over a tile, left in its row, and its part in the sum. In explicit mode the quadratic terms'
// gradient comes first.
template <class P, bool kStates, bool kExplicit, class T, class Rules, class Poison>
HTA_INLINE void propose(const StepArgs<T>& args, Tile<T>& tile, const Rules& rules, T scale, int32_t j, Poison&& poison) {
  T* const x_ = args.copies[j] + tile.start;
  const T* const first_ = args.copies[0] + tile.start;
  const T* const g_ = args.grads[j] + tile.start;
  T* const v_ = kStates ? args.states[j] + tile.start : nullptr;
  T* const w_ = P::kStates > 1 ? args.states[args.m + j] + tile.start : nullptr;
  typename P::template Numbers<T> number;
  __builtin_memcpy(&number, tile.numbers, sizeof(number));
  scale *= number.sign;
  each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    prefetch(i, x_, g_);
    if (kStates) prefetch(i, v_);
    if (P::kStates > 1) prefetch(i, w_);
    const V x = load<V>(x_ + i);
    V g = load<V>(g_ + i) * scale;
    poison.add(g - g);
    if constexpr (kExplicit)
      g += quadratic_gradient(x, V(x - load<V>(first_ + i)), load<V>(tile.gaps + i), load<V>(tile.reads + i),
                              load<V>(tile.anchor + i), rules.at(Rules::template label<V>(tile.labels, i)));
    V state[2] = {kStates ? load<V>(v_ + i) : V{}, P::kStates > 1 ? load<V>(w_ + i) : V{}};
    const V a = P::propose(x, g, state, number);
    if (kStates) store(v_ + i, state[0]);
    if (P::kStates > 1) store(w_ + i, state[1]);
    store(x_ + i, a);
    if constexpr (!kExplicit && !std::is_same_v<Rules, NoRules>)
      store(tile.s + i, V(load<V>(tile.s + i) + rules.at(Rules::template label<V>(tile.labels, i)).read * a));
  });
}

// The sums that a gradient of the quadratic terms needs.
template <class Copies, class T, class Rules>
HTA_INLINE void sum_gaps(const Copies& copies, Tile<T>& tile, const Rules& rules, int32_t j) {
  const T *const x_ = copies[j] + tile.start, *const first_ = copies[0] + tile.start;
  each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const auto& rule = rules.at(Rules::template label<V>(tile.labels, i));
    const V x = load<V>(x_ + i);
    store(tile.s + i, V(load<V>(tile.s + i) + rule.read * x));
    store(tile.gaps + i, V(load<V>(tile.gaps + i) + rule.read * (x - load<V>(first_ + i))));
    store(tile.reads + i, V(load<V>(tile.reads + i) + rule.read));
  });
}

// One copy's share in the sum, and its distance to copy 0; returns the square of that to the anchor.
template <bool kExplicit, class T, class Rules>
HTA_INLINE double share(const StepArgs<T>& args, Tile<T>& tile, const Rules& rules, int32_t j) {
  Sum<T> anchored;
  T *const x_ = args.copies[j] + tile.start, *const first_ = args.copies[0] + tile.start;
  each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const auto& rule = rules.at(Rules::template label<V>(tile.labels, i));
    const V z = load<V>(tile.anchor + i);
    V x = load<V>(x_ + i);
    if (!kExplicit) {
      x = shared(x, load<V>(tile.s + i), z, rule);
      store(x_ + i, x);
    }
    anchored.add(rule.anchored * ((x - z) * (x - z)));
    if (j > 0) store(tile.gaps + i, V((j > 1 ? load<V>(tile.gaps + i) : V{}) + (x - load<V>(first_ + i))));
  });
  return anchored.total();
}

// sum_{i<j} (x_i - x_j)^2 = m sum_j (x_j - mean)^2, from the sum of distances to copy 0.
template <class T>
HTA_INLINE double pairs_of(T* const* copies, const Tile<T>& tile, int32_t m) {
  const T *const first_ = copies[0] + tile.start, part = T(1) / m;
  double sum = 0;
  for (int32_t j = m == 2 ? 1 : 0; j < m; ++j) {
    const T* const x_ = copies[j] + tile.start;
    Sum<T> pairs;
    each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
      using V = decltype(lanes);
      if (m == 2) return pairs.add(load<V>(tile.gaps + i) * load<V>(tile.gaps + i));
      const V gap = (load<V>(x_ + i) - load<V>(first_ + i)) - part * load<V>(tile.gaps + i);
      pairs.add(T(m) * (gap * gap));
    });
    sum += pairs.total();
  }
  return sum;
}

// keep centre + share s + pull anchor; the centre may be the anchor itself.
template <class T, class Rules>
HTA_INLINE void move_centre(const StepArgs<T>& args, Tile<T>& tile, const Rules& rules) {
  T* const z_ = args.centre + tile.start;
  each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const auto& rule = rules.at(Rules::template label<V>(tile.labels, i));
    store(z_ + i, shared(load<V>(z_ + i), load<V>(tile.s + i), load<V>(tile.anchor + i), rule));
  });
}

// How many of m copies propose before the others.
constexpr int32_t first_to_propose(int32_t m) { return std::max(m - 4, 0); }

// The step over a tile, where the first copies have proposed. kCopies: how many there are, where that is known, so that
// they fit the registers and the loops over them are unrolled.
template <class P, bool kStates, int kCopies, class T, class Rules>
HTA_INLINE void step_together(const StepArgs<T>& args, const Tile<T>& tile, const Rules* rules, T scale, Sum<T>& anchored,
                              Sum<T>& pairs) {
  constexpr int kMost = kCopies ? kCopies : kMaxCopies, kProposing = kMost - first_to_propose(kMost);
  const int32_t m = kCopies ? kCopies : args.m, before = m - kProposing;
  typename P::template Numbers<T> number;
  __builtin_memcpy(&number, tile.numbers, sizeof(number));
  scale *= number.sign;
  T *x_[kMost], *v_[kProposing], *w_[kProposing];
  const T *g_[kProposing], *const z_ = tile.anchor;
  T* const centre_ = args.centre ? args.centre + tile.start : nullptr;
  Labels labels = tile.labels;
  for (int j = 0; j < m; ++j) x_[j] = args.copies[j] + tile.start;
  for (int k = 0; k < kProposing; ++k) {
    g_[k] = args.grads[before + k] + tile.start;
    v_[k] = kStates ? args.states[before + k] + tile.start : nullptr;
    w_[k] = P::kStates > 1 ? args.states[m + before + k] + tile.start : nullptr;
  }
  const auto propose_all = [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    struct {
      decltype(Rules::template label<V>(labels, i)) of_label;
      V a[kProposing];
    } proposed{Rules::template label<V>(labels, i), {}};
    prefetch(i, z_);
    HTA_UNROLL for (int k = 0; k < kProposing; ++k) {
      proposed.a[k] = load<V>(x_[before + k] + i);
      prefetch(i, x_[before + k], g_[k]);
      if (kStates) prefetch(i, v_[k]);
      if (P::kStates > 1) prefetch(i, w_[k]);
    }
    HTA_UNROLL for (int k = 0; k < kProposing; ++k) {
      const V g = load<V>(g_[k] + i) * scale;
      V state[2] = {kStates ? load<V>(v_[k] + i) : V{}, P::kStates > 1 ? load<V>(w_[k] + i) : V{}};
      proposed.a[k] = P::propose(proposed.a[k], g, state, number);
      if (kStates) store(v_[k] + i, state[0]);
      if (P::kStates > 1) store(w_[k] + i, state[1]);
    }
    return proposed;
  };
  const auto share_all = [&](auto lanes, int64_t i, const auto& proposed) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const V z = load<V>(z_ + i);
    V x[kMost], s{};
    HTA_UNROLL for (int j = 0; j < m; ++j) {
      x[j] = j < before ? load<V>(x_[j] + i) : proposed.a[j - before];
      const auto& rule = rules[j].at(proposed.of_label);
      s = j ? s + rule.read * x[j] : rule.read * x[j];
    }
    V gaps{};
    HTA_UNROLL for (int j = 0; j < m; ++j) {
      const auto& rule = rules[j].at(proposed.of_label);
      x[j] = shared(x[j], s, z, rule);
      store(x_[j] + i, x[j]);
      anchored.add(rule.anchored * ((x[j] - z) * (x[j] - z)));
      if (j) gaps = j > 1 ? gaps + (x[j] - x[0]) : x[j] - x[0];
    }
    if (m == 2) pairs.add(gaps * gaps);
    const T part = T(1.0 / m);
    HTA_UNROLL for (int j = 0; kCopies != 1 && kCopies != 2 && j < m; ++j) {
      const V gap = (x[j] - x[0]) - part * gaps;
      pairs.add(T(m) * (gap * gap));
    }
    if (centre_) store(centre_ + i, shared(load<V>(centre_ + i), s, z, rules[m].at(proposed.of_label)));
  };
  each_in_halves<T>(tile.count, propose_all, share_all);
}

// How many elements are summed in T before their sum joins the range's, in double: kTile in each lane.
template <class T> constexpr int64_t kSummed = Lanes<T>::kCount * kTile;

// sums: the anchor's, the pairs', NaN for a gradient that is not finite.
template <class P, bool kStates, int kCopies, class T>
void step_range_together(const StepArgs<T>& args, int64_t begin, int64_t end, double sums[3]) {
  constexpr int kMost = kCopies ? kCopies : kMaxCopies;
  const int32_t m = kCopies ? kCopies : args.m, before = first_to_propose(m);
  const T scale = T(1.0 / args.grad_scale.get(1));
  Tile<T>* const block = own_tiles<T>();
  Sum<T> anchored, pairs;
  Uniform<T> uniform[kMost + 1];
  Mixed<T, kCopies ? kCopies + 1 : 0> mixed[kMost + 1];
  const T* numbers = nullptr;  // whose rules `mixed` holds
  int64_t summed = 0;
  sums[0] = sums[1] = sums[2] = 0;
  const auto fold = [&] {
    sums[0] += anchored.total(), sums[1] += pairs.total();
    anchored = pairs = {}, summed = 0;
  };
  for (int64_t start = begin; start < end;) {
    int64_t tiles = 0;
    for (; tiles < (before ? kBlock : 1) && start < end; start += block[tiles++].count) {
      block[tiles].open(args.pattern, args.rules, m, m, args.anchor, start, end, true);
      block[tiles].extend(args.pattern, std::min(end, start + kSummed<T>));
    }
    for (int32_t j = 0; j < before; ++j)
      for (int64_t b = 0; b < tiles; ++b) propose<P, kStates, false>(args, block[b], NoRules{}, scale, j, NoSum{});
    for (int64_t b = 0; b < tiles; ++b) {
      const Tile<T>& tile = block[b];
      if (tile.uniform >= 0) {
        for (int j = 0; j <= m; ++j) uniform[j] = {tile, j};
        step_together<P, kStates, kCopies>(args, tile, uniform, scale, anchored, pairs);
      } else {
        for (int j = 0; j <= m && tile.numbers != numbers; ++j) mixed[j] = {tile, j};
        numbers = tile.numbers;
        step_together<P, kStates, kCopies>(args, tile, mixed, scale, anchored, pairs);
      }
      if ((summed += tile.count) >= kSummed<T>) fold();
    }
  }
  fold();
  // A gradient that is not finite leaves copies, and so sums, that are not. Only then are the gradients looked at.
  for (int32_t j = 0; j < m && !std::isfinite(sums[0] + sums[1]); ++j)
    sums[2] += poison_range(args.grads[j], begin, end, scale);
}

// One phase of a lone copy's step over a tile: it proposes, and leaves its part of the sum in `sums`, or takes its share
// of what stands there.
template <class P, bool kStates, bool kProposes, class T, class Rules>
HTA_INLINE void step_alone(const StepArgs<T>& args, const Tile<T>& tile, const Rules& rules, const Rules& centre_rules, T scale,
                           Sum<T>& anchored, Sum<T>& poison) {
  typename P::template Numbers<T> number;
  __builtin_memcpy(&number, tile.numbers, sizeof(number));
  scale *= number.sign;
  T *const x_ = args.copies[0] + tile.start, *const s_ = args.sums + tile.start;
  const T *const g_ = kProposes ? args.grads[0] + tile.start : nullptr, *const z_ = tile.anchor;
  T* const v_ = kProposes && kStates ? args.states[0] + tile.start : nullptr;
  T* const w_ = kProposes && P::kStates > 1 ? args.states[1] + tile.start : nullptr;
  T* const centre_ = args.centre ? args.centre + tile.start : nullptr;
  Labels labels = tile.labels;
  each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    using V = decltype(lanes);
    prefetch(i, x_, s_);
    const auto label = Rules::template label<V>(labels, i);
    const auto& rule = rules.at(label);
    V x = load<V>(x_ + i);
    if (kProposes) {
      prefetch(i, g_);
      if (kStates) prefetch(i, v_);
      if (P::kStates > 1) prefetch(i, w_);
      const V g = load<V>(g_ + i) * scale;
      poison.add(g - g);
      V state[2] = {kStates ? load<V>(v_ + i) : V{}, P::kStates > 1 ? load<V>(w_ + i) : V{}};
      x = P::propose(x, g, state, number);
      if (kStates) store(v_ + i, state[0]);
      if (P::kStates > 1) store(w_ + i, state[1]);
      store(s_ + i, V(rule.read * x));
    } else {
      prefetch(i, z_);
      const V s = load<V>(s_ + i), z = load<V>(z_ + i);
      x = shared(x, s, z, rule);
      anchored.add(rule.anchored * ((x - z) * (x - z)));
      if (centre_) store(centre_ + i, shared(load<V>(centre_ + i), s, z, centre_rules.at(label)));
    }
    store(x_ + i, x);
  });
}

template <class P, bool kStates, bool kProposes, class T>
void step_range_alone(const StepArgs<T>& args, int64_t begin, int64_t end, double sums[3]) {
  const T scale = T(1.0 / args.grad_scale.get(1));
  Tile<T>& tile = own_tiles<T>()[0];
  Sum<T> poison;
  sums[0] = sums[1] = 0;
  for (int64_t start = begin; start < end; start += tile.count) {
    tile.open(args.pattern, args.rules, 1, args.blocks, args.anchor, start, end, true);
    tile.extend(args.pattern, std::min(end, start + kSummed<T>));
    Sum<T> anchored;
    if (tile.uniform >= 0) {
      step_alone<P, kStates, kProposes>(args, tile, Uniform<T>(tile, 0), Uniform<T>(tile, 1), scale, anchored, poison);
    } else {
      step_alone<P, kStates, kProposes>(args, tile, Mixed<T>(tile, 0), Mixed<T>(tile, 1), scale, anchored, poison);
    }
    sums[0] += anchored.total();
  }
  sums[2] = poison.total();
}

// Calls call(rules) with row j's rules over a tile, in either kind.
template <class T, class Call> HTA_INLINE void with_rules(const Tile<T>& tile, int32_t j, const Call& call) {
  tile.uniform >= 0 ? call(Uniform<T>(tile, j)) : call(Mixed<T>(tile, j));
}

template <class P, bool kStates, bool kExplicit, class T>
void step_range(const StepArgs<T>& args, int64_t begin, int64_t end, double sums[3]) {
  const int32_t m = args.m;
  const T scale = T(1.0 / args.grad_scale.get(1));
  sums[0] = sums[1] = sums[2] = 0;
  Tile<T>* const block = own_tiles<T>();
  for (int64_t start = begin; start < end; start += kBlock * kTile) {
    Sum<T> poison;
    const int64_t tiles = std::min<int64_t>(kBlock, (end - start + kTile - 1) / kTile);
    for (int64_t b = 0; b < tiles; ++b)
      block[b].open(args.pattern, args.rules, m, args.blocks, args.anchor, start + b * kTile, end);
    // One row of the block after the other. Copy 0 comes last where the others' gradients need it as it was.
    const auto rows = [&](bool descending, const auto& work) __attribute__((always_inline)) {
      for (int32_t i = 0; i < m; ++i)
        for (int64_t b = 0; b < tiles; ++b) {
          const int32_t j = descending ? m - 1 - i : i;
          with_rules(block[b], j, [&](const auto& rules) __attribute__((always_inline)) { work(block[b], rules, j); });
        }
    };
    for (int64_t b = 0; b < tiles; ++b) block[b].clear(args.phase & kPropose ? nullptr : args.sums, kExplicit);
    if (args.phase & kPropose) {
      if (kExplicit) rows(false, [&](Tile<T>& tile, const auto& rules, int32_t j) __attribute__((always_inline)) {
        sum_gaps(args.copies, tile, rules, j);
      });
      rows(kExplicit, [&](Tile<T>& tile, const auto& rules, int32_t j) __attribute__((always_inline)) {
        propose<P, kStates, kExplicit>(args, tile, rules, scale, j, poison);
      });
      if (args.sums)
        for (int64_t b = 0; b < tiles; ++b) std::copy(block[b].s, block[b].s + block[b].count, args.sums + block[b].start);
    }
    if (args.phase & kShare) {
      rows(false, [&](Tile<T>& tile, const auto& rules, int32_t j) __attribute__((always_inline)) {
        sums[0] += share<kExplicit>(args, tile, rules, j);
      });
      for (int64_t b = 0; b < tiles; ++b) {
        if (m > 1) sums[1] += pairs_of(args.copies, block[b], m);
        if (args.centre) with_rules(block[b], m, [&](const auto& rules) { move_centre(args, block[b], rules); });
      }
    }
    sums[2] += poison.total();
  }
}

// ------------------------------------------------------------------------------------------------------------- penalty

template <template <class> class Rules, class T>
HTA_INLINE void penalty_tile(const PenaltyArgs<T>& args, Tile<T>& tile, Sum<T>& energy) {
  const int32_t m = args.m;
  tile.clear(nullptr, true);
  for (int32_t j = 0; j < m; ++j) sum_gaps(args.copies, tile, Rules<T>(tile, j), j);
  const T* const first_ = args.copies[0] + tile.start;
  for (int32_t j = 0; j < m; ++j) {
    const Rules<T> rules(tile, j);
    const T* const x_ = args.copies[j] + tile.start;
    T* const g_ = args.grads[j] + tile.start;
    each<T>(tile.count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
      using V = decltype(lanes);
      prefetch(i, x_);
      const auto& rule = rules.at(Rules<T>::template label<V>(tile.labels, i));
      const V x = load<V>(x_ + i), z = load<V>(tile.anchor + i), gap = x - load<V>(first_ + i);
      const V gaps = load<V>(tile.gaps + i), reads = load<V>(tile.reads + i);
      const V g = quadratic_gradient(x, gap, gaps, reads, z, rule);
      // Over all j the squares of the distances to the mean, times m, are those of the pairs' distances.
      const V off = gap - gaps / reads;
      energy.add(T(0.5) * (rule.pull * ((x - z) * (x - z)) + rule.share * (reads * (off * off))));
      store(g_ + i, args.accumulate ? V(load<V>(g_ + i) + g) : g);
    });
  }
}

template <class T>
double penalty_range(const PenaltyArgs<T>& args, int64_t begin, int64_t end) {
  Tile<T> tile;
  double sum = 0;
  for (int64_t start = begin; start < end; start += kTile) {
    Sum<T> energy;
    tile.open(args.pattern, args.rules, args.m, args.m, args.anchor, start, end);
    tile.uniform >= 0 ? penalty_tile<Uniform>(args, tile, energy) : penalty_tile<Mixed>(args, tile, energy);
    sum += energy.total();
  }
  return sum;
}

}  // namespace hta::cpu::HTA_ISA
