// What the kernels of the sm_90a backward share: their arguments, which tile a CTA owns, and
// what the producing warpgroup does. `K` is the kernel: its constants, and a Layout of shared
// memory with the addresses of its tiles (stage i of kStages follows the first) and barriers.
#pragma once
#include "backward_bias.cuh"
#include "wgmma.cuh"

namespace flashjax::sm90 {

// How the key tiles of a last wave that would not fill the multiprocessors are shared among them,
// in rows of one length and without a mask: their steps, `steps` a tile, one tile after the other,
// are cut into ranges. A tile is then a sum of pieces, see Piece.
struct Cut {
  int whole;   // tiles that are not cut, taken first
  int ranges;  // of `length` steps, but for the last
  int items;   // of work in all, see Piece
  int length;  // at most `steps`, so that a range meets two tiles at most
  int steps, total;
};

// The key blocks that add to a tile of dQ. Whoever begins first stores, and the others add.
struct Visits {
  u32 state;  // kBegun, once one has begun, and kDone for each that is done
  int all;
  static constexpr u32 kBegun = 1, kDone = 2;
  static DI bool begun(u32 state) { return state & kBegun; }
  static DI int done(u32 state) { return state / kDone; }
};

// Padded queries to an entry of `visits`, of which a tile of M has its first.
template <int M>
constexpr int kVisitRows = M % 64 ? M : 64;

struct BackwardArgs {
  Problem p;
  const float *lse2,
      *delta;  // [b * h, rows]: lse * log2(e), +inf where P is to be 0; sum of dout * out - dlse
  float* acc;  // dQ, [b * h, rows * D]; register order within a tile of M x D
  int rows;    // of a head, a multiple of M: all its tiles of M queries, of sequences too
  int nblocks, group;       // key blocks of a head; key heads of an L2 section
  int ratio, query_blocks;  // query heads of a key head; tiles of M queries of a head
  int lead;   // of tiles of 80 queries under a mask, rows of the first before the first query: the
              // last, which more keys meet, is full. `p.diagonal` and Walk::m count them in
  int clean;  // some query of a visited tile may have seen nothing, and its dout may be NaN
  u32 stagger;  // 2^32 / nblocks: key blocks of a head begin at different queries; 0: they do not
  Visits* visits;  // [b * h, rows / kVisitRows<M>], of the tile that begins there
  int* ticket;     // key tiles that were taken
  int yields;      // transfers want to start beside the kernel: no CTA stays for a second key tile
  int deterministic;   // dQ is added in a fixed order, see visits_before; in rows of one length
  int reverse;         // the last key block of a head comes first
  unsigned short* dq;  // [b, s, h, d]
  Cut cut;
  float* partial;  // of a range, dK and dV of a tile that it does not end: [ranges, 2, D, 128]
  int* there;      // [ranges, 2]: that half is
  int d;
  const Span *keys, *queries;          // of sequences: tiles of N keys, in order, and of M queries
  const int *key_tiles, *query_tiles;  // how many
  const int* changes;  // likewise, [b, rows / M]: by how much visits of a tile of queries differ
                       // from those of the tile before it in its sequence
  BiasArgs bias;
};

enum : int {
  kBackwardMasks = 1,     // windows
  kBackwardSpans = 2,     // sequences in the rows, and segment ids
  kBackwardScores = 4,    // softcap, bias, alibi
  kBackwardBias = 8,      // and dbias, element by element; without softcap, as below
  kBackwardTiles16 = 16,  // a bias by tiles, of 16-bit elements, and dbias if asked for
  kBackwardTiles32 = 32,  // and of float32
};

// N keys of one key head, the queries that see some of them, and the group's query heads.
template <bool kSpan>
struct KeyTile : Rows<kSpan> {
  int g, first_head, heads;
  int start;           // the walk goes from here to the end of `blocks`, and on from its beginning
  int skipped, count;  // of a dense tile, steps that are others'; steps
  bool clean;          // as in BackwardArgs, of this tile
  Blocks blocks;       // of a Span which need no mask only after load_clear()
  DI bool masked(int m) const { return blocks.masked(m); }
  DI void load_clear() {
    blocks.clear_begin = this->load(this->span + sizeof(Span) + 8);
    blocks.clear_end = this->load(this->span + sizeof(Span) + 12);
  }
  DI u32 steps() const { return kSpan ? heads * (blocks.end - blocks.begin) : count; }
  DI Rows<kSpan, true> rows() const {  // for one thread
    return {this->dense_first, this->dense_b, this->dense_head, this->span};
  }
};

struct Walk {
  int m, h;
  template <bool kSpan>
  DI explicit Walk(const KeyTile<kSpan>& x) : m(x.start), h(x.first_head) {
    if (kSpan || x.skipped == 0) return;
    const int all = x.blocks.end - x.blocks.begin;
    h += x.skipped / all, m += x.skipped % all;
    if (m >= x.blocks.end) m -= all;
  }
  template <class Tile>
  DI void next(const Tile& x) {
    if (++m == x.blocks.end) m = x.blocks.begin;
    if (m == x.start) h++;
  }
};

// The queries that see some keys of block n, in rows of one length.
template <class K>
DI Blocks queries_of(const BackwardArgs& a, int n) {
  if constexpr (!K::kMask) return {0, a.query_blocks, 0, a.query_blocks};
  const int s = a.p.s + (K::kPlain ? a.lead : 0);
  return query_blocks(a.p, K::kM, true, a.p.diagonal, n * K::kN, min(n * K::kN + K::kN, a.p.t), 0,
                      s, s);
}

// Key blocks of a head are taken in the order of their ranks. The key block of a rank, or the rank
// of one.
DI int ranked(const BackwardArgs& a, int n) { return a.reverse ? a.nblocks - 1 - n : n; }

// Where key tile i of all is: sections of `group` key heads, and ranks outermost inside one, so
// that under a causal mask the longest go first, if not reversed.
struct Turn {
  int rank, head;  // of `heads`, those of one row of the batch or of all
  DI Turn(int group, int i, int tiles, int heads) {
    const int per = group * tiles, section = i / per, r = i - section * per;
    const int own = min(group, heads - section * group);
    rank = r / own, head = section * group + r % own;
  }
};

// What item i of the work is: a tile, or some steps of one. After the whole tiles each range is two
// items, for it may begin in one tile and end in the next, and that comes first: who ends a tile
// adds what all earlier ranges have of it, which then is there.
struct Piece {
  int tile, begin, end;  // steps, counted within the tile; none: no such item
  int range, first;      // that this belongs to, and the one in which the tile begins
  bool last;             // ends the tile
  DI Piece(const Cut& x, int i) : tile(i), begin(0), end(1 << 30), range(0), first(0), last(true) {
    if (i < x.whole) return;
    range = (i - x.whole) / 2;
    const bool second = (i - x.whole) & 1;
    const int from = range * x.length, to = min(from + x.length, x.total);
    const int later = (to - 1) / x.steps, middle = later * x.steps,
              base = middle - second * x.steps;
    tile = x.whole + later - second;
    begin = (second ? from : max(from, middle)) - base, end = (second ? middle : to) - base;
    first = base / x.length, last = end == x.steps;
  }
  DI bool some() const { return begin < end; }
};

// In rows of one length.
template <class K>
DI KeyTile<false> key_tile(const BackwardArgs& a, int i) {
  const Problem& p = a.p;
  const Piece piece(K::kPlain ? Cut{1 << 30} : a.cut, i);
  const Turn at(K::kMask ? a.group : 1, piece.tile, a.nblocks, p.b * p.g);
  const int n = ranked(a, at.rank);
  KeyTile<false> x;
  x.heads = a.ratio, x.g = at.head % p.g, x.first_head = x.g * x.heads;
  x.dense_first = n * K::kN, x.dense_b = at.head / p.g, x.dense_head = x.g;
  x.clean = K::kMask && !K::kPlain && a.clean;
  x.blocks = queries_of<K>(a, n);
  x.start = x.blocks.begin;
  if (!K::kPlain) x.start += (int)__umulhi(n * a.stagger, x.blocks.end - x.blocks.begin);
  x.skipped = piece.begin;
  x.count = x.heads * (x.blocks.end - x.blocks.begin);
  if (!K::kPlain) x.count = min(piece.end, x.count) - piece.begin;
  return x;
}

// What a key tile is lies in shared memory, in a slot, since the divisions that say so take long:
// of rows of one length this; of sequences a Span, its blocks, where the walk begins, and its turn
// until the Span is there.
constexpr int kTurn = 84, kSpanSlot = 96;

// By one thread.
DI void put_key_tile(const KeyTile<false>& x, u32 slot) {
  store_int4(slot, make_int4(x.g, x.dense_b, x.dense_first, x.start));
  store_int4(slot + 16,
             make_int4(x.blocks.begin, x.blocks.end, x.blocks.clear_begin, x.blocks.clear_end));
  store_int(slot + 32, x.skipped), store_int(slot + 36, x.count);
}
template <class K, bool kOneThread = false>
DI KeyTile<false> dense_tile_at(const BackwardArgs& a, u32 slot) {
  auto load = [&](int at) { return Rows<true, kOneThread>::load(slot + at); };
  KeyTile<false> x;
  x.g = load(0), x.dense_b = load(4), x.dense_first = load(8), x.start = load(12);
  x.blocks = {load(16), load(20), load(24), load(28)};
  x.skipped = load(32), x.count = load(36);
  x.heads = a.ratio, x.first_head = x.g * x.heads, x.dense_head = x.g;
  x.clean = K::kMask && !K::kPlain && a.clean;
  return x;
}

template <bool kOneThread = false>
DI KeyTile<true> key_tile_at(const BackwardArgs& a, u32 span) {
  auto load = [&](int at) { return Rows<true, kOneThread>::load(span + at); };
  KeyTile<true> x;
  x.span = span;
  x.heads = a.ratio, x.g = load(__builtin_offsetof(Span, head)), x.first_head = x.g * x.heads;
  x.clean = load(__builtin_offsetof(Span, clean)) || a.clean;
  x.blocks.begin = load(sizeof(Span)), x.blocks.end = load(sizeof(Span) + 4);
  x.start = load(sizeof(Span) + 16);
  return x;
}

// By one thread: asks for a Span, and puts its key tile there once it has come.
DI void ask_key_tile(const BackwardArgs& a, int i, u32 span) {
  const Turn at(a.group, i, *a.key_tiles, a.p.g);
  store_int(span + kTurn, at.head);
  store_int(span + kTurn + 4, at.rank);
#pragma unroll
  for (int j = 0; j < 4; j++) copy16(span + 16 * j, (const int4*)(a.keys + at.rank) + j);
}
template <class K>
DI KeyTile<true> put_key_tile(const BackwardArgs& a, u32 span) {
  const Problem& p = a.p;
  copies_wait();
  store_int(span + __builtin_offsetof(Span, head), load_int(span + kTurn));
  store_int(span + __builtin_offsetof(Span, rank), load_int(span + kTurn + 4));
  const Rows<true, true> y{0, 0, 0, span};
  const int first = y.first(p), k_len = y.k_len(p);
  Blocks x = query_blocks(p, K::kM, !K::kScore, y.diagonal(p), first, min(first + K::kN, k_len),
                          y.begin(p), y.end(p), y.q_len(p));
  if (y.compare(p)) x.clear_end = 0;
  store_int4(span + sizeof(Span), make_int4(x.begin, x.end, x.clear_begin, x.clear_end));
  int start = x.begin;
  if (K::kCounts && a.stagger && x.end > x.begin)
    start += (int)((long long)(first / K::kN) * (x.end - x.begin) / ((k_len + K::kN - 1) / K::kN));
  store_int(span + sizeof(Span) + 16, start);
  return key_tile_at<true>(a, span);
}

// In a deterministic call the key blocks of a head, or of a sequence, add to a tile of dQ one after
// the other, by rank: each waits only for such as were taken, or whose CTA has started, before it,
// whatever blocks the masks leave. Under a causal mask the last block comes first: every tile
// begins with its diagonal block, for which it is the first tile, and so nobody waits for long. How
// many come before a key tile at queries m; by a whole warp.
template <class K>
DI int visits_before(const BackwardArgs& a, const KeyTile<K::kSpan>& x, int m) {
  int count = 0;
  const int own = K::kSpan ? x.rank(a.p) : ranked(a, x.dense_first / K::kN);
  const int b = x.b(a.p), n = x.n(a.p);  // which the warp has to read together
#pragma unroll 1
  for (int left = own; left > 0; left -= 32) {
    const int rank = left - 1 - (int)(threadIdx.x & 31);
    bool near = rank >= 0;
    Blocks blocks;
    if constexpr (K::kSpan) {  // those of a sequence lie side by side
      const Span& y = a.keys[max(rank, 0)];
      near = near && y.b == b && y.n == n;
      blocks = query_blocks(a.p, K::kM, true, y.diagonal, y.first, min(y.first + K::kN, y.k_len),
                            y.begin, y.end, y.q_len);
    } else {
      blocks = queries_of<K>(a, ranked(a, max(rank, 0)));
    }
    count += __popc(__ballot_sync(~0u, near && blocks.begin <= m && m < blocks.end));
    if (__any_sync(~0u, !near)) break;
  }
  return count;
}

// Some queries of one head: of a Span's tile, or of a row.
struct Queries {
  int b, begin;       // where the sequence begins, counted within row b
  int first, length;  // the first, counted within the sequence, or < 0; the sequence's
  long long padded;   // the first, in arrays of [b * h, rows]
  bool none;          // rows of no sequence
  template <int M>
  DI int visits() const {  // of the tile of M that begins here
    return (int)padded / kVisitRows<M>;
  }
};

DI Queries queries(const BackwardArgs& k, const Span& x, int h, int skip) {
  const long long bh = (long long)x.b * k.p.h + h;
  const int first = x.first + skip;
  return {x.b,     x.q_end - x.q_len - x.b * k.p.s, first,
          x.q_len, bh * k.rows + x.padded + first,  x.n < 0};
}

template <class K>
struct BackwardProducer {
  using Layout = typename K::Layout;
  using Tile = KeyTile<K::kSpan>;
  static constexpr int M = K::kM, N = K::kN, kStages = K::kStages;
  static constexpr int kChunks = K::kChunks, kVChunks = K::kVChunks;  // of 64 columns: d, e

