// The totals of every tensor from its chunks' sums: the end of the norm and limit phases.
#pragma once

#include "sums.cuh"

// of_limit: the end of the limit phase, which only tensors have whose limiter waits for it. One block of threads a
// tensor.
extern "C" __global__ void __launch_bounds__(A8_THREADS)
    a8_totals_kernel(a8_batch batch, float* scratch, uint32_t of_limit) {
  __shared__ float room[A8_LANES];
  if (a8_skips(batch)) return;
  const a8_tensor* t = batch.tensors + blockIdx.x;
  const a8_hyper* h = batch.hypers + t->hyper;
  bool averages = h->flags & A8_AVERAGE_UPDATE, limits = t->limiter && averages == (of_limit != 0);
  if (of_limit && !limits) return;
  float* sums = scratch + t->sum_at;
  float update_squares = a8_sum_block(sums + A8_TOTALS + t->chunks, t->chunks, room);
  float param_squares = of_limit ? 0.0f : a8_sum_block(sums + A8_TOTALS, t->chunks, room);
  if (threadIdx.x != 0) return;
  if (!of_limit) sums[0] = param_squares, sums[1] = update_squares;
  sums[2] = limits ? a8_limit(h, update_squares, t->limiter) : 1.0f;
}
