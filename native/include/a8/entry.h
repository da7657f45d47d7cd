// What the C entries of every library share: the thread's error message, the handshake, checks of single arguments.
// Host code only, included by each library's abi file and nothing else.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "abi.h"
#include "geometry.h"

static_assert(A8_CHUNK % A8_MAX_BLOCK == 0, "a block never crosses a chunk");
static_assert(A8_TILE_COLS % A8_LANES == 0 && A8_CHUNK % A8_LANES == 0, "accumulators restart at a tile");
static_assert(sizeof(a8_tensor) == 184 && sizeof(a8_hyper) == 96 && sizeof(a8_schedule) == 104, "no hidden padding");

namespace {

thread_local char a8_message[512];

// Sets the message of a8_last_error; returns the status, so that an entry can end with it.
inline int32_t fail(int32_t status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(a8_message, sizeof a8_message, format, arguments);
  va_end(arguments);
  return status;
}

// The fields that mean the same in every library; the others are zero.
inline int32_t fill_info(a8_info* info, const char* backend, uint32_t ops) {
  if (!info) return fail(A8_ERROR_ARGUMENT, "info is null");
  memset(info, 0, sizeof *info);
  info->abi_version = A8_ABI_VERSION;
  info->ops = ops;
  info->sizeof_info = sizeof(a8_info);
  info->sizeof_exec = sizeof(a8_exec);
  info->sizeof_hyper = sizeof(a8_hyper);
  info->sizeof_tensor = sizeof(a8_tensor);
  info->sizeof_chunk = sizeof(a8_chunk);
  info->sizeof_batch = sizeof(a8_batch);
  info->sizeof_codec = sizeof(a8_codec);
  info->sizeof_schedule = sizeof(a8_schedule);
  info->sizeof_interpreter = sizeof(a8_interpreter);
  info->chunk = A8_CHUNK;
  info->tile_rows = A8_TILE_ROWS;
  info->tile_cols = A8_TILE_COLS;
  snprintf(info->backend, sizeof info->backend, "%s", backend);
  snprintf(info->version, sizeof info->version, "%s", A8_VERSION);
  return A8_OK;
}

inline bool quantised(uint8_t format) { return format == A8_INT8 || format == A8_NF4 || format == A8_LOG8; }
inline bool aligned(const void* pointer, uintptr_t to) { return reinterpret_cast<uintptr_t>(pointer) % to == 0; }
inline bool good_block(uint32_t size) {
  return size >= A8_MIN_BLOCK && size <= A8_MAX_BLOCK && (size & (size - 1)) == 0;
}
inline uintptr_t dtype_bytes(uint8_t dtype) { return dtype == A8_F32 ? 4 : 2; }

inline int32_t check_codec(const a8_exec* exec, const a8_codec* codec) {
  if (!exec || !codec) return fail(A8_ERROR_ARGUMENT, "exec or codec is null");
  if (codec->numel == 0) return A8_OK;
  if (!quantised(codec->format) || codec->dtype > A8_F16)
    return fail(A8_ERROR_UNSUPPORTED, "format %u or dtype %u", codec->format, codec->dtype);
  if (codec->numel < 0 || !codec->values || !codec->codes || !codec->blocks ||
      !aligned(codec->values, dtype_bytes(codec->dtype)) || !aligned(codec->blocks, 4))
    return fail(A8_ERROR_ARGUMENT, "values, codes or blocks is null, misaligned, or numel %lld is negative",
                (long long)codec->numel);
  if (!good_block(codec->block_size))
    return fail(A8_ERROR_ARGUMENT, "block_size %u is not a power of two from %d to %d", codec->block_size, A8_MIN_BLOCK,
                A8_MAX_BLOCK);
  return A8_OK;
}

inline int32_t check_derive(const a8_exec* exec, const a8_schedule* from, const a8_hyper* to, uint32_t count,
                            uint32_t advance) {
  if (!exec || (count && (!from || !to))) return fail(A8_ERROR_ARGUMENT, "exec, schedules or hypers is null");
  if (!aligned(from, 8) || !aligned(to, 8))
    return fail(A8_ERROR_ARGUMENT, "schedules or hypers is not aligned to 8 bytes");
  if (advance > 1) return fail(A8_ERROR_ARGUMENT, "advance is %u, not 0 or 1", advance);
  return A8_OK;
}

inline int32_t check_upload(const a8_exec* exec, const void* from, const void* to, uint32_t bytes) {
  if (!exec || (bytes && (!from || !to))) return fail(A8_ERROR_ARGUMENT, "exec, from or to is null");
  if (!aligned(from, 4) || !aligned(to, 4)) return fail(A8_ERROR_ARGUMENT, "from or to is not aligned to 4 bytes");
  if (bytes % 4 || bytes > A8_UPLOAD_BYTES)
    return fail(A8_ERROR_ARGUMENT, "%u bytes: not a multiple of 4, or more than %d", bytes, A8_UPLOAD_BYTES);
  return A8_OK;
}

inline int32_t check_draw(const a8_exec* exec, const void* values, int64_t numel, uint32_t dtype, const int64_t* taken,
                          const int64_t* before, int64_t gap) {
  if (!exec || !values || !taken) return fail(A8_ERROR_ARGUMENT, "exec, values or taken is null");
  if (dtype != A8_F32 && dtype != A8_BF16) return fail(A8_ERROR_UNSUPPORTED, "dtype %u", dtype);
  if (!aligned(values, dtype_bytes((uint8_t)dtype)) || !aligned(taken, 8) || !aligned(before, 8))
    return fail(A8_ERROR_ARGUMENT, "values, taken or before is misaligned");
  // Pairs are counted in 32 bits.
  if (numel < 0 || numel > (1LL << 33) || gap < 1)
    return fail(A8_ERROR_ARGUMENT, "numel %lld or gap %lld", (long long)numel, (long long)gap);
  return A8_OK;
}

}  // namespace

A8_EXPORT const char* a8_last_error(void) { return a8_message; }
