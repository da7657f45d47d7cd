// a8_upload of abi.h: a few words that come with the launch, into device memory. One block of threads.
#pragma once

#include "a8/geometry.h"
#include "a8/types.h"

struct a8_upload_words {
  uint32_t at[A8_UPLOAD_BYTES / 4];
};

extern "C" __global__ void __launch_bounds__(A8_THREADS)
    a8_upload_kernel(a8_upload_words words, uint32_t* to, uint32_t count) {
  for (uint32_t i = threadIdx.x; i < count; i += A8_THREADS) to[i] = words.at[i];
}
