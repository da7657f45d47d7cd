// Eight elements a lane in registers: unpacking, rounding and packing them, with the bits of a8/math.h and a8/format.h.
#pragma once

#include "device.cuh"

template <uint32_t kDtype>
A8_FN float a8_value(const uint32_t* w, int i) {
  if (kDtype == A8_F32) return a8_float(w[i]);
  if (kDtype == A8_BF16) return a8_float(i & 1 ? w[i / 2] & 0xffff0000u : w[i / 2] << 16);
  float x;  // the same value as a8_from_f16; a NaN loses its payload, as it does in the next operation
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)(i & 1 ? w[i / 2] >> 16 : w[i / 2])));
  return x;
}

// --- Loads and stores of a lane's eight neighbours, aligned to 16 bytes. ---

template <uint32_t kDtype>
struct a8_eight {
  static const int kWords = kDtype == A8_F32 ? 8 : 4;
  uint32_t w[kWords];
};

template <uint32_t kDtype>
A8_FN void a8_values(const a8_eight<kDtype>& x, float* values) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = a8_value<kDtype>(x.w, i);
}

// kLast: nobody reads it again in this step.
template <uint32_t kDtype, bool kLast>
A8_FN void a8_get(a8_eight<kDtype>* x, const void* base, int64_t e) {
  const uint4* in = reinterpret_cast<const uint4*>(static_cast<const char*>(base) + e * (kDtype == A8_F32 ? 4 : 2));
#pragma unroll
  for (int i = 0; i < a8_eight<kDtype>::kWords; i += 4) {
    uint4 y = kLast ? __ldcs(in + i / 4) : in[i / 4];
    x->w[i] = y.x, x->w[i + 1] = y.y, x->w[i + 2] = y.z, x->w[i + 3] = y.w;
  }
}

template <uint32_t kDtype>
A8_FN void a8_put(const a8_eight<kDtype>& x, void* base, int64_t e) {
  uint4* out = reinterpret_cast<uint4*>(static_cast<char*>(base) + e * (kDtype == A8_F32 ? 4 : 2));
#pragma unroll
  for (int i = 0; i < a8_eight<kDtype>::kWords; i += 4)
    __stcs(out + i / 4, make_uint4(x.w[i], x.w[i + 1], x.w[i + 2], x.w[i + 3]));
}

// The bits of the largest magnitude of 16 lanes' eights, or of a NaN when there is one.
A8_FN uint32_t a8_most_of_lanes(const float* m) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  float x = m[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) asm("max.NaN.xorsign.abs.f32 %0, %0, %1;" : "+f"(x) : "f"(m[i]));
  uint32_t most = a8_magnitude_bits(x);
#else
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max(most, a8_magnitude_bits(m[i]));
#endif
  return a8_lanes_max<16>(most);
}

// --- Rounding and packing. ---

// Eight values of a 16-bit type, rounded one by one. words: the noise of four pairs, when stochastic.
template <uint32_t kDtype, bool kStochastic>
A8_FN void a8_round_eight(const float* x, const uint32_t* words, uint32_t* w) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kStochastic)
      w[i] = a8_to_half_stochastic(x[2 * i], kDtype, words[i] & 0xffffu) |
             a8_to_half_stochastic(x[2 * i + 1], kDtype, words[i] >> 16) << 16;
    else
      w[i] = a8_to_half(x[2 * i], kDtype) | a8_to_half(x[2 * i + 1], kDtype) << 16;
  }
}

// Gives the NaN among eight values the format's pattern, which is the same for both ways of rounding. w: the others'
// values.
template <uint32_t kDtype>
A8_FN void a8_mend_nan(const float* x, uint32_t* w) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t nan = (a8_bits(x[i]) >> 16 & 0x8000u) | (kDtype == A8_BF16 ? 0x7fc0u : 0x7e00u);
    if (x[i] != x[i]) w[i / 2] = __byte_perm(w[i / 2], nan, i % 2 ? 0x5410 : 0x3254);
  }
}

// Eight values to nearest, packed. The same bits as a8_to_bf16 and a8_to_f16.
template <uint32_t kDtype>
A8_FN void a8_pack_eight(const float* x, uint32_t* w) {
  if constexpr (kDtype == A8_F32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = a8_bits(x[i]);
  } else {
#if A8_AMPERE
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kDtype == A8_BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
      else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
    }
    // The instruction's NaN is 0x7fff and survives this maximum; the format's has another pattern.
    uint32_t most = w[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      if (kDtype == A8_BF16)
        asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(most) : "r"(w[i]));
      else
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(most) : "r"(w[i]));
    }
    if ((most & 0xffffu) == 0x7fffu || most >> 16 == 0x7fffu) a8_mend_nan<kDtype>(x, w);
