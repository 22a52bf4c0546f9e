// How the CPU's kernels go through memory: lane groups, loops over them, tiles and their rules. Included, as all that stand
// on it, by isa.h once per instruction set; hence no include guards, and no includes: the compiler's target is set around
// them.
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

// Calls body(i) for the lane groups of [begin, end). The loop's own counting, and prefetches, are once for a line, where a
// core's instructions are the limit.
template <class T, class Body> HTA_INLINE void each_group(int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t kCount = Lanes<T>::kCount;
  int64_t i = begin;
  if constexpr (kCount < kLine<T>)
    for (; i + kLine<T> <= end; i += kLine<T>)
      HTA_UNROLL for (int64_t lane = 0; lane < kLine<T>; lane += kCount) body(i + lane);
  for (; i + kCount <= end; i += kCount) body(i);
}

// Calls body(lane type, i) for i in [0, count): lane groups, then single elements.
template <class T, class Body> HTA_INLINE void each(int64_t count, const Body& body) {
  const int64_t whole = count / Lanes<T>::kCount * Lanes<T>::kCount;
  each_group<T>(0, whole, [&](int64_t i) __attribute__((always_inline)) { body(typename Lanes<T>::V{}, i); });
  for (int64_t i = whole; i < count; ++i) body(T{}, i);
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
    each_group<T>(kCount, whole, [&](int64_t i) __attribute__((always_inline)) {
      const auto following = first(V{}, i);
      second(V{}, i - kCount, held);
      held = following;
    });
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

}  // namespace hta::cpu::HTA_ISA
