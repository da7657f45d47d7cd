// a8_elementwise of abi.h for the rules whose only moment is a first one: one step over a table of tensors, in one launch,
// after measure and totals (element.cuh, totals.cuh) for LARS.
#pragma once

#include "momentum_fast.cuh"

// Blocks of threads that share a multiprocessor: the compiler then allows itself 80 registers. Before Ampere shared
// memory has room for one.
#define A8_MOMENTUM_RESIDENT 3

// See a8_update_stretches.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_AMPERE ? A8_MOMENTUM_RESIDENT : 1)
    a8_lion_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_stretch_room<false> room;
  if (a8_skips(batch)) return;
  a8_update_stretches<A8_LION>(batch, nullptr, group, &room);
}

extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_AMPERE ? A8_MOMENTUM_RESIDENT : 1)
    a8_sgd_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_stretch_room<false> room;
  if (a8_skips(batch)) return;
  a8_update_stretches<A8_SGD>(batch, nullptr, group, &room);
}

// Of LARS two: its trust and its decay inside the gradient take more registers.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_AMPERE ? 2 : 1)
    a8_lars_kernel(a8_batch batch, const float* scratch, uint32_t group) {
  __shared__ a8_stretch_room<false> room;
  if (a8_skips(batch)) return;
  a8_update_stretches<A8_LARS>(batch, scratch, group, &room);
}
