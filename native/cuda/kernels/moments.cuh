// The moments of a span of up to A8_MAX_BLOCK elements by one block of threads, for every format, block size, alignment
// and length: what the general paths of the rules and of Adafactor share. A span begins where a block of every moment
// begins.
#pragma once

#include "device.cuh"

// Elements of a unit, the grain in which the faster paths of the element-wise rules leave work to the general one.
#define A8_UNIT 256
#define A8_SPAN_UNITS (A8_MAX_BLOCK / A8_UNIT)
#define A8_SPAN_BLOCKS (A8_MAX_BLOCK / A8_MIN_BLOCK)

// Shared memory of a block of threads: the headers of a span's blocks, before and after.
typedef struct a8_moment_room {
  a8_decoder first[A8_SPAN_BLOCKS];
  a8_decoder second[A8_SPAN_BLOCKS];
  a8_decoder third[A8_SPAN_BLOCKS];
  uint32_t most[A8_SPAN_BLOCKS];
  uint32_t low[A8_SPAN_BLOCKS];
  uint32_t high[A8_SPAN_BLOCKS];
  uint32_t third_most[A8_SPAN_BLOCKS];
  a8_encoder new_first[A8_SPAN_BLOCKS];
  a8_encoder new_second[A8_SPAN_BLOCKS];
  a8_encoder new_third[A8_SPAN_BLOCKS];
  float levels[16];
} a8_moment_room;

A8_FN bool a8_is_quantised(uint32_t format) { return format == A8_INT8 || format == A8_NF4 || format == A8_LOG8; }

// log2 of a block size; of a span for a moment that has no blocks.
A8_FN uint32_t a8_block_shift(uint32_t format, uint32_t size) {
  return 31u - (uint32_t)__clz((int)(a8_is_quantised(format) ? size : A8_MAX_BLOCK));
}

// A moment that is not stored element by element reads as zero.
A8_FN float2 a8_load_moment(const void* state, uint32_t format, int64_t pair, bool both, const a8_decoder& header,
                            const float* levels) {
  if (format == A8_NONE || format == A8_FACTORED) return make_float2(0.0f, 0.0f);
  if (!a8_is_quantised(format)) return a8_load_pair(state, format == A8_STATE_BF16 ? A8_BF16 : A8_F32, pair, both);
  uint32_t codes = a8_load_codes(state, format, pair, both);
  return make_float2(a8_decode(format, codes & 255u, header, levels), a8_decode(format, codes >> 8, header, levels));
}

A8_FN void a8_store_moment(void* state, uint32_t format, int64_t pair, bool both, float2 x, const a8_encoder& encoder,
                           bool stochastic, uint32_t phase, const float* levels) {
  if (format == A8_NONE || format == A8_FACTORED) return;
  if (!a8_is_quantised(format)) {
    a8_store_pair(state, format == A8_STATE_BF16 ? A8_BF16 : A8_F32, pair, both, x, false, 0);
    return;
  }
  float even = stochastic ? a8_offset(phase) : A8_LOG8_NEAREST;
  float odd = stochastic ? a8_offset(phase + A8_PHASE_STRIDE) : A8_LOG8_NEAREST;
  a8_store_codes(state, format, pair, both, a8_encode(format, x.x, encoder, even, levels),
                 a8_encode(format, x.y, encoder, odd, levels));
}

// A span: `count` elements of a tensor from `from` on, and which units of them are wanted, by bit.
typedef struct a8_span {
  const a8_tensor* tensor;
  int64_t from;
  uint32_t count;
  uint32_t units;
  uint32_t first_shift;   // log2 of the first moment's block size
  uint32_t second_shift;  // of the second's
  uint32_t third_shift;   // of the third's
} a8_span;

A8_FN a8_span a8_span_of(const a8_tensor* t, int64_t from, uint32_t count, uint32_t units) {
  a8_span span = {t, from, min(count, (uint32_t)A8_MAX_BLOCK), units & ((1u << A8_SPAN_UNITS) - 1u), 0, 0, 0};
  span.first_shift = a8_block_shift(t->first_format, t->first_block_size);
  span.second_shift = a8_block_shift(t->second_format, t->second_block_size);
  span.third_shift = a8_block_shift(t->third_format, t->third_block_size);
  return span;
}

A8_FN bool a8_wants(const a8_span& span, uint32_t e) { return span.units >> (e / A8_UNIT) & 1u; }

// Loads the headers of a span and clears its extremes. The caller synchronises before and after.
A8_FN void a8_load_headers(const a8_span& span, a8_moment_room* room) {
  const a8_tensor* t = span.tensor;
  for (uint32_t block = threadIdx.x; block < A8_SPAN_BLOCKS; block += A8_THREADS) {
    if (a8_is_quantised(t->first_format) && block << span.first_shift < span.count)
      room->first[block] = a8_load_header(t->first_block, t->first_format, (span.from >> span.first_shift) + block);
    if (t->second_format == A8_LOG8 && block << span.second_shift < span.count)
      room->second[block] = a8_load_header(t->second_block, t->second_format, (span.from >> span.second_shift) + block);
    if (a8_is_quantised(t->third_format) && block << span.third_shift < span.count)
      room->third[block] = a8_load_header(t->third_block, t->third_format, (span.from >> span.third_shift) + block);
    room->most[block] = room->third_most[block] = 0u;
    room->low[block] = 0xffffffffu;
    room->high[block] = 0u;
  }
}

