// The backward for sm_90a of sequences that have one tile of keys each, N = 128: whoever owns it is
// alone with its queries. So dq is written once, in 16 bits, and delta is the sum of P dP over the
// tile: no statistics, no dQ in float32, no conversion. Tiles and warpgroups are those of
// backward_kernel.cuh; warp 1 stores dq, and warp 2 also makes lse2 of lse.
#pragma once
#include "backward_products.cuh"

namespace flashjax::sm90 {

struct LoneArgs : BackwardArgs {
  const float *lse, *dlse;  // [b, h, s]; dlse null: 0
  TMap dq_map;              // by boxes of 64 rows
};

template <bool F16, int D>
struct LoneBackward {
  using Args = LoneArgs;
  static constexpr bool kF16 = F16;
  static constexpr int M = D == 64 ? 128 : 64, N = 128, kD = D, kM = M, kN = N;
  static constexpr int kStages = 2, kChunks = D / 64, kVChunks = kChunks, kThreads = 384,
                       kStoreRows = 64;
  static constexpr int kConsumerRegs = 232, kProducerRegs = 40;
  static constexpr bool kMask = true, kSpan = true, kScore = false, kCounts = false, kCuts = false,
                        kPlain = false;
  using Producer = BackwardProducer<LoneBackward>;
  using Products = BackwardProducts<LoneBackward>;
  using Tile = KeyTile<true>;
  // How dQ (M x D) is split over the two warpgroups: by rows, or by columns.
  static constexpr bool kByRows = M == 128, kTransposed = false;
  static constexpr int kKBytes = N * D * 2, kQBytes = M * D * 2, kDsBytes = M * N * 2,
                       kDqBytes = M * D * 4;
  static constexpr int kSmem = 3 * kKBytes + 2 * kStages * kQBytes + 2 * kDsBytes + kDqBytes +
                               2 * kStages * M * 4 + 384 + 1024;
  static_assert(D == 64 || D == 128);
  // Named barriers: dS, and the sums of P dP, are in shared memory; half of the dQ buffer is free
  // (two ids); is full (two); end of a key tile; its store (two).
  static constexpr int kBarDs = 1, kBarDqFree = 2, kBarDqFull = 4, kBarEnd = 6, kBarStore = 7;

  struct Layout {
    u32 k, v, q, o, ds, dq, lse, delta;  // two stages, one of V and dQ
    u32 k_full, k_empty, v_full, v_empty, q_full, q_empty, o_raw, o_full, o_empty;
    u32 item, span;
    DI explicit Layout(u32 base) {
      k = base, v = k + 2 * kKBytes, q = v + kKBytes, o = q + kStages * kQBytes;
      ds = o + kStages * kQBytes, dq = ds + 2 * kDsBytes, lse = dq + kDqBytes;
      delta = lse + kStages * M * 4, k_full = delta + kStages * M * 4, k_empty = k_full + 16;
      v_full = k_empty + 16, v_empty = v_full + 8;
      q_full = v_empty + 8, q_empty = q_full + 16;
      o_raw = q_empty + 16, o_full = o_raw + 16, o_empty = o_full + 16;
      item = o_empty + 16, span = k_full + 160;  // spans of two key tiles
    }
  };

