// The backward for sm_90a at head dims over 128. One CTA owns N keys of one key head (80 at D = E =
// 256), and loops over the query heads of the group and over tiles of M = 64 queries. Warpgroup 0
// produces: warp 0 loads (TMA), warp 1 adds dQ to memory, from shared memory and at 16 bytes a
// clock: as long as all the matrix work takes; warp 2 clears dO rows of queries that saw nothing.
// Warpgroups 1 and 2:
//   S = Q K', dP = dO V' for a half of the keys; P and dS go to shared memory as keys x queries;
//   dV' += dO' P, dK' += Q' dS and dQ = dS K for a half of the columns.
// Pipeline, barriers, registers and shared memory: docs/kernels/sm90-backward.md.
#pragma once
#include "backward_common.cuh"

namespace flashjax::sm90 {

template <bool F16, int D, int E, int M, int N, int kOptions>
struct WideBackward {
  using Args = BackwardArgs;
  static constexpr int kM = M, kN = N, kStages = 1, kChunks = D / 64, kVChunks = E / 64,
                       kThreads = 384, kStoreRows = N;
  static constexpr bool kMask = kOptions & kBackwardMasks, kSpan = kOptions & kBackwardSpans,
                        kScore = kOptions & kBackwardScores, kBias = kOptions & kBackwardBias;
  using Tile = KeyTile<kSpan>;
  static constexpr bool kByRows = false, kCounts = false, kStays = false, kCuts = false,
                        kTransposed = false, kPlain = false;
  static constexpr int kConsumerRegs = 240, kProducerRegs = 24;
  static constexpr int kOwn = N / 2;  // keys whose scores a warpgroup computes
  // A warpgroup has as many chunks of 64 columns of dK and dQ as the other, and of dV. An odd one
  // lies in the middle, and is divided: its dK by keys, its dQ by columns.
  static constexpr int kFull = kChunks / 2, kVFull = kVChunks / 2;
  static constexpr bool kMiddle = kChunks % 2;
  static constexpr int kKBytes = N * D * 2, kVBytes = N * E * 2, kQBytes = M * D * 2,
                       kOBytes = M * E * 2, kPBytes = M * N * 2;
  // Pieces of dQ on their way to memory: two of a warpgroup in each step, the first of 32 columns
  // if it is of the middle.
  static constexpr int kPieces = kMiddle ? 4 : 3, kPieceBytes = M * 64 * 4;
  static constexpr int kSmem = kKBytes + kVBytes + kQBytes + kOBytes + 3 * kPBytes +
                               kPieces * kPieceBytes + 2 * M * 4 + 256 + 1024;
  static_assert(kFull + kMiddle == 2 && kVChunks % 2 == 0 && M == 64 && N % 16 == 0 &&
                kOwn % 8 == 0 && kSmem <= 227 * 1024);
  static constexpr int kBarDs = 1, kBarEnd = 2, kBarStore = 3;  // named barriers

  struct Layout {
    u32 k, v, q, o, p, ds, dq, lse, delta;
    u32 kv_full, q_full, q_empty, o_full, o_empty, o_raw, dq_full, dq_empty, span;
    DI explicit Layout(u32 base) {
      k = base, v = k + kKBytes, q = v + kVBytes, o = q + kQBytes, p = o + kOBytes,
      ds = p + kPBytes, dq = ds + 2 * kPBytes;
      lse = dq + kPieces * kPieceBytes, delta = lse + M * 4, kv_full = delta + M * 4;
      q_full = kv_full + 8, q_empty = q_full + 8, span = kv_full + 128, o_full = q_empty + 8,
      o_empty = o_full + 8, o_raw = o_empty + 8, dq_full = o_raw + 8;
      dq_empty = dq_full + 8 * kPieces;
    }
  };

  using Producer = BackwardProducer<WideBackward>;

