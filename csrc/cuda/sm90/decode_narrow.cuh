// What the consumers of the decode kernel do where a block has up to 16 rows: products with the
// operands swapped, so that an instruction multiplies 8 rows and not 64. Each warp has keys of its
// own in every tile, and a softmax of its own; they are put together when a piece ends.
#pragma once
#include "decode_list.cuh"

namespace flashjax::sm90 {

// K: of decode_kernel.cuh. With r = lane / 4 and c = 2 (lane % 4) a thread has scores of keys r and
// r + 8 of 16, and O of columns r and r + 8 of 16, both of rows c and c + 1 of 8.
template <class K, bool F16>
struct Narrow {
  using Work = typename K::Work;
  using Turn = typename K::Turn;
  static constexpr int D = K::E, E = K::E, N = K::kTileKeys, M = K::kRows, R = M / 8;
  static constexpr int kWarps = K::kWarps, kOwn = N / kWarps, J = kOwn / 16;  // keys of a warp
  static constexpr int kPitch = K::kPitch;
  static_assert(J * 16 * kWarps == N && kOwn <= 32);

  static DI void consume(const DecodeArgs& a, int warp, const typename K::Layout& x,
                         const Piece* handed) {
    const flashjax::Problem& p = a.p;
    const int lane = threadIdx.x & 31;
    const bool bent = is_bent(p);
    const float c = bent ? kLog2E : p.scale * kLog2E;  // from what S holds to log2 units
    // Lanes of ldmatrix: 8 rows of 128 bytes, whose units of 16 bytes are swizzled by the row.
    const u32 row8 = lane & 7, half = (lane >> 3) & 1, quarter = lane >> 4;
    u32 k_at[4], v_at[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      k_at[i] = (warp * kOwn + row8 + 8 * half) * 128 + (((2 * i + quarter) ^ row8) << 4);
      v_at[i] = (warp * kOwn + row8 + 8 * quarter) * 128 + (((2 * i + half) ^ row8) << 4);
    }
    int q_phase = 0;
    Turn turn;
#pragma unroll 1
    while (true) {
      const Piece& piece = receive(handed, x.q_full, q_phase);
      if (piece.n0 == piece.n1) break;
      const Keys& k = piece.keys;
      u32 q[R][D / 16][2];
      float o[E / 16][R][4], top[R][2], sum[R][2];  // top: what P is relative to, in units of S
#pragma unroll
      for (int r = 0; r < R; r++) {
#pragma unroll
        for (int i = 0; i < D / 32; i++)
          ldmatrix4(x.q + (i / 2) * M * 128 + (8 * r + row8) * 128 +
                        (((4 * (i % 2) + (lane >> 3)) ^ row8) << 4),
                    q[r][2 * i][0], q[r][2 * i][1], q[r][2 * i + 1][0], q[r][2 * i + 1][1]);
#pragma unroll
        for (int i = 0; i < D / 16; i++)  // rows past the last cost power, unless they are zeros
          if (8 * r + (lane >> 2) >= a.rows()) q[r][i][0] = q[r][i][1] = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) top[r][i] = -infinity(), sum[r][i] = 0.f;
#pragma unroll
        for (int m = 0; m < E / 16; m++)
#pragma unroll
          for (int i = 0; i < 4; i++) o[m][r][i] = 0.f;
      }
      fence_async();
      mb_arrive_warp(x.q_empty);

#pragma unroll 1
      for (int n = piece.n0; n < piece.n1; n++) {
        float s[J][R][4] = {};
        mb_wait(x.full + 8 * turn.slot, turn.phase);
        const int odd = load_int(x.odd + 4 * turn.slot);
        const u32 tile = x.ring + turn.slot * K::kTile;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
#pragma unroll
          for (int j = 0; j < J; j++) {
            u32 b[4];
            ldmatrix4(tile + k_at[i % 4] + (i / 4) * N * 128 + j * 2048, b[0], b[1], b[2], b[3]);
#pragma unroll
            for (int r = 0; r < R; r++)
              mma<F16>(s[j][r], b[0], b[1], b[2], b[3], q[r][i][0], q[r][i][1]);
          }
        mb_arrive_warp(x.empty + 8 * turn.slot);
        turn.next();

        const bool masked = n < k.clear_begin || n >= k.clear_end;
        if (bent || masked || odd) finish(s, a, piece, bent, masked, odd, n * N + warp * kOwn);
        soften(s, o, top, sum, c);
        u32 w[J][R][2];
#pragma unroll
        for (int j = 0; j < J; j++)
#pragma unroll
          for (int r = 0; r < R; r++)
#pragma unroll
            for (int h = 0; h < 2; h++)
              w[j][r][h] = transpose_matrix(pack<F16>(s[j][r][2 * h], s[j][r][2 * h + 1]));

        mb_wait(x.full + 8 * turn.slot, turn.phase);
        const u32 values = x.ring + turn.slot * K::kTile;
        if (odd || n * N < k.begin || n * N + N > k.end) {
          // What P is 0 for may be NaN in V, and 0 * NaN is NaN.
          const u32 dead = Work::dead_keys(a, piece.b, k, n * N + warp * kOwn, odd);
          clear_rows<E / 64>(values, N, warp * kOwn, kOwn == 32 ? dead : dead & 0xFFFF);
          fence_async();
          __syncwarp();
        }
#pragma unroll
        for (int m = 0; m < E / 16; m++)
#pragma unroll
          for (int j = 0; j < J; j++) {
            u32 b[4];
            ldmatrix4_trans(values + v_at[m % 4] + (m / 4) * N * 128 + j * 2048, b[0], b[1], b[2],
                            b[3]);
#pragma unroll
            for (int r = 0; r < R; r++)
              mma<F16>(o[m][r], b[0], b[1], b[2], b[3], w[j][r][0], w[j][r][1]);
          }
        mb_arrive_warp(x.empty + 8 * turn.slot);
        turn.next();
      }
      gather(a, piece, warp, x.meet, c, o, top, sum);
    }
  }