  // By one thread. Q and dO are released by 2 warpgroups, and Q by the cleaning warp, if it runs.
  static DI void init(const Layout& x, bool clean) {
#pragma unroll
    for (int i = 0; i < kStages; i++) {
      mb_init(x.q_full + 8 * i, 1), mb_init(x.q_empty + 8 * i, 2 + clean);
      mb_init(x.o_full + 8 * i, 1), mb_init(x.o_empty + 8 * i, 2);
      mb_init(x.o_raw + 8 * i, 1);
    }
    mb_init_fence();
    fence_async();
  }

  // What boxes that are not asked for would have filled, of all stages. By all threads of the CTA.
  static DI void clear_rest(const Problem& p, const Layout& x, int k_stages) {
    const int dc = chunks_of(p.d), ec = chunks_of(p.e);
    for (int i = 0; i < k_stages; i++) clear_chunks(x.k + i * N * kChunks * 128, N, dc, kChunks);
    clear_chunks(x.v, N, ec, kVChunks);
    for (int i = 0; i < kStages; i++) {
      clear_chunks(x.q + i * M * kChunks * 128, M, dc, kChunks);
      clear_chunks(x.o + i * M * kVChunks * 128, M, ec, kVChunks);
    }
    fence_async();
  }

  // Bytes of `rows` rows of `width` columns.
  static DI u32 bytes(int rows, int width, int chunks = kChunks) {
    if constexpr (K::kSpan && K::kPlain)
      asm volatile("" : "+r"(width));  // or they are kept in registers that are short
    return rows * 128 * (K::kSpan ? chunks_of(width) : chunks);
  }

