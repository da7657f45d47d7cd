// The C entries of the CPU library: check every argument, choose the kernels, run. Nothing is written before all of a
// batch has been checked. Declarations and their promises: a8/abi.h.
#include "a8/draw.h"
#include "a8/entry.h"
#include "a8/rules.h"
#include "a8/schedule.h"

#include <exception>
#include <new>

#include "dispatch.h"
#include "parallel.h"
#include "probe.h"
#include "reader.h"
#include "rule_moments.h"

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

// --- Checks of a batch. `i`: the tensor's index, which every message names. ---

uintptr_t state_alignment(uint8_t format) { return quantised(format) ? 1 : format == A8_STATE_BF16 ? 2 : 4; }

// A moment of tensor i as its fields are. square: never negative, as the second moment.
struct Moment {
  const char* name;
  Presence presence;
  bool square;
  uint8_t format;
  const void *codes, *headers;
  uint32_t block_size;
};

bool good_format(const Moment& m) {
  if (m.format == A8_NONE) return m.presence != MUST;
  if (m.presence == NEVER) return false;
  if (m.format == A8_STATE_F32) return true;
  return m.square ? m.format == A8_LOG8 : m.format == A8_STATE_BF16 || m.format == A8_INT8 || m.format == A8_NF4;
}

int32_t check_storage(uint32_t i, const Moment& m) {
  if (m.format == A8_NONE) return A8_OK;
  if (!m.codes || !aligned(m.codes, state_alignment(m.format)))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: %s is null or not aligned to its type", i, m.name);
  if (!quantised(m.format) && m.format != A8_FACTORED) return A8_OK;
  if (m.format != A8_FACTORED && !good_block(m.block_size))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: %s_block_size %u is not a power of two from %d to %d", i, m.name,
                m.block_size, A8_MIN_BLOCK, A8_MAX_BLOCK);
  if (!m.headers || !aligned(m.headers, 4))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: %s_block is null or not aligned to 4 bytes", i, m.name);
  return A8_OK;
}

const RuleMoments ADAFACTOR_MOMENTS = {MAY, MUST, NEVER};  // where they are not factored

int32_t check_moments(const a8_batch* batch, uint32_t i, bool adafactor) {
  const a8_tensor& t = batch->tensors[i];
  const RuleMoments may = adafactor ? ADAFACTOR_MOMENTS : RULE_MOMENTS[batch->rule];
  const Moment moments[] = {
      {"first", may.first, false, t.first_format, t.first, t.first_block, t.first_block_size},
      {"second", may.second, true, t.second_format, t.second, t.second_block, t.second_block_size},
      {"third", may.third, false, t.third_format, t.third, t.third_block, t.third_block_size},
  };
  for (const Moment& m : moments) {
    bool factored = adafactor && m.format == A8_FACTORED && &m != moments && t.second_format == A8_FACTORED;
    if (!factored && !good_format(m)) {
      if (adafactor) return fail(A8_ERROR_UNSUPPORTED, "tensor %u: Adafactor has no %s_format %u", i, m.name, m.format);
      return fail(A8_ERROR_UNSUPPORTED, "tensor %u: rule %u has no %s_format %u", i, batch->rule, m.name, m.format);
    }
    if (int32_t status = check_storage(i, m)) return status;
  }
  return A8_OK;
}

// What every entry reads of a tensor.
int32_t check_gradient(uint32_t i, const a8_tensor& t) {
  if (t.numel <= 0) return fail(A8_ERROR_ARGUMENT, "tensor %u: numel is %lld", i, (long long)t.numel);
  if (t.grad_dtype > A8_F16) return fail(A8_ERROR_UNSUPPORTED, "tensor %u: unknown grad_dtype %u", i, t.grad_dtype);
  if (!t.grad || !aligned(t.grad, dtype_bytes(t.grad_dtype)))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: grad is null or not aligned to its type", i);
  return A8_OK;
}

