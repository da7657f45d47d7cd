// The C interface of liba8multi_cpu and liba8multi_cuda: the only one there is. loader/structs.py and
// loader/signatures.py mirror this file and a test compares them with it, so keep one declaration a line.
//
// Every entry returns an a8_status. None throws, exits, prints, synchronises with a device, or keeps a pointer after it
// returns (kernels in flight on exec->stream excepted). a8_last_error() belongs to the calling thread.
#pragma once

#include "types.h"

#define A8_ABI_VERSION 1

enum a8_status {
  A8_OK = 0,
  A8_ERROR_ARGUMENT = 1,
  A8_ERROR_UNSUPPORTED = 2,
  A8_ERROR_MEMORY = 3,
  A8_ERROR_DEVICE = 4,
  A8_ERROR_INTERNAL = 5
};

// Types of parameters and gradients.
enum a8_dtype { A8_F32 = 0, A8_BF16 = 1, A8_F16 = 2 };

// How a moment is stored. FACTORED: row and column means in float32.
enum a8_format {
  A8_NONE = 0,
  A8_STATE_F32 = 1,
  A8_STATE_BF16 = 2,
  A8_INT8 = 3,
  A8_NF4 = 4,
  A8_LOG8 = 5,
  A8_FACTORED = 6
};

// Instruction-set variants of the CPU library; A8_ISA_AUTO picks the best that the processor and the OS support.
enum a8_isa { A8_ISA_AUTO = 0, A8_ISA_BASELINE = 1, A8_ISA_AVX2 = 2, A8_ISA_AVX512 = 3, A8_ISA_NEON = 4 };

// Bits of a8_info.ops: what this library can do.
enum a8_op { A8_OP_CODEC = 1, A8_OP_ADAM = 2, A8_OP_ADAFACTOR = 4 };

// Bits of a8_hyper.flags.
enum a8_flag {
  A8_MAXIMIZE = 1,
  A8_L2_DECAY = 2,
  A8_STOCHASTIC_STATE = 4,
  A8_STOCHASTIC_WRITE = 8,
  A8_SCALE_PARAMETER = 16,
  A8_SCALE_DECAY = 32
};

// Bits of a8_tensor.flags. SQUARES_KNOWN: since the last apply phase on this scratch nobody has written the parameter, as
// far as the caller knows; the kernels look at a sample of it and then trust the sums of p^2 that apply left.
enum a8_tensor_flag { A8_SQUARES_KNOWN = 1 };

// Bits of a8_schedule.rules: what of a8_hyper follows from the step, and how (schedule.h). t: the step, counted from 1.
// ADAM_BIAS: bias1 = 1 / (1 - beta1^t), bias2 = 1 / sqrt(1 - beta2^t). BETA2_DECAYS: one_minus_beta2 = t^beta2_decay.
// CORRECT_BIAS: bias1 = sqrt(1 - beta2^t) / (1 - beta1^t), without the root if beta2 decays. RELATIVE_STEP: bias2 = 1 / sqrt(t).
enum a8_schedule_rule { A8_ADAM_BIAS = 1, A8_BETA2_DECAYS = 2, A8_CORRECT_BIAS = 4, A8_RELATIVE_STEP = 8 };

// Phases of an Adafactor step, in order. A caller may run them one by one, with a collective on the scratch between.
enum a8_phase { A8_REDUCE = 1, A8_MOMENTS = 2, A8_NORM = 4, A8_APPLY = 8, A8_ALL_PHASES = 15 };

// What a library is. Filled by a8_get_info; sizes let the caller refuse a library built from another header.
typedef struct a8_info {
  uint32_t abi_version;
  uint32_t ops;
  uint32_t sizeof_info;
  uint32_t sizeof_exec;
  uint32_t sizeof_hyper;
  uint32_t sizeof_tensor;
  uint32_t sizeof_chunk;
  uint32_t sizeof_batch;
  uint32_t sizeof_codec;
  uint32_t sizeof_schedule;
  uint32_t chunk;
  uint32_t tile_rows;
  uint32_t tile_cols;
  uint32_t isa_built;
  uint32_t isa_usable;
  uint32_t isa_best;
  uint32_t toolkit;
  char backend[16];
  char version[32];
  char architectures[128];
} a8_info;

// Where and how to run. isa_ran is written back: the variant whose code ran (an a8_isa; 0 on a GPU).
typedef struct a8_exec {
  int32_t device;
  uint32_t threads;
  uint32_t isa;
  uint32_t isa_ran;
  void* stream;
  void* scratch;
  int64_t scratch_bytes;
} a8_exec;

