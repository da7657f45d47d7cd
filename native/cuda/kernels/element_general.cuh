// An element-wise rule on one chunk by one block of threads, for every type, format, block size, alignment and length.
//
// Works in spans of A8_MAX_BLOCK elements, so whole blocks of every moment, and goes over each span twice: extremes of
// the new moments first, then the update and the codes. The second pass finds its inputs in the cache. KIND: an
// a8_rule_kind.
#pragma once

#include "moments.cuh"

#define A8_ALL_UNITS 0xffffffffffffffffull
#define A8_MAX_GROUP 4

// Whether a rule may have a third moment: tells the compiler what it need not look for.
#define A8_HAS_THIRD(kind) ((kind) == A8_ADEMAMIX || (kind) == A8_RMSPROP)

// A chunk of one tensor, or a stretch of up to A8_MAX_GROUP, and all that its elements share.
typedef struct a8_element_job {
  const a8_tensor* tensor;
  int64_t from;    // first element
  uint32_t count;  // elements
  a8_rule rule;
  a8_noise write;  // from the first pair on
  uint32_t phase;  // of the first element
} a8_element_job;

// `parts`: how many chunks, from number `part` of the tensor on. totals: as a8_rule_of wants them.
template <int KIND>
A8_FN a8_element_job a8_element_job_of(const a8_tensor* t, const a8_hyper* h, uint32_t part, uint32_t parts,
                                       const float* totals) {
  a8_element_job job;
  job.tensor = t;
  job.from = (int64_t)part * A8_CHUNK;
  int64_t count = t->numel - job.from;
  job.count = count < (int64_t)parts * A8_CHUNK ? (uint32_t)count : parts * A8_CHUNK;
  job.rule = a8_rule_of(h, h->lr_device ? *h->lr_device : h->lr, KIND, totals);
  uint64_t pair = (uint64_t)part * (A8_CHUNK / 2);
  uint32_t id = t->noise_id;
  job.phase = a8_phase_at(a8_phase_key(h->seed_low, h->seed_high, h->step, id), (uint64_t)job.from);
  job.write = a8_noise_at(a8_noise_key(h->seed_low, h->seed_high, h->step, id), pair);
  return job;
}

// One chunk of a stretch.
A8_FN a8_element_job a8_part_of(a8_element_job job, uint32_t part) {
  job.from += part * A8_CHUNK;
  job.count = min(job.count - part * A8_CHUNK, (uint32_t)A8_CHUNK);
  job.phase = a8_phase_at(job.phase, part * A8_CHUNK);
  job.write = a8_noise_at(job.write, part * (A8_CHUNK / 2));
  return job;
}

// Notes a unit of the stretch for a8_element_general. By one thread. left: a bit a unit of each chunk.
A8_FN void a8_leave_unit(unsigned long long* left, uint32_t unit) {
  const uint32_t kUnits = A8_CHUNK / A8_UNIT;
  atomicOr(&left[unit / kUnits], 1ull << unit % kUnits);
}

// Elements (e, e + 1) of a span.
typedef struct a8_element_pair {
  float2 p, g;  // before, and as the moments see it
  a8_moment_pairs before;
} a8_element_pair;

template <int KIND>
A8_FN a8_element_pair a8_load_element_pair(const a8_element_job& job, const a8_span& span, const a8_moment_room* room,
                                           uint32_t e) {
  const a8_tensor* t = job.tensor;
  int64_t pair = (span.from + e) / 2;
  bool both = e + 1 < span.count;
  a8_element_pair x;
  x.g = a8_load_pair(t->grad, t->grad_dtype, pair, both);
  x.p = a8_load_pair(t->param, t->param_dtype, pair, both);
  x.g.x = a8_rule_gradient(&job.rule, x.g.x, x.p.x);
  x.g.y = a8_rule_gradient(&job.rule, x.g.y, x.p.y);
  x.before = a8_load_moments(span, room, e, A8_HAS_THIRD(KIND));
  return x;
}

