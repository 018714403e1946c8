// The backward for sm_90a. One CTA owns N = 128 keys of one key head, and loops over the query
// heads of the group and over tiles of M queries. Warpgroup 0 produces: warp 0 loads (TMA), warp 1
// adds dQ to memory, warp 2 clears dO rows of queries that saw nothing. Warpgroups 1 and 2 own 64
// keys each:
//   S' = K Q', dP' = V dO' (rows are keys), so that P' and dS' are, in registers, the A operands of
//   dV += P' dO and dK += dS' Q; dS also goes to shared memory, as queries x keys, for dQ = dS K.
// Pipeline, barriers, registers and shared memory: docs/kernels/sm90-backward.md.
#pragma once
#include "backward_common.cuh"

namespace flashjax::sm90 {

template <bool F16, int D, int M, int N, int kOptions>
struct Backward {
  static constexpr int kM = M, kN = N, kStages = 2, kChunks = D / 64, kThreads = 384,
                       kStoreRows = 64;
  static constexpr int kConsumerRegs = D == 128 && (kOptions & kBackwardScores) ? 240 : 232,
                       kProducerRegs = kConsumerRegs == 240 ? 24 : 40;
  static constexpr bool kMask = kOptions & kBackwardMasks, kScore = kOptions & kBackwardScores;
  // How dQ (M x D) is split over the two warpgroups: by rows, or by columns.
  static constexpr bool kByRows = M == 128;
  static constexpr int kKBytes = N * D * 2, kQBytes = M * D * 2, kDsBytes = M * N * 2,
                       kDqBytes = M * D * 4;
  static constexpr int kSmem = 2 * kKBytes + 2 * kStages * kQBytes + 2 * kDsBytes + kDqBytes +
                               2 * kStages * M * 4 + 256 + 1024;
  static_assert(N == 128 && (D == 64 || D == 128) && (M == 64 || (M == 128 && D == 64)));
  // Named barriers: dS is in shared memory; half of the dQ buffer is free (two ids); is full (two);
  // end of loop; store.
  static constexpr int kBarDs = 1, kBarDqFree = 2, kBarDqFull = 4, kBarEnd = 6, kBarStore = 7;

  struct Layout {
    u32 k, v, q, o, ds, dq, lse, delta;
    u32 kv_full, q_full, q_empty, o_full, o_empty, o_raw, q_raw, kv_raw;
    DI explicit Layout(u32 base) {
      k = base, v = k + kKBytes, q = v + kKBytes, o = q + kStages * kQBytes,
      ds = o + kStages * kQBytes;
      dq = ds + 2 * kDsBytes, lse = dq + kDqBytes, delta = lse + kStages * M * 4,
      kv_full = delta + kStages * M * 4;
      q_full = kv_full + 8, q_empty = q_full + 8 * kStages, o_full = q_empty + 8 * kStages;
      o_empty = o_full + 8 * kStages, o_raw = o_empty + 8 * kStages;
      q_raw = o_raw + 8 * kStages, kv_raw = q_raw + 8 * kStages;
    }
  };

  static DI void run(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                     const TMap& mdk, const TMap& mdv, const BackwardArgs& a) {
    const Problem& p = a.p;
    extern __shared__ unsigned char smem_raw[];
    const Layout x((smem_u32(smem_raw) + 1023) & ~1023u);
    const int wg = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    const KeyTile tile = key_tile<M, N, kScore>(a, blockIdx.x);
    if (threadIdx.x == 0) BackwardProducer<Backward>::init(x, a.clean);
    __syncthreads();
    if (wg == 0) {
      reg_dec<kProducerRegs>();
      const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
      if (threadIdx.x == 0)
        BackwardProducer<Backward>::load(mq, mk, mv, mdo, a, x, tile);
      else if (warp == 1)
        add_dq(a, x, tile);
      else if (warp == 2 && a.clean)
        BackwardProducer<Backward>::clean(p, x, tile);
    } else {
      reg_inc<kConsumerRegs>();
      compute(mdk, mdv, a, x, tile, wg - 1);
    }
  }

  static DI void add_dq(const BackwardArgs& a, const Layout& x, const KeyTile& tile) {
    const bool elect = (threadIdx.x & 31) == 0;
#pragma unroll 1
    for (int h = tile.first_head; h < tile.first_head + tile.heads; h++) {
      float* dst = a.dq + ((long long)tile.b * a.p.h + h) * a.rows * D;
#pragma unroll 1
      for (int m = tile.blocks.begin; m < tile.blocks.end; m++) {
#pragma unroll 1
        for (int w = 0; w < 2; w++) {
          bar_sync(kBarDqFull + w, 160);
          if (elect) {
            bulk_add_f32(dst + (long long)m * M * D + w * (M * D / 2), x.dq + w * (M * D * 2),
                         M * D * 2);
            bulk_commit();
          }
        }
        if (elect) bulk_wait_read<1>();
        __syncwarp();
        bar_arrive(kBarDqFree, 160);
        if (elect) bulk_wait_read<0>();
        __syncwarp();
        bar_arrive(kBarDqFree + 1, 160);
      }
    }
    if (elect) bulk_wait<0>();
  }

