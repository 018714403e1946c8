// The launch of the sm_90a backward of sequences that have one tile of keys each: what fills in
// zeros, and the kernel.
#pragma once
#include <algorithm>

#include "backward_lone_kernel.cuh"
#include "host.h"
#include "sequences.h"

namespace flashjax::sm90 {

// Whether a call can go this way. The sum over queries that dsinks is takes statistics, segment ids
// are not looked at, and delta is summed over the keys of the call, which have to be all that `out`
// has seen.
inline bool has_lone_tiles(const BwdParams& p) {
  const int64_t longest = p.max_seqlen_k < 0 ? p.t : std::min(p.t, p.max_seqlen_k);
  return longest <= 128 && p.b * p.s * p.t * p.h * p.g > 0 && !p.segment_ids_q && !p.dsinks &&
         !p.part;
}

// `near` key heads work beside each other, on queries in pieces of `chunk`.
template <DType kType, int D>
cudaError_t launch_lone_backward(const BwdParams& p, const cuda::Device& device, int64_t near,
                                 int64_t chunk, cudaStream_t stream) {
  constexpr bool kF16 = kType == DType::kF16;
  using K = LoneBackward<kF16, D>;
  constexpr int M = K::M, N = K::N;
  constexpr auto kernel = backward_kernel<K>;
  PlanShape shapes[2] = {{false, N, chunk, Order::kMostFirst, M},
                         {true, M, chunk, Order::kForwards, M}};
  // Sequences begin at multiples of M where queries are padded, which only the plan sees.
  const int64_t rows = (p.s + 127) / 128 * 128 + (p.cu_seqlens_q || p.cu_seqlens_k ? 128 * p.n : 0);
  const int64_t tiles = plan_tiles(p, shapes[1]), items = plan_tiles(p, shapes[0]) * p.g;
  const int64_t changes = (p.b * (rows / 64) * 4 + 255) / 256 * 256;
  if (items > INT32_MAX || tiles > INT32_MAX || p.b * rows > INT32_MAX || p.s >= 1 << 29 ||
      p.t >= 1 << 27)
    return cudaErrorInvalidConfiguration;
  if (p.workspace_bytes < changes + plan_bytes(p, shapes[0]) + plan_bytes(p, shapes[1]))
    return cudaErrorInvalidValue;

  cudaError_t error = cudaSuccess;
  auto check = [&](cudaError_t x) { error = cuda::first_error(error, x); };
  Plan plan[2];
  shapes[0].changes = static_cast<int*>(p.workspace), shapes[0].rows = rows;
  check(plan_sequences(p, shapes, 2, static_cast<char*>(p.workspace) + changes, plan, stream));
  if (error != cudaSuccess) return error;
  LoneArgs a{};
  a.p = problem(p);
  a.keys = plan[0].spans, a.key_tiles = plan[0].count, a.ticket = plan[0].ticket;
  a.queries = plan[1].spans, a.query_tiles = plan[1].count;
  a.dq = static_cast<unsigned short*>(p.dq), a.d = static_cast<int>(p.d), a.yields = p.yields;
  a.lse = p.lse, a.dlse = p.dlse;
  a.ratio = a.p.h / a.p.g;
  a.group = a.p.left >= 0 || a.p.right >= 0 ? static_cast<int>(std::min(near, p.g)) : 1;
  TMap q, k, v, dout, dk, dv;
  auto map = [&](TMap& x, const void* data, int64_t rows, int64_t heads, int64_t width, int box) {
    check(sequence_map(x, data, p.dtype, p.b, rows, heads, width, box));
  };
  map(q, p.q, p.s, p.h, p.d, M), map(dout, p.dout, p.s, p.h, p.e, M);
  map(k, p.k, p.t, p.g, p.d, N), map(v, p.v, p.t, p.g, p.e, N);
  map(a.dq_map, p.dq, p.s, p.h, p.d, 64);
  map(dk, p.dk, p.t, p.g, p.d, K::kStoreRows), map(dv, p.dv, p.t, p.g, p.e, K::kStoreRows);
  // A few turns of hardly anything each, as a rule.
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(tiles, 8 * device.sms));
  check(launch_after(lone_zeros<M>, dim3(blocks), 256, 0, 1, stream,
                     static_cast<const BackwardArgs&>(a), p.cu_seqlens_q, p.cu_seqlens_k,
                     static_cast<int>(p.n)));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kSmem));
  if (error != cudaSuccess) return error;
  const int64_t grid = p.yields ? items : std::min<int64_t>(items, device.sms);
  kernel<<<static_cast<unsigned>(grid), K::kThreads, K::kSmem, stream>>>(q, k, v, dout, dk, dv, a);
  return cudaGetLastError();
}

}  // namespace flashjax::sm90
