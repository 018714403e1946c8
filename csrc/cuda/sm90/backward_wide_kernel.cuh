// The backward for sm_90a at head dims over 128. One CTA owns N = 64 keys of one key head, and
// loops over the query heads of the group and over tiles of M = 128 queries. Warpgroup 0 produces:
// warp 0 loads (TMA), warp 1 clears dO rows of queries that saw nothing. Warpgroups 1 and 2:
//   S = Q K', dP = dO V' of their own 64 queries; P and dS go to shared memory, and dS stays in
//   registers too; dV += P' dO and dK += dS' Q over all 128 queries, for their own half of the
//   columns; dQ = dS K of their own queries, a half of the columns at a time, added to memory from
//   registers.
// Q and dO have one stage: they are loaded under dK and dQ. See docs/kernels/sm90-backward.md.
#pragma once
#include "backward_common.cuh"

namespace flashjax::sm90 {

template <bool F16, int D, int M, int N, int kOptions>
struct WideBackward {
  static constexpr int kM = M, kN = N, kStages = 1, kChunks = D / 64, kHalf = D / 2, kThreads = 384;
  static constexpr bool kMask = kOptions & kBackwardMasks, kScore = kOptions & kBackwardScores;
  static constexpr bool kByRows = true, kQFirst = false;
  static constexpr int kConsumerRegs = 240, kProducerRegs = 24;
  static constexpr int kKBytes = N * D * 2, kQBytes = M * D * 2, kPBytes = M * N * 2;
  static constexpr int kSmem = 2 * kKBytes + 2 * kQBytes + 2 * kPBytes + 2 * M * 4 + 128 + 1024;
  static_assert(D == 256 && M == 128 && N == 64);
  static constexpr int kBarDs = 1, kBarEnd = 2, kBarStore = 3;  // named barriers

  struct Layout {
    u32 k, v, q, o, p, ds, lse, delta, kv_full, q_full, q_empty, o_full, o_empty, o_raw, q_raw,
        kv_raw;
    DI explicit Layout(u32 base) {
      k = base, v = k + kKBytes, q = v + kKBytes, o = q + kQBytes, p = o + kQBytes,
      ds = p + kPBytes;
      lse = ds + kPBytes, delta = lse + M * 4, kv_full = delta + M * 4;
      q_full = kv_full + 8, q_empty = q_full + 8, o_full = q_empty + 8, o_empty = o_full + 8,
      o_raw = o_empty + 8, q_raw = o_raw + 8, kv_raw = q_raw + 8;
    }
  };

  static DI void run(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                     const TMap& mdk, const TMap& mdv, const BackwardArgs& a) {
    const Problem& p = a.p;
    extern __shared__ unsigned char smem_raw[];
    const Layout x((smem_u32(smem_raw) + 1023) & ~1023u);
    const int wg = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    const KeyTile tile = key_tile<M, N, kScore>(a, blockIdx.x);
    if (threadIdx.x == 0) BackwardProducer<WideBackward>::init(x, a.clean);
    __syncthreads();
    if (wg == 0) {
      reg_dec<kProducerRegs>();
      const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
      if (threadIdx.x == 0)
        BackwardProducer<WideBackward>::load(mq, mk, mv, mdo, a, x, tile);
      else if (warp == 1 && a.clean)
        BackwardProducer<WideBackward>::clean(p, x, tile);
    } else {
      reg_inc<kConsumerRegs>();
      compute(mdk, mdv, a, x, tile, wg - 1);
    }
  }

