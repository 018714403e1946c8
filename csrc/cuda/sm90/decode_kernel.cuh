// Few queries against many keys, for sm_90a: what decoding does, and its time is that of reading
// k and v once. The tiles of keys of all sequences and heads are one list, of which every CTA takes
// an equal share; heads that were shared are put together by a second kernel. Pipeline, barriers
// and what was tried: docs/kernels/sm90-decode.md.
#pragma once
#include "../../attention/sequence.h"
#include "pages.cuh"
#include "wgmma.cuh"

namespace flashjax::sm90 {

// A head whose tiles several CTAs have: its partial results are in slots first, next, next + 1, ...
// With less than two parts there is nothing to put together.
struct Joint {
  int head;  // over [b, heads]
  int first, next, parts;
};

struct DecodeArgs {
  flashjax::Problem p;
  Pages pages;
  u32* out;
  float* lse;
  // A block of queries is `block_heads` query heads of a key head by `block_queries` queries, heads
  // innermost.
  int block_heads, block_queries;
  int head_blocks, blocks;  // blocks of a query; of a key head
  int heads;                // g * blocks: what the list calls a head
  int bucket;               // sequences of an entry of the prefix sum
  int splits;               // parts of every head; 0: equal shares of the list
  bool by_head;             // heads are fewer than CTAs
  int team;                 // groups of threads that put one row together: 1, or all of a block
  int left, right;          // the window; -1: unbounded. At most 2^29
  // Workspace, with r = block_heads * block_queries rows:
  Joint* joints;    // if splits == 0: [b, heads] where by_head, else [grid], by the first CTA
  float* part_lse;  // [slots, r], base 2
  float* part_out;  // [slots, r, E]
  FLASHJAX_HD int rows() const { return block_heads * block_queries; }
};

// Row r of a block: which query and query head it is.
struct Row {
  int i, h;
  bool live;
};
DI Row row_of(const DecodeArgs& a, int head, int r) {
  const int hk = head / a.blocks, block = head - hk * a.blocks, q = r / a.block_heads;
  const int qb = block / a.head_blocks, hb = block - qb * a.head_blocks;
  const int ratio = (int)(a.p.h / a.p.g), x = hb * a.block_heads + r - q * a.block_heads;
  const int i = qb * a.block_queries + q;
  return {i, hk * ratio + x, q < a.block_queries && i < a.p.s && x < ratio};
}

// The keys of batch row b, counted from the first that its pages or its entry hold: those that some
// query sees, the tiles of N that hold them, and those tiles that need no mask.
struct Keys {
  int begin, end, first, tiles, clear_begin, clear_end;
  int base, count, q_len, diagonal;  // keys of the sequence: base to base + count; as in sequence.h
  DI Keys() {}
  DI Keys(const DecodeArgs& a, int b, int n) {
    const Sequence z = sequence(a.p, b, 0);
    const Range some = visible_keys(a.p, z, 0, z.q_len), all = common_keys(a.p, z, 0, z.q_len);
    base = (int)z.k_begin, count = (int)z.k_len, q_len = (int)z.q_len;
    diagonal = (int)flashjax::clamp(z.diagonal, -(1 << 30), 1 << 30);
    begin = base + (int)some.begin, end = base + (int)some.end;
    first = begin / n, tiles = q_len > 0 && end > begin ? (end + n - 1) / n - first : 0;
    clear_begin = (base + (int)all.begin + n - 1) / n;
    clear_end = q_len < a.p.s ? 0 : (base + (int)all.end) / n;
  }
  // Those that query i sees.
  DI void seen(const DecodeArgs& a, int i, int& from, int& to) const {
    const int at = i + diagonal;
    from = base + (a.left < 0 ? 0 : max(0, at - a.left));
    to = base + (a.right < 0 ? count : min(count, at + a.right + 1));
    if (i >= q_len) to = 0;
  }
};

// A CTA's work: tiles [n0, n1) of one head of batch row b. Handed to the consumers in shared
// memory; n0 = n1 is the end.
struct Piece {
  Keys keys;
  int b, head, n0, n1;
  int slot;  // of the partial result; -1: these are all tiles of the head
};

template <bool F16, int D, int M, int N>
struct Decode {
  static constexpr int E = D, kGroups = M / 64, kThreads = 128 * (kGroups + 1);
  static constexpr int kChunks = D / 64, kTile = N * D * 2, kQBytes = M * D * 2;
  static constexpr bool kQInRegs = D <= 128;
  static constexpr int kCtas = D <= 128 && kGroups == 1 ? 2 : 1;  // an SM
  static constexpr int kSlots = kCtas == 2 ? 4
                                : (224 * 1024 - kQBytes) / kTile < 8
                                    ? (224 * 1024 - kQBytes) / kTile
                                    : 8;  // tiles of k or v on their way
  static constexpr int kBuckets = 256;
  static constexpr int kSmem = 1024 + kQBytes + kSlots * kTile + 16 + 20 * kSlots +
                               3 * (int)sizeof(Piece) + 4 * (kBuckets + 1);

