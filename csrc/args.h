// What every backend's kernels are handed: raw pointers, no torch. One struct per op, of one layout for all types.
//
// These are the only lists of fields: kernels/nvrtc.py reads them from this file, one declaration a line.
#pragma once
#include "formats.h"

namespace hta {

constexpr int32_t kHashed = 1 << 20;  // the label of a tile whose elements draw theirs by hash

// Which rule an element follows. `codes` holds, for each tile, its parameter group and its label; a negative label l
// says that the tile mixes labels, one byte an element, in row ~l of `bytes`. Without codes there is one group, and
// `bytes` (one for each element) or label 0 throughout.
struct Pattern {
  const int32_t* codes;
  const uint8_t* bytes;
  const int64_t* seed;
  int64_t rows;
};

// One number that stands in memory, as float or as double; null, null: not given.
struct Scalar {
  const float* narrow;
  const double* wide;
  HTA_INLINE double get(double otherwise) const { return narrow ? double(*narrow) : wide ? *wide : otherwise; }
};

enum Proposal : int32_t { kSgd, kAdamW };
enum Phase : int32_t { kPropose = 1, kShare = 2 };  // of a step; with one copy per process they are two calls

// T: the copies, states and anchor. G: the gradients. `rules` holds, for each group, kNumbers of the proposal, then
// [blocks + 1, copies + 1, kRule], the centre's last. There are as many blocks as copies, but where these are one process's.
template <class T, class G = T>
struct StepArgs {
  T* copies[kMaxCopies];
  const G* grads[kMaxCopies];
  T* states[2 * kMaxCopies];
  G* low[kMaxCopies];
  const T* anchor;
  T* centre;
  T* sums;
  Pattern pattern;
  const arithmetic_t<T>* rules;
  int64_t groups;
  int64_t n;
  Scalar grad_scale;
  Scalar found_inf;
  double* stats;
  double* partial;
  int32_t* nonfinite;
  int32_t m;
  int32_t blocks;
  int32_t proposal;
  int32_t phase;
  int32_t explicit_mode;
  int32_t guard;
  int8_t* corrections[kMaxCopies];
  float* scales[2 * kMaxCopies];
  const int64_t* noise;
  int32_t copies_format;
  int32_t grads_format;
  int32_t states_format;
  int32_t anchor_format;
};
// copies: overwritten; states: one row for each copy, or two (the second rows after all first), or null; low: the new
// copies again, in the gradients' type, or null; anchor: null is zero; centre: what moves with the sum, such as the
// anchor itself, or null; sums: s, where a phase is done alone, else null; grad_scale: what gradients are divided by; found_inf: not 0: the
// step is skipped. partial, nonfinite, guard are the GPU's own: two sums from each block; two flags of a gradient that is
// not finite, as it comes and as it is once scaled; whether the first is set beforehand, and skips the step. The rest is
// for Packed, whose T* lead to what the formats say: corrections of split copies, the states' scales, one for each kScaled elements; noise: a number of this
// step's own for what is rounded at random.

// The rows of Packed arguments. Of two states the second is a square.
template <class A> HTA_INLINE Row copy_row(const A& args, int32_t j) {
  return {Format(args.copies_format), args.copies[j], args.corrections[j]};
}
template <class A> HTA_INLINE Row state_row(const A& args, int32_t buffer, int32_t j) {
  const int32_t row = buffer * args.m + j;
  const bool square = buffer && args.states_format == kSigned8;
  return {square ? kUnsigned8 : Format(args.states_format), args.states[row], args.scales[row]};
}
template <class A> HTA_INLINE Row grad_row(const A& args, int32_t j) {
  return {Format(args.grads_format), const_cast<Packed*>(args.grads[j]), nullptr};
}
template <class A> HTA_INLINE Row low_row(const A& args, int32_t j) { return {Format(args.grads_format), args.low[j], nullptr}; }
template <class A> HTA_INLINE Row anchor_row(const A& args, const Packed* of) {
  return {Format(args.anchor_format), const_cast<Packed*>(of), nullptr};
}

// The random bits of an element of a row are those of its place, under the keys hash_keys(noise, tile), with these of the
// row changed: one mix serves all rows. Rows: copies, states and centre, in this order.
HTA_INLINE uint32_t row_noise(int64_t noise, int32_t row, int64_t tile) {
  return hash_keys(noise ^ (int64_t(row + 1) << 32), tile).first;
}

template <class T>
struct PenaltyArgs {
  const T* copies[kMaxCopies];
  T* grads[kMaxCopies];
  const T* anchor;
  Pattern pattern;
  const arithmetic_t<T>* rules;
  int64_t n;
  T* value;
  double* partial;
  int32_t m;
  int32_t accumulate;
};

// One batch out of a data set that lies in memory: shuffled, cropped out of zero padding, mirrored, normalised.
// out: [size, channels, height, width] with `strides`; order, offsets [2, count], mirrored: of the epoch's images;
// out = pixel * scale + shift; position: of the batch in `order`.
template <class T>
struct BatchArgs {
  T* out;
  int64_t strides[4];
  int64_t* out_labels;
  const uint8_t* images;
  const int64_t* labels;
  const int64_t* order;
  const int64_t* offsets;
  const uint8_t* mirrored;
  const float* scale;
  const float* shift;
  const int64_t* position;
  int64_t count;
  int64_t size;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t padding;
};

HTA_INLINE constexpr int64_t rules_width(int64_t m, int64_t blocks) { return kNumbers + (blocks + 1) * (m + 1) * kRule; }

namespace cpu {
// sums: the anchor's and the pairs' squares; NaN if a gradient was not finite, else 0.
template <class T> void step(const StepArgs<T>& args, double sums[3]);
template <class T> double penalty(const PenaltyArgs<T>& args);
template <class T> bool all_finite(const StepArgs<T>& args);  // `step` and this for float, double and Packed
const char* instruction_set();
}  // namespace cpu

// Each launches on `stream` of the current device and waits for nothing; the error's name, or null.
namespace gpu {
int64_t scratch(int64_t n);  // doubles that `step` and `penalty` need for n elements
template <class T, class G> const char* step(StepArgs<T, G> args, double* scratch, void* stream);
template <class T> const char* penalty(PenaltyArgs<T> args, double* scratch, void* stream);
template <class T> const char* batch(const BatchArgs<T>& args, void* stream);
}  // namespace gpu

}  // namespace hta
