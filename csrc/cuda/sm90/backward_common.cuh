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
  float* acc;  // dQ, [b * h, rows * D]; register order within a tile of M x D
  int rows;    // s rounded up to 128
  int nblocks, group;  // key blocks of a head; key heads of an L2 section
  int clean;    // some query of a visited tile may have seen nothing, and its dout may be NaN
  int stagger;  // key blocks of a head begin at different queries
  u64* visits;  // [b * h, rows / 64], of the tile that begins there: see Visits
  int* ticket;  // key tiles that were taken
  int yields;   // transfers want to start beside the kernel: no CTA stays for a second key tile
  unsigned short* dq;  // [b, s, h, d]
  int d;
};

// The key blocks that add to a tile of dQ: how many there are, have begun, and are done. Whoever
// begins first stores, and the others add.
struct Visits {
  u64 word;
  static constexpr int kBits = 21;
  DI int part(int i) const { return (int)(word >> (i * kBits)) & ((1 << kBits) - 1); }
  DI int begun() const { return part(0); }
  DI int done() const { return part(1); }
  DI int all() const { return part(2); }
  static DI u64 to_begin() { return 1; }
  static DI u64 to_be_done() { return (u64)1 << kBits; }
  static DI u64 initial(int all) { return (u64)all << (2 * kBits); }
};

enum : int {
  kBackwardMasks = 1,   // windows
  kBackwardScores = 2,  // softcap, bias, alibi, segment ids
};

// N keys of one key head, the queries that see some of them, and the group's query heads.
struct KeyTile {
  int n, g, b, first_head, heads;
  int start;  // the walk goes from here to the end of `blocks`, and on from its beginning
  Blocks blocks;
  DI u32 steps() const { return heads * (blocks.end - blocks.begin); }
};

struct Walk {
  int m, h;
  DI explicit Walk(const KeyTile& x) : m(x.start), h(x.first_head) {}
  DI void next(const KeyTile& x) {
    if (++m == x.blocks.end) m = x.blocks.begin;
    if (m == x.start) h++;
  }
};

// The queries that see some keys of block n.
template <class K>
DI Blocks queries_of(const BackwardArgs& a, int n, int b) {
  return query_blocks<K::kM>(a.p, n * K::kN, min(n * K::kN + K::kN, a.p.t),
                             K::kScore && a.p.near ? a.p.near + 2 * (b * a.nblocks + n) : nullptr);
}

// Sections of `group` key heads; key blocks outermost inside one, so that under a causal mask the
// longest go first.
template <class K>
DI KeyTile key_tile(const BackwardArgs& a, int i) {
  const Problem& p = a.p;
  const int per = a.group * a.nblocks, section = i / per, r = i - section * per;
  const int heads = min(a.group, p.b * p.g - section * a.group);
  const int bg = section * a.group + r % heads;
  KeyTile x;
  x.n = r / heads, x.g = bg % p.g, x.b = bg / p.g, x.heads = p.h / p.g;
  x.first_head = x.g * x.heads;
  x.blocks = queries_of<K>(a, x.n, x.b);
  x.start = x.blocks.begin;
  if (K::kPersistent && a.stagger)
    x.start += (int)((long long)x.n * (x.blocks.end - x.blocks.begin) / a.nblocks);
  return x;
}

template <class K>
struct BackwardProducer {
  using Layout = typename K::Layout;
  static constexpr int M = K::kM, N = K::kN, kStages = K::kStages, kChunks = K::kChunks;
  static constexpr bool kScore = K::kScore;

  // By one thread. Q and dO are released by 2 warpgroups, and Q by the cleaning warp, if it runs.
  static DI void init(const Layout& x, bool clean) {
#pragma unroll
    for (int i = 0; i < kStages; i++) {
      mb_init(x.q_full + 8 * i, 1), mb_init(x.q_empty + 8 * i, 2 + clean);
      mb_init(x.o_full + 8 * i, 1), mb_init(x.o_empty + 8 * i, 2);
      mb_init(x.o_raw + 8 * i, 1), mb_init(x.q_raw + 8 * i, 1);
    }
    mb_init_fence();
    fence_async();
  }