  struct Layout {  // shared memory from an aligned base
    u32 q, ring, q_full, q_empty, full, empty, odd, piece, prefix;
    DI explicit Layout(u32 base) {
      q = base, ring = q + kQBytes, q_full = ring + kSlots * kTile, q_empty = q_full + 8;
      full = q_empty + 8, empty = full + 8 * kSlots, odd = empty + 8 * kSlots;
      piece = odd + 4 * kSlots, prefix = piece + 3 * sizeof(Piece);
    }
  };
  struct Turn {  // a place in the ring
    int slot = 0, phase = 0;
    DI void next() {
      if (++slot == kSlots) slot = 0, phase ^= 1;
    }
  };

  // Calls f() for each piece that this CTA has to do, which is in x then. By one warp: x lives in
  // shared memory, where all lanes write the same. Also writes the joints.
  template <class F>
  static DI void walk(const DecodeArgs& a, const int* prefix, Piece& x, F f) {
    const int cta = blockIdx.x, ctas = gridDim.x;
    if (a.splits) {
      const int items = (int)a.p.b * a.heads * a.splits;
      x.b = -1;
#pragma unroll 1
      for (int item = cta; item < items; item += ctas) {
        __syncwarp();
        const int at = item / a.splits, part = item - at * a.splits, b = at / a.heads;
        if (b != x.b) x.keys = Keys(a, x.b = b, N);
        const int tiles = x.keys.tiles, parts = min(a.splits, tiles);
        if (part >= parts) continue;
        x.head = at - b * a.heads;
        x.n0 = x.keys.first + (int)((long long)part * tiles / parts);
        x.n1 = x.keys.first + (int)((long long)(part + 1) * tiles / parts);
        x.slot = parts == 1 ? -1 : item;
        f();
      }
      return;
    }
    if (!a.by_head) a.joints[cta] = {0, 0, 0, 0};
    const int buckets = ((int)a.p.b + a.bucket - 1) / a.bucket;
    const int all = prefix[buckets], shares = min(ctas, all);  // no share is empty
    if (cta >= shares) return;
    int t = (int)((long long)cta * all / shares);
    const int t1 = (int)((long long)(cta + 1) * all / shares);
    int lo = 0, hi = buckets;  // the last bucket that begins at t or before
    while (hi - lo > 1) {
      const int mid = (lo + hi) >> 1;
      if (prefix[mid] <= t)
        lo = mid;
      else
        hi = mid;
    }
    int at = prefix[lo], b = lo * a.bucket - 1, tiles = 0;  // at: where the sequence b + 1 begins
#pragma unroll 1
    while (t < t1) {
      if (t >= at) {
        __syncwarp();
        x.keys = Keys(a, x.b = ++b, N);
        tiles = x.keys.tiles, at += tiles * a.heads;
        continue;
      }
      __syncwarp();
      const int left = at - t, heads = (left + tiles - 1) / tiles;  // in tiles, in heads
      const int n0 = heads * tiles - left, n1 = min(tiles, n0 + t1 - t);
      x.head = a.heads - heads, x.n0 = x.keys.first + n0, x.n1 = x.keys.first + n1;
      x.slot = n1 - n0 == tiles ? -1 : n0 ? cta : ctas + cta;
      if (n0 == 0 && (n1 < tiles || a.by_head)) {  // as far as the CTA that has the last tile
        const int last = (int)(((long long)(t + tiles) * shares - 1) / all);
        const int at_head = b * a.heads + x.head;
        a.joints[a.by_head ? at_head : cta] = {at_head, ctas + cta, cta + 1, last - cta + 1};
      }
      f();
      t += n1 - n0;
    }
  }

