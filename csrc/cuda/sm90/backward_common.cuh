// What the two kernels of the sm_90a backward share: their arguments, which tile a CTA owns, and
// what the producing warpgroup does. `K` is the kernel: its constants, and a Layout of shared
// memory with the addresses of its tiles (stage i of kStages follows the first) and barriers.
#pragma once
#include "problem.cuh"
#include "wgmma.cuh"

namespace flashjax::sm90 {

struct BackwardArgs {
  Problem p;
  const float *lse2,
      *delta;  // [b * h, rows]: lse * log2(e), +inf where P is to be 0; sum of dout * out - dlse
  float* dq;   // [b * h, rows * D], zeroed; register order within a tile of M x D
  int rows;    // s rounded up to M
  int nblocks, group;  // key blocks of a head; key heads of an L2 section
  int clean;  // some query of a visited tile may have seen nothing, and its dout may be NaN
};

enum : int {
  kBackwardMasks = 1,   // windows
  kBackwardScores = 2,  // softcap, bias, alibi, segment ids
};

// N keys of one key head, the queries that see some of them, and the group's query heads.
struct KeyTile {
  int n, g, b, first_head, heads;
  Blocks blocks;
  DI u32 steps() const { return heads * (blocks.end - blocks.begin); }
};

// Sections of `group` key heads; key blocks outermost inside one, so that under a causal mask the
// longest go first.
template <int M, int N, bool kScore>
DI KeyTile key_tile(const BackwardArgs& a, int i) {
  const Problem& p = a.p;
  const int per = a.group * a.nblocks, section = i / per, r = i - section * per;
  const int heads = min(a.group, p.b * p.g - section * a.group);
  const int bg = section * a.group + r % heads;
  KeyTile x;
  x.n = r / heads, x.g = bg % p.g, x.b = bg / p.g, x.heads = p.h / p.g;
  x.first_head = x.g * x.heads;
  x.blocks = query_blocks<M>(p, x.n * N, min(x.n * N + N, p.t),
                             kScore && p.near ? p.near + 2 * (x.b * a.nblocks + x.n) : nullptr);
  return x;
}

template <class K>
struct BackwardProducer {
  using Layout = typename K::Layout;
  static constexpr int M = K::kM, N = K::kN, kStages = K::kStages, kChunks = K::kChunks;
  static constexpr bool kScore = K::kScore;

  // By one thread. Q and dO are released by 2 warpgroups, and Q by the cleaning warp, if it runs.
  static DI void init(const Layout& x, bool clean) {
    mb_init(x.kv_full, 1), mb_init(x.kv_raw, 1);
#pragma unroll
    for (int i = 0; i < kStages; i++) {
      mb_init(x.q_full + 8 * i, 1), mb_init(x.q_empty + 8 * i, 2 + clean);
      mb_init(x.o_full + 8 * i, 1), mb_init(x.o_empty + 8 * i, 2);
      mb_init(x.o_raw + 8 * i, 1), mb_init(x.q_raw + 8 * i, 1);
    }
    mb_init_fence();
    fence_async();
  }

  static DI void load(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                      const BackwardArgs& a, const Layout& x, const KeyTile& tile) {
    const bool packed = kScore && a.p.packed;
    const u32 kv = packed ? x.kv_raw : x.kv_full;
    mb_expect(kv, 2 * K::kKBytes);
#pragma unroll 1
    for (int c = 0; c < kChunks; c++) {
      tma_load(x.k + c * N * 128, &mk, kv, c * 64, tile.n * N, tile.g, tile.b, kEvictFirst);
      tma_load(x.v + c * N * 128, &mv, kv, c * 64, tile.n * N, tile.g, tile.b, kEvictFirst);
    }
    int m = tile.blocks.begin, h = tile.first_head;
    const u32 steps = tile.steps();
#pragma unroll 1
    for (u32 it = 0; it < steps; it++) {
      const u32 s = it % kStages;
      // M rows, and a number of each, once a stage is free.
      auto put = [&](const TMap& map, u32 rows, u32 numbers, u32 empty, u32 full,
                     const float* from) {
        mb_wait(empty + 8 * s, ~(it / kStages) & 1);
        mb_expect(full + 8 * s, K::kQBytes + M * 4);
#pragma unroll 1
        for (int c = 0; c < kChunks; c++)
          tma_load(rows + s * K::kQBytes + c * M * 128, &map, full + 8 * s, c * 64, m * M, h,
                   tile.b, kEvictLast);
        bulk_load(numbers + s * M * 4, from + ((long long)tile.b * a.p.h + h) * a.rows + m * M,
                  M * 4, full + 8 * s);
      };
      put(mq, x.q, x.lse, x.q_empty, packed ? x.q_raw : x.q_full, a.lse2);
      put(mdo, x.o, x.delta, x.o_empty, kScore || a.clean ? x.o_raw : x.o_full, a.delta);
      if (++m == tile.blocks.end) m = tile.blocks.begin, h++;
    }
  }

