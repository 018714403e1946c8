// The launches of the sm_90a backward: statistics, main, conversion, and what was asked for of
// dsinks and dbias.
#pragma once
#include <algorithm>
#include <type_traits>

#include "backward_kernel.cuh"
#include "backward_lone.cuh"
#include "backward_passes.cuh"
#include "backward_wide_kernel.cuh"
#include "host.h"
#include "sequences.h"

namespace flashjax::simt {
cudaError_t launch_backward_bias(const BwdParams&, cudaStream_t);  // csrc/cuda/simt/bias.cu
}

namespace flashjax::sm90 {

// Over 128 columns need another division of labour.
template <bool F16, int D, int E, int M, int N, int kOptions>
using BackwardOf = std::conditional_t<(D > 128), WideBackward<F16, D, E, M, N, kOptions>,
                                      Backward<F16, D, M, N, kOptions>>;

// The key tiles of the last wave as ranges of steps, one for each multiprocessor, where that is
// worth what a second piece of a tile costs; of at most `room` ranges, and 8 of a tile.
inline Cut cut_last_wave(int64_t tiles, int64_t steps, int64_t sms, int64_t room) {
  constexpr int64_t kCost = 8;  // in steps
  const int64_t rest = tiles % sms, ranges = std::min({sms, 8 * rest, room});
  const int64_t length = ranges > 0 ? (rest * steps + ranges - 1) / ranges : steps;
  Cut cut{};
  cut.whole = cut.items = static_cast<int>(tiles);
  if (length + kCost > steps || rest * steps > 1 << 30) return cut;
  cut.whole = static_cast<int>(tiles - rest);
  cut.ranges = static_cast<int>((rest * steps + length - 1) / length);
  cut.length = static_cast<int>(length), cut.steps = static_cast<int>(steps);
  cut.total = static_cast<int>(rest * steps), cut.items = cut.whole + 2 * cut.ranges;
  return cut;
}

// Whether the main kernel writes dbias: of planes of queries and keys, or of keys alone. Not under
// softcap, whose derivative it has in dS, nor where the order of additions matters, if threads
// share an element.
inline bool writes_dbias(const BwdParams& p, bool shared) {
  return (p.dbias || p.dbias16) && p.softcap == 0 && p.bias_shape.dim[4] > 1 &&
         !(shared && p.deterministic);
}

template <DType kType, int D, int E, int M, int N, cuda::Variant kVariant>
cudaError_t launch_backward(const BwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  static_assert(D == E || D > 128);
  // Of rows of one length: some query may see nothing, if its window lies before the first key or
  // after the last.
  const int64_t diagonal = p.top_left ? 0 : p.t - p.s;
  const bool sees_nothing = (p.window_right >= 0 && diagonal + p.window_right < 0) ||
                            (p.window_left >= 0 && p.s - 1 + diagonal - p.window_left >= p.t);
  if constexpr (M == 80 && kVariant == cuda::Variant::kSequences) {
    if (p.s / p.n < 2304 || p.deterministic || p.segment_ids_q || p.window_left >= 0)
      return launch_backward<kType, D, E, 64, N, kVariant>(p, device, stream);
  } else if constexpr (M == 80) {  // one stage of K: a key tile begins late, which short rows, or a
                                   // window of few queries, do not make up for
    constexpr bool kMask = kVariant != cuda::Variant::kFull;
    const bool narrow =
        p.window_left >= 0 && p.window_right >= 0 && p.window_left + p.window_right < 2048;
    if (p.s < 4096 || (kMask && (p.deterministic || sees_nothing || narrow)))
      return launch_backward<kType, D, E, 64, N, cuda::Variant::kMasked>(p, device, stream);
  }
  constexpr bool kF16 = kType == DType::kF16;
  constexpr bool kScore = kVariant == cuda::Variant::kScores,
                 kSpan = kScore || kVariant == cuda::Variant::kSequences;
  constexpr int kOptions = (kVariant != cuda::Variant::kFull ? kBackwardMasks : 0) |
                           (kSpan ? kBackwardSpans : 0) | (kScore ? kBackwardScores : 0);
  using K = BackwardOf<kF16, D, E, M, N, kOptions>;
  auto kernel = backward_kernel<K>;
  int smem = K::kSmem;
  // Sequences begin at multiples of M where queries are padded.
  const int64_t rows =
      M % 64 ? ((p.s + M - 1) / M + (p.n > 1 ? p.n : 0)) * M
             : (p.s + 127) / 128 * 128 + (p.cu_seqlens_q || p.cu_seqlens_k ? 128 * p.n : 0);
  const int64_t heads = p.b * p.h, nblocks = (p.t + N - 1) / N;
  // Heads whose Q, dO and dQ fit in the L2 together, but enough of them that the short blocks of
  // one section fill the gaps that the long ones of the next leave.
  const int64_t longest = p.max_seqlen_q < 0 ? p.s : std::min(p.s, p.max_seqlen_q);
  const int64_t near =
      p.h ? std::max<int64_t>(std::max<int64_t>(heads_in_l2(16 * longest * D), 4) * p.g / p.h, 2)
          : 2;
  const int64_t chunk =
      (int64_t{32} << 20) / (16 * D * std::max<int64_t>(near * p.h / std::max<int64_t>(p.g, 1), 1));
  // Queries in the order in which they are done. Deterministic, the key tiles of a sequence come
  // one after the other, and so do the queries, over which dsinks is summed.
  PlanShape shapes[2] = {{false, N, chunk, Order::kMostFirst, M},
                         {true, M, chunk, Order::kMostLast, M}};
  if (p.deterministic) {
    shapes[0].order = p.window_right >= 0 ? Order::kBackwards : Order::kForwards;
    shapes[1].order = Order::kForwards;
  }
  const int64_t query_tiles = kSpan ? plan_tiles(p, shapes[1]) : (p.s + M - 1) / M;
  const int64_t blocks = (kSpan ? plan_tiles(p, shapes[0]) : nblocks * p.b) * p.g;
  if (heads == 0) return cudaSuccess;
  // Rows of one length, too, if there are enough of them that a plan is worth it.
  if constexpr (D <= 128 && K::kMask && !kScore)
    if (has_lone_tiles(p) && (kSpan || p.b * p.g >= 2 * device.sms))
      return launch_lone_backward<kType, D>(p, device, near, chunk, stream);
  if (blocks > INT32_MAX || query_tiles > INT32_MAX || heads * rows > INT32_MAX || p.s >= 1 << 29 ||
      p.t >= 1 << 27 || p.h > 65535 || p.b > 65535)
    return cudaErrorInvalidConfiguration;
  const int64_t counters = (heads * 8 + p.b * 4) * (rows / 64) + 16;
  const int64_t used = (heads * rows * (D + 2) * 4 + counters + 255) / 256 * 256;
  const int64_t plans = kSpan ? plan_bytes(p, shapes[0]) + plan_bytes(p, shapes[1]) : 0;
  if (p.workspace_bytes < used + plans) return cudaErrorInvalidValue;

  BackwardArgs a{};
  a.p = problem(p);
  float* acc = static_cast<float*>(p.workspace);
  float *lse2 = acc + heads * rows * D, *delta = lse2 + heads * rows;
  Visits* visits = reinterpret_cast<Visits*>(delta + heads * rows);
  int* ticket = reinterpret_cast<int*>(visits + heads * rows / 64);
  a.lse2 = lse2, a.delta = delta, a.acc = acc, a.rows = static_cast<int>(rows);
  a.visits = visits, a.ticket = ticket, a.yields = p.yields;
  a.dq = static_cast<unsigned short*>(p.dq), a.d = static_cast<int>(p.d);
  a.nblocks = static_cast<int>(nblocks), a.group = 1;
  a.query_blocks = static_cast<int>((p.s + M - 1) / M);
  if (K::kPlain && !kSpan) a.lead = static_cast<int>(rows - p.s), a.p.diagonal -= a.lead;
  a.ratio = a.p.g ? a.p.h / a.p.g : 0;
  a.cut.whole = a.cut.items = static_cast<int>(blocks);
  if (a.p.left >= 0 || a.p.right >= 0) {  // else all CTAs go through one head in step
    a.group = static_cast<int>(std::min(near, kSpan ? p.g : p.g * p.b));
  } else {
    if (K::kCounts && !p.deterministic)
      a.stagger = static_cast<u32>(UINT32_MAX / std::max<int64_t>(nblocks, 1));
    if (K::kCuts && a.stagger && !p.yields) {
      constexpr int64_t kPiece = 2 * N * D * 4 + 2 * 4;
      a.cut = cut_last_wave(blocks, p.h / p.g * query_tiles, device.sms,
                            (p.workspace_bytes - used) / kPiece);
      a.partial = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + used);
      a.there = reinterpret_cast<int*>(a.partial + a.cut.ranges * 2 * N * D);
    }
  }
  a.deterministic = p.deterministic, a.reverse = p.deterministic && a.p.right >= 0;
  // Scores may say so, too; of sequences their Spans say it.
  a.clean = kScore || (!kSpan && sees_nothing);

