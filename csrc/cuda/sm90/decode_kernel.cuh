// Few queries against many keys, for sm_90a: what decoding does, and its time is that of reading
// k and v once. The tiles of keys of all sequences and heads are one list, of which every CTA takes
// an equal share; heads that were shared are put together by a second kernel. Pipeline, barriers
// and what was tried: docs/kernels/sm90-decode.md.
#pragma once
#include "decode_narrow.cuh"
#include "wgmma.cuh"

namespace flashjax::sm90 {

template <bool F16, int D, int M, int N>
struct Decode {
  static constexpr int kRows = M, kCluster = 1, kTileKeys = N, kBox = N;  // as in Latent
  static constexpr int E = D, kTile = N * D * 2, kQBytes = M * D * 2, kChunks = D / 64;
  // Up to 16 rows are multiplied by warps (decode_narrow.cuh), more by warpgroups, of 64 rows each.
  static constexpr bool kNarrow = M <= 16;
  static constexpr int kGroups = kNarrow ? 0 : M / 64, kWarps = kNarrow ? 4 : 4 * kGroups;
  static constexpr int kHelpers = kNarrow ? 32 : 96;  // threads beside the producer warp
  static constexpr int kThreads = 32 + kHelpers + 32 * kWarps;
  static constexpr bool kQInRegs = kNarrow || D <= 128;
  static constexpr bool kAhead = kGroups == 2;                    // many rows: arithmetic counts
  static constexpr int kCtas = D <= 128 && kGroups == 1 ? 2 : 1;  // an SM
  // Where narrow warps put together what they have: O of 8 rows, and two numbers of each row.
  static constexpr int kPitch = E + 4;
  static constexpr int kMeet = kNarrow ? kWarps * (8 * kPitch * 4 + M * 8) : 0;
  static constexpr int kFit = (224 * 1024 - kQBytes - kMeet) / kTile;
  static constexpr int kSlots = kCtas == 2 ? 4 : kFit < 8 ? kFit : 8;  // tiles on their way
  static constexpr int kEarly = kNarrow ? kSlots : 0;  // tiles that are asked for early
  using Work = List<N>;
  static constexpr int kSmem =
      1024 + kQBytes + kMeet + kSlots * kTile + 16 + 20 * kSlots + 3 * (int)sizeof(Piece);

  struct Layout {  // shared memory from an aligned base
    u32 q, ring, meet, q_full, q_empty, full, empty, odd, piece;
    DI explicit Layout(u32 base) {
      q = base, ring = q + kQBytes, meet = ring + kSlots * kTile, q_full = meet + kMeet;
      q_empty = q_full + 8, full = q_empty + 8, empty = full + 8 * kSlots;
      odd = empty + 8 * kSlots, piece = odd + 4 * kSlots;
    }
  };
  struct Turn {  // a place in the ring
    int slot = 0, phase = 0;
    DI void next() {
      if (++slot == kSlots) slot = 0, phase ^= 1;
    }
  };

  static DI void run(const TMap& mq, const TMap& mk, const TMap& mv, const DecodeArgs& a) {
    extern __shared__ unsigned char smem_raw[];
    const u32 raw = smem_u32(smem_raw);
    const Layout x((raw + 1023) & ~1023u);
    Piece* shared = (Piece*)(smem_raw + (x.piece - raw));
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    if (threadIdx.x == 0) {
      prefetch_map(&mq), prefetch_map(&mk), prefetch_map(&mv);
      mb_init(x.q_full, 1), mb_init(x.q_empty, kWarps);
      for (int i = 0; i < kSlots; i++)
        mb_init(x.full + 8 * i, 1), mb_init(x.empty + 8 * i, kNarrow ? kWarps : kGroups);
      mb_init_fence();
      fence_async();
    }
    __syncthreads();
    if (!kEarly || warp > 0) begin();
    if (warp < 1 + kHelpers / 32) {
      if constexpr (kThreads * kCtas > 256 && !kNarrow) reg_dec<64>();
      if (warp == 0)
        produce(mq, mk, mv, a, x, shared);
      else
        Work::without_keys(a, kHelpers);
    } else if constexpr (kNarrow) {
      Narrow<Decode, F16>::consume(a, warp - 2, x, shared + 1);
    } else {
      if constexpr (kThreads * kCtas > 256) reg_inc<kCtas == 2 ? 192 : 216>();
      consume(a, warp / 4 - 1, x, shared + 1);
    }
  }

  static DI void begin() {
    pdl_wait();  // what came before has written the operands, and no longer reads the workspace
    pdl_launch();
  }

