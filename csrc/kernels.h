// What every backend's kernels are handed: raw pointers, no torch. One struct per op, of one layout for all types:
// nvrtc_ops.py mirrors them.
#pragma once
#include "homotopy.h"

namespace hta {

// Types that are stored and not computed in; kernels compute in float.
struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

// Who follows which rule. `codes` holds, for each tile of kTile elements, its parameter group and its label; a
// negative label l says that the tile mixes labels, one byte an element, in row ~l of `labels`.
// Without codes there is one group, and `labels` (one byte an element) or label 0 throughout.
struct Pattern {
  const int32_t* codes;
  const uint8_t* labels;
  int64_t rows;  // of `labels`, where there are codes
};

// One number that stands in memory, as float or as double; null, null: not given.
struct Scalar {
  const float* narrow;
  const double* wide;
  HTA_INLINE double get(double otherwise) const { return narrow ? double(*narrow) : wide ? *wide : otherwise; }
};

// T: the copies, momenta and anchor. G: the gradients.
template <class T, class G = T>
struct StepArgs {
  T *theta, *eta;
  const G *g_theta, *g_eta;
  T *v_theta, *v_eta;     // null: no momentum
  G *low_theta, *low_eta; // the new copies again, in the gradients' type; null: not wanted
  const T* anchor;        // null: zero
  Pattern pattern;
  const double *hyper, *tables;  // [groups, kHyper] and [groups, kLabels, kTable]
  int64_t groups, n;
  Scalar grad_scale;  // what gradients are divided by
  Scalar found_inf;   // not 0: the step is skipped
  // The rest is the GPU kernels' own.
  int32_t* nonfinite;  // set by the guard's pass where a gradient is not finite; null: no such pass
  double* partial;     // 3 sums from each block
  double* stats;       // see ops.py
};

template <class T>
struct PenaltyArgs {
  const T *theta, *eta, *anchor;
  T *g_theta, *g_eta;
  Pattern pattern;
  double L;
  int64_t accumulate;
  int64_t n;
  double* partial;  // the GPU kernels' own, as is
  T* value;
};

// One batch out of a data set that lies in memory: shuffled, cropped out of zero padding, mirrored, normalised.
template <class T>
struct BatchArgs {
  T* out;               // [size, channels, height, width] with these strides
  int64_t strides[4];
  int64_t* out_labels;  // [size]
  const uint8_t* images;  // [*, channels, height, width]
  const int64_t* labels;
  const int64_t* order;    // [count]: the epoch's images
  const int64_t* offsets;  // [2, count]: each one's row and column in the padded image
  const uint8_t* mirrored; // [count]
  const float *scale, *shift;  // [channels]: out = pixel * scale + shift
  const int64_t* position;     // of the batch in `order`
  int64_t count, size, channels, height, width, padding;
};

namespace cpu {
// sums: anchor, distance, poison, as in Sums.
template <class T> void step(const StepArgs<T>& args, double sums[3]);
template <class T> void penalty(const PenaltyArgs<T>& args, double sums[3]);
template <class T> bool all_finite(const T* x, const T* y, int64_t n);
const char* instruction_set();
}  // namespace cpu

// Each launches on `stream` of the current device and waits for nothing; the error's name, or null.
namespace gpu {
int64_t scratch(int64_t n);  // doubles that `step` and `penalty` need for n elements
template <class T, class G> const char* step(StepArgs<T, G> args, double* scratch, bool skip_nonfinite, void* stream);
template <class T> const char* penalty(PenaltyArgs<T> args, double* scratch, void* stream);
template <class T> const char* batch(const BatchArgs<T>& args, void* stream);
}  // namespace gpu

}  // namespace hta
