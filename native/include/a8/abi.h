// The C interface of liba8multi_cpu and liba8multi_cuda: the only one there is. loader/structs.py and
// loader/signatures.py mirror this file and a test compares them with it, so keep one field a line.
//
// Every entry returns an a8_status. None throws, exits, prints, synchronises with a device, or keeps a pointer after it
// returns (kernels in flight on exec->stream excepted). a8_last_error() belongs to the calling thread.
#pragma once

#include "types.h"

#define A8_ABI_VERSION 3

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
enum a8_op { A8_OP_CODEC = 1, A8_OP_ELEMENTWISE = 2, A8_OP_ADAFACTOR = 4, A8_OP_READER = 8, A8_OP_UPLOAD = 16 };

// a8_batch.rule: what a8_elementwise does to an element (rules.h has the formulas and their sources).
enum a8_rule_kind {
  A8_ADAM = 0,
  A8_LION = 1,
  A8_RMSPROP = 2,
  A8_SGD = 3,
  A8_ADAGRAD = 4,
  A8_ADEMAMIX = 5,
  A8_LAMB = 6,
  A8_LARS = 7
};

// Bits of a8_hyper.flags. NESTEROV: of SGD and LARS. AVERAGE_UPDATE (Adafactor): the first moment averages the clipped
// update, as CAME does, not the gradient.
enum a8_flag {
  A8_MAXIMIZE = 1,
  A8_L2_DECAY = 2,
  A8_STOCHASTIC_STATE = 4,
  A8_STOCHASTIC_WRITE = 8,
  A8_SCALE_PARAMETER = 16,
  A8_SCALE_DECAY = 32,
  A8_NESTEROV = 64,
  A8_AVERAGE_UPDATE = 128
};

// Bits of a8_tensor.flags. SQUARES_KNOWN: since the last apply phase on this scratch nobody has written the parameter,
// as far as the caller knows; the kernels look at a sample of it and then trust the sums of p^2 that apply left.
enum a8_tensor_flag { A8_SQUARES_KNOWN = 1 };

// Bits of a8_schedule.rules: what of a8_hyper follows from the step, and how (schedule.h). t: the step, counted from 1.
// ADAM_BIAS: bias1 = 1 / (1 - beta1^t), bias2 = 1 / sqrt(1 - beta2^t). BETA2_DECAYS: one_minus_beta2 = t^beta2_decay.
// CORRECT_BIAS: bias1 = sqrt(1 - beta2^t) / (1 - beta1^t), without the root if beta2 decays. RELATIVE_STEP: bias2 = 1 /
// sqrt(t). UNBIASED: bias1 = bias2 = 1. LR_DECAYS: bias1 = 1 / (1 + (t - 1) * decay). FIRST_WHOLE: one_minus_beta1 = 1
// at t = 1, then 1 - decay. MIX_WARMS_UP, BETA3_WARMS_UP: AdEMAMix's mix and beta3 grow to their values until t =
// mix_steps, beta3_steps.
enum a8_schedule_rule {
  A8_ADAM_BIAS = 1,
  A8_BETA2_DECAYS = 2,
  A8_CORRECT_BIAS = 4,
  A8_RELATIVE_STEP = 8,
  A8_UNBIASED = 16,
  A8_LR_DECAYS = 32,
  A8_FIRST_WHOLE = 64,
  A8_MIX_WARMS_UP = 128,
  A8_BETA3_WARMS_UP = 256
};

// Phases of a step, in the order in which one call runs those asked for. A caller may run them one by one, with a
// collective on the scratch between. Adafactor: REDUCE sums g^2 over rows and columns, MOMENTS makes the factors of 1 /
// sqrt(v), NORM sums p^2 and u^2, RESIDUAL sums CAME's (u - m)^2 over rows and columns, CONFIDENCE makes the factors of
// 1 / sqrt(s), LIMIT sums the squares of the update as it is after that, APPLY writes. Of tensors without
// AVERAGE_UPDATE, RESIDUAL and CONFIDENCE come before NORM, and CONFIDENCE makes the factors of 1 / sqrt(v s) in the
// place of those of v; LIMIT is only of those with it. Element-wise rules have NORM (of those that need it) and APPLY.
enum a8_phase {
  A8_REDUCE = 1,
  A8_MOMENTS = 2,
  A8_NORM = 4,
  A8_RESIDUAL = 8,
  A8_CONFIDENCE = 16,
  A8_LIMIT = 32,
  A8_APPLY = 64,
  A8_ALL_PHASES = 127
};

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
  uint32_t sizeof_interpreter;
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

