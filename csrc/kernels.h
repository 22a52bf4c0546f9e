// What every backend's kernels are handed: raw pointers, no torch. One struct per op.
#pragma once
#include "homotopy.h"

namespace hta {

// Who follows which rule. `codes` holds, for each tile of kTile elements, its parameter group and its label; a
// negative label l says that the tile mixes labels, one byte an element, in row ~l of `labels`.
// Without codes there is one group, and `labels` (one byte an element) or label 0 throughout.
struct Pattern {
  const int32_t* codes;
  const uint8_t* labels;
};

template <class T>
struct StepArgs {
  T *theta, *eta;
  const T *g_theta, *g_eta;
  T *v_theta, *v_eta;  // null: no momentum
  const T* anchor;     // null: zero
  Pattern pattern;
  const double *hyper, *tables;  // [groups, kHyper] and [groups, kLabels, 2, 3]
  int64_t groups, n;
  T inverse_scale;  // gradients are multiplied by it
};

template <class T>
struct PenaltyArgs {
  const T *theta, *eta, *anchor;
  T *g_theta, *g_eta;
  Pattern pattern;
  double pull, couple;
  bool accumulate;
  int64_t n;
};

namespace cpu {
// sums: anchor, distance, poison, as in Sums.
template <class T> void step(const StepArgs<T>& args, double sums[3]);
template <class T> void penalty(const PenaltyArgs<T>& args, double sums[3]);
template <class T> bool all_finite(const T* x, const T* y, int64_t n);
const char* instruction_set();
}  // namespace cpu

}  // namespace hta
