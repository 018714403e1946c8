// FlashAttention-2's forward: our launch of its device code.
#pragma once
#include "split.cuh"
#include "tiles.cuh"

namespace flashjax::upstream {

using ForwardArgs = Arguments<flash::Flash_fwd_params>;

template <typename Traits, int kOptions>
__device__ __forceinline__ void forward_cta(const ForwardArgs& args) {
  constexpr bool kDropout = kOptions & kWithDropout;
  const Tile tile = (kOptions & kEvenRows) ? Tile{int(blockIdx.z), int(blockIdx.x)} : args.tile();
  const int part = tile.part, h = blockIdx.y;
  if (part < 0) return;
  // Longest first where the diagonal cuts blocks short.
  const int block = (kOptions & kCausal) && !args.tiles ? args.blocks - 1 - tile.index : tile.index;
  auto run = [&](const ForwardArgs& a) {
    flash::compute_attn_1rowblock<Traits, kDropout, bool(kOptions & kCausal),
                                  bool(kOptions & kLocal), bool(kOptions & kWithAlibi),
                                  bool(kOptions & kEvenRows), bool(kOptions & kEvenDim),
                                  bool(kOptions & kWithSoftcap), false>(a, part, h, block);
  };
  if constexpr (kOptions & (kLocal | kWithDropout)) {  // a copy costs registers
    ForwardArgs a = args;
    if constexpr (kOptions & kLocal) move_window(a, part);
    unsigned long long state[2];
    if constexpr (kDropout) {
      const Stream stream(a, part, h);
      a.philox_args = {stream.seed, stream.offset};
      a.rng_state = reinterpret_cast<uint64_t*>(state);
    }
    run(a);
  } else {
    run(args);
  }
}

template <typename Traits, int kOptions, int kRoom>
static __global__ void forward(const __grid_constant__ ForwardArgs args) {
  if constexpr (kRoom == kRoomHere) forward_cta<Traits, kOptions>(args);
}

template <typename T, int D, int kRoom, int kOptions>
cudaError_t launch_options(const FwdParams& p, cudaStream_t stream) {
  using Traits = decltype(forward_traits<T, D, kRoom, kOptions>());
  ForwardArgs a = translate<ForwardArgs>(p, D);
  a.o_ptr = p.out, a.softmax_lse_ptr = p.lse;
  Workspace space(p.workspace, p.workspace_bytes);
  int64_t tiles = 0;
  cudaError_t error = list(p, a, space, {Traits::kBlockM}, &tiles, stream);
  if (error != cudaSuccess) return error;
  if (a.parts.list && (error = clear(p, stream)) != cudaSuccess) return error;
  const unsigned heads = static_cast<unsigned>(p.h);
  const dim3 grid = (kOptions & kEvenRows) ? dim3(a.blocks, heads, static_cast<unsigned>(p.b))
                                           : dim3(static_cast<unsigned>(tiles), heads);
  error = launch(forward<Traits, kOptions, kRoom>, grid, Traits::kNThreads, Traits::kSmemSize, a,
                 stream);
  if (error != cudaSuccess || (all_see(p) && !p.sinks)) return error;
  return finish<T>(p, stream);
}

template <DType kType, int D, int E, int M, int N, cuda::Variant kVariant>
cudaError_t launch_forward(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  static_assert(D == E);
  if (p.b * p.s * p.h == 0) return cudaSuccess;
  using T = std::conditional_t<kType == DType::kF16, cutlass::half_t, cutlass::bfloat16_t>;
  if constexpr (kVariant == cuda::Variant::kSplit) {
    return launch_split_forward<T, D, N>(p, device, stream);
  } else {
    constexpr ForwardTile tile = forward_tile(D, k227KB, false, false);
    static_assert(tile.m == M && tile.n == N);
    return with_room(device.smem, [&](auto room) {
      return with_options<0>(options_of(p, D), [&](auto options) {
        return launch_options<T, D, decltype(room)::value, decltype(options)::value>(p, stream);
      });
    });
  }
}

}  // namespace flashjax::upstream
