// What the kernels share: extremes across a warp, and values and codes two at a time in any type, aligned or not.
// Includes no system header, so that NVRTC compiles it too. Formulas are in a8/math.h and a8/format.h.
#pragma once

#include "a8/adafactor.h"
#include "a8/format.h"
#include "a8/geometry.h"
#include "a8/rules.h"

#define A8_LANE_MASK 0xffffffffu

// Whether the step is to write nothing: asked first by every kernel of a step.
A8_FN bool a8_skips(const a8_batch& batch) { return batch.skip && *batch.skip != 0.0f; }

// Warp-wide reductions, asynchronous copies, packed conversions. Without them: shuffles, plain loads, a8/math.h.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define A8_AMPERE 1
#else
#define A8_AMPERE 0
#endif

// --- Extremes of unsigned integers over the 32 lanes of a warp, or over each half of 16. All lanes get the result. ---

template <uint32_t kLanes>
A8_FN uint32_t a8_lanes_max(uint32_t x) {
#if A8_AMPERE
  if (kLanes == 32) return __reduce_max_sync(A8_LANE_MASK, x);
  // Twice over the whole warp: masks of half a warp would run the two halves one after the other.
  bool upper = threadIdx.x & 16u;
  uint32_t low = __reduce_max_sync(A8_LANE_MASK, upper ? 0u : x);
  uint32_t high = __reduce_max_sync(A8_LANE_MASK, upper ? x : 0u);
  return upper ? high : low;
#else
#pragma unroll
  for (uint32_t lane = kLanes / 2; lane > 0; lane /= 2) x = max(x, __shfl_xor_sync(A8_LANE_MASK, x, lane));
  return x;
#endif
}

template <uint32_t kLanes>
A8_FN uint32_t a8_lanes_min(uint32_t x) {
  return ~a8_lanes_max<kLanes>(~x);
}

// Hide from the compiler how a value was made.
A8_FN void a8_settle(const char** pointer) { asm("" : "+l"(*pointer)); }
A8_FN void a8_settle(uint32_t* x) { asm("" : "+r"(*x)); }
A8_FN void a8_settle(float* x) { asm("" : "+f"(*x)); }

A8_FN uint32_t a8_shared_address(const void* shared) { return (uint32_t)__cvta_generic_to_shared(shared); }

// --- Asynchronous copies from global to shared memory. ---

// Shared memory of a warp for what it copies ahead, in the paths that choose their layout by type: at least one unit of
// five arrays of float32, more of smaller ones.
#define A8_ARENA_BYTES 5632

