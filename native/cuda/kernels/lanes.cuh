// Eight neighbouring elements a lane, of arrays whose types are known at run time alone: all lanes of a warp take the
// same branches. Arrays are aligned for wide loads; quantised ones have blocks of A8_USUAL_BLOCK, so half a warp has a
// block.
//
// Memory wants many bytes in flight, so each lane copies its own eights of the next units to shared memory while it
// works.
#pragma once

#include "eight.cuh"
#include "exact.cuh"
#include "nf4_table.cuh"
#include "sums.cuh"

// A type beside those of a8_format: float16 of parameters and gradients.
#define A8_TYPE_F16 7u

A8_FN uint32_t a8_lane_type(uint32_t dtype) {
  return dtype == A8_F32 ? (uint32_t)A8_STATE_F32 : dtype == A8_BF16 ? (uint32_t)A8_STATE_BF16 : A8_TYPE_F16;
}

// Bytes of eight elements.
A8_FN uint32_t a8_lane_bytes(uint32_t type) {
  switch (type) {
    case A8_NONE:
      return 0;
    case A8_NF4:
      return 4;
    case A8_INT8:
    case A8_LOG8:
      return 8;
    default:
      return type == A8_STATE_F32 ? 32 : 16;
  }
}

// Whether the array lies as the lanes take it. block_size: of quantised ones.
A8_FN bool a8_suits_eight(const void* values, uint32_t type, uint32_t block_size) {
  uint32_t bytes = a8_lane_bytes(type);
  return bytes == 0 || ((bytes >= 16 || block_size == A8_USUAL_BLOCK) && a8_aligned(values, min(bytes, 16u)));
}

// --- One array. ---

typedef struct a8_lane_array {
  char* values;   // of eight number 0
  char* headers;  // of its block
  uint32_t type;
  uint32_t bytes;  // of eight
  uint32_t at;     // of its bytes in a stage
} a8_lane_array;

// The array from element `from` on, which begins a block. stage_bytes: grows by what it takes of a stage.
A8_FN a8_lane_array a8_lane_array_of(const void* values, const void* headers, uint32_t type, int64_t from,
                                     uint32_t* stage_bytes) {
  a8_lane_array x;
  x.type = type;
  x.bytes = a8_lane_bytes(type);
  x.values = const_cast<char*>(static_cast<const char*>(values)) + from / 8 * x.bytes;
  x.headers = const_cast<char*>(static_cast<const char*>(headers)) + from / A8_USUAL_BLOCK * 4;
  x.at = *stage_bytes;
  *stage_bytes += 32 * (x.bytes >= 16 ? x.bytes : x.bytes ? 12u : 0u);
  return x;
}

A8_FN char* a8_eight_of(const a8_lane_array& x, uint32_t k) { return x.values + (uint64_t)k * x.bytes; }

A8_FN char* a8_header_of(const a8_lane_array& x, uint32_t k) {
  return x.headers + (uint64_t)(k / (A8_USUAL_BLOCK / 8)) * 4;
}

// Starts the copies of the lane's eight, number k. Rows of pieces of 16, 8 or 4 bytes keep shared memory free of
// conflicts.
A8_FN void a8_load_lane(const a8_lane_array& x, char* stage, uint32_t k) {
  const char* from = a8_eight_of(x, k);
  char* to = stage + x.at;
  uint32_t lane = a8_lane();
  if (x.bytes == 16) {
    a8_copy<16>(to + 16 * lane, from);
  } else if (x.bytes == 32) {
    a8_copy_or_zero<16, true>(to + 16 * lane, from, true);
    a8_copy_or_zero<16, true>(to + 16 * (32 + lane), from + 16, true);
  } else if (x.bytes != 0) {
    if (x.bytes == 8)
      a8_copy<8>(to + 8 * lane, from);
    else
      a8_copy<4>(to + 8 * lane, from);
    a8_copy<4>(to + 8 * 32 + 4 * lane, a8_header_of(x, k));
  }
}

template <uint32_t kDtype>
A8_FN void a8_read_lane_values(const char* from, float* out) {
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < (kDtype == A8_F32 ? 2 : 1); ++i) {
    uint4 y = *reinterpret_cast<const uint4*>(from + i * 16 * 32 + 16 * a8_lane());
    w[4 * i] = y.x, w[4 * i + 1] = y.y, w[4 * i + 2] = y.z, w[4 * i + 3] = y.w;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = a8_value<kDtype>(w, i);
}

