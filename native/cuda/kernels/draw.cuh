// a8_draw of abi.h: a pair of numbers a thread, unless the matrix is of the right interval already.
#pragma once

#include "a8/draw.h"
#include "a8/types.h"
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(A8_THREADS)
    a8_draw_kernel(void* values, int64_t numel, uint32_t dtype, const int64_t* taken, const int64_t* before,
                   int64_t gap, uint32_t seed_low, uint32_t seed_high, uint32_t noise_id) {
  int64_t interval = *taken / gap;
  if (before && *before / gap == interval) return;
  a8_noise key = a8_noise_key(seed_low, seed_high, (uint32_t)interval, noise_id);
  for (int64_t e = 2 * ((int64_t)blockIdx.x * A8_THREADS + threadIdx.x); e < numel;
       e += 2 * (int64_t)gridDim.x * A8_THREADS) {
    float x[2];
    a8_draw_pair(key, (uint32_t)(e / 2), &x[0], &x[1]);
    for (int i = 0; i < 2 && e + i < numel; ++i) {
      if (dtype == A8_F32)
        a8_at<float>(values, e + i)[0] = x[i];
      else
        a8_at<uint16_t>(values, e + i)[0] = (uint16_t)(a8_bits(x[i]) >> 16);
    }
  }
}
