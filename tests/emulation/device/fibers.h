// A block of threads as fibers of one thread of the host: each runs until it meets a barrier that others have not reached.
//
// Blocks run one after the other. Barriers and exchanges are the only places where a fiber can stop, so that a run is
// repeatable; what a kernel leaves open (which thread, which block comes first) is settled by `order`. A barrier that not
// all threads reach, an address that is not aligned, an index beyond an array: the launch fails with a message.
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#include "cuda_runtime_api.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

// Shared memory: one section of the library, so that its bounds are known and every block finds it full of rubbish.
extern "C" {
extern char __start_emulated_shared[] __attribute__((visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((visibility("hidden")));
}

struct emulated_index {
  uint32_t x = 0, y = 0, z = 0;
};
inline emulated_index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr uint32_t kWarp = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;

// 0: threads and blocks in their order. Else shuffled by this seed; odd ones run asynchronous copies at once, the others
// as late as they may.
inline uint32_t order = 0;

inline uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The numbers below `count` in the order that `order` and `salt` ask for.
inline void arrange(std::vector<uint32_t>* numbers, uint32_t count, uint32_t salt) {
  numbers->resize(count);
  for (uint32_t i = 0; i < count; ++i) (*numbers)[i] = i;
  for (uint32_t i = order ? count : 0; i > 1; --i)
    std::swap((*numbers)[i - 1], (*numbers)[scramble(order ^ scramble(salt ^ scramble(i))) % i]);
}

// Where `size` threads meet. Values that they exchange lie in the half of `values` that the generation names: nobody can
// write there again before all have met once more, so after they have read.
struct Barrier {
  uint32_t size = 0, arrived = 0, generation = 0;
  const char* what = "";
  std::vector<uint64_t> values[2];
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes, exist;  // the bytes that do not exist are zeros
  uint32_t group;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf place;
  bool started = false, ended = false;
  const Barrier* waits = nullptr;
  uint32_t generation = 0;   // of the barrier when it came
  std::vector<Copy> copies;  // asynchronous, not done yet
  uint32_t group = 0;        // to which the next copy belongs
};

inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warps;
inline Barrier block;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline const char* kernel = "";

inline Fiber& self() { return fibers[threadIdx.x]; }

// Back to the scheduler, which returns here when it is this fiber's turn. Not inlined: setjmp wants a frame of its own.
__attribute__((noinline)) inline void leave() {
  if (!_setjmp(self().place)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void enter(uint32_t thread) {
  threadIdx.x = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void live() {
  for (;;) {
    body();
    self().ended = true;
    leave();
  }
}

// The first failure of a launch is its error.
__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  if (error != cudaSuccess) return;
  error = cudaErrorLaunchFailure;
  int used = snprintf(message, sizeof message, "%s, block %u: ", kernel, blockIdx.x);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + used, sizeof message - used, format, arguments);
  va_end(arguments);
}

// Of a thread: it never comes back.
#define EMULATOR_FAIL(...)       \
  do {                           \
    emulator::fail(__VA_ARGS__); \
    emulator::leave();           \
  } while (true)

inline void meet(Barrier& barrier, const char* what) {
  if (barrier.arrived == 0) barrier.what = what;
  if (barrier.what != what && strcmp(barrier.what, what) != 0)
    EMULATOR_FAIL("thread %u comes to %s while its warp waits at %s", threadIdx.x, what, barrier.what);
  Fiber& fiber = self();
  fiber.generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  fiber.waits = &barrier;
  leave();
}

inline Barrier& warp() { return warps[threadIdx.x / kWarp]; }

// Puts a value of each thread down and returns all of them.
template <typename T>
const uint64_t* exchange(Barrier& barrier, T value, const char* what) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a value of at most eight bytes");
  std::vector<uint64_t>& values = barrier.values[barrier.generation & 1];
  uint64_t& mine = values[threadIdx.x % barrier.size];
  mine = 0;
  memcpy(&mine, &value, sizeof value);
  meet(barrier, what);
  return values.data();
}

// No thread can go on: tells where they are.
inline void report_deadlock() {
  uint32_t at_block = block.arrived, ended = 0, in_warps = 0, some_warp = 0;
  for (const Fiber& fiber : fibers) ended += fiber.ended;
  for (uint32_t i = 0; i < warps.size(); ++i) {
    in_warps += warps[i].arrived;
    if (warps[i].arrived) some_warp = i;
  }
  char of_warp[128] = "";
  if (in_warps)
    snprintf(of_warp, sizeof of_warp, ", %u in their warps (%u of warp %u at %s)", in_warps, warps[some_warp].arrived,
             some_warp, warps[some_warp].what);
  fail("deadlock: of %u threads %u wait at %s%s, %u have ended", (unsigned)fibers.size(), at_block,
       at_block ? block.what : "the block's barrier", of_warp, ended);
}

inline void set_up(uint32_t threads) {
  bool anew = fibers.size() != threads;
  if (anew) fibers = std::vector<Fiber>(threads);
  warps.resize(threads / kWarp);
  block.size = threads;
  for (Barrier& each : warps) each.size = kWarp;
  for (auto& half : block.values) half.resize(threads);
  for (Barrier& each : warps)
    for (auto& half : each.values) half.resize(kWarp);
  for (Fiber& fiber : fibers) {
    if (fiber.started) continue;
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, live, 0);
  }
}

inline bool run_block(const std::vector<uint32_t>& threads) {
  memset(__start_emulated_shared, 0xa5 + (int)(order & 15u),
         (size_t)(__stop_emulated_shared - __start_emulated_shared));
  block.arrived = 0;
  for (Barrier& each : warps) each.arrived = 0;
  for (Fiber& fiber : fibers) {
    fiber.ended = false;
    fiber.waits = nullptr;
    fiber.copies.clear();
    fiber.group = 0;
  }
  for (size_t left = threads.size(); left > 0;) {
    bool moved = false;
    for (uint32_t thread : threads) {
      Fiber& fiber = fibers[thread];
      if (fiber.ended || (fiber.waits && fiber.waits->generation == fiber.generation)) continue;
      fiber.waits = nullptr;
      moved = true;
      enter(thread);
      if (error != cudaSuccess) return false;
      left -= fiber.ended;
    }
    if (!moved) {
      report_deadlock();
      return false;
    }
  }
  return true;
}

// Subnormals are flushed to zero as by nvcc's -ftz=true.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80u | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t(1) << 24));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
#error "no way known to flush subnormals on this processor"
#endif
};

