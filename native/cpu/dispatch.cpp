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

// Elements of the tensors that go through all phases together. A step reads each gradient three times (CAME four) and
// each parameter twice; within a wave all but the first time come from the cache. The result does not depend on it.
static const int64_t WAVE_ELEMENTS = 2 << 20;

namespace {

// Neighbours in the batch, all with A8_AVERAGE_UPDATE or all without: the order of the phases depends on it.
struct Wave {
  uint32_t first, tensors, chunk, chunks, tile, tiles;
  bool average, confidence, limited;  // the last two: of any tensor

  Wave(const a8_batch* batch, uint32_t from)
      : first(from), tensors(0), chunks(0), tiles(0), confidence(false), limited(false) {
    const a8_tensor& head = batch->tensors[first];
    chunk = (uint32_t)head.chunk_at;
    tile = (uint32_t)head.tile_at;
    average = averages(batch, head);
    int64_t elements = 0;
    for (uint32_t i = first; i < batch->tensor_count; ++i) {
      const a8_tensor& t = batch->tensors[i];
      if (i > first && (elements + t.numel > WAVE_ELEMENTS || averages(batch, t) != average)) break;
      elements += t.numel;
      chunks += t.chunks;
      tiles += t.tiles;
      confidence = confidence || t.third_format == A8_FACTORED;
      limited = limited || t.limiter;
      ++tensors;
    }
  }

  static bool averages(const a8_batch* batch, const a8_tensor& t) {
    return batch->hypers[t.hyper].flags & A8_AVERAGE_UPDATE;
  }
};

}  // namespace

void a8_run_adafactor(const a8_kernels* kernels, uint32_t threads, const a8_job* job, uint32_t phases) {
  const a8_batch* batch = job->batch;
  for (uint32_t first = 0; first < batch->tensor_count;) {
    const Wave wave(batch, first);
    first += wave.tensors;
    auto over_tensors = [&](a8_task task) { a8_parallel(threads, wave.first, wave.tensors, task, job); };
    auto over_chunks = [&](a8_task task) { a8_parallel(threads, wave.chunk, wave.chunks, task, job); };
    auto over_tiles = [&](a8_task task) { a8_parallel(threads, wave.tile, wave.tiles, task, job); };
    auto confidence = [&] {
      if (phases & A8_RESIDUAL) over_tiles(kernels->residual);
      if (phases & A8_CONFIDENCE) over_tensors(kernels->confidence);
    };
    if (phases & A8_REDUCE && wave.tiles) {
      over_tiles(kernels->reduce);
      over_tensors(kernels->combine);
    }
    if (phases & A8_MOMENTS && wave.tiles) over_tensors(kernels->moments);
    if (wave.confidence && !wave.average) confidence();
    if (phases & A8_NORM) {
      over_chunks(kernels->norm);
      over_tensors(kernels->totals);
    }
    if (wave.confidence && wave.average) confidence();
    if (phases & A8_LIMIT && wave.limited && wave.average) {
      over_chunks(kernels->limit);
      over_tensors(kernels->limit_totals);
    }
    if (phases & A8_APPLY) over_chunks(kernels->apply);
  }
}
