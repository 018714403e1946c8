// The backward for sm_90a. One CTA owns N = 128 keys of one key head, and loops over the query
// heads of the group and over tiles of M queries. Warpgroup 0 produces: warp 0 loads (TMA), warp 1
// adds dQ to memory, warp 2 clears dO rows of queries that saw nothing. Warpgroups 1 and 2 own 64
// keys each:
//   S' = K Q', dP' = V dO' (rows are keys), so that P' and dS' are, in registers, the A operands of
//   dV += P' dO and dK += dS' Q; dS also goes to shared memory, as queries x keys, for dQ = dS K.
// Pipeline, barriers, registers and shared memory: docs/kernels/sm90-backward.md.
#pragma once
#include "backward_products.cuh"

namespace flashjax::sm90 {

template <bool F16, int D, int M, int N, int kOptions>
struct Backward {
  using Args = BackwardArgs;
  using Producer = BackwardProducer<Backward>;
  using Products = BackwardProducts<Backward>;
  static constexpr bool kF16 = F16;
  static constexpr int kD = D, kM = M, kN = N, kStages = 2, kChunks = D / 64, kVChunks = kChunks,
                       kThreads = 384, kStoreRows = 64;
  static constexpr int kConsumerRegs = D == 128 && ((kOptions & kBackwardScores) || M == 80) ? 240
                                       : kOptions & (kBackwardScores | kBackwardSpans)       ? 224
                                                                                             : 232,
                       kProducerRegs = 504 - 2 * kConsumerRegs;
  static constexpr bool kMask = kOptions & kBackwardMasks, kSpan = kOptions & kBackwardSpans,
                        kScore = kOptions & kBackwardScores, kBias = kOptions & kBackwardBias;
  using Tile = KeyTile<kSpan>;
  // One CTA a multiprocessor, which takes key tiles until there are none, counts the visits of each
  // tile of dQ, and converts tiles that are complete. In a call that yields, or where registers are
  // short, a CTA leaves after one key tile, and dQ is converted after.
  static constexpr bool kCounts = true, kStays = kProducerRegs > 24 || M == 80;
  // Bytes of a bias that comes by tiles, to where float32 ones of dS leave from.
  static constexpr int kTile = kOptions & kBackwardTiles16   ? 2
                               : kOptions & kBackwardTiles32 ? 4
                                                             : 0,
                       kTileBytes = M * N * kTile, kTileStages = kTile == 4 && D == 128 ? 1 : 2;
  static constexpr int kDsReaders = kTile ? 288 : 256;  // threads that read dS
  // How dQ (M x D) is split over the two warpgroups: by rows; by columns;
  // or, transposed, by columns, where M is no multiple of 64.
  static constexpr bool kLean = kProducerRegs == 24 && kStays;
  static constexpr bool kTight = kLean && kSpan;  // of what a key tile is, too
  static constexpr bool kByRows = M == 128, kTransposed = M % 64 != 0;
  // With one stage of K that of the next key tile is asked for as soon as the last dQ is there, and
  // dK leaves through the buffer of dQ, not over K. So slots are read for longer than K.
  static constexpr int kKStages = kStays && !kTransposed ? 2 : 1, kSlots = kKStages == 1 ? 4 : 2;
  static constexpr bool kEarly = kStays && kKStages == 1;
  static constexpr int kKBytes = N * D * 2, kQBytes = M * D * 2, kDsBytes = M * N * 2,
                       kDqBytes = M * D * 4, kDqFloats = M * D / 256;  // of a thread
  static constexpr int kSmem = (kKStages + 1) * kKBytes + kTileStages * kTileBytes +
                               2 * kStages * kQBytes + 2 * kDsBytes + kDqBytes +
                               2 * kStages * M * 4 + 192 + kSlots * kSpanSlot + 1024;
  // Under a mask registers suffice for M = 80 only where nothing is ordered, nor cut; nor cleaned
  // in rows of one length, nor compared by ids in others. Their last tile is full, see `lead`.
  static constexpr bool kPlain = kMask && M == 80;
  static constexpr bool kCuts = kStays && !kSpan && !kPlain;  // see Cut
  // A warpgroup whose keys no query of a tile sees, as on the diagonal, leaves that step out.
  static constexpr bool kSkips = kMask && !kScore && M == 64;
  static constexpr int kSaidTogether = 4;  // visits, see add_tile
  static_assert(N == 128 && (D == 64 || D == 128) && kSmem <= 232448 &&
                (M == 64 || (M == 128 && D == 64) || (M == 80 && D == 128)));
  // dV waits for its store in the buffer of dS, a warpgroup's in its own halves, and dK over K.
  static_assert(M >= 64 && kChunks <= 2);
  // Named barriers: dS is in shared memory; half of the dQ buffer is free (two ids); is full (two);
  // end of a key tile; its store (two).
  static constexpr int kBarDs = 1, kBarDqFree = 2, kBarDqFull = 4, kBarEnd = 6, kBarStore = 7;