// Hyper-parameters of the tensors that share them (one group at one step). Derived in double by the caller, rounded once.
// lr_device, when not null, replaces lr by a float in device memory, so that a captured graph can replay with a new one.
typedef struct a8_hyper {
  float lr;
  float beta1;
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float eps;
  float eps2;
  float weight_decay;
  float bias1;
  float bias2;
  float clip;
  uint32_t flags;
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t step;
  uint32_t reserved;
  const float* lr_device;
} a8_hyper;

// One parameter with its gradient and state, all contiguous. Not used: null.
// first: int8 [numel], nf4 uint8 [ceil(numel / 2)], float32 or bfloat16 [numel]; first_block: float32 [blocks].
// second: log8 uint8 [numel] with second_block int32 [blocks], or float32 [numel]; FACTORED: float32 row means [rows],
// second_block float32 column means [cols], and partial sums at the *_at offsets (in floats) of the scratch: row sums
// [tiles across, rows], column sums [tiles down, cols], and at sum_at the totals of p^2 and u^2, then for each chunk its sum
// of p^2, for each its sum of u^2, for each its fingerprint (a8_fingerprint). Scratch is kept from step to step.
typedef struct a8_tensor {
  void* param;
  const void* grad;
  void* first;
  void* first_block;
  void* second;
  void* second_block;
  int64_t numel;
  int64_t rows;
  int64_t cols;
  int64_t chunk_at;
  int64_t tile_at;
  int64_t row_at;
  int64_t col_at;
  int64_t sum_at;
  uint32_t chunks;
  uint32_t tiles;
  uint32_t hyper;
  uint32_t noise_id;
  uint32_t first_block_size;
  uint32_t second_block_size;
  uint8_t param_dtype;
  uint8_t grad_dtype;
  uint8_t first_format;
  uint8_t second_format;
  uint32_t flags;
} a8_tensor;

// Unit of work: part number `part` of tensor `tensor`.
typedef struct a8_chunk {
  uint32_t tensor;
  uint32_t part;
} a8_chunk;

// All tensors of a step on one device. chunks: every A8_CHUNK elements of every tensor; tiles: every
// A8_TILE_ROWS x A8_TILE_COLS of every factored one, row tiles outermost. Both sorted by tensor, then part.
// On a GPU every pointer here is a device address.
typedef struct a8_batch {
  const a8_tensor* tensors;
  const a8_chunk* chunks;
  const a8_chunk* tiles;
  const a8_hyper* hypers;
  uint32_t tensor_count;
  uint32_t chunk_count;
  uint32_t tile_count;
  uint32_t hyper_count;
} a8_batch;

// One array to quantise or dequantise. values: [numel] of `dtype`; codes and blocks as in a8_tensor.
typedef struct a8_codec {
  void* values;
  void* codes;
  void* blocks;
  int64_t numel;
  uint32_t block_size;
  uint32_t stochastic;
  uint32_t seed_low;
  uint32_t seed_high;
  uint8_t dtype;
  uint8_t format;
  uint16_t reserved;
  uint32_t reserved2;
} a8_codec;

// What a8_derive needs for one row of hypers. step: the counter of steps, where the kernels run; null: the row stays as the
// caller wrote it.
typedef struct a8_schedule {
  int64_t* step;
  double beta1;
  double beta2;
  double beta2_decay;
  uint32_t rules;
  uint32_t reserved;
} a8_schedule;

#if defined(_WIN32)
#define A8_EXPORT extern "C" __declspec(dllexport)
#else
#define A8_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// a8_derive: for each of `count` rows, adds `advance` to its counter (1, or 0 when an earlier call of the same step has done
// so) and writes the fields that follow from the step. On a GPU every pointer is a device address, so that a captured graph
// counts by itself.
#if !defined(__CUDACC_RTC__)
A8_EXPORT int32_t a8_get_info(a8_info* info);
A8_EXPORT const char* a8_last_error(void);
A8_EXPORT int32_t a8_quantize(a8_exec* exec, const a8_codec* codec);
A8_EXPORT int32_t a8_dequantize(a8_exec* exec, const a8_codec* codec);
A8_EXPORT int32_t a8_derive(a8_exec* exec, const a8_schedule* from, a8_hyper* to, uint32_t count, uint32_t advance);
A8_EXPORT int32_t a8_adam(a8_exec* exec, const a8_batch* batch);
A8_EXPORT int32_t a8_adafactor(a8_exec* exec, const a8_batch* batch, uint32_t phases);
#endif
