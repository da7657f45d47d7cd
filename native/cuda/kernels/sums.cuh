// Sums in the canonical order (a8/geometry.h) by a block of threads: element e to accumulator e % A8_LANES, which is thread
// e % A8_LANES, then folded in halves.
#pragma once

#include "moments.cuh"

static_assert(A8_LANES == A8_THREADS, "a thread an accumulator");

// Folds them. room: A8_LANES floats of shared memory. Every thread gets the sum.
A8_FN float a8_fold_block(float x, float* room) {
  __syncthreads();  // the room may be in use
  room[threadIdx.x] = x;
#pragma unroll
  for (uint32_t half = A8_LANES / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
  }
  __syncthreads();
  return room[0];
}

// The sum of in(0) .. in(n - 1), by a block of threads.
template <typename In>
A8_FN float a8_sum_block(int64_t n, float* room, In in) {
  const int kAhead = 16;  // loads in flight: the additions are one chain
  float sum = 0.0f;
  for (int64_t from = threadIdx.x; from < n; from += kAhead * A8_LANES) {
    float x[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) x[i] = from + i * A8_LANES < n ? in(from + i * A8_LANES) : 0.0f;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum += x[i];
  }
  return a8_fold_block(sum, room);
}

// The sum of n floats of device memory.
A8_FN float a8_sum_block(const float* in, int64_t n, float* room) {
  return a8_sum_block(n, room, [in](int64_t i) { return in[i]; });
}

// --- Squares of a span (moments.cuh) wait in shared memory until each thread has added those of its accumulator, in order. ---

typedef struct a8_square_room {
  a8_moment_room moments;
  float squares[A8_MAX_BLOCK];
} a8_square_room;

A8_FN void a8_keep_squares(a8_square_room* room, uint32_t e, float2 x) {
  room->squares[e] = x.x * x.x;
  room->squares[e + 1] = x.y * x.y;
}

// Adds a span's squares to the accumulators. Synchronises before and after.
A8_FN void a8_add_squares(const a8_square_room* room, uint32_t count, float* accumulator) {
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < count; e += A8_LANES) *accumulator += room->squares[e];
  __syncthreads();
}
