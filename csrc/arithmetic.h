// The arithmetic of hta_fused, once, for every C++ and CUDA kernel. No torch and no CUDA header.
//
// A step is propose, sum, share. Each copy j proposes a_j by itself; the proposals meet in one sum s; each copy's new
// value is a weighted mean of its own proposal, the sum and the anchor, and so may a centre be, which proposes itself:
//
//     s = sum_i read_i a_i        x_j = keep_j a_j + share_j s + pull_j anchor
//
// Which copies exist and what pulls them together is all in the numbers; couplings.py makes them.
//
// V is what one lane group holds: a scalar (GPU, loop tails) or a vector of lanes (CPU). T is a number that all lanes
// share, C either of the two. Results are rounded after each operation, never contracted: the same bits everywhere.
#pragma once
#ifdef __CUDACC_RTC__  // NVRTC has no standard headers
using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define HTA_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define HTA_INLINE inline __attribute__((always_inline))
#else
#define HTA_INLINE inline
#endif

namespace hta {

constexpr int64_t kTile = 1024;  // elements that share one code
constexpr int kMaxCopies = 32;
constexpr int kNumbers = 8;  // what a proposal is given, for each parameter group
constexpr int kRule = 5;     // what a label gives each copy, and the centre

// One copy's part in the coupling, under one label. `anchored` is 1 where the copy's distance to the anchor counts in
// the statistics, else 0.
template <class C>
struct Rule {
  C read, keep, share, pull, anchored;
};

template <class V>
HTA_INLINE V square_root(V x) {
#ifdef __CUDA_ARCH__
  return sqrt(x);
#else
  if constexpr (sizeof(V) == sizeof(float)) return __builtin_sqrtf(x);
  else if constexpr (sizeof(V) == sizeof(double)) return __builtin_sqrt(x);
  else {
    for (unsigned lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) {
      if constexpr (sizeof(x[0]) == sizeof(float)) x[lane] = __builtin_sqrtf(x[lane]);
      else x[lane] = __builtin_sqrt(x[lane]);
    }
    return x;
  }
#endif
}

// ----------------------------------------------------------------------------------------------------------- propose
//
// propose(x, g, state, number) leaves x, moves the state, returns the proposal. g comes multiplied by `sign`, which is
// -1 where the loss is maximised. Where g is inf or NaN the proposal must not be finite, by which the CPU's walk tells.
// proposals.py makes the numbers.

// torch.optim.SGD; without momentum its numbers make the state of no account.
struct Sgd {
  static constexpr int kStates = 1;
  template <class T> struct Numbers { T sign, weight_decay, lr_grad, lr_momentum, momentum; };
  template <class V, class T>
  static HTA_INLINE V propose(V x, V g, V* state, const Numbers<T>& number) {
    g += number.weight_decay * x;
    state[0] = number.momentum * state[0] + g;
    return x - (number.lr_grad * g + number.lr_momentum * state[0]);
  }
};

// torch.optim.AdamW. decay = 1 - lr weight_decay, fresh = 1 - beta, lr and root bias-corrected.
struct AdamW {
  static constexpr int kStates = 2;
  template <class T> struct Numbers { T sign, decay, fresh_mean, beta_square, fresh_square, lr, root, eps; };
  template <class V, class T>
  static HTA_INLINE V propose(V x, V g, V* state, const Numbers<T>& number) {
    state[0] += number.fresh_mean * (g - state[0]);
    state[1] = number.beta_square * state[1] + number.fresh_square * (g * g);
    return number.decay * x - number.lr * state[0] / (square_root(state[1]) * number.root + number.eps);
  }
};

// --------------------------------------------------------------------------------------------------------- sum, share

template <class V, class C>
HTA_INLINE V shared(V a, V s, V anchor, const Rule<C>& rule) {
  return rule.keep * a + rule.share * s + rule.pull * anchor;
}

// The quadratic terms' gradient in copy j, pull_j (x_j - anchor) + share_j sum_i read_i (x_j - x_i): what the explicit
// mode adds to the loss's gradient. From differences to copy 0: where the copies agree in most digits, only a
// difference keeps the rest. gap = x_j - x_0, gaps = sum_i read_i (x_i - x_0), reads = sum_i read_i.
template <class V, class C>
HTA_INLINE V quadratic_gradient(V x, V gap, V gaps, V reads, V anchor, const Rule<C>& rule) {
  return rule.pull * (x - anchor) + rule.share * (reads * gap - gaps);
}

// ----------------------------------------------------------------------------------------------------- random numbers

// 32 random bits for each element, which cost no memory: two keys for a tile, one mix for an element (the finalizer of
// MurmurHash3). The same for the same numbers, whatever the order in which they are asked for.
struct HashKeys {
  uint32_t first, second;
};

HTA_INLINE uint64_t mix64(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

HTA_INLINE HashKeys hash_keys(int64_t seed, int64_t tile) {
  const uint64_t key = mix64(mix64(uint64_t(seed)) ^ uint64_t(tile));
  return {uint32_t(key), uint32_t(key >> 32)};
}

// The upper half of random_bits. at: below 65,536. U: an unsigned 32-bit number, or lanes of them.
template <class U>
HTA_INLINE U mixed_bits(HashKeys key, U at) {
  U x = at ^ (key.first ^ (key.first >> 16));  // (at ^ first) ^ (at ^ first) >> 16
  x *= 0x85ebca6bu;
  x ^= (x >> 13) ^ key.second;
  x *= 0xc2b2ae35u;
  return x;
}

template <class U>
HTA_INLINE U random_bits(HashKeys key, U at) {
  const U x = mixed_bits(key, at);
  return x ^ (x >> 16);
}

// The label of an element under a seed: 1 ... copies, each equally likely.
template <class U>
HTA_INLINE U hashed_label(HashKeys key, U at, uint32_t copies) {
  const U bits = mixed_bits(key, at);
  if (copies == 2) return (bits >> 31) + 1;  // the same in fewer instructions
  return (((bits >> 16) * copies) >> 16) + 1;
}

}  // namespace hta
