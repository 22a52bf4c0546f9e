// Runs the GPU kernels of csrc/gpu/kernels.cuh on the CPU, from their own source: every thread of a block is a fiber.
//
// Between two barriers the threads of a block run in a random order, one after the other, so that a missing barrier
// shows. A barrier that only some threads of a block reach is an error, as is a shuffle that some lanes of a warp miss,
// and an access at an address that is not a multiple of its width.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

struct Index { unsigned x; };
static Index threadIdx, blockIdx;
static void barrier();
template <class T> static T shuffle(T value, unsigned lane);

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads barrier
#define __shfl_down_sync(mask, value, distance) shuffle(value, threadIdx.x % 32 + distance)
#define __shfl_xor_sync(mask, value, distance) shuffle(value, threadIdx.x % 32 ^ distance)
#define HTA_DEVICE inline
#include "gpu/kernels.cuh"

using namespace hta;
using namespace hta::gpu;

constexpr size_t kStack = 64 * 1024;
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  enum { kRuns, kWaits, kDone } state = kRuns;
  int shuffles = 0;
};
static Fiber fibers[kThreads];
static ucontext_t scheduler;
static std::function<void()> body;
static double shuffled[2][kThreads];
static std::mt19937 order(1);
static std::string misaligned;

// What code under -fsanitize=alignment calls, with where it stands. Ours, not libubsan's: a test is to fail, not to end.
struct Place {
  const char* file;
  uint32_t line;
};
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(const Place* place, const void*) {
  misaligned = "an access that is not aligned, at " + std::string(place->file) + ":" + std::to_string(place->line);
}

static void pause(decltype(Fiber::state) state) {
  fibers[threadIdx.x].state = state;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

static void barrier() { pause(Fiber::kWaits); }

// Two rooms in turn, since a thread may write the next value before another has read the last.
template <class T> static T shuffle(T value, unsigned lane) {
  const unsigned self = threadIdx.x;
  double* room = shuffled[fibers[self].shuffles++ % 2];
  room[self] = value;
  pause(Fiber::kRuns);
  return T(room[lane < 32 ? self - self % 32 + lane : self]);
}

static void enter() {
  body();
  pause(Fiber::kDone);
}

static const char* run_block() {
  std::vector<unsigned> threads(kThreads);
  misaligned.clear();
  for (unsigned t = 0; t < kThreads; ++t) {
    threads[t] = t;
    fibers[t].state = Fiber::kRuns;
    fibers[t].shuffles = 0;
    getcontext(&fibers[t].context);
    fibers[t].context.uc_stack.ss_sp = fibers[t].stack.get();
    fibers[t].context.uc_stack.ss_size = kStack;
    makecontext(&fibers[t].context, enter, 0);
  }
  for (;;) {
    std::shuffle(threads.begin(), threads.end(), order);
    int count[3] = {};
    for (const unsigned t : threads) {
      threadIdx.x = t;
      if (fibers[t].state == Fiber::kRuns) swapcontext(&scheduler, &fibers[t].context);
      ++count[fibers[t].state];
    }
    if (!misaligned.empty()) return misaligned.c_str();
    for (const unsigned t : threads) {
      const Fiber &self = fibers[t], &first = fibers[t - t % 32];
      if (self.state != first.state || self.shuffles != first.shuffles) return "a shuffle that only some lanes of a warp reach";
    }
    if (count[Fiber::kDone] == kThreads) return nullptr;
    if (count[Fiber::kRuns]) continue;
    if (count[Fiber::kDone]) return "some threads of a block ended before a barrier that others wait at";
    for (Fiber& fiber : fibers) fiber.state = Fiber::kRuns;
  }
}

using Launch = std::function<const char*(int64_t blocks, const void* args)>;
static std::map<std::string, Launch> kernels;

static std::string plain(std::string name) {
  std::string result;
  for (size_t i = 0; i < name.size(); ++i) {
    if (!name.compare(i, 5, "hta::")) i += 4;
    else if (!strchr(" ()", name[i])) result += name[i];
  }
  return result;
}

template <class Args> static void add(const char* name, void (*kernel)(Args)) {
  kernels[plain(name)] = [kernel](int64_t blocks, const void* args) -> const char* {
    body = [kernel, args] { kernel(*static_cast<const std::remove_const_t<Args>*>(args)); };
    for (int64_t block = 0; block < blocks; ++block) {
      blockIdx.x = unsigned(block);
      if (const char* error = run_block()) return error;
    }
    return nullptr;
  };
}

static void fill() {
  if (!kernels.empty()) return;
#define HTA_ADD(kernel) add(#kernel, kernel);
#ifdef FEW
  HTA_STEP_KERNELS(HTA_ADD, FEW, FEW)
#else
  HTA_KERNELS(HTA_ADD)
#endif
}

// The error, or null.
extern "C" const char* emulate(const char* name, int64_t blocks, const void* args) {
  fill();
  const auto found = kernels.find(plain(name));
  return found == kernels.end() ? "no such kernel" : found->second(blocks, args);
}

// The names of all kernels, a line each.
extern "C" const char* kernel_names() {
  static std::string names;
  fill();
  if (names.empty())
    for (const auto& [name, launch] : kernels) names += name + "\n";
  return names.c_str();
}