  cudaError_t error = cudaSuccess;
  auto check = [&](cudaError_t x) { error = cuda::first_error(error, x); };
  // Whether the main kernel writes dbias, and which: one that a bias reaches by tiles, where it has
  // whole planes and its rows are aligned.
  const int64_t* dim = p.bias_shape.dim;
  bool dbias = false;
  if constexpr (kScore) {
    auto use = [&](auto options) {
      using Chosen = BackwardOf<kF16, D, E, M, N, decltype(options)::value>;
      kernel = backward_kernel<Chosen>, smem = Chosen::kSmem;
    };
    const bool shared = dim[0] < p.b || dim[1] < p.n || dim[2] < p.h;
    const int64_t size = p.bias_dtype == DType::kF32 ? 4 : 2;
    dbias = writes_dbias(p, shared || (D > 128 && dim[3] == 1));
    a.bias.sums = p.dbias, a.bias.whole = static_cast<unsigned short*>(p.dbias16);
    if (dbias)
      a.bias.by = dim[3] == 1 ? BiasArgs::kColumns : shared ? BiasArgs::kAdd : BiasArgs::kStore;
    const bool tiles = D <= 128 && p.bias && dim[3] > 1 && dim[4] > 1 && dim[4] * size % 16 == 0 &&
                       (!dbias || (size == 2) == (p.dbias16 != nullptr));
    if (tiles) {
      if constexpr (D <= 128) {
        if (size == 2)
          use(std::integral_constant<int, kOptions | kBackwardTiles16>{});
        else
          use(std::integral_constant<int, kOptions | kBackwardTiles32>{});
      }
      const Map map{{dim[4], dim[3], dim[0] * dim[1] * dim[2], 1},
                    {dim[4], dim[3] * dim[4], dim[0] * dim[1] * dim[2] * dim[3] * dim[4]},
                    {static_cast<int>(128 / size), M, 1, 1}};
      check(tensor_map(a.bias.from, p.bias, p.bias_dtype, map));
      if (dbias) check(tensor_map(a.bias.to, p.dbias16 ? p.dbias16 : p.dbias, p.bias_dtype, map));
      a.bias.of_b = dim[0] > 1 ? dim[1] * dim[2] : 0, a.bias.of_n = dim[1] > 1 ? dim[2] : 0;
      a.bias.of_h = dim[2] > 1;
    } else if (D <= 128 && a.bias.by != BiasArgs::kColumns) {
      dbias = false;
    } else if (dbias) {
      use(std::integral_constant<int, kOptions | kBackwardBias>{});
    }
  }

