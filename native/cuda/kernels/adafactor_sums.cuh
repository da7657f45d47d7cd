// What the phases of an Adafactor step share on a GPU: which part of a batch a block of threads or a warp works on.
#pragma once

#include "sums.cuh"

// --- The parts of a batch. ---

A8_FN int64_t a8_tiles_across(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

// Where the column sums of the confidence begin in the scratch, later its column factors; the rows' are at residual_at.
A8_FN int64_t a8_confidence_cols_at(const a8_tensor* t) {
  return t->residual_at + (a8_tiles_across(t->cols, A8_TILE_COLS) * t->rows + 3) / 4 * 4;
}

// A 64-bit division takes a hundred instructions, a 32-bit one twenty.
A8_FN int64_t a8_row_of(int64_t e, int64_t cols) {
  return ((uint64_t)e | (uint64_t)cols) >> 32 ? e / cols : (int64_t)((uint32_t)e / (uint32_t)cols);
}

// One tile of a factored tensor. rows and cols: its extent, cut off at the matrix's edge.
typedef struct a8_matrix_tile {
  const a8_tensor* tensor;
  int64_t down, across;  // its place among the tiles
  int64_t row, col;      // of the matrix: its first
  int rows, cols;
} a8_matrix_tile;

A8_FN a8_matrix_tile a8_tile_of(const a8_batch& batch, uint32_t index) {
  a8_chunk unit = batch.tiles[index];
  a8_matrix_tile tile;
  tile.tensor = batch.tensors + unit.tensor;
  uint32_t across = (uint32_t)a8_tiles_across(tile.tensor->cols, A8_TILE_COLS);
  tile.down = unit.part / across;
  tile.across = unit.part % across;
  tile.row = tile.down * A8_TILE_ROWS;
  tile.col = tile.across * A8_TILE_COLS;
  tile.rows = (int)min((long long)(tile.tensor->rows - tile.row), (long long)A8_TILE_ROWS);
  tile.cols = (int)min((long long)(tile.tensor->cols - tile.col), (long long)A8_TILE_COLS);
  return tile;
}

// One chunk of one tensor, or with a greater count a run of them (adafactor_full.cuh).
typedef struct a8_factor_job {
  const a8_tensor* tensor;
  a8_hyper hyper;
  const float* scratch;
  const float* row_factor;  // of a factored moment, in the scratch
  const float* col_factor;
  float* sums;     // of the first chunk: of p^2; `chunks` floats on, of u^2; as many on, the fingerprint
  int64_t from;    // first element
  uint32_t count;  // elements
  float bound;     // of the reciprocal root of the second moment
  uint32_t sign;   // flips the gradient when maximising
} a8_factor_job;

A8_FN a8_factor_job a8_factor_job_of(const a8_tensor* t, const a8_hyper* h, float* scratch, uint32_t part) {
  a8_factor_job job;
  job.tensor = t;
  job.hyper = *h;
  job.scratch = scratch;
  job.row_factor = scratch + t->row_at;
  job.col_factor = scratch + t->col_at;
  job.sums = scratch + t->sum_at + A8_TOTALS + part;
  job.from = (int64_t)part * A8_CHUNK;
  job.count = (uint32_t)min((long long)(t->numel - job.from), (long long)A8_CHUNK);
  job.bound = a8_div(1.0f, job.hyper.eps);
  job.sign = job.hyper.flags & A8_MAXIMIZE ? 0x80000000u : 0u;
  return job;
}

A8_FN a8_factor_job a8_factor_job_of(const a8_batch& batch, float* scratch, a8_chunk unit) {
  const a8_tensor* t = batch.tensors + unit.tensor;
  return a8_factor_job_of(t, batch.hypers + t->hyper, scratch, unit.part);
}

A8_FN a8_factor_job a8_factor_job_of(const a8_batch& batch, float* scratch, uint32_t index) {
  return a8_factor_job_of(batch, scratch, batch.chunks[index]);
}

// The same, read once more even where the compiler sees that it has been read.
A8_FN a8_factor_job a8_factor_job_again(const a8_batch& batch, float* scratch, uint32_t index) {
  const volatile a8_chunk* unit = batch.chunks + index;
  return a8_factor_job_of(batch, scratch, {unit->tensor, unit->part});
}

A8_FN bool a8_averages_update(const a8_factor_job& job) { return job.hyper.flags & A8_AVERAGE_UPDATE; }

// Whether the norm phase is to sum u^2.
A8_FN bool a8_needs_squares(const a8_factor_job& job) {
  return job.hyper.clip > 0.0f || (job.tensor->limiter && !a8_averages_update(job));
}

A8_FN bool a8_scales(const a8_factor_job& job) { return job.hyper.flags & A8_SCALE_PARAMETER; }

A8_FN uint32_t a8_load_bits(const void* base, uint32_t dtype, int64_t e) {
  return dtype == A8_F32 ? *a8_at<uint32_t>(base, e) : (uint32_t)*a8_at<uint16_t>(base, e);
}

// The fingerprint of the parameter's chunk as it is in memory. By any thread, for itself.
A8_FN uint32_t a8_fingerprint_of(const a8_factor_job& job) {
  uint32_t sample[A8_SAMPLES], fingerprint = job.count;
#pragma unroll
  for (uint32_t i = 0; i < A8_SAMPLES; ++i)
    sample[i] = i < job.count ? a8_load_bits(job.tensor->param, job.tensor->param_dtype, job.from + i) : 0u;
#pragma unroll
  for (uint32_t i = 0; i < A8_SAMPLES; ++i)
    if (i < job.count) fingerprint = a8_fingerprint(fingerprint, sample[i]);
  return fingerprint;
}

// Whether the last apply phase has left this chunk's sum of p^2.
A8_FN bool a8_squares_are_known(const a8_factor_job& job) {
  if (!(job.tensor->flags & A8_SQUARES_KNOWN)) return false;
  return a8_bits(job.sums[2 * (int64_t)job.tensor->chunks]) == a8_fingerprint_of(job);
}

// Leaves the chunk's sum of p^2 and its fingerprint to the next step. By one thread, which sees the parameters written.
A8_FN void a8_leave_squares(const a8_factor_job& job, float squares) {
  job.sums[0] = squares;
  job.sums[2 * (int64_t)job.tensor->chunks] = a8_float(a8_fingerprint_of(job));
}

// What the apply phase of a chunk or run needs besides.
typedef struct a8_factor_write {
  a8_adafactor_rule rule;
  a8_noise write;  // from its first pair on
  uint32_t phase;  // of its first element
} a8_factor_write;

A8_FN a8_factor_write a8_factor_write_of(const a8_factor_job& job) {
  const a8_hyper* h = &job.hyper;
  const float* totals = job.scratch + job.tensor->sum_at;
  a8_factor_write write;
  float lr = h->lr_device ? *h->lr_device : h->lr;
  write.rule = a8_adafactor_rule_of(h, lr, (float)job.tensor->numel, totals);
  uint64_t pair = (uint64_t)job.from / 2;
  uint32_t id = job.tensor->noise_id;
  write.write = a8_noise_at(a8_noise_key(h->seed_low, h->seed_high, h->step, id), pair);
  write.phase = a8_phase_at(a8_phase_key(h->seed_low, h->seed_high, h->step, id), (uint64_t)job.from);
  return write;
}
