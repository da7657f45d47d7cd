// a8_elementwise of abi.h for the rules whose only moment is a first one: one step over a table of tensors, in one
// launch, after measure and totals (measure.cuh, totals.cuh) for LARS.
#pragma once

#include "element_stretch.cuh"
#include "momentum_fast.cuh"

// Blocks of threads that share a multiprocessor: the compiler then allows itself 80 registers. Before Ampere shared
// memory has room for one.
#define A8_MOMENTUM_RESIDENT 3

// See a8_update_fast.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_AMPERE ? A8_MOMENTUM_RESIDENT : 1)
    a8_lion_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_fast_stretch_room<false> room;
  if (a8_skips(batch)) return;
  a8_update_fast<A8_LION>(batch, nullptr, group, &room);
}

extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_AMPERE ? A8_MOMENTUM_RESIDENT : 1)
    a8_sgd_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_fast_stretch_room<false> room;
  if (a8_skips(batch)) return;
  a8_update_fast<A8_SGD>(batch, nullptr, group, &room);
}

// Of LARS two: its trust and its decay inside the gradient take more registers.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_AMPERE ? 2 : 1)
    a8_lars_kernel(a8_batch batch, const float* scratch, uint32_t group) {
  __shared__ a8_fast_stretch_room<false> room;
  if (a8_skips(batch)) return;
  a8_update_fast<A8_LARS>(batch, scratch, group, &room);
}

// See a8_update_by_lanes.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_LANES_RESIDENT)
    a8_lion_lanes_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_lanes_room room;
  if (a8_skips(batch)) return;
  a8_update_by_lanes<A8_LION>(batch, nullptr, group, &room);
}

extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_LANES_RESIDENT)
    a8_sgd_lanes_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_lanes_room room;
  if (a8_skips(batch)) return;
  a8_update_by_lanes<A8_SGD>(batch, nullptr, group, &room);
}

extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_LANES_RESIDENT)
    a8_lars_lanes_kernel(a8_batch batch, const float* scratch, uint32_t group) {
  __shared__ a8_lanes_room room;
  if (a8_skips(batch)) return;
  a8_update_by_lanes<A8_LARS>(batch, scratch, group, &room);
}
