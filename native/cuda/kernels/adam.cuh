// a8_elementwise of abi.h with A8_ADAM: one step over a table of tensors, in one launch.
#pragma once

#include "adam_fast.cuh"
#include "element_stretch.cuh"

// Blocks of threads that share a multiprocessor: the compiler then allows itself 80 registers. Before Ampere shared
// memory has room for one.
#define A8_ADAM_RESIDENT 3

// See a8_update_fast.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_AMPERE ? A8_ADAM_RESIDENT : 1)
    a8_adam_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_fast_stretch_room<true> room;
  if (a8_skips(batch)) return;
  a8_update_fast<A8_ADAM>(batch, nullptr, group, &room);
}

// See a8_update_by_lanes.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_LANES_RESIDENT)
    a8_adam_lanes_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_lanes_room room;
  if (a8_skips(batch)) return;
  a8_update_by_lanes<A8_ADAM>(batch, nullptr, group, &room);
}
