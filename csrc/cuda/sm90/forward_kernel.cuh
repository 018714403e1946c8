// The forward for sm_90a: one producer warp (TMA), and kGroups consumer warpgroups of 64 query rows
// each. Pipeline, barriers, registers and shared memory: docs/kernels/sm90-forward.md.
#pragma once
#include "problem.cuh"
#include "wgmma.cuh"

namespace flashjax::sm90 {

struct ForwardArgs {
  Problem p;
  float* lse;                 // [b, h, s], natural logarithm
  u32* out;                   // pairs of 16-bit values; used only for rows of tiles that see no key
  int mblocks, tiles, group;  // query blocks of a head; tiles in all; heads of an L2 section
  int ratio;                  // query heads of a key head
  int* ticket;                // zeroed; null: tiles go round
};

// How a kernel is made. What each option is worth is in docs/kernels/sm90-forward.md.
enum : int {
  kPingPong = 1,  // named barriers order the warpgroups' matrix work
  kOwnOut = 2,    // out has its own buffer in shared memory instead of q's
  kQInRegs = 4,   // q lives in registers
  kTickets = 8,   // tiles are drawn, not dealt
  kLateV = 16,    // wait for V just before PV is issued
  kMasks = 32,    // windows (else every pair is visible but for the tail of the keys)
  kScores = 64,   // softcap, bias, alibi, segment ids
};

// What was best for a head dim and a kind of problem.
constexpr int forward_options(int d, int e, int n, bool masks, bool scores) {
  int x = (masks ? kMasks | kTickets : 0) | (scores ? kScores : 0);
  if (e <= 128) x |= kOwnOut;
  if (!scores && (masks ? d != 64 : d <= 128)) x |= kLateV;
  if (d == 128 && n == 128 && !scores) x |= kQInRegs;
  return x;
}

template <bool F16, int D, int E, int M, int N, int kOptions>
struct Forward {
  static constexpr int kGroups = M / 64, kStages = 2, kThreads = 128 * (kGroups + 1);
  static constexpr int kQBytes = M * D * 2, kOBytes = M * E * 2, kKBytes = N * D * 2,
                       kVBytes = N * E * 2;
  static constexpr int kConsumerRegs = kGroups == 2 ? 232 : 160,
                       kProducerRegs = kGroups == 2 ? 40 : 32;
  static constexpr bool kPP = kOptions & kPingPong, kSepO = kOptions & kOwnOut,
                        kQReg = kOptions & kQInRegs, kDyn = kOptions & kTickets,
                        kVLate = kOptions & kLateV, kMask = kOptions & kMasks,
                        kScore = kOptions & kScores;
  static constexpr int kChunks = N / 8;  // of 8 columns of S
  static constexpr int kLag = 2;  // chunks between an exponential and its addition to the row sum
  static constexpr int kSmem =
      kQBytes + (kSepO ? kOBytes : 0) + kStages * (kKBytes + kVBytes) + 256 + 1024;
  static constexpr int kBarTurn = 1, kBarOut = 4;  // named barriers, one a warpgroup
  static_assert(kSepO || E <= D);

  // Shared memory from an aligned base: q, k, v stages[, out], barriers.
  struct Layout {
    u32 q, k, v, o;
    u32 q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full, t_empty, tickets, v_raw,
        raw_block;
    DI explicit Layout(u32 base) {
      q = base, k = q + kQBytes, v = k + kStages * kKBytes, o = kSepO ? v + kStages * kVBytes : q;
      u32 end = v + kStages * kVBytes + (kSepO ? kOBytes : 0);
      q_full = end, q_empty = end + 8, k_full = end + 16, k_empty = k_full + 8 * kStages;
      v_full = k_empty + 8 * kStages, v_empty = v_full + 8 * kStages;
      t_full = v_empty + 8 * kStages, t_empty = t_full + 16, tickets = t_empty + 16;
      v_raw = tickets + 8, raw_block = v_raw + 8 * kStages;
    }
  };