  static DI void run(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                     const TMap& mdk, const TMap& mdv, const LoneArgs& a) {
    extern __shared__ unsigned char smem_raw[];
    const Layout x((smem_u32(smem_raw) + 1023) & ~1023u);
    const int wg = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; i++) mb_init(x.k_full + 8 * i, 1), mb_init(x.k_empty + 8 * i, 4);
      mb_init(x.v_full, 1), mb_init(x.v_empty, 2);
      Producer::init(x, true);
    }
    if constexpr (kSpan) Producer::clear_rest(a.p, x, 2);
    __syncthreads();
    if (wg == 0) {
      reg_dec<kProducerRegs>();
      const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
      if (threadIdx.x == 0)
        load(mq, mk, mv, mdo, a, x);
      else if (warp == 1)
        store(a, x);
      else if (warp == 2)
        number(a, x);
    } else {
      reg_inc<kConsumerRegs>();
      u32 it = 0;
#pragma unroll 1
      for (u32 k = 0;; k++) {
        if (item(x, k) < 0) break;
        compute(mdk, mdv, a, x, tile_of(a, x, k), wg - 1, k, it);
      }
      if (it > 0) bar_sync(kBarDqFree + wg - 1, 160);
      if ((threadIdx.x & 127) == 0) bulk_wait<0>();
    }
  }

  // The k-th key tile of this CTA.
  static DI Tile tile_of(const LoneArgs& a, const Layout& x, u32 k) {
    return key_tile_at(a, x.span + (k & 1) * kSpanSlot);
  }

  // Its number, once its K is there; -1 at the end.
  static DI int item(const Layout& x, u32 k) {
    mb_wait(x.k_full + 8 * (k & 1), k / 2 & 1);
    return __shfl_sync(~0u, load_int(x.item + 4 * (k & 1)), 0);
  }

  static DI void load(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                      const LoneArgs& a, const Layout& x) {
    u32 it = 0;
    auto take = [&]() -> int { return atomicAdd(a.ticket, 1); };
    const int items = *a.key_tiles * a.p.g;
    int i = take();
#pragma unroll 1
    for (u32 k = 0;; k++) {
      const u32 full = x.k_full + 8 * (k & 1);
      mb_wait(x.k_empty + 8 * (k & 1), ~(k / 2) & 1);
      const bool end = i >= items || (k > 0 && a.yields);
      store_int(x.item + 4 * (k & 1), end ? -1 : i);
      if (end) {
        mb_arrive(full);
        return;
      }
      ask_key_tile(a, i, x.span + (k & 1) * kSpanSlot);
      const Tile tile = put_key_tile<LoneBackward>(a, x.span + (k & 1) * kSpanSlot);
      mb_expect(full, Producer::bytes(N, a.p.d));
      Producer::load_keys(mk, a.p, x.k + (k & 1) * kKBytes, tile, full, a.p.d);
      Walk at(tile);
      u32 left = tile.steps();
      // V after the queries of the first step, since the last key tile frees it later.
      auto step = [&] {
        load_queries(mq, mdo, a, x, tile, at, it);
        left--, it++, at.next(tile);
      };
      if (left) step();
      mb_wait(x.v_empty, ~k & 1);
      mb_expect(x.v_full, Producer::bytes(N, a.p.e));
      Producer::load_keys(mv, a.p, x.v, tile, x.v_full, a.p.e);
#pragma unroll 1
      while (left) step();
      if (!a.yields) i = take();
    }
  }

  // The queries of one step; `it` counts the steps of a CTA, here and below.
  static DI void load_queries(const TMap& mq, const TMap& mdo, const LoneArgs& a, const Layout& x,
                              const Tile& tile, const Walk& at, u32 it) {
    const auto rows = tile.rows();
    const u32 s = it % kStages;
    auto put = [&](const TMap& map, u32 to, u32 empty, u32 full,
                   int width) {  // once a stage is free
      mb_wait(empty + 8 * s, ~(it / kStages) & 1);
      mb_expect(full + 8 * s, Producer::bytes(M, width));
#pragma unroll 1
      for (int c = 0; c < kChunks; c++)
        if (has_chunk(c, width))
          tma_load(to + s * kQBytes + c * M * 128, &map, full + 8 * s, c * 64,
                   rows.q_row(a.p, at.m * M), at.h, rows.q_box(a.p), kEvictLast);
    };
    put(mq, x.q, x.q_empty, x.q_full, a.p.d);
    put(mdo, x.o, x.o_empty, x.o_raw, a.p.e);
  }

  // lse2 = lse * log2(e), +inf where P is to be 0, and of delta what does not follow from P and dP.
  // Rows of dO whose P is 0 become 0, for 0 * NaN is NaN. By a warp.
  static DI void number(const LoneArgs& a, const Layout& x) {
    const int lane = threadIdx.x & 31;
    u32 it = 0;
#pragma unroll 1
    for (u32 k = 0;; k++) {
      if (item(x, k) < 0) return;
      const Tile tile = tile_of(a, x, k);
      if (lane == 0) mb_arrive(x.k_empty + 8 * (k & 1));
      number_queries(a, x, tile, it);
    }
  }

  static DI void number_queries(const LoneArgs& a, const Layout& x, const Tile& tile, u32& it) {
    constexpr int kRows = M / 32;  // of this lane
    const int lane = threadIdx.x & 31;
    Walk at(tile);
#pragma unroll 1
    for (const u32 end = it + tile.steps(); it < end; it++, at.next(tile)) {
      const u32 s = it % kStages;
      float lse[kRows], dlse[kRows];  // asked for before Q is waited for
      const int q_len = tile.q_len(a.p), b = tile.b(a.p);
      const long long row =
          ((long long)b * a.p.h + at.h) * a.p.s + tile.q_end(a.p) - q_len - b * a.p.s;
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const int r = at.m * M + 32 * i + lane;
        lse[i] = r < q_len ? a.lse[row + r] : -infinity();
        dlse[i] = r < q_len && a.dlse ? a.dlse[row + r] : 0.f;
      }
      mb_wait(x.q_full + 8 * s, it / kStages & 1);
      mb_wait(x.o_raw + 8 * s, it / kStages & 1);
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const u32 to = (s * M + 32 * i + lane) * 4;
        const bool none = lse[i] == -infinity();
        store_float(x.lse + to, none ? infinity() : lse[i] * kLog2E);
        store_float(x.delta + to, none ? 0.f : -dlse[i]);
      }
