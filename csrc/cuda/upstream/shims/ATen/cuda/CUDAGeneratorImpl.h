// Stands for PyTorch's header of this name, of which FlashAttention-2 needs one type.
#pragma once
#include <cstdint>

namespace at {
struct PhiloxCudaState {
  uint64_t seed = 0, offset = 0;
};
}  // namespace at
