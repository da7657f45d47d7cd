// The C entries of the CPU library: check every argument, choose the kernels, run. Nothing is written before all of a
// batch has been checked. Declarations and their promises: a8/abi.h.
#include "a8/entry.h"
#include "a8/schedule.h"

#include <exception>
#include <new>

#include "dispatch.h"
#include "parallel.h"
#include "probe.h"

namespace {

// The guard around every entry: no exception crosses the boundary.
template <typename F>
int32_t guarded(F body) noexcept {
  a8_message[0] = 0;
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(A8_ERROR_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(A8_ERROR_INTERNAL, "%s", error.what());
  } catch (...) {
    return fail(A8_ERROR_INTERNAL, "unknown exception");
  }
}

uintptr_t state_alignment(uint8_t format) { return quantised(format) ? 1 : format == A8_STATE_BF16 ? 2 : 4; }

int32_t check_moment(uint32_t i, const char* name, uint8_t format, const void* codes, const void* headers,
                     uint32_t block) {
  if (!codes || !aligned(codes, state_alignment(format)))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: %s is null or not aligned to its type", i, name);
  if (!quantised(format)) return A8_OK;
  if (!good_block(block))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: %s_block_size %u is not a power of two from %d to %d", i, name, block,
                A8_MIN_BLOCK, A8_MAX_BLOCK);
  if (!headers || !aligned(headers, 4))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: %s_block is null or not aligned to 4 bytes", i, name);
  return A8_OK;
}

int32_t check_tensor(const a8_batch* batch, uint32_t i, bool adafactor) {
  const a8_tensor& t = batch->tensors[i];
  if (t.numel <= 0) return fail(A8_ERROR_ARGUMENT, "tensor %u: numel is %lld", i, (long long)t.numel);
  if (t.param_dtype > A8_F16 || t.grad_dtype > A8_F16)
    return fail(A8_ERROR_UNSUPPORTED, "tensor %u: unknown param_dtype %u or grad_dtype %u", i, t.param_dtype,
                t.grad_dtype);
  if (!t.param || !aligned(t.param, dtype_bytes(t.param_dtype)) || !t.grad ||
      !aligned(t.grad, dtype_bytes(t.grad_dtype)))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: param or grad is null or not aligned to its type", i);
  if (t.hyper >= batch->hyper_count)
    return fail(A8_ERROR_ARGUMENT, "tensor %u: hyper %u of %u", i, t.hyper, batch->hyper_count);
  if (t.chunks != (t.numel + A8_CHUNK - 1) / A8_CHUNK || t.chunk_at < 0 || t.chunk_at + t.chunks > batch->chunk_count)
    return fail(A8_ERROR_ARGUMENT, "tensor %u: chunks do not match numel", i);
  bool first_known = t.first_format == A8_STATE_F32 || t.first_format == A8_STATE_BF16 || t.first_format == A8_INT8 ||
                     t.first_format == A8_NF4 || (adafactor && t.first_format == A8_NONE);
  bool second_known =
      t.second_format == A8_STATE_F32 || t.second_format == A8_LOG8 || (adafactor && t.second_format == A8_FACTORED);
  if (!first_known || !second_known)
    return fail(A8_ERROR_UNSUPPORTED, "tensor %u: first_format %u or second_format %u", i, t.first_format,
                t.second_format);
  if (t.first_format != A8_NONE)
    if (int32_t status = check_moment(i, "first", t.first_format, t.first, t.first_block, t.first_block_size))
      return status;
  if (int32_t status = check_moment(i, "second", t.second_format, t.second, t.second_block, t.second_block_size))
    return status;
  if (t.second_format != A8_FACTORED) return A8_OK;
  if (t.rows <= 0 || t.cols <= 0 || t.numel % t.cols != 0 || t.rows != t.numel / t.cols)
    return fail(A8_ERROR_ARGUMENT, "tensor %u: rows %lld x cols %lld is not numel", i, (long long)t.rows,
                (long long)t.cols);
  int64_t tiles = ((t.rows + A8_TILE_ROWS - 1) / A8_TILE_ROWS) * ((t.cols + A8_TILE_COLS - 1) / A8_TILE_COLS);
  if (!t.second_block || t.tiles != tiles || t.tile_at < 0 || t.tile_at + tiles > batch->tile_count)
    return fail(A8_ERROR_ARGUMENT, "tensor %u: second_block is null or tiles do not match rows and cols", i);
  return A8_OK;
}