inline void run(const char* name, uint32_t grid, uint32_t threads, const std::function<void()>& work) {
  if (error != cudaSuccess) return;  // as on a device: after a failure nothing runs
  if (grid == 0 || threads == 0 || threads > kMostThreads || threads % kWarp != 0) {
    error = cudaErrorInvalidConfiguration;
    return;
  }
  FlushSubnormals flush;
  kernel = name;
  body = work;
  gridDim.x = grid;
  blockDim.x = threads;
  set_up(threads);
  std::vector<uint32_t> blocks, lanes;
  arrange(&blocks, grid, 0);
  for (uint32_t number : blocks) {
    blockIdx.x = number;
    arrange(&lanes, threads, number + 1);
    if (run_block(lanes)) continue;
    for (Fiber& fiber : fibers) fiber.started = false;  // they stand where they stood: begin anew
    return;
  }
}

// kernel<<<grid, block, shared, stream>>>(arguments) is translated to configure("kernel", kernel, grid, ...)(arguments).
template <typename... P>
struct Configured {
  const char* name;
  void (*function)(P...);
  uint32_t grid, threads;
  void operator()(P... arguments) const {
    run(name, grid, threads, [&] { function(arguments...); });
  }
};

template <typename... P>
Configured<P...> configure(const char* name, void (*function)(P...), uint32_t grid, uint32_t threads, size_t = 0,
                           cudaStream_t = nullptr) {
  return {name, function, grid, threads};
}

}  // namespace emulator

// What the tests set, of the next launches.
extern "C" __attribute__((visibility("default"), used)) inline void emulate(uint32_t order, int32_t multiprocessors) {
  emulator::order = order;
  emulator::multiprocessors = multiprocessors;
}

// --- What -fsanitize=alignment,bounds calls. A device stops at an address that is not aligned; a host would not. ---

struct emulated_source {
  const char* file;
  uint32_t line, column;
};
struct emulated_mismatch {
  emulated_source at;
  const void* type;
  unsigned char log_alignment, kind;
};

extern "C" __attribute__((visibility("hidden"), used)) inline void __ubsan_handle_type_mismatch_v1(
    emulated_mismatch* what, uintptr_t address) {
  EMULATOR_FAIL("%s:%u: thread %u takes %#zx, which is not aligned to %u bytes", what->at.file, what->at.line,
                threadIdx.x, (size_t)address, 1u << what->log_alignment);
}

extern "C" __attribute__((visibility("hidden"), used)) inline void __ubsan_handle_out_of_bounds(emulated_source* at,
                                                                                                uintptr_t index) {
  EMULATOR_FAIL("%s:%u: thread %u takes element %zd, which the array does not have", at->file, at->line, threadIdx.x,
                (ssize_t)index);
}
