// A library that speaks the ABI and computes nothing. Each -D breaks one thing, for the loader's fault tests.
#include "a8/abi.h"
#include "a8/geometry.h"

#ifndef STUB_ABI_VERSION
#define STUB_ABI_VERSION A8_ABI_VERSION
#endif
#ifndef STUB_BACKEND
#define STUB_BACKEND "cpu"
#endif
#ifndef STUB_CHUNK
#define STUB_CHUNK A8_CHUNK
#endif
#ifndef STUB_INFO_STATUS
#define STUB_INFO_STATUS A8_OK
#endif
#ifndef STUB_OPS
#define STUB_OPS (A8_OP_CODEC | A8_OP_ELEMENTWISE | A8_OP_ADAFACTOR)
#endif
#ifndef STUB_TOOLKIT
#define STUB_TOOLKIT 12080
#endif
#ifndef STUB_ARCHITECTURES
#define STUB_ARCHITECTURES "sm_75 sm_90"
#endif
#ifndef STUB_EXTRA_TENSOR_BYTES
#define STUB_EXTRA_TENSOR_BYTES 0
#endif

static thread_local char message[64];

static int32_t fail(int32_t status, const char* text) {
  strcpy(message, text);
  return status;
}

#if !defined(STUB_NO_GET_INFO)
A8_EXPORT int32_t a8_get_info(a8_info* info) {
  if (STUB_INFO_STATUS != A8_OK) return fail(STUB_INFO_STATUS, "the stub was told to fail");
#if defined(STUB_INFO_BYTES)
  memset(info, 0x7f, STUB_INFO_BYTES);  // what a library with a longer a8_info does to its caller
#endif
  memset(info, 0, sizeof *info);
  info->abi_version = STUB_ABI_VERSION;
  info->ops = STUB_OPS;
  info->sizeof_info = sizeof(a8_info);
  info->sizeof_exec = sizeof(a8_exec);
  info->sizeof_hyper = sizeof(a8_hyper);
  info->sizeof_tensor = sizeof(a8_tensor) + STUB_EXTRA_TENSOR_BYTES;
  info->sizeof_chunk = sizeof(a8_chunk);
  info->sizeof_batch = sizeof(a8_batch);
  info->sizeof_codec = sizeof(a8_codec);
  info->sizeof_schedule = sizeof(a8_schedule);
  info->sizeof_interpreter = sizeof(a8_interpreter);
  info->chunk = STUB_CHUNK;
  info->tile_rows = A8_TILE_ROWS;
  info->tile_cols = A8_TILE_COLS;
  info->isa_built = 1u << A8_ISA_BASELINE | 1u << A8_ISA_AVX2 | 1u << A8_ISA_AVX512;
  info->isa_usable = 1u << A8_ISA_BASELINE | 1u << A8_ISA_AVX2;
  info->isa_best = A8_ISA_AVX2;
  info->toolkit = STUB_TOOLKIT;
  strcpy(info->backend, STUB_BACKEND);
  strcpy(info->version, "9.8.7");
  strcpy(info->architectures, STUB_ARCHITECTURES);
  return A8_OK;
}
#endif

A8_EXPORT const char* a8_last_error(void) { return message; }

A8_EXPORT int32_t a8_quantize(a8_exec*, const a8_codec*) { return fail(A8_ERROR_ARGUMENT, "tensor 3: codes is null"); }

A8_EXPORT int32_t a8_dequantize(a8_exec* exec, const a8_codec* codec) {
  exec->isa_ran = codec->block_size;
  return A8_OK;
}

A8_EXPORT int32_t a8_derive(a8_exec*, const a8_schedule*, a8_hyper*, uint32_t, uint32_t) { return A8_OK; }

A8_EXPORT int32_t a8_screen(a8_exec*, const a8_batch*, const float*, float*) { return A8_OK; }

#if !defined(STUB_NO_ELEMENTWISE)
A8_EXPORT int32_t a8_elementwise(a8_exec*, const a8_batch*, uint32_t) { return fail(77, ""); }
#endif

#if !defined(STUB_NO_ADAFACTOR)
A8_EXPORT int32_t a8_draw(a8_exec*, void*, int64_t, uint32_t, const int64_t*, const int64_t*, int64_t, uint32_t,
                          uint32_t, uint32_t) {
  return A8_OK;
}

A8_EXPORT int32_t a8_adafactor(a8_exec* exec, const a8_batch*, uint32_t phases) {
  exec->isa_ran = phases;
  return A8_OK;
}
#endif
