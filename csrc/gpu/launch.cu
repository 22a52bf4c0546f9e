// Launches the GPU kernels. No torch header, so that it compiles beside a CPU build of torch as well.
#include "kernels.cuh"

#include <cuda_runtime.h>

namespace hta::gpu {
namespace {

template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, const Args& args, void* stream) {
  if (blocks > 0) kernel<<<dim3(unsigned(blocks)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
}

const char* error() {
  const cudaError_t code = cudaGetLastError();
  return code == cudaSuccess ? nullptr : cudaGetErrorString(code);
}

}  // namespace

int64_t scratch(int64_t n) { return 1 + 2 * blocks(n); }  // the flag of the guard, then the blocks' sums

template <class T, class G, class P>
auto step_kernel_for(const StepArgs<T, G>& args) {
  if (args.explicit_mode) return step_kernel<T, G, P, 0, true>;
  if (args.phase != (kPropose | kShare) || args.blocks != args.m) return step_kernel<T, G, P, 0, false>;
  if (args.m <= 2) return step_kernel<T, G, P, 2, false>;
  if constexpr (sizeof(T) == 4 && !kInFormats<T>) {  // which would not fit the registers
    if (args.m <= 4) return step_kernel<T, G, P, 4, false>;
    if (args.m <= 8) return step_kernel<T, G, P, 8, false>;
  }
  return step_kernel<T, G, P, 0, false>;
}

template <class T, class G>
const char* step(StepArgs<T, G> args, double* scratch, void* stream) {
  args.nonfinite = reinterpret_cast<int32_t*>(scratch);
  args.partial = scratch + 1;
  args.guard = args.guard && (args.phase & kPropose);
  cudaMemsetAsync(args.nonfinite, 0, 2 * sizeof(int32_t), static_cast<cudaStream_t>(stream));
  if (args.guard) launch(guard_kernel<T, G>, blocks(args.n), args, stream);
  launch(args.proposal == kAdamW ? step_kernel_for<T, G, AdamW>(args) : step_kernel_for<T, G, Sgd>(args), blocks(args.n),
         args, stream);
  launch(step_end_kernel<T, G>, 1, args, stream);
  return error();
}

template <class T>
const char* penalty(PenaltyArgs<T> args, double* scratch, void* stream) {
  args.partial = scratch + 1;
  launch(penalty_kernel<T>, blocks(args.n), args, stream);
  launch(penalty_end_kernel<T>, 1, args, stream);
  return error();
}

template <class T>
const char* batch(const BatchArgs<T>& args, void* stream) {
  launch(batch_kernel<T>, (args.size * args.height * args.width + kThreads - 1) / kThreads, args, stream);
  return error();
}

#define HTA_INSTANTIATE_STEP(T, G) template const char* step<T, G>(StepArgs<T, G>, double*, void*);
#define HTA_INSTANTIATE(T)                                             \
  HTA_INSTANTIATE_STEP(T, T)                                           \
  template const char* penalty<T>(PenaltyArgs<T>, double*, void*);     \
  template const char* batch<T>(const BatchArgs<T>&, void*);
HTA_INSTANTIATE(float)
HTA_INSTANTIATE(double)
HTA_INSTANTIATE(Half)
HTA_INSTANTIATE(BFloat16)
HTA_INSTANTIATE_STEP(float, Half)
HTA_INSTANTIATE_STEP(float, BFloat16)
HTA_INSTANTIATE_STEP(Packed, Packed)

}  // namespace hta::gpu
