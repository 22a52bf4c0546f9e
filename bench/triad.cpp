// Plain loops over memory, on threads of their own: the bandwidth that a kernel can hope for.
// Built for the machine at hand and loaded by measure.py.
#include <cstdint>
#include <thread>
#include <vector>

#ifdef __SSE__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kPage = 1024;       // elements: threads begin at pages, vectors are whole
constexpr int64_t kRun = 16 * kPage;  // of one stream before the next: shorter ones cost prefetchers a third

template <class Part>
void share_out(int64_t n, int threads, const Part& part) {
  const auto bound = [&](int t) { return t == threads ? n : n * t / threads / kPage * kPage; };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back([&, t] { part(bound(t), bound(t + 1)); });
  part(bound(0), bound(1));
  for (auto& other : others) other.join();
}

// a = b + s c. Streaming stores write past the caches, so that 12 bytes an element are all that moves.
template <bool kStream, int kAhead>
void triad_range(float* a, const float* b, const float* c, float s, int64_t begin, int64_t end) {
  int64_t i = begin;
#ifdef __AVX512F__
  const __m512 factor = _mm512_set1_ps(s);
  for (; i + 16 <= end; i += 16) {
    if (kAhead) __builtin_prefetch(b + i + kAhead), __builtin_prefetch(c + i + kAhead);
    const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(b + i), _mm512_mul_ps(factor, _mm512_loadu_ps(c + i)));
    kStream ? _mm512_stream_ps(a + i, sum) : _mm512_storeu_ps(a + i, sum);
  }
#elif defined(__SSE__)
  const __m128 factor = _mm_set1_ps(s);
  for (; i + 4 <= end; i += 4) {
    if (kAhead) __builtin_prefetch(b + i + kAhead), __builtin_prefetch(c + i + kAhead);
    const __m128 sum = _mm_add_ps(_mm_loadu_ps(b + i), _mm_mul_ps(factor, _mm_loadu_ps(c + i)));
    kStream ? _mm_stream_ps(a + i, sum) : _mm_storeu_ps(a + i, sum);
  }
#endif
  for (; i < end; ++i) a[i] = b[i] + s * c[i];
}

}  // namespace

// `kind`: 0 plain, 1 streaming stores, 2 plain and asking 2 KiB ahead. a may be b.
extern "C" void triad(float* a, const float* b, const float* c, float s, int64_t n, int threads, int kind) {
  const auto range = kind == 1 ? triad_range<true, 0> : kind == 2 ? triad_range<false, 512> : triad_range<false, 0>;
  share_out(n, threads, [&](int64_t begin, int64_t end) { range(a, b, c, s, begin, end); });
}

// Reads n words of each of `reads` streams, reads and writes n words of each of `writes`: what is written is what was
// read, `zero` being 0, which the compiler does not know. In runs, as a step goes through its buffers.
extern "C" void mix(uint32_t* const* written, int writes, const uint32_t* const* read, int reads, int64_t n, int threads,
                    uint32_t zero) {
  share_out(n, threads, [&](int64_t begin, int64_t end) {
    uint32_t seen = 0;
    for (int64_t run = begin; run < end; run += kRun) {
      const int64_t stop = run + kRun < end ? run + kRun : end;
      for (int s = 0; s < reads; ++s)
        for (int64_t i = run; i < stop; ++i) seen |= read[s][i];
      for (int s = 0; s < writes; ++s)
        for (int64_t i = run; i < stop; ++i) written[s][i] |= zero;
    }
    volatile uint32_t sink = seen;
    (void)sink;
  });
}
