// Derives the hyper-parameters of the next step on the device, a row a thread, before the kernels of the step read
// them.
#pragma once

#include "a8/geometry.h"
#include "a8/schedule.h"

extern "C" __global__ void __launch_bounds__(A8_THREADS, 2)
    a8_derive_kernel(const a8_schedule* schedules, a8_hyper* hypers, uint32_t count, uint32_t advance) {
  uint32_t row = blockIdx.x * A8_THREADS + threadIdx.x;
  if (row >= count || !schedules[row].step) return;
  const float* skip = schedules[row].skip;
  int64_t step = *schedules[row].step + (skip && *skip != 0.0f ? 0 : advance);
  *schedules[row].step = step;
  a8_derive_row(&schedules[row], step, &hypers[row]);
}