  // Scores that are not just scaled, of keys from j0.
  static DI void finish(float (&s)[J][R][4], const DecodeArgs& a, const Piece& piece, bool bent,
                        bool masked, int odd, int j0) {
    const flashjax::Problem& p = a.p;
    const Keys& k = piece.keys;
    const int lane = threadIdx.x & 31;
    const float inv_cap = p.softcap != 0.f ? 1.f / p.softcap : 0.f;
    const u32 dead = odd ? Work::dead_keys(a, piece.b, k, j0, true) : 0;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const Row row = row_of(a, piece.head, 8 * r + 2 * (lane & 3) + e);
        int from, to;
        k.seen(a, row.i, from, to);
        float slope = 0.f;
        if (p.alibi_slopes && row.live)
          slope = p.alibi_slopes[piece.b * p.alibi_shape.stride[0] + row.h];
#pragma unroll
        for (int j = 0; j < J; j++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int at = 16 * j + 8 * h + (lane >> 2), key = j0 + at;
            float& y = s[j][r][2 * h + e];
            if (bent) {
              y *= p.scale;
              if (p.softcap != 0.f) y = p.softcap * tanh_ex2(y * inv_cap);
              y -= slope * fabsf((float)(key - k.base - row.i - k.diagonal));
            }
            if ((masked && (key < from || key >= to)) || (dead >> at & 1)) y = -infinity();
          }
      }
  }

  // One step of the online softmax: s becomes P. What it is relative to moves only where a score is
  // above it by more than 8 (powers of two), and then O is scaled.
  static DI void soften(float (&s)[J][R][4], float (&o)[E / 16][R][4], float (&top)[R][2],
                        float (&sum)[R][2], float c) {
    float most[R][2];
    bool above = false;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        most[r][e] = fmaxf(s[0][r][e], s[0][r][2 + e]);
#pragma unroll
        for (int j = 1; j < J; j++)
          most[r][e] = fmaxf(most[r][e], fmaxf(s[j][r][e], s[j][r][2 + e]));
        above |= most[r][e] * c > top[r][e] * c + 8.f;
      }
    if (__any_sync(~0u, above)) {
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float y = fmaxf(top[r][e], most[r][e]);
#pragma unroll
          for (int i = 4; i < 32; i *= 2) y = fmaxf(y, __shfl_xor_sync(~0u, y, i));
          const float f = y == -infinity() ? 1.f : ex2((top[r][e] - y) * c);
          top[r][e] = y, sum[r][e] *= f;
#pragma unroll
          for (int m = 0; m < E / 16; m++) o[m][r][e] *= f, o[m][r][2 + e] *= f;
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float base = top[r][e] == -infinity() ? 0.f : top[r][e] * c;
#pragma unroll
        for (int j = 0; j < J; j++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float& y = s[j][r][2 * h + e];
            y = ex2(y * c - base), sum[r][e] += y;
          }
      }
  }

  // Four columns of row r of a piece: O, relative to 2^top, and the sum.
  static DI void emit(const DecodeArgs& a, const Piece& piece, int r, int column,
                      const float (&o)[4], float top, float l) {
    const Row row = row_of(a, piece.head, r);
    if (!row.live) return;
    const End end = end_of(a, piece, row, top, l);
    if (piece.slot < 0) {
      const int64_t to = ((int64_t)piece.b * a.p.s + row.i) * a.p.h + row.h;
      if (column < a.p.e)
        *(uint2*)(a.out + (to * a.p.e + column) / 2) = make_uint2(
            pack<F16>(o[0] * end.inv, o[1] * end.inv), pack<F16>(o[2] * end.inv, o[3] * end.inv));
      if (column == 0) a.lse[((int64_t)piece.b * a.p.h + row.h) * a.p.s + row.i] = end.lse * kLn2;
    } else {
      const int64_t to = (int64_t)piece.slot * a.rows() + r;
      __stcg((float4*)(a.part_out + to * E + column),
             make_float4(o[0] * end.inv, o[1] * end.inv, o[2] * end.inv, o[3] * end.inv));
      if (column == 0) __stcg(a.part_lse + to, end.lse);
    }
  }

  // The end of a piece: all warps put their keys together, and write.
  static DI void gather(const DecodeArgs& a, const Piece& piece, int warp, u32 meet, float c,
                        const float (&o)[E / 16][R][4], const float (&top)[R][2],
                        float (&sum)[R][2]) {
    constexpr int kThreads = 32 * kWarps, kLanes = E / 4;  // threads that have a row
    const int lane = threadIdx.x & 31, mine = 32 * warp + lane;
    const u32 pairs = meet + kWarps * 8 * kPitch * 4;  // top and sum: [warp][M]
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int i = 4; i < 32; i *= 2) sum[r][e] += __shfl_xor_sync(~0u, sum[r][e], i);
        const u32 at = pairs + (warp * M + 8 * r + 2 * lane + e) * 8;
        if (lane < 4) store_float(at, top[r][e] * c), store_float(at + 4, sum[r][e]);
      }
