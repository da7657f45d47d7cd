// Adam on one chunk by one block of threads, for every type, format, block size, alignment and length.
//
// Works in spans of A8_MAX_BLOCK elements, so whole blocks of both moments, and goes over each span twice: extremes of
// the new moments first, then the update and the codes. The second pass finds its inputs in the cache.
#pragma once

#include "moments.cuh"

#define A8_ALL_UNITS 0xffffffffffffffffull
#define A8_MAX_GROUP 4

// A chunk of one tensor, or a stretch of up to A8_MAX_GROUP, and all that its elements share.
typedef struct a8_adam_job {
  const a8_tensor* tensor;
  int64_t from;    // first element
  uint32_t count;  // elements
  uint32_t flags;  // of the hyper-parameters
  a8_rule rule;
  a8_noise write;  // from the first pair on
  uint32_t phase;  // of the first element
} a8_adam_job;

// One chunk of a stretch.
A8_FN a8_adam_job a8_part_of(a8_adam_job job, uint32_t part) {
  job.from += part * A8_CHUNK;
  job.count = min(job.count - part * A8_CHUNK, (uint32_t)A8_CHUNK);
  job.phase = a8_phase_at(job.phase, part * A8_CHUNK);
  job.write = a8_noise_at(job.write, part * (A8_CHUNK / 2));
  return job;
}

typedef struct a8_adam_pair {
  float2 p, m, v;  // the parameter before, the moments after
} a8_adam_pair;

// An element past the end has p = g = m = v = 0, which no header notices.
A8_FN a8_adam_pair a8_adam_moments(const a8_adam_job& job, const a8_moment_room* room, int64_t pair, bool both,
                                   uint32_t first_block, uint32_t second_block) {
  const a8_tensor* t = job.tensor;
  a8_adam_pair x;
  float2 g = a8_load_pair(t->grad, t->grad_dtype, pair, both);
  x.p = a8_load_pair(t->param, t->param_dtype, pair, both);
  x.m = a8_load_moment(t->first, t->first_format, pair, both, room->first[first_block], room->levels);
  x.v = a8_load_moment(t->second, t->second_format, pair, both, room->second[second_block], room->levels);
  if (!both) x.m.y = x.v.y = 0.0f;
  g.x = a8_rule_gradient(&job.rule, g.x, x.p.x);
  g.y = a8_rule_gradient(&job.rule, g.y, x.p.y);
  x.m.x = a8_rule_first(&job.rule, x.m.x, g.x);
  x.m.y = a8_rule_first(&job.rule, x.m.y, g.y);
  x.v.x = a8_rule_second(&job.rule, x.v.x, g.x);
  x.v.y = a8_rule_second(&job.rule, x.v.y, g.y);
  return x;
}

// Updates one chunk. units: those of A8_UNIT elements to update, by bit; A8_ALL_UNITS for any block size, fewer only for blocks that
// fit a unit. Every thread of the block calls it, with the same arguments. Not inlined: its registers are not to weigh on
// the fast path.
static __device__ __noinline__ void a8_adam_general(const a8_adam_job& job, unsigned long long units,
                                                    a8_moment_room* room) {
  const a8_tensor* t = job.tensor;
  bool quantised = a8_is_quantised(t->first_format) || a8_is_quantised(t->second_format);
  a8_share_levels(room->levels);
  for (uint32_t start = 0; start < job.count; start += A8_MAX_BLOCK) {
    a8_span span = a8_span_of(t, job.from + start, job.count - start, (uint32_t)(units >> (start / A8_UNIT)));
    if (span.units == 0) continue;
    __syncthreads();
    a8_load_headers(span, room);
    __syncthreads();
    if (quantised) {
      for (uint32_t at = 0; at < span.count; at += 2 * A8_THREADS) {
        uint32_t e = at + 2 * threadIdx.x;
        if (!a8_wants(span, e)) continue;           // the same for a whole warp
        float2 m = make_float2(0.0f, 0.0f), v = m;  // zeros: no header notices them
        if (e < span.count) {
          a8_adam_pair x = a8_adam_moments(job, room, (span.from + e) / 2, e + 1 < span.count, e >> span.first_shift,
                                           e >> span.second_shift);
          m = x.m, v = x.v;
        }
        a8_join_pair(span, room, e, m, v);
      }
      __syncthreads();
      a8_renew_headers(span, room);
      __syncthreads();
    }
    for (uint32_t at = 0; at < span.count; at += 2 * A8_THREADS) {
      uint32_t e = at + 2 * threadIdx.x;
      if (e >= span.count || !a8_wants(span, e)) continue;
      int64_t pair = (span.from + e) / 2;
      bool both = e + 1 < span.count;
      uint32_t first_block = e >> span.first_shift, second_block = e >> span.second_shift, in_chunk = (start + e) / 2;
      a8_adam_pair x = a8_adam_moments(job, room, pair, both, first_block, second_block);
      bool noisy_write = (job.flags & A8_STOCHASTIC_WRITE) && t->param_dtype != A8_F32;
      bool noisy_state = job.flags & A8_STOCHASTIC_STATE;
      float2 p =
          make_float2(a8_rule_param(&job.rule, x.p.x, a8_div(x.m.x, a8_rule_root(&job.rule, x.v.x))),
                      a8_rule_param(&job.rule, x.p.y, a8_div(x.m.y, a8_rule_root(&job.rule, x.v.y))));
      a8_store_pair(t->param, t->param_dtype, pair, both, p, noisy_write,
                    noisy_write ? a8_noise_word(job.write, in_chunk) : 0u);
      a8_store_moment(t->first, t->first_format, pair, both, x.m, room->new_first[first_block], false, 0, room->levels);
      a8_store_moment(t->second, t->second_format, pair, both, x.v, room->new_second[second_block], noisy_state,
                      a8_phase_at(job.phase, 2 * in_chunk), room->levels);
    }
  }
}
