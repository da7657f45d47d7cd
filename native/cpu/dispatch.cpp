#include "dispatch.h"

#include "a8/geometry.h"
#include "parallel.h"
#include "probe.h"

const a8_kernels* a8_kernels_for(uint32_t isa) {
  if (isa == A8_ISA_AUTO) isa = a8_isa_best();
  if (isa > A8_ISA_NEON || !(a8_isa_usable() >> isa & 1u)) return nullptr;
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case A8_ISA_BASELINE:
      return a8_kernels_baseline();
    case A8_ISA_AVX2:
      return a8_kernels_avx2();
    case A8_ISA_AVX512:
      return a8_kernels_avx512();
#elif defined(__aarch64__) || defined(_M_ARM64)
    case A8_ISA_NEON:
      return a8_kernels_neon();
#else
    case A8_ISA_BASELINE:
      return a8_kernels_baseline();
#endif
  }
  return nullptr;
}

// Elements of the tensors that go through all phases together. A step reads each gradient three times and each parameter
// twice; within a wave the second and third time come from the cache. The result does not depend on it.
static const int64_t WAVE_ELEMENTS = 2 << 20;

void a8_run_adafactor(const a8_kernels* kernels, uint32_t threads, const a8_job* job, uint32_t phases) {
  const a8_batch* batch = job->batch;
  for (uint32_t first = 0, last; first < batch->tensor_count; first = last) {
    int64_t elements = 0;
    uint32_t chunks = 0, tiles = 0;
    for (last = first; last < batch->tensor_count; ++last) {
      const a8_tensor& t = batch->tensors[last];
      if (last > first && elements + t.numel > WAVE_ELEMENTS) break;
      elements += t.numel;
      chunks += t.chunks;
      tiles += t.tiles;
    }
    uint32_t tensors = last - first;
    uint32_t chunk = (uint32_t)batch->tensors[first].chunk_at, tile = (uint32_t)batch->tensors[first].tile_at;
    if (phases & A8_REDUCE) {
      a8_parallel(threads, tile, tiles, kernels->reduce, job);
      if (tiles) a8_parallel(threads, first, tensors, kernels->combine, job);
    }
    if (phases & A8_MOMENTS && tiles) a8_parallel(threads, first, tensors, kernels->moments, job);
    if (phases & A8_NORM) {
      a8_parallel(threads, chunk, chunks, kernels->norm, job);
      a8_parallel(threads, first, tensors, kernels->totals, job);
    }
    if (phases & A8_APPLY) a8_parallel(threads, chunk, chunks, kernels->apply, job);
  }
}