#pragma unroll 1
      for (int r0 = 0; r0 < M; r0 += 32) {
        const float l = load_shared(x.lse + s * M * 4 + (r0 + lane) * 4);
        clear_rows<kChunks>(x.o + s * kQBytes, M, r0, __ballot_sync(~0u, l == infinity()));
      }
      fence_async();
      __syncwarp();
      if (lane == 0) mb_arrive(x.o_full + 8 * s);
      if (lane == 0) mb_arrive(x.q_empty + 8 * s);
    }
  }

  static DI void store(const LoneArgs& a, const Layout& x) {
    const bool elect = (threadIdx.x & 31) == 0;
#pragma unroll 1
    for (u32 k = 0;; k++) {
      if (item(x, k) < 0) break;
      store_tile(a, x, tile_of(a, x, k));
      if (elect) mb_arrive(x.k_empty + 8 * (k & 1));
    }
    if (elect) bulk_wait<0>();
  }

  static DI void store_tile(const LoneArgs& a, const Layout& x, const Tile& tile) {
    const bool elect = (threadIdx.x & 31) == 0;
    Walk at(tile);
#pragma unroll 1
    for (u32 left = tile.steps(); left; left--, at.next(tile)) {
      const int row = tile.q_row(a.p, at.m * M), box = tile.q_box(a.p);  // the whole warp reads
#pragma unroll 1
      for (int w = 0; w < 2; w++) {
        bar_sync(kBarDqFull + w, 160);
        if (elect) {
          if (kByRows ? row + w * 64 < a.p.s : w * 64 < a.p.d)
            tma_store(&a.dq_map, x.dq + w * (M * D * 2), kByRows ? 0 : w * 64,
                      row + (kByRows ? w * 64 : 0), at.h, box);
          bulk_commit();
        }
      }
#pragma unroll 1
      for (int w = 0; w < 2; w++) {
        if (elect) w ? bulk_wait_read<0>() : bulk_wait_read<1>();
        __syncwarp();
        bar_arrive(kBarDqFree + w, 160);
      }
    }
  }

  // Adds to delta of a step the sum of P dP over all keys: in the buffer of dS, before that is
  // there.
  static DI void add_delta(const float (&w)[M / 2], const float (&dp)[M / 2], const Layout& x,
                           u32 s, int cw) {
    const int tid = threadIdx.x & 127, lane = tid & 31, warp = tid >> 5;
    const bool upper = lane & 16, odd = lane & 8;
    const u32 sums = x.ds + s * kDsBytes;
    const u32 to = sums + cw * M * 128 + (warp * M + 8 * upper + 2 * (lane & 3) + odd) * 4;
#pragma unroll
    for (int i = 0; i < M / 16; i++) {
      float y[2][2];  // of queries 8 apart, and side by side, this thread's two keys
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int at = 8 * i + 4 * (j / 2) + j % 2;
        y[j / 2][j % 2] = w[at] * dp[at] + w[at + 2] * dp[at + 2];
      }
      float z[2];  // lanes take a half of the queries, and a half of those
#pragma unroll
      for (int e = 0; e < 2; e++)
        z[e] = (upper ? y[1][e] : y[0][e]) + __shfl_xor_sync(~0u, upper ? y[0][e] : y[1][e], 16);
      float sum = (odd ? z[1] : z[0]) + __shfl_xor_sync(~0u, odd ? z[0] : z[1], 8);
      sum += __shfl_xor_sync(~0u, sum, 4);
      if (!(lane & 4)) store_float(to + 64 * i, sum);
    }
    bar_sync(kBarDs, 256);
    if (cw == 0 && tid < M) {
      const u32 delta = x.delta + (s * M + tid) * 4;
      float sum = load_shared(delta);
#pragma unroll
      for (int i = 0; i < 8; i++)
        sum += load_shared(sums + i / 4 * M * 128 + (i % 4 * M + tid) * 4);
      store_float(delta, sum);
    }
    bar_sync(kBarDs, 256);
  }

  static DI void compute(const TMap& mdk, const TMap& mdv, const LoneArgs& a, const Layout& x,
                         Tile tile, int cw, u32 k, u32& it) {
    const Problem& p = a.p;
    tile.load_clear();
    const int tid = threadIdx.x & 127, lane = tid & 31, warp = tid >> 5;
    const bool elect = tid == 0;
    float dk[D / 2], dv[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = 0.f, dv[i] = 0.f;
    const u32 keys = x.k + (k & 1) * kKBytes;
    const Products product(x, keys, cw, warp, lane);
    const int key =
        tile.first(p) + cw * 64 + warp * 16 + (lane >> 2);  // this thread's keys: key and key + 8
    const bool tail = tile.first(p) + N > tile.k_len(p);
    const float sl2 = p.scale * kLog2E;
    const u32 steps = tile.steps();
    Walk at(tile);
    // The stores of the last key tile have read what is about to be overwritten.
    if (elect) {
      bulk_wait_read<0>();
      if (k > 0) mb_arrive(x.k_empty + 8 * (~k & 1));
    }
    bar_sync(kBarStore + cw, 128);
    mb_wait(x.v_full, k & 1);
#pragma unroll 1
    for (u32 left = steps; left; left--, it++, at.next(tile)) {
      const int m = at.m;
      const u32 s = it % kStages, ph = it / kStages & 1;
      float st[M / 2], dp[M / 2];
      u32 pp[M / 4], ds[M / 4];
      mb_wait(x.q_full + 8 * s, ph);
      product.scores(st, s);
      mb_wait(x.o_full + 8 * s, ph);
      product.weight_gradients(dp, s);
      wg_wait<1>();
      pin(st);
      const u32 lse_at = x.lse + s * M * 4 + 8 * (lane & 3),
                delta_at = x.delta + s * M * 4 + 8 * (lane & 3);
      if (tail || tile.masked(m)) Products::mask(st, p, tile, m, key);
      Products::exponentials(st, lse_at, sl2);
      wg_wait<0>();
      pin(dp);
      if (left == 1 && elect) mb_arrive(x.v_empty);
      add_delta(st, dp, x, s, cw);
#pragma unroll
      for (int i = 0; i < M / 4; i++) pp[i] = pack<F16>(st[2 * i], st[2 * i + 1]);
#pragma unroll
      for (int j = 0; j < M / 8; j++) {  // dS = P * (dP - delta)
        float l0, l1;
        load_shared2(l0, l1, delta_at + 32 * j);
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          const int i = 4 * j + 2 * hh;
          ds[i / 2] = pack<F16>(st[i] * (dp[i] - l0), st[i + 1] * (dp[i + 1] - l1));
        }
      }
      product.put(ds, s);
      product.add_values(dv, pp, s);
      fence_async();
      bar_sync(kBarDs, 256);
      float dq[D * M / 256];
      product.queries(dq, s);
      product.add_keys(dk, ds, s);
      wg_wait<2>();
      pin(dv);
      if (elect) mb_arrive(x.o_empty + 8 * s);
      wg_wait<1>();
      pin(dq);
      if (it > 0) bar_sync(kBarDqFree + cw, 160);
      put_rows<F16>(dq, x.dq + cw * (M * D * 2), 0, warp * 16 + (lane & 15), p.scale);
      fence_async();
      bar_arrive(kBarDqFull + cw, 160);
      wg_wait<0>();
      pin(dk);
      if (elect) mb_arrive(x.q_empty + 8 * s);
    }
    bar_sync(kBarEnd, 256);
    if (steps == 0 && elect) mb_arrive(x.v_empty);
    Products::store(mdk, mdv, dk, dv, p, x, tile, keys + cw * 8192, N * 128, cw,
                    warp * 16 + (lane & 15), elect, [] {});
  }
};

