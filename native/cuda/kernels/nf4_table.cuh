// nf4 codes by a table in shared memory instead of fifteen comparisons.
//
// A value in [-1, 1] falls in one of 64 bins, none of which holds more than one of the middles between levels: the
// bin's middle (or infinity) and the number of middles below the bin give the code.
#pragma once

#include "device.cuh"

#define A8_NF4_BINS 64

// Aligned so that offsets are added to the address of a part by `or`, or take the place of its lowest byte. Two loads
// of 32 bits, for the lanes' bins lie in banks of their own; one of 64 took twice the time.
typedef struct a8_nf4_table {
  alignas(512) float middle[A8_NF4_BINS];
  uint32_t below[A8_NF4_BINS];  // so that one address serves both
  alignas(256) float levels[16];
} a8_nf4_table;

// The bin of x, times 4 as the table's byte offset. Monotone in x over [-1, 1]; anything for a NaN.
A8_FN uint32_t a8_nf4_bin_of(float x) { return a8_bits(__fmaf_rn(x, 64.0f, 8388608.0f + 68.0f)) & 0xfcu; }

// By threads 0 .. A8_NF4_BINS - 1. The caller synchronises.
A8_FN void a8_share_nf4_table(a8_nf4_table* table) {
  if (threadIdx.x >= A8_NF4_BINS) return;
  float middle = a8_float(0x7f800000u);
  uint32_t below = 0;
  for (int level = 0; level < 15; ++level) {
    float x = (a8_nf4_levels[level] + a8_nf4_levels[level + 1]) * 0.5f;
    uint32_t bin = a8_nf4_bin_of(x) / 4;
    if (bin == threadIdx.x) middle = x;
    below += bin < threadIdx.x ? 1u : 0u;
  }
  table->middle[threadIdx.x] = middle;
  table->below[threadIdx.x] = below;
  if (threadIdx.x < 16) table->levels[threadIdx.x] = a8_nf4_levels[threadIdx.x];
}

// The sign of the difference is the comparison's result, with NaN a positive one.
A8_FN uint32_t a8_nf4_code(uint32_t bins, float x) {
  float middle;
  uint32_t below, bin = a8_nf4_bin_of(x) | bins;
  asm("ld.shared.f32 %0, [%1];" : "=f"(middle) : "r"(bin));
  asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(below) : "r"(bin), "n"(4 * A8_NF4_BINS));
  return below + (a8_bits(middle - x) >> 31);
}

// Eight values of a block, packed as nf4. inverse: of the block's largest magnitude.
A8_FN uint32_t a8_nf4_eight(const a8_nf4_table* table, const float* x, float inverse) {
  uint32_t packed = 0, bins = a8_shared_address(table->middle);
#pragma unroll
  for (int i = 0; i < 8; ++i) packed += a8_nf4_code(bins, x[i] * inverse) << (4 * i);
  return packed;
}

A8_FN void a8_nf4_decode_eight(const a8_nf4_table* table, uint32_t codes, float scale, float* x) {
  uint32_t levels = a8_shared_address(table->levels);
  uint32_t even = (codes << 2) & 0x3c3c3c3cu, odd = (codes >> 2) & 0x3c3c3c3cu;  // byte offsets, one a byte
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t address = __byte_perm(i % 2 ? odd : even, levels, 0x7650u + i / 2);
    asm("ld.shared.f32 %0, [%1];" : "=f"(x[i]) : "r"(address));
    x[i] = x[i] * scale;
  }
}
