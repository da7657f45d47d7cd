// Adam on one chunk by one block of threads, for every type, format, block size, alignment and length.
//
// Works in spans of A8_MAX_BLOCK elements, so whole blocks of both moments, and goes over each span twice: extremes of
// the new moments first, then the update and the codes. The second pass finds its inputs in the cache.
#pragma once

#include "device.cuh"

// Elements of a unit, the grain in which the fast path leaves work to this one.
#define A8_UNIT 256
#define A8_ALL_UNITS 0xffffffffffffffffull
#define A8_MAX_GROUP 4
#define A8_SPAN_BLOCKS (A8_MAX_BLOCK / A8_MIN_BLOCK)

// A chunk of one tensor, or a stretch of up to A8_MAX_GROUP, and all that its elements share.
typedef struct a8_adam_job {
  const a8_tensor* tensor;
  int64_t from;    // first element
  uint32_t count;  // elements
  uint32_t flags;  // of the hyper-parameters
  a8_adam_rule rule;
  a8_noise second;  // noise from the first pair on
  a8_noise write;
} a8_adam_job;

// Shared memory of a block of threads: the headers of a span's blocks, before and after.
typedef struct a8_adam_room {
  a8_decoder first[A8_SPAN_BLOCKS];
  a8_decoder second[A8_SPAN_BLOCKS];
  uint32_t most[A8_SPAN_BLOCKS];
  uint32_t low[A8_SPAN_BLOCKS];
  uint32_t high[A8_SPAN_BLOCKS];
  a8_encoder new_first[A8_SPAN_BLOCKS];
  a8_encoder new_second[A8_SPAN_BLOCKS];
  float levels[16];
} a8_adam_room;

// One chunk of a stretch.
A8_FN a8_adam_job a8_part_of(a8_adam_job job, uint32_t part) {
  job.from += part * A8_CHUNK;
  job.count = min(job.count - part * A8_CHUNK, (uint32_t)A8_CHUNK);
  job.second = a8_noise_at(job.second, part * (A8_CHUNK / 2));
  job.write = a8_noise_at(job.write, part * (A8_CHUNK / 2));
  return job;
}

A8_FN bool a8_is_quantised(uint32_t format) { return format == A8_INT8 || format == A8_NF4 || format == A8_LOG8; }

// log2 of a block size; of a span for a moment that has no blocks.
A8_FN uint32_t a8_block_shift(uint32_t format, uint32_t size) {
  return 31u - (uint32_t)__clz((int)(a8_is_quantised(format) ? size : A8_MAX_BLOCK));
}

A8_FN float2 a8_load_moment(const void* state, uint32_t format, int64_t pair, bool both, const a8_decoder& header,
                            const float* levels) {
  if (!a8_is_quantised(format)) return a8_load_pair(state, format == A8_STATE_BF16 ? A8_BF16 : A8_F32, pair, both);
  uint32_t codes = a8_load_codes(state, format, pair, both);
  return make_float2(a8_decode(format, codes & 255u, header, levels), a8_decode(format, codes >> 8, header, levels));
}

A8_FN void a8_store_moment(void* state, uint32_t format, int64_t pair, bool both, float2 x, const a8_encoder& encoder,
                           bool stochastic, uint32_t word, uint32_t turn, const float* levels) {
  if (!a8_is_quantised(format)) {
    a8_store_pair(state, format == A8_STATE_BF16 ? A8_BF16 : A8_F32, pair, both, x, false, 0);
    return;
  }
  float even = stochastic ? a8_offset(word & 0xffffu, turn) : A8_LOG8_NEAREST;
  float odd = stochastic ? a8_offset(word >> 16, turn) : A8_LOG8_NEAREST;
  a8_store_codes(state, format, pair, both, a8_encode(format, x.x, encoder, even, levels),
                 a8_encode(format, x.y, encoder, odd, levels));
}

// Extremes of 32 elements (16 lanes) or 64 (a warp) join those of their block.
template <uint32_t kLanes>
A8_FN void a8_join_extremes(a8_adam_room* room, const a8_tensor* t, a8_extremes first, a8_extremes second,
                            uint32_t first_block, uint32_t second_block) {
  bool leader = threadIdx.x % kLanes == 0;
  if (a8_is_quantised(t->first_format)) {
    uint32_t most = a8_lanes_max<kLanes>(first.most);
    if (leader) atomicMax(&room->most[first_block], most);
  }
  if (t->second_format == A8_LOG8) {
    uint32_t low = a8_lanes_min<kLanes>(second.low);
    uint32_t high = a8_lanes_max<kLanes>(second.high);
    if (leader) {
      atomicMin(&room->low[second_block], low);
      atomicMax(&room->high[second_block], high);
    }
  }
}

typedef struct a8_adam_pair {
  float2 p, m, v;  // the parameter before, the moments after
} a8_adam_pair;

// An element past the end has p = g = m = v = 0, which no header notices.
A8_FN a8_adam_pair a8_adam_moments(const a8_adam_job& job, const a8_adam_room* room, int64_t pair, bool both,
                                   uint32_t first_block, uint32_t second_block) {
  const a8_tensor* t = job.tensor;
  a8_adam_pair x;
  float2 g = a8_load_pair(t->grad, t->grad_dtype, pair, both);
  x.p = a8_load_pair(t->param, t->param_dtype, pair, both);
  x.m = a8_load_moment(t->first, t->first_format, pair, both, room->first[first_block], room->levels);
  x.v = a8_load_moment(t->second, t->second_format, pair, both, room->second[second_block], room->levels);
  if (!both) x.m.y = x.v.y = 0.0f;
  g.x = a8_adam_gradient(&job.rule, g.x, x.p.x);
  g.y = a8_adam_gradient(&job.rule, g.y, x.p.y);
  x.m.x = a8_adam_first(&job.rule, x.m.x, g.x);
  x.m.y = a8_adam_first(&job.rule, x.m.y, g.y);
  x.v.x = a8_adam_second(&job.rule, x.v.x, g.x);
  x.v.y = a8_adam_second(&job.rule, x.v.y, g.y);
  return x;
}

