// Few queries against many keys whose first columns are the values too (absorbed latent attention),
// for sm_90a: a tile of keys lies in shared memory once and is an operand of both products. Drawn
// and measured in docs/kernels/sm90-decode.md.
#pragma once
#include "decode_list.cuh"
#include "wgmma.cuh"

namespace flashjax::sm90 {

// A CTA has 64 rows and two consumer warpgroups, each of which has half of the columns of O. A tile
// of the list is two of kKeys keys: warpgroup w makes S and P of the w-th, and both multiply both.
// In shared memory P takes the place of those columns of its keys that are no values. Two CTAs of a
// cluster share what they read.
template <bool F16, int kCtas_>
struct Latent {
  static constexpr int D = 576, E = 512, N = 128, kTileKeys = N, kKeys = 64, kRows = 64,
                       kThreads = 384;
  static constexpr int kCluster = kCtas_, kCtas = 1;  // CTAs an SM
  static constexpr int kBox = kKeys / kCluster;       // the keys that a CTA loads
  static constexpr int kChunk = kKeys * 128, kTile = D / 64 * kChunk, kQBytes = kRows * D * 2;
  using Work = List<N, kCluster>;
  static constexpr int kSmem =
      1024 + kQBytes + 2 * kTile + 16 + 22 * 8 + 2 * 4 + 3 * (int)sizeof(Piece) + 4 * 4 * kRows;

  struct Layout {  // shared memory from an aligned base
    u32 q, ring, q_full, q_empty, bars, odd, piece, ref, sum;
    DI explicit Layout(u32 base) {
      q = base, ring = q + kQBytes, q_full = ring + 2 * kTile, q_empty = q_full + 8;
      bars = q_empty + 8, odd = bars + 22 * 8, piece = odd + 8;
      ref = piece + 3 * sizeof(Piece), sum = ref + 8 * kRows;
    }
    // Half h of place `at`: the columns of warpgroup h, and with one of them those that P takes,
    // which the other warpgroup than P's reads last.
    DI u32 empty(int at, int h) const { return bars + 8 * (2 * at + h); }
    DI u32 full(int at, int chunk) const { return bars + 32 + 8 * (D / 64 * at + chunk); }
    DI u32 tile(int at) const { return ring + at * kTile; }
    DI u32 weights(int at) const { return ring + at * kTile + 8 * kChunk; }
  };
  // The i-th chunk of 64 columns of place `at` to be asked for and multiplied: its own warpgroup's
  // half of V is left first, and the one that P takes last.
  static DI constexpr int order(int at, int i) { return i == 8 ? 8 : (i + 4 * at) & 7; }

  static DI void run(const TMap& mq, const TMap& mk, const DecodeArgs& a) {
    extern __shared__ unsigned char smem_raw[];
    const u32 raw = smem_u32(smem_raw);
    const Layout x((raw + 1023) & ~1023u);
    Piece* shared = (Piece*)(smem_raw + (x.piece - raw));
    const int wg = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    if (threadIdx.x == 0) {
      prefetch_map(&mq), prefetch_map(&mk);
      mb_init(x.q_full, 1), mb_init(x.q_empty, 8);
      for (int i = 0; i < 2 * D / 64; i++) mb_init(x.full(0, i), 1);
      for (int i = 0; i < 4; i++) mb_init(x.empty(0, i), kCluster);
      mb_init_fence();
      fence_async();
    }
    if constexpr (kCluster > 1)
      cluster_sync();
    else
      __syncthreads();
    pdl_wait();  // what came before has written the operands, and no longer reads the workspace
    pdl_launch();
    if (wg == 0) {
      reg_dec<72>();
      if (threadIdx.x < 32)
        produce(mq, mk, a, x, shared);
      else
        Work::without_keys(a, 96);
    } else {
      reg_inc<216>();
      if (wg == 1)
        consume<0>(a, x, shared + 1);
      else
        consume<1>(a, x, shared + 1);
    }
    if constexpr (kCluster > 1) cluster_sync();  // the other one may still write here
  }

