// The C entries of the CUDA library: check what the host can see, launch on the caller's stream, report launch errors.
// Nothing here synchronises or allocates. The tables of a batch are device memory: their contents are the caller's
// promise. Declarations and their promises: a8/abi.h.
#include <cuda_runtime_api.h>

#include "a8/entry.h"
#include "kernels/adafactor.cuh"
#include "kernels/adam.cuh"
#include "kernels/codec.cuh"
#include "kernels/draw.cuh"
#include "kernels/element.cuh"
#include "kernels/measure.cuh"
#include "kernels/momentum.cuh"
#include "kernels/schedule.cuh"
#include "kernels/screen.cuh"
#include "kernels/totals.cuh"
#include "kernels/upload.cuh"

#ifndef A8_ARCHITECTURES
#define A8_ARCHITECTURES "unknown"
#endif

static_assert(A8_CHUNK / A8_UNIT <= 64, "the units of a chunk are the bits of one word");
namespace {

// cudaErrorNoKernelImageForDevice and its like mean that the library, not the call, is at fault.
int32_t fail_device(const a8_exec* exec, const char* what, cudaError_t error) {
  bool unsupported = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInsufficientDriver ||
                     error == cudaErrorUnsupportedPtxVersion;
  return fail(unsupported ? A8_ERROR_UNSUPPORTED : A8_ERROR_DEVICE, "%s on cuda:%d failed: %s: %s%s", what,
              exec->device, cudaGetErrorName(error), cudaGetErrorString(error),
              unsupported ? " (built for " A8_ARCHITECTURES "; rebuild for this device or update its driver)" : "");
}

// The caller's current device, restored at the end of an entry.
class Device {
 public:
  explicit Device(int32_t wanted) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != wanted) {
      status_ = cudaSetDevice(wanted);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~Device() {
    if (changed_) cudaSetDevice(before_);
    cudaGetLastError();  // a failed call above is reported once, not by the next launch
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

// Runs `launch` with exec's device current and turns its error into a status.
template <typename F>
int32_t on_device(a8_exec* exec, const char* what, F launch) {
  Device device(exec->device);
  if (device.status() != cudaSuccess) return fail_device(exec, "choosing the device", device.status());
  exec->isa_ran = 0;
  cudaError_t error = launch(static_cast<cudaStream_t>(exec->stream));
  return error == cudaSuccess ? (int32_t)A8_OK : fail_device(exec, what, error);
}

// Blocks of threads for `units` of work, `per_block` at a time: at most enough to fill any device a few times over.
uint32_t grid_for(int64_t units, int64_t per_block) {
  int64_t blocks = (units + per_block - 1) / per_block;
  return (uint32_t)(blocks < 8192 ? blocks : 8192);
}

int32_t run_codec(a8_exec* exec, const a8_codec* codec, bool quantize) {
  a8_message[0] = 0;
  if (int32_t status = check_codec(exec, codec)) return status;
  if (codec->numel == 0) return A8_OK;
  return on_device(exec, quantize ? "quantising" : "dequantising", [&](cudaStream_t stream) {
    if (quantize) {
      int64_t blocks = (codec->numel + codec->block_size - 1) / codec->block_size;
      a8_quantize_kernel<<<grid_for(blocks, A8_THREADS / 32), A8_THREADS, 0, stream>>>(*codec);
    } else {
      a8_dequantize_kernel<<<grid_for((codec->numel + 1) / 2, A8_THREADS), A8_THREADS, 0, stream>>>(*codec);
    }
    return cudaGetLastError();
  });
}

// Chunks of a group: as many as leave 24 groups to each block of threads that the device holds at once.
uint32_t group_for(int32_t device, uint32_t chunks) {
  int multiprocessors = 0;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  uint32_t group = chunks / ((uint32_t)multiprocessors * A8_ADAM_RESIDENT * 24 + 1);
  return group < 1 ? 1 : group > A8_MAX_GROUP ? A8_MAX_GROUP : group;
}

int32_t check_batch(const a8_exec* exec, const a8_batch* batch) {
  if (!exec || !batch) return fail(A8_ERROR_ARGUMENT, "exec or batch is null");
  if (batch->chunk_count == 0) return A8_OK;
  if (batch->tensor_count == 0 || batch->hyper_count == 0)
    return fail(A8_ERROR_ARGUMENT, "%u chunks of %u tensors with %u hyper-parameters", batch->chunk_count,
                batch->tensor_count, batch->hyper_count);
  if (batch->chunk_count < batch->tensor_count)
    return fail(A8_ERROR_ARGUMENT, "%u chunks cannot cover %u tensors", batch->chunk_count, batch->tensor_count);
  if (batch->chunk_count > 0x7fffffffu)
    return fail(A8_ERROR_UNSUPPORTED, "%u chunks: at most 2^31 - 1", batch->chunk_count);
  if (!batch->tensors || !batch->chunks || !batch->hypers || !aligned(batch->tensors, 8) ||
      !aligned(batch->chunks, 4) || !aligned(batch->hypers, 8))
    return fail(A8_ERROR_ARGUMENT, "a table of the batch is null or misaligned");
  return A8_OK;
}

int32_t check_step(const a8_exec* exec, const a8_batch* batch, uint32_t phases) {
  if (int32_t status = check_batch(exec, batch)) return status;
  if (phases & ~(uint32_t)A8_ALL_PHASES) return fail(A8_ERROR_ARGUMENT, "phases 0x%x", phases);
  if (!aligned(batch->skip, 4)) return fail(A8_ERROR_ARGUMENT, "skip is not aligned to 4 bytes");
  return A8_OK;
}

// What the host can see of the scratch: the tensors are in device memory. Every tensor has its totals and three numbers
// for each chunk there, every tile at least one row and one column.
int32_t check_scratch(const a8_exec* exec, int64_t tensors, int64_t chunks, int64_t tiles) {
  int64_t least = 4 * (A8_TOTALS * tensors + 3 * chunks + 2 * tiles);
  if (!exec->scratch || !aligned(exec->scratch, 4) || exec->scratch_bytes < least)
    return fail(A8_ERROR_ARGUMENT, "scratch is null, misaligned, or its %lld bytes are fewer than %lld",
                (long long)exec->scratch_bytes, (long long)least);
  return A8_OK;
}

int32_t check_elementwise(const a8_exec* exec, const a8_batch* batch, uint32_t phases) {
  if (int32_t status = check_step(exec, batch, phases)) return status;
  if (batch->rule > A8_LARS) return fail(A8_ERROR_UNSUPPORTED, "rule %u", batch->rule);
  if (batch->chunk_count == 0 || !(batch->rule == A8_LAMB || batch->rule == A8_LARS)) return A8_OK;
  return check_scratch(exec, batch->tensor_count, batch->chunk_count, 0);
}

int32_t check_adafactor(const a8_exec* exec, const a8_batch* batch, uint32_t phases) {
  if (int32_t status = check_step(exec, batch, phases)) return status;
  if (batch->chunk_count == 0) return A8_OK;
  if (batch->tile_count > 0x7fffffffu)
    return fail(A8_ERROR_UNSUPPORTED, "%u tiles: at most 2^31 - 1", batch->tile_count);
  if (batch->factored_chunks > batch->chunk_count)
    return fail(A8_ERROR_ARGUMENT, "factored_chunks %u of %u", batch->factored_chunks, batch->chunk_count);
  if (batch->tile_count && (!batch->tiles || !aligned(batch->tiles, 4)))
    return fail(A8_ERROR_ARGUMENT, "the table of tiles is null or misaligned");
  return check_scratch(exec, batch->tensor_count, batch->chunk_count, batch->tile_count);
}

cudaError_t launch_elementwise(const a8_exec* exec, const a8_batch& batch, uint32_t phases, cudaStream_t stream) {
  float* scratch = static_cast<float*>(exec->scratch);
  if (phases & A8_NORM && (batch.rule == A8_LAMB || batch.rule == A8_LARS)) {
    a8_measure_kernel<<<(batch.chunk_count + A8_WARPS - 1) / A8_WARPS, A8_THREADS, 0, stream>>>(batch, scratch);
    a8_totals_kernel<<<batch.tensor_count, A8_THREADS, 0, stream>>>(batch, scratch, 0u);
  }
  if (!(phases & A8_APPLY)) return cudaGetLastError();
  uint32_t group = group_for(exec->device, batch.chunk_count), grid = (batch.chunk_count - 1) / group + 1;
  bool other = batch.hints & A8_OTHER_FORMATS;
  switch (batch.rule) {
    case A8_ADAM:
      if (other)
        a8_adam_lanes_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, group);
      else
        a8_adam_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, group);
      break;
    case A8_LION:
      if (other)
        a8_lion_lanes_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, group);
      else
        a8_lion_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, group);
      break;
    case A8_RMSPROP:
      a8_rmsprop_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, group);
      break;
    case A8_SGD:
      if (other)
        a8_sgd_lanes_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, group);
      else
        a8_sgd_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, group);
      break;
    case A8_ADAGRAD:
      a8_adagrad_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, group);
      break;
    case A8_ADEMAMIX:
      a8_ademamix_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, group);
      break;
    case A8_LAMB:
      a8_lamb_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, scratch, group);
      break;
    default:
      if (other)
        a8_lars_lanes_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, scratch, group);
      else
        a8_lars_kernel<<<grid, A8_THREADS, 0, stream>>>(batch, scratch, group);
  }
  return cudaGetLastError();  // sticky for launches: the first that failed
}

