// a8_elementwise of abi.h for the rules that have no fast path (adam.cuh and momentum.cuh have): one step over a table of
// tensors, in one launch; and what comes before the update for the rules that need norms: measure -> totals (totals.cuh).
#pragma once

#include "element_general.cuh"
#include "sums.cuh"

template <int KIND>
static __device__ __noinline__ void a8_element_chunk(const a8_tensor* t, const a8_hyper* h, uint32_t part,
                                                     const float* totals, a8_moment_room* room) {
  a8_element_general<KIND>(a8_element_job_of<KIND>(t, h, part, 1, totals), 0u, A8_ALL_UNITS, room);
}

// Leaves one chunk's sums of p^2 and of a8_rule_measure^2 where Adafactor's norm phase leaves its own.
template <int KIND>
A8_FN void a8_measure_chunk(const a8_tensor* t, const a8_hyper* h, uint32_t part, float* scratch,
                            a8_square_room* room) {
  const a8_element_job job = a8_element_job_of<KIND>(t, h, part, 1, nullptr);
  float param_squares = 0.0f, measure_squares = 0.0f;
  a8_share_levels(room->moments.levels);
  for (uint32_t start = 0; start < job.count; start += A8_MAX_BLOCK) {
    a8_span span = a8_span_of(t, job.from + start, job.count - start, 0xffffffffu);
    __syncthreads();
    a8_load_headers(span, &room->moments);
    __syncthreads();
    for (uint32_t e = 2 * threadIdx.x; e < span.count; e += 2 * A8_THREADS) {
      a8_element_pair x = a8_load_element_pair<KIND>(job, span, &room->moments, e);
      const a8_moment_pairs& m = x.before;
      a8_moments<float> even = {m.first.x, m.second.x, m.third.x}, odd = {m.first.y, m.second.y, m.third.y};
      a8_keep_squares(room, e,
                      make_float2(a8_rule_measure<KIND>(&job.rule, x.p.x, x.g.x, even),
                                  a8_rule_measure<KIND>(&job.rule, x.p.y, x.g.y, odd)));
    }
    a8_add_squares(room, span.count, &measure_squares);
    for (uint32_t e = 2 * threadIdx.x; e < span.count; e += 2 * A8_THREADS)
      a8_keep_squares(room, e, a8_load_pair(t->param, t->param_dtype, (span.from + e) / 2, e + 1 < span.count));
    a8_add_squares(room, span.count, &param_squares);
  }
  param_squares = a8_fold_block(param_squares, room->squares);
  measure_squares = a8_fold_block(measure_squares, room->squares);
  if (threadIdx.x != 0) return;
  float* sums = scratch + t->sum_at + A8_TOTALS + part;
  sums[0] = param_squares;
  sums[t->chunks] = measure_squares;
}

// One block of threads a chunk.
extern "C" __global__ void __launch_bounds__(A8_THREADS) a8_measure_kernel(a8_batch batch, float* scratch) {
  __shared__ a8_square_room room;
  if (a8_skips(batch)) return;
  a8_chunk chunk = batch.chunks[blockIdx.x];
  const a8_tensor* t = batch.tensors + chunk.tensor;
  if (batch.rule == A8_LAMB)
    a8_measure_chunk<A8_LAMB>(t, batch.hypers + t->hyper, chunk.part, scratch, &room);
  else
    a8_measure_chunk<A8_LARS>(t, batch.hypers + t->hyper, chunk.part, scratch, &room);
}

// One block of threads a chunk. scratch: of the rules that have norms; else not read.
extern "C" __global__ void __launch_bounds__(A8_THREADS, 3) a8_element_kernel(a8_batch batch, const float* scratch) {
  __shared__ a8_moment_room room;
  if (a8_skips(batch)) return;
  a8_chunk chunk = batch.chunks[blockIdx.x];
  const a8_tensor* t = batch.tensors + chunk.tensor;
  const a8_hyper* h = batch.hypers + t->hyper;
  const float* totals = scratch + t->sum_at;
  switch (batch.rule) {
    case A8_RMSPROP:
      return a8_element_chunk<A8_RMSPROP>(t, h, chunk.part, nullptr, &room);
    case A8_ADAGRAD:
      return a8_element_chunk<A8_ADAGRAD>(t, h, chunk.part, nullptr, &room);
    case A8_ADEMAMIX:
      return a8_element_chunk<A8_ADEMAMIX>(t, h, chunk.part, nullptr, &room);
    case A8_LAMB:
      return a8_element_chunk<A8_LAMB>(t, h, chunk.part, totals, &room);
    default:  // of another kernel
      return;
  }
}
