// a8_elementwise of abi.h for the rules that have no fast path of their own (adam.cuh and momentum.cuh have): one step
// over a table of tensors, in one launch, after measure and totals (measure.cuh, totals.cuh) for LAMB.
#pragma once

#include "element_stretch.cuh"

// See a8_update_by_lanes.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_LANES_RESIDENT)
    a8_rmsprop_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_lanes_room room;
  if (a8_skips(batch)) return;
  a8_update_by_lanes<A8_RMSPROP>(batch, nullptr, group, &room);
}

extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_LANES_RESIDENT)
    a8_adagrad_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_lanes_room room;
  if (a8_skips(batch)) return;
  a8_update_by_lanes<A8_ADAGRAD>(batch, nullptr, group, &room);
}

extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_LANES_RESIDENT)
    a8_ademamix_kernel(a8_batch batch, uint32_t group) {
  __shared__ a8_lanes_room room;
  if (a8_skips(batch)) return;
  a8_update_by_lanes<A8_ADEMAMIX>(batch, nullptr, group, &room);
}

extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_LANES_RESIDENT)
    a8_lamb_kernel(a8_batch batch, const float* scratch, uint32_t group) {
  __shared__ a8_lanes_room room;
  if (a8_skips(batch)) return;
  a8_update_by_lanes<A8_LAMB>(batch, scratch, group, &room);
}