// CAME's confidence, of the tensors with A8_AVERAGE_UPDATE or of those without.
void launch_confidence(const a8_batch& batch, float* scratch, uint32_t phases, uint32_t averages, cudaStream_t stream) {
  if (batch.tile_count && phases & A8_RESIDUAL)
    a8_adafactor_residual_kernel<<<batch.tile_count, A8_THREADS, 0, stream>>>(batch, scratch, averages);
  if (batch.tile_count && phases & A8_CONFIDENCE) {
    a8_adafactor_confidence_kernel<<<batch.tile_count, A8_THREADS, 0, stream>>>(batch, scratch, averages);
    a8_adafactor_confidence_factors_kernel<<<batch.tile_count, A8_THREADS, 0, stream>>>(batch, scratch, averages);
  }
}

// The launches of the phases asked for, in order; the first error ends them.
cudaError_t launch_adafactor(const a8_batch& batch, float* scratch, uint32_t phases, cudaStream_t stream) {
  uint32_t factored = batch.factored_chunks ? batch.factored_chunks : batch.tile_count ? batch.chunk_count : 0;
  uint32_t factored_groups = (factored + A8_WARPS - 1) / A8_WARPS;
  uint32_t full = batch.chunk_count - batch.factored_chunks, width = full <= A8_FEW_CHUNKS ? 1 : A8_WARPS;
  uint32_t full_groups = (full + width - 1) / width;
  if (batch.tile_count && phases & A8_REDUCE)
    a8_adafactor_reduce_kernel<<<batch.tile_count, A8_THREADS, 0, stream>>>(batch, scratch);
  if (batch.tile_count && phases & (A8_REDUCE | A8_MOMENTS))
    a8_adafactor_means_kernel<<<batch.tile_count, A8_THREADS, 0, stream>>>(batch, scratch, phases);
  if (batch.tile_count && phases & A8_MOMENTS)
    a8_adafactor_factors_kernel<<<batch.tile_count, A8_THREADS, 0, stream>>>(batch, scratch);
  launch_confidence(batch, scratch, phases, 0u, stream);
  if (phases & A8_NORM) {
    if (factored) a8_adafactor_norm_factored_kernel<<<factored_groups, A8_THREADS, 0, stream>>>(batch, scratch);
    if (full_groups) a8_adafactor_norm_full_kernel<<<full_groups, A8_THREADS, 0, stream>>>(batch, scratch, width);
    a8_totals_kernel<<<batch.tensor_count, A8_THREADS, 0, stream>>>(batch, scratch, 0u);
  }
  launch_confidence(batch, scratch, phases, 1u, stream);
  if (phases & A8_LIMIT) {
    a8_adafactor_limit_kernel<<<batch.chunk_count, A8_THREADS, 0, stream>>>(batch, scratch);
    a8_totals_kernel<<<batch.tensor_count, A8_THREADS, 0, stream>>>(batch, scratch, 1u);
  }
  if (phases & A8_APPLY) {
    if (factored) a8_adafactor_apply_factored_kernel<<<factored_groups, A8_THREADS, 0, stream>>>(batch, scratch);
    if (full_groups) a8_adafactor_apply_full_kernel<<<full_groups, A8_THREADS, 0, stream>>>(batch, scratch, width);
  }
  return cudaGetLastError();  // sticky for launches: the first that failed
}

}  // namespace

