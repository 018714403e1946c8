// Sequences packed into a row become segments of it; and which part of a row a tile has to look at
// when there are segment ids: from the first to the last that has an id between the tile's least
// and greatest. Exact for documents in order; for ids in any order it is right, if wide.
#pragma once
#include "problem.cuh"

namespace flashjax::sm90 {

// near[b, tile] = {first, last + 1} among others[b, count]; equal if there is none. A block a tile.
static __global__ void __launch_bounds__(256)
    segment_ranges(const int* own, int own_count, int tile_size, const int* others, int count,
                   int* near) {
  __shared__ int least, greatest, first, last;
  const int tile = blockIdx.x, b = blockIdx.y;
  if (threadIdx.x == 0) least = 0x7fffffff, greatest = -0x7fffffff - 1, first = count, last = 0;
  __syncthreads();
  own += (long long)b * own_count, others += (long long)b * count;
  for (int i = tile * tile_size + threadIdx.x; i < min((tile + 1) * tile_size, own_count); i += 256)
    atomicMin(&least, own[i]), atomicMax(&greatest, own[i]);
  __syncthreads();
  int lo = count, hi = 0;
  for (int i = threadIdx.x; i < count; i += 256)
    if (others[i] >= least && others[i] <= greatest) lo = min(lo, i), hi = i + 1;
  if (hi > 0) atomicMin(&first, lo), atomicMax(&last, hi);
  __syncthreads();
  if (threadIdx.x == 0) {
    near += 2 * ((long long)b * gridDim.x + tile);
    near[0] = min(first, last), near[1] = last;
  }
}

// Sequences packed into rows of equal layout for queries and keys, as segment ids: the number of
// the sequence, and what matches nothing for rows outside of all: kNoQuery, kNoKey. cu: [b, n + 1].
static __global__ void __launch_bounds__(256)
    packed_segments(const int* cu, int n, int rows, int longest, int* queries, int* keys) {
  const int row = blockIdx.x * 256 + threadIdx.x, b = blockIdx.y;
  if (row >= rows) return;
  cu += (long long)b * (n + 1);
  int lo = 0, hi = n;  // the first sequence that ends past the row
  while (lo < hi) {
    const int mid = (lo + hi) / 2;
    if (cu[mid + 1] > row)
      hi = mid;
    else
      lo = mid + 1;
  }
  const bool in = lo < n && cu[lo] <= row && (longest < 0 || row - max(cu[lo], 0) < longest);
  queries[(long long)b * rows + row] = in ? lo : kNoQuery;
  keys[(long long)b * rows + row] = in ? lo : kNoKey;
}

}  // namespace flashjax::sm90