  struct Tile {
    int m, h, b;
    DI Tile(const ForwardArgs& a, int t) {
      int per = a.group * a.mblocks, section = t / per, r = t - section * per;
      int g = min(a.group, a.p.b * a.p.h - section * a.group);
      int x = r / g, bh = section * a.group + r - x * g;
      m = kMask ? a.mblocks - 1 - x : x;  // the longest first
      b = bh / a.p.h;
      h = bh - b * a.p.h;
    }
    DI Blocks blocks(const ForwardArgs& a) const {
      const int* near = kScore && a.p.near ? a.p.near + 2 * (b * a.mblocks + m) : nullptr;
      return key_blocks<N>(a.p, m * M, min(m * M + M, a.p.s), near);
    }
  };

  static DI void run(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mo,
                     const ForwardArgs& a) {
    extern __shared__ unsigned char smem_raw[];
    const Layout x((smem_u32(smem_raw) + 1023) & ~1023u);
    const int wg = __shfl_sync(~0u, threadIdx.x >> 7,
                               0);  // uniform, which keeps descriptors in uniform registers
    if (threadIdx.x == 0) {
      mb_init(x.q_full, 1);
      mb_init(x.q_empty, kGroups);
      for (int i = 0; i < kStages; i++) {
        mb_init(x.k_full + 8 * i, 1), mb_init(x.k_empty + 8 * i, kGroups);
        mb_init(x.v_full + 8 * i, 1), mb_init(x.v_empty + 8 * i, kGroups);
        mb_init(x.v_raw + 8 * i, 1);
      }
      for (int i = 0; i < 2; i++)
        mb_init(x.t_full + 8 * i, 1), mb_init(x.t_empty + 8 * i, 4 * kGroups);
      mb_init_fence();
      fence_async();
    }
    __syncthreads();
    if (wg == 0) {
      reg_dec<kProducerRegs>();
      const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
      if (threadIdx.x == 0)
        produce(mq, mk, mv, a, x);
      else if (kScore && warp == 1 && a.p.packed)
        clean(a.p, x);
    } else {
      reg_inc<kConsumerRegs>();
      consume(mo, a, wg - 1, x);
    }
  }

  static DI void produce(const TMap& mq, const TMap& mk, const TMap& mv, const ForwardArgs& a,
                         const Layout& x) {
    prefetch_map(&mq), prefetch_map(&mk), prefetch_map(&mv);
    int it = 0, w = 0, round = 0;
    int t = blockIdx.x;
    auto load_k = [&](int n, int i, int h, int b) {
      int st = i % kStages;
      mb_wait(x.k_empty + 8 * st, ((i / kStages) & 1) ^ 1);
      mb_expect(x.k_full + 8 * st, kKBytes);
#pragma unroll
      for (int c = 0; c < D / 64; c++)
        tma_load(x.k + st * kKBytes + c * N * 128, &mk, x.k_full + 8 * st, c * 64, n * N, h, b,
                 kEvictLast);
    };
    auto load_v = [&](int n, int i, int h, int b) {
      int st = i % kStages;
      mb_wait(x.v_empty + 8 * st, ((i / kStages) & 1) ^ 1);
      u32 full = x.v_full + 8 * st;
      if constexpr (kScore) {
        if (a.p.packed) full = x.v_raw + 8 * st, store_shared2(x.raw_block + 8 * st, b, n);
      }
      mb_expect(full, kVBytes);
#pragma unroll
      for (int c = 0; c < E / 64; c++)
        tma_load(x.v + st * kVBytes + c * N * 128, &mv, full, c * 64, n * N, h, b, kEvictLast);
    };
#pragma unroll 1
    while (true) {
      int next = t + gridDim.x;
      if constexpr (kDyn) {  // publish this tile, draw the next ticket early
        int slot = round & 1;
        mb_wait(x.t_empty + 8 * slot, ((round >> 1) & 1) ^ 1);
        asm volatile("st.shared.s32 [%0], %1;" ::"r"(x.tickets + 4 * slot), "r"(t) : "memory");
        mb_arrive(x.t_full + 8 * slot);
        round++;
        if (t >= a.tiles) break;
        if (a.ticket) next = gridDim.x + atomicAdd(a.ticket, 1);
      } else if (t >= a.tiles) {
        break;
      }
      const Tile tile(a, t);
      const Blocks n = tile.blocks(a);
      const int hk = tile.h / a.ratio;
      t = next;
      if (n.begin >= n.end) continue;
      load_k(n.end - 1, it, hk, tile.b);
      mb_wait(x.q_empty, (w & 1) ^ 1);
      w++;
      mb_expect(x.q_full, kQBytes);
#pragma unroll
      for (int c = 0; c < D / 64; c++)
        tma_load(x.q + c * M * 128, &mq, x.q_full, c * 64, tile.m * M, tile.h, tile.b, kEvictFirst);
#pragma unroll 1
      for (int j = n.end - 2; j >= n.begin; j--, it++) {
        load_k(j, it + 1, hk, tile.b);
        load_v(j + 1, it, hk, tile.b);
      }
      load_v(n.begin, it++, hk, tile.b);
    }
    if constexpr (kScore) {
      if (a.p.packed) {  // the end, for clean()
        int st = it % kStages;
        mb_wait(x.v_empty + 8 * st, ((it / kStages) & 1) ^ 1);
        store_shared2(x.raw_block + 8 * st, 0, -1);
        mb_arrive(x.v_raw + 8 * st);
      }
    }
  }

