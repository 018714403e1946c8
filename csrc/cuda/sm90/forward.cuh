// The launch of the sm_90a forward.
#pragma once
#include <algorithm>

#include "decode.cuh"
#include "forward_kernel.cuh"
#include "host.h"
#include "sequences.h"

namespace flashjax::sm90 {

template <DType kType, int D, int E, int M, int N, cuda::Variant kVariant>
cudaError_t launch_tile(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  constexpr bool kF16 = kType == DType::kF16;
  using V = cuda::Variant;
  constexpr bool kPaged = kVariant == V::kPaged || kVariant == V::kPagedScores;
  constexpr bool kBent = kVariant == V::kScores || kVariant == V::kPagedScores;
  constexpr int kOptions =
      forward_options(D, E, M, N, kVariant != V::kFull,
                      kPaged || kBent || kVariant == V::kSequences, kBent, kPaged);
  using K = Forward<kF16, D, E, M, N, kOptions>;
  ForwardArgs a{};
  a.p = problem(p);
  a.scale = p.scale * kLog2E;
  a.lse = p.lse, a.out = static_cast<u32*>(p.out);
  const PlanShape shape{true, M, 0};
  const int64_t mblocks = K::kSpan ? plan_tiles(p, shape) : p.b * ((p.s + M - 1) / M);
  const int64_t tiles = mblocks * p.h;
  if (p.b * p.s * p.h == 0) return cudaSuccess;
  if (tiles > INT32_MAX || p.s >= 1 << 29 || p.t >= 1 << 29) return cudaErrorInvalidConfiguration;
  a.mblocks = static_cast<int>((p.s + M - 1) / M), a.tiles = static_cast<int>(tiles);
  a.group = 1;
  const int64_t ratio = p.h / p.g,
                longest = p.max_seqlen_k < 0 ? p.t : std::min(p.t, p.max_seqlen_k);
  // In long rows few blocks raise the maximum, and following it at once, for its exactness, costs
  // little.
  const bool follows = longest > 32768;
  a.far = follows ? 0.f : 1.f, a.farthest = follows ? 0.f : 8.f;
  if (K::kMask) {
    // Measured: at d = 256 twice as many heads were better, and with shared key heads half as many.
    const int64_t bytes = longest * (p.d + p.e) * (D == 256 ? 1 : 2);
    const int64_t heads = heads_in_l2(ratio > 1 ? 2 * bytes : bytes) * ratio;
    a.group = static_cast<int>(std::min(heads, K::kSpan ? p.h : p.h * p.b));
  }
  const int heads = static_cast<int>(p.b * p.h);
  a.sections = heads / a.group, a.rest = heads % a.group;
  a.by_section = Divider(a.group * a.mblocks), a.by_group = Divider(a.group);
  a.by_rest = Divider(a.rest ? a.rest : 1);
  a.by_h = Divider(static_cast<int>(p.h)), a.by_ratio = Divider(static_cast<int>(p.h / p.g));
  // Blocks that stay for all their tiles keep transfers from starting: then each leaves after about
  // 16k keys.
  const int64_t each = p.yields ? 1 + 16384 / (longest + 1) : tiles;
  const int64_t least = (tiles + each - 1) / each, most = tiles < device.sms ? tiles : device.sms;
  const int blocks = static_cast<int>(least < most ? most : least);
  auto map = [&](TMap& x, const void* data, int64_t b, int64_t rows, int64_t heads, int64_t width,
                 int box) {
    return K::kSpan ? sequence_map(x, data, p.dtype, b, rows, heads, width, box)
                    : tensor_map(x, data, p.dtype, b, rows, heads, width, box);
  };
  TMap q, k, v, o;
  cudaError_t error = map(q, p.q, p.b, p.s, p.h, p.d, M);
  // Keys in pages are sequences of one box each.
  if (kPaged) a.pages = pages(p, N);
  const int64_t rows = kPaged ? a.pages.box : p.t, entries = kPaged ? p.c * (p.page / rows) : p.c;
  const int box = kPaged ? a.pages.box : N;
  if (kPaged && entries * rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool keys = p.t > 0 && p.c > 0;
  error = cuda::first_error(error, map(k, keys ? p.k : p.q, entries, rows, p.g, p.d, box));
  error = cuda::first_error(error, map(v, keys ? p.v : p.q, entries, rows, p.g, p.e, box));
  error = cuda::first_error(error, map(o, p.out, p.b, p.s, p.h, p.e, 64));
  if (error != cudaSuccess) return error;
  if constexpr (K::kSpan) {
    if (p.workspace_bytes < plan_bytes(p, shape)) return cudaErrorInvalidValue;
    // Chunks of sequences whose keys, of the heads of a section, fit in the L2 like one long one.
    const int64_t heads = (a.group + ratio - 1) / ratio;
    const int64_t chunk = (int64_t{32} << 20) / (heads * (p.d + p.e) * 2);
    Plan plan;
    const PlanShape ordered{true, M, chunk};
    error = plan_sequences(p, &ordered, 1, p.workspace, &plan, stream);
    if (error != cudaSuccess) return error;
    a.ticket = plan.ticket, a.spans = plan.spans, a.count = plan.count;
  } else if (K::kDyn && tiles > blocks && p.workspace_bytes >= 4) {
    a.ticket = static_cast<int*>(p.workspace);
    if ((error = cudaMemsetAsync(a.ticket, 0, 4, stream)) != cudaSuccess) return error;
  }
  auto kernel = forward_kernel<kF16, D, E, M, N, kOptions>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kSmem);
  if (error != cudaSuccess) return error;
  if (K::kSpan)
    return launch_after(kernel, dim3(blocks), K::kThreads, K::kSmem, 1, stream, q, k, v, o, a);
  kernel<<<blocks, K::kThreads, K::kSmem, stream>>>(q, k, v, o, a);
  return cudaGetLastError();
}

// At d = 128, whether tiles of 192 queries are best. They read K and V less often, which is energy,
// and so time; but more of their last rows and of their masked blocks is for nothing, and where
// they are dealt and not drawn, more multiprocessors may have nothing to do in the last round.
inline bool is_tall(cuda::Variant variant, const FwdParams& p, int sms) {
  if (variant == cuda::Variant::kFull) {
    const auto rounds = [&](int64_t m) {
      return (p.b * p.h * ((p.s + m - 1) / m) + sms - 1) / sms * m;
    };
    return rounds(192) * 100 <= rounds(128) * 104;
  }
  if (p.window_left >= 0 || p.segment_ids_q) return false;
  return variant == cuda::Variant::kSequences ? p.s / p.n >= 2304 : p.s >= 8192;
}

template <DType kType, int D, int E, int M, int N, cuda::Variant kVariant>
cudaError_t launch_forward(const FwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  if constexpr (kVariant == cuda::Variant::kDecode || kVariant == cuda::Variant::kLatent) {
    return launch_decode<kType, D, N>(p, device, stream);
  } else {
    if constexpr (D <= 128 &&
                  (kVariant == cuda::Variant::kFull || kVariant == cuda::Variant::kMasked)) {
      // Few tiles: halves on twice as many multiprocessors.
      if (p.b * p.h * ((p.s + 63) / 64) <= device.sms)
        return launch_tile<kType, D, E, 64, 128, kVariant>(p, device, stream);
    }
    if constexpr (D == 128 && M == 192) {
      if (!is_tall(kVariant, p, device.sms))
        return launch_tile<kType, D, E, 128, 128, kVariant>(p, device, stream);
    }
    return launch_tile<kType, D, E, M, N, kVariant>(p, device, stream);
  }
}

}  // namespace flashjax::sm90