  static DI void compute(const TMap& mdk, const TMap& mdv, const BackwardArgs& a, const Layout& x,
                         const KeyTile& tile, int cw) {
    const Problem& p = a.p;
    const Blocks& blocks = tile.blocks;
    const int n = tile.n, b = tile.b;
    const int tid = threadIdx.x & 127, lane = tid & 31, warp = tid >> 5;
    const bool elect = tid == 0;
    float dk[kHalf / 2], dv[kHalf / 2];
#pragma unroll
    for (int i = 0; i < kHalf / 2; i++) dk[i] = 0.f, dv[i] = 0.f;
    // Descriptors: own queries as A, K-major; keys as B, K-major; P' and dS' as A, and own columns
    // as B, MN-major.
    const u32 a_q = desc_lo(x.q + cw * 8192, 16), a_o = desc_lo(x.o + cw * 8192, 16);
    const u32 b_k = desc_lo(x.k, 16), b_v = desc_lo(x.v, 16);
    const u32 t_p = desc_lo(x.p, 16), t_ds = desc_lo(x.ds, 16);
    const u32 t_q = desc_lo(x.q + cw * (kChunks / 2) * M * 128, M * 128);
    const u32 t_o = desc_lo(x.o + cw * (kChunks / 2) * M * 128, M * 128);
    const u32 t_k = desc_lo(x.k, N * 128);
    const int local =
        cw * 64 + warp * 16 + (lane >> 2);  // this thread's rows of the tile: local and local + 8
    const int rr = (lane & 7) + ((lane >> 3) & 1) * 8;  // stmatrix row
    const u32 to_row = (cw * 64 + warp * 16 + rr) * 128;
    const int c0 = n * N + 2 * (lane & 3);  // this thread's keys: c0 + 8 j + {0, 1}
    const bool tail = (n + 1) * N > p.t;
    const float sl2 = p.scale * kLog2E;
    const int steps = tile.steps();
    int m = blocks.begin, h = tile.first_head;
    mb_wait(x.kv_full, 0);
#pragma unroll 1
    for (int it = 0; it < steps; it++) {
      const u32 ph = it & 1;
      float st[N / 2], dp[N / 2];
      u32 pp[N / 4], ds[N / 4];
      mb_wait(x.q_full, ph);
      pin(st);
      wg_fence();
#pragma unroll
      for (int k = 0; k < D / 16; k++)  // S = Q K'
        Wgmma<N, F16>::template ss<0, 0>(st, desc(a_q + (((k / 4) * M * 128 + (k % 4) * 32) >> 4)),
                                         desc(b_k + (((k / 4) * N * 128 + (k % 4) * 32) >> 4)),
                                         k > 0);
      wg_commit();
      auto issue_dp = [&]() {
        mb_wait(x.o_full, ph);
        pin(dp);
        wg_fence();
#pragma unroll
        for (int k = 0; k < D / 16; k++)  // dP = dO V'
          Wgmma<N, F16>::template ss<0, 0>(
              dp, desc(a_o + (((k / 4) * M * 128 + (k % 4) * 32) >> 4)),
              desc(b_v + (((k / 4) * N * 128 + (k % 4) * 32) >> 4)), k > 0);
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
      const int row0 = m * M + local;
      const float lse[2] = {load_shared(x.lse + local * 4), load_shared(x.lse + local * 4 + 32)};
      if (tail || (kMask && blocks.masked(m))) {
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          const int at = row0 + 8 * hh + p.diagonal;
          int least = -1, most = p.t - 1;
          if (kMask && p.right >= 0) most = min(most, at + p.right);
          if (kMask && p.left >= 0) least = at - p.left - c0;
          mask_row(st, hh, least, most - c0);
          if (kScore && p.segment_q)
            mask_segment(st, hh, p.segment_q[(long long)b * p.s + min(row0 + 8 * hh, p.s - 1)],
                         p.segment_k + (long long)b * p.t, c0, p.t);
        }
      }
      if constexpr (kScore) {  // P = exp(score - lse); what goes on to dS also has the derivative
                               // of the cap
        const Scores<F16> score(p, b, 0, h, p.diagonal);
        const char* rows[2] = {score.row(row0), score.row(row0 + 8)};
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
#pragma unroll
          for (int hh = 0; hh < 2; hh++) {
            const int i = 4 * j + 2 * hh;
            float w[2], bend[2] = {1.f, 1.f};
#pragma unroll
            for (int e = 0; e < 2; e++) {
              float y = score(st[i + e], rows[hh], row0 + 8 * hh, c0 + 8 * j + e, &bend[e]);
              w[e] = st[i + e] == -infinity() ? 0.f : ex2(y * kLog2E - lse[hh]);
              st[i + e] = w[e] * bend[e];
            }
            pp[i / 2] = pack<F16>(w[0], w[1]);
          }
          asm volatile("" ::
                           : "memory");  // or all loads of a bias come first, in more registers
                                         // than there are
        }
        issue_dp();
      } else {
#pragma unroll
        for (int i = 0; i < N / 2; i++) st[i] = ex2(st[i] * sl2 - lse[i / 2 % 2]);
#pragma unroll
        for (int i = 0; i < N / 4; i++) pp[i] = pack<F16>(st[2 * i], st[2 * i + 1]);
      }
#pragma unroll
      for (int k = 0; k < N / 16; k++)
        stmatrix4(x.p + to_row + (((2 * k + (lane >> 4)) ^ (rr & 7)) << 4), pp[4 * k],
                  pp[4 * k + 1], pp[4 * k + 2], pp[4 * k + 3]);
      wg_wait<0>();
      pin(dp);
      const float delta[2] = {load_shared(x.delta + local * 4),
                              load_shared(x.delta + local * 4 + 32)};
#pragma unroll
      for (int i = 0; i < N / 4; i++)  // dS = P * (dP - delta)
        ds[i] = pack<F16>(st[2 * i] * (dp[2 * i] - delta[i % 2]),
                          st[2 * i + 1] * (dp[2 * i + 1] - delta[i % 2]));
#pragma unroll
      for (int k = 0; k < N / 16; k++)
        stmatrix4(x.ds + to_row + (((2 * k + (lane >> 4)) ^ (rr & 7)) << 4), ds[4 * k],
                  ds[4 * k + 1], ds[4 * k + 2], ds[4 * k + 3]);
      // Both P and dS of all queries are there after this barrier; they may be overwritten once Q
      // is, for Q is loaded again only when both warpgroups are past dV and dK.
      fence_async();
      bar_sync(kBarDs, 256);
      pin(dv);
      wg_fence();
#pragma unroll
      for (int k = 0; k < M / 16; k++)  // dV += P' dO
        Wgmma<kHalf, F16>::template ss<1, 1>(dv, desc(t_p + ((k * 2048) >> 4)),
                                             desc(t_o + ((k * 2048) >> 4)), 1);
      wg_commit();
      pin(dk);
      wg_fence();
#pragma unroll
      for (int k = 0; k < M / 16; k++)  // dK += dS' Q
        Wgmma<kHalf, F16>::template ss<1, 1>(dk, desc(t_ds + ((k * 2048) >> 4)),
                                             desc(t_q + ((k * 2048) >> 4)), 1);
      wg_commit();
      float dq[kHalf / 2];
      auto issue_dq = [&](int half) {
        pin(dq);
        wg_fence();
#pragma unroll
        for (int k = 0; k < N / 16; k++)  // dQ = dS K
          Wgmma<kHalf, F16>::template rs<1>(
              dq, ds[4 * k], ds[4 * k + 1], ds[4 * k + 2], ds[4 * k + 3],
              desc(t_k + ((half * (kChunks / 2) * N * 128 + k * 2048) >> 4)), k > 0);
        wg_commit();
      };
      float* dst = a.dq + (((long long)b * p.h + h) * a.rows + (long long)m * M) * D +
                   cw * (M * D / 2) + tid * 4;
      auto add_dq = [&](int half) {
#pragma unroll
        for (int i = 0; i < kHalf / 2; i += 4)
          add_global4(dst + half * (64 * kHalf) + i * 128, dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
      };
      issue_dq(0);
      wg_wait<2>();
      pin(dv);
      if (elect) mb_arrive(x.o_empty);
      wg_wait<1>();
      pin(dk);
      if (elect) mb_arrive(x.q_empty);
      wg_wait<0>();
      pin(dq);
      add_dq(0);
      issue_dq(1);
      wg_wait<0>();
      pin(dq);
      add_dq(1);
      if (++m == blocks.end) m = blocks.begin, h++;
    }
    // dV over V and dK over K, own half of the columns, once nobody reads them; the store clips
    // rows and columns.
    bar_sync(kBarEnd, 256);
    const u32 half = cw * (kChunks / 2) * N * 128;
    put_rows<F16>(dv, x.v + half, N * 128, warp * 16 + rr, 1.f);
    put_rows<F16>(dk, x.k + half, N * 128, warp * 16 + rr, p.scale);
    fence_async();
    bar_sync(kBarStore + cw, 128);
    if (elect) {
#pragma unroll
      for (int c = cw * (kChunks / 2); c < (cw + 1) * (kChunks / 2); c++) {
        tma_store(&mdv, x.v + c * N * 128, c * 64, n * N, tile.g, b);
        tma_store(&mdk, x.k + c * N * 128, c * 64, n * N, tile.g, b);
      }
      bulk_commit();
      bulk_wait<0>();
    }
  }
};

template <bool F16, int D, int M, int N, int kOptions>
static __global__ void __launch_bounds__(384, 1)
    wide_backward_kernel(const __grid_constant__ TMap q, const __grid_constant__ TMap k,
                         const __grid_constant__ TMap v, const __grid_constant__ TMap o,
                         const __grid_constant__ TMap dk, const __grid_constant__ TMap dv,
                         const __grid_constant__ BackwardArgs a) {
  WideBackward<F16, D, M, N, kOptions>::run(q, k, v, o, dk, dv, a);
}

}  // namespace flashjax::sm90