bool fits(int64_t offset, int64_t floats, const a8_exec* exec) {
  return offset >= 0 && floats >= 0 && offset + floats <= exec->scratch_bytes / 4;
}

int32_t check_scratch(const a8_exec* exec, const a8_batch* batch, uint32_t i) {
  const a8_tensor& t = batch->tensors[i];
  bool factored = t.second_format == A8_FACTORED;
  int64_t row_floats = factored ? (t.cols + A8_TILE_COLS - 1) / A8_TILE_COLS * t.rows : 0;
  int64_t col_floats = factored ? (t.rows + A8_TILE_ROWS - 1) / A8_TILE_ROWS * t.cols : 0;
  if (!exec->scratch || !fits(t.sum_at, A8_TOTALS + 3 * (int64_t)t.chunks, exec) || !fits(t.row_at, row_floats, exec) ||
      !fits(t.col_at, col_floats, exec))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: its partial sums are outside the scratch of %lld bytes", i,
                (long long)exec->scratch_bytes);
  return A8_OK;
}

int32_t check_batch(const a8_exec* exec, const a8_batch* batch, bool adafactor) {
  if (!exec || !batch) return fail(A8_ERROR_ARGUMENT, "exec or batch is null");
  if (batch->tensor_count == 0) return A8_OK;
  if (!batch->tensors || !batch->chunks || !batch->hypers || (batch->tile_count && !batch->tiles))
    return fail(A8_ERROR_ARGUMENT, "a table of the batch is null");
  for (uint32_t i = 0; i < batch->chunk_count; ++i)
    if (batch->chunks[i].tensor >= batch->tensor_count ||
        batch->chunks[i].part >= batch->tensors[batch->chunks[i].tensor].chunks)
      return fail(A8_ERROR_ARGUMENT, "chunk %u is outside its tensor", i);
  for (uint32_t i = 0; i < batch->tile_count; ++i)
    if (batch->tiles[i].tensor >= batch->tensor_count ||
        batch->tiles[i].part >= batch->tensors[batch->tiles[i].tensor].tiles)
      return fail(A8_ERROR_ARGUMENT, "tile %u is outside its tensor", i);
  for (uint32_t i = 0; i < batch->tensor_count; ++i) {
    if (int32_t status = check_tensor(batch, i, adafactor)) return status;
    if (adafactor)
      if (int32_t status = check_scratch(exec, batch, i)) return status;
  }
  return A8_OK;
}

// The kernels that exec asks for; records which ones run.
const a8_kernels* choose(a8_exec* exec) {
  const a8_kernels* kernels = a8_kernels_for(exec->isa);
  if (kernels) exec->isa_ran = kernels->isa;
  return kernels;
}

int32_t no_such_isa(const a8_exec* exec) {
  return fail(A8_ERROR_UNSUPPORTED,
              "instruction set %u is not built in or not supported by this processor (usable: mask 0x%x)", exec->isa,
              a8_isa_usable());
}

uint32_t threads_of(const a8_exec* exec) { return exec->threads ? exec->threads : 1; }