// Updates one chunk. units: those of A8_UNIT elements to update, by bit; A8_ALL_UNITS for any block size, fewer only for blocks that
// fit a unit. Every thread of the block calls it, with the same arguments. Not inlined: its registers are not to weigh on
// the fast path.
static __device__ __noinline__ void a8_adam_general(const a8_adam_job& job, unsigned long long units,
                                                    a8_adam_room* room) {
  const a8_tensor* t = job.tensor;
  uint32_t first_shift = a8_block_shift(t->first_format, t->first_block_size);
  uint32_t second_shift = a8_block_shift(t->second_format, t->second_block_size);
  bool quantised = a8_is_quantised(t->first_format) || a8_is_quantised(t->second_format);
  bool wide = first_shift > 5 && second_shift > 5;
  a8_share_levels(room->levels);
  for (uint32_t span = 0; span < job.count; span += A8_MAX_BLOCK) {
    uint32_t span_units = (uint32_t)(units >> (span / A8_UNIT)) & ((1u << (A8_MAX_BLOCK / A8_UNIT)) - 1u);
    if (span_units == 0) continue;
    uint32_t count = min(job.count - span, (uint32_t)A8_MAX_BLOCK);
    int64_t from = job.from + span;
    __syncthreads();
    for (uint32_t block = threadIdx.x; block < A8_SPAN_BLOCKS; block += A8_THREADS) {
      if (a8_is_quantised(t->first_format) && block << first_shift < count)
        room->first[block] = a8_load_header(t->first_block, t->first_format, (from >> first_shift) + block);
      if (t->second_format == A8_LOG8 && block << second_shift < count)
        room->second[block] = a8_load_header(t->second_block, t->second_format, (from >> second_shift) + block);
      room->most[block] = 0u;
      room->low[block] = 0xffffffffu;
      room->high[block] = 0u;
    }
    __syncthreads();
    if (quantised) {
      for (uint32_t at = 0; at < count; at += 2 * A8_THREADS) {
        uint32_t e = at + 2 * threadIdx.x;
        if (!(span_units >> (e / A8_UNIT) & 1u)) continue;  // the same for a whole warp
        a8_extremes first = A8_NO_EXTREMES, second = A8_NO_EXTREMES;
        if (e < count) {
          a8_adam_pair x =
              a8_adam_moments(job, room, (from + e) / 2, e + 1 < count, e >> first_shift, e >> second_shift);
          a8_extend(&first, t->first_format, x.m.x);
          a8_extend(&first, t->first_format, x.m.y);
          a8_extend(&second, A8_LOG8, x.v.x);
          a8_extend(&second, A8_LOG8, x.v.y);
        }
        if (wide)
          a8_join_extremes<32>(room, t, first, second, e >> first_shift, e >> second_shift);
        else
          a8_join_extremes<16>(room, t, first, second, e >> first_shift, e >> second_shift);
      }
      __syncthreads();
      for (uint32_t block = threadIdx.x; block < A8_SPAN_BLOCKS; block += A8_THREADS) {
        a8_extremes extremes = {room->most[block], room->low[block], room->high[block]};
        uint32_t e = block << first_shift;
        if (a8_is_quantised(t->first_format) && e < count && (span_units >> (e / A8_UNIT) & 1u))
          room->new_first[block] =
              a8_store_header(t->first_block, t->first_format, (from >> first_shift) + block, extremes);
        e = block << second_shift;
        if (t->second_format == A8_LOG8 && e < count && (span_units >> (e / A8_UNIT) & 1u))
          room->new_second[block] =
              a8_store_header(t->second_block, t->second_format, (from >> second_shift) + block, extremes);
      }
      __syncthreads();
    }
    for (uint32_t at = 0; at < count; at += 2 * A8_THREADS) {
      uint32_t e = at + 2 * threadIdx.x;
      if (e >= count || !(span_units >> (e / A8_UNIT) & 1u)) continue;
      int64_t pair = (from + e) / 2;
      bool both = e + 1 < count;
      uint32_t first_block = e >> first_shift, second_block = e >> second_shift, in_chunk = (span + e) / 2;
      a8_adam_pair x = a8_adam_moments(job, room, pair, both, first_block, second_block);
      bool noisy_write = (job.flags & A8_STOCHASTIC_WRITE) && t->param_dtype != A8_F32;
      bool noisy_state = job.flags & A8_STOCHASTIC_STATE;
      float2 p =
          make_float2(a8_adam_param(&job.rule, x.p.x, x.m.x, x.v.x), a8_adam_param(&job.rule, x.p.y, x.m.y, x.v.y));
      a8_store_pair(t->param, t->param_dtype, pair, both, p, noisy_write,
                    noisy_write ? a8_noise_word(job.write, in_chunk) : 0u);
      a8_store_moment(t->first, t->first_format, pair, both, x.m, room->new_first[first_block], false, 0, 0,
                      room->levels);
      a8_store_moment(t->second, t->second_format, pair, both, x.v, room->new_second[second_block], noisy_state,
                      noisy_state ? a8_noise_word(job.second, in_chunk) : 0u, job.second.turn, room->levels);
    }
  }
}
