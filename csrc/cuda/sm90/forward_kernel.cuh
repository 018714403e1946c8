// The forward for sm_90a: one producer warp (TMA), and kGroups consumer warpgroups of 64 query rows
// each. Pipeline, barriers, registers and shared memory: docs/kernels/sm90-forward.md.
#pragma once
#include "pages.cuh"
#include "problem.cuh"
#include "wgmma.cuh"

namespace flashjax::sm90 {

struct ForwardArgs {
  Problem p;
  float* lse;                 // [b, h, s], natural logarithm
  u32* out;                   // pairs of 16-bit values, for what does not leave by TMA
  int mblocks, tiles, group;  // query blocks of a head; tiles in all; heads of an L2 section
  int sections, rest;         // whole sections; heads of the one after them
  Divider by_section, by_group, by_rest, by_h;
  Divider by_ratio;     // query heads of a key head
  float scale;          // p.scale * log2(e)
  float far, farthest;  // see update_ref
  int* ticket;          // zeroed; null: tiles go round
  const Span* spans;    // of sequences: the tiles, in order, and how many there are
  const int* count;
  Pages pages;
};

// How a kernel is made. What each option is worth is in docs/kernels/sm90-forward.md.
enum : int {
  kOnce = 1,     // each CTA has one tile
  kOwnOut = 2,   // out has its own buffer in shared memory (else it leaves straight from registers)
  kQInRegs = 4,  // q lives in registers
  kTickets = 8,  // tiles are drawn, not dealt
  kMasks = 16,   // windows (else every pair is visible but for the tail of the keys)
  kSpans = 32,   // sequences in the rows, and segment ids
  kScores = 64,  // softcap, bias, alibi
  kPages = 128,  // keys in pages, of one sequence a row
};

// What was best for a head dim and a kind of problem.
constexpr int forward_options(int d, int e, int m, int n, bool masks, bool spans, bool scores,
                              bool pages) {
  int x =
      (masks ? kMasks : 0) | (spans ? kSpans : 0) | (scores ? kScores : 0) | (pages ? kPages : 0);
  if (m == 64)
    x |= kOnce;
  else if (masks)
    x |= kTickets;
  if (e <= 128) x |= kOwnOut;
  if (d == 128 && n == 128 && !scores) x |= kQInRegs;
  return x;
}

// A number as an argument, and the keys [kFrom, kTo) of a block.
template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};
template <int kFrom, int kTo>
struct Part {
  static constexpr int from = kFrom, to = kTo;
};

template <bool F16, int D, int E, int M, int N, int kOptions>
struct Forward {
  static constexpr int kGroups = M / 64, kStages = 2, kThreads = 128 * (kGroups + 1);
  static constexpr int kQBytes = M * D * 2, kOBytes = M * E * 2, kKBytes = N * D * 2,
                       kVBytes = N * E * 2;
  static constexpr int kConsumerRegs = kGroups < 3 ? 232 : 160,
                       kProducerRegs = kGroups < 3 ? 40 : 32;
  static constexpr bool kSepO = kOptions & kOwnOut, kQReg = kOptions & kQInRegs,
                        kDyn = kOptions & kTickets, kOne = kOptions & kOnce,
                        kMask = kOptions & kMasks, kSpan = kOptions & kSpans,
                        kScore = kOptions & kScores, kPage = kOptions & kPages;
  static constexpr int kChunks = N / 8;  // of 8 columns of S
  // Powers of two: what part of the sum that this thread has of a row is much, see update_ref; how
  // far below 1 a reference may be that is raised by as much, for one above makes maxima cheap (and
  // by a power of two, so that P of a key with all of the weight is not rounded, and out is that
  // key's value: the backward takes any difference for a gradient); the reference of a row without
  // a key.
  static constexpr float kShare = -1.f, kNear = 2.f, kNothing = -1e38f;
  static constexpr int kLag = 2;  // chunks between an exponential and its addition to the row sum
  static constexpr int kRest = (kSepO ? kOBytes : 0) + kStages * (kKBytes + kVBytes) + 384 + 1024;
  // Blocks follow each other from tile to tile as within one. Before a tile's first a warpgroup may
  // hand back one block but not two: the stage of the second's V is still in use.
  static constexpr bool kAhead = !kOne && kSepO && (!kMask || M - 64 <= N) &&
                                 (kQReg || (!kPage && 2 * kQBytes + kRest <= 227 * 1024));
  // A warpgroup that sees no more than half of its first block computes no more, and of P V of its
  // last.
  static constexpr bool kHalves = kAhead && kQReg && kMask && !kSpan;
  // One code for the second block of a tile and those after it, where with more ptxas takes warps
  // for divided, or runs out of registers.
  static constexpr bool kMerge = kAhead && kMask && kGroups == 3;
  // Each warpgroup begins a tile once the one before has asked for the products of its turn: when
  // all are at the same point, nothing is multiplied while they turn to the next tile.
  static constexpr bool kStagger = kAhead && !kMerge;
  static constexpr int kHalf = kHalves ? N / 2 : N;
  static constexpr int kQBufs = kAhead && !kQReg ? 2 : 1;
  static constexpr int kSmem = kQBufs * kQBytes + kRest;
  static constexpr int kSlot = 80;  // a tile's Span, or where it is, and its Blocks
  static constexpr int kBarOut = 1, kBarTurn = kBarOut + kGroups;  // named; one, two a warpgroup
  static_assert(!kSpan || (kDyn && kMask));
  static_assert(N <= 128);  // columns_before
  static_assert(!kPage || (kSpan && N <= 512));

