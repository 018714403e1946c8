// The launch of the sm_90a forward.
#pragma once
#include "forward_kernel.cuh"
#include "host.h"
#include "segments.h"

namespace flashjax::sm90 {

template <DType kType, int D, int E, int M, int N, cuda::Variant kVariant>
cudaError_t launch_tile(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  constexpr bool kF16 = kType == DType::kF16;
  constexpr int kOptions = forward_options(D, E, N, kVariant != cuda::Variant::kFull,
                                           kVariant == cuda::Variant::kScores);
  using K = Forward<kF16, D, E, M, N, kOptions>;
  ForwardArgs a{};
  a.p = problem(p);
  a.lse = p.lse, a.out = static_cast<u32*>(p.out);
  const int64_t mblocks = (p.s + M - 1) / M, tiles = mblocks * p.h * p.b;
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX || p.s >= 1 << 29 || p.t >= 1 << 29) return cudaErrorInvalidConfiguration;
  a.mblocks = static_cast<int>(mblocks), a.tiles = static_cast<int>(tiles);
  a.group = 1, a.ratio = static_cast<int>(p.h / p.g);
  if (K::kMask) {
    // Measured: at d = 256 twice as many heads were better, and with shared key heads half as many.
    const int64_t ratio = p.h / p.g, bytes = p.t * (p.d + p.e) * (D == 256 ? 1 : 2);
    const int64_t heads = heads_in_l2(ratio > 1 ? 2 * bytes : bytes) * ratio;
    a.group = static_cast<int>(heads < p.h * p.b ? heads : p.h * p.b);
  }
  // Blocks that stay for all their tiles keep transfers from starting: then each leaves after about
  // 16k keys.
  const int64_t each = p.yields ? 1 + 16384 / (p.t + 1) : tiles;
  const int64_t least = (tiles + each - 1) / each, most = tiles < device.sms ? tiles : device.sms;
  const int blocks = static_cast<int>(least < most ? most : least);
  TMap q, k, v, o;
  cudaError_t error = tensor_map(q, p.q, p.dtype, p.b, p.s, p.h, p.d, M);
  error = cuda::first_error(error, tensor_map(k, p.t ? p.k : p.q, p.dtype, p.b, p.t, p.g, p.d, N));
  error = cuda::first_error(error, tensor_map(v, p.t ? p.v : p.q, p.dtype, p.b, p.t, p.g, p.e, N));
  error = cuda::first_error(error, tensor_map(o, p.out, p.dtype, p.b, p.s, p.h, p.e, 64));
  if (error != cudaSuccess) return error;
  if (K::kDyn && tiles > blocks && p.workspace_bytes >= 4) {
    a.ticket = static_cast<int*>(p.workspace);
    if ((error = cudaMemsetAsync(a.ticket, 0, 4, stream)) != cudaSuccess) return error;
  }
  if (K::kScore && p.workspace_bytes >= 256 + segments_bytes(p, mblocks)) {
    error = segments(a.p, p, M, static_cast<char*>(p.workspace) + 256, true, stream);
    if (error != cudaSuccess) return error;
  } else if (p.cu_seqlens_q) {
    return cudaErrorInvalidValue;  // the workspace is too small
  }
  auto kernel = forward_kernel<kF16, D, E, M, N, kOptions>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kSmem);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, K::kThreads, K::kSmem, stream>>>(q, k, v, o, a);
  return cudaGetLastError();
}

template <DType kType, int D, int E, int M, int N, cuda::Variant kVariant>
cudaError_t launch_forward(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  // Of wide key tiles the last may be mostly empty, which a few of them do not make up for.
  if constexpr (N == 160) {
    const int64_t wide = (p.t + N - 1) / N * N, narrow = (p.t + 127) / 128 * 128;
    if (wide * 100 > narrow * 102)
      return launch_tile<kType, D, E, M, 128, kVariant>(p, device, stream);
  }
  return launch_tile<kType, D, E, M, N, kVariant>(p, device, stream);
}

}  // namespace flashjax::sm90
