// Quantising and dequantising one array: a8_quantize and a8_dequantize of abi.h.
#pragma once

#include "device.cuh"

// One warp a block of the format, twice over its elements: extremes, then codes. Any grid of A8_THREADS threads.
extern "C" __global__ void __launch_bounds__(A8_THREADS) a8_quantize_kernel(a8_codec c) {
  __shared__ float levels[16];
  a8_share_levels(levels);
  __syncthreads();
  uint32_t lane = threadIdx.x & 31u;
  int64_t blocks = (c.numel + c.block_size - 1) / c.block_size;
  uint32_t key = a8_phase_key(c.seed_low, c.seed_high, 0, 0);
  int64_t warps = (int64_t)gridDim.x * (A8_THREADS / 32);
  for (int64_t block = (int64_t)blockIdx.x * (A8_THREADS / 32) + threadIdx.x / 32; block < blocks; block += warps) {
    int64_t from = block * c.block_size;
    int64_t end = c.numel - from < c.block_size ? c.numel : from + c.block_size;
    a8_extremes extremes = A8_NO_EXTREMES;
    for (int64_t pair = from / 2 + lane; 2 * pair < end; pair += 32) {
      bool both = 2 * pair + 1 < end;
      float2 x = a8_load_pair(c.values, c.dtype, pair, both);
      a8_extend(&extremes, c.format, x.x);
      a8_extend(&extremes, c.format, x.y);
    }
    extremes.most = a8_lanes_max<32>(extremes.most);
    extremes.low = a8_lanes_min<32>(extremes.low);
    extremes.high = a8_lanes_max<32>(extremes.high);
    a8_encoder encoder = a8_store_header(c.blocks, c.format, block, extremes, {0, 0});
    for (int64_t pair = from / 2 + lane; 2 * pair < end; pair += 32) {
      bool both = 2 * pair + 1 < end;
      float2 x = a8_load_pair(c.values, c.dtype, pair, both);
      uint32_t phase = a8_phase_at(key, 2 * (uint64_t)pair);
      bool stochastic = c.stochastic && c.format == A8_LOG8;
      float even = stochastic ? a8_offset(phase) : A8_LOG8_NEAREST;
      float odd = stochastic ? a8_offset(phase + A8_PHASE_STRIDE) : A8_LOG8_NEAREST;
      a8_store_codes(c.codes, c.format, pair, both, a8_encode(c.format, x.x, encoder, even, levels),
                     a8_encode(c.format, x.y, encoder, odd, levels));
    }
  }
}

// One thread a pair of elements. Any grid of A8_THREADS threads.
extern "C" __global__ void __launch_bounds__(A8_THREADS) a8_dequantize_kernel(a8_codec c) {
  __shared__ float levels[16];
  a8_share_levels(levels);
  __syncthreads();
  uint32_t shift = 31u - (uint32_t)__clz((int)c.block_size);
  int64_t threads = (int64_t)gridDim.x * A8_THREADS;
  for (int64_t pair = (int64_t)blockIdx.x * A8_THREADS + threadIdx.x; 2 * pair < c.numel; pair += threads) {
    bool both = 2 * pair + 1 < c.numel;
    a8_decoder header = a8_load_header(c.blocks, c.format, 2 * pair >> shift);
    uint32_t codes = a8_load_codes(c.codes, c.format, pair, both);
    float2 x =
        make_float2(a8_decode(c.format, codes & 255u, header, levels), a8_decode(c.format, codes >> 8, header, levels));
    a8_store_pair(c.values, c.dtype, pair, both, x, false, 0);
  }
}
