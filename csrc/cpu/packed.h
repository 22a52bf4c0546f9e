// The CPU's step over buffers in formats of their own: a tile at a time they are unpacked into the cache, stepped there by
// step.h, and packed again.
namespace hta::cpu::HTA_ISA {

// kCount codes as words, and back; a signed type's sign is extended. GCC 12 would move them one by one.
template <class U, class Code> HTA_INLINE U load_codes(const Code* p) {
  if constexpr (sizeof(U) == 4) return U(*p);
  else if constexpr (std::is_same_v<Code, uint8_t>) return U(widen<float>(p));
#if HTA_BYTES == 64
  else if constexpr (sizeof(Code) == 2) return U(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  else return U(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif HTA_BYTES == 32
  else if constexpr (sizeof(Code) == 2) return U(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  else return U(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  else {
    typedef Code Codes __attribute__((vector_size(Lanes<float>::kCount * sizeof(Code)), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Codes*>(p), U);
  }
#endif
}

template <class U, class Code> HTA_INLINE void store_codes(Code* p, U words) {  // below 2^16 or 2^8
  if constexpr (sizeof(U) == 4) *p = Code(words);
#if HTA_BYTES == 64
  else if constexpr (sizeof(Code) == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(__m512i(words)));
  else _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(words)));
#elif HTA_BYTES == 32
  else {
    const __m256i w = __m256i(words);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    if constexpr (sizeof(Code) == 2) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
    else _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
  }
#else
  else {
    typedef Code Codes __attribute__((vector_size(Lanes<float>::kCount * sizeof(Code)), aligned(1), may_alias));
    *reinterpret_cast<Codes*>(p) = __builtin_convertvector(words, Codes);
  }
#endif
}

// The nearest float16s, and back.
template <class V> HTA_INLINE void store_halves(uint16_t* p, V x) {
  if constexpr (sizeof(V) == 4) *p = narrow<Half>(x).bits;
#if HTA_BYTES == 64
  else _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#elif HTA_BYTES == 32
  else _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
#else
  else for (int lane = 0; lane < Lanes<float>::kCount; ++lane) p[lane] = narrow<Half>(x[lane]).bits;
#endif
}

template <class V> HTA_INLINE V load_halves(const uint16_t* p) {
#if HTA_BYTES == 64
  if constexpr (sizeof(V) != 4) return V(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif HTA_BYTES == 32
  if constexpr (sizeof(V) != 4) return V(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
  using U = typename Words<V>::U;
  return join_half<V>(load_codes<U>(p), U{});
}

template <class Code> HTA_INLINE const Code* at(const Row& row, int64_t start) { return static_cast<const Code*>(row.data) + start; }
template <class Code> HTA_INLINE Code* at(Row& row, int64_t start) { return static_cast<Code*>(row.data) + start; }

// [start, start + count) of a row as float32. `start` is a multiple of kScaled.
inline void unpack(const Row& row, int64_t start, int64_t count, float* out) {
  const auto* const corrections = static_cast<const int8_t*>(row.more) + start;
  const auto* const scales = static_cast<const float*>(row.more) + start / kScaled;
  const auto values = [&](const auto* codes, int64_t from, int64_t upto, const auto& value) __attribute__((always_inline)) {
    each<float>(upto - from, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
      const int64_t i = from + k;
      __builtin_prefetch(codes + i + kTile);  // the next tile's, spread over this one's work
      store(out + i, value(lanes, i));
    });
  };
  const auto all = [&](const auto* codes, int64_t from, int64_t upto, const auto& value) __attribute__((always_inline)) {
    values(codes, from, upto, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
      using V = decltype(lanes);
      return V(value(lanes, load_codes<typename Words<V>::U>(codes + i), i));
    });
  };
  const auto decode = [&](const auto* codes, auto is_signed) __attribute__((always_inline)) {
    for (int64_t from = 0; from < count; from += kScaled) {
      const float scale = scales[from / kScaled];
      all(codes, from, std::min(from + kScaled, count), [&](auto v, auto code, int64_t) __attribute__((always_inline)) {
        return decoded<is_signed.value, decltype(v)>(code, scale);
      });
    }
  };
  switch (row.format) {
    case kBFloat16:
      return all(at<uint16_t>(row, start), 0, count, [](auto v, auto code, int64_t) __attribute__((always_inline)) {
        return from_bits<decltype(v)>(code << 16);
      });
    case kSplitBFloat16:
      return all(at<uint16_t>(row, start), 0, count, [&](auto v, auto code, int64_t i) __attribute__((always_inline)) {
        __builtin_prefetch(corrections + i + kTile);
        return join_bfloat16<decltype(v)>(code, load_codes<decltype(code)>(corrections + i));
      });
    case kSigned8: return decode(at<int8_t>(row, start), std::true_type{});
    case kUnsigned8: return decode(at<uint8_t>(row, start), std::false_type{});
    case kHalf:
      return values(at<uint16_t>(row, start), 0, count, [&](auto v, int64_t i) __attribute__((always_inline)) {
        return load_halves<decltype(v)>(at<uint16_t>(row, start) + i);
      });
    case kSplitHalf:
      return all(at<uint16_t>(row, start), 0, count, [&](auto v, auto code, int64_t i) __attribute__((always_inline)) {
        __builtin_prefetch(corrections + i + kTile);
        return join_half<decltype(v)>(code, load_codes<decltype(code)>(corrections + i));
      });
    case kFloat32:
      std::copy(at<float>(row, start), at<float>(row, start) + count, out);
  }
}

// The largest magnitude of up to kScaled elements; NaN counts as larger than all.
HTA_INLINE float largest(const float* x, int64_t count) {
  using V = Lanes<float>::V;
  using U = Words<V>::U;
  U most{};
  uint32_t rest = 0;
  each<float>(count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    const auto bits = bits_of(load<decltype(lanes)>(x + i)) & 0x7fffffffu;
    if constexpr (sizeof(bits) == 4) rest = std::max<uint32_t>(rest, bits);
    else most = bits > most ? bits : most;
  });
#if HTA_BYTES == 64
  rest = std::max<uint32_t>(rest, _mm512_reduce_max_epi32(__m512i(most)));
#elif HTA_BYTES == 32
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(__m256i(most)), _mm256_extracti128_si256(__m256i(most), 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0b01001110));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0b10110001));
  rest = std::max<uint32_t>(rest, _mm_cvtsi128_si32(half));
#else
  for (int lane = 0; lane < Lanes<float>::kCount; ++lane) rest = std::max<uint32_t>(rest, most[lane]);
#endif
  return from_bits<float>(rest);
}

