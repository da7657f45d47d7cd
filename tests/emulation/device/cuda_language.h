// CUDA C++ as native/cuda uses it, for a C++ compiler on the host: included ahead of every translated source, as nvcc
// includes <cuda_runtime.h>. What a kernel uses and this file lacks does not compile: add it here.
//
// __CUDACC__ stays undefined, so that native/include takes the host's own functions for sqrt, / and the bits of a float.
#pragma once

#include <math.h>

#include <algorithm>
#include <type_traits>

#include "fibers.h"

#define __CUDA_ARCH__ EMULATED_ARCHITECTURE

#define __global__
#define __device__
#define __constant__
#define __shared__ static __attribute__((section("emulated_shared")))
#define __forceinline__ inline
#define __noinline__  // in system headers an attribute's name, which may be missing too
#define __launch_bounds__(...)

// --- Vectors. ---

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};

static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }

// --- Barriers and exchanges. Only of whole warps: a smaller mask fails. ---

namespace emulator {

template <typename T>
const uint64_t* exchange_in_warp(uint32_t mask, T value, const char* what) {
  if (mask != 0xffffffffu) EMULATOR_FAIL("%s of the threads 0x%08x: only whole warps are emulated", what, mask);
  return exchange(warp(), value, what);
}

template <typename T>
T value_of(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t lane() { return threadIdx.x % kWarp; }

// A reduction that every thread gets. From the first value on, so `combine` needs no neutral one.
template <typename T, typename F>
T combined(const uint64_t* values, uint32_t count, F combine) {
  T result = value_of<T>(values[0]);
  for (uint32_t i = 1; i < count; ++i) result = combine(result, value_of<T>(values[i]));
  return result;
}

}  // namespace emulator

static inline void __syncthreads() { emulator::meet(emulator::block, "__syncthreads"); }
static inline int __syncthreads_or(int x) {
  const uint64_t* all = emulator::exchange(emulator::block, x != 0, "__syncthreads_or");
  return emulator::combined<bool>(all, emulator::block.size, [](bool a, bool b) { return a || b; });
}
static inline int __syncthreads_and(int x) {
  const uint64_t* all = emulator::exchange(emulator::block, x != 0, "__syncthreads_and");
  return emulator::combined<bool>(all, emulator::block.size, [](bool a, bool b) { return a && b; });
}
static inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulator::exchange_in_warp(mask, 0, "__syncwarp"); }