#else
    a8_round_eight<kDtype, false>(x, nullptr, w);
#endif
  }
}

// Two integers clamped to bytes, the second lowest, below the low half of `above`.
A8_FN uint32_t a8_pack_clamped(int32_t high, int32_t low, uint32_t above) {
  uint32_t packed;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(packed) : "r"(high), "r"(low), "r"(above));
  return packed;
}

// Whether a NaN is among eight values. True as well for some infinities and for products that overflow: the sums of
// products are for nothing but to carry a NaN along.
A8_FN bool a8_may_hold_nan(const float* x) {
  float y = __fmaf_rn(x[0], x[1], x[2]);
  y = __fmaf_rn(x[3], x[4], y);
  y = __fmaf_rn(x[5], x[6], y) + x[7];
  return y != y;
}

// Eight values of a 16-bit type, rounded stochastically. words: the noise of four pairs.
template <uint32_t kDtype>
A8_FN void a8_pack_eight_stochastic(const float* x, const uint32_t* words, uint32_t* w) {
  if constexpr (kDtype != A8_BF16) {
    a8_round_eight<kDtype, true>(x, words, w);
  } else {
    // The high half of a sum, as in a8_to_bf16_stochastic; infinity's low half is zero, so it stays.
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = __byte_perm(a8_bits(x[2 * i]) + (words[i] & 0xffffu), a8_bits(x[2 * i + 1]) + (words[i] >> 16), 0x7632);
    if (a8_may_hold_nan(x)) a8_mend_nan<kDtype>(x, w);
  }
}

A8_FN void a8_pack_low_bytes(const uint32_t* code, uint32_t* packed) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    packed[i] = __byte_perm(__byte_perm(code[4 * i], code[4 * i + 1], 0x0040),
                            __byte_perm(code[4 * i + 2], code[4 * i + 3], 0x0040), 0x5410);
}

// a8_int8_bits, the codes packed.
A8_FN void a8_int8_eight(const float* m, float inverse, uint32_t* packed) {
  uint32_t code[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) code[i] = a8_int8_bits(m[i], inverse);
  a8_pack_low_bytes(code, packed);
}

// The same by phases. phase: of the first; the second four begin `run` elements after it.
A8_FN void a8_int8_eight(const float* m, float inverse, uint32_t phase, uint32_t run, uint32_t* packed) {
  uint32_t code[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    code[i] = a8_int8_bits(m[i], inverse, a8_offset(phase + (i / 4 * run + i % 4) * A8_PHASE_STRIDE));
  a8_pack_low_bytes(code, packed);
}

// a8_log8_decode of eight codes. By whole warps: one branch for all decides that no code is zero.
A8_FN void a8_log8_decode_eight(const uint32_t* codes, a8_log8_header header, float* v) {
  uint32_t below = (uint32_t)(header.lo - header.step);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    v[i] = a8_float(__byte_perm(codes[i / 4], 0u, 0x4440u + i % 4) * (uint32_t)header.step + below);
  uint32_t zeros = ((codes[0] - 0x01010101u) & ~codes[0]) | ((codes[1] - 0x01010101u) & ~codes[1]);
  if (__any_sync(A8_LANE_MASK, zeros & 0x80808080u)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = codes[i / 4] & (255u << (8 * (i % 4))) ? v[i] : 0.0f;
  }
}

// a8_log8_encode of values that a kernel has computed, none of them NaN: where they lie, without the offset.
A8_FN void a8_log8_positions(const float* v, int32_t origin, float inverse_step, float* position) {
#pragma unroll
  for (int i = 0; i < 8; ++i) position[i] = (float)((int32_t)a8_bits(v[i]) - origin) * inverse_step;
}

// The codes of positions with their offsets, packed. Packing clamps.
A8_FN void a8_log8_eight(const float* position, uint32_t* packed) {
  int32_t code[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) code[i] = __float2int_rz(position[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    packed[i] = a8_pack_clamped(code[4 * i + 1], code[4 * i], a8_pack_clamped(code[4 * i + 3], code[4 * i + 2], 0u));
}
