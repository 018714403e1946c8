#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "tensor_map.h"

namespace emulator {

// What is in a CUtensorMap.
struct Encoded {
  char* base;
  uint64_t extent[4], stride[3];
  uint32_t box[4];
  uint32_t type, element;
};
static_assert(sizeof(Encoded) <= sizeof(CUtensorMap));

Box box_at(const void* map, int c0, int c1, int c2, int c3) {
  Encoded x;
  std::memcpy(&x, map, sizeof x);
  Box y{};
  y.base = x.base;
  y.element = static_cast<int>(x.element), y.type = static_cast<Box::Type>(x.type);
  const int at[4] = {c0, c1, c2, c3};
  for (int i = 0; i < 4; i++) {
    y.extent[i] = static_cast<int64_t>(x.extent[i]), y.box[i] = static_cast<int>(x.box[i]);
    y.stride[i] = i ? static_cast<int64_t>(x.stride[i - 1]) : x.element;
    y.at[i] = at[i];
  }
  return y;
}

}  // namespace emulator

// Refuses what the driver refuses.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* extent, const cuuint64_t* stride,
                                const cuuint32_t* box, const cuuint32_t* element_stride,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  emulator::Encoded x{};
  x.base = static_cast<char*>(address);
  x.element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  x.type = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32   ? emulator::Box::kF32
           : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? emulator::Box::kF16
                                                     : emulator::Box::kBF16;
  if (rank != 4 || reinterpret_cast<uintptr_t>(address) % 16) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * x.element > 128) return CUDA_ERROR_INVALID_VALUE;  // of the swizzle
  for (int i = 0; i < 4; i++) {
    if (!extent[i] || extent[i] > uint64_t{1} << 32 || !box[i] || box[i] > 256)
      return CUDA_ERROR_INVALID_VALUE;
    if (element_stride[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    if (i < 3 && (stride[i] % 16 || stride[i] >> 40)) return CUDA_ERROR_INVALID_VALUE;
    x.extent[i] = extent[i], x.box[i] = box[i];
    if (i < 3) x.stride[i] = stride[i];
  }
  std::memcpy(map, &x, sizeof x);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *found = cudaDriverEntryPointSuccess;
  *function = std::strcmp(name, "cuTensorMapEncodeTiled")
                  ? nullptr
                  : reinterpret_cast<void*>(cuTensorMapEncodeTiled);
  return *function ? cudaSuccess : cudaErrorNotSupported;
}