A8_EXPORT int32_t a8_get_info(a8_info* info) {
  a8_message[0] = 0;
  if (int32_t status = fill_info(info, "cuda", A8_OP_CODEC | A8_OP_ELEMENTWISE | A8_OP_ADAFACTOR | A8_OP_UPLOAD))
    return status;
  info->toolkit = CUDART_VERSION;
  snprintf(info->architectures, sizeof info->architectures, "%s", A8_ARCHITECTURES);
  return A8_OK;
}

A8_EXPORT int32_t a8_quantize(a8_exec* exec, const a8_codec* codec) { return run_codec(exec, codec, true); }

A8_EXPORT int32_t a8_dequantize(a8_exec* exec, const a8_codec* codec) { return run_codec(exec, codec, false); }

A8_EXPORT int32_t a8_screen(a8_exec* exec, const a8_batch* batch, const float* scale, float* found) {
  a8_message[0] = 0;
  if (int32_t status = check_batch(exec, batch)) return status;
  if (batch->chunk_count == 0) return A8_OK;
  if (!found || !aligned(found, 4) || !aligned(scale, 4))
    return fail(A8_ERROR_ARGUMENT, "found is null, or found or scale is not aligned to 4 bytes");
  return on_device(exec, "screening the gradients", [&](cudaStream_t stream) {
    a8_screen_kernel<<<batch->chunk_count, A8_THREADS, 0, stream>>>(*batch, scale, found);
    return cudaGetLastError();
  });
}