  // The keys of a tile, of K or V; `full` expects them.
  static DI void load_keys(const TMap& map, u32 to, const KeyTile& tile, u32 full) {
#pragma unroll 1
    for (int c = 0; c < kChunks; c++)
      tma_load(to + c * N * 128, &map, full, c * 64, tile.n * N, tile.g, tile.b, kEvictFirst);
  }

  // The queries of one step; `it` counts the steps of a CTA, here and below.
  static DI void load_queries(const TMap& mq, const TMap& mdo, const BackwardArgs& a,
                              const Layout& x, int b, const Walk& at, u32 it) {
    const bool packed = kScore && a.p.packed;
    const u32 s = it % kStages;
    // M rows, and a number of each, once a stage is free.
    auto put = [&](const TMap& map, u32 rows, u32 numbers, u32 empty, u32 full, const float* from) {
      mb_wait(empty + 8 * s, ~(it / kStages) & 1);
      mb_expect(full + 8 * s, K::kQBytes + M * 4);
#pragma unroll 1
      for (int c = 0; c < kChunks; c++)
        tma_load(rows + s * K::kQBytes + c * M * 128, &map, full + 8 * s, c * 64, at.m * M, at.h, b,
                 kEvictLast);
      bulk_load(numbers + s * M * 4, from + ((long long)b * a.p.h + at.h) * a.rows + at.m * M,
                M * 4, full + 8 * s);
    };
    put(mq, x.q, x.lse, x.q_empty, packed ? x.q_raw : x.q_full, a.lse2);
    put(mdo, x.o, x.delta, x.o_empty, kScore || a.clean ? x.o_raw : x.o_full, a.delta);
  }

  // Rows whose P is 0 become 0, for 0 * NaN is NaN: of dO always, and of Q, K and V where sequences
  // are packed. By a warp, and only if a.clean.
  static DI void clean_keys(const Problem& p, u32 k, u32 v, const KeyTile& tile) {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int r0 = 0; r0 < N; r0 += 32) {
      const int key = tile.n * N + r0 + lane;
      const u32 dead =
          __ballot_sync(~0u, key < p.t && p.segment_k[(long long)tile.b * p.t + key] == kNoKey);
      clear_rows<kChunks>(k, N, r0, dead);
      clear_rows<kChunks>(v, N, r0, dead);
    }
    fence_async();
    __syncwarp();
  }
  static DI void clean_queries(const Problem& p, const Layout& x, const KeyTile& tile, u32& it) {
    const int lane = threadIdx.x & 31;
    const bool packed = kScore && p.packed;
#pragma unroll 1
    for (const u32 end = it + tile.steps(); it < end; it++) {
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

// Tile m of dq of head `bh`: scale * `tile`, which is in register order, in 16 bits. By warps: of
// the M * D / 512 groups of 16 rows x 32 columns, those from `first` to `end`, `step` apart.
template <bool F16, int D, int M, bool kByRows>
DI void convert_dq(const BackwardArgs& a, const float* tile, int bh, int m, int first, int end,
                   int step) {
  constexpr int kAcross = (kByRows ? D : D / 2) / 32;  // groups side by side in a warpgroup's part
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, b = bh / a.p.h;
#pragma unroll 1
  for (int i = first; i < end; i += step) {
    const int j = i % kAcross * 4, w = i / kAcross % 4, cw = i / (4 * kAcross);
    const float4* from = (const float4*)tile + cw * (M * D / 8) + j * 128 + w * 32 + lane;
    u32 x[2][4];  // two columns of each of 4 pieces of 8, of two rows; then the piece j + q
    float4 f[4];
#pragma unroll
    for (int k = 0; k < 4; k++) f[k] = from[k * 128];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      x[0][k] = pack<F16>(f[k].x * a.p.scale, f[k].y * a.p.scale);
      x[1][k] = pack<F16>(f[k].z * a.p.scale, f[k].w * a.p.scale);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      transpose_quad(x[half], q);
      const int row = m * M + (kByRows ? cw * 64 : 0) + w * 16 + g + 8 * half;
      const int column = (kByRows ? 0 : cw * (D / 2)) + 8 * (j + q);
      if (row < a.p.s && column < a.d)
        *(uint4*)(a.dq + (((long long)b * a.p.s + row) * a.p.h + bh - b * a.p.h) * a.d + column) =
            make_uint4(x[half][0], x[half][1], x[half][2], x[half][3]);
    }
  }
}

}  // namespace flashjax::sm90