  // The keys of a tile, of K or V; `full` expects them.
  static DI void load_keys(const TMap& map, const Problem& p, u32 to, const Tile& tile, u32 full,
                           int width, int chunks = kChunks) {
    const auto rows = tile.rows();
    const int row = rows.k_row(p, rows.first(p)), box = rows.k_box(p);
#pragma unroll(K::kMask && (K::kSpan || !K::kPlain) ? 1 : kChunks)
    for (int c = 0; c < chunks; c++)
      if (!K::kSpan || has_chunk(c, width))
        tma_load(to + c * N * 128, &map, full, c * 64, row, tile.g, box, kEvictFirst);
  }

  // The coordinates of query i in the maps.
  template <class Rows>
  static DI int query_row(const BackwardArgs& a, const Rows& rows, int i) {
    return !K::kPlain ? rows.q_row(a.p, i) : i - (K::kSpan ? rows.begin(a.p) : a.lead);
  }
  template <class Rows>
  static DI int query_box(const Problem& p, const Rows& rows) {
    return K::kPlain && K::kSpan ? rows.q_end(p) - rows.q_len(p) + rows.begin(p) : rows.q_box(p);
  }

  // The queries of one step; `it` counts the steps of a CTA, here and below.
  static DI void load_queries(const TMap& mq, const TMap& mdo, const BackwardArgs& a,
                              const Layout& x, const Tile& tile, const Walk& at, u32 it) {
    const auto rows = tile.rows();
    const u32 s = it % kStages;
    // M rows, and a number of each, once a stage is free.
    auto put = [&](const TMap& map, u32 to, u32 numbers, u32 empty, u32 full, const float* from,
                   int width, int chunks) {
      mb_wait(empty + 8 * s, ~(it / kStages) & 1);
      mb_expect(full + 8 * s, bytes(M, width, chunks) + M * 4);
#pragma unroll(K::kMask && (K::kSpan || !K::kPlain) ? 1 : kChunks)
      for (int c = 0; c < chunks; c++)
        if (!K::kSpan || has_chunk(c, width))
          tma_load(to + s * (chunks * M * 128) + c * M * 128, &map, full + 8 * s, c * 64,
                   query_row(a, rows, at.m * M), at.h, query_box(a.p, rows), kEvictLast);
      const int row = (rows.b(a.p) * a.p.h + at.h) * a.rows + rows.padded(a.p) + at.m * M;
      bulk_load(numbers + s * M * 4, from + row, M * 4, full + 8 * s);
    };
    put(mq, x.q, x.lse, x.q_empty, x.q_full, a.lse2, a.p.d, kChunks);
    put(mdo, x.o, x.delta, x.o_empty, tile.clean ? x.o_raw : x.o_full, a.delta, a.p.e, kVChunks);
  }