  // Between the landing of V and its use: rows of no sequence become 0, for their P is 0, and 0 *
  // NaN is NaN.
  static DI void clean(const Problem& p, const Layout& x) {
    const int lane = threadIdx.x & 31;
    int st = 0, ph = 0;
#pragma unroll 1
    while (true) {
      mb_wait(x.v_raw + 8 * st, ph);
      int b, n;
      asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];"
                   : "=r"(b), "=r"(n)
                   : "r"(x.raw_block + 8 * st)
                   : "memory");
      if (n < 0) break;
#pragma unroll 1
      for (int r0 = 0; r0 < N; r0 += 32) {
        const int key = n * N + r0 + lane;
        const bool dead =
            r0 + lane < N && key < p.t && p.segment_k[(long long)b * p.t + key] == kNoKey;
        clear_rows<E / 64>(x.v + st * kVBytes, N, r0, __ballot_sync(~0u, dead));
      }
      fence_async();
      __syncwarp();
      if (lane == 0) mb_arrive(x.v_full + 8 * st);
      if (++st == kStages) st = 0, ph ^= 1;
    }
  }

  // Maximum of a and of row hh of S. With fast, a three-input integer maximum, half the
  // instructions: float bits order like signed integers unless both are negative, so it is right
  // whenever a is not negative.
  static DI float row_max(const float (&s)[N / 2], int hh, float a, bool fast) {
    if (fast) {
      int i0 = __float_as_int(a), i1 = i0;
#pragma unroll
      for (int j = 0; j < N / 8; j += 2) {
        i0 = __vimax3_s32(i0, __float_as_int(s[4 * j + 2 * hh]),
                          __float_as_int(s[4 * j + 2 * hh + 1]));
        i1 = __vimax3_s32(i1, __float_as_int(s[4 * j + 4 + 2 * hh]),
                          __float_as_int(s[4 * j + 4 + 2 * hh + 1]));
      }
      return __int_as_float(max(i0, i1));
    }
#pragma unroll
    for (int j = 0; j < N / 8; j++) a = fmaxf(a, fmaxf(s[4 * j + 2 * hh], s[4 * j + 2 * hh + 1]));
    return a;
  }

  static DI void consume(const TMap& mo, const ForwardArgs& a, int cw, const Layout& x) {
    const Problem& p = a.p;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const bool elect = (threadIdx.x & 127) == 0;
    const float c = kScore ? kLog2E : p.scale * kLog2E;  // from what S holds to log2 units
    float o[E / 2], s[N / 2], mx[2], sum[2], sc[2];
    u32 pb[N / 4], qf[kQReg ? D / 4 : 1];
    const u32 dq = desc_lo(x.q + cw * 8192, 16), dk = desc_lo(x.k, 16), dv = desc_lo(x.v, N * 128);
    int st = 0, ph = 0, w = 0, round = 0;  // st, ph: stage and parity of the newest K block
    if (kPP && cw == 0) bar_arrive(kBarTurn, 256);

    auto issue_qk = [&](int st) {
      const u32 lo = dk + st * (kKBytes >> 4);
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        u64 b = desc(lo + (((k / 4) * N * 128 + (k % 4) * 32) >> 4));
        if constexpr (kQReg)
          Wgmma<N, F16>::template rs<0>(s, qf[4 * k], qf[4 * k + 1], qf[4 * k + 2], qf[4 * k + 3],
                                        b, k > 0);
        else
          Wgmma<N, F16>::template ss<0, 0>(s, desc(dq + (((k / 4) * M * 128 + (k % 4) * 32) >> 4)),
                                           b, k > 0);
      }
      wg_commit();
    };
    auto issue_pv = [&](int st) {
      const u32 lo = dv + st * (kVBytes >> 4);
#pragma unroll
      for (int k = 0; k < N / 16; k++)
        Wgmma<E, F16>::template rs<1>(o, pb[4 * k], pb[4 * k + 1], pb[4 * k + 2], pb[4 * k + 3],
                                      desc(lo + k * (2048 >> 4)), 1);
      wg_commit();
    };
    int t = blockIdx.x;
