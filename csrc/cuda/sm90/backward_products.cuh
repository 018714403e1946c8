// A step of the backward by a warpgroup that owns 64 of N = 128 keys, in both kernels that are made
// so (backward_kernel.cuh, backward_lone_kernel.cuh): its products, and what masks do to its
// scores. Rows of an accumulator are keys, but for dQ. `s` is the stage of a step, K as in
// backward_common.cuh.
#pragma once
#include "backward_common.cuh"

namespace flashjax::sm90 {

template <class K>
struct BackwardProducts {
  static constexpr int D = K::kD, M = K::kM, N = K::kN, kChunks = K::kChunks;
  static constexpr bool F16 = K::kF16;
  using Layout = typename K::Layout;
  using Tile = KeyTile<K::kSpan>;

  // Descriptors: A operands of the own 64 keys, B operands K-major, and MN-major.
  u32 a_k, a_v, b_q, b_o, t_q, t_o, a_ds, t_k;
  u32 to_ds;  // this lane's address for stmatrix.trans in a dS tile of queries x keys

  DI BackwardProducts(const Layout& x, u32 keys, int cw, int warp, int lane) {
    a_k = desc_lo(keys + cw * 8192, 16), a_v = desc_lo(x.v + cw * 8192, 16);
    b_q = desc_lo(x.q, 16), b_o = desc_lo(x.o, 16);
    t_q = desc_lo(x.q, M * 128), t_o = desc_lo(x.o, M * 128);
    a_ds = desc_lo(x.ds + (K::kByRows ? cw * 8192 : 0), 16);
    t_k = desc_lo(keys + (K::kByRows ? 0
                          : D == 64  ? cw * 64
                                     : cw * (kChunks / 2) * N * 128),
                  N * 128);
    const int row = (lane & 7) + ((lane >> 4) & 1) * 8, chunk = warp * 2 + ((lane >> 3) & 1);
    to_ds = x.ds + cw * M * 128 + row * 128 + ((chunk ^ (row & 7)) << 4);
  }

  // S' = K Q'
  DI void scores(float (&st)[M / 2], u32 s) const { keys_by_queries(st, a_k, b_q, s); }
  // dP' = V dO'
  DI void weight_gradients(float (&dp)[M / 2], u32 s) const { keys_by_queries(dp, a_v, b_o, s); }
  // dV += P' dO, of these sixteens of queries: after the first ones dV is in flight
  template <int kFirst = 0, int kLast = M / 16>
  DI void add_values(float (&dv)[D / 2], const u32 (&p)[M / 4], u32 s) const {
    add_by_keys<kFirst, kLast>(dv, p, t_o, s);
  }
  // dK += dS' Q
  DI void add_keys(float (&dk)[D / 2], const u32 (&ds)[M / 4], u32 s) const {
    add_by_keys(dk, ds, t_q, s);
  }
  // dQ = dS K, of which a warpgroup has some rows or columns; of kKeys keys, from 64 * half on
  template <int kKeys = N>
  DI void queries(float (&dq)[D * M / 256], u32 s, int half = 0) const {
    pin(dq);
    wg_fence();
    const u32 ds = a_ds + half * (M * 128 >> 4), keys = t_k + half * (64 * 128 >> 4);
#pragma unroll
    for (int k = 0; k < kKeys / 16; k++) {
      const u64 da = desc(ds + ((s * K::kDsBytes + (k / 4) * M * 128 + (k % 4) * 32) >> 4));
      const u64 db = desc(keys + ((k * 2048) >> 4));
      if constexpr (K::kTransposed)
        Wgmma<M, F16>::template ss<1, 0>(dq, db, da, k > 0);  // dQ' = K' dS'
      else
        Wgmma<K::kByRows ? D : D / 2, F16>::template ss<0, 1>(dq, da, db, k > 0);
    }
    wg_commit();
  }

  // dS to shared memory. Two buffers, so that the one barrier that follows also protects the reuse.
  DI void put(const u32 (&ds)[M / 4], u32 s) const {
#pragma unroll
    for (int k = 0; k < M / 16; k++)
      stmatrix4_trans(to_ds + s * K::kDsBytes + k * 2048, ds[4 * k], ds[4 * k + 1], ds[4 * k + 2],
                      ds[4 * k + 3]);
  }