  // One warp. A lane brings a box of keys, or several.
  static DI void produce(const TMap& mq, const TMap& mk, const TMap& mv, const DecodeArgs& a,
                         const Layout& x, Piece* shared) {
    const int lane = threadIdx.x & 31, count = N >> (__ffs(a.pages.box) - 1);
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
    auto bring = [&](bool early) {
      const int hk = a.by_blocks(piece.head), n1 = piece.n1;
      const Boxes<N> boxes{a.pages, count, piece.b, n1, piece.keys.begin, piece.keys.end};
      if (early) {  // into the L2, a lane each
        const int shift = __ffs(count) - 1, n = piece.n0 + (lane >> shift);
        if (n >= piece.n0 + kEarly) return;
        const Place from = boxes.found(boxes.look(n, lane & (count - 1), true));
        if (!from.good()) return;
#pragma unroll
        for (int c = 0; c < kChunks; c++) {
          tma_prefetch(&mk, c * 64, from.row, hk, from.page);
          tma_prefetch(&mv, c * 64, from.row, hk, from.page);
        }
        return;
      }
      Place next = boxes.look(piece.n0, lane);
#pragma unroll 1
      for (int n = piece.n0; n < n1; n++) {
        const Place at = boxes.found(next);
        bool odd;
        const int live = boxes.live(n, at, odd);
        next = boxes.look(n + 1, lane);
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
            if (v == 0) store_int(x.odd + 4 * turn.slot, odd);
            mb_expect(full, live * a.pages.box * D * 2);
          }
          __syncwarp();
          load(at, lane);
#pragma unroll 1
          for (int i = 32; i < count; i += 32) load(boxes.found(boxes.look(n, i + lane)), i + lane);
          turn.next();
          if (n == piece.n0 && v == 0) hand();
        }
      }
    };
    // While the kernel before ends, the memory is idle: the first keys, or what are likely to be
    // them, come into the L2 meanwhile. The same code again has it in the instruction cache.
#pragma unroll 1
    for (int early = kEarly > 0; early >= 0; early--) {
      Work::walk(a, piece, early, [&]() { bring(early); });
      if (early) begin();
      __syncwarp();
    }
    piece.n0 = piece.n1 = piece.b = piece.head = 0;
    hand();
  }

  static DI void consume(const DecodeArgs& a, int cw, const Layout& x, const Piece* handed) {
    const flashjax::Problem& p = a.p;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const bool elect = (threadIdx.x & 127) == 0;
    const int r0 = cw * 64 + warp * 16 + (lane >> 2);  // this thread's rows: r0 and r0 + 8
    const bool active = cw * 64 + warp * 16 < a.rows();
    // Rows past the last are zeros in both products: numbers there would cost power, and so clock.
    const u32 kept[2] = {r0 < a.rows() ? ~0u : 0u, r0 + 8 < a.rows() ? ~0u : 0u};
    const bool bent = is_bent(p);
    const float c = bent ? kLog2E : p.scale * kLog2E;  // from what S holds to log2 units
    const u32 dq = desc_lo(x.q + cw * 8192, 16);
    const u32 dk = desc_lo(x.ring, 16), dv = desc_lo(x.ring, N * 128);
    Turn turn;
    int q_phase = 0;
#pragma unroll 1
    while (true) {
      const Piece& piece = receive(handed, x.q_full, q_phase);
      if (piece.n0 == piece.n1) break;
      const Keys& k = piece.keys;
      float o[E / 2], s[N / 2], mx[2] = {-infinity(), -infinity()}, sum[2] = {0.f, 0.f};
      u32 pb[N / 4], qf[kQInRegs ? D / 4 : 1];
#pragma unroll
      for (int i = 0; i < E / 2; i++) o[i] = 0.f;
      if constexpr (kQInRegs) {
        const int rr = (lane & 7) + ((lane >> 3) & 1) * 8;
        const u32 ro = x.q + (cw * 64 + warp * 16 + rr) * 128;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
          ldmatrix4(ro + (i / 4) * M * 128 + (((2 * (i % 4) + (lane >> 4)) ^ (rr & 7)) << 4),
                    qf[4 * i], qf[4 * i + 1], qf[4 * i + 2], qf[4 * i + 3]);
#pragma unroll
        for (int i = 0; i < D / 4; i++) qf[i] &= kept[i & 1];
        fence_async();
        mb_arrive_warp(x.q_empty);
      }
      int odd;
      auto arrived = [&](const Turn& at) { mb_wait(x.full + 8 * at.slot, at.phase); };
      auto leave = [&](const Turn& at) {
        if (elect) mb_arrive(x.empty + 8 * at.slot);
      };
      auto scores = [&]() {
        odd = load_int(x.odd + 4 * turn.slot);
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
      };
      auto soften = [&](int n, float (&f)[2]) {
        if (!active) return;
        const bool masked = n < k.clear_begin || n >= k.clear_end;
        Work::template finish<N>(s, a, piece, bent, masked, odd, n * N, r0);
        softmax(s, mx, sum, f, c);
      };
      auto multiply = [&](int n, const Turn& at, int odd) {
        if (odd || n * N < k.begin || n * N + N > k.end) {
          // What P is 0 for may be NaN in V, and 0 * NaN is NaN.
          if (warp < N / 32)
            clear_rows<E / 64>(x.ring + at.slot * kTile, N, 32 * warp,
                               Work::dead_keys(a, piece.b, k, n * N + 32 * warp, odd));
          fence_async();
          bar_sync(1 + cw, 128);
        }
        pin(o);
        wg_fence();
#pragma unroll
        for (int i = 0; i < N / 16; i++)
          Wgmma<E, F16>::template rs<1>(o, pb[4 * i], pb[4 * i + 1], pb[4 * i + 2], pb[4 * i + 3],
                                        desc(dv + at.slot * (kTile >> 4) + i * (2048 >> 4)), 1);
        wg_commit();
      };
      if constexpr (!kAhead) {
#pragma unroll 1
        for (int n = piece.n0; n < piece.n1; n++) {
          float f[2] = {1.f, 1.f};
          arrived(turn);
          scores();
          wg_wait<0>();
          pin(s);
          leave(turn);
          turn.next();
          soften(n, f);
          weigh(s, pb, o, f, kept);
          arrived(turn);
          multiply(n, turn, odd);
          wg_wait<0>();
          pin(o);
          leave(turn);
          turn.next();
        }
      } else {  // S of the next tile is made before O of this one, whose product goes on meanwhile
        Turn last;
        arrived(turn);
        scores();
        wg_wait<0>();
        pin(s);
        leave(turn);
        turn.next();
#pragma unroll 1
        for (int n = piece.n0;; n++) {
          float f[2] = {1.f, 1.f};
          soften(n, f);
          wg_wait<0>();
          pin(o);
          if (n > piece.n0) leave(last);
          weigh(s, pb, o, f, kept);
          last = turn;
          if (n + 1 == piece.n1) break;
          const int was = odd;
          turn.next();
          arrived(turn);
          scores();
          arrived(last);
          multiply(n, last, was);
          wg_wait<1>();
          pin(s);
          leave(turn);
          turn.next();
        }
        arrived(last);
        multiply(piece.n1 - 1, last, odd);
        wg_wait<0>();
        pin(o);
        leave(last);
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
        const End end = end_of(a, piece, row, mx[hh] * c, l);
        if (piece.slot < 0) {
          const int64_t at = ((int64_t)piece.b * p.s + row.i) * p.h + row.h;
          u32* out = a.out + at * (p.e / 2) + (lane & 3);
#pragma unroll
          for (int j = 0; j < E / 8; j++)
            if (8 * j < p.e)
              out[4 * j] = pack<F16>(o[4 * j + 2 * hh] * end.inv, o[4 * j + 2 * hh + 1] * end.inv);
          if ((lane & 3) == 0)
            a.lse[((int64_t)piece.b * p.h + row.h) * p.s + row.i] = end.lse * kLn2;
        } else {
          const int64_t at = (int64_t)piece.slot * a.rows() + r0 + 8 * hh;
          float2* out = (float2*)(a.part_out + at * E) + (lane & 3);
#pragma unroll
          for (int j = 0; j < E / 8; j++)
            __stcg(out + 4 * j,
                   make_float2(o[4 * j + 2 * hh] * end.inv, o[4 * j + 2 * hh + 1] * end.inv));
          if ((lane & 3) == 0) __stcg(a.part_lse + at, end.lse);
        }
      }
    }
  }

  // One step of the online softmax: s becomes P, and O has to be multiplied by f.
  static DI void softmax(float (&s)[N / 2], float (&mx)[2], float (&sum)[2], float (&f)[2],
                         float c) {
    float top[2] = {mx[0], mx[1]}, ms[2];
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
  }

  static DI void weigh(const float (&s)[N / 2], u32 (&pb)[N / 4], float (&o)[E / 2],
                       const float (&f)[2], const u32 (&kept)[2]) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) pb[i] = pack<F16>(s[2 * i], s[2 * i + 1]) & kept[i & 1];
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

}  // namespace flashjax::sm90