#pragma unroll 1
    while (true) {
      if constexpr (kDyn) {
        int slot = round & 1;
        mb_wait(x.t_full + 8 * slot, (round >> 1) & 1);
        asm volatile("ld.shared.s32 %0, [%1];" : "=r"(t) : "r"(x.tickets + 4 * slot) : "memory");
        t = __shfl_sync(~0u, t, 0);
        if (lane == 0) mb_arrive(x.t_empty + 8 * slot);
        round++;
      }
      if (t >= a.tiles) break;
      const Tile tile(a, t);
      t += gridDim.x;
      const Blocks blocks = tile.blocks(a);
      int n = blocks.end - 1;
      const int row0 =
          tile.m * M + cw * 64 + warp * 16 + (lane >> 2);  // this thread's rows: row0 and row0 + 8
      float* lse = a.lse + ((long long)tile.b * p.h + tile.h) * p.s;
      const float sink = p.sinks ? p.sinks[tile.b * p.sinks_b + tile.h] * kLog2E : -infinity();
      if (blocks.begin >= blocks.end) {  // no key for any row of the tile
        for (int i = threadIdx.x & 127; i < 64 * p.e / 2; i += 128) {
          int row = tile.m * M + cw * 64 + i / (p.e / 2);
          if (row < p.s)
            a.out[(((long long)tile.b * p.s + row) * p.h + tile.h) * (p.e / 2) + i % (p.e / 2)] = 0;
        }
        for (int hh = 0; hh < 2; hh++)
          if ((lane & 3) == 0 && row0 + 8 * hh < p.s) lse[row0 + 8 * hh] = sink * kLn2;
        continue;
      }
      auto mask = [&](int n) {
        const int c0 = n * N + 2 * (lane & 3);
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          const int at = row0 + 8 * hh + p.diagonal;
          int limit = p.t;
          if (kMask && p.right >= 0) limit = min(limit, at + p.right + 1);
          limit -= c0;
#pragma unroll
          for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (8 * j + e >= limit) s[4 * j + 2 * hh + e] = -infinity();
          if (kMask && p.left >= 0) {
            const int least = at - p.left - c0;
#pragma unroll
            for (int j = 0; j < N / 8; j++)
#pragma unroll
              for (int e = 0; e < 2; e++)
                if (8 * j + e < least) s[4 * j + 2 * hh + e] = -infinity();
          }
          if (kScore && p.segment_q) {
            const int mine = p.segment_q[(long long)tile.b * p.s + min(row0 + 8 * hh, p.s - 1)];
            const int* ids = p.segment_k + (long long)tile.b * p.t;
#pragma unroll
            for (int j = 0; j < N / 8; j++)
#pragma unroll
              for (int e = 0; e < 2; e++)
                if (ids[min(c0 + 8 * j + e, p.t - 1)] != mine) s[4 * j + 2 * hh + e] = -infinity();
          }
        }
      };
      auto transform = [&](int n) {  // what S holds, to the score in natural units
        if constexpr (kScore) {
          const Scores<F16> score(p, tile.b, tile.h);
          const char* rows[2] = {score.row(row0), score.row(row0 + 8)};
#pragma unroll
          for (int j = 0; j < N / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
              s[4 * j + i] = score(s[4 * j + i], rows[i / 2], row0 + 8 * (i / 2),
                                   n * N + 2 * (lane & 3) + 8 * j + i % 2);
            asm volatile("" ::
                             : "memory");  // or all loads of a bias come first, in more registers
                                           // than there are
          }
        }
      };
      float ms[2];
      bool nonneg = false;                 // every running maximum of the warp is at least +0
      auto update_max = [&](bool first) {  // running maximum, and the factor sc for what was summed
                                           // under the old one
        float top[2] = {first ? -infinity() : mx[0], first ? -infinity() : mx[1]};
        if (!first && nonneg)
          top[0] = row_max(s, 0, top[0], true), top[1] = row_max(s, 1, top[1], true);
        else
          top[0] = row_max(s, 0, top[0], false), top[1] = row_max(s, 1, top[1], false);
#pragma unroll
        for (int i = 1; i < 3; i++)
#pragma unroll
          for (int hh = 0; hh < 2; hh++) top[hh] = fmaxf(top[hh], __shfl_xor_sync(~0u, top[hh], i));
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          ms[hh] = top[hh] == -infinity() ? 0.f : top[hh] * c;
          sc[hh] = first ? 1.f : ex2(mx[hh] * c - ms[hh]);
          mx[hh] = top[hh];
          sum[hh] = first ? 0.f : sum[hh] * sc[hh];
        }
        nonneg = __all_sync(~0u, (__float_as_int(mx[0]) | __float_as_int(mx[1])) >= 0);
      };
      auto exponentials = [&]() {  // and row sums, which trail by kLag chunks
#pragma unroll
        for (int j = 0; j < kChunks + kLag; j++) {
          if (j < kChunks) {
#pragma unroll
            for (int i = 0; i < 4; i++) s[4 * j + i] = ex2(s[4 * j + i] * c - ms[i / 2]);
          }
          if (j >= kLag) {
            int l = 4 * (j - kLag);
            sum[0] += s[l] + s[l + 1];
            sum[1] += s[l + 2] + s[l + 3];
          }
        }
      };
      auto to_p = [&]() {
#pragma unroll
        for (int i = 0; i < N / 4; i++) pb[i] = pack<F16>(s[2 * i], s[2 * i + 1]);
      };
      auto rescale = [&]() {
#pragma unroll
        for (int j = 0; j < E / 8; j++)
          o[4 * j] *= sc[0], o[4 * j + 1] *= sc[0], o[4 * j + 2] *= sc[1], o[4 * j + 3] *= sc[1];
      };

      mb_wait(x.q_full, w & 1);
      w++;
      if constexpr (kQReg) {
        int rr = (lane & 7) + ((lane >> 3) & 1) * 8;
        u32 ro = x.q + (cw * 64 + warp * 16 + rr) * 128;
#pragma unroll
        for (int k = 0; k < D / 16; k++)
          ldmatrix4(ro + (k / 4) * M * 128 + (((2 * (k % 4) + (lane >> 4)) ^ (rr & 7)) << 4),
                    qf[4 * k], qf[4 * k + 1], qf[4 * k + 2], qf[4 * k + 3]);
        if constexpr (kSepO) {
          fence_async();
          bar_sync(kBarOut + cw, 128);
          if (elect) mb_arrive(x.q_empty);
        }
      }
      if (kMask && !kPP && p.right >= 0) {
        // Blocks that only later rows of the tile see: they are handed straight back.
        const int end = (min(tile.m * M + (cw + 1) * 64, p.s) + p.diagonal + p.right + N - 1) / N;
#pragma unroll 1
        for (; n >= max(end, blocks.begin + 1); n--) {
          mb_wait(x.k_full + 8 * st, ph);
          mb_wait(x.v_full + 8 * st, ph);
          // All four warps must have seen this phase before it can be followed by two more: parity
          // alone cannot tell them apart, and no wgmma keeps the warps together here.
          bar_sync(kBarOut + cw, 128);
          if (elect) mb_arrive(x.k_empty + 8 * st), mb_arrive(x.v_empty + 8 * st);
          if (++st == kStages) st = 0, ph ^= 1;
        }
      }
      mb_wait(x.k_full + 8 * st, ph);
      pin(s);
      wg_fence();
      issue_qk(st);
      wg_wait<0>();
      pin(s);
      if (elect) mb_arrive(x.k_empty + 8 * st);
      transform(n);
      if (blocks.masked(n)) mask(n);
      update_max(true);
      exponentials();
      if (!kVLate) mb_wait(x.v_full + 8 * st, ph);
      to_p();