  static DI void compute(const TMap& mdk, const TMap& mdv, const BackwardArgs& a, const Layout& x,
                         const KeyTile& tile, int cw) {
    const Problem& p = a.p;
    const Blocks& blocks = tile.blocks;
    const int n = tile.n, b = tile.b;
    const int tid = threadIdx.x & 127, lane = tid & 31, warp = tid >> 5;
    const bool elect = tid == 0;
    float dk[D / 2], dv[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = 0.f, dv[i] = 0.f;
    // Descriptors: A operands of the own 64 keys, B operands K-major, and MN-major.
    const u32 a_k = desc_lo(x.k + cw * 8192, 16), a_v = desc_lo(x.v + cw * 8192, 16);
    const u32 b_q = desc_lo(x.q, 16), b_o = desc_lo(x.o, 16);
    const u32 t_q = desc_lo(x.q, M * 128), t_o = desc_lo(x.o, M * 128);
    const u32 a_ds = desc_lo(x.ds + (kByRows ? cw * 8192 : 0), 16);
    const u32 t_k = desc_lo(x.k + (kByRows   ? 0
                                   : D == 64 ? cw * 64
                                             : cw * (kChunks / 2) * N * 128),
                            N * 128);
    // This lane's address for stmatrix.trans in a dS tile of queries x keys.
    const int rr = (lane & 7) + ((lane >> 4) & 1) * 8, kc = warp * 2 + ((lane >> 3) & 1);
    const u32 to_ds = x.ds + cw * M * 128 + rr * 128 + ((kc ^ (rr & 7)) << 4);
    const int key =
        n * N + cw * 64 + warp * 16 + (lane >> 2);  // this thread's keys: key and key + 8
    const bool tail = (n + 1) * N > p.t;
    const float sl2 = p.scale * kLog2E;
    const int steps = tile.steps();
    int m = blocks.begin, h = tile.first_head;
    mb_wait(x.kv_full, 0);
#pragma unroll 1
    for (int it = 0; it < steps; it++) {
      const int s = it % kStages;
      const u32 ph = (it / kStages) & 1;
      float st[M / 2], dp[M / 2];
      u32 pp[M / 4], ds[M / 4];
      mb_wait(x.q_full + 8 * s, ph);
      pin(st);
      wg_fence();
#pragma unroll
      for (int k = 0; k < D / 16; k++)  // S' = K Q'
        Wgmma<M, F16>::template ss<0, 0>(
            st, desc(a_k + (((k / 4) * N * 128 + (k % 4) * 32) >> 4)),
            desc(b_q + ((s * kQBytes + (k / 4) * M * 128 + (k % 4) * 32) >> 4)), k > 0);
      wg_commit();
      auto issue_dp = [&]() {
        mb_wait(x.o_full + 8 * s, ph);
        pin(dp);
        wg_fence();
#pragma unroll
        for (int k = 0; k < D / 16; k++)  // dP' = V dO'
          Wgmma<M, F16>::template ss<0, 0>(
              dp, desc(a_v + (((k / 4) * N * 128 + (k % 4) * 32) >> 4)),
              desc(b_o + ((s * kQBytes + (k / 4) * M * 128 + (k % 4) * 32) >> 4)), k > 0);
        wg_commit();
      };
      if constexpr (kScore) {  // branches follow, and ptxas serialises what is in flight across
                               // them
        wg_wait<0>();
      } else {
        issue_dp();
        wg_wait<1>();
      }
      pin(st);
      const u32 lse_at = x.lse + s * M * 4 + 8 * (lane & 3),
                delta_at = x.delta + s * M * 4 + 8 * (lane & 3);
      if (tail || (kMask && blocks.masked(m))) {
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          const int kv = key + 8 * hh, first = m * M + 2 * (lane & 3);
          int least = -1, most = 1 << 30;
          if (kMask && p.right >= 0) least = kv - p.diagonal - p.right - first;
          if (kMask && p.left >= 0) most = kv - p.diagonal + p.left - first;
          if (kv >= p.t) least = 1 << 30;
          mask_row(st, hh, least, most);
          if (kScore && p.segment_q)
            mask_segment(st, hh, p.segment_k[(long long)b * p.t + min(kv, p.t - 1)],
                         p.segment_q + (long long)b * p.s, first, p.s);
        }
      }
      if constexpr (kScore) {  // P = exp(score - lse); what goes on to dS also has the derivative
                               // of the cap
        const Scores<F16> score(p, b, 0, h, p.diagonal);
#pragma unroll
        for (int j = 0; j < M / 8; j++) {
          float l[2];
          load_shared2(l[0], l[1], lse_at + 32 * j);
          const int query = m * M + 8 * j + 2 * (lane & 3);
          const char* rows[2] = {score.row(query), score.row(query + 1)};
#pragma unroll
          for (int hh = 0; hh < 2; hh++) {
            const int i = 4 * j + 2 * hh;
            float w[2], bend[2] = {1.f, 1.f};
#pragma unroll
            for (int e = 0; e < 2; e++) {
              float y = score(st[i + e], rows[e], query + e, key + 8 * hh, &bend[e]);
              w[e] = st[i + e] == -infinity() ? 0.f : ex2(y * kLog2E - l[e]);
              st[i + e] = w[e] * bend[e];
            }
            pp[i / 2] = pack<F16>(w[0], w[1]);
          }
          asm volatile("" ::
                           : "memory");  // or all loads of a bias come first, in more registers
                                         // than there are
        }
      } else {
#pragma unroll
        for (int j = 0; j < M / 8; j++) {  // P = exp2(S * scale * log2(e) - lse2)
          float l0, l1;
          load_shared2(l0, l1, lse_at + 32 * j);
#pragma unroll
          for (int hh = 0; hh < 2; hh++) {
            const int i = 4 * j + 2 * hh;
            st[i] = ex2(st[i] * sl2 - l0), st[i + 1] = ex2(st[i + 1] * sl2 - l1);
          }
        }
#pragma unroll
        for (int i = 0; i < M / 4; i++) pp[i] = pack<F16>(st[2 * i], st[2 * i + 1]);
      }
      if constexpr (kScore) issue_dp();
      wg_wait<0>();
      pin(dp);
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
      // dS to shared memory. Two buffers, so that the one barrier below also protects the reuse.
#pragma unroll
      for (int k = 0; k < M / 16; k++)
        stmatrix4_trans(to_ds + s * kDsBytes + k * 2048, ds[4 * k], ds[4 * k + 1], ds[4 * k + 2],
                        ds[4 * k + 3]);
      pin(dv);
      wg_fence();
#pragma unroll
      for (int k = 0; k < M / 16; k++)  // dV += P' dO
        Wgmma<D, F16>::template rs<1>(dv, pp[4 * k], pp[4 * k + 1], pp[4 * k + 2], pp[4 * k + 3],
                                      desc(t_o + ((s * kQBytes + k * 2048) >> 4)), 1);
      wg_commit();
      fence_async();
      bar_sync(kBarDs, 256);
      float dq[D * M / 256];
      pin(dq);
      wg_fence();
#pragma unroll
      for (int k = 0; k < N / 16; k++) {  // dQ = dS K
        const u64 da = desc(a_ds + ((s * kDsBytes + (k / 4) * M * 128 + (k % 4) * 32) >> 4));
        const u64 db = desc(t_k + ((k * 2048) >> 4));
        Wgmma<kByRows ? D : D / 2, F16>::template ss<0, 1>(dq, da, db, k > 0);
      }
      wg_commit();
      pin(dk);
      wg_fence();
#pragma unroll
      for (int k = 0; k < M / 16; k++)  // dK += dS' Q
        Wgmma<D, F16>::template rs<1>(dk, ds[4 * k], ds[4 * k + 1], ds[4 * k + 2], ds[4 * k + 3],
                                      desc(t_q + ((s * kQBytes + k * 2048) >> 4)), 1);
      wg_commit();
      wg_wait<2>();
      pin(dv);
      if (elect) mb_arrive(x.o_empty + 8 * s);
      wg_wait<1>();
      pin(dq);
      if (it > 0) bar_sync(kBarDqFree + cw, 160);
#pragma unroll
      for (int i = 0; i < D * M / 256; i += 4)
        store_shared4(x.dq + cw * (M * D * 2) + (i * 128 + tid * 4) * 4, dq[i], dq[i + 1],
                      dq[i + 2], dq[i + 3]);
      fence_async();
      bar_arrive(kBarDqFull + cw, 160);
      wg_wait<0>();
      pin(dk);
      if (elect) mb_arrive(x.q_empty + 8 * s);
      if (++m == blocks.end) m = blocks.begin, h++;
    }
    if (steps > 0) bar_sync(kBarDqFree + cw, 160);
    // dV over V (own rows), dK over K (once nobody reads K any more); the store clips ragged rows
    // and columns.
    const int er = cw * 64 + warp * 16 + (lane & 7) + 8 * ((lane >> 3) & 1);
    put_rows<F16>(dv, x.v, N * 128, er, 1.f);
    bar_sync(kBarEnd, 256);
    put_rows<F16>(dk, x.k, N * 128, er, p.scale);
    fence_async();
    bar_sync(kBarStore + cw, 128);
    if (elect) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        tma_store(&mdv, x.v + c * N * 128 + cw * 8192, c * 64, n * N + cw * 64, tile.g, b);
        tma_store(&mdk, x.k + c * N * 128 + cw * 8192, c * 64, n * N + cw * 64, tile.g, b);
      }
      bulk_commit();
      bulk_wait<0>();
    }
  }
};

template <bool F16, int D, int M, int N, int kOptions>
static __global__ void __launch_bounds__(384, 1)
    backward_kernel(const __grid_constant__ TMap q, const __grid_constant__ TMap k,
                    const __grid_constant__ TMap v, const __grid_constant__ TMap o,
                    const __grid_constant__ TMap dk, const __grid_constant__ TMap dv,
                    const __grid_constant__ BackwardArgs a) {
  Backward<F16, D, M, N, kOptions>::run(q, k, v, o, dk, dv, a);
}

}  // namespace flashjax::sm90
