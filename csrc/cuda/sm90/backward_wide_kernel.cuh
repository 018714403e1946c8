// The backward for sm_90a at head dims over 128. One CTA owns N = 64 keys of one key head, and
// loops over the query heads of the group and over tiles of M = 128 queries. Warpgroup 0 produces:
// warp 0 loads (TMA), warp 1 clears dO rows of queries that saw nothing. Warpgroups 1 and 2:
//   S = Q K', dP = dO V' of their own 64 queries; P and dS go to shared memory, and dS stays in
//   registers too; dV += P' dO and dK += dS' Q over all 128 queries, for their own half of the
//   columns; dQ = dS K of their own queries, a half of the columns at a time, added to memory from
//   registers.
// Q and dO have one stage: they are loaded under dK and dQ. See docs/kernels/sm90-backward.md.
#pragma once
#include "backward_kernel.cuh"

namespace flashjax::sm90 {

template <bool F16, int D, int M, int N, int kOptions>
struct WideBackward {
  static constexpr int kChunks = D / 64, kHalf = D / 2, kThreads = 384;
  static constexpr bool kMask = kOptions & kBackwardMasks, kScore = kOptions & kBackwardScores;
  static constexpr bool kByRows = true;
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
    const int per = a.group * a.nblocks, section = blockIdx.x / per,
              r0 = blockIdx.x - section * per;
    const int heads = min(a.group, p.b * p.g - section * a.group);
    const int n = r0 / heads, bg = section * a.group + r0 % heads, g = bg % p.g, b = bg / p.g,
              ratio = p.h / p.g;
    const Blocks blocks =
        query_blocks<M>(p, n * N, min(n * N + N, p.t),
                        kScore && p.near ? p.near + 2 * (b * a.nblocks + n) : nullptr);
    if (threadIdx.x == 0) {
      mb_init(x.kv_full, 1), mb_init(x.kv_raw, 1), mb_init(x.q_raw, 1);
      mb_init(x.q_full, 1), mb_init(x.q_empty, 2 + a.clean);
      mb_init(x.o_full, 1), mb_init(x.o_empty, 2);
      mb_init(x.o_raw, 1);
      mb_init_fence();
      fence_async();
    }
    __syncthreads();
    if (wg == 0) {
      reg_dec<kProducerRegs>();
      const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
      if (threadIdx.x == 0)
        load(mq, mk, mv, mdo, a, x, blocks, n, g, b, ratio);
      else if (warp == 1 && a.clean)
        clean(p, x, n, b, ratio * (blocks.end - blocks.begin));
    } else {
      reg_inc<kConsumerRegs>();
      compute(mdk, mdv, a, x, blocks, wg - 1, n, g, b, ratio);
    }
  }

  static DI void load(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                      const BackwardArgs& a, const Layout& x, const Blocks& blocks, int n, int g,
                      int b, int ratio) {
    const u32 kv = kScore && a.p.packed ? x.kv_raw : x.kv_full;
    mb_expect(kv, 2 * kKBytes);
#pragma unroll 1
    for (int c = 0; c < kChunks; c++) {
      tma_load(x.k + c * N * 128, &mk, kv, c * 64, n * N, g, b, kEvictFirst);
      tma_load(x.v + c * N * 128, &mv, kv, c * 64, n * N, g, b, kEvictFirst);
    }
    int ph = 1;
#pragma unroll 1
    for (int h = g * ratio; h < (g + 1) * ratio; h++) {
      const long long row = ((long long)b * a.p.h + h) * a.rows;
#pragma unroll 1
      for (int m = blocks.begin; m < blocks.end; m++, ph ^= 1) {
        mb_wait(x.o_empty, ph);  // dO is free before Q, but lse goes with Q, and delta with dO
        const u32 full = a.clean ? x.o_raw : x.o_full;
        mb_expect(full, kQBytes + M * 4);
#pragma unroll 1
        for (int c = 0; c < kChunks; c++)
          tma_load(x.o + c * M * 128, &mdo, full, c * 64, m * M, h, b, kEvictLast);
        bulk_load(x.delta, a.delta + row + m * M, M * 4, full);
        mb_wait(x.q_empty, ph);
        const u32 q_full = kScore && a.p.packed ? x.q_raw : x.q_full;
        mb_expect(q_full, kQBytes + M * 4);
#pragma unroll 1
        for (int c = 0; c < kChunks; c++)
          tma_load(x.q + c * M * 128, &mq, q_full, c * 64, m * M, h, b, kEvictLast);
        bulk_load(x.lse, a.lse2 + row + m * M, M * 4, q_full);
      }
    }
  }