#pragma unroll
      for (int i = 0; i < E / 2; i++) o[i] = 0.f;
      n--;
      auto step = [&]() {
        const int sv = st, pv = ph;  // PV lags QK by one block
        if (++st == kStages) st = 0, ph ^= 1;
        mb_wait(x.k_full + 8 * st, ph);
        if (kPP) bar_sync(kBarTurn + cw, 256);
        pin(s), pin(o);
        wg_fence();
        issue_qk(st);
        rescale(), pin(o);
        if (kVLate) mb_wait(x.v_full + 8 * sv, pv);
        wg_fence();
        issue_pv(sv);
        if (kPP) bar_arrive(kBarTurn + (cw + 1) % kGroups, 256);
        wg_wait<1>();
        pin(s);
        if (elect) mb_arrive(x.k_empty + 8 * st);
        transform(n);
        if (kMask && blocks.masked(n)) mask(n);
        update_max(false);
        exponentials();
        if (kVLate)
          sched_fence(p.s, x.q_full);  // else ptxas hoists the wait below above the exponentials
        else
          mb_wait(x.v_full + 8 * st, ph);
        wg_wait<0>();
        pin(o);
        if (elect) mb_arrive(x.v_empty + 8 * sv);
        to_p();
        n--;
      };
#pragma unroll 1
      while (n >= blocks.begin) step();

      if (kSepO && !kQReg && elect) mb_arrive(x.q_empty);  // the last QK has read q
      if (kVLate) mb_wait(x.v_full + 8 * st, ph);
      rescale();
      pin(o);
      wg_fence();
      issue_pv(st);
      float inv[2];