// The inverse of `unpack`. noise: random bits of each element, to be changed by `of_row`, or null: to nearest.
inline void pack(Row row, int64_t start, int64_t count, const float* in, const uint32_t* noise, uint32_t of_row) {
  auto* const corrections = static_cast<int8_t*>(row.more) + start;
  auto* const scales = static_cast<float*>(row.more) + start / kScaled;
  const auto all = [&](auto* codes, int64_t from, int64_t upto, const auto& code) __attribute__((always_inline)) {
    each<float>(upto - from, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
      const int64_t i = from + k;
      store_codes(codes + i, code(load<decltype(lanes)>(in + i), i));
    });
  };
  const auto bits = [&](auto x, int64_t i) __attribute__((always_inline)) {
    using V = decltype(x);
    using U = typename Words<V>::U;
    return noise ? bits_of(load<V>(reinterpret_cast<const float*>(noise) + i)) ^ of_row : U{} + kNearest;
  };
  const auto split = [&](const auto& in_parts) __attribute__((always_inline)) {
    all(at<uint16_t>(row, start), 0, count, [&](auto x, int64_t i) __attribute__((always_inline)) {
      typename Words<decltype(x)>::U low, correction;
      in_parts(x, bits(x, i), low, correction);
      store_codes(corrections + i, correction);
      return low;
    });
  };
  const auto encode = [&](auto* codes, auto is_signed) __attribute__((always_inline)) {
    for (int64_t from = 0; from < count; from += kScaled)  // all of them first: each is a chain that others may overlap
      scales[from / kScaled] = largest(in + from, std::min(kScaled, count - from));
    for (int64_t from = 0; from < count; from += kScaled) {
      const int64_t upto = std::min(from + kScaled, count);
      const float factor = to_codes<is_signed.value>(scales[from / kScaled]);
      all(codes, from, upto, [&](auto x, int64_t i) __attribute__((always_inline)) {
        return encoded<is_signed.value>(x, factor, bits(x, i));
      });
    }
  };
  switch (row.format) {
    case kBFloat16:
      if (noise)
        return all(at<uint16_t>(row, start), 0, count, [&](auto x, int64_t i) __attribute__((always_inline)) {
          return random_bfloat16(x, bits(x, i));
        });
      return all(at<uint16_t>(row, start), 0, count,
                 [](auto x, int64_t) __attribute__((always_inline)) { return nearest_bfloat16(x); });
    case kSplitBFloat16:
      return split([](auto x, auto noise, auto& low, auto& correction) __attribute__((always_inline)) {
        split_bfloat16(x, noise, low, correction);
      });
    case kSplitHalf:
      return split([](auto x, auto noise, auto& low, auto& correction) __attribute__((always_inline)) {
        split_half(x, noise, low, correction);
      });
    case kSigned8: return encode(at<int8_t>(row, start), std::true_type{});
    case kUnsigned8: return encode(at<uint8_t>(row, start), std::false_type{});
    case kHalf:
      return each<float>(count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
        store_halves(at<uint16_t>(row, start) + i, load<decltype(lanes)>(in + i));
      });
    case kFloat32:
      std::copy(in, in + count, at<float>(row, start));
  }
}