// Returns the update and leaves the new moments in `after`; those of an element that does not exist are zero, which no
// header notices.
template <int KIND>
A8_FN float2 a8_update_element_pair(const a8_element_job& job, const a8_element_pair& x, bool both,
                                    a8_moment_pairs* after) {
  const a8_moment_pairs& m = x.before;
  a8_moments<float> even = {m.first.x, m.second.x, m.third.x}, odd = {m.first.y, m.second.y, m.third.y};
  float2 u;
  u.x = a8_rule_update<KIND>::of(&job.rule, x.p.x, x.g.x, &even);
  u.y = a8_rule_update<KIND>::of(&job.rule, x.p.y, x.g.y, &odd);
  if (!both) odd = {0.0f, 0.0f, 0.0f};
  after->first = make_float2(even.first, odd.first);
  after->second = make_float2(even.second, odd.second);
  after->third = make_float2(even.third, odd.third);
  return u;
}

// Updates chunk number `part` of a stretch. units: those of A8_UNIT elements to update, by bit; A8_ALL_UNITS for any
// block size, fewer only for blocks that fit a unit. Every thread of the block calls it, with the same arguments. Not
// inlined: its registers are not to weigh on the fast path.
template <int KIND>
static __device__ __noinline__ void a8_element_general(const a8_element_job& stretch, uint32_t part,
                                                       unsigned long long units, a8_moment_room* room) {
  const a8_element_job job = a8_part_of(stretch, part);
  const a8_tensor* t = job.tensor;
  const bool kThird = A8_HAS_THIRD(KIND);
  bool noisy_write = (job.rule.flags & A8_STOCHASTIC_WRITE) && t->param_dtype != A8_F32;
  bool noisy_state = job.rule.flags & A8_STOCHASTIC_STATE;
  __syncthreads();  // the room may be in use
  a8_share_levels(room->levels);
  for (uint32_t start = 0; start < job.count; start += A8_MAX_BLOCK) {
    a8_span span = a8_span_of(t, job.from + start, job.count - start, (uint32_t)(units >> (start / A8_UNIT)));
    if (span.units == 0) continue;
    __syncthreads();
    a8_load_headers(span, room);
    __syncthreads();
    if (a8_has_headers(t)) {
      for (uint32_t at = 0; at < span.count; at += 2 * A8_THREADS) {
        uint32_t e = at + 2 * threadIdx.x;
        if (!a8_wants(span, e)) continue;  // the same for a whole warp
        a8_moment_pairs after;
        after.first = after.second = after.third = make_float2(0.0f, 0.0f);  // no header notices them
        if (e < span.count)
          a8_update_element_pair<KIND>(job, a8_load_element_pair<KIND>(job, span, room, e), e + 1 < span.count, &after);
        a8_join_pair(span, room, e, after, kThird);
      }
      __syncthreads();
      a8_renew_headers(span, room);
      __syncthreads();
    }
    for (uint32_t at = 0; at < span.count; at += 2 * A8_THREADS) {
      uint32_t e = at + 2 * threadIdx.x;
      if (e >= span.count || !a8_wants(span, e)) continue;
      bool both = e + 1 < span.count;
      uint32_t in_chunk = (start + e) / 2;
      a8_element_pair x = a8_load_element_pair<KIND>(job, span, room, e);
      a8_moment_pairs after;
      float2 u = a8_update_element_pair<KIND>(job, x, both, &after);
      float2 p = make_float2(a8_rule_param(&job.rule, x.p.x, u.x), a8_rule_param(&job.rule, x.p.y, u.y));
      a8_store_pair(t->param, t->param_dtype, (span.from + e) / 2, both, p, noisy_write,
                    noisy_write ? a8_noise_word(job.write, in_chunk) : 0u);
      a8_store_moments(span, room, e, after, kThird, noisy_state, a8_rule_phases_first(KIND),
                       a8_phase_at(job.phase, 2 * in_chunk));
    }
  }
}
