// The launch of the sm_90a decode kernels.
#pragma once
#include "decode_kernel.cuh"
#include "decode_latent_kernel.cuh"
#include "host.h"

namespace flashjax::sm90 {

using DecodeKernel = void (*)(TMap, TMap, TMap, DecodeArgs);

// By the kernel that K describes, and the one that puts its parts together.
template <DType kType, class K>
cudaError_t launch_blocks(const FwdParams& p, const cuda::Device& device, cudaStream_t stream,
                          DecodeKernel kernel) {
  constexpr bool kF16 = kType == DType::kF16;
  constexpr int M = K::kRows, N = K::kTileKeys, E = K::E, kCluster = K::kCluster;
  auto up = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const int64_t ratio = p.h / p.g;
  DecodeArgs a{};
  a.p = p;
  a.pages = pages(p, K::kBox);
  a.out = static_cast<u32*>(p.out), a.lse = p.lse;
  a.ratio = static_cast<int>(ratio);
  a.block_heads = static_cast<int>(ratio < M ? ratio : M);
  const int64_t queries = M / a.block_heads;
  a.block_queries = static_cast<int>(p.s < queries ? p.s : queries);
  const int64_t head_blocks = up(ratio, a.block_heads);
  const int64_t blocks = up(head_blocks * up(p.s, a.block_queries), kCluster);
  const int64_t heads = p.g * blocks, tiles = up(p.t, N);
  a.cluster = kCluster, a.head_blocks = static_cast<int>(head_blocks);
  a.blocks = static_cast<int>(blocks), a.heads = static_cast<int>(heads);
  auto bound = [](int64_t x) { return static_cast<int>(x < 0 ? -1 : x > 1 << 29 ? 1 << 29 : x); };
  a.left = bound(p.window_left), a.right = bound(p.window_right);
  a.bucket = static_cast<int>(up(p.b, 32));
  a.queries = a.most_q = bound(p.s), a.most_k = bound(p.t);
  if (p.max_seqlen_q >= 0 && p.max_seqlen_q < p.s) a.most_q = bound(p.max_seqlen_q);
  if (p.max_seqlen_k >= 0 && p.max_seqlen_k < p.t) a.most_k = bound(p.max_seqlen_k);
  a.by_blocks = Divider(a.blocks), a.by_heads = Divider(a.heads);
  a.by_block_heads = Divider(a.block_heads), a.by_head_blocks = Divider(a.head_blocks);
  const int64_t splits = p.num_splits < tiles ? p.num_splits : tiles;
  a.splits = static_cast<int>(splits < 0 ? 0 : splits);

  // Partial results: two slots for each cluster, or one for each part that was asked for.
  const int64_t rows = kCluster * a.rows(), slot = rows * (E + 1) * 4;
  const int64_t most = p.b * heads * (tiles > a.splits ? tiles : a.splits);
  if (most > INT32_MAX || p.t >= 1 << 29 || p.s >= 1 << 29) return cudaErrorInvalidConfiguration;
  int64_t shares = K::kCtas * (device.sms / kCluster), owners = p.b * heads, slots = most;
  if (a.splits) {
    slots = p.b * heads * a.splits;
    if (p.workspace_bytes < 16 + slots * slot) return cudaErrorInvalidValue;
    if (shares > slots) shares = slots;
  } else {
    const int64_t fit = (p.workspace_bytes - 16) / (sizeof(Joint) + 2 * slot);
    if (shares > fit) shares = fit;
    if (shares > most) shares = most > 0 ? most : 1;
    if (shares < 1) return cudaErrorInvalidValue;
    a.by_head = owners < shares;
    for (int parts = 1; parts <= (a.by_head ? 4 : 1); ++parts)
      if (parts == 1 || p.b * heads * parts <= 2 * shares)
        a.rounds[parts - 1] = static_cast<int>(up(p.b * heads * parts, shares));
    if (!a.by_head) owners = shares;
    slots = 2 * shares;
  }
  char* next = static_cast<char*>(p.workspace);
  if (!a.splits) a.joints = reinterpret_cast<Joint*>(next), next += owners * sizeof(Joint);
  a.part_out = reinterpret_cast<float*>(next), next += slots * rows * E * 4;
  a.part_lse = reinterpret_cast<float*>(next);

  TMap q, k, v;
  const Map of_q{{p.d, p.h, p.s, p.b},
                 {p.d, p.h * p.d, p.s * p.h * p.d},
                 {64, a.block_heads, a.block_queries, 1}};
  cudaError_t error = tensor_map(q, p.q, p.dtype, of_q);
  const void *pk = tiles ? p.k : p.q, *pv = tiles ? p.v : p.q;
  error = cuda::first_error(
      error, tensor_map(k, pk, p.dtype, a.pages.count, a.pages.size, p.g, p.d, a.pages.box, 128));
  error = cuda::first_error(
      error, tensor_map(v, pv, p.dtype, a.pages.count, a.pages.size, p.g, p.e, a.pages.box, 128));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kSmem);
  if (error != cudaSuccess) return error;
  error = launch_after(kernel, dim3(static_cast<unsigned>(shares * kCluster)), K::kThreads,
                       K::kSmem, kCluster, stream, q, k, v, a);
  if (error != cudaSuccess || a.splits == 1 || tiles == 0) return error;
  // Many parts of each head are put together by all threads of a block, few by some of them.
  constexpr int kGroups = 128 / (E / 4);
  a.team = shares >= 8 * owners || a.splits >= 8 ? kGroups : 1;
  const dim3 grid(static_cast<unsigned>(owners), static_cast<unsigned>(up(rows, kGroups / a.team)));
  return launch_after(combine_kernel<kF16, E, N>, grid, 128, 0, 1, stream, a);
}

// A block of 64 rows is enough for most; two share what they read.
template <DType kType, int D, int N>
cudaError_t launch_decode(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  constexpr bool kF16 = kType == DType::kF16;
  if (p.b * p.s * p.h == 0) return cudaSuccess;
  const int64_t rows = p.s * (p.h / p.g);
  if constexpr (D > 256) {
    if (rows <= 64)
      return launch_blocks<kType, Latent<kF16, 1>>(p, device, stream, latent_kernel<kF16, 1>);
    return launch_blocks<kType, Latent<kF16, 2>>(p, device, stream, latent_kernel<kF16, 2>);
  } else {
    const auto launch = [&](auto m) {
      constexpr int M = decltype(m)::value;
      return launch_blocks<kType, Decode<kF16, D, M, N>>(p, device, stream,
                                                         decode_kernel<kF16, D, M, N>);
    };
    if (rows <= 8) return launch(std::integral_constant<int, 8>());
    if (rows <= 16) return launch(std::integral_constant<int, 16>());
    if (rows <= 64) return launch(std::integral_constant<int, 64>());
    return launch(std::integral_constant<int, 128>());
  }
}

}  // namespace flashjax::sm90
