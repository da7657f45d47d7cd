// The storage formats of optimizer state: log8, int8, nf4, bf16. One element or one block's header at a time, in
// registers. A format never changes under its name; a different one gets a new name (tests hold snapshots).
#pragma once

#include "math.h"

// --- log8: a positive float's bits are its piecewise-linear logarithm. Block header: {lo, step}. ---
// Code 0 is zero; code c >= 1 is the float whose bits are lo + (c - 1) * step. Subnormals, negatives count as zero and
// NaN as infinity, so that the header is the same integers whatever a processor does with them.
//
// A header is stored as one word (docs/decisions/0007-log8-header-word.md): lo is a multiple of 2^16, step of 2^8.

#define A8_LOG8_SMALLEST 0x00800000
#define A8_LOG8_INFINITY 0x7f800000

// Shifts: the share of its step that a block may waste before its header is made anew, the room at each end then.
#define A8_LOG8_KEEP 3
#define A8_LOG8_ROOM 6

// The mask is arithmetic on purpose: as a comparison it keeps g++ from vectorising the extremes of a block.
A8_FN int32_t a8_log8_bits(float x) {
  int32_t bits = (int32_t)a8_bits(x);
  int32_t magnitude = bits & 0x7fffffff;
  bits = bits < 0 ? 0 : bits;
  bits = magnitude > A8_LOG8_INFINITY ? A8_LOG8_INFINITY : bits;  // a NaN of either sign: x86 makes negative ones
  return bits & ~((bits - A8_LOG8_SMALLEST) >> 31);
}

// For the minimum over non-zero values: zero wraps to the largest unsigned.
A8_FN uint32_t a8_log8_low_key(int32_t bits) { return (uint32_t)bits - 1u; }

// Smallest non-zero bits of a block from its smallest a8_log8_low_key; 0 when all are zero.
A8_FN int32_t a8_log8_low(uint32_t low_key) { return low_key == 0xffffffffu ? 0 : (int32_t)(low_key + 1u); }

typedef struct a8_log8_header {
  int32_t lo;
  int32_t step;
} a8_log8_header;

A8_FN uint32_t a8_log8_pack(a8_log8_header header) { return (uint32_t)header.lo | (uint32_t)header.step >> 8; }

A8_FN a8_log8_header a8_log8_unpack(uint32_t word) {
  a8_log8_header header;
  header.lo = (int32_t)(word & 0xffff0000u);
  header.step = (int32_t)(word << 16 >> 8);
  return header;
}

// The tightest header for values whose bits lie from low to high.
A8_FN a8_log8_header a8_log8_tight(int32_t low, int32_t high) {
  a8_log8_header header;
  header.lo = low & ~0xffff;
  uint32_t units = ((uint32_t)(high - header.lo) + (254u * 256u - 1u)) / (254u * 256u);
  header.step = (int32_t)(units < 1u ? 256u : units * 256u);
  return header;
}

// The header of a block from its a8_log8_low and its largest bits. An all-zero block has lo = 0.
//
// before: the header that the block has; lo = 0 for none. It is kept while the block fits and would not gain an eighth;
// a new one has some room at both ends. For on a new grid every value is rounded anew, by up to a whole code, on an old
// one only by what has changed: a moving average drifts less (docs/decisions/0008-log8-keeps-its-grid.md).
A8_FN a8_log8_header a8_log8_header_of(int32_t low, int32_t high, a8_log8_header before) {
  a8_log8_header header = a8_log8_tight(low, high);
  if (low == 0 || before.lo == 0) return header;
  if (low >= before.lo && high <= before.lo + 254 * before.step &&
      before.step - header.step <= before.step >> A8_LOG8_KEEP)
    return before;
  int32_t room = (high - low) >> A8_LOG8_ROOM;
  bool roomy = low - room >= A8_LOG8_SMALLEST && high < A8_LOG8_INFINITY - room;
  return roomy ? a8_log8_tight(low - room, high + room) : header;
}

