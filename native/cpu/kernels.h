// The table of kernels that each instruction-set variant exports. One task = one chunk, tile or tensor; tasks of one
// kernel are independent and may run in any order on any thread without changing a bit of the result.
#pragma once

#include "a8/abi.h"

struct a8_job {
  const a8_batch* batch;  // of a step
  const a8_codec* codec;  // of quantize and dequantize
  float* scratch;
  const float* scale;  // of screen
  float* found;
};

typedef void (*a8_task)(const a8_job* job, uint32_t index);

struct a8_kernels {
  uint32_t isa;          // an a8_isa, from the compiler's own macros: proves which code ran
  a8_task elementwise;   // index: chunk
  a8_task measure;       // index: chunk. Partial sums of p^2 and a8_rule_measure^2
  a8_task screen;        // index: chunk. Gradients divided by the scale; found where one is not finite
  a8_task reduce;        // index: tile. g^2 summed over the tile's rows and columns
  a8_task combine;       // index: tensor. Tiles in order into row and column sums
  a8_task moments;       // index: tensor. Row and column means, then each row's and column's factor of 1/sqrt(v)
  a8_task norm;          // index: chunk. Partial sums of p^2 and u^2
  a8_task totals;        // index: tensor. Partial sums in order into the totals
  a8_task residual;      // index: tile. (u - m)^2 summed over the tile's rows and columns
  a8_task confidence;    // index: tensor. Its tiles in order, row and column means, then their factors of 1/sqrt(s)
  a8_task limit;         // index: chunk. Partial sums of the squares of the update as CAME leaves it
  a8_task limit_totals;  // index: tensor. They in order, and the limiter's factor
  a8_task apply;         // index: chunk
  a8_task quantize;      // index: chunk of the codec's array
  a8_task dequantize;    // likewise
};

const a8_kernels* a8_kernels_baseline();
const a8_kernels* a8_kernels_avx2();
const a8_kernels* a8_kernels_avx512();
const a8_kernels* a8_kernels_neon();
