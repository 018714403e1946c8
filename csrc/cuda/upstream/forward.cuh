// FlashAttention-2's forward: our launch of its device code.
#pragma once
#include "split.cuh"

namespace flashjax::upstream {

using ForwardArgs = Arguments<flash::Flash_fwd_params>;

template <typename Traits, int kOptions>
static __global__ void forward(const __grid_constant__ ForwardArgs args) {
  constexpr bool kDropout = kOptions & kWithDropout, kMoves = kOptions & kLocal;
  const Tile tile = args.tile();
  const int part = tile.part, h = blockIdx.y;
  if (part < 0) return;
  // Longest first where the diagonal cuts blocks short.
  const int block = (kOptions & kCausal) && !args.tiles ? args.blocks - 1 - tile.index : tile.index;
  ForwardArgs a = args;
  if constexpr (kMoves) move_window(a, part);
  unsigned long long state[2];
  if constexpr (kDropout) {
    const Stream stream(a, part, h);
    a.philox_args = {stream.seed, stream.offset};
    a.rng_state = reinterpret_cast<uint64_t*>(state);
  }
  flash::compute_attn_1rowblock<Traits, kDropout, bool(kOptions & kCausal), bool(kOptions & kLocal),
                                bool(kOptions & kWithAlibi), bool(kOptions & kEvenRows),
                                bool(kOptions & kEvenDim), bool(kOptions & kWithSoftcap), false>(
      a, part, h, block);
}

template <typename T, int D, int M, int N, int kOptions>
cudaError_t launch_options(const FwdParams& p, cudaStream_t stream) {
  // As upstream has it: fewer rows and columns leave registers to the random numbers.
  constexpr bool kDropout = kOptions & kWithDropout;
  constexpr int m = kDropout && D == 192 ? 64 : M;
  constexpr int n = kDropout && (D == 64 || D == 128) ? N / 2 : N;
  constexpr int warps = m == 128 && D > 128 ? 8 : 4;
  using Traits = Flash_fwd_kernel_traits<D, m, n, warps, false, false, T>;
  ForwardArgs a = translate<ForwardArgs>(p, D);
  a.o_ptr = p.out, a.softmax_lse_ptr = p.lse;
  Workspace space(p.workspace, p.workspace_bytes);
  int64_t tiles = 0;
  cudaError_t error = list(p, a, space, {m}, &tiles, stream);
  if (error != cudaSuccess) return error;
  if (a.parts.list && (error = clear(p, stream)) != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.h));
  error = launch(forward<Traits, kOptions>, grid, Traits::kNThreads, Traits::kSmemSize, a, stream);
  if (error != cudaSuccess || (all_see(p) && !p.sinks)) return error;
  return finish<T>(p, stream);
}

// Which of them serves: plain calls have kernels of their own, the rest one for each set of extras.
template <typename T, int D, int M, int N>
cudaError_t launch_row(const FwdParams& p, cudaStream_t stream) {
  const Call call(p, M, N);
  if (call.extras == 0 && p.d == D) {
    if (!call.masked)
      return call.even ? launch_options<T, D, M, N, kEvenDim | kEvenRows>(p, stream)
                       : launch_options<T, D, M, N, kEvenDim>(p, stream);
    if (call.causal)
      return call.even ? launch_options<T, D, M, N, kEvenDim | kEvenRows | kCausal>(p, stream)
                       : launch_options<T, D, M, N, kEvenDim | kCausal>(p, stream);
    return launch_options<T, D, M, N, kEvenDim | kLocal>(p, stream);
  }
  return call.with_extras([&](auto extras) {
    return launch_options<T, D, M, N, kLocal | decltype(extras)::value>(p, stream);
  });
}

template <DType kType, int D, int E, int M, int N, cuda::Variant kVariant>
cudaError_t launch_forward(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  static_assert(D == E);
  if (p.b * p.s * p.h == 0) return cudaSuccess;
  using T = std::conditional_t<kType == DType::kF16, cutlass::half_t, cutlass::bfloat16_t>;
  if constexpr (kVariant == cuda::Variant::kSplit)
    return launch_split_forward<T, D, N>(p, device, stream);
  else
    return launch_row<T, D, M, N>(p, stream);
}

}  // namespace flashjax::upstream
