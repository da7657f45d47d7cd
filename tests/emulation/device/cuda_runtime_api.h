// The part of CUDA's runtime that native/cuda/abi.cu calls, for one device: this thread of the host. A launch runs at once
// (emulator.h), so that its error is known when the next call asks for it.
#pragma once

#define CUDART_VERSION 0

typedef void* cudaStream_t;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719
};

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

namespace emulator {

inline cudaError_t error = cudaSuccess;
inline char message[1024] = "no error";
inline int multiprocessors = 1;

}  // namespace emulator

inline cudaError_t cudaPeekAtLastError() { return emulator::error; }

inline cudaError_t cudaGetLastError() {
  cudaError_t error = emulator::error;
  emulator::error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "the emulated launch" : "an emulated call";
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorLaunchFailure ? emulator::message : "invalid argument";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::multiprocessors;
  return cudaSuccess;
}