  // Rows whose P is 0 become 0, for 0 * NaN is NaN: of dO always, and of Q, K and V where sequences
  // are packed. By a warp, and only if a.clean.
  static DI void clean(const Problem& p, const Layout& x, const KeyTile& tile) {
    const int lane = threadIdx.x & 31;
    const bool packed = kScore && p.packed;
    if (packed) {
      mb_wait(x.kv_raw, 0);
#pragma unroll 1
      for (int r0 = 0; r0 < N; r0 += 32) {
        const int key = tile.n * N + r0 + lane;
        const u32 dead =
            __ballot_sync(~0u, key < p.t && p.segment_k[(long long)tile.b * p.t + key] == kNoKey);
        clear_rows<kChunks>(x.k, N, r0, dead);
        clear_rows<kChunks>(x.v, N, r0, dead);
      }
      fence_async();
      __syncwarp();
      if (lane == 0) mb_arrive(x.kv_full);
    }
    const u32 steps = tile.steps();
#pragma unroll 1
    for (u32 it = 0; it < steps; it++) {
      const u32 s = it % kStages;
      mb_wait((packed ? x.q_raw : x.q_full) + 8 * s, it / kStages & 1);
      mb_wait(x.o_raw + 8 * s, it / kStages & 1);
#pragma unroll 1
      for (int r0 = 0; r0 < M; r0 += 32) {
        const float l = load_shared(x.lse + s * M * 4 + (r0 + lane) * 4);
        const u32 dead = __ballot_sync(~0u, l == infinity());
        clear_rows<kChunks>(x.o + s * K::kQBytes, M, r0, dead);
        if (packed) clear_rows<kChunks>(x.q + s * K::kQBytes, M, r0, dead);
      }
      fence_async();
      __syncwarp();
      if (lane == 0) {
        if (packed) mb_arrive(x.q_full + 8 * s);
        mb_arrive(x.o_full + 8 * s), mb_arrive(x.q_empty + 8 * s);
      }
    }
  }
};

// ---- A warpgroup's accumulator of 64 rows: a thread has the columns c, c + 1, c + 8, c + 9, ...
// of two rows 8 apart, `half` 0 and 1.

// The row keeps its columns least to most, counted from c.
template <int kCount>
DI void mask_row(float (&x)[kCount], int half, int least, int most) {
#pragma unroll
  for (int j = 0; j < kCount / 4; j++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (8 * j + e < least || 8 * j + e > most) x[4 * j + 2 * half + e] = -infinity();
}

// The row keeps the columns whose id is its own. `ids` has `count`, that of column c at `first`.
template <int kCount>
DI void mask_segment(float (&x)[kCount], int half, int own, const int* ids, int first, int count) {
#pragma unroll
  for (int j = 0; j < kCount / 4; j++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (ids[min(first + 8 * j + e, count - 1)] != own) x[4 * j + 2 * half + e] = -infinity();
}

// To shared memory in 16 bits, times f: this lane's `row` of a swizzled tile at `to`, whose chunks
// of 64 columns are `chunk` bytes apart. Lanes 8 to 15 name rows 8 further.
template <bool F16, int kCount>
DI void put_rows(const float (&x)[kCount], u32 to, int chunk, int row, float f) {
  const int right = (threadIdx.x & 31) >> 4;
#pragma unroll
  for (int s = 0; s < kCount / 8; s++)
    stmatrix4(to + (s / 4) * chunk + row * 128 + (((2 * (s % 4) + right) ^ (row & 7)) << 4),
              pack<F16>(x[8 * s] * f, x[8 * s + 1] * f),
              pack<F16>(x[8 * s + 2] * f, x[8 * s + 3] * f),
              pack<F16>(x[8 * s + 4] * f, x[8 * s + 5] * f),
              pack<F16>(x[8 * s + 6] * f, x[8 * s + 7] * f));
}

}  // namespace flashjax::sm90
