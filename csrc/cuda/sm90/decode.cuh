// The launch of the sm_90a decode kernels.
#pragma once
#include "decode_kernel.cuh"
#include "host.h"

namespace flashjax::sm90 {

// Enqueues a kernel that may begin while the one before it ends; both call griddepcontrol.wait.
template <typename... Args>
cudaError_t launch_after(void (*kernel)(Args...), dim3 grid, int threads, int smem,
                         cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = smem;
  config.stream = stream, config.attrs = &early, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <DType kType, int D, int M, int N>
cudaError_t launch_blocks(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  constexpr bool kF16 = kType == DType::kF16;
  using K = Decode<kF16, D, M, N>;
  auto up = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const int64_t ratio = p.h / p.g;
  DecodeArgs a{};
  a.p = p;
  a.pages = pages(p, N);
  a.out = static_cast<u32*>(p.out), a.lse = p.lse;
  a.block_heads = static_cast<int>(ratio < M ? ratio : M);
  const int64_t queries = M / a.block_heads;
  a.block_queries = static_cast<int>(p.s < queries ? p.s : queries);
  const int64_t head_blocks = up(ratio, a.block_heads);
  const int64_t heads = p.g * head_blocks * up(p.s, a.block_queries), tiles = up(p.t, N);
  a.head_blocks = static_cast<int>(head_blocks);
  a.blocks = static_cast<int>(heads / p.g), a.heads = static_cast<int>(heads);
  auto bound = [](int64_t x) { return static_cast<int>(x < 0 ? -1 : x > 1 << 29 ? 1 << 29 : x); };
  a.left = bound(p.window_left), a.right = bound(p.window_right);
  a.bucket = static_cast<int>(up(p.b, K::kBuckets));
  const int64_t splits = p.num_splits < tiles ? p.num_splits : tiles;
  a.splits = static_cast<int>(splits < 0 ? 0 : splits);

  // Partial results: two slots for each CTA, or one for each part that was asked for.
  const int64_t rows = a.rows(), slot = rows * (D + 1) * 4;
  const int64_t most = p.b * heads * (tiles > a.splits ? tiles : a.splits);
  if (most > INT32_MAX || p.t >= 1 << 29) return cudaErrorInvalidConfiguration;
  int64_t ctas = int64_t{1} * K::kCtas * device.sms, owners = p.b * heads, slots = most;
  if (a.splits) {
    slots = p.b * heads * a.splits;
    if (p.workspace_bytes < 16 + slots * slot) return cudaErrorInvalidValue;
    if (ctas > slots) ctas = slots;
  } else {
    const int64_t fit = (p.workspace_bytes - 16) / (sizeof(Joint) + 2 * slot);
    if (ctas > fit) ctas = fit;
    if (ctas > most) ctas = most > 0 ? most : 1;
    if (ctas < 1) return cudaErrorInvalidValue;
    a.by_head = owners < ctas;
    if (!a.by_head) owners = ctas;
    slots = 2 * ctas;
  }
  char* next = static_cast<char*>(p.workspace);
  if (!a.splits) a.joints = reinterpret_cast<Joint*>(next), next += owners * sizeof(Joint);
  a.part_out = reinterpret_cast<float*>(next), next += slots * rows * D * 4;
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
  auto kernel = decode_kernel<kF16, D, M, N>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kSmem);
  if (error != cudaSuccess) return error;
  error = launch_after(kernel, dim3(static_cast<unsigned>(ctas)), K::kThreads, K::kSmem, stream, q,
                       k, v, a);
  if (error != cudaSuccess || a.splits == 1 || tiles == 0) return error;
  // Many parts of each head are put together by all threads of a block, few by some of them.
  constexpr int kGroups = 128 / (D / 4);
  a.team = ctas >= 8 * owners || a.splits >= 8 ? kGroups : 1;
  const dim3 grid(static_cast<unsigned>(owners), static_cast<unsigned>(up(rows, kGroups / a.team)));
  return launch_after(combine_kernel<kF16, D, N>, grid, 128, 0, stream, a);
}

// A warpgroup of 64 rows is enough for most; two share what they read.
template <DType kType, int D, int N>
cudaError_t launch_decode(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  if (p.b * p.s * p.h == 0) return cudaSuccess;
  if (p.s * (p.h / p.g) <= 64) return launch_blocks<kType, D, 64, N>(p, device, stream);
  return launch_blocks<kType, D, 128, N>(p, device, stream);
}

}  // namespace flashjax::sm90
