// Stands for PyTorch's header of this name.
#pragma once
#include <tuple>

#include "../CUDAGeneratorImpl.h"

namespace at::cuda::philox {
__device__ __forceinline__ std::tuple<uint64_t, uint64_t> unpack(const PhiloxCudaState& x) {
  return {x.seed, x.offset};
}
}  // namespace at::cuda::philox