  // Tiles of the sequences before each bucket.
  static DI void sum_tiles(const DecodeArgs& a, int* prefix) {
    const int b = (int)a.p.b, buckets = (b + a.bucket - 1) / a.bucket;
    for (int i = threadIdx.x; i < buckets; i += kThreads) {
      int sum = 0;
#pragma unroll 1
      for (int x = i * a.bucket; x < min(b, (i + 1) * a.bucket); x++) sum += Keys(a, x, N).tiles;
      prefix[i + 1] = sum * a.heads;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x, each = (buckets + 31) / 32;
      const int first = min(buckets, lane * each), last = min(buckets, first + each);
      int sum = 0;
      for (int i = first; i < last; i++) sum += prefix[i + 1];
      int before = sum;
#pragma unroll
      for (int k = 1; k < 32; k *= 2) {
        const int x = __shfl_up_sync(~0u, before, k);
        if (lane >= k) before += x;
      }
      before -= sum;
      for (int i = first; i < last; i++) prefix[i + 1] = before += prefix[i + 1];
      if (lane == 0) prefix[0] = 0;
    }
    __syncthreads();
  }

  static DI void run(const TMap& mq, const TMap& mk, const TMap& mv, const DecodeArgs& a) {
    extern __shared__ unsigned char smem_raw[];
    const u32 raw = smem_u32(smem_raw);
    const Layout x((raw + 1023) & ~1023u);
    int* prefix = (int*)(smem_raw + (x.prefix - raw));
    Piece* shared = (Piece*)(smem_raw + (x.piece - raw));
    const int wg = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    if (threadIdx.x == 0) {
      prefetch_map(&mq), prefetch_map(&mk), prefetch_map(&mv);
      mb_init(x.q_full, 1), mb_init(x.q_empty, 4 * kGroups);
      for (int i = 0; i < kSlots; i++)
        mb_init(x.full + 8 * i, 1), mb_init(x.empty + 8 * i, kGroups);
      mb_init_fence();
      fence_async();
    }
    pdl_wait();  // what came before has written the operands, and no longer reads the workspace
    pdl_launch();
    if (a.splits)
      __syncthreads();
    else
      sum_tiles(a, prefix);
    if (wg == 0) {
      if constexpr (kThreads * kCtas > 256) reg_dec<64>();
      if (threadIdx.x < 32)
        produce(mq, mk, mv, a, prefix, x, shared);
      else
        without_keys(a);
    } else {
      if constexpr (kThreads * kCtas > 256) reg_inc<kCtas == 2 ? 192 : 216>();
      consume(a, wg - 1, x, shared + 1);
    }
  }