#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        float r = sum[hh];
        r += __shfl_xor_sync(~0u, r, 1);
        r += __shfl_xor_sync(~0u, r, 2);
        float top = mx[hh] * c, keep = 1.f;
        if (p.sinks) {  // one more term in the denominator
          float most = fmaxf(top, sink);
          if (most != -infinity()) {
            keep = ex2(top - most);
            r = r * keep + ex2(sink - most);
            top = most;
          }
        }
        inv[hh] = r > 0.f ? keep / r : r;  // a NaN stays one
        int row = row0 + 8 * hh;
        if ((lane & 3) == 0 && row < p.s) lse[row] = r == 0.f ? -infinity() : (top + lg2(r)) * kLn2;
      }
      if constexpr (kSepO) {  // the previous tile's out must have left its buffer
        if (elect) bulk_wait_read<0>();
        bar_sync(kBarOut + cw, 128);
      }
      wg_wait<0>();
      pin(o);
      if (elect) mb_arrive(x.v_empty + 8 * st);
      if (++st == kStages) st = 0, ph ^= 1;
      {
        int rr = (lane & 7) + ((lane >> 3) & 1) * 8;
        u32 ro = x.o + (cw * 64 + warp * 16 + rr) * 128;
#pragma unroll
        for (int k = 0; k < E / 16; k++)
          stmatrix4(ro + (k / 4) * M * 128 + (((2 * (k % 4) + (lane >> 4)) ^ (rr & 7)) << 4),
                    pack<F16>(o[8 * k] * inv[0], o[8 * k + 1] * inv[0]),
                    pack<F16>(o[8 * k + 2] * inv[1], o[8 * k + 3] * inv[1]),
                    pack<F16>(o[8 * k + 4] * inv[0], o[8 * k + 5] * inv[0]),
                    pack<F16>(o[8 * k + 6] * inv[1], o[8 * k + 7] * inv[1]));
      }
      fence_async();
      bar_sync(kBarOut + cw, 128);
      if (elect) {
#pragma unroll
        for (int k = 0; k < E / 64; k++)
          tma_store(&mo, x.o + k * M * 128 + cw * 8192, k * 64, tile.m * M + cw * 64, tile.h,
                    tile.b);
        bulk_commit();
        if constexpr (!kSepO) bulk_wait_read<0>(), mb_arrive(x.q_empty);
      }
    }
    if (elect) bulk_wait<0>();
  }
};

template <bool F16, int D, int E, int M, int N, int kOptions>
static __global__ void __launch_bounds__(128 * (M / 64 + 1), 1)
    forward_kernel(const __grid_constant__ TMap q, const __grid_constant__ TMap k,
                   const __grid_constant__ TMap v, const __grid_constant__ TMap o,
                   const __grid_constant__ ForwardArgs a) {
  Forward<F16, D, E, M, N, kOptions>::run(q, k, v, o, a);
}

}  // namespace flashjax::sm90