  // Rows of dO whose P is 0 become 0, for 0 * NaN is NaN, if tile.clean. `raw` has the parity of
  // o_raw, a bit a stage. By a warp.
  static DI void clean_queries(const Layout& x, const Tile& tile, u32& it, u32& raw) {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (const u32 end = it + tile.steps(); it < end; it++) {
      const u32 s = it % kStages;
      mb_wait(x.q_full + 8 * s, it / kStages & 1);
      if (tile.clean) {
        mb_wait(x.o_raw + 8 * s, raw >> s & 1);
        raw ^= 1 << s;
#pragma unroll 1
        for (int r0 = 0; r0 < M; r0 += 32) {
          float l = 0.f;
          if (M % 32 == 0 || r0 + lane < M) l = load_shared(x.lse + s * M * 4 + (r0 + lane) * 4);
          clear_rows<kVChunks>(x.o + s * M * kVChunks * 128, M, r0,
                               __ballot_sync(~0u, l == infinity()));
        }
        fence_async();
        __syncwarp();
        if (lane == 0) mb_arrive(x.o_full + 8 * s);
      }
      if (lane == 0) mb_arrive(x.q_empty + 8 * s);
    }
  }
};

// Chunks of 64 columns of dK and dV to memory, from `first` on; the store clips ragged rows and
// columns. A chunk is `k_chunk` and `v_chunk` bytes from the next.
template <class K, int kCount>
DI void store_keys(const TMap& mdk, const TMap& mdv, const Problem& p, u32 dk, int k_chunk, u32 dv,
                   int v_chunk, int first, int row, int head, int box) {
  constexpr bool kAll = K::kChunks % kCount == 0 && K::kVChunks == K::kChunks;  // there are
#pragma unroll
  for (int c = first; c < first + kCount; c++) {
    if ((kAll || c < K::kVChunks) && (!K::kSpan || (has_chunk(c, p.e) && row < p.t)))
      tma_store(&mdv, dv + c * v_chunk, c * 64, row, head, box);
    if ((kAll || c < K::kChunks) && (!K::kSpan || (has_chunk(c, p.d) && row < p.t)))
      tma_store(&mdk, dk + c * k_chunk, c * 64, row, head, box);
  }
}

template <class K>
static __global__ void __launch_bounds__(K::kThreads, 1)
    backward_kernel(const __grid_constant__ TMap q, const __grid_constant__ TMap k,
                    const __grid_constant__ TMap v, const __grid_constant__ TMap o,
                    const __grid_constant__ TMap dk, const __grid_constant__ TMap dv,
                    const __grid_constant__ typename K::Args a) {
  K::run(q, k, v, o, dk, dv, a);
}

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

// To shared memory in 16 bits, times f: this lane's `row` of a swizzled tile at `to`, whose chunks
// of 64 columns are `chunk` bytes apart. Lanes 8 to 15 name rows 8 further.
template <bool F16, int kCount>
DI void put_rows(const float (&x)[kCount], u32 to, int chunk, int row, float f,
                 int columns = 1 << 30) {
  const int right = (threadIdx.x & 31) >> 4;
#pragma unroll
  for (int s = 0; s < kCount / 8; s++)
    if (s / 4 * 64 < columns)
      stmatrix4(to + (s / 4) * chunk + row * 128 + (((2 * (s % 4) + right) ^ (row & 7)) << 4),
                pack<F16>(x[8 * s] * f, x[8 * s + 1] * f),
                pack<F16>(x[8 * s + 2] * f, x[8 * s + 3] * f),
                pack<F16>(x[8 * s + 4] * f, x[8 * s + 5] * f),
                pack<F16>(x[8 * s + 6] * f, x[8 * s + 7] * f));
}

// The same of rows from `least` on, of a tile whose warpgroups hold it transposed: of its 4 parts
// of 32 columns the one of that number, 8 rows at a time. Two warps of a warpgroup have the columns
// of a part, as matrices of 8 x 8.
template <bool F16, int D, int M>
DI void convert_dq_transposed(const BackwardArgs& a, const float* tile, int h, int begin, int rows,
                              int least, int part) {
  static_assert(D == 128);
  const int lane = threadIdx.x & 31, q = lane & 3, column = part * 32 + 8 * q;
  const float4* from = (const float4*)tile + part / 2 * (M * D / 8) + part % 2 * 64 + lane;
  int row = lane >> 2;
  unsigned short* to = a.dq + ((long long)(begin + row) * a.p.h + h) * a.d + column;
  if (column >= a.d) rows = 0;
#pragma unroll 1
  for (int j = 0; j < M / 8; j++, row += 8, from += 128, to += 8 * a.p.h * a.d) {
    u32 x[4];  // pairs of rows; then of columns, of four pieces of 8
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float4 f = from[32 * k];
      x[2 * k] = transpose_matrix(pack<F16>(f.x * a.p.scale, f.y * a.p.scale));
      x[2 * k + 1] = transpose_matrix(pack<F16>(f.z * a.p.scale, f.w * a.p.scale));
    }
    transpose_quad(x, q);
    if (row >= least && row < rows) *(uint4*)to = make_uint4(x[0], x[1], x[2], x[3]);
  }
}

// `rows` of dq of a head, from number `begin` over [b, s] on: scale * `tile`, which is in register
// order, in 16 bits. By warps: of the M * D / 512 groups of 16 rows x 32 columns, those from
// `first` to `end`, `step` apart.
template <bool F16, int D, int M, bool kByRows>
DI void convert_dq(const BackwardArgs& a, const float* tile, int h, int begin, int rows, int first,
                   int end, int step) {
  constexpr int kAcross = (kByRows ? D : D / 2) / 32;  // groups side by side in a warpgroup's part
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, pitch = a.p.h * a.d;
  unsigned short* const dq = a.dq + ((long long)begin * a.p.h + h) * a.d;
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
      const int row = (kByRows ? cw * 64 : 0) + w * 16 + g + 8 * half;
      const int column = (kByRows ? 0 : cw * (D / 2)) + 8 * (j + q);
      if (row < rows && column < a.d)
        *(uint4*)(dq + (long long)row * pitch + column) =
            make_uint4(x[half][0], x[half][1], x[half][2], x[half][3]);
    }
  }
}

}  // namespace flashjax::sm90