  // One warp. A lane brings a box of keys, or several.
  static DI void produce(const TMap& mq, const TMap& mk, const TMap& mv, const DecodeArgs& a,
                         const int* prefix, const Layout& x, Piece* shared) {
    const int lane = threadIdx.x & 31, boxes = N / a.pages.box;
    const u64 hint = a.blocks == 1 ? kEvictFirst : kEvictNormal;
    Piece& piece = shared[0];
    Turn turn;
    int q_phase = 1;
    auto hand = [&]() {  // with its queries
      mb_wait(x.q_empty, q_phase);
      q_phase ^= 1;
      if (lane) return;
      shared[1 + q_phase] = piece;
      const Row row = row_of(a, piece.head, 0);
      mb_expect(x.q_full, a.rows() * D * 2);
#pragma unroll
      for (int c = 0; c < kChunks; c++)
        tma_load(x.q + c * M * 128, &mq, x.q_full, c * 64, row.h, row.i, piece.b, kEvictFirst);
    };
    walk(a, prefix, piece, [&]() {
      hand();
      const int hk = piece.head / a.blocks, b = piece.b, n1 = piece.n1;
      const int begin = piece.keys.begin, end = piece.keys.end;
      auto look = [&](int n, int box) -> Place {  // where a box of tile n is; -2: nothing of use
        const int key = n * N + box * a.pages.box;
        if (n >= n1 || box >= boxes || key >= end || key + a.pages.box <= begin) return {-2, 0};
        return place(a.pages, b, key);
      };
      Place next = look(piece.n0, lane);
#pragma unroll 1
      for (int n = piece.n0; n < n1; n++) {
        const Place at = next;
        int live = __popc(__ballot_sync(~0u, at.good()));
        bool odd = __any_sync(~0u, at.page == -1);
        // Pages of so few keys that 32 boxes are not enough for a tile are slow, and right.
#pragma unroll 1
        for (int i = 32; i < boxes; i += 32) {
          const Place more = look(n, i + lane);
          live += __popc(__ballot_sync(~0u, more.good()));
          odd |= __any_sync(~0u, more.page == -1);
        }
        next = look(n + 1, lane);
#pragma unroll
        for (int v = 0; v < 2; v++) {
          const u32 full = x.full + 8 * turn.slot, tile = x.ring + turn.slot * kTile;
          auto load = [&](const Place& from, int box) {
            if (!from.good()) return;
#pragma unroll
            for (int c = 0; c < kChunks; c++)
              tma_load(tile + c * N * 128 + box * a.pages.box * 128, v ? &mv : &mk, full, c * 64,
                       from.row, hk, from.page, hint);
          };
          mb_wait(x.empty + 8 * turn.slot, turn.phase ^ 1);
          if (lane == 0) {
            if (v == 0)
              asm volatile("st.shared.s32 [%0], %1;" ::"r"(x.odd + 4 * turn.slot), "r"((int)odd)
                           : "memory");
            mb_expect(full, live * a.pages.box * D * 2);
          }
          __syncwarp();
          load(at, lane);
#pragma unroll 1
          for (int i = 32; i < boxes; i += 32) load(look(n, i + lane), i + lane);
          turn.next();
        }
      }
    });
    __syncwarp();
    piece.n0 = piece.n1 = piece.b = piece.head = 0;
    hand();
  }

  // The results of batch rows where no query sees a key, by the threads that have nothing to do.
  static DI void without_keys(const DecodeArgs& a) {
    const int rows = (int)(a.p.s * a.p.h), pairs = (int)a.p.e / 2;
    for (int64_t b = blockIdx.x; b < a.p.b; b += gridDim.x) {
      if (Keys(a, (int)b, N).tiles) continue;
      if (a.by_head && !a.splits)
        for (int i = threadIdx.x - 32; i < a.heads; i += 96)
          a.joints[b * a.heads + i] = {0, 0, 0, 0};
      for (int64_t i = threadIdx.x - 32; i < (int64_t)rows * pairs; i += 96)
        a.out[b * rows * pairs + i] = 0;
      for (int i = threadIdx.x - 32; i < rows; i += 96)
        a.lse[b * rows + i] = a.p.sinks ? sink(a, (int)b, i / (int)a.p.s) : -infinity();
    }
  }

  static DI float sink(const DecodeArgs& a, int b, int h) {
    return a.p.sinks[b * a.p.sinks_shape.stride[0] + h];
  }