  // Scores of queries that do not see this thread's keys, `key` and `key` + 8.
  static DI void mask(float (&st)[M / 2], const Problem& p, const Tile& tile, int m, int key) {
    const int diagonal = tile.diagonal(p), k_len = tile.k_len(p), begin = tile.begin(p),
              end = tile.end(p);
#pragma unroll
    for (int hh = 0; hh < 2; hh++) {
      const int kv = key + 8 * hh, first = m * M + 2 * (threadIdx.x & 3);
      int least = -1, most = 1 << 30;
      if (K::kMask && p.right >= 0) least = kv - diagonal - p.right - first;
      if (K::kMask && p.left >= 0) most = kv - diagonal + p.left - first;
      if constexpr (K::kSpan) least = max(least, begin - first), most = min(most, end - 1 - first);
      if (kv >= k_len) least = 1 << 30;
      mask_row(st, hh, least, most);
    }
  }

  // Whether the queries of tile m see none of the 64 keys from `first` on.
  static DI bool none_seen(const Problem& p, const Tile& tile, int m, int first) {
    const int at = m * M + tile.diagonal(p);  // the key that the first query sits on
    return (p.right >= 0 && at + M - 1 + p.right < first) ||
           (p.left >= 0 && at - p.left >= first + 64);
  }

  // P = exp2(S * scale * log2(e) - lse2), of which kRead pairs of lse2 have been read
  template <int kRead = 0>
  static DI void exponentials(float (&st)[M / 2], u32 lse_at, float sl2,
                              const float* read = nullptr) {
#pragma unroll
    for (int j = 0; j < M / 8; j++) {
      float l0, l1;
      if (j < kRead)
        l0 = read[2 * j], l1 = read[2 * j + 1];
      else
        load_shared2(l0, l1, lse_at + 32 * j);
#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        const int i = 4 * j + 2 * hh;
        st[i] = ex2(st[i] * sl2 - l0), st[i + 1] = ex2(st[i + 1] * sl2 - l1);
      }
    }
  }

  // To memory, once nobody reads those buffers any more: dV through the buffers of dS, and dK
  // through `to_dk`, whose chunks are `k_chunk` bytes apart, once `wait` says so. This lane puts
  // `row`. By a warpgroup, of which one thread is `elect`.
  template <class Wait>
  static DI void store(const TMap& mdk, const TMap& mdv, const float (&dk)[D / 2],
                       const float (&dv)[D / 2], const Problem& p, const Layout& x,
                       const Tile& tile, u32 to_dk, int k_chunk, int cw, int row, bool elect,
                       Wait wait) {
    const u32 to_dv = x.ds + cw * M * 128;
    put_rows<F16>(dv, to_dv, K::kDsBytes, row, 1.f);
    wait();
    put_rows<F16>(dk, to_dk, k_chunk, row, p.scale, K::kSpan ? p.d : D);
    fence_async();
    const int to = tile.k_row(p, tile.first(p) + cw * 64), g = tile.head(p), box = tile.k_box(p);
    bar_sync(K::kBarStore + cw, 128);  // from here on nobody reads the tile's Span
    if (elect) {
      store_keys<K, kChunks>(mdk, mdv, p, to_dk, k_chunk, to_dv, K::kDsBytes, 0, to, g, box);
      bulk_commit();
    }
  }

 private:
  DI void keys_by_queries(float (&y)[M / 2], u32 a, u32 b, u32 s) const {
    pin(y);
    wg_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      Wgmma<M, F16>::template ss<0, 0>(
          y, desc(a + (((k / 4) * N * 128 + (k % 4) * 32) >> 4)),
          desc(b + ((s * K::kQBytes + (k / 4) * M * 128 + (k % 4) * 32) >> 4)), k > 0);
    wg_commit();
  }
  template <int kFirst = 0, int kLast = M / 16>
  DI void add_by_keys(float (&y)[D / 2], const u32 (&a)[M / 4], u32 b, u32 s) const {
    if (kFirst == 0) pin(y);
    wg_fence();
#pragma unroll
    for (int k = kFirst; k < kLast; k++)
      Wgmma<D, F16>::template rs<1>(y, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                                    desc(b + ((s * K::kQBytes + k * 2048) >> 4)), 1);
    wg_commit();
  }
};

}  // namespace flashjax::sm90