  // Shared memory from an aligned base: q, k, v stages[, out], barriers.
  struct Layout {
    u32 q, k, v, o;
    u32 q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full, t_empty, tickets, odd;
    DI explicit Layout(u32 base) {
      q = base, k = q + kQBufs * kQBytes, v = k + kStages * kKBytes, o = v + kStages * kVBytes;
      tickets = v + kStages * kVBytes + (kSepO ? kOBytes : 0);
      q_full = tickets + 2 * kSlot, q_empty = q_full + 16, k_full = q_empty + 16,
      k_empty = k_full + 8 * kStages;
      v_full = k_empty + 8 * kStages, v_empty = v_full + 8 * kStages;
      t_full = v_empty + 8 * kStages, t_empty = t_full + 16, odd = t_empty + 16;
    }
  };

  static DI Blocks blocks_at(u32 at) {
    const int4 x = load_int4(at);
    return {agreed(x.x), agreed(x.y), agreed(x.z), agreed(x.w)};
  }

  template <bool kOneThread = false>
  struct Tile : Rows<kSpan, kOneThread> {
    using Base = Rows<kSpan, kOneThread>;
    using Base::dense_first, Base::span, Base::load;
    DI Tile(const ForwardArgs& a, int t) {
      int section = a.by_section(t), r = t - section * a.group * a.mblocks;
      int x = r, bh = section;  // without masks a section is a head
      if constexpr (kMask) {
        const bool last = section == a.sections;
        x = (last ? a.by_rest : a.by_group)(r);
        bh = section * a.group + r - x * (last ? a.rest : a.group);
      }
      dense_first = (kMask ? a.mblocks - 1 - x : x) * M;  // the longest first
      this->dense_b = a.by_h(bh);
      this->dense_head = bh - this->dense_b * a.p.h;
    }
    DI explicit Tile(u32 at) { span = at; }
    // As publish() left them, for rows of sequences.
    DI Blocks blocks(const Problem& p) const {
      if constexpr (kSpan) return blocks_at(span + sizeof(Span));
      return key_blocks<N>(p, p.diagonal, dense_first, min(dense_first + M, p.s), 0, p.t);
    }
  };