  // One warp. A lane brings a box of keys, or several.
  static DI void produce(const TMap& mq, const TMap& mk, const DecodeArgs& a, const Layout& x,
                         Piece* shared) {
    const int lane = threadIdx.x & 31, rank = kCluster > 1 ? cluster_rank() : 0;
    const int count = kKeys / a.pages.box, own = kBox / a.pages.box;
    const u64 hint = a.blocks == 1 ? kEvictFirst : kEvictNormal;
    Piece& piece = shared[0];
    int q_phase = 1, phase = 0;
    auto hand = [&]() {  // with its queries
      mb_wait(x.q_empty, q_phase);
      q_phase ^= 1;
      if (!elect_one()) return;
      shared[1 + q_phase] = piece;
      const Row row = row_of(a, piece.head, 0, rank);
      mb_expect(x.q_full, a.rows() * D * 2);
#pragma unroll
      for (int c = 0; c < D / 64; c++)
        tma_load(x.q + c * kRows * 128, &mq, x.q_full, c * 64, row.h, row.i, piece.b, kEvictFirst);
    };
    Work::walk(a, piece, false, [&]() {
      const int hk = piece.head / a.blocks, m1 = 2 * piece.n1;  // in halves of tiles
      const Boxes<kKeys> boxes{a.pages, count, piece.b, m1, piece.keys.begin, piece.keys.end};
      int m = 2 * piece.n0;
      Place next = boxes.look(m, lane);
#pragma unroll 1
      for (; m < m1; m++) {
        const int at = m & 1;
        const Place here = boxes.found(next);
        bool odd;
        const int live = boxes.live(m, here, odd);
        next = boxes.look(m + 1, lane);
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
          const int h = half ^ at, chunks = 4 + half;
          auto chunk = [&](int i) { return i < 4 ? 4 * h + i : 8; };
          mb_wait(x.empty(at, h), phase ^ 1);
          if (half && lane == 0) store_int(x.odd + 4 * at, odd);  // nobody reads the last
          __syncwarp();
          if (lane < chunks) mb_expect(x.full(at, chunk(lane)), live * a.pages.box * 128);
#pragma unroll 1
          for (int box = rank * own; box < (rank + 1) * own; box++) {
            // The same in all lanes: else each instruction is a loop over them.
            Place from = {__shfl_sync(~0u, here.page, box), __shfl_sync(~0u, here.row, box)};
            if (box >= 32) from = boxes.found(boxes.look(m, box));
            if (!from.good() || !elect_one()) continue;
            const int key = box * a.pages.box;
#pragma unroll
            for (int i = 0; i < 5; i++) {
              if (i == 4 && !half) break;
              const u32 to = x.tile(at) + chunk(i) * kChunk + key * 128, bar = x.full(at, chunk(i));
              if constexpr (kCluster > 1)
                tma_load_all(to, &mk, bar, chunk(i) * 64, from.row, hk, from.page, hint, 3);
              else
                tma_load(to, &mk, bar, chunk(i) * 64, from.row, hk, from.page, hint);
            }
          }
          __syncwarp();
          if (m == 2 * piece.n0 && half == 0) hand();
        }
        phase ^= at;
      }
    });
    __syncwarp();
    piece.n0 = piece.n1 = piece.b = piece.head = 0;
    hand();
  }