int32_t check_tensor(const a8_batch* batch, uint32_t i, bool adafactor) {
  const a8_tensor& t = batch->tensors[i];
  if (int32_t status = check_gradient(i, t)) return status;
  if (t.param_dtype > A8_F16) return fail(A8_ERROR_UNSUPPORTED, "tensor %u: unknown param_dtype %u", i, t.param_dtype);
  if (!t.param || !aligned(t.param, dtype_bytes(t.param_dtype)))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: param is null or not aligned to its type", i);
  if (t.hyper >= batch->hyper_count)
    return fail(A8_ERROR_ARGUMENT, "tensor %u: hyper %u of %u", i, t.hyper, batch->hyper_count);
  if (t.chunks != (t.numel + A8_CHUNK - 1) / A8_CHUNK || t.chunk_at < 0 || t.chunk_at + t.chunks > batch->chunk_count)
    return fail(A8_ERROR_ARGUMENT, "tensor %u: chunks do not match numel", i);
  if (t.limiter && (!adafactor || !aligned(t.limiter, 4)))
    return fail(A8_ERROR_ARGUMENT, "tensor %u: limiter is %s", i,
                adafactor ? "not aligned to 4 bytes" : "not null, but element-wise rules have none");
  if (int32_t status = check_moments(batch, i, adafactor)) return status;
  if (t.second_format != A8_FACTORED) return A8_OK;
  if (t.rows <= 0 || t.cols <= 0 || t.numel % t.cols != 0 || t.rows != t.numel / t.cols)
    return fail(A8_ERROR_ARGUMENT, "tensor %u: rows %lld x cols %lld is not numel", i, (long long)t.rows,
                (long long)t.cols);
  int64_t tiles = ((t.rows + A8_TILE_ROWS - 1) / A8_TILE_ROWS) * ((t.cols + A8_TILE_COLS - 1) / A8_TILE_COLS);
  if (t.tiles != tiles || t.tile_at < 0 || t.tile_at + tiles > batch->tile_count)
    return fail(A8_ERROR_ARGUMENT, "tensor %u: tiles do not match rows and cols", i);
  return A8_OK;
}

int32_t check_scratch(const a8_exec* exec, uint32_t i, const a8_tensor& t) {
  bool factored = t.second_format == A8_FACTORED;
  int64_t row_floats = factored ? (t.cols + A8_TILE_COLS - 1) / A8_TILE_COLS * t.rows : 0;
  int64_t col_floats = factored ? (t.rows + A8_TILE_ROWS - 1) / A8_TILE_ROWS * t.cols : 0;
  int64_t residual_floats = t.third_format == A8_FACTORED ? (row_floats + 3) / 4 * 4 + col_floats : 0;
  const struct {
    const char* name;
    int64_t at, floats;
  } parts[] = {{"row_at", t.row_at, row_floats},
               {"col_at", t.col_at, col_floats},
               {"residual_at", t.residual_at, residual_floats},
               {"sum_at", t.sum_at, A8_TOTALS + 3 * (int64_t)t.chunks}};
  const int64_t room = exec->scratch && aligned(exec->scratch, 4) ? exec->scratch_bytes / 4 : 0;
  for (const auto& part : parts)
    if (part.floats && (part.at < 0 || part.at > room || part.floats > room - part.at))
      return fail(A8_ERROR_ARGUMENT, "tensor %u: the sums at %s %lld are outside the scratch (%p, %lld bytes)", i,
                  part.name, (long long)part.at, exec->scratch, (long long)exec->scratch_bytes);
  return A8_OK;
}

int32_t check_tables(const a8_exec* exec, const a8_batch* batch, bool hypers) {
  if (!exec || !batch) return fail(A8_ERROR_ARGUMENT, "exec or batch is null");
  if ((batch->tensor_count && (!batch->tensors || (hypers && !batch->hypers))) ||
      (batch->chunk_count && !batch->chunks) || (hypers && batch->tile_count && !batch->tiles))
    return fail(A8_ERROR_ARGUMENT, "a table of the batch is null");
  return A8_OK;
}

int32_t check_batch(const a8_exec* exec, const a8_batch* batch, bool adafactor) {
  if (int32_t status = check_tables(exec, batch, true)) return status;
  if (!adafactor && batch->rule >= RULE_COUNT) return fail(A8_ERROR_UNSUPPORTED, "rule %u is unknown", batch->rule);
  if (!aligned(batch->skip, 4)) return fail(A8_ERROR_ARGUMENT, "skip is not aligned to 4 bytes");
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
    if (adafactor || a8_rule_has_norm(batch->rule))
      if (int32_t status = check_scratch(exec, i, batch->tensors[i])) return status;
  }
  return A8_OK;
}

int32_t check_screen(const a8_exec* exec, const a8_batch* batch, const float* scale, const float* found) {
  if (int32_t status = check_tables(exec, batch, false)) return status;
  if (!found || !aligned(found, 4) || !aligned(scale, 4))
    return fail(A8_ERROR_ARGUMENT, "found is null, or found or scale is not aligned to 4 bytes");
  for (uint32_t i = 0; i < batch->tensor_count; ++i)
    if (int32_t status = check_gradient(i, batch->tensors[i])) return status;
  for (uint32_t i = 0; i < batch->chunk_count; ++i)
    if (batch->chunks[i].tensor >= batch->tensor_count ||
        (int64_t)batch->chunks[i].part * A8_CHUNK >= batch->tensors[batch->chunks[i].tensor].numel)
      return fail(A8_ERROR_ARGUMENT, "chunk %u is outside its tensor", i);
  return A8_OK;
}

