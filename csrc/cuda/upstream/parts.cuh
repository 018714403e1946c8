// What FlashAttention-2 is told of sequences. A part is one sequence of one row, as sequence.h has
// it; the kernels' "batch" is the list of parts. Calls whose rows are one whole sequence each need
// no list.
#pragma once
#include "../../attention/sequence.h"
#include "../launch.h"

namespace flashjax::upstream {

constexpr int kPad = 128;  // rows that the backward keeps free after each part in its own arrays

struct Part {
  int q_begin, q_len;  // rows of q[row]
  int k_len, move;     // keys by which the diagonal is off the bottom right corner
  int64_t k_row;       // first key, counted over all of k
};

// One block of work: rows (of queries, or of keys) [index * size, (index + 1) * size) of a part;
// -1: none.
struct Tile {
  int part, index;
};

// The sequences of a call. Host and device.
struct Parts {
  const Part* list;  // null: part b is row b, whole
  int n;             // parts of a row
  int s, t, h;
  int pitch;  // from a row to the next, in steps of a query
  int rows;   // of a row in the backward's own arrays
};

// What to list: blocks of `size` queries, or keys. fold > 0: each row has one query, which stands
// `fold` times; its window becomes the range of its keys.
struct Walk {
  int size;
  bool of_keys = false;
  int fold = 0;
};

inline int64_t tiles_of(const Problem& p, int64_t extent, int64_t size) {
  return p.b * ((extent + size - 1) / size + p.n);
}

inline bool is_whole(const Problem& p) {
  return !p.cu_seqlens_q && !p.cu_seqlens_k && !p.seqused_q && !p.seqused_k && !p.leftpad &&
         !p.batch_idx && !p.shift && p.max_seqlen_q < 0 && p.max_seqlen_k < 0;
}

// cu_seqlens that fall make sequences of a row overlap: what two would write belongs to the first.
__device__ __forceinline__ bool falls(const int32_t* cu, int64_t n, int64_t x) {
  return cu && cu[x / n * (n + 1) + x % n + 1] < cu[x / n * (n + 1) + x % n];
}

__device__ __forceinline__ void cut(const Problem& p, int64_t b, int64_t n, Sequence& z) {
  int64_t q = 0, k = 0;  // ends of those before it
  for (int64_t i = 0; i < n; ++i) {
    const Sequence before = sequence(p, b, i);
    q = imax(q, before.q_begin + before.q_len), k = imax(k, before.k_begin + before.k_len);
  }
  q = clamp(q - z.q_begin, 0, z.q_len), k = clamp(k - z.k_begin, 0, z.k_len);
  z.q_begin += q, z.q_len -= q, z.k_begin += k, z.k_len -= k, z.diagonal += q - k;
}

// Fills the list and the tiles, if there are any. One block.
static __global__ void __launch_bounds__(1024)
    list_parts(const __grid_constant__ Problem p, Part* parts, Tile* tiles, int tile_count,
               Walk walk) {
  __shared__ int total[32], start;
  const int count = static_cast<int>(p.b * p.n), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) start = 0;
  bool overlap = false;
  for (int x = threadIdx.x; x < count; x += blockDim.x)
    overlap |= falls(p.cu_seqlens_q, p.n, x) || falls(p.cu_seqlens_k, p.n, x);
  overlap = __syncthreads_or(overlap);
  for (int first = 0; first < count; first += blockDim.x) {
    const int x = first + threadIdx.x;
    int mine = 0;
    if (x < count) {
      const int64_t b = x / p.n;
      Sequence z = sequence(p, b, x % p.n);
      if (overlap) cut(p, b, x % p.n, z);
      Part part;
      part.q_begin = static_cast<int>(z.q_begin), part.q_len = static_cast<int>(z.q_len);
      part.k_len = static_cast<int>(z.k_len);
      part.move = static_cast<int>(z.diagonal - (z.k_len - z.q_len));
      part.k_row = p.page_table || !z.k_len ? 0 : key_row(p, b, z, 0);
      if (walk.fold) {
        const Range keys = visible_keys(p, z, 0, 1);
        part.q_len *= walk.fold, part.k_len = static_cast<int>(keys.end - keys.begin);
        part.k_row += keys.begin, part.move = 0;
      }
      parts[x] = part;
      mine = ((walk.of_keys ? part.k_len : part.q_len) + walk.size - 1) / walk.size;
    }
    int sum = mine;  // over the threads up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) total[warp] = sum;
    __syncthreads();
    int before = start;
    for (int w = 0; w < warp; ++w) before += total[w];
    for (int i = 0, at = before + sum - mine; tiles && i < mine; ++i, ++at)
      if (at < tile_count) tiles[at] = {x, i};
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) start = before + sum;
    __syncthreads();
  }
  for (int at = start + threadIdx.x; tiles && at < tile_count; at += blockDim.x)
    tiles[at] = {-1, 0};
}

}  // namespace flashjax::upstream
