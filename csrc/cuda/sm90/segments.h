// Host side of segments.cuh: what a launch does before its kernel when rows hold documents or
// packed sequences.
#pragma once
#include "host.h"
#include "segments.cuh"

namespace flashjax::sm90 {

// Of the workspace, for `tiles` tiles a row.
inline int64_t segments_bytes(const flashjax::Problem& p, int64_t tiles) {
  return (p.segment_ids_q || p.cu_seqlens_q ? 8 * p.b * tiles : 0) +
         (p.cu_seqlens_q ? 4 * p.b * (p.s + p.t) : 0);
}

// Fills x.segment_q, x.segment_k, x.packed and x.near. A tile is `size` queries (by_query) or keys.
inline cudaError_t segments(Problem& x, const flashjax::Problem& p, int size, void* workspace,
                            bool by_query, cudaStream_t stream) {
  if (!p.segment_ids_q && !p.cu_seqlens_q) return cudaSuccess;
  const int count = by_query ? x.s : x.t, others = by_query ? x.t : x.s,
            tiles = (count + size - 1) / size;
  if (tiles == 0 || x.b == 0) return cudaSuccess;
  int* near = static_cast<int*>(workspace);
  if (p.cu_seqlens_q) {
    int* queries = near + int64_t{2} * x.b * tiles;
    int* keys = queries + int64_t{1} * x.b * x.s;
    const int longest =
        p.max_seqlen_q < 0 || p.max_seqlen_q > x.s ? -1 : static_cast<int>(p.max_seqlen_q);
    packed_segments<<<dim3((x.s + 255) / 256, x.b), 256, 0, stream>>>(
        p.cu_seqlens_q, static_cast<int>(p.n), x.s, longest, queries, keys);
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    x.segment_q = queries, x.segment_k = keys, x.packed = 1;
  }
  segment_ranges<<<dim3(tiles, x.b), 256, 0, stream>>>(by_query ? x.segment_q : x.segment_k, count,
                                                       size, by_query ? x.segment_k : x.segment_q,
                                                       others, near);
  x.near = near;
  return cudaGetLastError();
}

}  // namespace flashjax::sm90