int32_t run_codec(a8_exec* exec, const a8_codec* codec, bool quantize) {
  if (int32_t status = check_codec(exec, codec)) return status;
  if (codec->numel == 0) return A8_OK;
  int64_t chunks = (codec->numel + A8_CHUNK - 1) / A8_CHUNK;
  if (chunks > 0xffffffffLL) return fail(A8_ERROR_UNSUPPORTED, "numel %lld is too large", (long long)codec->numel);
  const a8_kernels* kernels = choose(exec);
  if (!kernels) return no_such_isa(exec);
  a8_job job = {nullptr, codec, nullptr, nullptr, nullptr};
  a8_parallel(threads_of(exec), 0, (uint32_t)chunks, quantize ? kernels->quantize : kernels->dequantize, &job);
  return A8_OK;
}

}  // namespace

A8_EXPORT int32_t a8_get_info(a8_info* info) {
  return guarded([&] {
    if (int32_t status = fill_info(info, "cpu", A8_OP_CODEC | A8_OP_ELEMENTWISE | A8_OP_ADAFACTOR)) return status;
    info->isa_built = a8_isa_built();
    info->isa_usable = a8_isa_usable();
    info->isa_best = a8_isa_best();
    return (int32_t)A8_OK;
  });
}

A8_EXPORT int32_t a8_quantize(a8_exec* exec, const a8_codec* codec) {
  return guarded([&] { return run_codec(exec, codec, true); });
}

A8_EXPORT int32_t a8_dequantize(a8_exec* exec, const a8_codec* codec) {
  return guarded([&] { return run_codec(exec, codec, false); });
}

A8_EXPORT int32_t a8_derive(a8_exec* exec, const a8_schedule* from, a8_hyper* to, uint32_t count, uint32_t advance) {
  return guarded([&] {
    if (int32_t status = check_derive(exec, from, to, count, advance)) return status;
    exec->isa_ran = 0;
    for (uint32_t i = 0; i < count; ++i) {
      if (!from[i].step) continue;
      if (!from[i].skip || *from[i].skip == 0.0f) *from[i].step += advance;
      a8_derive_row(&from[i], *from[i].step, &to[i]);
    }
    return (int32_t)A8_OK;
  });
}

A8_EXPORT int32_t a8_screen(a8_exec* exec, const a8_batch* batch, const float* scale, float* found) {
  return guarded([&] {
    if (!found) return fail(A8_ERROR_ARGUMENT, "found is null");
    if (int32_t status = check_batch(exec, batch, false)) return status;
    const a8_kernels* kernels = choose(exec);
    if (!kernels) return no_such_isa(exec);
    a8_job job = {batch, nullptr, nullptr, scale, found};
    a8_parallel(threads_of(exec), 0, batch->chunk_count, kernels->screen, &job);
    return (int32_t)A8_OK;
  });
}

A8_EXPORT int32_t a8_elementwise(a8_exec* exec, const a8_batch* batch, uint32_t phases) {
  return guarded([&] {
    if (phases & ~(uint32_t)A8_ALL_PHASES) return fail(A8_ERROR_ARGUMENT, "phases 0x%x", phases);
    if (int32_t status = check_batch(exec, batch, false)) return status;
    const a8_kernels* kernels = choose(exec);
    if (!kernels) return no_such_isa(exec);
    a8_job job = {batch, nullptr, static_cast<float*>(exec->scratch), nullptr, nullptr};
    a8_parallel(threads_of(exec), 0, batch->chunk_count, kernels->elementwise, &job);
    return (int32_t)A8_OK;
  });
}

A8_EXPORT int32_t a8_adafactor(a8_exec* exec, const a8_batch* batch, uint32_t phases) {
  return guarded([&] {
    if (phases & ~(uint32_t)A8_ALL_PHASES) return fail(A8_ERROR_ARGUMENT, "phases 0x%x", phases);
    if (int32_t status = check_batch(exec, batch, true)) return status;
    const a8_kernels* kernels = choose(exec);
    if (!kernels) return no_such_isa(exec);
    a8_job job = {batch, nullptr, static_cast<float*>(exec->scratch), nullptr, nullptr};
    a8_run_adafactor(kernels, threads_of(exec), &job, phases);
    return (int32_t)A8_OK;
  });
}