// Rows of a tile each, which lie apart so that stores to one do not look like loads from another.
class Room {
 public:
  float* row() {
    if (rows_.size() < ++used_) rows_.push_back(std::make_unique<Apart>());
    return rows_[used_ - 1]->of;
  }
  void clear() { used_ = 0; }

 private:
  struct Apart { alignas(64) float of[kTile + 48]; };
  std::vector<std::unique_ptr<Apart>> rows_;
  size_t used_ = 0;
};

[[gnu::noinline]] inline Room& own_room() {  // as walk.h's own_tiles
  static thread_local Room room;
  return room;
}

using Loop = void (*)(const StepArgs<float>&, int64_t, int64_t, double[3]);

inline void packed_range(const StepArgs<Packed>& args, Loop loop, int64_t begin, int64_t end, double sums[3]) {
  Room& room = own_room();
  alignas(64) uint32_t noise[kTile];
  StepArgs<float> plain;
  static_assert(sizeof(plain) == sizeof(args));
  __builtin_memcpy(&plain, &args, sizeof(args));
  const bool proposes = args.phase & kPropose, shares = args.phase & kShare;
  const int32_t buffers = !proposes || !args.states[0] ? 0 : args.proposal == kAdamW ? 2 : 1;
  for (int32_t j = 0; j < args.m; ++j) plain.low[j] = nullptr;
  sums[0] = sums[1] = sums[2] = 0;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t count = std::min(kTile, end - start), tile = start / kTile;
    room.clear();
    // Where step.h finds a row's tile: where it is, or unpacked.
    const auto opened = [&](const Row& row) {
      if (row.format == kFloat32) return static_cast<float*>(row.data);
      float* const to = room.row();
      unpack(row, start, count, to);
      return to - start;
    };
    for (int32_t j = 0; j < args.m; ++j) {
      plain.copies[j] = opened(copy_row(args, j));
      if (proposes) plain.grads[j] = opened(grad_row(args, j));
      for (int32_t b = 0; b < buffers; ++b) plain.states[b * args.m + j] = opened(state_row(args, b, j));
    }
    if (args.anchor) plain.anchor = opened(anchor_row(args, args.anchor));
    if (args.centre)
      plain.centre = args.centre == args.anchor ? const_cast<float*>(plain.anchor) : opened(anchor_row(args, args.centre));
    double of_tile[3];
    loop(plain, start, start + count, of_tile);
    for (int s = 0; s < 3; ++s) sums[s] += of_tile[s];
    const auto closed = [&](const Row& row, const float* from, int32_t number) {
      if (row.format != kFloat32)
        pack(row, start, count, from + start, args.noise ? noise : nullptr, args.noise ? row_noise(*args.noise, number, tile) : 0);
    };
    if (args.noise) {
      const HashKeys keys = hash_keys(*args.noise, tile);
      for (uint32_t i = 0; i < kTile; ++i) noise[i] = random_bits(keys, i);
    }
    for (int32_t j = 0; j < args.m; ++j) {
      closed(copy_row(args, j), plain.copies[j], j);
      if (args.low[j]) pack(low_row(args, j), start, count, plain.copies[j] + start, nullptr, 0);
      for (int32_t b = 0; b < buffers; ++b)
        closed(state_row(args, b, j), plain.states[b * args.m + j], (1 + b) * args.m + j);
    }
    if (args.centre && shares) closed(anchor_row(args, args.centre), plain.centre, 3 * args.m);
  }
}

// NaN if any of [begin, end) of a row is not finite, else 0.
inline double packed_poison(const Row& row, int64_t begin, int64_t end) {
  if (row.format == kFloat32) return poison_range(static_cast<const float*>(row.data), begin, end);
  double poison = 0;
  float tile[kTile];
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t count = std::min(kTile, end - start);
    unpack(row, start, count, tile);
    poison += poison_range(tile, 0, count);
  }
  return poison;
}

}  // namespace hta::cpu::HTA_ISA
