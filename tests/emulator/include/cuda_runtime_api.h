// What the host side of the kernels asks of the CUDA runtime, answered by the emulator.
#pragma once
#include <cstdlib>
#include <cstring>

#include "device.h"

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorNotSupported,
  cudaErrorLaunchFailure
};
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulator {
inline cudaError_t last_error = cudaSuccess;  // of a launch by <<<>>>
}

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "a CUDA error";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "what was wrong is on the error stream"
                                         : "of the emulator";
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor ? 0
           : attribute == cudaDevAttrMultiProcessorCount    ? emulator::multiprocessors()
                                                            : emulator::kSharedBytes;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= emulator::kSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// There is one memory, and nothing is under way between two calls.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
template <typename T>
cudaError_t cudaMalloc(T** to, size_t bytes) {
  *to = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  return cudaMemset(*to, 0xFF, bytes);
}
inline cudaError_t cudaDeviceSynchronize() { return cudaGetLastError(); }

enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  int dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

namespace emulator {
template <typename... Params, typename... Args>
cudaError_t start(dim3 grid, dim3 threads, int bytes, int cluster, void (*kernel)(Params...),
                  const Args&... args) {
  return launch(grid, static_cast<int>(threads.x), bytes, cluster, [&] { kernel(args...); })
             ? cudaSuccess
             : cudaErrorLaunchFailure;
}
// KERNEL<<<grid, threads, bytes, stream>>>(args), as translate.py writes it.
struct Grid {
  dim3 grid, threads;
  int bytes;
  Grid(dim3 grid, dim3 threads, int bytes = 0, cudaStream_t = nullptr)
      : grid(grid), threads(threads), bytes(bytes) {}
  template <typename Kernel, typename... Args>
  void operator()(Kernel kernel, const Args&... args) const {
    last_error = start(grid, threads, bytes, 1, +kernel, args...);
  }
};
}  // namespace emulator

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  int cluster = 1;
  for (int i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = static_cast<int>(config->attrs[i].val.clusterDim.x);
  return emulator::start(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster,
                         kernel, args...);
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* found);
