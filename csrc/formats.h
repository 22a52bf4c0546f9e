// How numbers are stored: kernels compute in Arithmetic<T>, and T says how a value is read and written.
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

}  // namespace hta
