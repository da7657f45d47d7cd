// Compares native/cuda/kernels/exact.cuh with the compiler's correctly rounded operations on this device: square root,
// its reciprocal, reciprocals and division by 127 for every float of their ranges, division for 2^33 random pairs. Run
// by bench/gpu.sh.
#include <cstdio>

#include "adam_fast.cuh"

enum Operation { kSqrt, kReciprocalRoot, kReciprocal, kReciprocalOfMost, kReciprocalOfAny, kDiv127, kDiv, kOperations };
static const char* const kNames[] = {"sqrt", "1 / sqrt", "1 / step", "1 / a", "1 / v", "a / 127", "a / b"};

__device__ bool same(int operation, unsigned long long i) {
  switch (operation) {
    case kSqrt: {
      float x = a8_float((uint32_t)i + (27u << 23));  // 2^-100 upwards
      return a8_bits(a8_exact_sqrt<true>(x)) == a8_bits(a8_sqrt(x)) &&
             (x == 0.0f || a8_bits(a8_exact_sqrt<false>(x)) == a8_bits(a8_sqrt(x)));
    }
    case kReciprocalRoot: {
      float x = a8_float((uint32_t)i + (27u << 23));
      return a8_bits(a8_exact_reciprocal_root(x)) == a8_bits(a8_div(1.0f, a8_sqrt(x)));
    }
    case kReciprocal: {
      float step = (float)(i + 1);
      return a8_bits(a8_exact_reciprocal(step)) == a8_bits(a8_div(1.0f, step));
    }
    case kReciprocalOfAny: {
      float v = a8_float((uint32_t)i + (27u << 23));
      return a8_bits(a8_exact_reciprocal_of_any(v)) == a8_bits(a8_div(1.0f, v));
    }
    case kReciprocalOfMost: {
      float a = a8_float((uint32_t)i + (27u << 23));
      return !a8_has_exact_reciprocal(a8_bits(a)) || a8_bits(a8_exact_reciprocal(a)) == a8_bits(a8_div(1.0f, a));
    }
    case kDiv127: {
      float a = a8_float((uint32_t)i + (27u << 23));
      return a8_bits(a8_exact_div_127(a)) == a8_bits(a8_div(a, 127.0f));
    }
    default: {
      // As in a8_adam_param: a first moment lifted by 2^40 (of either sign, sometimes zero), a root.
      uint32_t r = a8_mix((uint32_t)i ^ a8_mix((uint32_t)(i >> 32) + 1u)), s = a8_mix(r + 0x9e3779b9u),
               t = a8_mix(s + r);
      uint32_t exponent = 127 - 86 + t % 146;  // 2^-86 .. 2^60
      float a = a8_float((r & 0x807fffffu) | (t >> 20 ? exponent << 23 : 0u));
      if (t >> 20 == 0) a = a8_float(r & 0x80000000u);
      float b = a8_float((s & 0x007fffffu) | (127 - 40 + (s >> 23) % 71) << 23);  // 2^-40 .. 2^31
      return a8_bits(a8_exact_div(a, b)) == a8_bits(a8_div(a, b));
    }
  }
}

__global__ void compare(int operation, unsigned long long count, unsigned long long* wrong) {
  unsigned long long mine = 0, step = (unsigned long long)gridDim.x * blockDim.x;
  for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
    mine += same(operation, i) ? 0 : 1;
  if (mine) atomicAdd(wrong, mine);
}

static bool failed(cudaError_t error) {
  if (error != cudaSuccess) printf("gpu_exact: %s\n", cudaGetErrorString(error));
  return error != cudaSuccess;
}

int main() {
  const unsigned long long all = 200ull << 23;
  const unsigned long long counts[] = {all, all, 1ull << 23, all, all, all, 1ull << 33};
  unsigned long long *wrong, host[kOperations];
  if (failed(cudaMalloc(&wrong, sizeof host)) || failed(cudaMemset(wrong, 0, sizeof host))) return 2;
  for (int operation = 0; operation < kOperations; ++operation)
    compare<<<2048, 256>>>(operation, counts[operation], wrong + operation);
  // The first is of a launch that did not happen, which no later call reports.
  if (failed(cudaGetLastError()) || failed(cudaMemcpy(host, wrong, sizeof host, cudaMemcpyDeviceToHost))) return 2;
  int status = 0;
  for (int operation = 0; operation < kOperations; ++operation) {
    printf("exact %-10s %llu wrong of %llu\n", kNames[operation], host[operation], counts[operation]);
    status |= host[operation] != 0;
  }
  return status;
}