  static DI void consume(const DecodeArgs& a, int cw, const Layout& x, const Piece* handed) {
    const flashjax::Problem& p = a.p;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const bool elect = (threadIdx.x & 127) == 0;
    const int r0 = cw * 64 + warp * 16 + (lane >> 2);  // this thread's rows: r0 and r0 + 8
    const bool active = cw * 64 + warp * 16 < a.rows();
    const bool bent = p.softcap != 0.f || p.alibi_slopes || !(p.scale > 0.f);  // not just scaled
    const float c = bent ? kLog2E : p.scale * kLog2E;  // from what S holds to log2 units
    const float inv_cap = p.softcap != 0.f ? 1.f / p.softcap : 0.f;
    const u32 dq = desc_lo(x.q + cw * 8192, 16);
    const u32 dk = desc_lo(x.ring, 16), dv = desc_lo(x.ring, N * 128);
    Turn turn;
    int q_phase = 0;
#pragma unroll 1
    while (true) {
      mb_wait(x.q_full, q_phase);
      const Piece& piece = handed[q_phase];  // stays until the second after it
      const Keys& k = piece.keys;
      q_phase ^= 1;
      if (piece.n0 == piece.n1) break;
      float o[E / 2], s[N / 2], mx[2] = {-infinity(), -infinity()}, sum[2] = {0.f, 0.f};
      u32 pb[N / 4], qf[kQInRegs ? D / 4 : 1];
#pragma unroll
      for (int i = 0; i < E / 2; i++) o[i] = 0.f;
#pragma unroll
      for (int i = 0; i < N / 4; i++) pb[i] = 0;
      if constexpr (kQInRegs) {
        const int rr = (lane & 7) + ((lane >> 3) & 1) * 8;
        const u32 ro = x.q + (cw * 64 + warp * 16 + rr) * 128;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
          ldmatrix4(ro + (i / 4) * M * 128 + (((2 * (i % 4) + (lane >> 4)) ^ (rr & 7)) << 4),
                    qf[4 * i], qf[4 * i + 1], qf[4 * i + 2], qf[4 * i + 3]);
        fence_async();
        __syncwarp();
        if (lane == 0) mb_arrive(x.q_empty);
      }
#pragma unroll 1
      for (int n = piece.n0; n < piece.n1; n++) {
        mb_wait(x.full + 8 * turn.slot, turn.phase);
        int odd;
        asm volatile("ld.shared.s32 %0, [%1];" : "=r"(odd) : "r"(x.odd + 4 * turn.slot) : "memory");
        pin(s);
        wg_fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
          const u64 b =
              desc(dk + turn.slot * (kTile >> 4) + (((i / 4) * N * 128 + (i % 4) * 32) >> 4));
          if constexpr (kQInRegs)
            Wgmma<N, F16>::template rs<0>(s, qf[4 * i], qf[4 * i + 1], qf[4 * i + 2], qf[4 * i + 3],
                                          b, i > 0);
          else
            Wgmma<N, F16>::template ss<0, 0>(
                s, desc(dq + (((i / 4) * M * 128 + (i % 4) * 32) >> 4)), b, i > 0);
        }
        wg_commit();
        wg_wait<0>();
        pin(s);
        if (elect) mb_arrive(x.empty + 8 * turn.slot);
        turn.next();
        const int j0 = n * N;
        if (active) {
          if (bent) {
#pragma unroll
            for (int hh = 0; hh < 2; hh++) {
              const Row row = row_of(a, piece.head, r0 + 8 * hh);
              const int near = k.base + row.i + k.diagonal - j0 - 2 * (lane & 3);
              float slope = 0.f;
              if (p.alibi_slopes && row.live)
                slope = p.alibi_slopes[piece.b * p.alibi_shape.stride[0] + row.h];
#pragma unroll
              for (int j = 0; j < N / 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                  float y = s[4 * j + 2 * hh + i] * p.scale;
                  if (p.softcap != 0.f) y = p.softcap * tanh_ex2(y * inv_cap);
                  s[4 * j + 2 * hh + i] = y - slope * fabsf((float)(8 * j + i - near));
                }
            }
          }
          if (n < k.clear_begin || n >= k.clear_end) {
#pragma unroll
            for (int hh = 0; hh < 2; hh++) {
              int from, to;
              k.seen(a, row_of(a, piece.head, r0 + 8 * hh).i, from, to);
              from -= j0 + 2 * (lane & 3), to -= j0 + 2 * (lane & 3);
#pragma unroll
              for (int j = 0; j < N / 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                  if (8 * j + i < from || 8 * j + i >= to) s[4 * j + 2 * hh + i] = -infinity();
            }
          }
          if (odd) {
#pragma unroll
            for (int w = 0; w < N / 32; w++) {
              const u32 dead = dead_keys(a, piece.b, k, j0 + 32 * w, true) >> (2 * (lane & 3));
#pragma unroll
              for (int i = 0; i < 16; i++)
                if (dead >> ((i / 4) * 8 + (i & 1)) & 1) s[16 * w + i] = -infinity();
            }
          }
          softmax(s, pb, o, mx, sum, c);
        }
        mb_wait(x.full + 8 * turn.slot, turn.phase);
        if (odd || j0 < k.begin || j0 + N > k.end) {
          // What P is 0 for may be NaN in V, and 0 * NaN is NaN.
          if (warp < N / 32)
            clear_rows<E / 64>(x.ring + turn.slot * kTile, N, 32 * warp,
                               dead_keys(a, piece.b, k, j0 + 32 * warp, odd));
          fence_async();
          bar_sync(1 + cw, 128);
        }
        pin(o);
        wg_fence();
#pragma unroll
        for (int i = 0; i < N / 16; i++)
          Wgmma<E, F16>::template rs<1>(o, pb[4 * i], pb[4 * i + 1], pb[4 * i + 2], pb[4 * i + 3],
                                        desc(dv + turn.slot * (kTile >> 4) + i * (2048 >> 4)), 1);
        wg_commit();
        wg_wait<0>();
        pin(o);
        if (elect) mb_arrive(x.empty + 8 * turn.slot);
        turn.next();
      }
      if constexpr (!kQInRegs) {
        if (lane == 0) mb_arrive(x.q_empty);
      }
#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        float l = sum[hh];
        l += __shfl_xor_sync(~0u, l, 1);
        l += __shfl_xor_sync(~0u, l, 2);
        const Row row = row_of(a, piece.head, r0 + 8 * hh);
        if (!row.live) continue;
        float top = mx[hh] * c, keep = 1.f;
        if (p.sinks && piece.slot < 0) {  // one more term in the denominator
          const float sunk = sink(a, piece.b, row.h) * kLog2E, most = fmaxf(top, sunk);
          if (most != -infinity()) {
            keep = ex2(top - most), l = l * keep + ex2(sunk - most);
            top = most;
          }
        }
        const float inv = l > 0.f ? keep / l : l;  // a NaN stays one
        const float lse = l == 0.f ? -infinity() : top + lg2(l);
        if (piece.slot < 0) {
          const int64_t at = ((int64_t)piece.b * p.s + row.i) * p.h + row.h;
          u32* out = a.out + at * (p.e / 2) + (lane & 3);
#pragma unroll
          for (int j = 0; j < E / 8; j++)
            if (8 * j < p.e)
              out[4 * j] = pack<F16>(o[4 * j + 2 * hh] * inv, o[4 * j + 2 * hh + 1] * inv);
          if ((lane & 3) == 0) a.lse[((int64_t)piece.b * p.h + row.h) * p.s + row.i] = lse * kLn2;
        } else {
          const int64_t at = (int64_t)piece.slot * a.rows() + r0 + 8 * hh;
          float2* out = (float2*)(a.part_out + at * E) + (lane & 3);
#pragma unroll
          for (int j = 0; j < E / 8; j++)
            __stcg(out + 4 * j, make_float2(o[4 * j + 2 * hh] * inv, o[4 * j + 2 * hh + 1] * inv));
          if ((lane & 3) == 0) __stcg(a.part_lse + at, lse);
        }
      }
    }
  }

