// The CPU kernels: picks the instruction set once, shares the work out, and sums in a fixed order.
//
// isa.h is compiled once per instruction set, into a namespace each, so that one library serves any x86-64. All of them do
// the same operations on each element; only the order inside the sums follows the register's width.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "../args.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // lane groups never cross a function that is not inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own AVX-512 header
#define HTA_SHUFFLE(table, index) __builtin_shuffle(table, index)
#define HTA_UNROLL _Pragma("GCC unroll 8")
#else
#define HTA_UNROLL
#define HTA_SHUFFLE(table, index) table
#endif

namespace hta::cpu {
alignas(64) constexpr uint32_t kFrom0[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr int64_t kBlock = 16;  // tiles: 64 KiB of each buffer. Shorter runs through memory are slower; of longer ones the
                                // second-level cache no longer holds the proposals when all are taken together
}  // namespace hta::cpu

#define HTA_ISA plain
#define HTA_BYTES 16
#define HTA_SHUFFLES 0
#include "isa.h"
#undef HTA_SHUFFLES

#if defined(__x86_64__) && defined(__GNUC__)
#define HTA_HAS_AVX 1
#if defined(__clang__)
#define HTA_SHUFFLES 0
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#define HTA_SHUFFLES 1
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define HTA_ISA avx2
#define HTA_BYTES 32
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c,prefer-vector-width=512")
#endif
#define HTA_ISA avx512
#define HTA_BYTES 64
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace hta::cpu {
namespace {

enum class Isa { plain, avx2, avx512 };

// HTA_ISA=plain|avx2 holds the library back, so that one machine can test them all.
Isa isa() {
  static const Isa chosen = [] {
#ifdef HTA_HAS_AVX
    const char* wish = std::getenv("HTA_ISA");
    const auto wants = [&](const char* name) { return !wish || !std::strcmp(wish, name); };
    __builtin_cpu_init();
    if (wants("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
    if (!(wish && !std::strcmp(wish, "plain")) && __builtin_cpu_supports("avx2")) return Isa::avx2;  // and so F16C
#endif
    return Isa::plain;
  }();
  return chosen;
}

#ifdef HTA_HAS_AVX
#define HTA_PICK(...) (isa() == Isa::avx512 ? &avx512::__VA_ARGS__ : isa() == Isa::avx2 ? &avx2::__VA_ARGS__ : &plain::__VA_ARGS__)
#else
#define HTA_PICK(...) (&plain::__VA_ARGS__)
#endif

// Few enough to keep the sums' list short, many enough to share out evenly.
constexpr int64_t kChunk = 16 * kTile;

// One line of sums per chunk, added in the chunks' order: the same bits whatever the number of threads.
template <class Loop>
void over_chunks(int64_t n, double sums[3], const Loop& loop) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const auto partial = std::make_unique<double[]>(3 * chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      loop(chunk * kChunk, std::min(n, (chunk + 1) * kChunk), &partial[3 * chunk]);
  });
  for (int s = 0; s < 3; ++s) {
    sums[s] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sums[s] += partial[3 * chunk + s];
  }
}

template <class P, bool kStates, class T>
auto step_loop(const StepArgs<T>& args) {
  if (args.explicit_mode) return HTA_PICK(step_range<P, kStates, true, T>);
  if (args.phase == (kPropose | kShare) && args.blocks == args.m) {
    if (args.m == 1) return HTA_PICK(step_range_together<P, kStates, 1, T>);
    if (args.m == 2) return HTA_PICK(step_range_together<P, kStates, 2, T>);
    if (args.m == 3) return HTA_PICK(step_range_together<P, kStates, 3, T>);
    if (args.m == 4) return HTA_PICK(step_range_together<P, kStates, 4, T>);
    if (args.m == 8) return HTA_PICK(step_range_together<P, kStates, 8, T>);
    return HTA_PICK(step_range_together<P, kStates, 0, T>);
  }
  if (args.m == 1 && args.phase == kPropose) return HTA_PICK(step_range_alone<P, kStates, true, T>);
  if (args.m == 1 && args.phase == kShare) return HTA_PICK(step_range_alone<P, kStates, false, T>);
  return HTA_PICK(step_range<P, kStates, false, T>);
}

template <class T>
auto step_loop(const StepArgs<T>& args) {
  return args.proposal == kAdamW ? step_loop<AdamW, true>(args)
         : args.states[0]        ? step_loop<Sgd, true>(args)
                                 : step_loop<Sgd, false>(args);
}

}  // namespace

const char* instruction_set() {
  return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "plain";
}

template <class T>
void step(const StepArgs<T>& args, double sums[3]) {
  const auto loop = step_loop(args);
  over_chunks(args.n, sums, [&](int64_t begin, int64_t end, double* partial) { loop(args, begin, end, partial); });
}

template <>
void step<Packed>(const StepArgs<Packed>& args, double sums[3]) {
  StepArgs<float> plain;  // of the same fields; which loop it is depends on no pointer's type
  std::memcpy(&plain, &args, sizeof(plain));
  const auto loop = step_loop(plain);
  const auto range = HTA_PICK(packed_range);
  over_chunks(args.n, sums, [&](int64_t begin, int64_t end, double* partial) { range(args, loop, begin, end, partial); });
}

template <class T>
double penalty(const PenaltyArgs<T>& args) {
  const auto loop = HTA_PICK(penalty_range<T>);
  double sums[3];
  over_chunks(args.n, sums, [&](int64_t begin, int64_t end, double* partial) { *partial = loop(args, begin, end); });
  return sums[0];
}

template <class T>
bool all_finite(const StepArgs<T>& args) {
  const auto loop = HTA_PICK(poison_range<T>);
  double sums[3];
  over_chunks(args.n, sums, [&](int64_t begin, int64_t end, double* partial) {
    for (int32_t j = 0; j < args.m; ++j) *partial += loop(args.grads[j], begin, end, T(1));
  });
  return sums[0] == 0;
}

template <>
bool all_finite<Packed>(const StepArgs<Packed>& args) {
  const auto range = HTA_PICK(packed_poison);
  double sums[3];
  over_chunks(args.n, sums, [&](int64_t begin, int64_t end, double* partial) {
    for (int32_t j = 0; j < args.m; ++j) *partial += range(grad_row(args, j), begin, end);
  });
  return sums[0] == 0;
}

#define HTA_INSTANTIATE(T)                            \
  template void step<T>(const StepArgs<T>&, double[3]); \
  template double penalty<T>(const PenaltyArgs<T>&);  \
  template bool all_finite<T>(const StepArgs<T>&);
HTA_INSTANTIATE(float)
HTA_INSTANTIATE(double)

}  // namespace hta::cpu