// Hyper-parameters of the tensors that share them (one group at one step). Derived in double by the caller, rounded
// once. lr_device, when not null, replaces lr by a float in device memory, so that a captured graph can replay with a
// new one. eps2 bounds RMS(p) from below, eps3 is added to CAME's squared residual; growth: 1 + margin of the
// norm-growth limiter; mix: weight of AdEMAMix's slow average; trust: LARS's coefficient.
typedef struct a8_hyper {
  float lr;
  float beta1;
  float beta2;
  float beta3;
  float one_minus_beta1;
  float one_minus_beta2;
  float one_minus_beta3;
  float eps;
  float eps2;
  float eps3;
  float weight_decay;
  float bias1;
  float bias2;
  float clip;
  float growth;
  float mix;
  float trust;
  uint32_t flags;
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t step;
  uint32_t reserved;
  const float* lr_device;
} a8_hyper;

// One parameter with its gradient and state, all contiguous. Not used: null, and format NONE.
// first: int8 [numel], nf4 uint8 [ceil(numel / 2)], float32 or bfloat16 [numel]; first_block: float32 [blocks].
// second: log8 uint8 [numel] with second_block int32 [blocks], or float32 [numel]; FACTORED: float32 row means [rows],
// second_block float32 column means [cols].
// third: of an element-wise rule AdEMAMix's slow average or RMSprop's average gradient, in the formats of `first`; of
// Adafactor CAME's confidence, FACTORED like `second`.
// limiter: float32 [1], the norm of the last update, 0 before the first; null: its growth is not limited.
// Scratch, by offsets in floats, kept from step to step: partial row sums [tiles across, rows] at row_at and column
// sums [tiles down, cols] at col_at; the same for the confidence at residual_at, its columns from the next multiple of
// 4 on; at sum_at A8_TOTALS totals (geometry.h), then for each chunk its sum of p^2, for each its sum of u^2, for each
// its fingerprint (a8_fingerprint).
typedef struct a8_tensor {
  void* param;
  const void* grad;
  void* first;
  void* first_block;
  void* second;
  void* second_block;
  void* third;
  void* third_block;
  float* limiter;
  int64_t numel;
  int64_t rows;
  int64_t cols;
  int64_t chunk_at;
  int64_t tile_at;
  int64_t row_at;
  int64_t col_at;
  int64_t residual_at;
  int64_t sum_at;
  uint32_t chunks;
  uint32_t tiles;
  uint32_t hyper;
  uint32_t noise_id;
  uint32_t first_block_size;
  uint32_t second_block_size;
  uint32_t third_block_size;
  uint32_t flags;
  uint8_t param_dtype;
  uint8_t grad_dtype;
  uint8_t first_format;
  uint8_t second_format;
  uint8_t third_format;
  uint8_t reserved;
  uint16_t reserved2;
} a8_tensor;

// Unit of work: part number `part` of tensor `tensor`.
typedef struct a8_chunk {
  uint32_t tensor;
  uint32_t part;
} a8_chunk;

enum a8_batch_hint {
  // Few elements have an int8 first and, if any, a log8 second moment, in blocks of A8_USUAL_BLOCK, and a gradient of
  // the parameter's type or float32.
  A8_OTHER_FORMATS = 1
};