  static DI void run(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                     const TMap& mdk, const TMap& mdv, const BackwardArgs& a) {
    extern __shared__ unsigned char smem_raw[];
    const Layout x((smem_u32(smem_raw) + 1023) & ~1023u);
    const int wg = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    if (kSpan && (int)blockIdx.x >= agreed(*a.key_tiles) * a.p.g) return;
    Tile tile;
    if constexpr (kSpan) {
      if (threadIdx.x == 0) {
        ask_key_tile(a, blockIdx.x, x.span);
        put_key_tile<WideBackward>(a, x.span);
      }
      __syncthreads();
      tile = key_tile_at(a, x.span);
    } else {
      tile = key_tile<WideBackward>(a, blockIdx.x);
    }
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kPieces; i++)
        mb_init(x.dq_full + 8 * i, 4), mb_init(x.dq_empty + 8 * i, 1);
      mb_init(x.kv_full, 1);
      Producer::init(x, tile.clean);
    }
    if constexpr (kSpan) Producer::clear_rest(a.p, x, 1);
    __syncthreads();
    if (wg == 0) {
      reg_dec<kProducerRegs>();
      const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
      if (threadIdx.x == 0)
        load(mq, mk, mv, mdo, a, x, tile);
      else if (warp == 1)
        add_dq(a, x, tile);
      else if (warp == 2 && tile.clean)
        clean(x, tile);
    } else {
      reg_inc<kConsumerRegs>();
      compute(mdk, mdv, a, x, tile, wg - 1);
    }
  }

  static DI void load(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                      const BackwardArgs& a, const Layout& x, const Tile& tile) {
    mb_expect(x.kv_full, Producer::bytes(N, a.p.d) + Producer::bytes(N, a.p.e, kVChunks));
    Producer::load_keys(mk, a.p, x.k, tile, x.kv_full, a.p.d);
    Producer::load_keys(mv, a.p, x.v, tile, x.kv_full, a.p.e, kVChunks);
    Walk at(tile);
    const u32 steps = tile.steps();
#pragma unroll 1
    for (u32 it = 0; it < steps; it++, at.next(tile))
      Producer::load_queries(mq, mdo, a, x, tile, at, it);
  }

  static DI void clean(const Layout& x, const Tile& tile) {
    u32 it = 0, raw = 0;
    Producer::clean_queries(x, tile, it, raw);
  }

  // dQ in pieces of 64 columns, or 32, of the warpgroups by turns. By a warp.
  static DI void add_dq(const BackwardArgs& a, const Layout& x, const Tile& tile) {
    const bool elect = (threadIdx.x & 31) == 0, ordered = a.deterministic;
    int m = tile.blocks.begin;
    int at =  // of `visits`
        (tile.b(a.p) * a.p.h + tile.first_head) * (a.rows / M) + tile.padded(a.p) / M + m;
    u32 i = 0;
#pragma unroll 1
    for (u32 left = tile.steps();; left--) {
      if (ordered) {
        const int before = left > 0 ? visits_before<WideBackward>(a, tile, m) : 0;
        if (elect) {
          while (left > 0 && Visits::done(load_acquire(&a.visits[at].state)) < before) {
          }
          if (i > 0) {  // the step before
            bulk_wait<0>();
            fence_async_global();
            add_release(&a.visits[at - (m > tile.blocks.begin ? 1 : gap(a, tile))].state,
                        Visits::kDone);
          }
          fence_async_global();
        }
      }
      if (left == 0) break;
      if (elect) {
#pragma unroll 1
        for (int part = 0; part < 4; part++, i++) {
          mb_wait(x.dq_full + 8 * (i % kPieces), i / kPieces & 1);
          const int cw = part % 2;
          const bool middle = kMiddle && part < 2;
          const long long tile = 1ll * kChunks * at;
          const long long chunk =
              middle ? tile + kFull : tile + cw * (kChunks - kFull) + (kMiddle ? 0 : part / 2);
          bulk_add_f32(a.acc + chunk * (M * 64) + (middle ? cw * (M * 32) : 0),
                       x.dq + i % kPieces * kPieceBytes, middle ? kPieceBytes / 2 : kPieceBytes);
          bulk_commit();
          bulk_wait_read<1>();  // of all but this piece
          if (i > 0) mb_arrive(x.dq_empty + 8 * ((i - 1) % kPieces));
        }
      }
      __syncwarp();
      at++;
      if (++m == tile.blocks.end) m = tile.blocks.begin, at += gap(a, tile) - 1;
    }
    if (elect) bulk_wait<0>();
  }
  // From the last tile of a query head to the first of the next.
  static DI int gap(const BackwardArgs& a, const Tile& tile) {
    return a.rows / M - tile.blocks.end + tile.blocks.begin + 1;
  }

  static DI void compute(const TMap& mdk, const TMap& mdv, const BackwardArgs& a, const Layout& x,
                         Tile tile, int cw) {
    const Problem& p = a.p;
    const Blocks& blocks = tile.blocks;
    const int tid = threadIdx.x & 127, lane = tid & 31, warp = tid >> 5;
    const bool elect = tid == 0;
    float dk[kFull][N / 2], dv[kVFull][N / 2];
    float middle[kMiddle ? kOwn / 2 : 1];  // dK of own keys
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
#pragma unroll
      for (int j = 0; j < kFull; j++) dk[j][i] = 0.f;
#pragma unroll
      for (int j = 0; j < kVFull; j++) dv[j][i] = 0.f;
    }
    if constexpr (kMiddle)
