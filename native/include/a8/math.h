// The arithmetic that the rules and the formats share, once for every backend. Receives and returns float32 values in
// registers; touches no memory. Only correctly rounded operations (+, -, *, /, sqrt), integer operations and
// comparisons, and no fma, so that the baseline instruction set, which has none, gives the same bits at vector speed
// (docs/decisions/0002-no-fma.md).
//
// F, I, U: a float, int32_t, uint32_t, or vectors of them (native/cpu/vector.inc).
#pragma once

#include "abi.h"

// --- Noise: a function of seed, parameter, step and element, so that replicas and backends draw the same bits (design:
// never a device RNG). Write-back draws by a counter-based hash, anew at every step. log8 state has phases instead. ---

// Key of the hash of write-back.
typedef struct a8_noise {
  uint32_t first;
  uint32_t second;
} a8_noise;

// What the noise is for: different streams never share bits.
enum a8_stream { A8_STREAM_SECOND = 1, A8_STREAM_WRITE = 2 };

// The 32-bit finaliser "lowbias32" (C. Wellons, hash-prospector): a bijection with bias 0.17 of the ideal's.
A8_FN uint32_t a8_mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

A8_FN uint32_t a8_key(uint32_t seed_low, uint32_t seed_high, uint32_t step, uint32_t noise_id, uint32_t stream) {
  uint32_t key = a8_mix(seed_low + 0x9e3779b9u);
  key = a8_mix(key ^ seed_high);
  key = a8_mix(key ^ step);
  key = a8_mix(key ^ noise_id);
  return a8_mix(key ^ stream);
}

A8_FN a8_noise a8_noise_key(uint32_t seed_low, uint32_t seed_high, uint32_t step, uint32_t noise_id) {
  a8_noise noise;
  noise.first = a8_key(seed_low, seed_high, step, noise_id, A8_STREAM_WRITE);
  noise.second = a8_mix(noise.first ^ 0x85ebca6bu);
  return noise;
}

// The phase of a tensor's first element at a step, in units of 2^-32 modulo 1, of which the highest 23 bits count and
// the others are zero; element e is e * A8_PHASE_STRIDE further on. 1 / golden ratio a step and sqrt(2) an element: the
// noise that an element meets is spread evenly over time, that of neighbours over a block, and a moving average drifts
// less than with independent draws (docs/decisions/0006).
#define A8_PHASE_STRIDE (0x3504f3u << 9)
A8_FN uint32_t a8_phase_key(uint32_t seed_low, uint32_t seed_high, uint32_t step, uint32_t noise_id) {
  return (a8_key(seed_low, seed_high, 0u, noise_id, A8_STREAM_SECOND) + step * 0x4f1bbdu) << 9;
}
A8_FN uint32_t a8_phase_at(uint32_t key, uint64_t element) { return key + (uint32_t)element * A8_PHASE_STRIDE; }

// Where a run of fewer than 2^32 pairs begins: folds the high half of a 64-bit pair index into the key.
A8_FN a8_noise a8_noise_at(a8_noise key, uint64_t pair) {
  key.first += (uint32_t)pair;
  key.second += (uint32_t)(pair >> 32) * 0x9e3779b9u;
  return key;
}

// 32 bits for the pair of elements (2 * pair, 2 * pair + 1): the even one takes the low half.
template <typename U>
A8_FN U a8_noise_word(a8_noise key, U pair) {
  U x = key.first + pair;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x ^= key.second;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// --- 16-bit floats. ---

A8_FN float a8_from_bf16(uint32_t h) { return a8_float(h << 16); }

A8_FN float a8_from_f16(uint32_t h) {
  uint32_t magnitude = h & 0x7fffu;
  uint32_t normal = (magnitude << 13) + (112u << 23);
  normal += magnitude >= 0x7c00u ? 112u << 23 : 0u;
  // Subnormals by an exact product: shifted into place they would be float32 subnormals, which are flushed.
  uint32_t tiny = a8_bits((float)(int32_t)magnitude * 5.9604644775390625e-8f);
  return a8_float((magnitude < 0x400u ? tiny : normal) | ((h & 0x8000u) << 16));
}

// The bits of any x but NaN, rounded so that the high half is bfloat16; the low half is left over.
template <typename U>
A8_FN U a8_round_bf16(U bits) {
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// To nearest, ties to even. NaN becomes the quiet NaN of its sign; infinity stays.
A8_FN uint32_t a8_to_bf16(float x) {
  uint32_t bits = a8_bits(x);
  uint32_t nan = (bits >> 16 & 0x8000u) | 0x7fc0u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : a8_round_bf16(bits) >> 16;
}

// Stochastically: up with the probability of the dropped fraction. noise: 16 bits. NaN and infinity pass unchanged.
A8_FN uint32_t a8_to_bf16_stochastic(float x, uint32_t noise) {
  uint32_t bits = a8_bits(x);
  uint32_t rounded = (bits + noise) >> 16;
  return (bits & 0x7fffffffu) >= 0x7f800000u ? a8_to_bf16(x) : rounded;
}

A8_FN uint32_t a8_to_f16(float x) {
  uint32_t bits = a8_bits(x);
  uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // 0.5 has the spacing of float16's subnormals (2^-24), so the adder rounds for us.
  uint32_t tiny = a8_bits(a8_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? tiny : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return result | sign;
}

A8_FN uint32_t a8_to_f16_stochastic(float x, uint32_t noise) {
  uint32_t bits = a8_bits(x);
  uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude + (noise & 0x1fffu) - (112u << 23)) >> 13;
  normal = normal > 0x7c00u ? 0x7c00u : normal;
  float small = magnitude < 0x38800000u ? a8_float(magnitude) : 0.0f;
  uint32_t tiny = (uint32_t)(int32_t)(small * 16777216.0f + (float)(int32_t)noise * 1.52587890625e-5f);
  uint32_t result = magnitude < 0x38800000u ? tiny : normal;
  return (magnitude >= 0x7f800000u ? a8_to_f16(x) & 0x7fffu : result) | sign;
}

// --- What the rules share. ---

template <typename F>
A8_FN F a8_signed(F g, uint32_t sign) {
  return a8_float(a8_bits(g) ^ sign);
}

// NaN stays NaN: the comparison is false for it.
template <typename F>
A8_FN F a8_at_most(F x, F bound) {
  return a8_select(x > bound, bound, x);
}
template <typename F>
A8_FN F a8_at_least(F x, F bound) {
  return a8_select(x < bound, bound, x);
}