  PassArgs pass{};
  pass.out = static_cast<const unsigned short*>(p.out);
  pass.dout = static_cast<const unsigned short*>(p.dout);
  pass.lse = p.lse, pass.dlse = p.dlse, pass.lse2 = lse2, pass.delta = delta;

  const unsigned h = static_cast<unsigned>(p.h), b = static_cast<unsigned>(p.b);
  if constexpr (kSpan) {
    Plan plan[2];
    shapes[0].changes = ticket + 4, shapes[0].rows = rows;
    check(plan_sequences(p, shapes, 2, static_cast<char*>(p.workspace) + used, plan, stream));
    a.keys = plan[0].spans, a.key_tiles = plan[0].count, a.ticket = plan[0].ticket;
    a.queries = plan[1].spans, a.query_tiles = plan[1].count;
    a.changes = shapes[0].changes;
  }
  const unsigned tiles = static_cast<unsigned>(query_tiles);
  // Even without queries: the kernel counts from what this writes.
  constexpr int kBlock = kVisitRows<M>;
  const dim3 statistics =
      kSpan ? dim3(tiles, h, M / kBlock)
            : dim3(static_cast<unsigned>(std::max<int64_t>(rows / kBlock, 1)), h, b);
  if (kSpan) {
    check(launch_after(backward_statistics<K, kF16, D, E>, statistics, 256, 0, 1, stream, pass, a));
  } else {
    backward_statistics<K, kF16, D, E><<<statistics, 256, 0, stream>>>(pass, a);
    check(cudaGetLastError());
  }
  // What the kernel adds to, and what it may skip, is 0.
  if (dbias &&
      (a.bias.by != BiasArgs::kStore || a.p.left >= 0 || a.p.right >= 0 || p.cu_seqlens_q ||
       p.cu_seqlens_k || p.seqused_q || p.seqused_k || p.leftpad || p.segment_ids_q))
    check(cudaMemsetAsync(p.dbias16 ? p.dbias16 : p.dbias, 0,
                          (p.dbias16 ? 2 : 4) * dim[0] * dim[1] * dim[2] * dim[3] * dim[4],
                          stream));
  if (blocks > 0 && p.t > 0) {
    TMap q, k, v, dout, dk, dv;
    const void* any = p.s ? p.q : p.k;  // a map needs an address, even of an array without rows
    auto map = [&](TMap& x, const void* data, int64_t rows, int64_t heads, int64_t width, int box) {
      check(kSpan ? sequence_map(x, data, p.dtype, p.b, rows, heads, width, box)
                  : tensor_map(x, data, p.dtype, p.b, rows, heads, width, box));
    };
    auto map_queries = [&](TMap& x, const void* data, int64_t width) {
      if (kSpan && K::kPlain)
        check(leading_map(x, data, p.dtype, p.b, p.s, p.h, width, M));
      else
        map(x, data, p.s, p.h, width, M);
    };
    map_queries(q, any, p.d), map_queries(dout, p.s ? p.dout : any, p.e);
    map(k, p.k, p.t, p.g, p.d, N), map(v, p.v, p.t, p.g, p.e, N);
    map(dk, p.dk, p.t, p.g, p.d, K::kStoreRows), map(dv, p.dv, p.t, p.g, p.e, K::kStoreRows);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    if (error != cudaSuccess) return error;
    const int64_t tickets = a.cut.whole + a.cut.ranges;
    const int64_t grid = K::kStays && !p.yields ? std::min<int64_t>(tickets, device.sms) : tickets;
    kernel<<<static_cast<unsigned>(grid), K::kThreads, smem, stream>>>(q, k, v, dout, dk, dv, a);
    check(cudaGetLastError());
  }
  if ((!K::kStays || p.yields) && p.s > 0) {
    backward_convert<K, kF16, D><<<dim3(tiles, h, kSpan ? 1 : b), 256, 0, stream>>>(a);
    check(cudaGetLastError());
  }
  if (p.dsinks) {
    const unsigned own = static_cast<unsigned>(p.sinks_shape.dim[0]);
    backward_sinks<K>
        <<<dim3(h, own), 256, 0, stream>>>(pass, a, p.sinks, p.dsinks, static_cast<int>(p.b / own));
    check(cudaGetLastError());
  }
  if ((p.dbias || p.dbias16) && !dbias) check(simt::launch_backward_bias(p, stream));
  return error;
}

}  // namespace flashjax::sm90