  // Rows whose P is 0 become 0, for 0 * NaN is NaN: of dO always, and of Q, K and V where sequences
  // are packed.
  static DI void clean(const Problem& p, const Layout& x, int n, int b, int steps) {
    const int lane = threadIdx.x & 31;
    const bool packed = kScore && p.packed;
    if (packed) {
      mb_wait(x.kv_raw, 0);
#pragma unroll 1
      for (int r0 = 0; r0 < N; r0 += 32) {
        const int key = n * N + r0 + lane;
        const u32 dead =
            __ballot_sync(~0u, key < p.t && p.segment_k[(long long)b * p.t + key] == kNoKey);
        clear_rows<kChunks>(x.k, N, r0, dead);
        clear_rows<kChunks>(x.v, N, r0, dead);
      }
      fence_async();
      __syncwarp();
      if (lane == 0) mb_arrive(x.kv_full);
    }
#pragma unroll 1
    for (int it = 0; it < steps; it++) {
      mb_wait(packed ? x.q_raw : x.q_full, it & 1);
      mb_wait(x.o_raw, it & 1);
#pragma unroll 1
      for (int r0 = 0; r0 < M; r0 += 32) {
        float l;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(l) : "r"(x.lse + (r0 + lane) * 4) : "memory");
        const u32 dead = __ballot_sync(~0u, l == infinity());
        clear_rows<kChunks>(x.o, M, r0, dead);
        if (packed) clear_rows<kChunks>(x.q, M, r0, dead);
      }
      fence_async();
      __syncwarp();
      if (lane == 0) {
        if (packed) mb_arrive(x.q_full);
        mb_arrive(x.o_full), mb_arrive(x.q_empty);
      }
    }
  }

  static DI void compute(const TMap& mdk, const TMap& mdv, const BackwardArgs& a, const Layout& x,
                         const Blocks& blocks, int cw, int n, int g, int b, int ratio) {
    const Problem& p = a.p;
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
    const int steps = ratio * (blocks.end - blocks.begin);
    int m = blocks.begin, h = g * ratio;
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
      float lse[2];
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(lse[0]) : "r"(x.lse + local * 4) : "memory");
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(lse[1])
                   : "r"(x.lse + local * 4 + 32)
                   : "memory");
      if (tail || (kMask && blocks.masked(m))) {
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          const int at = row0 + 8 * hh + p.diagonal;
          int limit = p.t, least = -(1 << 30);
          if (kMask && p.right >= 0) limit = min(limit, at + p.right + 1);
          if (kMask && p.left >= 0) least = at - p.left - c0;
          limit -= c0;
#pragma unroll
          for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (8 * j + e >= limit || (kMask && 8 * j + e < least))
                st[4 * j + 2 * hh + e] = -infinity();
          if (kScore && p.segment_q) {
            const int mine = p.segment_q[(long long)b * p.s + min(row0 + 8 * hh, p.s - 1)];
            const int* ids = p.segment_k + (long long)b * p.t;
#pragma unroll
            for (int j = 0; j < N / 8; j++)
#pragma unroll
              for (int e = 0; e < 2; e++)
                if (ids[min(c0 + 8 * j + e, p.t - 1)] != mine) st[4 * j + 2 * hh + e] = -infinity();
          }
        }
      }
      if constexpr (kScore) {  // P = exp(score - lse); what goes on to dS also has the derivative
                               // of the cap
        const Scores<F16> score(p, b, h);
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
      float delta[2];
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(delta[0])
                   : "r"(x.delta + local * 4)
                   : "memory");
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(delta[1])
                   : "r"(x.delta + local * 4 + 32)
                   : "memory");
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
    auto put = [&](float (&d)[kHalf / 2], u32 buffer, float f) {
#pragma unroll
      for (int s = 0; s < kHalf / 16; s++)
        stmatrix4(buffer + (cw * (kChunks / 2) + s / 4) * N * 128 + (warp * 16 + rr) * 128 +
                      (((2 * (s % 4) + (lane >> 4)) ^ (rr & 7)) << 4),
                  pack<F16>(d[8 * s] * f, d[8 * s + 1] * f),
                  pack<F16>(d[8 * s + 2] * f, d[8 * s + 3] * f),
                  pack<F16>(d[8 * s + 4] * f, d[8 * s + 5] * f),
                  pack<F16>(d[8 * s + 6] * f, d[8 * s + 7] * f));
    };
    put(dv, x.v, 1.f);
    put(dk, x.k, p.scale);
    fence_async();
    bar_sync(kBarStore + cw, 128);
    if (elect) {
#pragma unroll
      for (int c = cw * (kChunks / 2); c < (cw + 1) * (kChunks / 2); c++) {
        tma_store(&mdv, x.v + c * N * 128, c * 64, n * N, g, b);
        tma_store(&mdk, x.k + c * N * 128, c * 64, n * N, g, b);
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
