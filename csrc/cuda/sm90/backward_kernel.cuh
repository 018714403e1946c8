// The backward for sm_90a. One CTA owns N = 128 keys of one key head, and loops over the query
// heads of the group and over tiles of M queries. Warpgroup 0 produces: warp 0 loads (TMA), warp 1
// adds dQ to memory, warp 2 clears dO rows of queries that saw nothing. Warpgroups 1 and 2 own 64
// keys each:
//   S' = K Q', dP' = V dO' (rows are keys), so that P' and dS' are, in registers, the A operands of
//   dV += P' dO and dK += dS' Q; dS also goes to shared memory, as queries x keys, for dQ = dS K.
// Pipeline, barriers, registers and shared memory: docs/kernels/sm90-backward.md.
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

template <bool F16, int D, int M, int N, int kOptions>
struct Backward {
  static constexpr int kStages = 2, kChunks = D / 64, kThreads = 384;
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
    // Sections of `group` key heads; key blocks outermost inside one, so that under a causal mask
    // the longest go first.
    const int per = a.group * a.nblocks, section = blockIdx.x / per,
              r0 = blockIdx.x - section * per;
    const int heads = min(a.group, p.b * p.g - section * a.group);
    const int n = r0 / heads, bg = section * a.group + r0 % heads, g = bg % p.g, b = bg / p.g,
              ratio = p.h / p.g;
    const Blocks blocks =
        query_blocks<M>(p, n * N, min(n * N + N, p.t),
                        kScore && p.near ? p.near + 2 * (b * a.nblocks + n) : nullptr);
    if (threadIdx.x == 0) {
      mb_init(x.kv_full, 1), mb_init(x.kv_raw, 1);
      for (int i = 0; i < kStages; i++) {
        mb_init(x.q_full + 8 * i, 1), mb_init(x.q_empty + 8 * i, 2 + a.clean);
        mb_init(x.o_full + 8 * i, 1), mb_init(x.o_empty + 8 * i, 2);
        mb_init(x.o_raw + 8 * i, 1), mb_init(x.q_raw + 8 * i, 1);
      }
      mb_init_fence();
      fence_async();
    }
    __syncthreads();
    if (wg == 0) {
      reg_dec<kProducerRegs>();
      const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
      const int first_head = b * p.h + g * ratio;
      if (threadIdx.x == 0) {
        load(mq, mk, mv, mdo, a, x, blocks, n, g, b, ratio);
      } else if (warp == 1) {
        add_dq(a, x, blocks, first_head, ratio);
      } else if (warp == 2 && a.clean) {
        clean(p, x, n, b, ratio * (blocks.end - blocks.begin));
      }
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
    int s = 0, ph = 1;
#pragma unroll 1
    for (int h = g * ratio; h < (g + 1) * ratio; h++) {
      const long long row = ((long long)b * a.p.h + h) * a.rows;
#pragma unroll 1
      for (int m = blocks.begin; m < blocks.end; m++) {
        mb_wait(x.q_empty + 8 * s, ph);
        const u32 q_full = (kScore && a.p.packed ? x.q_raw : x.q_full) + 8 * s;
        mb_expect(q_full, kQBytes + M * 4);
#pragma unroll 1
        for (int c = 0; c < kChunks; c++)
          tma_load(x.q + s * kQBytes + c * M * 128, &mq, q_full, c * 64, m * M, h, b, kEvictLast);
        bulk_load(x.lse + s * M * 4, a.lse2 + row + m * M, M * 4, q_full);
        mb_wait(x.o_empty + 8 * s, ph);
        const u32 full = (kScore || a.clean ? x.o_raw : x.o_full) + 8 * s;
        mb_expect(full, kQBytes + M * 4);
#pragma unroll 1
        for (int c = 0; c < kChunks; c++)
          tma_load(x.o + s * kQBytes + c * M * 128, &mdo, full, c * 64, m * M, h, b, kEvictLast);
        bulk_load(x.delta + s * M * 4, a.delta + row + m * M, M * 4, full);
        if (++s == kStages) s = 0, ph ^= 1;
      }
    }
  }