// Starts a copy of kBytes (4, 8 or 16) to shared memory, by and for this thread alone; a8_copies_wait ends it.
template <int kBytes>
A8_FN void a8_copy(void* to, const char* from) {
#if A8_AMPERE
  uint32_t address = a8_shared_address(to);
  if (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
#else
  for (int i = 0; i < kBytes / 4; ++i) static_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
#endif
}

// The same for bytes that may not exist and then are zeros; their address is not looked at. kCached: by way of L1, for
// lanes that take the two halves of a sector one after the other.
template <int kBytes, bool kCached = (kBytes < 16)>
A8_FN void a8_copy_or_zero(void* to, const char* from, bool exists) {
#if A8_AMPERE
  uint32_t address = a8_shared_address(to), bytes = exists ? kBytes : 0;
  if (!kCached)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
#else
  for (int i = 0; i < kBytes / 4; ++i)
    static_cast<uint32_t*>(to)[i] = exists ? reinterpret_cast<const uint32_t*>(from)[i] : 0u;
#endif
}

// Ends a set of copies, which may be empty.
A8_FN void a8_copies_commit() {
#if A8_AMPERE
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all sets but the last kPending.
template <int kPending>
A8_FN void a8_copies_wait() {
#if A8_AMPERE
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// --- Two values of a parameter, a gradient or an unquantised moment: elements (2 * pair, 2 * pair + 1) of `base`. ---

A8_FN bool a8_aligned(const void* pointer, uint32_t to) { return ((uint64_t)pointer & (to - 1u)) == 0; }

template <typename T>
A8_FN T* a8_at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}
template <typename T>
A8_FN const T* a8_at(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

A8_FN float a8_from_half(uint32_t half, uint32_t dtype) {
  return dtype == A8_BF16 ? a8_from_bf16(half) : a8_from_f16(half);
}

// both: the second element exists; without it, it reads as zero.
A8_FN float2 a8_load_pair(const void* base, uint32_t dtype, int64_t pair, bool both) {
  if (dtype == A8_F32) {
    const float* in = a8_at<float>(base, 2 * pair);
    if (both && a8_aligned(in, 8)) return *reinterpret_cast<const float2*>(in);
    return make_float2(in[0], both ? in[1] : 0.0f);
  }
  const uint16_t* in = a8_at<uint16_t>(base, 2 * pair);
  uint32_t word;
  if (both && a8_aligned(in, 4))
    word = *reinterpret_cast<const uint32_t*>(in);
  else
    word = in[0] | (both ? (uint32_t)in[1] << 16 : 0u);
  return make_float2(a8_from_half(word & 0xffffu, dtype), a8_from_half(word >> 16, dtype));
}

A8_FN void a8_store_pair_bits(void* base, int64_t pair, bool both, uint32_t word) {
  uint16_t* out = a8_at<uint16_t>(base, 2 * pair);
  if (both && a8_aligned(out, 4)) {
    *reinterpret_cast<uint32_t*>(out) = word;
  } else {
    out[0] = (uint16_t)word;
    if (both) out[1] = (uint16_t)(word >> 16);
  }
}

A8_FN uint32_t a8_to_half(float x, uint32_t dtype) { return dtype == A8_BF16 ? a8_to_bf16(x) : a8_to_f16(x); }

A8_FN uint32_t a8_to_half_stochastic(float x, uint32_t dtype, uint32_t noise) {
  return dtype == A8_BF16 ? a8_to_bf16_stochastic(x, noise) : a8_to_f16_stochastic(x, noise);
}

// word: the pair's noise, used when stochastic; float32 needs none.
A8_FN void a8_store_pair(void* base, uint32_t dtype, int64_t pair, bool both, float2 x, bool stochastic,
                         uint32_t word) {
  if (dtype == A8_F32) {
    float* out = a8_at<float>(base, 2 * pair);
    if (both && a8_aligned(out, 8)) {
      *reinterpret_cast<float2*>(out) = x;
    } else {
      out[0] = x.x;
      if (both) out[1] = x.y;
    }
  } else if (stochastic) {
    a8_store_pair_bits(base, pair, both,
                       a8_to_half_stochastic(x.x, dtype, word & 0xffffu) | a8_to_half_stochastic(x.y, dtype, word >> 16)
                                                                               << 16);
  } else {
    a8_store_pair_bits(base, pair, both, a8_to_half(x.x, dtype) | a8_to_half(x.y, dtype) << 16);
  }
}

// --- Two codes of a quantised array. ---

A8_FN uint32_t a8_load_codes(const void* base, uint32_t format, int64_t pair, bool both) {
  if (format == A8_NF4) {
    uint32_t byte = *a8_at<uint8_t>(base, pair);
    return (byte & 15u) | (byte >> 4) << 8;
  }
  const uint8_t* in = a8_at<uint8_t>(base, 2 * pair);
  if (both && a8_aligned(in, 2)) return *reinterpret_cast<const uint16_t*>(in);
  return in[0] | (both ? (uint32_t)in[1] << 8 : 0u);
}

A8_FN void a8_store_codes(void* base, uint32_t format, int64_t pair, bool both, uint32_t first, uint32_t second) {
  if (format == A8_NF4) {
    *a8_at<uint8_t>(base, pair) = (uint8_t)(first | (both ? second : A8_NF4_ZERO) << 4);
    return;
  }
  uint8_t* out = a8_at<uint8_t>(base, 2 * pair);
  if (both && a8_aligned(out, 2)) {
    *reinterpret_cast<uint16_t*>(out) = (uint16_t)((first & 255u) | second << 8);
  } else {
    out[0] = (uint8_t)first;
    if (both) out[1] = (uint8_t)second;
  }
}

// --- The header of one block, in the form that encoding and decoding want it. ---

// What decoding needs. int8, nf4: scale. log8: its header.
typedef struct a8_decoder {
  float scale;
  a8_log8_header log8;
} a8_decoder;

A8_FN a8_decoder a8_load_header(const void* headers, uint32_t format, int64_t block) {
  a8_decoder header;
  bool log8 = format == A8_LOG8;
  header.scale = log8 ? 0.0f : *a8_at<float>(headers, block);
  header.log8 = a8_log8_unpack(log8 ? *a8_at<uint32_t>(headers, block) : 0u);
  return header;
}

// levels: the 16 values of nf4 in shared memory, where lanes may read different ones at once.
A8_FN float a8_decode(uint32_t format, uint32_t code, const a8_decoder& header, const float* levels) {
  if (format == A8_LOG8) return a8_log8_decode(code, header.log8.lo, header.log8.step);
  if (format == A8_NF4) return levels[code] * header.scale;
  return a8_int8_decode((int32_t)(int8_t)code, header.scale);
}

// Extremes of a block as integers. most: a8_magnitude_bits; low: a8_log8_low_key; high: a8_log8_bits.
typedef struct a8_extremes {
  uint32_t most;
  uint32_t low;
  uint32_t high;
} a8_extremes;

#define A8_NO_EXTREMES {0u, 0xffffffffu, 0u}

A8_FN void a8_extend(a8_extremes* extremes, uint32_t format, float x) {
  if (format == A8_LOG8) {
    int32_t bits = a8_log8_bits(x);
    extremes->low = min(extremes->low, a8_log8_low_key(bits));
    extremes->high = max(extremes->high, (uint32_t)bits);
  } else {
    extremes->most = max(extremes->most, a8_magnitude_bits(x));
  }
}

// What encoding needs. int8, nf4: inverse, NaN when the block holds no finite maximum. log8: origin and inverse step.
typedef struct a8_encoder {
  float inverse;
  int32_t origin;
} a8_encoder;

// Writes the block's header and returns its encoder. before: the header that a log8 block has, lo = 0 for none.
A8_FN a8_encoder a8_store_header(void* headers, uint32_t format, int64_t block, const a8_extremes& extremes,
                                 a8_log8_header before) {
  a8_encoder encoder;
  encoder.origin = 0;
  if (format == A8_LOG8) {
    a8_log8_header header = a8_log8_header_of(a8_log8_low(extremes.low), (int32_t)extremes.high, before);
    encoder.origin = a8_log8_origin(header.lo);
    *a8_at<uint32_t>(headers, block) = a8_log8_pack(header);
    encoder.inverse = a8_div(1.0f, (float)header.step);
  } else {
    float levels = format == A8_INT8 ? A8_INT8_LEVELS : 1.0f;
    *a8_at<float>(headers, block) = a8_absmax_scale(extremes.most, levels);
    encoder.inverse =
        a8_absmax_finite(extremes.most) ? a8_absmax_inverse(extremes.most, levels) : a8_float(0x7fc00000u);
  }
  return encoder;
}

A8_FN uint32_t a8_encode(uint32_t format, float x, const a8_encoder& encoder, float offset, const float* levels) {
  if (format == A8_LOG8) return a8_log8_encode(a8_log8_bits(x), encoder.origin, encoder.inverse, offset);
  bool finite = encoder.inverse == encoder.inverse;
  if (format == A8_INT8) return finite ? (uint32_t)a8_int8_encode(x, encoder.inverse, offset) : 0u;
  uint32_t code = 0;
#pragma unroll
  for (int level = 0; level < 15; ++level)
    code += x * encoder.inverse > (levels[level] + levels[level + 1]) * 0.5f ? 1u : 0u;
  return finite ? code : A8_NF4_ZERO;
}

static __constant__ float a8_nf4_levels[16] = {A8_NF4_LEVELS_LIST};

// Copies the levels to shared memory. The caller synchronises.
A8_FN void a8_share_levels(float* levels) {
  if (threadIdx.x < 16) levels[threadIdx.x] = a8_nf4_levels[threadIdx.x];
}
