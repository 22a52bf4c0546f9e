// The current CUDA stream, asked of the torch that is loaded.
#pragma once
#include <dlfcn.h>

#include <cstdint>

namespace hta::gpu {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// Null in a CPU-only torch. By name, since we do not link to libtorch_cuda.so, which a CPU-only torch lacks, and torch
// loads it for its own libraries alone: a weak symbol would stay null. Where its code lies elsewhere we can see it.
inline CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  return found;
}

}  // namespace hta::gpu