  // Warpgroup W: the column half W of O.
  template <int W>
  static DI void consume(const DecodeArgs& a, const Layout& x, const Piece* handed) {
    const flashjax::Problem& p = a.p;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const int rank = kCluster > 1 ? cluster_rank() : 0;
    const int r0 = warp * 16 + (lane >> 2);  // this thread's rows: r0 and r0 + 8
    const bool active = warp * 16 < a.rows();
    const bool bent = is_bent(p);
    const float c = bent ? kLog2E : p.scale * kLog2E;  // from what S holds to log2 units
    const int rr = warp * 16 + (lane & 7) + ((lane >> 3) & 1) * 8;
    const u32 dq = desc_lo(x.q, 16);
    int q_phase = 0, phase = 0;
    auto release = [&](int at) {
      if (threadIdx.x & 127) return;
      if constexpr (kCluster > 1)
        mb_arrive_at(x.empty(at, W), 0), mb_arrive_at(x.empty(at, W), 1);
      else
        mb_arrive(x.empty(at, W));
    };
#pragma unroll 1
    while (true) {
      const Piece& piece = receive(handed, x.q_full, q_phase);
      if (piece.n0 == piece.n1) break;
      // Of tiles [clear0, clear1) no score is masked; of halves of tiles [whole0, whole1) no key
      // is.
      const Keys& k = piece.keys;
      const int n1 = piece.n1, clear0 = k.clear_begin, clear1 = k.clear_end;
      const int whole0 = (k.begin + kKeys - 1) / kKeys, whole1 = k.end / kKeys;
      float o[E / 4], s[kKeys / 2], mx[2] = {-infinity(), -infinity()}, sum[2] = {0.f, 0.f};
      u32 pb[kKeys / 4];
      int odd[2];  // a key of the place that is not there
#pragma unroll
      for (int i = 0; i < E / 4; i++) o[i] = 0.f;
#pragma unroll
      for (int i = 0; i < kKeys / 4; i++) pb[i] = 0;
      auto tell = [&](const float (&to)[2]) {  // what the next P refers to
        if (lane & 3) return;
        store_float(x.ref + 4 * (W * kRows + r0), to[0]);
        store_float(x.ref + 4 * (W * kRows + r0 + 8), to[1]);
      };
      tell(mx);

      // From here on P of both warpgroups refers to `to`.
      auto refer = [&](const float (&to)[2]) {
        if (!__any_sync(~0u, mx[0] != to[0] || mx[1] != to[1])) return;
        tell(to);
        float f[2];
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          f[hh] = mx[hh] == to[hh] ? 1.f : ex2((mx[hh] - to[hh]) * c);
          mx[hh] = to[hh], sum[hh] *= f[hh];
        }
#pragma unroll
        for (int j = 0; j < E / 16; j++)
          o[4 * j] *= f[0], o[4 * j + 1] *= f[0], o[4 * j + 2] *= f[1], o[4 * j + 3] *= f[1];
      };
      auto scores = [&](int n) {
        const u32 dk = desc_lo(x.tile(W), 16);
        pin(s);
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
          const int chunk = order(W, i);
          mb_wait(x.full(W, chunk), phase);
          wg_fence();
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const u32 step = chunk * (kChunk >> 4) + j * (32 >> 4);
            Wgmma<kKeys, F16>::template ss<0, 0>(s, desc(dq + step), desc(dk + step), i + j > 0);
          }
        }
        wg_commit();
        wg_wait<0>();
        pin(s);
        odd[W] = load_int(x.odd + 4 * W);
        if (active && (bent || odd[W] || n < clear0 || n >= clear1))
          Work::template finish<kKeys>(s, a, piece, bent, n < clear0 || n >= clear1, odd[W],
                                       n * N + W * kKeys, r0, rank);
      };
      // S becomes P, which refers to `to`: as before, as long as no score is far above that.
      auto weigh = [&](float (&to)[2]) {
        float top[2];
        to[0] = mx[0], to[1] = mx[1];
        if (!active) return;
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          top[hh] = s[2 * hh];
#pragma unroll
          for (int j = 0; j < kKeys / 8; j++)
            top[hh] = fmaxf(top[hh], fmaxf(s[4 * j + 2 * hh], s[4 * j + 2 * hh + 1]));
        }
        auto far = [&](int hh) { return (top[hh] - mx[hh]) * c > 8.f; };
        if (__any_sync(~0u, far(0) || far(1))) {
#pragma unroll
          for (int hh = 0; hh < 2; hh++) {
            top[hh] = fmaxf(top[hh], __shfl_xor_sync(~0u, top[hh], 1));
            top[hh] = fmaxf(top[hh], __shfl_xor_sync(~0u, top[hh], 2));
            if (far(hh)) to[hh] = top[hh];
          }
          tell(to);
        }
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          const float ms = to[hh] == -infinity() ? 0.f : to[hh] * c;
#pragma unroll
          for (int j = 0; j < kKeys / 8; j++)
#pragma unroll
            for (int i = 4 * j + 2 * hh; i < 4 * j + 2 * hh + 2; i++) s[i] = ex2(s[i] * c - ms);
        }
