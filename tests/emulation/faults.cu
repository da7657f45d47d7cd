// Kernels that are wrong, each in a way that a device may show late or never. test_emulator.py launches them by number.
#include <cuda_runtime_api.h>
#include <string.h>

__global__ void some_threads_miss_the_barrier(float*) {
  if (threadIdx.x < 100) __syncthreads();
}

__global__ void half_a_warp_shuffles(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffffffu, out[threadIdx.x], 0);
}

__global__ void a_warp_disagrees(float* out) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    out[0] = (float)__any_sync(0xffffffffu, 1);
}

__global__ void a_mask_of_half_a_warp(float*) { __syncwarp(0xffffu); }

__global__ void misaligned(float* out) { *reinterpret_cast<float4*>(out + 1) = make_float4(0.0f, 0.0f, 0.0f, 0.0f); }

__global__ void beyond_an_array(float* out) {
  __shared__ float room[32];
  room[threadIdx.x] = out[threadIdx.x];
}

__global__ void not_shared(float* out) {
  float x;
  asm("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"((unsigned)__cvta_generic_to_shared(out)));
  *out = x;
}

// --- What compiles and ends, but depends on what nobody promises: its result must differ between two orders. ---

__global__ void last_writer_wins(float* out) { *out = (float)(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void shared_memory_is_not_cleared(float* out) {
  __shared__ unsigned room[2];
  if (threadIdx.x == 0) *out = (float)room[1];
}

__global__ void a_copy_without_a_wait(float* out) {
  __shared__ float room[4];
  if (threadIdx.x != 0) return;
  room[0] = 7.0f;
  unsigned to = (unsigned)__cvta_generic_to_shared(room);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(out), "n"(4) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  out[1] = room[0];
}

// --- What is right. ---

__global__ void reverses(float* out) {
  __shared__ float room[256];
  room[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = room[255 - threadIdx.x];
  float sum = out[threadIdx.x];
  for (unsigned bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  if (threadIdx.x == 0) out[256] = sum;
  if (__syncthreads_or(threadIdx.x == 200)) out[257] = 1.0f;
}

// Launches the kernel of that name. Returns the launch's message, null when it went well.
extern "C" __attribute__((visibility("default"))) const char* launch(const char* which, float* out) {
  if (strcmp(which, "some_threads_miss_the_barrier") == 0) some_threads_miss_the_barrier<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "half_a_warp_shuffles") == 0) half_a_warp_shuffles<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "a_warp_disagrees") == 0) a_warp_disagrees<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "a_mask_of_half_a_warp") == 0) a_mask_of_half_a_warp<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "misaligned") == 0) misaligned<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "beyond_an_array") == 0) beyond_an_array<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "not_shared") == 0) not_shared<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "last_writer_wins") == 0) last_writer_wins<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "shared_memory_is_not_cleared") == 0) shared_memory_is_not_cleared<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "a_copy_without_a_wait") == 0) a_copy_without_a_wait<<<2, 256, 0, nullptr>>>(out);
  if (strcmp(which, "reverses") == 0) reverses<<<1, 256, 0, nullptr>>>(out);
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