  static DI void run(const TMap& mq, const TMap& mk, const TMap& mv, const TMap& mo,
                     const ForwardArgs& a) {
    extern __shared__ unsigned char smem_raw[];
    const Layout x((smem_u32(smem_raw) + 1023) & ~1023u);
    const int wg = __shfl_sync(~0u, threadIdx.x >> 7,
                               0);  // uniform, which keeps descriptors in uniform registers
    if (threadIdx.x == 32)
      prefetch_map(&mk), prefetch_map(&mq), prefetch_map(&mv), prefetch_map(&mo);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kQBufs; i++)
        mb_init(x.q_full + 8 * i, 1), mb_init(x.q_empty + 8 * i, kGroups);
      for (int i = 0; i < kStages; i++) {
        mb_init(x.k_full + 8 * i, 1), mb_init(x.k_empty + 8 * i, kGroups);
        mb_init(x.v_full + 8 * i, 1), mb_init(x.v_empty + 8 * i, kGroups);
      }
      for (int i = 0; i < 2; i++)
        mb_init(x.t_full + 8 * i, 1), mb_init(x.t_empty + 8 * i, 4 * kGroups + kSpan + kPage);
      mb_init_fence();
      fence_async();
    }
    if constexpr (kSpan) {
      const int dc = chunks_of(a.p.d), ec = chunks_of(a.p.e);
      for (int i = 0; i < kQBufs; i++) clear_chunks(x.q + i * kQBytes, M, dc, D / 64);
      for (int i = 0; i < kStages; i++) {
        clear_chunks(x.k + i * kKBytes, N, dc, D / 64);
        clear_chunks(x.v + i * kVBytes, N, ec, E / 64);
      }
      fence_async();
      pdl_wait();  // for the plan
    }
    __syncthreads();
    if (wg == 0) {
      reg_dec<kProducerRegs>();
      int warp = threadIdx.x / 32;
      if constexpr (!kPage) warp = agreed(warp);  // with pages, ptxas would spill
      if constexpr (kPage) {
        if (warp == 0) produce_pages<false>(mq, mk, a, x);
        if (warp == 2) produce_pages<true>(mq, mv, a, x);
      } else if (warp == 0) {
        produce(mq, mk, mv, a, x);
      }
      if (kSpan && warp == 1) publish(a, x);
    } else {
      reg_inc<kConsumerRegs>();
      consume(mo, a, wg - 1, x);
    }
  }

  // Brings block i, counted over all tiles, of K or of V.
  template <bool kV>
  static DI void load(const TMap& map, const Problem& p, const Layout& x, int i, int row, int h,
                      int box) {
    constexpr int kBytes = kV ? kVBytes : kKBytes;
    const int width = kV ? p.e : p.d;
    const int st = i % kStages;
    const u32 full = (kV ? x.v_full : x.k_full) + 8 * st;
    mb_wait((kV ? x.v_empty : x.k_empty) + 8 * st, ((i / kStages) & 1) ^ 1);
    if (elect_one()) {
      mb_expect(full, kSpan ? N * 128 * chunks_of(width) : kBytes);
#pragma unroll
      for (int c = 0; c < (kV ? E : D) / 64; c++)
        if (!kSpan || has_chunk(c, width))
          tma_load((kV ? x.v : x.k) + st * kBytes + c * N * 128, &map, full, c * 64, row, h, box,
                   kEvictLast);
    }
    __syncwarp();
  }

  // A warp, of which one lane asks: what it asks with is the same in all, or ptxas makes each
  // request a loop over lanes.
  static DI void produce(const TMap& mq, const TMap& mk, const TMap& mv, const ForwardArgs& a,
                         const Layout& x) {
    const int lane = threadIdx.x & 31;
    int it = 0, w = 0, round = 0, t = blockIdx.x;
    Blocks n{};
    int hk = 0, k0 = 0, box = 0;
    // The next tile with keys: says which it is, and asks for its Q. False: there is none.
    auto begin = [&]() {
      int h, q0, q_box;
#pragma unroll 1
      while (true) {
        const int slot = round & 1;
        if constexpr (kSpan) {
          mb_wait(x.t_full + 8 * slot, (round >> 1) & 1);
          if (Tile<>(x.tickets + kSlot * slot).head(a.p) < 0) return false;
        } else if constexpr (kDyn) {
          t = agreed(t);
        }
        const Tile<> tile = tile_of(a, x.tickets, slot, t);
        if constexpr (kDyn && !kSpan) {
          const Blocks y = tile.blocks(a.p);
          mb_wait(x.t_empty + 8 * slot, ((round >> 1) & 1) ^ 1);
          if (lane == 0) {
            const int to = x.tickets + kSlot * slot, head = t < a.tiles ? tile.dense_head : -1;
            store_int4(to, make_int4(tile.dense_first, tile.dense_b, head, 0));
            store_int4(to + 16, make_int4(y.begin, y.end, y.clear_begin, y.clear_end));
            mb_arrive(x.t_full + 8 * slot);
          }
          __syncwarp();
        }
        round++;
        if (!kSpan && t >= a.tiles) return false;
        t = kOne ? a.tiles : t + gridDim.x;
        if (kDyn && !kSpan && a.ticket && lane == 0) t = gridDim.x + atomicAdd(a.ticket, 1);
        h = tile.head(a.p), q0 = tile.q_row(a.p, tile.first(a.p)), q_box = tile.q_box(a.p);
        n = tile.blocks(a.p), hk = a.by_ratio(h), k0 = tile.k_row(a.p, 0), box = tile.k_box(a.p);
        if (kSpan) mb_arrive_warp(x.t_empty + 8 * slot);
        if (n.begin < n.end) break;
      }
      const int qb = w % kQBufs;
      mb_wait(x.q_empty + 8 * qb, ((w / kQBufs) & 1) ^ 1);
      w++;
      if (elect_one()) {
        mb_expect(x.q_full + 8 * qb, kSpan ? M * 128 * chunks_of(a.p.d) : kQBytes);
#pragma unroll
        for (int c = 0; c < D / 64; c++)
          if (!kSpan || has_chunk(c, a.p.d))
            tma_load(x.q + qb * kQBytes + c * M * 128, &mq, x.q_full + 8 * qb, c * 64, q0, h, q_box,
                     kEvictFirst);
      }
      __syncwarp();
      return true;
    };
    auto k = [&](int it, int j) { load<false>(mk, a.p, x, it, k0 + j * N, hk, box); };
    // K is a block ahead of V; with kAhead from tile to tile too.
    bool more = begin();
    if (more) k(it, n.end - 1);
#pragma unroll 1
    while (more) {
#pragma unroll 1
      for (int j = n.end - 1; j > n.begin; j--, it++) {
        k(it + 1, j - 1);
        load<true>(mv, a.p, x, it, k0 + j * N, hk, box);
      }
      const int row = k0 + n.begin * N, head = hk, in = box;
      if (kAhead) {
        more = !kOne && begin();
        if (more) k(it + 1, n.end - 1);
      }
      load<true>(mv, a.p, x, it++, row, head, in);
      if (!kAhead) {
        more = !kOne && begin();
        if (more) k(it, n.end - 1);
      }
    }
  }

  // Keys in pages: one warp brings Q and K, another V.
  template <bool kV>
  static DI void produce_pages(const TMap& mq, const TMap& map, const ForwardArgs& a,
                               const Layout& x) {
    constexpr int kBytes = kV ? kVBytes : kKBytes;
    const u32 tiles = kV ? x.v : x.k, full = kV ? x.v_full : x.k_full,
              empty = kV ? x.v_empty : x.k_empty;
    const int lane = threadIdx.x & 31, box = a.pages.box, own = 16 * lane / box * box;
    const bool first = lane == 0;
    u32 it = 0, w = 0;
#pragma unroll 1
    for (u32 round = 0;; round++) {
      const u32 slot = round & 1;
      mb_wait(x.t_full + 8 * slot, (round >> 1) & 1);
      const Tile<> span(x.tickets + kSlot * slot);
      const int h = span.head(a.p);
      if (h < 0) break;
      const Blocks n = span.blocks(a.p);
      const int hk = a.by_ratio(h), b = span.b(a.p), end = span.end(a.p);
      const int q0 = span.q_row(a.p, span.first(a.p)), q_box = span.q_box(a.p);
      mb_arrive_warp(x.t_empty + 8 * slot);
      // A lane looks, a block ahead, for the box of 16 keys of block j.
      auto look = [&](int j) -> Place {
        const int key = j * N + own;
        if (16 * lane >= N || (u32)key >= (u32)end) return {0, -1};
        return ask_place(a.pages, b, key);
      };
      // Where those of it that are the sequence's end, over [pages, page]. 0: past its last key;
      // -1: in no page.
      auto where = [&](const Place& x, int j) {
        const Place at = checked(a.pages, x);
        if (x.row < 0) return 0;
        return at.good() ? at.page * a.pages.size + at.row + min(box, end - j * N - own) : -1;
      };
      Place next = look(n.end - 1);
#pragma unroll 1
      for (int j = n.end - 1; j >= n.begin; j--, it++) {
        const int at = where(next, j);
        next = look(j - 1);
        const u32 st = it % kStages, bar = full + 8 * st, tile = tiles + st * kBytes;
        mb_wait(empty + 8 * st, ((it / kStages) & 1) ^ 1);
        const u32 odd = __ballot_sync(~0u, at < 0), found = __ballot_sync(~0u, at > 0);
        if (kV && found != (1u << N / 16) - 1) {
          // P is 0 there, but what is left there may be NaN.
#pragma unroll 1
          for (int i = 0; i < N; i += 16)
            if (!(found >> i / 16 & 1)) clear_rows<E / 64>(tile, N, i, 0xffff);
          fence_async();
          __syncwarp();
        }
        if (first) {
          if (!kV) store_int(x.odd + 4 * st, odd);
          constexpr bool kOneChunk = (kV ? E : D) == 64;
          mb_expect(bar, __popc(found) * 2048 * (kOneChunk ? 1 : chunks_of(kV ? a.p.e : a.p.d)));
        }
#pragma unroll 1
        for (int i = 0; i < N; i += box) {
          const int to = __shfl_sync(~0u, at, i / 16);
          if (first && to > 0) {
#pragma unroll
            for (int c = 0; c < (kV ? E : D) / 64; c++)
              if (has_chunk(c, kV ? a.p.e : a.p.d))
                tma_load(tile + (c * N + i) * 128, &map, bar, c * 64, max(0, j * N + i + box - end),
                         hk, to, kEvictLast);
          }
        }
        if (kV || j < n.end - 1) continue;
        mb_wait(x.q_empty, (w++ & 1) ^ 1);
        if (first) {
          mb_expect(x.q_full, M * 128 * (D == 64 ? 1 : chunks_of(a.p.d)));
#pragma unroll
          for (int c = 0; c < D / 64; c++)
            if (has_chunk(c, a.p.d))
              tma_load(x.q + c * M * 128, &mq, x.q_full, c * 64, q0, h, q_box, kEvictFirst);
        }
      }
    }
  }

  static DI Tile<> tile_of(const ForwardArgs& a, u32 tickets, int slot, int t) {
    if constexpr (kSpan)
      return Tile<>(tickets + kSlot * slot);
    else
      return Tile<>(a, t);
  }

  // Draws the tiles of sequences, each once the one before is begun, and puts its Span, with its
  // head and its blocks, to shared memory. Sections of heads, as with rows of one length, go
  // through all spans. By a warp.
  static DI void publish(const ForwardArgs& a, const Layout& x) {
    const int lane = threadIdx.x & 31;
    const int spans = *a.count, tiles = spans * a.p.h, per = a.group * spans;
    int t = blockIdx.x;
#pragma unroll 1
    for (int round = 0;; round++) {
      const u32 slot = round & 1, to = x.tickets + kSlot * slot;
      mb_rest(x.t_empty + 8 * slot, ((round >> 1) & 1) ^ 1);
      if (lane == 0 && round > 0) t = gridDim.x + atomicAdd(a.ticket, 1);
      t = __shfl_sync(~0u, t, 0);
      const int section = t / per, r = t - section * per,
                g = min(a.group, a.p.h - section * a.group);
      const int n = r / g, head = t < tiles ? section * a.group + r - n * g : -1;
      if (head >= 0 && lane < 16) store_int(to + 4 * lane, ((const int*)(a.spans + n))[lane]);
      __syncwarp();
      if (lane == 0) {
        store_int(to + __builtin_offsetof(Span, head), head);
        const Tile<true> y(to);
        const int i0 = y.first(a.p);
        Blocks z = key_blocks<N>(a.p, y.diagonal(a.p), i0, min(i0 + M, y.q_len(a.p)), y.begin(a.p),
                                 y.end(a.p));
        if (y.compare(a.p)) z.clear_end = 0;
        store_int4(to + sizeof(Span), make_int4(z.begin, z.end, z.clear_begin, z.clear_end));
        mb_arrive(x.t_full + 8 * slot);
      }
      if (head < 0) break;
    }
  }

  // Maximum of row hh of S. With fast, a three-input integer maximum, half the instructions: float
  // bits order like signed integers unless both are negative, so of a row of negative numbers the
  // result is negative, but not the maximum.
  static DI float row_max(const float (&s)[N / 2], int hh, bool fast) {
    if (fast) {
      int i[2] = {__float_as_int(s[2 * hh]), __float_as_int(s[2 * hh + 1])};
#pragma unroll
      for (int j = 1; j < N / 8; j++)
        i[j % 2] = __vimax3_s32(i[j % 2], __float_as_int(s[4 * j + 2 * hh]),
                                __float_as_int(s[4 * j + 2 * hh + 1]));
      return __int_as_float(max(i[0], i[1]));
    }
    float a = fmaxf(s[2 * hh], s[2 * hh + 1]);
#pragma unroll
    for (int j = 1; j < N / 8; j++) a = fmaxf(a, fmaxf(s[4 * j + 2 * hh], s[4 * j + 2 * hh + 1]));
    return a;
  }

  static DI void consume(const TMap& mo, const ForwardArgs& a, int cw, const Layout& x) {
    const Problem& p = a.p;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const bool elect = (threadIdx.x & 127) == 0;
    const float c = kScore ? kLog2E : a.scale;  // from what S holds to log2 units
    float o[E / 2], s[N / 2], ref[2], sum[2];
    u32 pb[N / 4], qf[kQReg ? D / 4 : 1];
    const u32 dq = desc_lo(x.q + cw * 8192, 16), dk = desc_lo(x.k, 16), dv = desc_lo(x.v, N * 128);
    int st = 0, ph = 0;  // stage and parity of the newest K block
    int t = blockIdx.x, round = 0,
        slot = 0;  // the tile, if dealt; how many there were, and where it is said which
    int w = 0, qb = 0, turn = 0;  // tiles with keys so far; the buffer of Q; turns, modulo 2
    Tile<> tile(0u);
    Blocks blocks{};
    int n = 0;  // the block
    // This warpgroup sees no more than the lower half of its first block, the upper half of its
    // last.
    bool lower = false, upper = false;
    int odd = 0;  // of keys in pages: a bit for each 16 of the block that are in no page

    // With Q in registers a tile's first product takes it from shared memory (`fresh`), and it is
    // read under that.
    auto issue_qk = [&](int st, auto part, bool fresh = false) {
      constexpr int kWidth = decltype(part)::to;
      float (&x)[kWidth / 2] = reinterpret_cast<float (&)[kWidth / 2]>(s);
      const u32 lo = dk + st * (kKBytes >> 4);
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        u64 b = desc(lo + (((k / 4) * N * 128 + (k % 4) * 32) >> 4));
        if (kQReg && !fresh)
          Wgmma<kWidth, F16>::template rs<0>(x, qf[4 * k], qf[4 * k + 1], qf[4 * k + 2],
                                             qf[4 * k + 3], b, k > 0);
        else
          Wgmma<kWidth, F16>::template ss<0, 0>(
              x, desc(dq + ((qb * kQBytes + (k / 4) * M * 128 + (k % 4) * 32) >> 4)), b, k > 0);
      }
      wg_commit();
    };
    auto issue_pv = [&](int st, auto part, bool add) {
      constexpr int kFrom = decltype(part)::from / 16, kTo = decltype(part)::to / 16;
      const u32 lo = dv + st * (kVBytes >> 4);
#pragma unroll
      for (int k = kFrom; k < kTo; k++)
        Wgmma<E, F16>::template rs<1>(o, pb[4 * k], pb[4 * k + 1], pb[4 * k + 2], pb[4 * k + 3],
                                      desc(lo + k * (2048 >> 4)), k > kFrom || add);
      wg_commit();
    };
    auto read_q = [&]() {
      const int rr = (lane & 7) + ((lane >> 3) & 1) * 8;
      const u32 ro = x.q + (cw * 64 + warp * 16 + rr) * 128;
#pragma unroll
      for (int k = 0; k < D / 16; k++)
        ldmatrix4(ro + (k / 4) * M * 128 + (((2 * (k % 4) + (lane >> 4)) ^ (rr & 7)) << 4),
                  qf[4 * k], qf[4 * k + 1], qf[4 * k + 2], qf[4 * k + 3]);
    };
    auto free_q = [&]() {  // read by all warps
      fence_async();       // by ordinary loads, before a copy
      bar_sync(kBarOut + cw, 128);
      if (elect) mb_arrive(x.q_empty);
    };
    auto advance = [&]() {
      if (++st == kStages) st = 0, ph ^= 1;
    };
    auto arrived = [&]() {  // the newest K block
      mb_wait(x.k_full + 8 * st, ph);
      if constexpr (kPage) odd = agreed(load_int(x.odd + 4 * st));
    };
    // What its results need to know of a tile once the next one is begun.
    struct Place {
      int first, b, head, n, q_len, q_end;
    };
    auto place = [&]() {
      return Place{tile.first(p), tile.b(p), tile.head(p), tile.n(p), tile.q_len(p), tile.q_end(p)};
    };
    // This thread's rows are this one and the eighth after it.
    auto row_of = [&](int first) {
      return first + ((int)threadIdx.x - 128) / 32 * 16 + (lane >> 2);
    };
    auto row = [&]() { return row_of(tile.first(p)); };
    auto sink = [&](const Place& y) {
      return p.sinks && y.n >= 0 ? p.sinks[y.b * p.sinks_b + y.head] * kLog2E : -infinity();
    };
    auto put_lse = [&](const Place& y, int hh, float value) {
      const int row = row_of(y.first) + 8 * hh, in_batch = y.q_end - y.q_len - y.b * p.s + row;
      if ((lane & 3) == 0 && row < y.q_len)
        a.lse[((long long)y.b * p.h + y.head) * p.s + in_batch] = value;
    };
    auto done = [&]() {  // nobody of this warp reads the Span any more
      if constexpr (kSpan) mb_arrive_warp(x.t_empty + 8 * slot);
      // Else the compiler takes the warp for divided from here on, and keeps no loop state or
      // matrix descriptor in uniform registers.
      __syncwarp();
    };
    // The next tile that has keys: Q and its first block of K have landed. False: there is none.
    auto take = [&]() {
#pragma unroll 1
      while (true) {
        if constexpr (kDyn) {
          slot = round & 1;
          mb_wait(x.t_full + 8 * slot, (round >> 1) & 1);
          if constexpr (kSpan) {
            if (Tile<>(x.tickets + kSlot * slot).head(p) < 0) return false;
            tile = Tile<>(x.tickets + kSlot * slot);
            blocks = tile.blocks(p);
          } else {
            const u32 at = x.tickets + kSlot * slot;
            const int4 y = load_int4(at);
            tile.dense_head = agreed(y.z);
            if (tile.dense_head < 0) return false;
            tile.dense_first = agreed(y.x), tile.dense_b = agreed(y.y);
            blocks = blocks_at(at + 16);
            if (lane == 0) mb_arrive(x.t_empty + 8 * slot);
          }
          round++;
        } else {
          if (t >= a.tiles) return false;
          tile = Tile<>(a, t);
          t = kOne ? a.tiles : t + gridDim.x;
          blocks = tile.blocks(p);
        }
        if (blocks.begin < blocks.end) break;
        // No key for any row of the tile.
        const int q_len = tile.q_len(p), q_begin = tile.q_end(p) - q_len, h = tile.head(p);
        const int first = tile.first(p) + cw * 64;
        for (int i = threadIdx.x & 127; i < 64 * p.e / 2; i += 128) {
          const int at = first + i / (p.e / 2);
          if (at < q_len)
            a.out[((long long)(q_begin + at) * p.h + h) * (p.e / 2) + i % (p.e / 2)] = 0;
        }
        const Place y = place();
        for (int hh = 0; hh < 2; hh++) put_lse(y, hh, sink(y) * kLn2);
        done();
      }
      n = blocks.end - 1;
      qb = w % kQBufs;
      mb_wait(x.q_full + 8 * qb, (w / kQBufs) & 1);
      w++;
      int seen = tile.end(p);  // keys that a row of this warpgroup sees lie before this one
      if (kMask && p.right >= 0) {
        // Blocks that only later rows of the tile see: they are handed straight back.
        const int last = min(tile.first(p) + (cw + 1) * 64, tile.q_len(p));
        seen = min(seen, last + tile.diagonal(p) + p.right);
        const int end = (seen + N - 1) / N;
#pragma unroll 1
        for (; n >= max(end, blocks.begin + 1); n--) {
          mb_wait(x.k_full + 8 * st, ph);
          mb_wait(x.v_full + 8 * st, ph);
          // All four warps must have seen this phase before it can be followed by two more: parity
          // alone cannot tell them apart, and no wgmma keeps the warps together here.
          bar_sync(kBarOut + cw, 128);
          if (elect) mb_arrive(x.k_empty + 8 * st), mb_arrive(x.v_empty + 8 * st);
          advance();
        }
      }
      lower = kHalves && seen - n * N <= kHalf;
      upper = kHalves && p.left >= 0 && n > blocks.begin &&
              tile.first(p) + cw * 64 + tile.diagonal(p) - p.left >= blocks.begin * N + kHalf;
      arrived();
      return true;
    };
    // The log-sum-exp of the tile that is finished, and what its out is multiplied by.
    Place last;
    float inv[2];
    auto finish = [&]() {
#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        float r = sum[hh];
        r += __shfl_xor_sync(~0u, r, 1);
        r += __shfl_xor_sync(~0u, r, 2);
        float top = ref[hh], keep = 1.f;
        if (p.sinks) {  // one more term in the denominator
          const float extra = sink(last);
          top = fmaxf(top, extra);
          keep = ex2(ref[hh] - top);
          r = r * keep + ex2(extra - top);
        }
        inv[hh] = r > 0.f ? keep * rcp(r) : r;  // a NaN stays one
        put_lse(last, hh, r == 0.f ? -infinity() : (top + lg2(r)) * kLn2);
      }
    };
    // Out of the tile that is finished, to its buffer in shared memory and from there, or straight
    // from the registers.
    auto stage_out = [&]() {
      pin(o);
      if constexpr (kSepO) {
        // The previous tile's must have left.
        if (elect) bulk_wait_read<0>();
        bar_sync(kBarOut + cw, 128);
        int rr = (lane & 7) + ((lane >> 3) & 1) * 8;
        u32 ro = x.o + (cw * 64 + warp * 16 + rr) * 128;
#pragma unroll
        for (int k = 0; k < E / 16; k++)
          stmatrix4(ro + (k / 4) * M * 128 + (((2 * (k % 4) + (lane >> 4)) ^ (rr & 7)) << 4),
                    pack<F16>(o[8 * k] * inv[0], o[8 * k + 1] * inv[0]),
                    pack<F16>(o[8 * k + 2] * inv[1], o[8 * k + 3] * inv[1]),
                    pack<F16>(o[8 * k + 4] * inv[0], o[8 * k + 5] * inv[0]),
                    pack<F16>(o[8 * k + 6] * inv[1], o[8 * k + 7] * inv[1]));
      } else {
        const int rows = last.q_len - row_of(last.first), to = last.q_end - rows;
#pragma unroll
        for (int hh = 0; hh < 2; hh++) {
          uint4* at = (uint4*)(a.out + ((long long)(to + 8 * hh) * p.h + last.head) * (p.e / 2)) +
                      (lane & 3);
#pragma unroll
          for (int j = 0; j < E / 32; j++) {
            u32 v[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
              v[k] = pack<F16>(o[16 * j + 4 * k + 2 * hh] * inv[hh],
                               o[16 * j + 4 * k + 2 * hh + 1] * inv[hh]);
            transpose_quad(v, lane & 3);
            if (8 * hh < rows && 32 * j + 8 * (lane & 3) < p.e)
              at[4 * j] = make_uint4(v[0], v[1], v[2], v[3]);
          }
        }
      }
    };
    auto send_out = [&]() {
      if constexpr (kSepO) {
        const int i = last.first + cw * 64, to = kSpan ? p.s - last.q_len + i : i;
        fence_async();
        bar_sync(kBarOut + cw, 128);
        if (elect) {
#pragma unroll
          for (int k = 0; k < E / 64; k++)
            if (!kSpan || (k * 64 < p.e && to < p.s))
              tma_store(&mo, x.o + k * M * 128 + cw * 8192, k * 64, to, last.head,
                        kSpan ? last.q_end : last.b);
          bulk_commit();
        }
        __syncwarp();
      }
    };
    auto mask = [&](int n) {
      const int c0 = n * N + 2 * (lane & 3);
      int row0 = row();
      asm volatile("" : "+r"(row0));  // or the bounds are kept in registers, of which there are few
      const int diagonal = tile.diagonal(p), begin = tile.begin(p), end = tile.end(p);
#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        const int at = row0 + 8 * hh + diagonal;
        int most = end, least = begin;
        if (kMask && p.right >= 0) most = min(most, at + p.right + 1);
        if (kMask && p.left >= 0) least = max(least, at - p.left);
        // By bits where ptxas does not run out of predicates, as in some of the wider rows, and
        // beside pauses.
        constexpr bool kBits = D <= 128 && !kJitter;
        const u32 seen =
            kBits ? columns_before(most - c0) & ~(kMask ? columns_before(least - c0) : 0u) : 0;
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
          const int column = c0 + i / 2 * 8 + i % 2;
          if (kBits ? !(seen >> i & 1) : column < least || column >= most)
            s[i / 2 * 4 + 2 * hh + i % 2] = -infinity();
        }
      }
      if constexpr (kPage) {
#pragma unroll
        for (int i = 0; i < N / 2; i++)
          if (odd >> (i / 8) & 1) s[i] = -infinity();
      } else if (kSpan && tile.compare(p)) {
        wg_wait<0>();
        mask_segments(s, tile.query_ids(p), row0, tile.q_len(p), tile.key_ids(p), n * N,
                      tile.k_len(p));
      }
    };
    auto transform = [&](int n) {  // what S holds, to the score in natural units
      if constexpr (kScore) {
        const Scores<F16> score(p, tile.b(p), tile.n(p), tile.head(p), tile.diagonal(p));
        const int row0 = row();
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
    // Exponents are relative to a reference: the maximum of a row's first block, until a score is
    // 2^far above it and much of the sum so far, or 2^farthest; then the maximum so far. So most
    // blocks need neither the maximum of a whole row nor a rescaled O. `moved`: a reference of
    // this warp was, and O is still to shrink.
    bool moved = false;
    float shrink[2];
    auto no_block = [&]() { ref[0] = ref[1] = kNothing, sum[0] = sum[1] = 0.f; };
    auto update_ref = [&]() {
      float top[2];
      const bool nonneg = __all_sync(~0u, (__float_as_int(ref[0]) | __float_as_int(ref[1])) >= 0);
      if (nonneg)
        top[0] = row_max(s, 0, true), top[1] = row_max(s, 1, true);
      else
        top[0] = row_max(s, 0, false), top[1] = row_max(s, 1, false);
      const float share = log2_of(fminf(sum[0], sum[1])) + kShare;
      const float above = fmaxf(top[0] * c - ref[0], top[1] * c - ref[1]);
      moved = __any_sync(~0u, above > fmaxf(a.far, fminf(share, a.farthest)));
      if (!moved) return;
#pragma unroll
      for (int i = 1; i < 3; i++)
#pragma unroll
        for (int hh = 0; hh < 2; hh++) top[hh] = fmaxf(top[hh], __shfl_xor_sync(~0u, top[hh], i));
#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        float now = fmaxf(top[hh] * c, ref[hh]);
        if (now < 0.f && now >= -kNear) now += kNear;
        shrink[hh] = ex2(ref[hh] - now);
        sum[hh] *= shrink[hh];
        ref[hh] = now;
      }
    };
    auto exponentials = [&]() {  // and row sums, which trail by kLag chunks
#pragma unroll
      for (int j = 0; j < kChunks + kLag; j++) {
        if (j < kChunks) {
#pragma unroll
          for (int i = 0; i < 4; i++) s[4 * j + i] = ex2(s[4 * j + i] * c - ref[i / 2]);
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
    auto softmax = [&](bool first) {
      transform(n);
      if ((kMask || first) && (odd || blocks.masked(n))) mask(n);
      update_ref();
      exponentials();
    };
    auto free_k = [&]() {
      if (elect) mb_arrive(x.k_empty + 8 * st);
    };

    // Tiles of one block let the warpgroup before arrive for the next turn while some warps of this
    // one have yet to arrive for their own, and a barrier counts threads, whoever they are. So
    // turns take two in turn: nobody is two turns ahead, for that takes a stage of K that is handed
    // back after this one's product with it.
    auto turn_of = [&](int cw) { return kBarTurn + 2 * cw + turn; };
    auto rescale = [&]() {
      if (moved) {
#pragma unroll
        for (int i = 0; i < E / 2; i++) o[i] *= shrink[i / 2 % 2];
      }
    };
    int sv = 0, pv = 0;  // where V of P is: PV lags QK by one block
    bool owed = false;   // O is of the tile before that of P, and leaves before P V
    auto next = [&]() {
      sv = st, pv = ph;
      advance();
    };
    // S of a block, and under its softmax P V of the block before. That may be a tile's second,
    // under whose S the tile before leaves, or its first, under whose softmax the tile before ends.
    enum : int { kSteady, kSecond, kTurn };
    using Whole = Part<0, N>;
    using Lower = Part<0, kHalf>;
    using Upper = Part<N - kHalf, N>;
    auto step = [&](auto keys, auto values, auto kind) {
      constexpr int kKind = decltype(kind)::value;
      if (kStagger && kKind == kTurn && cw > 0) bar_sync(turn_of(cw), 256);
      pin(s), pin(o);
      wg_fence();
      issue_qk(st, keys, kKind == kTurn);
      if (kKind == kSecond && owed) stage_out();
      mb_wait(x.v_full + 8 * sv, pv);
      wg_fence();
      issue_pv(sv, values, kKind == kSteady || !owed);
      if (kKind == kSecond && owed) send_out();
      if (kKind == kTurn) {
        if (kStagger && cw + 1 < kGroups) bar_arrive(turn_of(cw + 1), 256);
        if constexpr (kQReg) read_q();
        finish(), no_block();
      }
      wg_wait<1>();
      pin(s);
      free_k();
      if (kQReg && kKind == kTurn) free_q();
      softmax(kKind == kTurn);
      // Else ptxas moves exponentials below the wait. It cannot see that this is never negative.
      sched_fence((__float_as_int(sum[0]) | __float_as_int(sum[1])) & p.s, x.q_full);
      wg_wait<0>();
      pin(o);
      if (elect) mb_arrive(x.v_empty + 8 * sv);
      to_p();
      n--;
      if (kKind == kTurn) moved = false, turn ^= 1;
    };

    bool more = take();
#pragma unroll 1
    while (more) {
      // The first block: nothing overlaps.
      pin(s);
      wg_fence();
      issue_qk(st, Whole{}, true);
      if constexpr (kQReg) read_q();
      wg_wait<0>();
      pin(s);
      free_k();
      if (kQReg) free_q();
      no_block();
      softmax(true);
      to_p();
      n--;
#pragma unroll
      for (int i = 0; i < E / 2; i++) o[i] = 0.f;
      lower = moved = false;
#pragma unroll 1
      while (true) {
        if (!kAhead || n >= blocks.begin) {
          if (kAhead && !kMerge) {
            next();
            arrived();
            // Branches that each wait for what they issue: ptxas loses track of a product that only
            // some paths have under way.
            if (lower)
              step(Whole{}, Lower{}, Number<kSecond>{});
            else
              step(Whole{}, Whole{}, Number<kSecond>{});
            owed = false;
          }
#pragma unroll 1
          while (n >= blocks.begin) {
            rescale();
            next();
            arrived();
            step(Whole{}, Whole{}, Number<kMerge ? kSecond : kSteady>{});
            owed = false;
          }
          rescale();
        } else if (owed) {
          stage_out(), send_out();
        }
        if (!kQReg && elect) mb_arrive(x.q_empty + 8 * qb);  // the last QK has read Q
        if (!kAhead) break;
        const bool was_upper = upper;
        last = place();
        done();
        next();
        if (!take()) break;
        if (was_upper)
          lower = false, step(Whole{}, Upper{}, Number<kTurn>{});
        else if (lower)
          step(Lower{}, Whole{}, Number<kTurn>{});
        else
          step(Whole{}, Whole{}, Number<kTurn>{});
        owed = true;
      }
      if (!kAhead) sv = st, pv = ph;
      mb_wait(x.v_full + 8 * sv, pv);
      pin(o);
      wg_fence();
      issue_pv(sv, Whole{}, !kAhead || !owed);
      if (!kAhead) last = place(), done();
      finish();
      wg_wait<0>();
      if (elect) mb_arrive(x.v_empty + 8 * sv);
      stage_out(), send_out();
      if constexpr (kOne || kAhead) break;
      advance();
      more = take();
    }
    // What is still on its way arrives before the grid has ended.
    if (elect) bulk_wait_read<0>();
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
