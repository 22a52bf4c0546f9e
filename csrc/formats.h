// How numbers are stored. Kernels compute in Arithmetic<T>, and T says how a value is read and written: one type for a
// whole buffer, or Packed, where each buffer has a Format of its own.
#pragma once
#include "arithmetic.h"

namespace hta {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class T> struct Arithmetic { using type = T; };
template <> struct Arithmetic<Half> { using type = float; };
template <> struct Arithmetic<BFloat16> { using type = float; };
template <class T> using arithmetic_t = typename Arithmetic<T>::type;

HTA_INLINE float widen(float x) { return x; }
HTA_INLINE double widen(double x) { return x; }
HTA_INLINE float widen(BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
HTA_INLINE float widen(Half x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#elif defined(__FLT16_MAX__)
  return __builtin_bit_cast(_Float16, x.bits);
#else
  return 0;  // compiled beside device code, never called
#endif
}

template <class T> HTA_INLINE T narrow(arithmetic_t<T> x) { return x; }
template <> HTA_INLINE BFloat16 narrow<BFloat16>(float x) {  // to nearest, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <> HTA_INLINE Half narrow<Half>(float x) {
#ifdef __CUDA_ARCH__
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#elif defined(__FLT16_MAX__)
  return {__builtin_bit_cast(uint16_t, _Float16(x))};
#else
  return {};
#endif
}

// ------------------------------------------------------------------------------------------------------------- formats
//
// How a row of float32 numbers may lie in memory. Below, V is a float or lanes of them, U as many unsigned 32-bit words;
// a code is the low bits of a word. `noise` holds random bits, and rounds such that the mean of what is kept is x: what a
// step changes by less than a last place is not lost but made now and then. kNearest rounds to nearest.
// kernels/formats.py is this in PyTorch. Comparisons of lanes are never joined by & or nested: GCC 12 would take 512 bits
// of them apart, element by element.

enum Format : int32_t {
  kFloat32,
  kBFloat16,
  kHalf,
  kSplitBFloat16,  // 24 bits of a float32: the nearest bfloat16, and a byte of correction
  kSplitHalf,
  kSigned8,    // a sign, and the upper bits of a pseudo-logarithm of the magnitude over the largest of kScaled elements
  kUnsigned8,  // no sign, and twice as many binades: squares of what kSigned8 is used for
};

constexpr int64_t kScaled = 128;  // elements that share a scale

struct Packed { float value; };  // in a register
template <> struct Arithmetic<Packed> { using type = float; };
HTA_INLINE float widen(Packed x) { return x.value; }
template <> HTA_INLINE Packed narrow<Packed>(float x) { return {x}; }

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
template <class V> struct Words {  // of lanes
  typedef uint32_t U __attribute__((vector_size(sizeof(V))));
};
#else
template <class V> struct Words;
#endif
template <> struct Words<float> {
  using U = uint32_t;
};

template <class V, class U = typename Words<V>::U> HTA_INLINE U bits_of(V x) { return __builtin_bit_cast(U, x); }
template <class V, class U> HTA_INLINE V from_bits(U bits) { return __builtin_bit_cast(V, bits); }

template <class V, class U = typename Words<V>::U>
HTA_INLINE U nearest_bfloat16(V x) {  // ties to even, as everybody's
  const U bits = bits_of(x);
  return x != x ? U{} + 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <class V, class U>
HTA_INLINE U random_bfloat16(V x, U noise) {
  return x != x ? U{} + 0x7fc0u : (bits_of(x) + (noise & 0xffffu)) >> 16;
}

constexpr uint32_t kNearest = 0x80;  // of the last 8 bits, as noise

// The upper 24 bits, as the nearest bfloat16 and what is missing to them.
template <class V, class U>
HTA_INLINE void split_bfloat16(V x, U noise, U& low, U& correction) {
  const U kept = bits_of(x) + (noise & 0xffu);
  low = x != x ? U{} + 0x7fc0u : (kept + 0x8000u) >> 16;
  correction = (kept >> 8) & 0xffu;
}

// correction: its sign extended.
template <class V, class U>
HTA_INLINE V join_bfloat16(U low, U correction) {
  return from_bits<V>((low << 16) + (correction << 8));
}

// The same with a float16, whose magnitudes' bits, and 8 more, count evenly from one to the next.
constexpr float kSubnormal = 0x1p-14f;  // below it float16s are evenly spaced
constexpr uint32_t kFirstNormal = 1u << 18, kBeyondHalf = 0x7c00u << 8, kBias = 112u << 23;

template <class V, class U>
HTA_INLINE void split_half(V x, U noise, U& low, U& correction) {
  const V size = from_bits<V>(bits_of(x) & 0x7fffffffu);
  const U fine = size < kSubnormal ? bits_of(size + kSubnormal) - bits_of(kSubnormal) : bits_of(size) - kBias;
  const U all = (fine + ((noise >> 3) & 0x1fu)) >> 5, kept = all < kBeyondHalf ? all : U{} + kBeyondHalf;
  low = x != x ? U{} + 0x7e00u : ((kept + 0x80u) >> 8) | ((bits_of(x) >> 16) & 0x8000u);
  correction = kept & 0xffu;
}

// correction: its sign extended.
template <class V, class U>
HTA_INLINE V join_half(U low, U correction) {
  const U kept = ((low & 0x7fffu) << 8) + correction, negative = (low & 0x8000u) << 16;
  const V even = from_bits<V>((kept << 5) + bits_of(kSubnormal)) - kSubnormal, normal = from_bits<V>((kept << 5) + kBias);
  const V finite = kept < kFirstNormal ? even : normal;
  const V size = kept < kBeyondHalf ? finite : from_bits<V>(kept > kBeyondHalf ? U{} + 0x7fc00000u : U{} + 0x7f800000u);
  return from_bits<V>(bits_of(size) | negative);
}

// A code is the upper bits of y = x / scale + least, as a float32: near 0 evenly spaced, then 16 codes in each factor of
// two, up to kTop, where the scale itself lies. Rounded up or down at random, such that the mean of what codes stand for
// is x. Of a scale below float32's normal numbers all codes are 0; under one that is not finite, nothing is.
constexpr float kTop = 0.96875f;
constexpr int kCodeShift = 19;
template <bool kSigned> constexpr float kLeast = kSigned ? 0x1p-8f : 0x1p-16f;

template <bool kSigned> HTA_INLINE float to_codes(float scale) {  // what magnitudes are multiplied by
  return scale >= 0x1p-126f ? (kTop - kLeast<kSigned>) / scale : 0;
}

template <bool kSigned, class V, class U>
HTA_INLINE U encoded(V x, float factor, U noise) {
  const V size = from_bits<V>(bits_of(x) & 0x7fffffffu), y = size * factor + kLeast<kSigned>;
  const U code = (bits_of(y < kTop ? y : V{} + kTop) + (noise & ((1u << kCodeShift) - 1)) - bits_of(kLeast<kSigned>)) >> kCodeShift;
  if constexpr (kSigned) return (x < 0.f ? U{} - code : code) & 0xffu;
  const U least = x > 0.f ? U{} + 1u : U{};  // what is above 0 stays so, since a root of it divides
  return code > least ? code : least;
}

// code: its sign extended.
template <bool kSigned, class V, class U>
HTA_INLINE V decoded(U code, float scale) {
  const U negative = kSigned ? code & 0x80000000u : U{}, size = kSigned ? (negative != 0u ? U{} - code : code) : code;
  constexpr float kWhole = 1 / (kTop - kLeast<kSigned>);  // such that the scale comes back to the bit
  const V x = (from_bits<V>((size << kCodeShift) + bits_of(kLeast<kSigned>)) - kLeast<kSigned>) * kWhole * scale;
  return from_bits<V>(bits_of(x) | negative);
}

// A row, and what goes with it: its corrections or its scales, or null.
struct Row {
  Format format;
  void* data;
  void* more;
};

}  // namespace hta
