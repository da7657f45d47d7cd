// The loops of the element-wise kernels over stretches of chunks. A rule with a fast path of its own (adam_fast.cuh,
// momentum_fast.cuh) has two kernels, each with the registers that it needs: one with that path and one with that of
// element_lanes.cuh, for other formats. Other rules have the latter alone. Any kernel takes any tensor and gives the
// same bits.
#pragma once

#include "element_fast.cuh"
#include "element_lanes.cuh"

// Chunks from `chunk` on, at most `most`, that are one stretch: of one tensor, their pairs alike in the high 32 bits.
A8_FN uint32_t a8_stretch(const a8_batch& batch, a8_chunk chunk, uint32_t most) {
  const uint32_t kNoiseParts = (uint32_t)((1ull << 32) / (A8_CHUNK / 2));
  uint32_t parts = min(most, batch.tensors[chunk.tensor].chunks - chunk.part);
  return min(parts, kNoiseParts - chunk.part % kNoiseParts);
}

// The stretch of `parts` chunks from `chunk` on. scratch: of the rules that have norms; else not read.
template <int KIND>
A8_FN a8_element_job a8_stretch_job(const a8_batch& batch, const float* scratch, a8_chunk chunk, uint32_t parts) {
  const a8_tensor* t = batch.tensors + chunk.tensor;
  const float* totals = a8_rule_has_norm(KIND) ? scratch + t->sum_at : nullptr;
  return a8_element_job_of<KIND>(t, batch.hypers + t->hyper, chunk.part, parts, totals);
}

// What a path has left of a stretch. By every thread.
template <int KIND>
A8_FN void a8_update_left(const a8_element_job& job, uint32_t parts, const unsigned long long* left,
                          a8_moment_room* room) {
#pragma unroll 1  // unrolled, it would spill registers
  for (uint32_t part = 0; part < parts; ++part) {
    unsigned long long units = left[part];
    if (units) a8_element_general<KIND>(job, part, units, room);
  }
  __syncthreads();
}

// Updates `group` chunks, 1 to A8_MAX_GROUP, by each block of threads. Larger groups start less often, smaller ones end
// together; the bits are the same.
template <int KIND>
A8_FN void a8_update_fast(const a8_batch& batch, const float* scratch, uint32_t group,
                          a8_fast_stretch_room<KIND == A8_ADAM>* room) {
  if (threadIdx.x == 0) room->index = blockIdx.x * group;
  __syncthreads();
  do {
    uint32_t index = a8_agreed(room->index), end = min(batch.chunk_count, index / group * group + group);
    a8_chunk chunk = batch.chunks[index];
    uint32_t parts = a8_stretch(batch, chunk, end - index);
    a8_element_job job = a8_stretch_job<KIND>(batch, scratch, chunk, parts);
    bool fast = a8_fast_rule<KIND, A8_F32, A8_F32>::suits(job);
    if (threadIdx.x < A8_MAX_GROUP) room->left[threadIdx.x] = fast ? 0 : A8_ALL_UNITS;
    __syncthreads();
    if (threadIdx.x == 0) room->index = index + parts;
    if (fast) {
      a8_fast_typed<KIND>(job, room->fast.bytes, room->left);
      a8_copies_wait<0>();  // none may land in what the general path writes
      __syncthreads();
    }
    a8_update_left<KIND>(job, parts, room->left, &room->general);
  } while (room->index % group != 0 && room->index < batch.chunk_count);
}

// Shared memory of a block of threads.
typedef struct a8_lanes_room {
  union {
    a8_moment_room general;
    alignas(16) char arena[A8_WARPS][A8_ARENA_BYTES];
  };
  a8_nf4_table table;
  unsigned long long left[A8_MAX_GROUP];  // units of each chunk that are the general path's
  uint32_t index;                         // as in a8_fast_stretch_room
} a8_lanes_room;

// Not inlined: the compiler would make the table's numbers before the loop and keep them in registers.
static __device__ __noinline__ void a8_share_nf4_table_apart(a8_nf4_table* table) { a8_share_nf4_table(table); }

// As a8_update_fast, by element_lanes.cuh.
template <int KIND>
A8_FN void a8_update_by_lanes(const a8_batch& batch, const float* scratch, uint32_t group, a8_lanes_room* room) {
  if (threadIdx.x == 0) room->index = blockIdx.x * group;
  __syncthreads();
  do {
    uint32_t index = a8_agreed(room->index), end = min(batch.chunk_count, index / group * group + group);
    a8_chunk chunk = batch.chunks[index];
    uint32_t parts = a8_stretch(batch, chunk, end - index);
    a8_element_job job = a8_stretch_job<KIND>(batch, scratch, chunk, parts);
    bool lanes = a8_suits_eights<KIND>(job.tensor);
    if (threadIdx.x < A8_MAX_GROUP) room->left[threadIdx.x] = lanes ? 0 : A8_ALL_UNITS;
    if (lanes && a8_wants_nf4_table(job.tensor)) a8_share_nf4_table_apart(&room->table);
    __syncthreads();
    if (threadIdx.x == 0) room->index = index + parts;
    if (lanes) a8_lanes_run<KIND>(job, room->arena[a8_warp_number()], &room->table, room->left);
    a8_copies_wait<0>();  // none may land in what the general path writes
    __syncthreads();
    a8_update_left<KIND>(job, parts, room->left, &room->general);
  } while (room->index % group != 0 && room->index < batch.chunk_count);
}
