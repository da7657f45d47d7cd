// Inline assembly: asm("name.of.it %0, [%1];" : "=f"(x) : "r"(y)) is translated to ptx::name_of_it(x, y) (translate.py).
// An instruction that is not here does not compile. What each does: NVIDIA's PTX ISA.
#pragma once

#include "a8/math.h"

namespace ptx {

// A finite, normal y moved by at most two units of the last place and by no more than the manual allows (2^-23 of rcp,
// 2^-22.9 of rsqrt), another distance for each `order`. A few mantissas, some ten of rcp's, would come out wrong of
// exact.cuh within that; that a device has none of them is for bench/gpu_exact.cu to show.
inline float rough(double exact) {
  float y = (float)exact;
  uint32_t bits = a8_bits(y), exponent = bits >> 23 & 255u;
  if (exponent == 0 || exponent >= 254) return y;
  float moved = a8_float(bits + emulator::scramble(bits ^ emulator::scramble(emulator::order)) % 5u - 2u);
  return fabs((double)moved - exact) <= 1.1920929e-7 * fabs(exact) ? moved : y;
}

inline void rcp_approx_ftz_f32(float& y, float x) { y = rough(1.0 / (double)x); }
inline void rsqrt_approx_ftz_f32(float& y, float x) { y = rough(1.0 / sqrt((double)x)); }

inline void cvt_f32_f16(float& y, unsigned short x) { y = a8_from_f16(x); }

// The device has one NaN for each type, where a8/math.h keeps the sign.
inline uint32_t nan_of_half(uint32_t half, float x) { return x == x ? half : 0x7fffu; }
inline void cvt_rn_bf16x2_f32(uint32_t& packed, float high, float low) {
  packed = nan_of_half(a8_to_bf16(high), high) << 16 | nan_of_half(a8_to_bf16(low), low);
}
inline void cvt_rn_f16x2_f32(uint32_t& packed, float high, float low) {
  packed = nan_of_half(a8_to_f16(high), high) << 16 | nan_of_half(a8_to_f16(low), low);
}

template <float (*kDecode)(uint32_t)>
uint32_t most_of_halves(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (uint32_t shift = 0; shift < 32; shift += 16) {
    uint32_t half_a = a >> shift & 0xffffu, half_b = b >> shift & 0xffffu;
    float x = kDecode(half_a), y = kDecode(half_b);
    result |= (x != x || y != y ? 0x7fffu : x < y ? half_b : half_a) << shift;
  }
  return result;
}
inline void max_NaN_bf16x2(uint32_t& y, uint32_t a, uint32_t b) { y = most_of_halves<a8_from_bf16>(a, b); }
inline void max_NaN_f16x2(uint32_t& y, uint32_t a, uint32_t b) { y = most_of_halves<a8_from_f16>(a, b); }

inline void max_NaN_xorsign_abs_f32(float& y, float a, float b) {
  uint32_t sign = (a8_bits(a) ^ a8_bits(b)) & 0x80000000u;
  y = a != a || b != b ? a8_float(0x7fffffffu) : a8_float(a8_bits(fmaxf(fabsf(a), fabsf(b))) | sign);
}
inline void min_NaN_f32(float& y, float a, float b) { y = a != a || b != b ? a8_float(0x7fffffffu) : fminf(a, b); }

inline uint32_t saturated_byte(int32_t x) { return x < 0 ? 0u : x > 255 ? 255u : (uint32_t)x; }
inline void cvt_pack_sat_u8_s32_b32(uint32_t& packed, int32_t high, int32_t low, uint32_t above) {
  packed = above << 16 | saturated_byte(high) << 8 | saturated_byte(low);
}

// --- Shared memory. ---

inline char* shared_at(size_t address, uint32_t bytes) {
  if (address % bytes != 0 || address + bytes > (size_t)(__stop_emulated_shared - __start_emulated_shared))
    EMULATOR_FAIL("thread %u takes %u bytes at %#zx of shared memory", threadIdx.x, bytes, address);
  return __start_emulated_shared + address;
}

template <typename T>
void ld_shared(T& x, size_t address) {
  memcpy(&x, shared_at(address, sizeof x), sizeof x);
}
inline void ld_shared_f32(float& x, size_t address) { ld_shared(x, address); }
inline void ld_shared_u32(uint32_t& x, size_t address) { ld_shared(x, address); }

// --- Asynchronous copies. ---

inline void do_copy(const emulator::Copy& copy) {
  if (copy.exist) memcpy(copy.to, copy.from, copy.exist);
  memset(static_cast<char*>(copy.to) + copy.exist, 0, copy.bytes - copy.exist);
}

inline void start_copy(size_t to, const void* from, uint32_t bytes, uint32_t exist) {
  emulator::Fiber& fiber = emulator::self();
  emulator::Copy copy = {shared_at(to, bytes), from, bytes, exist, fiber.group};
  if (exist > bytes || (exist && (uintptr_t)from % bytes != 0))
    EMULATOR_FAIL("thread %u copies %u of %u bytes from %p", threadIdx.x, exist, bytes, from);
  if (emulator::order & 1u)
    do_copy(copy);
  else
    fiber.copies.push_back(copy);
}
inline void cp_async_cg_shared_global(size_t to, const void* from, uint32_t bytes) {
  start_copy(to, from, bytes, bytes);
}
inline void cp_async_cg_shared_global(size_t to, const void* from, uint32_t bytes, uint32_t exist) {
  start_copy(to, from, bytes, exist);
}
inline void cp_async_ca_shared_global(size_t to, const void* from, uint32_t bytes) {
  start_copy(to, from, bytes, bytes);
}
inline void cp_async_ca_shared_global(size_t to, const void* from, uint32_t bytes, uint32_t exist) {
  start_copy(to, from, bytes, exist);
}

inline void cp_async_commit_group() { ++emulator::self().group; }
inline void cp_async_wait_group(uint32_t pending) {
  emulator::Fiber& fiber = emulator::self();
  size_t done = 0;
  while (done < fiber.copies.size() && fiber.copies[done].group + pending < fiber.group) do_copy(fiber.copies[done++]);
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + (ptrdiff_t)done);
}

}  // namespace ptx
