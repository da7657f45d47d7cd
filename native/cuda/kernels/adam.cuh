// a8_adam of abi.h: one step of Adam or AdamW over a table of tensors, in one launch.
#pragma once

#include "adam_fast.cuh"

// Blocks of threads that share a multiprocessor: the compiler then allows itself 80 registers. Before Ampere shared
// memory has room for one.
#define A8_ADAM_RESIDENT 3

#define A8_DTYPES(param, grad) ((param) * 4u + (grad))

// `parts`: how many chunks of one tensor, from `chunk` on.
A8_FN a8_adam_job a8_adam_job_of(const a8_batch& batch, a8_chunk chunk, uint32_t parts) {
  a8_adam_job job;
  job.tensor = batch.tensors + chunk.tensor;
  const a8_hyper* h = batch.hypers + job.tensor->hyper;
  job.from = (int64_t)chunk.part * A8_CHUNK;
  int64_t count = job.tensor->numel - job.from;
  job.count = count < (int64_t)parts * A8_CHUNK ? (uint32_t)count : parts * A8_CHUNK;
  job.flags = h->flags;
  job.rule = a8_rule_of(h, h->lr_device ? *h->lr_device : h->lr, A8_ADAM, nullptr);
  uint64_t pair = (uint64_t)chunk.part * (A8_CHUNK / 2);
  uint32_t id = job.tensor->noise_id;
  job.phase = a8_phase_at(a8_phase_key(h->seed_low, h->seed_high, h->step, id), (uint64_t)job.from);
  job.write = a8_noise_at(a8_noise_key(h->seed_low, h->seed_high, h->step, id), pair);
  return job;
}

// Chunks from `chunk` on, at most `most`, that are one stretch: of one tensor, their pairs alike in the high 32 bits.
A8_FN uint32_t a8_stretch(const a8_batch& batch, a8_chunk chunk, uint32_t most) {
  const uint32_t kNoiseParts = (uint32_t)((1ull << 32) / (A8_CHUNK / 2));
  uint32_t parts = min(most, batch.tensors[chunk.tensor].chunks - chunk.part);
  return min(parts, kNoiseParts - chunk.part % kNoiseParts);
}

A8_FN bool a8_suits_fast(const a8_adam_job& job) {
  const a8_tensor* t = job.tensor;
  return t->first_format == A8_INT8 && t->second_format == A8_LOG8 && t->first_block_size == A8_FAST_BLOCK &&
         t->second_block_size == A8_FAST_BLOCK && a8_is_ordinary(job.rule) && a8_aligned(t->param, 16) &&
         a8_aligned(t->grad, 16) && a8_aligned(t->first, 8) && a8_aligned(t->second, 8);
}

// The fast path, for the types that have one; false for the others.
A8_FN bool a8_adam_fast(const a8_adam_job& job, a8_fast_room* room, unsigned long long* left) {
  switch (A8_DTYPES(job.tensor->param_dtype, job.tensor->grad_dtype)) {
    case A8_DTYPES(A8_BF16, A8_BF16):
      a8_fast<A8_BF16, A8_BF16>::run(job, room, left);
      return true;
    case A8_DTYPES(A8_F32, A8_F32):
      a8_fast<A8_F32, A8_F32>::run(job, room, left);
      return true;
    case A8_DTYPES(A8_F16, A8_F16):
      a8_fast<A8_F16, A8_F16>::run(job, room, left);
      return true;
    case A8_DTYPES(A8_BF16, A8_F32):
      a8_fast<A8_BF16, A8_F32>::run(job, room, left);
      return true;
    default:
      return false;
  }
}

// Each block of threads takes `group` chunks at a time, 1 to A8_MAX_GROUP; any grid, A8_THREADS threads a block. Larger
// groups start less often, smaller ones end together; the bits are the same.
extern "C" __global__ void __launch_bounds__(A8_THREADS, A8_AMPERE ? A8_ADAM_RESIDENT : 1)
    a8_adam_kernel(a8_batch batch, uint32_t group) {
  __shared__ union {
    a8_moment_room general;
    a8_fast_room fast;
  } room;
  __shared__ unsigned long long left[A8_MAX_GROUP];  // units of each chunk that the fast path left
  for (uint64_t first = (uint64_t)blockIdx.x * group; first < batch.chunk_count; first += (uint64_t)gridDim.x * group) {
    uint32_t index = (uint32_t)first, end = min(batch.chunk_count - index, group) + index;
    while (index < end) {
      // By every thread, and the index from one lane, which shows the compiler that all lanes agree: what follows from
      // it then takes uniform registers, of which there are plenty.
      a8_chunk chunk = batch.chunks[__shfl_sync(A8_LANE_MASK, index, 0)];
      uint32_t parts = a8_stretch(batch, chunk, end - index);
      a8_adam_job job = a8_adam_job_of(batch, chunk, parts);
      bool fast = a8_suits_fast(job);
      if (fast) {
        if (threadIdx.x < A8_MAX_GROUP) left[threadIdx.x] = 0;
        __syncthreads();
        fast = a8_adam_fast(job, &room.fast, left);
        a8_copies_wait<0>();  // none may land in what the general path writes
        __syncthreads();
      }
      for (uint32_t part = 0; part < parts; ++part) {
        unsigned long long units = fast ? left[part] : A8_ALL_UNITS;
        if (units) a8_adam_general(a8_part_of(job, part), units, &room.general);
      }
      __syncthreads();
      index += parts;
    }
  }
}