A8_EXPORT int32_t a8_elementwise(a8_exec* exec, const a8_batch* batch, uint32_t phases) {
  a8_message[0] = 0;
  if (int32_t status = check_elementwise(exec, batch, phases)) return status;
  if (batch->chunk_count == 0) return A8_OK;
  return on_device(exec, "the element-wise step",
                   [&](cudaStream_t stream) { return launch_elementwise(exec, *batch, phases, stream); });
}

A8_EXPORT int32_t a8_adafactor(a8_exec* exec, const a8_batch* batch, uint32_t phases) {
  a8_message[0] = 0;
  if (int32_t status = check_adafactor(exec, batch, phases)) return status;
  if (batch->chunk_count == 0) return A8_OK;
  return on_device(exec, "the Adafactor step", [&](cudaStream_t stream) {
    return launch_adafactor(*batch, static_cast<float*>(exec->scratch), phases, stream);
  });
}

A8_EXPORT int32_t a8_derive(a8_exec* exec, const a8_schedule* from, a8_hyper* to, uint32_t count, uint32_t advance) {
  a8_message[0] = 0;
  if (int32_t status = check_derive(exec, from, to, count, advance)) return status;
  if (count == 0) return A8_OK;
  return on_device(exec, "deriving the hyper-parameters", [&](cudaStream_t stream) {
    a8_derive_kernel<<<(count - 1) / A8_THREADS + 1, A8_THREADS, 0, stream>>>(from, to, count, advance);
    return cudaGetLastError();
  });
}

A8_EXPORT int32_t a8_draw(a8_exec* exec, void* values, int64_t numel, uint32_t dtype, const int64_t* taken,
                          const int64_t* before, int64_t gap, uint32_t seed_low, uint32_t seed_high,
                          uint32_t noise_id) {
  a8_message[0] = 0;
  if (int32_t status = check_draw(exec, values, numel, dtype, taken, before, gap)) return status;
  if (numel == 0) return A8_OK;
  return on_device(exec, "drawing a random matrix", [&](cudaStream_t stream) {
    a8_draw_kernel<<<grid_for((numel + 1) / 2, A8_THREADS), A8_THREADS, 0, stream>>>(
        values, numel, dtype, taken, before, gap, seed_low, seed_high, noise_id);
    return cudaGetLastError();
  });
}

A8_EXPORT int32_t a8_upload(a8_exec* exec, const void* from, void* to, uint32_t bytes) {
  a8_message[0] = 0;
  if (int32_t status = check_upload(exec, from, to, bytes)) return status;
  if (bytes == 0) return A8_OK;
  a8_upload_words words;
  memcpy(words.at, from, bytes);
  return on_device(exec, "copying a table", [&](cudaStream_t stream) {
    a8_upload_kernel<<<1, A8_THREADS, 0, stream>>>(words, static_cast<uint32_t*>(to), bytes / 4);
    return cudaGetLastError();
  });
}