  // A bit for each of 32 keys that nobody may see.
  static DI u32 dead_keys(const DecodeArgs& a, int b, const Keys& k, int j0, bool odd) {
    const int j = j0 + (int)(threadIdx.x & 31);
    bool dead = j < k.begin || j >= k.end;
    if (odd && !dead) dead = !place(a.pages, b, j).good();
    return __ballot_sync(~0u, dead);
  }

  // One step of the online softmax: s becomes P, in pb.
  static DI void softmax(float (&s)[N / 2], u32 (&pb)[N / 4], float (&o)[E / 2], float (&mx)[2],
                         float (&sum)[2], float c) {
    float top[2] = {mx[0], mx[1]}, ms[2], f[2];
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int hh = 0; hh < 2; hh++)
        top[hh] = fmaxf(top[hh], fmaxf(s[4 * j + 2 * hh], s[4 * j + 2 * hh + 1]));
#pragma unroll
    for (int hh = 0; hh < 2; hh++) {
      top[hh] = fmaxf(top[hh], __shfl_xor_sync(~0u, top[hh], 1));
      top[hh] = fmaxf(top[hh], __shfl_xor_sync(~0u, top[hh], 2));
      ms[hh] = top[hh] == -infinity() ? 0.f : top[hh] * c;
      f[hh] = ex2(mx[hh] * c - ms[hh]);
      mx[hh] = top[hh];
      sum[hh] *= f[hh];
    }
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s[4 * j + i] = ex2(s[4 * j + i] * c - ms[i / 2]);
      sum[0] += s[4 * j] + s[4 * j + 1];
      sum[1] += s[4 * j + 2] + s[4 * j + 3];
    }
#pragma unroll
    for (int i = 0; i < N / 4; i++) pb[i] = pack<F16>(s[2 * i], s[2 * i + 1]);
    if (__any_sync(~0u, f[0] != 1.f || f[1] != 1.f)) {
#pragma unroll
      for (int j = 0; j < E / 8; j++)
        o[4 * j] *= f[0], o[4 * j + 1] *= f[0], o[4 * j + 2] *= f[1], o[4 * j + 3] *= f[1];
    }
  }
};