// The lane's eight of a parameter or a gradient.
A8_FN void a8_read_lane(const a8_lane_array& x, const char* stage, float* out) {
  if (x.type == A8_STATE_BF16)
    a8_read_lane_values<A8_BF16>(stage + x.at, out);
  else if (x.type == A8_STATE_F32)
    a8_read_lane_values<A8_F32>(stage + x.at, out);
  else
    a8_read_lane_values<A8_F16>(stage + x.at, out);
}

A8_FN uint2 a8_lane_codes(const a8_lane_array& x, const char* stage) {
  return *reinterpret_cast<const uint2*>(stage + x.at + 8 * a8_lane());
}
A8_FN uint32_t a8_lane_header(const a8_lane_array& x, const char* stage) {
  return *reinterpret_cast<const uint32_t*>(stage + x.at + 8 * 32 + 4 * a8_lane());
}

A8_FN void a8_no_eight(float* out) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = 0.0f;
}

// The lane's eight of a moment that is not log8; zeros of one that there is not.
A8_FN void a8_read_lane_moment(const a8_lane_array& x, const char* stage, const a8_nf4_table* table, float* out) {
  if (x.type == A8_INT8) {
    uint2 codes = a8_lane_codes(x, stage);
    float scale = a8_float(a8_lane_header(x, stage));
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out[i] = a8_int8_decode((int32_t)(int8_t)((i < 4 ? codes.x : codes.y) >> (8 * (i % 4))), scale);
  } else if (x.type == A8_NF4) {
    a8_nf4_decode_eight(table, a8_lane_codes(x, stage).x, a8_float(a8_lane_header(x, stage)), out);
  } else if (x.type == A8_STATE_F32) {
    a8_read_lane_values<A8_F32>(stage + x.at, out);
  } else if (x.type == A8_STATE_BF16) {
    a8_read_lane_values<A8_BF16>(stage + x.at, out);
  } else {
    a8_no_eight(out);
  }
}

// Of a second moment: log8, float32 or none. header: of log8.
A8_FN void a8_read_lane_second(const a8_lane_array& x, const char* stage, a8_log8_header* header, float* out) {
  if (x.type == A8_LOG8) {
    uint2 codes = a8_lane_codes(x, stage);
    uint32_t w[2] = {codes.x, codes.y};
    *header = a8_log8_unpack(a8_lane_header(x, stage));
    a8_log8_decode_eight(w, *header, out);
  } else if (x.type == A8_STATE_F32) {
    a8_read_lane_values<A8_F32>(stage + x.at, out);
  } else {
    a8_no_eight(out);
  }
}

// --- Stores. ---

A8_FN void a8_put_lane_words(char* to, const uint32_t* w, int words) {
#pragma unroll
  for (int i = 0; i < words; i += 4)
    __stcs(reinterpret_cast<uint4*>(to) + i / 4, make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]));
}

template <uint32_t kDtype>
A8_FN void a8_put_lane_values(char* to, const float* x) {
  uint32_t w[8];
  a8_pack_eight<kDtype>(x, w);
  a8_put_lane_words(to, w, kDtype == A8_F32 ? 8 : 4);
}

template <uint32_t kDtype>
A8_FN void a8_put_lane_values(char* to, const float* x, bool stochastic, a8_noise noise, uint32_t pair) {
  if (!stochastic) {
    a8_put_lane_values<kDtype>(to, x);
    return;
  }
  uint32_t w[4], words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = a8_noise_word(noise, pair + i);
  a8_pack_eight_stochastic<kDtype>(x, words, w);
  a8_put_lane_words(to, w, 4);
}

// The lane's eight of a parameter. noise: from the first pair of eight number 0 on, of 16-bit types when stochastic.
A8_FN void a8_put_lane(const a8_lane_array& to, uint32_t k, const float* x, bool stochastic, a8_noise noise) {
  if (to.type == A8_STATE_BF16)
    a8_put_lane_values<A8_BF16>(a8_eight_of(to, k), x, stochastic, noise, 4 * k);
  else if (to.type == A8_STATE_F32)
    a8_put_lane_values<A8_F32>(a8_eight_of(to, k), x);
  else
    a8_put_lane_values<A8_F16>(a8_eight_of(to, k), x, stochastic, noise, 4 * k);
}