// dq of queries that no key tile meets, and of rows of no sequence, is 0; of all queries where
// offsets fall, for then a sequence may lack its tile. Before the kernel; by blocks of 256 threads.
template <int M>
static __global__ void __launch_bounds__(256)
    lone_zeros(const __grid_constant__ BackwardArgs a, const int* cu_q, const int* cu_k, int n) {
  const Problem& p = a.p;
  pdl_wait();  // for the plan
  int falling = 0;
  for (int x = threadIdx.x; x < p.b * (n + 1); x += 256)
    if ((x + 1) % (n + 1) != 0)
      falling |= (cu_q && cu_q[x] > cu_q[x + 1]) || (cu_k && cu_k[x] > cu_k[x + 1]);
  const bool falls = __syncthreads_or(falling);
#pragma unroll 1
  for (int i = blockIdx.x; i < *a.query_tiles; i += gridDim.x) {
    const Span& x = a.queries[i];
    const Blocks met = query_blocks(p, M, true, x.diagonal, 0, x.k_len, 0, x.q_len, x.q_len);
    const int m = x.first / M;
    if (!falls && x.k_len > 0 && met.begin <= m && m < met.end) continue;
    const long long row = (long long)p.h * a.d / 8;  // in uint4, of all heads
    uint4* to = (uint4*)a.dq + (x.q_end - x.q_len + x.first) * row;
    const long long count = min(M, x.q_len - x.first) * row;
    for (long long j = threadIdx.x; j < count; j += 256) to[j] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace flashjax::sm90