template <bool F16, int D, int M, int N>
__global__ void __launch_bounds__(Decode<F16, D, M, N>::kThreads, Decode<F16, D, M, N>::kCtas)
    decode_kernel(const __grid_constant__ TMap mq, const __grid_constant__ TMap mk,
                  const __grid_constant__ TMap mv, const __grid_constant__ DecodeArgs a) {
  Decode<F16, D, M, N>::run(mq, mk, mv, a);
}

// Puts the parts of a head together. A group of E / 4 threads goes through parts of one row; the
// groups of a block work on rows of their own, or as a team on the parts of one.
template <bool F16, int E, int N>
__global__ void __launch_bounds__(128) combine_kernel(const __grid_constant__ DecodeArgs a) {
  constexpr int kLanes = E / 4, kGroups = 128 / kLanes, kLoads = 8;
  __shared__ float tops[kGroups], sums[kGroups];
  __shared__ float4 outs[kGroups][kLanes];
  const int x = threadIdx.x % kLanes, group = threadIdx.x / kLanes, team = a.team;
  const int r = blockIdx.y * (kGroups / team) + group / team;
  pdl_wait();
  Joint joint;
  if (a.splits) {
    const int head = blockIdx.x, parts = min(a.splits, Keys(a, head / a.heads, N).tiles);
    joint = {head, head * a.splits, head * a.splits + 1, parts};
  } else {
    joint = a.joints[blockIdx.x];
  }
  if (joint.parts < 2) return;
  const int b = joint.head / a.heads;
  const Row row = row_of(a, joint.head - b * a.heads, r);
  const int parts = row.live ? joint.parts : 0;
  float m = -infinity(), l = 0.f;
  float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int i0 = group % team; i0 < parts; i0 += team * kLoads) {
    float w[kLoads];
    float4 y[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      const int i = i0 + u * team;
      const int64_t at = (int64_t)(i ? joint.next + i - 1 : joint.first) * a.rows() + r;
      w[u] = i < parts ? __ldcg(a.part_lse + at) : -infinity();
      y[u] = i < parts ? __ldcg((const float4*)(a.part_out + at * E) + x)
                       : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    float top = m;
#pragma unroll
    for (int u = 0; u < kLoads; u++) top = fmaxf(top, w[u]);
    const float safe = top == -infinity() ? 0.f : top, f = ex2(m - safe);
    m = top, l *= f;
    acc.x *= f, acc.y *= f, acc.z *= f, acc.w *= f;
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      const float e = ex2(w[u] - safe);
      l += e;
      acc.x += e * y[u].x, acc.y += e * y[u].y, acc.z += e * y[u].z, acc.w += e * y[u].w;
    }
  }
  if (x == 0) tops[group] = m, sums[group] = l;
  outs[group][x] = acc;
  __syncthreads();
  if (group % team || !row.live) return;
  const float sunk =
      a.p.sinks ? a.p.sinks[b * a.p.sinks_shape.stride[0] + row.h] * kLog2E : -infinity();
  float top = sunk;
#pragma unroll 1
  for (int i = group; i < group + team; i++) top = fmaxf(top, tops[i]);
  const float safe = top == -infinity() ? 0.f : top;
  l = ex2(sunk - safe), acc = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int i = group; i < group + team; i++) {
    const float f = ex2(tops[i] - safe);
    const float4 y = outs[i][x];
    l += f * sums[i];
    acc.x += f * y.x, acc.y += f * y.y, acc.z += f * y.z, acc.w += f * y.w;
  }
  const float inv = l > 0.f ? 1.f / l : l;  // a NaN stays one
  const int64_t at = ((int64_t)b * a.p.s + row.i) * a.p.h + row.h;
  if (4 * x < a.p.e)
    ((uint2*)(a.out + at * (a.p.e / 2)))[x] =
        make_uint2(pack<F16>(acc.x * inv, acc.y * inv), pack<F16>(acc.z * inv, acc.w * inv));
  if (x == 0)
    a.lse[((int64_t)b * a.p.h + row.h) * a.p.s + row.i] =
        l == 0.f ? -infinity() : (safe + lg2(l)) * kLn2;
}

}  // namespace flashjax::sm90