// The range of a block's largest moment, if it is not zero, in which exact.cuh makes its scale.
#define A8_ORDINARY_FIRST_MIN A8_TWO_TO(-100)
#define A8_ORDINARY_FIRST_MAX A8_TWO_TO(20)

A8_FN bool a8_is_ordinary_first(uint32_t most) {
  return most == 0 ||
         most - a8_bits(A8_ORDINARY_FIRST_MIN) <= a8_bits(A8_ORDINARY_FIRST_MAX) - a8_bits(A8_ORDINARY_FIRST_MIN);
}

// The bits of a block's largest moment where it is int8 or nf4; else 0.
A8_FN uint32_t a8_lane_most(const a8_lane_array& of, const float* x) {
  return of.type == A8_INT8 || of.type == A8_NF4 ? a8_most_of_lanes(x) : 0u;
}

// Whether a8_put_lane_moment takes a moment of which this is a8_lane_most.
A8_FN bool a8_is_ordinary_lane(uint32_t most) { return a8_is_ordinary_first(most) && a8_has_exact_reciprocal(most); }

// A moment that is not log8. most: its a8_lane_most, which a8_is_ordinary_lane. by_phases: how int8 rounds; phase: of
// the lane's first element then.
A8_FN void a8_put_lane_moment(const a8_lane_array& to, uint32_t k, const a8_nf4_table* table, const float* x,
                              uint32_t most, bool by_phases, uint32_t phase) {
  char* values = a8_eight_of(to, k);
  float absmax = a8_float(most), scale;
  if (to.type == A8_INT8) {
    uint32_t packed[2];
    float inverse = most == 0 ? 0.0f : a8_exact_div(A8_INT8_LEVELS, absmax);
    if (by_phases)
      a8_int8_eight(x, inverse, phase, 4, packed);
    else
      a8_int8_eight(x, inverse, packed);
    __stcs(reinterpret_cast<uint2*>(values), make_uint2(packed[0], packed[1]));
    scale = most == 0 ? 0.0f : a8_exact_div_127(absmax);
  } else if (to.type == A8_NF4) {
    uint32_t packed = a8_nf4_eight(table, x, most == 0 ? 0.0f : a8_exact_reciprocal(absmax));
    __stcs(reinterpret_cast<uint32_t*>(values), packed);
    scale = absmax;
  } else {
    if (to.type == A8_STATE_F32) a8_put_lane_values<A8_F32>(values, x);
    if (to.type == A8_STATE_BF16) a8_put_lane_values<A8_BF16>(values, x);
    return;
  }
  if (threadIdx.x % (A8_USUAL_BLOCK / 8) == 0) __stcs(reinterpret_cast<float*>(a8_header_of(to, k)), scale);
}

// Smallest a8_log8_low_key and largest bits of a block of log8. None of x may be negative or subnormal.
A8_FN void a8_lane_extremes(const float* x, uint32_t* low, uint32_t* high) {
  *low = 0xffffffffu, *high = 0u;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    *low = min(*low, a8_log8_low_key((int32_t)a8_bits(x[i])));
    *high = max(*high, a8_bits(x[i]));
  }
  *low = a8_lanes_min<16>(*low);
  *high = a8_lanes_max<16>(*high);
}

// Finite log8. before: the header that the block has; phase: of the lane's first element, when stochastic.
A8_FN void a8_put_lane_log8(const a8_lane_array& to, uint32_t k, const float* x, uint32_t low, uint32_t high,
                            a8_log8_header before, bool stochastic, uint32_t phase) {
  float position[8];
  uint32_t packed[2];
  a8_log8_header header = a8_log8_header_of(a8_log8_low(low), (int32_t)high, before);
  a8_log8_positions(x, a8_log8_origin(header.lo), a8_exact_reciprocal((float)header.step), position);
  if (stochastic) {
#pragma unroll
    for (int i = 0; i < 8; ++i) position[i] = position[i] + a8_offset(phase + i * A8_PHASE_STRIDE);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) position[i] = position[i] + A8_LOG8_NEAREST;
  }
  a8_log8_eight(position, packed);
  __stcs(reinterpret_cast<uint2*>(a8_eight_of(to, k)), make_uint2(packed[0], packed[1]));
  if (threadIdx.x % (A8_USUAL_BLOCK / 8) == 0)
    __stcs(reinterpret_cast<uint32_t*>(a8_header_of(to, k)), a8_log8_pack(header));
}