// What the encoder subtracts: lo, except that the zeros of an all-zero block (lo = 0) must lie far below it.
A8_FN int32_t a8_log8_origin(int32_t lo) { return lo == 0 ? 0x40000000 : lo; }

// The code of a8_log8_bits(x). offset in [1, 2): A8_LOG8_NEAREST, or uniform for stochastic rounding; inverse_step =
// 1 / step. Zero needs no case of its own: lo >= A8_LOG8_SMALLEST >= step puts it a whole step below code 1.
#define A8_LOG8_NEAREST 1.5f
template <typename I, typename F>
A8_FN auto a8_log8_position(I bits, int32_t origin, float inverse_step, F offset) {
  return a8_truncate(a8_to_float(bits - origin) * inverse_step + offset);
}
A8_FN uint32_t a8_log8_encode(int32_t bits, int32_t origin, float inverse_step, float offset) {
  int32_t code = a8_log8_position(bits, origin, inverse_step, offset);
  code = code < 0 ? 0 : code;
  return (uint32_t)(code > 255 ? 255 : code);
}

template <typename U>
A8_FN auto a8_log8_decode(U code, int32_t lo, int32_t step) {
  return a8_float(a8_select(code == 0u, code, (uint32_t)(lo - step) + code * (uint32_t)step));
}

// A number in [1, 2): 1 + the phase.
template <typename U>
A8_FN auto a8_offset(U phase) {
  return a8_float((phase >> 9) + 0x3f800000u);
}

// --- Formats scaled by the block's largest magnitude: int8 and nf4. Block header: float32 scale. ---
// A block whose largest magnitude is below 1e-36 is stored as zeros (its reciprocal would overflow). A block that holds
// a NaN or infinity decodes to NaN everywhere: nothing of it can be trusted.

#define A8_ABSMAX_SMALLEST 1e-36f

A8_FN uint32_t a8_magnitude_bits(float x) { return a8_bits(x) & 0x7fffffffu; }

A8_FN int32_t a8_absmax_finite(uint32_t absmax_bits) { return absmax_bits < 0x7f800000u; }

A8_FN float a8_absmax_inverse(uint32_t absmax_bits, float levels) {
  float absmax = a8_float(absmax_bits);
  return absmax < A8_ABSMAX_SMALLEST ? 0.0f : a8_div(levels, absmax);
}

A8_FN float a8_absmax_scale(uint32_t absmax_bits, float levels) {
  float absmax = a8_float(absmax_bits);
  float scale = absmax < A8_ABSMAX_SMALLEST ? 0.0f : a8_div(absmax, levels);
  return a8_absmax_finite(absmax_bits) ? scale : a8_float(0x7fc00000u);
}

// int8: linear, to nearest even, or by phases as log8 (docs/decisions/0019).
// inverse = 127 / absmax, scale = absmax / 127.
#define A8_INT8_LEVELS 127.0f
// The code in the low byte: adding 1.5 * 2^23 leaves the rounded integer there, one add where a conversion costs
// several.
template <typename F>
A8_FN auto a8_int8_bits(F x, float inverse) {
  return a8_bits(x * inverse + 12582912.0f);
}
// offset: as of log8, A8_LOG8_NEAREST for the same as above. The bounds keep the largest value from the next code.
template <typename F>
A8_FN auto a8_int8_bits(F x, float inverse, F offset) {
  F moved = x * inverse + (offset - 1.5f);
  return a8_bits(a8_at_least(a8_at_most(moved, F{} + A8_INT8_LEVELS), F{} - A8_INT8_LEVELS) + 12582912.0f);
}
A8_FN int32_t a8_int8_encode(float x, float inverse, float offset) {
  return (int32_t)(a8_int8_bits(x, inverse, offset) - 0x4b400000u);
}
template <typename I>
A8_FN auto a8_int8_decode(I code, float scale) {
  return a8_to_float(code) * scale;
}

// nf4: the 16 levels of QLoRA (Dettmers et al. 2023, appendix E); element 2k in the low half of byte k.
#define A8_NF4_LEVELS_LIST                                                                            \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,    \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f
#define A8_NF4_ZERO 7u
