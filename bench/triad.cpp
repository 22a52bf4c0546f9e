// A STREAM-like triad, a = b + s * c, on torch's threads: the bandwidth that a kernel can hope for.
// Built and loaded by bench.py. "stream" writes past the caches, so that 12 bytes an element are all that moves;
// "in_place" (b is a) writes lines that it has read. The faster of the two is the roof.
#include <immintrin.h>

#include <cstdint>

extern "C" void triad(float* a, const float* b, const float* c, float s, int64_t begin, int64_t end, int stream) {
  const __m128 factor = _mm_set1_ps(s);
  for (int64_t i = begin; i + 4 <= end; i += 4) {
    __builtin_prefetch(b + i + 512);
    __builtin_prefetch(c + i + 512);
    const __m128 sum = _mm_add_ps(_mm_loadu_ps(b + i), _mm_mul_ps(factor, _mm_loadu_ps(c + i)));
    stream ? _mm_stream_ps(a + i, sum) : _mm_storeu_ps(a + i, sum);
  }
}