#pragma unroll
      for (int i = 0; i < kOwn / 2; i++) middle[i] = 0.f;
    // Descriptors: queries as A and own keys as B, K-major; own columns of dO' and Q' as A,
    // MN-major; P and dS as B of dV' and dK'; dS as A of dQ, and own columns of K as B, MN-major.
    const int own = cw * (kChunks - kFull), own_v = cw * kVFull;  // first chunks of own columns
    const u32 a_q = desc_lo(x.q, 16), a_o = desc_lo(x.o, 16);
    const u32 b_k = desc_lo(x.k + cw * kOwn * 128, 16), b_v = desc_lo(x.v + cw * kOwn * 128, 16);
    const u32 t_q = desc_lo(x.q + own * M * 128, 16), t_o = desc_lo(x.o + own_v * M * 128, 16);
    const u32 b_p = desc_lo(x.p, 16), b_ds = desc_lo(x.ds, 16);
    const u32 t_k = desc_lo(x.k + own * N * 128, 16);
    // Of the middle: Q', dS of own keys, and a half of the columns of K.
    const u32 t_q_middle = desc_lo(x.q + kFull * M * 128, 16),
              b_ds_own = desc_lo(x.ds + cw * kOwn * 128, 16),
              t_k_middle = desc_lo(x.k + kFull * N * 128 + cw * 64, 16);
    auto pin_all = [](auto& x) {
#pragma unroll
      for (auto& y : x) pin(y);
    };
    // This lane's address for stmatrix.trans in a tile of keys x queries (or keys x 64 columns).
    const u32 to = (lane & 7) * 128 + (lane >> 4) * 1024 +
                   (((warp * 2 + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
    const int local =
        warp * 16 + (lane >> 2);  // this thread's rows of the tile: local and local + 8
    const int c0 =
        tile.first(p) + cw * kOwn + 2 * (lane & 3);  // this thread's keys: c0 + 8 j + {0, 1}
    const bool tail = tile.first(p) + N > tile.k_len(p);
    const float sl2 = p.scale * kLog2E;
    const int steps = tile.steps();
    int m = blocks.begin, h = tile.first_head;
    float st[kOwn / 2];
    auto issue_s = [&](int it) {
      mb_wait(x.q_full, it & 1);
      pin(st);
      wg_fence();
#pragma unroll
      for (int k = 0; k < D / 16; k++)  // S = Q K'
        Wgmma<kOwn, F16>::template ss<0, 0>(
            st, desc(a_q + (((k / 4) * M * 128 + (k % 4) * 32) >> 4)),
            desc(b_k + (((k / 4) * N * 128 + (k % 4) * 32) >> 4)), k > 0);
      wg_commit();
    };
    // P or dS of own keys, 16 at a time, to shared memory as keys x queries.
    auto put = [&](u32 tile, const u32(&w)[kOwn / 4], int k) {
      const u32 at = tile + cw * kOwn * 128 + to + k * 2048;
      if (k < kOwn / 16)
        stmatrix4_trans(at, w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]);
      else
        stmatrix2_trans(at, w[4 * k], w[4 * k + 1]);
    };
    constexpr int kPuts = (kOwn + 15) / 16;
    auto issue_dq = [&](auto& dq, int it, u32 t_k, int chunk) {
      constexpr int kColumns = sizeof(dq) / 2;
      pin(dq);
      wg_fence();
#pragma unroll
      for (int k = 0; k < N / 16; k++)  // dQ = dS K
        Wgmma<kColumns, F16>::template ss<1, 1>(
            dq, desc(b_ds + ((it % 2 * kPBytes + k * 2048) >> 4)),
            desc(t_k + ((chunk * N * 128 + k * 2048) >> 4)), k > 0);
      wg_commit();
    };
    auto stage_dq = [&](const auto& dq, int it, int part) {
      constexpr int kCount = sizeof(dq) / 4;
      const u32 i = it * 4 + part * 2 + cw, s = i % kPieces;
      mb_wait(x.dq_empty + 8 * s, ~(i / kPieces) & 1);
#pragma unroll
      for (int i = 0; i < kCount; i += 4)
        store_shared4(x.dq + s * kPieceBytes + (i * 128 + tid * 4) * 4, dq[i], dq[i + 1], dq[i + 2],
                      dq[i + 3]);
      fence_async();
      __syncwarp();
      if (lane == 0) mb_arrive(x.dq_full + 8 * s);
    };
    mb_wait(x.kv_full, 0);
    if (steps > 0) {
      issue_s(0);
      wg_wait<0>();
      pin(st);
      int it = 0;
#pragma unroll 1
      do {
        float dp[kOwn / 2];
        u32 pp[kOwn / 4], ds[kOwn / 4];
        float bias[kScore ? kOwn / 2 : 1];  // asked for early: it comes from memory
        if constexpr (kScore) {
          const Scores<F16> score(p, tile.b(p), tile.n(p), h, tile.diagonal(p));
          score.biases(bias, m * M + local, c0);
        }
        wg_wait<0>();
        pin(st);
        auto issue_dp = [&]() {
          pin(dp);
          wg_fence();
#pragma unroll
          for (int k = 0; k < E / 16; k++)  // dP = dO V'
            Wgmma<kOwn, F16>::template ss<0, 0>(
                dp, desc(a_o + (((k / 4) * M * 128 + (k % 4) * 32) >> 4)),
                desc(b_v + (((k / 4) * N * 128 + (k % 4) * 32) >> 4)), k > 0);
          wg_commit();
        };
        // P may be overwritten: dO is here, and so both warpgroups are past dV of the step before.
        mb_wait(x.o_full, it & 1);
        if constexpr (!kScore) issue_dp();  // else branches follow, and ptxas serialises
        const int row0 = m * M + local;
        const u32 lse_at = x.lse + local * 4;
        const float lse[2] = {load_shared(lse_at), load_shared(lse_at + 32)};
        if constexpr (kSpan) tile.load_clear();  // not held meanwhile: registers are short
        if (tail || (kMask && tile.masked(m))) {
          const int diagonal = tile.diagonal(p), k_len = tile.k_len(p), begin = tile.begin(p),
                    end = tile.end(p);
#pragma unroll
          for (int hh = 0; hh < 2; hh++) {
            const int row = row0 + 8 * hh, at = row + diagonal;
            int least = -1, most = k_len - 1;
            if (kMask && p.right >= 0) most = min(most, at + p.right);
            if (kMask && p.left >= 0) least = at - p.left - c0;
            if (kSpan && (row < begin || row >= end)) most = -1;
            mask_row(st, hh, least, most - c0);
          }
          if (kSpan && tile.compare(p))
            mask_segments(st, tile.query_ids(p), row0, tile.q_len(p), tile.key_ids(p),
                          tile.first(p) + cw * kOwn, tile.k_len(p));
        }
        if constexpr (kScore) {  // P = exp(score - lse); what goes on to dS also has the derivative
                                 // of the cap
          const Scores<F16> score(p, tile.b(p), tile.n(p), h, tile.diagonal(p));
#pragma unroll
          for (int j = 0; j < kOwn / 8; j++) {
#pragma unroll
            for (int hh = 0; hh < 2; hh++) {
              const int i = 4 * j + 2 * hh;
              float w[2], bend[2] = {1.f, 1.f};
#pragma unroll
              for (int e = 0; e < 2; e++) {
                float y =
                    score.with(bias[i + e], st[i + e], row0 + 8 * hh, c0 + 8 * j + e, &bend[e]);
                w[e] = st[i + e] == -infinity() ? 0.f : ex2(y * kLog2E - lse[hh]);
                st[i + e] = w[e] * bend[e];
              }
              pp[i / 2] = pack<F16>(w[0], w[1]);
            }
            if (j % 2 || j == kOwn / 8 - 1) put(x.p, pp, j / 2);
            asm volatile("" ::
                             : "memory");  // or all loads of a bias come first, in more registers
                                           // than there are
          }
          issue_dp();
        } else {
#pragma unroll
          for (int i = 0; i < kOwn / 2; i++) st[i] = ex2(st[i] * sl2 - lse[i / 2 % 2]);
#pragma unroll
          for (int i = 0; i < kOwn / 4; i++) pp[i] = pack<F16>(st[2 * i], st[2 * i + 1]);
#pragma unroll
          for (int k = 0; k < kPuts; k++) put(x.p, pp, k);
        }
        wg_wait<0>();
        pin(dp);
        const float delta[2] = {load_shared(x.delta + local * 4),
                                load_shared(x.delta + local * 4 + 32)};
#pragma unroll
        for (int i = 0; i < kOwn / 4; i++) {  // dS = P * (dP - delta)
          st[2 * i] *= dp[2 * i] - delta[i % 2], st[2 * i + 1] *= dp[2 * i + 1] - delta[i % 2];
          ds[i] = pack<F16>(st[2 * i], st[2 * i + 1]);
        }
#pragma unroll
        for (int k = 0; k < kPuts; k++) put(x.ds + it % 2 * kPBytes, ds, k);
        if constexpr (kBias)
          BiasGradient<F16>(p, a.bias, tile.b(p), tile.n(p), h).put_queries(st, row0, c0);
        fence_async();
        bar_sync(kBarDs, 256);
        auto issue_dv = [&] {
          pin_all(dv);
          wg_fence();
#pragma unroll
          for (int k = 0; k < M / 16; k++)  // dV' += dO' P
#pragma unroll
            for (int i = 0; i < kVFull; i++)
              Wgmma<N, F16>::template ss<1, 0>(dv[i], desc(t_o + ((i * M * 128 + k * 2048) >> 4)),
                                               desc(b_p + ((k * 32) >> 4)), 1);
          wg_commit();
        };
        auto issue_dk = [&] {
          pin_all(dk);
          if constexpr (kMiddle) pin(middle);
          wg_fence();
#pragma unroll
          for (int k = 0; k < M / 16; k++) {  // dK' += Q' dS
#pragma unroll
            for (int i = 0; i < kFull; i++)
              Wgmma<N, F16>::template ss<1, 0>(dk[i], desc(t_q + ((i * M * 128 + k * 2048) >> 4)),
                                               desc(b_ds + ((it % 2 * kPBytes + k * 32) >> 4)), 1);
            if constexpr (kMiddle)
              Wgmma<kOwn, F16>::template ss<1, 0>(
                  middle, desc(t_q_middle + ((k * 2048) >> 4)),
                  desc(b_ds_own + ((it % 2 * kPBytes + k * 32) >> 4)), 1);
          }
          wg_commit();
        };
        float dq[32], dq_middle[kMiddle ? 16 : 1];
        issue_dk();
        issue_dv();
        if constexpr (kMiddle) issue_dq(dq_middle, it, t_k_middle, 0);
        issue_dq(dq, it, t_k, 0);
        wg_wait<2 + kMiddle>();
        pin_all(dk);
        if constexpr (kMiddle) pin(middle);
        if (elect) mb_arrive(x.q_empty);
        wg_wait<1 + kMiddle>();
        pin_all(dv);
        if (elect) mb_arrive(x.o_empty);
        if constexpr (kMiddle) {
          wg_wait<1>();
          pin(dq_middle);
          stage_dq(dq_middle, it, 0);
        } else {  // no registers for both
          wg_wait<0>();
          pin(dq);
          stage_dq(dq, it, 0);
          issue_dq(dq, it, t_k, 1);
        }
        wg_wait<0>();
        pin(dq);
        issue_s(it + 1 < steps ? it + 1 : it);
        stage_dq(dq, it, 1);
        if (++m == blocks.end) m = blocks.begin, h++;
      } while (++it < steps);
      wg_wait<0>();
      pin(st);
    }
    // dV' over V and dK' over K, own columns, once nobody reads them; the store clips rows and
    // columns.
    bar_sync(kBarEnd, 256);
    auto finish = [&](const auto& d, u32 tile, int own, float f) {
      constexpr int kCount = sizeof(d) / sizeof(d[0]);
#pragma unroll
      for (int i = 0; i < kCount; i++)
#pragma unroll
        for (int j = 0; j < N / 16; j++)
          stmatrix4_trans(tile + (own + i) * N * 128 + to + j * 2048,
                          pack<F16>(d[i][8 * j] * f, d[i][8 * j + 1] * f),
                          pack<F16>(d[i][8 * j + 2] * f, d[i][8 * j + 3] * f),
                          pack<F16>(d[i][8 * j + 4] * f, d[i][8 * j + 5] * f),
                          pack<F16>(d[i][8 * j + 6] * f, d[i][8 * j + 7] * f));
    };
    finish(dv, x.v, own_v, 1.f);
    finish(dk, x.k, own, p.scale);
    if constexpr (kMiddle) {
      u32 w[kOwn / 4];
#pragma unroll
      for (int i = 0; i < kOwn / 4; i++)
        w[i] = pack<F16>(middle[2 * i] * p.scale, middle[2 * i + 1] * p.scale);
#pragma unroll
      for (int k = 0; k < kPuts; k++) put(x.k + kFull * N * 128, w, k);
    }
    fence_async();
    // A warpgroup stores what it has put there, but for a chunk of both.
    if constexpr (kMiddle)
      bar_sync(kBarStore, 256);
    else
      bar_sync(kBarStore + cw, 128);
    const int row = tile.k_row(p, tile.first(p)), box = tile.k_box(p);
    if (elect) {
      store_keys<WideBackward, 2>(mdk, mdv, p, x.k, N * 128, x.v, N * 128, 2 * cw, row, tile.g,
                                  box);
      bulk_commit();
      bulk_wait<0>();
    }
  }
};

}  // namespace flashjax::sm90