// A pair of each moment, before or after the step.
typedef struct a8_moment_pairs {
  float2 first, second, third;
} a8_moment_pairs;

// Elements (e, e + 1) of the span. `third`: whether the rule has a third moment; without the second element its moments
// are zero.
A8_FN a8_moment_pairs a8_load_moments(const a8_span& span, const a8_moment_room* room, uint32_t e, bool third) {
  const a8_tensor* t = span.tensor;
  int64_t pair = (span.from + e) / 2;
  bool both = e + 1 < span.count;
  a8_moment_pairs x;
  x.first = a8_load_moment(t->first, t->first_format, pair, both, room->first[e >> span.first_shift], room->levels);
  x.second =
      a8_load_moment(t->second, t->second_format, pair, both, room->second[e >> span.second_shift], room->levels);
  x.third = make_float2(0.0f, 0.0f);
  if (third)
    x.third = a8_load_moment(t->third, t->third_format, pair, both, room->third[e >> span.third_shift], room->levels);
  if (!both) x.first.y = x.second.y = x.third.y = 0.0f;
  return x;
}

// stochastic: how log8 rounds; first_too: and an int8 first moment; phase: of element e.
A8_FN void a8_store_moments(const a8_span& span, const a8_moment_room* room, uint32_t e, const a8_moment_pairs& x,
                            bool third, bool stochastic, bool first_too, uint32_t phase) {
  const a8_tensor* t = span.tensor;
  int64_t pair = (span.from + e) / 2;
  bool both = e + 1 < span.count;
  a8_store_moment(t->first, t->first_format, pair, both, x.first, room->new_first[e >> span.first_shift],
                  stochastic && first_too, phase, room->levels);
  a8_store_moment(t->second, t->second_format, pair, both, x.second, room->new_second[e >> span.second_shift],
                  stochastic, phase, room->levels);
  if (third)
    a8_store_moment(t->third, t->third_format, pair, both, x.third, room->new_third[e >> span.third_shift], false, 0,
                    room->levels);
}

// The largest magnitude of a pair of every lane joins that of its block.
template <uint32_t kLanes>
A8_FN void a8_join_most(uint32_t* most, uint32_t format, float2 x) {
  if (!a8_is_quantised(format)) return;
  uint32_t mine = a8_lanes_max<kLanes>(max(a8_magnitude_bits(x.x), a8_magnitude_bits(x.y)));
  if (threadIdx.x % kLanes == 0) atomicMax(most, mine);
}

// Extremes of 32 elements (16 lanes) or 64 (a warp) join those of their block.
template <uint32_t kLanes>
A8_FN void a8_join_extremes(const a8_span& span, a8_moment_room* room, uint32_t e, const a8_moment_pairs& x,
                            bool third) {
  const a8_tensor* t = span.tensor;
  a8_join_most<kLanes>(&room->most[e >> span.first_shift], t->first_format, x.first);
  if (third) a8_join_most<kLanes>(&room->third_most[e >> span.third_shift], t->third_format, x.third);
  if (t->second_format != A8_LOG8) return;
  a8_extremes extremes = A8_NO_EXTREMES;
  a8_extend(&extremes, A8_LOG8, x.second.x);
  a8_extend(&extremes, A8_LOG8, x.second.y);
  uint32_t low = a8_lanes_min<kLanes>(extremes.low), high = a8_lanes_max<kLanes>(extremes.high);
  if (threadIdx.x % kLanes == 0) {
    atomicMin(&room->low[e >> span.second_shift], low);
    atomicMax(&room->high[e >> span.second_shift], high);
  }
}

// Extremes of a pair of new moments at element e of the span join those of their blocks. Called by whole warps.
A8_FN void a8_join_pair(const a8_span& span, a8_moment_room* room, uint32_t e, const a8_moment_pairs& x, bool third) {
  if (min(min(span.first_shift, span.second_shift), span.third_shift) > 5)
    a8_join_extremes<32>(span, room, e, x, third);
  else
    a8_join_extremes<16>(span, room, e, x, third);
}

// Writes the new headers and keeps their encoders. The caller synchronises before and after.
A8_FN void a8_renew_headers(const a8_span& span, a8_moment_room* room) {
  const a8_tensor* t = span.tensor;
  for (uint32_t block = threadIdx.x; block < A8_SPAN_BLOCKS; block += A8_THREADS) {
    a8_extremes extremes = {room->most[block], room->low[block], room->high[block]};
    uint32_t e = block << span.first_shift;
    if (a8_is_quantised(t->first_format) && e < span.count && a8_wants(span, e))
      room->new_first[block] =
          a8_store_header(t->first_block, t->first_format, (span.from >> span.first_shift) + block, extremes, {0, 0});
    e = block << span.second_shift;
    if (t->second_format == A8_LOG8 && e < span.count && a8_wants(span, e))
      room->new_second[block] =
          a8_store_header(t->second_block, t->second_format, (span.from >> span.second_shift) + block, extremes,
                          room->second[block].log8);
    e = block << span.third_shift;
    extremes.most = room->third_most[block];
    if (a8_is_quantised(t->third_format) && e < span.count && a8_wants(span, e))
      room->new_third[block] =
          a8_store_header(t->third_block, t->third_format, (span.from >> span.third_shift) + block, extremes, {0, 0});
  }
}

// Whether a span is gone over twice: for the extremes first.
A8_FN bool a8_has_headers(const a8_tensor* t) {
  return a8_is_quantised(t->first_format) || a8_is_quantised(t->second_format) || a8_is_quantised(t->third_format);
}
