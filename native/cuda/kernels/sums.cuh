// Sums in the canonical order (a8/geometry.h) by a block of threads: element e to accumulator e % A8_LANES, which is
// thread e % A8_LANES, then folded in halves.
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

// --- Squares of a span (moments.cuh) wait in shared memory until each thread has added those of its accumulator, in
// order. ---

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

// The accumulators of a chunk's squares, in shared memory: of one sum, or of A8_DEALT that they are dealt to
// (a8/geometry.h). Every thread has its own of each.
typedef struct a8_dealt_room {
  float accumulators[A8_DEALT * A8_LANES];
} a8_dealt_room;

A8_FN void a8_begin_dealt(a8_dealt_room* dealt) {
  for (uint32_t i = threadIdx.x; i < A8_DEALT * A8_LANES; i += A8_LANES) dealt->accumulators[i] = 0.0f;
}

// As a8_add_squares.
A8_FN void a8_add_dealt_squares(const a8_square_room* room, uint32_t count, uint32_t sums, a8_dealt_room* dealt) {
  static_assert(A8_MAX_BLOCK % (A8_DEALT * A8_LANES) == 0, "spans begin with sum 0");
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < count; e += A8_LANES)
    dealt->accumulators[e & (sums * A8_LANES - 1u)] += room->squares[e];
  __syncthreads();
}

// --- A block's warps. ---

#define A8_WARPS (A8_THREADS / 32)

// From one lane, which shows the compiler that all lanes agree: what follows from it can take uniform registers, of
// which there are plenty.
A8_FN uint32_t a8_agreed(uint32_t x) { return __shfl_sync(A8_LANE_MASK, x, 0); }

A8_FN uint32_t a8_warp_number() { return a8_agreed(threadIdx.x / 32u); }

A8_FN uint32_t a8_lane() { return threadIdx.x & 31u; }

// --- Accumulators of a warp: lane l holds accumulators 8 * l .. 8 * l + 7. ---

// One level of a fold over lanes that differ in `bit`, of 2 * kHalf sums at once: a lane keeps half of the sums and
// gives the other half away, so that every level halves the work. The lane's bit becomes the top bit of the sum's
// number.
template <int kHalf>
A8_FN void a8_exchange(float* x, uint32_t bit) {
  bool upper = threadIdx.x & bit;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    float keep = upper ? x[i + kHalf] : x[i];
    float give = upper ? x[i] : x[i + kHalf];
    x[i] = keep + __shfl_xor_sync(A8_LANE_MASK, give, bit);
  }
}

A8_FN float a8_add_across(float x, uint32_t bit) { return x + __shfl_xor_sync(A8_LANE_MASK, x, bit); }

// Folds the accumulators of one sum. Every lane gets it; x is lost.
A8_FN float a8_fold_warp(float* x) {
  a8_exchange<4>(x, 16);
  a8_exchange<2>(x, 8);
  a8_exchange<1>(x, 4);
  float sum = a8_add_across(a8_add_across(x[0], 2), 1);
  return a8_add_across(a8_add_across(a8_add_across(sum, 16), 8), 4);  // lane bits 4, 3, 2 are the accumulator's number
}

// Folds a chunk's dealt sums.
A8_FN float a8_fold_dealt(const float* sums) {
  float x[A8_DEALT];
#pragma unroll
  for (int i = 0; i < A8_DEALT; ++i) x[i] = sums[i];
#pragma unroll
  for (int half = A8_DEALT / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// Folds the accumulators of `sums` of them, 1 or A8_DEALT. Every thread gets the sum.
A8_FN float a8_fold_dealt_block(uint32_t sums, a8_dealt_room* dealt) {
  static_assert(A8_DEALT == A8_WARPS, "a warp a sum");
  __syncthreads();
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = dealt->accumulators[8 * threadIdx.x + i];
  float sum = a8_fold_warp(x);
  __syncthreads();
  if (a8_lane() == 0) dealt->accumulators[threadIdx.x / 32] = sum;
  __syncthreads();
  return sums == 1 ? dealt->accumulators[0] : a8_fold_dealt(dealt->accumulators);
}

// Folds the accumulators of two sums, the second's at x[8]. Lane l gets sum l / 16; x is lost.
A8_FN float a8_fold_two(float* x) {
  a8_exchange<8>(x, 16);
  a8_exchange<4>(x, 8);
  a8_exchange<2>(x, 4);
  a8_exchange<1>(x, 2);
  float sum = a8_add_across(x[0], 1);
  return a8_add_across(a8_add_across(a8_add_across(sum, 8), 4), 2);  // lane bits 3, 2, 1: the accumulator's number
}