  static DI void add_dq(const BackwardArgs& a, const Layout& x, const Blocks& blocks, int head,
                        int ratio) {
    const bool elect = (threadIdx.x & 31) == 0;
#pragma unroll 1
    for (int h = 0; h < ratio; h++) {
      float* dst = a.dq + (long long)(head + h) * a.rows * D;
#pragma unroll 1
      for (int m = blocks.begin; m < blocks.end; m++) {
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
    int s = 0, ph = 0;
#pragma unroll 1
    for (int it = 0; it < steps; it++) {
      mb_wait((packed ? x.q_raw : x.q_full) + 8 * s, ph);
      mb_wait(x.o_raw + 8 * s, ph);
#pragma unroll 1
      for (int r0 = 0; r0 < M; r0 += 32) {
        float l;
        asm volatile("ld.shared.f32 %0, [%1];"
                     : "=f"(l)
                     : "r"(x.lse + s * M * 4 + (r0 + lane) * 4)
                     : "memory");
        const u32 dead = __ballot_sync(~0u, l == infinity());
        clear_rows<kChunks>(x.o + s * kQBytes, M, r0, dead);
        if (packed) clear_rows<kChunks>(x.q + s * kQBytes, M, r0, dead);
      }
      fence_async();
      __syncwarp();
      if (lane == 0) {
        if (packed) mb_arrive(x.q_full + 8 * s);
        mb_arrive(x.o_full + 8 * s), mb_arrive(x.q_empty + 8 * s);
      }
      if (++s == kStages) s = 0, ph ^= 1;
    }
  }

  static DI void compute(const TMap& mdk, const TMap& mdv, const BackwardArgs& a, const Layout& x,
                         const Blocks& blocks, int cw, int n, int g, int b, int ratio) {
    const Problem& p = a.p;
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
    const int steps = ratio * (blocks.end - blocks.begin);
    int m = blocks.begin, h = g * ratio;
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
          const int kv = key + 8 * hh,
                    first = m * M + 2 * (lane & 3);  // columns are first + 8 j + e
          int least = -1, most = 1 << 30;
          if (kMask && p.right >= 0) least = kv - p.diagonal - p.right - first;
          if (kMask && p.left >= 0) most = kv - p.diagonal + p.left - first;
          if (kv >= p.t) least = 1 << 30;
#pragma unroll
          for (int j = 0; j < M / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (8 * j + e < least || (kMask && 8 * j + e > most))
                st[4 * j + 2 * hh + e] = -infinity();
          if (kScore && p.segment_q) {
            const int mine = p.segment_k[(long long)b * p.t + min(kv, p.t - 1)];
            const int* ids = p.segment_q + (long long)b * p.s;
#pragma unroll
            for (int j = 0; j < M / 8; j++)
#pragma unroll
              for (int e = 0; e < 2; e++)
                if (ids[min(first + 8 * j + e, p.s - 1)] != mine)
                  st[4 * j + 2 * hh + e] = -infinity();
          }
        }
      }
      if constexpr (kScore) {  // P = exp(score - lse); what goes on to dS also has the derivative
                               // of the cap
        const Scores<F16> score(p, b, h);
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
    auto put = [&](float (&d)[D / 2], u32 buffer, float f) {
#pragma unroll
      for (int s = 0; s < D / 16; s++)
        stmatrix4(
            buffer + (s / 4) * N * 128 + er * 128 + (((2 * (s % 4) + (lane >> 4)) ^ (er & 7)) << 4),
            pack<F16>(d[8 * s] * f, d[8 * s + 1] * f),
            pack<F16>(d[8 * s + 2] * f, d[8 * s + 3] * f),
            pack<F16>(d[8 * s + 4] * f, d[8 * s + 5] * f),
            pack<F16>(d[8 * s + 6] * f, d[8 * s + 7] * f));
    };
    put(dv, x.v, 1.f);
    bar_sync(kBarEnd, 256);
    put(dk, x.k, p.scale);
    fence_async();
    bar_sync(kBarStore + cw, 128);
    if (elect) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        tma_store(&mdv, x.v + c * N * 128 + cw * 8192, c * 64, n * N + cw * 64, g, b);
        tma_store(&mdk, x.k + c * N * 128 + cw * 8192, c * 64, n * N + cw * 64, g, b);
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
