// The CPU kernels: picks the instruction set once, shares the work out, and sums in a fixed order.
//
// cpu_loops.h is compiled once per instruction set, into a namespace each, so that one library serves any x86-64.
// All of them do the same operations on each element; only the order inside the sums follows the register's width.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // lane groups never cross a function that is not inlined
#endif

#define HTA_ISA plain
#define HTA_BYTES 16
#include "cpu_loops.h"
#undef HTA_ISA
#undef HTA_BYTES

#if defined(__x86_64__) && defined(__GNUC__)
#define HTA_HAS_AVX 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define HTA_ISA avx2
#define HTA_BYTES 32
#include "cpu_loops.h"
#undef HTA_ISA
#undef HTA_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define HTA_ISA avx512
#define HTA_BYTES 64
#include "cpu_loops.h"
#undef HTA_ISA
#undef HTA_BYTES
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
    if (!(wish && !std::strcmp(wish, "plain")) && __builtin_cpu_supports("avx2")) return Isa::avx2;
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

}  // namespace

const char* instruction_set() {
  return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "plain";
}

template <class T>
void step(const StepArgs<T>& args, double sums[3]) {
  std::vector<Hyper<T>> hyper(args.groups);
  std::vector<Rule<T>> rules(args.groups * kLabels);
  for (int64_t group = 0; group < args.groups; ++group) {
    const double* h = args.hyper + group * kHyper;
    hyper[group] = {T(h[0]), T(h[1]), T(h[2]), T(h[3]), T(h[4]), T(h[5])};
    for (int label = 0; label < kLabels; ++label) {
      const double* k = args.tables + (group * kLabels + label) * 6;
      rules[group * kLabels + label] = {
          {{T(k[0]), T(k[1]), T(k[2])}, {T(k[3]), T(k[4]), T(k[5])}}, T(label == 1), T(label == 2)};
    }
  }
  const auto loop = args.v_theta ? (args.anchor ? HTA_PICK(step_range<true, true, T>) : HTA_PICK(step_range<true, false, T>))
                                 : (args.anchor ? HTA_PICK(step_range<false, true, T>) : HTA_PICK(step_range<false, false, T>));
  over_chunks(args.n, sums, [&](int64_t begin, int64_t end, double* partial) {
    loop(args, hyper.data(), rules.data(), begin, end, partial);
  });
}

template <class T>
void penalty(const PenaltyArgs<T>& args, double sums[3]) {
  const auto loop = args.anchor ? HTA_PICK(penalty_range<true, T>) : HTA_PICK(penalty_range<false, T>);
  over_chunks(args.n, sums, [&](int64_t begin, int64_t end, double* partial) { loop(args, begin, end, partial); });
}

template <class T>
bool all_finite(const T* x, const T* y, int64_t n) {
  const auto loop = HTA_PICK(poison_range<T>);
  double sums[3];
  over_chunks(n, sums, [&](int64_t begin, int64_t end, double* partial) {
    partial[0] = partial[1] = 0;
    partial[2] = loop(x, y, begin, end);
  });
  return sums[2] == 0;
}

#define HTA_INSTANTIATE(T)                                              \
  template void step<T>(const StepArgs<T>&, double[3]);                 \
  template void penalty<T>(const PenaltyArgs<T>&, double[3]);           \
  template bool all_finite<T>(const T*, const T*, int64_t);
HTA_INSTANTIATE(float)
HTA_INSTANTIATE(double)

}  // namespace hta::cpu