// All tensors of a step on one device. chunks: every A8_CHUNK elements of every tensor; tiles: every
// A8_TILE_ROWS x A8_TILE_COLS of every factored one, row tiles outermost. Both sorted by tensor, then part.
// On a GPU every pointer here is a device address, and the tensors' chunks may lie in any order of the tensors, each
// tensor's together and by part. factored_chunks: so many, and no others, are of factored tensors, and they come first;
// 0: not known, they may be anywhere. Not read on a CPU. skip: when not null and not 0 the step writes nothing. hints:
// of a8_batch_hint, what the host knows of the tables; any value gives the same bits.
typedef struct a8_batch {
  const a8_tensor* tensors;
  const a8_chunk* chunks;
  const a8_chunk* tiles;
  const a8_hyper* hypers;
  const float* skip;
  uint32_t tensor_count;
  uint32_t chunk_count;
  uint32_t tile_count;
  uint32_t hyper_count;
  uint32_t factored_chunks;
  uint32_t rule;
  uint32_t hints;
  uint32_t reserved;
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

// What a8_derive needs for one row of hypers. step: the counter of steps, where the kernels run; null: the row stays as
// the caller wrote it.
// beta3, mix: AdEMAMix's final values; first_half, last_half: log(1/2) / log(beta) of the beta from which beta3 grows,
// and of the last. decay: of LR_DECAYS, or SGD's dampening.
// skip: as of a8_batch; a step that is skipped is not counted.
typedef struct a8_schedule {
  int64_t* step;
  const float* skip;
  double beta1;
  double beta2;
  double beta3;
  double beta2_decay;
  double mix;
  double mix_steps;
  double beta3_steps;
  double first_half;
  double last_half;
  double decay;
  uint32_t rules;
  uint32_t reserved;
} a8_schedule;

// What the reader needs of the running interpreter and of torch: addresses of functions, and of two objects. look: the
// function dltensor_from_py_object_no_sync of the capsule torch.Tensor.__dlpack_c_exchange_api__; grad: the string.
typedef struct a8_interpreter {
  const void* list_item;
  const void* put_item;
  const void* attribute;
  const void* next_entry;
  const void* look;
  const void* none;
  const void* grad;
} a8_interpreter;

#if defined(_WIN32)
#define A8_EXPORT extern "C" __declspec(dllexport)
#else
#define A8_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// a8_derive: for each of `count` rows, adds `advance` to its counter (1, or 0 when an earlier call of the same step has
// done so) and writes the fields that follow from the step. On a GPU every pointer is a device address, so that a
// captured graph counts by itself.
// a8_draw: `numel` numbers of APOLLO's random matrix, A8_F32 or A8_BF16, for parameters that have taken *taken steps:
// that of interval *taken / gap, of noise stream `noise_id`. before: the *taken with which `values` was drawn last;
// when that was in the same interval, nothing is written. Null: they are drawn. On a GPU both are device addresses.
// a8_screen: divides every gradient of the batch by *scale, in place (scale null: leaves them), and sets *found to 1
// when one is not finite afterwards; else *found stays. Only chunks, grad, grad_dtype and numel are looked at.
// a8_read_tensors: of a list of `count` tensors and of their gradients, which are put into a list of as many, the
// addresses: first the parameters', then the gradients'. An error when type, device, shape or strides of one are not
// those of `facts`; with `learns` they become the facts: 2 + 2 for each dimension, of each parameter and gradient in
// turn. a8_read_values: an error unless the values of `count` dictionaries, one after the other, are the very objects
// of a list. Both are called with the interpreter's lock held; objects of Python are borrowed, and an exception of
// Python's may be set when they return.
// a8_upload (of a GPU's library only): copies `bytes` of host memory, a multiple of 4 and at most A8_UPLOAD_BYTES
// (geometry.h), to device memory in stream order, as arguments of a kernel: nothing is allocated, and the caller may
// write `from` again at once. Both are aligned to 4 bytes.
#if !defined(__CUDACC_RTC__)
A8_EXPORT int32_t a8_get_info(a8_info* info);
A8_EXPORT const char* a8_last_error(void);
A8_EXPORT int32_t a8_quantize(a8_exec* exec, const a8_codec* codec);
A8_EXPORT int32_t a8_dequantize(a8_exec* exec, const a8_codec* codec);
A8_EXPORT int32_t a8_derive(a8_exec* exec, const a8_schedule* from, a8_hyper* to, uint32_t count, uint32_t advance);
A8_EXPORT int32_t a8_screen(a8_exec* exec, const a8_batch* batch, const float* scale, float* found);
A8_EXPORT int32_t a8_elementwise(a8_exec* exec, const a8_batch* batch, uint32_t phases);
A8_EXPORT int32_t a8_draw(a8_exec* exec, void* values, int64_t numel, uint32_t dtype, const int64_t* taken,
                          const int64_t* before, int64_t gap, uint32_t seed_low, uint32_t seed_high, uint32_t noise_id);
A8_EXPORT int32_t a8_adafactor(a8_exec* exec, const a8_batch* batch, uint32_t phases);
A8_EXPORT int32_t a8_read_tensors(const a8_interpreter* python, void* params, void* grads, uint32_t count,
                                  int64_t* facts, uint32_t fact_count, uint64_t* addresses, uint32_t learns);
A8_EXPORT int32_t a8_read_values(const a8_interpreter* python, void* dicts, uint32_t count, void* values,
                                 uint32_t value_count);
A8_EXPORT int32_t a8_upload(a8_exec* exec, const void* from, void* to, uint32_t bytes);
#endif