#pragma unroll
        for (int i = 0; i < kKeys / 4; i++) pb[i] = pack<F16>(s[2 * i], s[2 * i + 1]);
      };
      auto share = [&]() {
        bar_sync(4 + W, 128);  // all of S has been made, and its last columns are free
#pragma unroll
        for (int i = 0; i < kKeys / 16; i++)
          stmatrix4(x.weights(W) + rr * 128 + (((2 * i + (lane >> 4)) ^ (rr & 7)) << 4), pb[4 * i],
                    pb[4 * i + 1], pb[4 * i + 2], pb[4 * i + 3]);
        fence_async();
        bar_arrive(1 + W, 256);
      };
      auto hear = [&]() {  // of P of the other warpgroup, and of what it refers to
        bar_sync(2 - W, 256);
        const float to[2] = {load_shared(x.ref + 4 * ((1 - W) * kRows + r0)),
                             load_shared(x.ref + 4 * ((1 - W) * kRows + r0 + 8))};
        odd[1 - W] = load_int(x.odd + 4 * (1 - W));
        refer(to);
      };
      // O += P V of place `at`, by P of this warpgroup from registers, of the other one's not.
      auto multiply = [&](int at, int n) {
        // Rows of V that P is 0 for may be NaN, and 0 * NaN is NaN.
        const int m = 2 * n + at;
        if (odd[at] || m < whole0 || m >= whole1) {
          if (warp < kKeys / 32)
            clear_rows<4>(x.tile(at) + 4 * W * kChunk, kKeys, 32 * warp,
                          Work::dead_keys(a, piece.b, k, m * kKeys + 32 * warp, odd[at]));
          fence_async();
          bar_sync(4 + W, 128);
        }
        const u32 dv = desc_lo(x.tile(at) + 4 * W * kChunk, kChunk);
        const u32 dp = desc_lo(x.weights(at), 16);
        pin(o);
        wg_fence();
#pragma unroll
        for (int i = 0; i < kKeys / 16; i++)
          if (at == W)
            Wgmma<E / 2, F16>::template rs<1>(o, pb[4 * i], pb[4 * i + 1], pb[4 * i + 2],
                                              pb[4 * i + 3], desc(dv + i * (2048 >> 4)), 1);
          else
            Wgmma<E / 2, F16>::template ss<0, 1>(o, desc(dp + i * (32 >> 4)),
                                                 desc(dv + i * (2048 >> 4)), 1);
        wg_commit();
      };
      auto leave = [&](int at) {
        wg_wait<0>();
        pin(o);
        release(at);
      };
      auto count = [&]() {  // P, under a product
#pragma unroll
        for (int i = 0; i < kKeys / 2; i++) sum[(i >> 1) & 1] += s[i];
      };
#pragma unroll 1
      for (int n = piece.n0; n < n1; n++) {
        float to[2];
        scores(n);
        if constexpr (W == 0) {
          weigh(to);
          refer(to);
          share();
          multiply(0, n);
          count();
          leave(0);
          hear();
          multiply(1, n);
        } else {
          hear();
          multiply(0, n);
          weigh(to);
          share();
          leave(0);
          refer(to);
          multiply(1, n);
          count();
        }
        leave(1);
        phase ^= 1;
      }
      if (lane == 0) mb_arrive(x.q_empty);

#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        sum[hh] += __shfl_xor_sync(~0u, sum[hh], 1);
        sum[hh] += __shfl_xor_sync(~0u, sum[hh], 2);
        if ((lane & 3) == 0) store_float(x.sum + 4 * (W * kRows + r0 + 8 * hh), sum[hh]);
      }
      bar_sync(3, 256);
#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        const int r = r0 + 8 * hh;
        const float l = load_shared(x.sum + 4 * r) + load_shared(x.sum + 4 * (kRows + r));
        const Row row = row_of(a, piece.head, r, rank);
        if (!row.live) continue;
        const End end = end_of(a, piece, row, mx[hh] * c, l);
        const int e0 = W * (E / 2) + 2 * (lane & 3);
        if (piece.slot < 0) {
          const int64_t at = ((int64_t)piece.b * p.s + row.i) * p.h + row.h;
          u32* out = a.out + (at * p.e + e0) / 2;
#pragma unroll
          for (int j = 0; j < E / 16; j++)
            if (e0 + 8 * j < p.e)
              out[4 * j] = pack<F16>(o[4 * j + 2 * hh] * end.inv, o[4 * j + 2 * hh + 1] * end.inv);
          if (W == 0 && (lane & 3) == 0)
            a.lse[((int64_t)piece.b * p.h + row.h) * p.s + row.i] = end.lse * kLn2;
        } else {
          const int64_t at = ((int64_t)piece.slot * kCluster + rank) * a.rows() + r;
          float2* out = (float2*)(a.part_out + at * E + e0);
#pragma unroll
          for (int j = 0; j < E / 16; j++)
            __stcg(out + 4 * j,
                   make_float2(o[4 * j + 2 * hh] * end.inv, o[4 * j + 2 * hh + 1] * end.inv));
          if (W == 0 && (lane & 3) == 0) __stcg(a.part_lse + at, end.lse);
        }
      }
    }
  }
};

template <bool F16, int kCluster>
__global__ void __launch_bounds__(Latent<F16, kCluster>::kThreads, 1)
    latent_kernel(const __grid_constant__ TMap mq, const __grid_constant__ TMap mk,
                  const __grid_constant__ TMap mv, const __grid_constant__ DecodeArgs a) {
  Latent<F16, kCluster>::run(mq, mk, a);
}

}  // namespace flashjax::sm90
