// Upstream's tiles. It chooses them by the shared memory that a block may have, of which GPUs have
// one of three sizes. A kernel is for one size: it is empty in the code for archs of another.
#pragma once
#include <initializer_list>

#include "flash.cuh"

namespace flashjax::upstream {

enum Room : int { k99KB = 1, k163KB = 2, k227KB = 4 };

constexpr Room room_of(int arch) {  // as in __CUDA_ARCH__
  if (arch == 800 || arch == 870) return k163KB;
  return arch >= 900 && arch < 1200 ? k227KB : k99KB;
}

constexpr int rooms_of(std::initializer_list<int> archs) {
  int rooms = 0;
  for (int arch : archs) rooms |= room_of(arch);
  return rooms;
}

#ifdef __CUDA_ARCH__
constexpr int kRoomHere = room_of(__CUDA_ARCH__);
#else
constexpr int kRoomHere = 0;
#endif

// function(the size of a GPU, as a constant), if it is one of those that this is compiled for.
template <typename Function>
cudaError_t with_room(int64_t smem, Function function) {
  constexpr int kBuilt = rooms_of({__CUDA_ARCH_LIST__});
  const Room room = smem >= 227 << 10 ? k227KB : smem >= 163 << 10 ? k163KB : k99KB;
  return with_constant<~kBuilt, k99KB, k163KB, k227KB>(room, cudaErrorNoKernelImageForDevice,
                                                       function);
}

struct ForwardTile {
  int m, n, warps;
};

constexpr ForwardTile forward_tile(int d, int room, bool causal, bool dropout) {
  if (d <= 32) return {128, 128, 4};
  if (d == 64) return {128, dropout ? 64 : 128, 4};
  if (d == 192) return dropout ? ForwardTile{64, 64, 4} : ForwardTile{128, 64, 8};
  if (d == 256) return room == k163KB ? ForwardTile{128, 64, 8} : ForwardTile{64, 64, 4};
  if (d == 128 && dropout) return {128, 32, 4};
  if (room != k99KB) return {128, 64, 4};
  return causal ? ForwardTile{64, 64, 4} : ForwardTile{128, d == 128 ? 32 : 64, 4};
}

template <typename T, int D, int kRoom, int kOptions>
auto forward_traits() {
  constexpr ForwardTile tile = forward_tile(D, kRoom, kOptions & kCausal, kOptions & kWithDropout);
  return Flash_fwd_kernel_traits<D, tile.m, tile.n, tile.warps, false, false, T>{};
}

template <typename T, int D, int kRoom, int kOptions>
auto backward_traits() {
  constexpr bool kSmall = kRoom == k99KB, kDropout = kOptions & kWithDropout;
  if constexpr (D == 32)
    return Flash_bwd_kernel_traits<32, 128, 128, 8, 4, 4, 4, kSmall || !kDropout, false, T>{};
  else if constexpr (D == 64 && kSmall)
    return Flash_bwd_kernel_traits<64, 64, 128, 8, 2, 4, 4, true, false, T>{};
  else if constexpr (D == 64)
    return Flash_bwd_kernel_traits<64, 128, 128, 8, 4, 4, 4, false, false, T>{};
  else if constexpr (D == 96)
    return Flash_bwd_kernel_traits<96, 64, 128, 8, 2, 4, 4, kSmall || !kDropout, false, T>{};
  else if constexpr (D == 128 && kSmall)
    return Flash_bwd_kernel_traits<128, 64, 64, 8, 4, 2, 2, true, false, T>{};
  else if constexpr (D == 128)
    return Flash_bwd_kernel_traits<128, 64, 128, 8, 2, 4, 2, false, false, T>{};
  else if constexpr (D == 192)
    return Flash_bwd_kernel_traits<192, 64, 64, 8, 4, 2, 2, kSmall, kSmall, T>{};
  else if constexpr (kSmall)
    return Flash_bwd_kernel_traits<256, 64, 32, 8, 4, 1, 2, true, true, T>{};
  else
    return Flash_bwd_kernel_traits<256, 64, 64, 8, 4, 2, 2, false, kRoom == k163KB, T>{};
}

}  // namespace flashjax::upstream