// --- Running. ---

bool skipped(const a8_batch* batch) { return batch->skip && *batch->skip != 0.0f; }

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
    const uint32_t ops = A8_OP_CODEC | A8_OP_ELEMENTWISE | A8_OP_ADAFACTOR | A8_OP_READER;
    if (int32_t status = fill_info(info, "cpu", ops)) return status;
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

A8_EXPORT int32_t a8_draw(a8_exec* exec, void* values, int64_t numel, uint32_t dtype, const int64_t* taken,
                          const int64_t* before, int64_t gap, uint32_t seed_low, uint32_t seed_high,
                          uint32_t noise_id) {
  return guarded([&] {
    if (int32_t status = check_draw(exec, values, numel, dtype, taken, before, gap)) return status;
    exec->isa_ran = 0;
    int64_t interval = *taken / gap;
    if (before && *before / gap == interval) return (int32_t)A8_OK;
    a8_noise key = a8_noise_key(seed_low, seed_high, (uint32_t)interval, noise_id);
    for (int64_t e = 0; e < numel; e += 2) {
      float x[2];
      a8_draw_pair(key, (uint32_t)(e / 2), &x[0], &x[1]);
      for (int i = 0; i < 2 && e + i < numel; ++i) {
        if (dtype == A8_F32)
          static_cast<float*>(values)[e + i] = x[i];
        else
          static_cast<uint16_t*>(values)[e + i] = (uint16_t)(a8_bits(x[i]) >> 16);
      }
    }
    return (int32_t)A8_OK;
  });
}

A8_EXPORT int32_t a8_screen(a8_exec* exec, const a8_batch* batch, const float* scale, float* found) {
  return guarded([&] {
    if (int32_t status = check_screen(exec, batch, scale, found)) return status;
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
    if (skipped(batch)) return (int32_t)A8_OK;
    a8_job job = {batch, nullptr, static_cast<float*>(exec->scratch), nullptr, nullptr};
    if (phases & A8_NORM && a8_rule_has_norm(batch->rule)) {
      a8_parallel(threads_of(exec), 0, batch->chunk_count, kernels->measure, &job);
      a8_parallel(threads_of(exec), 0, batch->tensor_count, kernels->totals, &job);
    }
    if (phases & A8_APPLY) a8_parallel(threads_of(exec), 0, batch->chunk_count, kernels->elementwise, &job);
    return (int32_t)A8_OK;
  });
}

A8_EXPORT int32_t a8_adafactor(a8_exec* exec, const a8_batch* batch, uint32_t phases) {
  return guarded([&] {
    if (phases & ~(uint32_t)A8_ALL_PHASES) return fail(A8_ERROR_ARGUMENT, "phases 0x%x", phases);
    if (int32_t status = check_batch(exec, batch, true)) return status;
    const a8_kernels* kernels = choose(exec);
    if (!kernels) return no_such_isa(exec);
    if (skipped(batch)) return (int32_t)A8_OK;
    a8_job job = {batch, nullptr, static_cast<float*>(exec->scratch), nullptr, nullptr};
    a8_run_adafactor(kernels, threads_of(exec), &job, phases);
    return (int32_t)A8_OK;
  });
}

A8_EXPORT int32_t a8_read_tensors(const a8_interpreter* python, void* params, void* grads, uint32_t count,
                                  int64_t* facts, uint32_t fact_count, uint64_t* addresses, uint32_t learns) {
  a8_message[0] = 0;
  if (!python || !params || !grads || (count && (!facts || !addresses)))
    return fail(A8_ERROR_ARGUMENT, "python, params, grads, facts or addresses is null");
  bool same = a8_same_tensors(python, params, grads, count, facts, fact_count, addresses, learns != 0);
  return same ? (int32_t)A8_OK : fail(A8_ERROR_ARGUMENT, "a tensor is missing, or not what it was");
}

A8_EXPORT int32_t a8_read_values(const a8_interpreter* python, void* dicts, uint32_t count, void* values,
                                 uint32_t value_count) {
  a8_message[0] = 0;
  if (!python || !dicts || !values) return fail(A8_ERROR_ARGUMENT, "python, dicts or values is null");
  bool same = a8_same_values(python, dicts, values, count, value_count);
  return same ? (int32_t)A8_OK : fail(A8_ERROR_ARGUMENT, "a value is not the one that it was");
}