#pragma unroll
    for (int r = 0; r < R; r++) {
      const u32 to = meet + (warp * 8 * kPitch + 2 * (lane & 3) * kPitch + (lane >> 2)) * 4;
#pragma unroll
      for (int m = 0; m < E / 16; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          store_float(to + ((i & 1) * kPitch + 16 * m + 8 * (i >> 1)) * 4, o[m][r][i]);
      bar_sync(1, kThreads);
#pragma unroll 1
      for (int at = mine; at < min(8, a.rows() - 8 * r) * kLanes; at += kThreads) {
        const int y = at / kLanes, column = 4 * (at % kLanes);
        float tops[kWarps], sums[kWarps], most = -infinity(), l = 0.f, acc[4] = {};
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
          load_shared2(tops[w], sums[w], pairs + (w * M + 8 * r + y) * 8);
          most = fmaxf(most, tops[w]);
        }
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
          const float f = most == -infinity() ? 1.f : ex2(tops[w] - most);
          float z[4];
          load_shared4(z, meet + ((w * 8 + y) * kPitch + column) * 4);
          l += f * sums[w];
#pragma unroll
          for (int e = 0; e < 4; e++) acc[e] += f * z[e];
        }
        emit(a, piece, 8 * r + y, column, acc, most, l);
      }
      bar_sync(1, kThreads);  // all have read
    }
  }
};

}  // namespace flashjax::sm90
