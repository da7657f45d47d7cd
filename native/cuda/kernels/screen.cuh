// a8_screen of abi.h: looks for gradients that are not finite, and divides them by the loss scale on the way.
#pragma once

#include "eight.cuh"

// Whether the stored bits of one gradient, or of two 16-bit ones, are of a NaN or an infinity.
template <uint32_t kDtype>
A8_FN bool a8_is_wild(uint32_t bits) {
  const uint32_t kExponent = kDtype == A8_F32 ? 0x7f800000u : kDtype == A8_BF16 ? 0x7f80u : 0x7c00u;
  if (kDtype == A8_F32) return (bits & kExponent) == kExponent;
  return (bits & kExponent) == kExponent || (bits >> 16 & kExponent) == kExponent;
}

// Elements threadIdx.x, threadIdx.x + A8_THREADS .. of `count`, eight at a time where they are aligned; divided when
// `divides`. Returns whether one of this thread's is not finite then.
template <uint32_t kDtype>
A8_FN bool a8_screen_values(void* values, uint32_t count, bool divides, float scale) {
  bool wild = false;
  uint32_t eights = a8_aligned(values, 16) ? count / 8 : 0;
  for (uint32_t k = threadIdx.x; k < eights; k += A8_THREADS) {
    a8_eight<kDtype> x;
    a8_get<kDtype, false>(&x, values, 8 * k);
    if (divides) {
      float g[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) g[i] = a8_div(a8_value<kDtype>(x.w, i), scale);
      a8_pack_eight<kDtype>(g, x.w);
      a8_put<kDtype>(x, values, 8 * k);
    }
#pragma unroll
    for (int i = 0; i < a8_eight<kDtype>::kWords; ++i) wild |= a8_is_wild<kDtype>(x.w[i]);
  }
  for (uint32_t e = 8 * eights + threadIdx.x; e < count; e += A8_THREADS) {
    if (kDtype == A8_F32) {
      float* g = a8_at<float>(values, e);
      if (divides) *g = a8_div(*g, scale);
      wild |= a8_is_wild<kDtype>(a8_bits(*g));
    } else {
      uint16_t* g = a8_at<uint16_t>(values, e);
      if (divides) *g = (uint16_t)a8_to_half(a8_div(a8_from_half(*g, kDtype), scale), kDtype);
      wild |= a8_is_wild<kDtype>(*g);
    }
  }
  return wild;
}

// One block of threads a chunk.
extern "C" __global__ void __launch_bounds__(A8_THREADS)
    a8_screen_kernel(a8_batch batch, const float* scale, float* found) {
  a8_chunk chunk = batch.chunks[blockIdx.x];
  const a8_tensor* t = batch.tensors + chunk.tensor;
  int64_t from = (int64_t)chunk.part * A8_CHUNK;
  uint32_t count = (uint32_t)min((long long)(t->numel - from), (long long)A8_CHUNK);
  char* values = static_cast<char*>(const_cast<void*>(t->grad)) + from * (t->grad_dtype == A8_F32 ? 4 : 2);
  float divisor = scale ? *scale : 1.0f;
  bool wild;
  if (t->grad_dtype == A8_BF16)
    wild = a8_screen_values<A8_BF16>(values, count, scale, divisor);
  else if (t->grad_dtype == A8_F32)
    wild = a8_screen_values<A8_F32>(values, count, scale, divisor);
  else
    wild = a8_screen_values<A8_F16>(values, count, scale, divisor);
  if (__syncthreads_or(wild) && threadIdx.x == 0) *found = 1.0f;
}