  struct Layout {
    u32 k, v, q, o, ds, dq, lse, delta;  // two stages, one of V and dQ, kKStages of K
    u32 k_full, k_empty, v_full, v_empty, q_full, q_empty, o_raw, o_full, o_empty;
    u32 item, unit, items, next, number, span, bias, bias_full;
    DI explicit Layout(u32 base) {
      k = base, v = k + kKStages * kKBytes, q = v + kKBytes, o = q + kStages * kQBytes;
      ds = o + kStages * kQBytes, dq = ds + 2 * kDsBytes, bias = dq + kDqBytes;
      lse = bias + kTileStages * kTileBytes;
      delta = lse + kStages * M * 4, k_full = delta + kStages * M * 4, k_empty = k_full + 16;
      v_full = k_empty + 16, v_empty = v_full + 8;
      q_full = v_empty + 8, q_empty = q_full + 16;
      o_raw = q_empty + 16, o_full = o_raw + 16, o_empty = o_full + 16;
      item = o_empty + 16, unit = item + 8, items = unit + 4, bias_full = unit + 8;
      next = bias_full + 16, number = next + 4;
      span = k_full + 192;  // slots of key tiles
    }
  };

  static DI void run(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                     const TMap& mdk, const TMap& mdv, const BackwardArgs& a) {
    extern __shared__ unsigned char smem_raw[];
    const Layout x((smem_u32(smem_raw) + 1023) & ~1023u);
    const int wg = __shfl_sync(~0u, threadIdx.x >> 7, 0);
    const bool clears =
        kSpan || (kMask && !kPlain && a.clean);  // of sequences each tile says whether it has to be
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; i++)
        mb_init(x.k_full + 8 * i, 1), mb_init(x.k_empty + 8 * i, 3 + clears);
      mb_init(x.v_full, 1), mb_init(x.v_empty, 2);
      store_int(x.unit, 0);
      if (kTile)
        for (int i = 0; i < kTileStages; i++) mb_init(x.bias_full + 8 * i, 1);
      Producer::init(x, clears);
    }
    if constexpr (kSpan) Producer::clear_rest(a.p, x, kKStages);
    __syncthreads();
    if (wg == 0) {
      reg_dec<kProducerRegs>();
      const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
      if (threadIdx.x == 0) {
        load(mq, mk, mv, mdo, a, x);
      } else if (warp == 1) {
        add(a, x);
      } else if (warp >= 2) {
        if (warp == 2 && clears) clean(a, x);
        if (warp == 3) move_bias(a, x);
        if (kStays && !a.yields) finish(a, x);
      }
    } else {
      reg_inc<kConsumerRegs>();
      u32 it = 0;
#pragma unroll 1
      for (u32 k = 0; k == 0 || kStays; k++) {
        if (item(x, k) < 0) break;
        compute(mdk, mdv, a, x, tile_of(a, x, k), wg - 1, k, it);
      }
      if (!kEarly && it > 0) bar_sync(kBarDqFree + wg - 1, 160);
      if ((threadIdx.x & 127) == 0) bulk_wait<0>();
      if (kStays && !a.yields) finish(a, x);
    }
  }

  static DI u32 slot(const Layout& x, u32 k) { return x.span + k % kSlots * kSpanSlot; }

  // The k-th key tile of this CTA.
  template <bool kOneThread = false>
  static DI Tile tile_of(const BackwardArgs& a, const Layout& x, u32 k) {
    if constexpr (kSpan)
      return key_tile_at<kOneThread>(a, slot(x, k));
    else
      return dense_tile_at<Backward, kOneThread>(a, slot(x, k));
  }

  // The tile of a step: where registers are short they hold only where it is.
  template <bool kOneThread = false>
  static DI Tile now(const BackwardArgs& a, const Tile& tile) {
    if constexpr (!kStays)
      return key_tile_at<kOneThread>(a, tile.span);
    else
      return tile;
  }

  // Its number, once its K is there; -1 at the end.
  static DI int item(const Layout& x, u32 k) {
    mb_wait(x.k_full + 8 * (k % kKStages), k / kKStages & 1);
    return number(x, k);
  }
  static DI int number(const Layout& x, u32 k) { return agreed(load_int(x.item + 4 * (k & 1))); }

  static DI void load(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mdo,
                      const BackwardArgs& a, const Layout& x) {
    u32 it = 0;
    // Not even the first is a CTA's own: then nobody waits for a CTA that does not run yet. And
    // none is taken long before it is worked on, or a long key tile would hold the next.
    auto take = [&]() -> int {
      const int i = atomicAdd(a.ticket, 1);
      return kCuts ? i + max(i - a.cut.whole, 0) : i;
    };
    const int all = kSpan ? *a.key_tiles * a.p.g : a.cut.items;
    if (kTight) store_int(x.items, all);
    auto items = [&] { return kTight ? load_int(x.items) : all; };
    int i = take();
#pragma unroll 1
    for (u32 k = 0; k == 0 || kStays; k++) {
      const u32 full = x.k_full + 8 * (k % kKStages);
      mb_wait(x.k_empty + 8 * (k % kKStages), ~(k / kKStages) & 1);
      const bool end = i >= items() || (k > 0 && (a.yields || !kStays));
      store_int(x.item + 4 * (k & 1), end ? -1 : i);
      if (kLean) store_int(x.number, k);
      if (end) {
        mb_arrive(full);
        return;
      }
      Tile tile;
      if (kSpan && k == 0) ask_key_tile(a, i, x.span);
      if constexpr (kSpan)
        tile = put_key_tile<Backward>(a, slot(x, k));
      else
        put_key_tile(tile = key_tile<Backward>(a, i), slot(x, k));
      // What follows does not hold the key tile where registers are short, nor its number.
      auto count = [&] { return kLean ? (u32)load_int(x.number) : k; };
      auto here = [&] {
        if constexpr (kTight)
          return key_tile_at<true>(a, slot(x, count()));
        else
          return now<true>(a, tile);
      };
      mb_expect(full, Producer::bytes(N, a.p.d));
      Producer::load_keys(mk, a.p, x.k + (k % kKStages) * kKBytes, tile, full, a.p.d);
      Walk at(tile);
      u32 left = tile.steps();
      int next = i;
      if (kTight) store_int(x.next, next);
      // V after the queries of the first step, since the last key tile frees it later.
#pragma unroll 1
      for (bool first = true; first || left; first = false) {
        // Asked for two steps before it is needed: the memory takes one to answer.
        if (kStays && !a.yields && (first ? left <= 2 : left == 2)) {
          if (kLean) i = load_int(x.item + 4 * (count() & 1));
          const int of_range = i - a.cut.whole;
          if (kCuts && of_range >= 0 && of_range % 2 == 0 && Piece(a.cut, i + 1).some())
            next = i + 1;
          else
            next = take();
          if (kTight) store_int(x.next, next);
        }
        if (kTight) next = load_int(x.next);
        if (kSpan && kStays && !a.yields && (first ? left <= 1 : left == 1) && next < items()) {
          if (kKStages == 2) mb_wait(x.k_empty + 8 * ((k + 1) & 1), ~((k + 1) / 2) & 1);
          ask_key_tile(a, next, slot(x, count() + 1));
        }
        if (left) {
          Producer::load_queries(mq, mdo, a, x, here(), at, it);
          left--, it++, at.next(here());
        }
        if (first) {
          mb_wait(x.v_empty, ~count() & 1);
          mb_expect(x.v_full, Producer::bytes(N, a.p.e));
          Producer::load_keys(mv, a.p, x.v, kLean && !kSpan ? tile_of<true>(a, x, count()) : here(),
                              x.v_full, a.p.e);
        }
      }
      k = count();
      i = kTight ? load_int(x.next) : next;
    }
  }

  static DI void clean(const BackwardArgs& a, const Layout& x) {
    u32 it = 0, raw = 0;
#pragma unroll 1
    for (u32 k = 0; k == 0 || kStays; k++) {
      if (item(x, k) < 0) return;
      const Tile tile = tile_of(a, x, k);
      if ((threadIdx.x & 31) == 0) mb_arrive(x.k_empty + 8 * (k % kKStages));
      Producer::clean_queries(x, tile, it, raw);
    }
  }

  // The boxes of a tile of the bias: 128 bytes of each query.
  template <class F>
  static DI void boxes(const BackwardArgs& a, const Tile& tile, const Walk& at, F f) {
    constexpr int kWide = 128 / (kTile ? kTile : 2);
    const auto rows = tile.rows();
    const int plane = a.bias.plane(rows.b(a.p), rows.n(a.p), at.h), first = rows.first(a.p);
#pragma unroll 1
    for (int i = 0; i < N / kWide; i++) f(i * M * 128, first + i * kWide, at.m * M, plane);
  }
  // Brings tiles of the bias, and takes dbias to memory: tiles of dS where 16 bits are wanted, else
  // what the warpgroups put over the bias. By a warp.
  static DI void move_bias(const BackwardArgs& a, const Layout& x) {
    if constexpr (kTile == 0) return;
    const bool elect = (threadIdx.x & 31) == 0;
    u32 it = 0;
#pragma unroll 1
    for (u32 k = 0; k == 0 || kStays; k++) {
      if (item(x, k) < 0) break;
      const Tile tile = tile_of(a, x, k);
      Walk at(tile), ahead(tile);
      u32 left = tile.steps(), missing = left;
      auto load = [&](u32 it) {
        const u32 s = it % kTileStages;
        if (elect) {
          mb_expect(x.bias_full + 8 * s, kTileBytes);
          boxes(a, tile, ahead, [&](int to, int key, int query, int plane) {
            tma_load(x.bias + s * kTileBytes + to, &a.bias.from, x.bias_full + 8 * s, key, query,
                     plane, 0, kEvictNormal);
          });
        }
        __syncwarp();
        missing--, ahead.next(now(a, tile));
      };
#pragma unroll 1
      for (u32 s = 0; s < kTileStages && missing; s++) load(it + s);
#pragma unroll 1
      for (; left; left--, it++, at.next(now(a, tile))) {
        bar_sync(kBarDs, kDsReaders);
        if (elect && a.bias.by != BiasArgs::kNone) {
          const u32 from =
              kTile == 2 ? x.ds + it % kStages * kDsBytes : x.bias + it % kTileStages * kTileBytes;
          boxes(a, tile, at, [&](int offset, int key, int query, int plane) {
            if (kTile == 4 && a.bias.by == BiasArgs::kAdd)
              tma_add(&a.bias.to, from + offset, key, query, plane, 0);
            else
              tma_store(&a.bias.to, from + offset, key, query, plane, 0);
          });
          bulk_commit();
          if (kTile == 4) bulk_wait_read<0>();
        }
        __syncwarp();
        if (missing) load(it + kTileStages);
        if (elect) bulk_wait_read<0>();
        __syncwarp();
      }
      bar_sync(kBarEnd, kDsReaders);
    }
    if (elect) bulk_wait<0>();
  }

  static DI void add(const BackwardArgs& a, const Layout& x) {
    const bool elect = (threadIdx.x & 31) == 0;
#pragma unroll 1
    for (u32 k = 0; k == 0 || kStays; k++) {
      if (item(x, k) < 0) break;
      add_tile(a, x, tile_of<!kSpan>(a, x, k), k);
    }
    if (elect) bulk_wait<0>();
  }

  static DI void add_tile(const BackwardArgs& a, const Layout& x, const Tile& tile, u32& k) {
    const bool elect = (threadIdx.x & 31) == 0, ordered = kMask && !kPlain && a.deterministic;
    constexpr int kRows = kVisitRows<M>, kStep = M / kRows;
    const int padded = tile.padded(a.p) / kRows;
    auto entry = [&](const Walk& at) {  // of `visits`
      return padded + at.h * (a.rows / kRows) + at.m * kStep;
    };
    auto begin = [&](const Walk& at) {
      return elect ? atomicOr(&a.visits[entry(at)].state, Visits::kBegun) : 0;
    };
    // Visits that are not known to be done, or not yet said to be, from entry `oldest` on. Several
    // are said at a time: a release takes a third of a step.
    int oldest = 0, pending = 0;
    auto publish = [&] {
      fence_async_global();
      fence_gpu();
#pragma unroll 1
      for (; pending; pending--, oldest += kStep)
        add_relaxed(&a.visits[oldest].state, Visits::kDone);
    };
    Walk at(tile);
    at.h += tile.b(a.p) * a.p.h;  // of all heads
    u32 left = tile.steps();
    auto leave = [&] {  // what the tile is, and its number, is not read any more
      if (kLean) k = agreed(load_int(x.number));
      if (elect) mb_arrive(x.k_empty + 8 * (k % kKStages));
    };
    if (left == 0) leave();
    u32 state = left ? begin(at) : 0;  // before this visit; asked for a step ahead
#pragma unroll 1
    while (left) {
      // Who comes first stores, the others wait for that; or for all that have their turn before.
      int before = ordered ? visits_before<Backward>(a, tile, at.m) : 0;
      const int here = entry(at);
      if (elect) {
        const u32* word = &a.visits[here].state;
        if (!ordered) before = Visits::begun(state);
        if (ordered || Visits::done(state) < before) state = load_acquire(word);
        if (pending && (ordered || Visits::done(state) < before))
          bulk_wait<0>(), publish();  // or two that wait could wait for each other
        while (Visits::done(state) < before) state = load_acquire(word);
        fence_async_global();
      }
      const bool first = before == 0;
#pragma unroll 1
      for (int w = 0; w < 2; w++) {
        bar_sync(kBarDqFull + w, 160);
        if (elect) {
          float* to = a.acc + (long long)kRows * here * D + w * (M * D / 2);
          if (first)
            bulk_store(to, x.dq + w * (M * D * 2), M * D * 2);
          else
            bulk_add_f32(to, x.dq + w * (M * D * 2), M * D * 2);
          bulk_commit();
        }
      }
      if (elect) {
        if (pending == 0) oldest = here;
        pending++;
      }
      if (--left) {
        if constexpr (kLean && !kSpan)  // held nowhere else
          at.next(tile_of<true>(a, x, load_int(x.number)));
        else
          at.next(now(a, tile));
        state = begin(at);
      } else {
        leave();
      }
      if (elect) bulk_wait_read<1>();
      __syncwarp();
      bar_arrive(kBarDqFree, 160);
      if (elect) bulk_wait_read<0>();
      __syncwarp();
      bar_arrive(kBarDqFree + 1, 160);
      // Others wait for what was stored. Now, since there is nothing to add yet.
      if (elect &&
          (first || pending == kSaidTogether || left == 0 || entry(at) != oldest + pending * kStep))
        bulk_wait<0>(), publish();
    }
  }

  // dq = scale * dQ in 16 bits, out of register order, a quarter of a tile at a time, once all key
  // blocks have added to it. Tiles in the order in which key tiles are taken; each CTA has its own.
  static DI void finish(const BackwardArgs& a, const Layout& x) {
    constexpr int kParts = 4, kGroups = M * D / 512 / kParts;
    const Problem& p = a.p;
#pragma unroll 1
    for (;;) {
      int h = p.h, s = p.s;  // opaque, or too much that follows from them outlives a turn
      asm volatile("" : "+r"(h), "+r"(s));
      const int tiles = kSpan ? *a.query_tiles : (s + M - 1) / M, ratio = h / p.g;
      const int all = kSpan ? h : p.b * h;  // heads
      int u = 0;
      if ((threadIdx.x & 31) == 0) u = add_int(x.unit, 1);
      u = __shfl_sync(~0u, u, 0);
      const int i = blockIdx.x + u / kParts * gridDim.x;
      if (i >= all * tiles) break;
      const int group = kMask ? a.group * ratio : 1, section = i / (group * tiles),
                r = i - section * group * tiles;
      const int heads = min(group, all - section * group);
      const int m = r / heads, head = section * group + r % heads;
      Queries z;
      if constexpr (kSpan) {
        z = queries(a, a.queries[m], head, 0);
        if (z.none) continue;
      } else {
        z = {head / h, 0, m * M - (kPlain ? a.lead : 0), s, (long long)head * a.rows + m * M,
             false};
      }
      int visits = 0;
      if ((threadIdx.x & 31) == 0) {
        const Visits* of = a.visits + z.visits<M>();
        visits = of->all;
        while (Visits::done(load_acquire(&of->state)) < visits) __nanosleep(500);
      }
      if (__shfl_sync(~0u, visits, 0) == 0) continue;
      const float* from = a.acc + z.padded * D;
      const int to = kSpan ? head : head - z.b * h, begin = z.b * s + z.begin + z.first,
                rows = z.length - z.first, part = u % kParts;
      if constexpr (kTransposed)
        convert_dq_transposed<F16, D, M>(a, from, to, begin, rows, -z.first, part);
      else
        convert_dq<F16, D, M, kByRows>(a, from, to, begin, rows, part * kGroups,
                                       (part + 1) * kGroups, 1);
    }
  }

  // dK and dV of a piece. Of one that does not end its tile they are left in memory for the one
  // that does, which adds them in the order of the ranges; false, then.
  static DI bool gather(const BackwardArgs& a, int i, int cw, int tid, float (&dk)[D / 2],
                        float (&dv)[D / 2]) {
    if (i < a.cut.whole) return true;
    const Piece piece(a.cut, i);
    auto at = [&](int range) {
      return (float4*)a.partial + ((long long)range * 2 + cw) * (D / 4 * 128) + tid;
    };
    auto each = [&](auto&& f) {
#pragma unroll
      for (int j = 0; j < D / 2; j += 4) f(dk + j, j / 4), f(dv + j, D / 8 + j / 4);
    };
    if (!piece.last) {
      float4* to = at(piece.range);
      each([&](float* x, int j) { __stcg(to + j * 128, make_float4(x[0], x[1], x[2], x[3])); });
      bar_sync(kBarStore + cw, 128);
      if (tid == 0) store_release(a.there + piece.range * 2 + cw, 1);
      return false;
    }
#pragma unroll 1
    for (int r = piece.first; r < piece.range; r++) {
      if (tid == 0)
        while (!load_acquire(a.there + r * 2 + cw)) {
        }
      bar_sync(kBarStore + cw, 128);
      const float4* from = at(r);
      each([&](float* x, int j) {
        const float4 y = __ldcg(from + j * 128);
        x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
      });
    }
    return true;
  }

  static DI void compute(const TMap& mdk, const TMap& mdv, const BackwardArgs& a, const Layout& x,
                         Tile tile, int cw, u32 k, u32& it) {
    const Problem& p = a.p;
    if constexpr (kSpan) tile.load_clear();
    const int tid = threadIdx.x & 127, lane = tid & 31, warp = tid >> 5;
    const bool elect = tid == 0;
    float dk[D / 2], dv[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = 0.f, dv[i] = 0.f;
    const u32 keys = x.k + k % kKStages * kKBytes;
    const Products product(x, keys, cw, warp, lane);
    // This lane's address in a tile of float32, of which a box has 32 keys: queries 2 (lane % 4),
    // key `key`.
    const u32 to_bias32 = x.bias + (cw * 2 + warp / 2) * M * 128 + (lane & 3) * 256 +
                          (((warp & 1) * 4 + (lane >> 4)) ^ (2 * (lane & 3))) * 16 +
                          (lane >> 2 & 3) * 4;
    const int key =
        tile.first(p) + cw * 64 + warp * 16 + (lane >> 2);  // this thread's keys: key and key + 8
    const bool tail = tile.first(p) + N > tile.k_len(p),
               no_keys = tile.first(p) + cw * 64 >= tile.k_len(p);  // here, of this warpgroup
    const float sl2 = p.scale * kLog2E;
    const u32 steps = tile.steps();
    Walk at(tile);
    auto stage = [&](const float (&dq)[kDqFloats], bool wait) {  // for the adding warp
      if (wait) bar_sync(kBarDqFree + cw, 160);
#pragma unroll
      for (int i = 0; i < kDqFloats; i += 4)
        store_shared4(x.dq + cw * (M * D * 2) + (i * 128 + tid * 4) * 4, dq[i], dq[i + 1],
                      dq[i + 2], dq[i + 3]);
      fence_async();
      bar_arrive(kBarDqFull + cw, 160);
    };
    // The stores of the last key tile have read what is about to be overwritten.
    if (elect && k > 0) {
      bulk_wait_read<0>();
      if (!kEarly) mb_arrive(x.k_empty + 8 * ((k - 1) % kKStages));
    }
    bar_sync(kBarStore + cw, 128);
    mb_wait(x.v_full, k & 1);
#pragma unroll 1
    for (u32 left = steps; left; left--, it++, at.next(tile)) {
      const int m = at.m, h = at.h;
      const u32 s = it % kStages, ph = it / kStages & 1;
      if (kSkips && (no_keys || (tile.masked(m) &&
                                 Products::none_seen(p, tile, m, tile.first(p) + cw * 64)))) {
        // Only the other warpgroup's keys are seen: what is left to do here is a half of its dQ.
        constexpr u32 kNone[M / 4] = {};
        product.put(kNone, s);
        fence_async();
        mb_wait(x.q_full + 8 * s, ph), mb_wait(x.o_full + 8 * s, ph);
        bar_sync(kBarDs, kDsReaders);
        float dq[kDqFloats];
        product.template queries<64>(dq, s, 1 - cw);
        if (left == 1 && elect) mb_arrive(x.v_empty);
        if (elect) mb_arrive(x.o_empty + 8 * s), mb_arrive(x.q_empty + 8 * s);
        wg_wait<0>();
        pin(dq);
        stage(dq, it > 0);
        continue;
      }
      float st[M / 2], dp[M / 2];
      u32 pp[M / 4], ds[M / 4];
      float of_key[2] = {0.f, 0.f};  // a bias of keys alone
      if constexpr (kScore && kTile == 0) {
        if (p.bias && p.bias_s == 0) {
          const Scores<F16> score(p, tile.b(p), tile.n(p), h, 0);
          of_key[0] = score.bias_at(score.bias, key),
          of_key[1] = score.bias_at(score.bias, key + 8);
        }
      }
      // Registers do not suffice for P in 16 bits beside S and dP, but for that of 16 queries:
      // their part of dV is what there is to multiply while dS is computed.
      constexpr bool kLate = M == 80;
      auto pack_p = [&](int first, int last) {
#pragma unroll
        for (int i = 4 * first; i < 4 * last; i++) pp[i] = pack<F16>(st[2 * i], st[2 * i + 1]);
      };
      mb_wait(x.q_full + 8 * s, ph);
      product.scores(st, s);
      auto issue_dp = [&]() {
        mb_wait(x.o_full + 8 * s, ph);
        product.weight_gradients(dp, s);
      };
      const u32 lse_at = x.lse + s * M * 4 + 8 * (lane & 3),
                delta_at = x.delta + s * M * 4 + 8 * (lane & 3);
      constexpr int kRead = kLate ? 4 : 0;  // pairs of lse2 that are read under S
      float lse2[2 * kRead + 1];
#pragma unroll
      for (int j = 0; j < kRead; j++) load_shared2(lse2[2 * j], lse2[2 * j + 1], lse_at + 32 * j);
      if constexpr (kScore) {  // branches follow, and ptxas serialises what is in flight across
                               // them
        wg_wait<0>();
      } else {
        issue_dp();
        wg_wait<1>();
      }
      pin(st);
      if (tail || (kMask && tile.masked(m))) {
        Products::mask(st, p, tile, m, key);
        if (kSpan && !kPlain && tile.compare(p))
          mask_segments(st, tile.key_ids(p), key, tile.k_len(p), tile.query_ids(p), m * M,
                        tile.q_len(p));
      }
      if constexpr (kScore) {  // P = exp(score - lse); what goes on to dS also has the derivative
                               // of the cap
        const Scores<F16> score(p, tile.b(p), tile.n(p), h, tile.diagonal(p));
        if constexpr (kTile) mb_wait(x.bias_full + 8 * (it % kTileStages), it / kTileStages & 1);
        [[maybe_unused]] const u32 bias16 =
            product.to_ds + (x.bias - x.ds) + it % kTileStages * kTileBytes;
        [[maybe_unused]] const u32 bias32 = to_bias32 + it % kTileStages * kTileBytes;
        [[maybe_unused]] u32 pairs[4];
#pragma unroll
        for (int j = 0; j < M / 8; j++) {
          float l[2];
          load_shared2(l[0], l[1], lse_at + 32 * j);
          const int query = m * M + 8 * j + 2 * (lane & 3);
          const char* rows[2] = {};
          if constexpr (kTile == 0) rows[0] = score.row(query), rows[1] = score.row(query + 1);
          if constexpr (kTile == 2) {
            if (j % 2 == 0)
              ldmatrix4_trans(bias16 + j * 1024, pairs[0], pairs[1], pairs[2], pairs[3]);
          }
#pragma unroll
          for (int hh = 0; hh < 2; hh++) {
            const int i = 4 * j + 2 * hh;
            float w[2], bend[2] = {1.f, 1.f};
#pragma unroll
            for (int e = 0; e < 2; e++) {
              float b = of_key[hh];
              if constexpr (kTile == 0) {
                if (p.bias_s) b = score.bias_at(rows[e], key + 8 * hh);
              } else if constexpr (kTile == 2) {
                const u32 both = pairs[j % 2 * 2 + hh];
                b = e ? high<F16>(both) : low<F16>(both);
              } else {
                b = load_shared((bias32 ^ (32 * hh + 16 * e)) + j * 1024 + e * 128);
              }
              float y = score.with(b, st[i + e], query + e, key + 8 * hh, &bend[e]);
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
        Products::template exponentials<kRead>(st, lse_at, sl2, lse2);
        pack_p(0, kLate ? 1 : M / 16);
        if (kLate) product.template add_values<0, 1>(dv, pp, s);
      }
      if constexpr (kScore) issue_dp();
      wg_wait<kLate ? 1 : 0>();
      pin(dp);
      if (left == 1 && elect) mb_arrive(x.v_empty);
      float (&to)[M / 2] = *(kLate ? &dp : &st);  // of dS; late, P is still wanted
#pragma unroll
      for (int j = 0; j < M / 8; j++) {  // dS = P * (dP - delta)
        float l0, l1;
        load_shared2(l0, l1, delta_at + 32 * j);
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          const int i = 4 * j + 2 * hh;
          to[i] = st[i] * (dp[i] - l0), to[i + 1] = st[i + 1] * (dp[i + 1] - l1);
          ds[i / 2] = pack<F16>(to[i], to[i + 1]);
          if constexpr (kTile == 4) {
            if (a.bias.by != BiasArgs::kNone) {
              const u32 at = to_bias32 + it % kTileStages * kTileBytes;
              store_float((at ^ (32 * hh)) + j * 1024, to[i]);
              store_float((at ^ (32 * hh + 16)) + j * 1024 + 128, to[i + 1]);
            }
          }
        }
      }
      if (kLate) pack_p(1, M / 16);
      product.put(ds, s);
      if constexpr (kBias) BiasGradient<F16>(p, a.bias, tile.b(p), tile.n(p), h).add_rows(to, key);
      product.template add_values<kLate ? 1 : 0, M / 16>(dv, pp, s);
      fence_async();
      bar_sync(kBarDs, kDsReaders);
      float dq[kDqFloats];
      product.queries(dq, s);
      product.add_keys(dk, ds, s);
      wg_wait<2>();
      pin(dv);
      if (elect) mb_arrive(x.o_empty + 8 * s);
      wg_wait<1>();
      pin(dq);
      if (kEarly && left == 1 && elect) mb_arrive(x.k_empty);
      stage(dq, kEarly ? left < steps : it > 0);
      wg_wait<0>();
      pin(dk);
      if (elect) mb_arrive(x.q_empty + 8 * s);
    }
    auto wait_for_dq = [&] {  // its buffer takes dK
      if (kEarly && steps) bar_sync(kBarDqFree + cw, 160);
    };
    if constexpr (kCuts) {
      if (!gather(a, number(x, k), cw, tid, dk, dv)) return wait_for_dq();
    }
    bar_sync(kBarEnd, kDsReaders);
    if (steps == 0 && elect) {
      mb_arrive(x.v_empty);
      if (kEarly) mb_arrive(x.k_empty);
    }
    int row = warp * 16 + (lane & 15);
    asm volatile("" : "+r"(row));  // or what follows from it is kept through all tiles
    Products::store(mdk, mdv, dk, dv, p, x, tile,
                    kEarly ? x.dq + cw * (M * D * 2) : keys + cw * 8192, kEarly ? 8192 : N * 128,
                    cw, row, elect, wait_for_dq);
  }
};

}  // namespace flashjax::sm90
