// A CUDA driver with as many devices as it is told, for the probe's tests. -D values break one thing each.
#include <string.h>

#ifndef STUB_DRIVER_VERSION
#define STUB_DRIVER_VERSION 13010
#endif
#ifndef STUB_INIT_STATUS
#define STUB_INIT_STATUS 0
#endif
#ifndef STUB_DEVICES
#define STUB_DEVICES 2
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

EXPORT int cuDriverGetVersion(int* version) {
  *version = STUB_DRIVER_VERSION;
  return 0;
}

EXPORT int cuInit(unsigned) {
#if defined(STUB_INIT_TRAPS)
  __builtin_trap();
#endif
  return STUB_INIT_STATUS;
}

#if !defined(STUB_NO_DEVICE_COUNT)
EXPORT int cuDeviceGetCount(int* count) {
  *count = STUB_DEVICES;
  return 0;
}
#endif

EXPORT int cuDeviceGet(int* device, int index) {
  *device = index + 100;  // a handle that is not the index
  return 0;
}

EXPORT int cuDeviceGetName(char* name, int length, int device) {
  strncpy(name, device == 100 ? "Stub A" : "Stub B", length);
  return 0;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (attribute == 75) *value = device == 100 ? 9 : 12;
  if (attribute == 76) *value = device == 100 ? 0 : 1;
  return 0;
}

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  *bytes = (size_t)(device - 99) << 34;
  return 0;
}

#if !defined(STUB_NO_ERROR_TEXT)
EXPORT int cuGetErrorName(int, const char** text) {
  *text = "CUDA_ERROR_STUB";
  return 0;
}
#endif

// Reaching this one means that the probe made a context, which it promises not to.
EXPORT int cuCtxCreate_v2(void**, unsigned, int) { __builtin_trap(); }
EXPORT int cuDevicePrimaryCtxRetain(void**, int) { __builtin_trap(); }