static inline int __any_sync(uint32_t mask, int x) {
  const uint64_t* all = emulator::exchange_in_warp(mask, x != 0, "__any_sync");
  return emulator::combined<bool>(all, emulator::kWarp, [](bool a, bool b) { return a || b; });
}
static inline int __all_sync(uint32_t mask, int x) {
  const uint64_t* all = emulator::exchange_in_warp(mask, x != 0, "__all_sync");
  return emulator::combined<bool>(all, emulator::kWarp, [](bool a, bool b) { return a && b; });
}
static inline uint32_t __ballot_sync(uint32_t mask, int x) {
  const uint64_t* all = emulator::exchange_in_warp(mask, x != 0 ? 1u << emulator::lane() : 0u, "__ballot_sync");
  return emulator::combined<uint32_t>(all, emulator::kWarp, [](uint32_t a, uint32_t b) { return a | b; });
}
static inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t x) {
  const uint64_t* all = emulator::exchange_in_warp(mask, x, "__reduce_max_sync");
  return emulator::combined<uint32_t>(all, emulator::kWarp, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
static inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t x) {
  const uint64_t* all = emulator::exchange_in_warp(mask, x, "__reduce_min_sync");
  return emulator::combined<uint32_t>(all, emulator::kWarp, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}

template <typename T>
static T __shfl_sync(uint32_t mask, T x, uint32_t from) {
  return emulator::value_of<T>(emulator::exchange_in_warp(mask, x, "__shfl_sync")[from % emulator::kWarp]);
}
template <typename T>
static T __shfl_xor_sync(uint32_t mask, T x, uint32_t bits) {
  const uint64_t* all = emulator::exchange_in_warp(mask, x, "__shfl_xor_sync");
  return emulator::value_of<T>(all[(emulator::lane() ^ bits) % emulator::kWarp]);
}
template <typename T>
static T __shfl_down_sync(uint32_t mask, T x, uint32_t by) {
  const uint64_t* all = emulator::exchange_in_warp(mask, x, "__shfl_down_sync");
  return emulator::value_of<T>(all[emulator::lane() + by < emulator::kWarp ? emulator::lane() + by : emulator::lane()]);
}
template <typename T>
static T __shfl_up_sync(uint32_t mask, T x, uint32_t by) {
  const uint64_t* all = emulator::exchange_in_warp(mask, x, "__shfl_up_sync");
  return emulator::value_of<T>(all[emulator::lane() >= by ? emulator::lane() - by : emulator::lane()]);
}

// --- Atomics: one fiber runs at a time. ---

template <typename T>
static T atomicExch(T* at, T x) {
  T before = *at;
  *at = x;
  return before;
}
template <typename T>
static T atomicAdd(T* at, T x) {
  return atomicExch<T>(at, *at + x);
}
template <typename T>
static T atomicMax(T* at, T x) {
  return atomicExch<T>(at, *at < x ? x : *at);
}
template <typename T>
static T atomicMin(T* at, T x) {
  return atomicExch<T>(at, x < *at ? x : *at);
}
template <typename T>
static T atomicOr(T* at, T x) {
  return atomicExch<T>(at, *at | x);
}
template <typename T>
static T atomicAnd(T* at, T x) {
  return atomicExch<T>(at, *at & x);
}

// --- Memory. ---

template <typename T>
static T __ldg(const T* at) {
  return *at;
}
template <typename T>
static T __ldcs(const T* at) {
  return *at;
}
template <typename T>
static void __stcs(T* at, T x) {
  *at = x;
}
static inline void __threadfence() {}

// An address in shared memory counts from the section's beginning, which is aligned as its most aligned variable is.
static inline size_t __cvta_generic_to_shared(const void* pointer) {
  const char* at = static_cast<const char*>(pointer);
  if (at < __start_emulated_shared || at >= __stop_emulated_shared)
    EMULATOR_FAIL("thread %u takes an address that is not in shared memory for one that is", threadIdx.x);
  return (size_t)(at - __start_emulated_shared);
}

static inline void* __cvta_shared_to_generic(size_t address) { return __start_emulated_shared + address; }

// --- Numbers. ---

template <typename A, typename B>
static constexpr std::common_type_t<A, B> min(A a, B b) {
  static_assert(std::is_integral_v<A> && std::is_integral_v<B>, "of integers; fminf says what it does with NaN");
  typedef std::common_type_t<A, B> T;
  return (T)a < (T)b ? (T)a : (T)b;
}
template <typename A, typename B>
static constexpr std::common_type_t<A, B> max(A a, B b) {
  static_assert(std::is_integral_v<A> && std::is_integral_v<B>, "of integers; fmaxf says what it does with NaN");
  typedef std::common_type_t<A, B> T;
  return (T)a < (T)b ? (T)b : (T)a;
}

static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline int __clz(int x) { return x ? __builtin_clz((uint32_t)x) : 32; }
static inline int __popc(uint32_t x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }

static inline int __float2int_rz(float x) {
  if (x != x) return 0;
  return x >= 2147483648.0f ? 0x7fffffff : x < -2147483648.0f ? -0x7fffffff - 1 : (int)x;
}

static inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t result = 0;
  for (uint32_t i = 0; i < 4; ++i) result |= (uint32_t)(bytes >> (8 * (selector >> (4 * i) & 7u)) & 255u) << (8 * i);
  return result;
}

#include "ptx.h"
