// The list of key tiles that decoding is cut from, and the way back: which tiles a CTA works on,
// and how the parts of a head are put together.
#pragma once
#include "../../attention/sequence.h"
#include "pages.cuh"
#include "problem.cuh"

namespace flashjax::sm90 {

// A head whose tiles several CTAs have: its partial results are in slots first, next, next + 1, ...
// With less than two parts there is nothing to put together.
struct Joint {
  int head;  // over [b, heads]
  int first, next, parts;
};

struct DecodeArgs {
  flashjax::Problem p;
  Pages pages;
  u32* out;
  float* lse;
  // A block of queries is `block_heads` query heads of a key head by `block_queries` queries, heads
  // innermost. `cluster` CTAs work on as many blocks of a key head together.
  int block_heads, block_queries, cluster;
  int head_blocks, blocks;      // blocks of a query; of a key head, those of a cluster counted once
  int heads;                    // g * blocks: what the list calls a head
  int ratio;                    // h / g
  int bucket;                   // sequences whose tiles a lane sums
  int queries, most_q, most_k;  // s, and what a sequence has at most
  // With k + 1 parts of each head: the most that a CTA gets; 0: they are too many.
  int rounds[4];
  Divider by_blocks, by_block_heads, by_head_blocks, by_heads;
  int splits;       // parts of every head; 0: equal shares of the list
  bool by_head;     // heads are fewer than CTAs
  int team;         // groups of threads that put one row together: 1, or all of a block
  int left, right;  // the window; -1: unbounded. At most 2^29
  // Workspace, with r = cluster * block_heads * block_queries rows:
  Joint* joints;    // if splits == 0: [b, heads] where by_head, else [grid], by the first CTA
  float* part_lse;  // [slots, r], base 2
  float* part_out;  // [slots, r, E]
  FLASHJAX_HD int rows() const { return block_heads * block_queries; }  // of a block
};

// Row r of the block that CTA `rank` of a cluster has: which query and query head it is.
struct Row {
  int i, h;
  bool live;
};
DI Row row_of(const DecodeArgs& a, int head, int r, int rank = 0) {
  const int hk = a.by_blocks(head), block = (head - hk * a.blocks) * a.cluster + rank;
  const int q = a.by_block_heads(r);
  const int qb = a.by_head_blocks(block), hb = block - qb * a.head_blocks;
  const int x = hb * a.block_heads + r - q * a.block_heads;
  const int i = qb * a.block_queries + q;
  return {i, hk * a.ratio + x, q < a.block_queries && i < a.p.s && x < a.ratio};
}

// The keys of batch row b, counted from the first that its pages or its entry hold: those that some
// query sees, the tiles of N that hold them, and those tiles that need no mask.
struct Keys {
  int begin, end, first, tiles, clear_begin, clear_end;
  int base, count, q_len, diagonal;  // keys of the sequence: base to base + count; as in sequence.h
  DI Keys() {}
  // As in sequence.h, in 32 bits: the way to the first keys is part of every call.
  DI Keys(const DecodeArgs& a, int b, u32 n, bool early = false) {
    const flashjax::Problem& p = a.p;
    auto given = [&](const int* x, int otherwise) {
      return x ? read_int(x + b, early) : otherwise;
    };
    const int used_q = given(p.seqused_q, a.most_q), used_k = given(p.seqused_k, a.most_k);
    const int pad = given(p.leftpad, 0), entry = given(p.batch_idx, 0), shift = given(p.shift, 0);
    auto limit = [](int y, int most) { return max(0, min(y, most)); };
    q_len = limit(used_q, a.most_q), count = limit(used_k, a.most_k);
    base = limit(pad, count), count -= base;
    if ((u32)entry >= (u32)a.pages.count && p.batch_idx) count = 0;
    constexpr int kFar = 1 << 30;
    diagonal = (p.top_left ? 0 : count - q_len) + max(-kFar, min(shift, kFar));
    diagonal = max(-kFar, min(diagonal, kFar));
    // What some query sees, and what all do.
    int some_begin = 0, all_begin = 0, some_end = count, all_end = count;
    if (a.left >= 0) {
      some_begin = limit(diagonal - a.left, count);
      all_begin = limit(q_len - 1 + diagonal - a.left, count);
    }
    if (a.right >= 0) {
      some_end = limit(q_len + diagonal + a.right, count);
      all_end = limit(1 + diagonal + a.right, count);
    }
    begin = base + some_begin, end = base + max(some_begin, some_end);
    first = (u32)begin / n, tiles = q_len > 0 && end > begin ? (u32)(end + n - 1) / n - first : 0;
    clear_begin = (u32)(base + all_begin + n - 1) / n;
    clear_end = q_len < a.queries ? 0 : (u32)(base + max(all_begin, all_end)) / n;
  }
  // Those that query i sees.
  DI void seen(const DecodeArgs& a, int i, int& from, int& to) const {
    const int at = i + diagonal;
    from = base + (a.left < 0 ? 0 : max(0, at - a.left));
    to = base + (a.right < 0 ? count : min(count, at + a.right + 1));
    if (i >= q_len) to = 0;
  }
};

// A CTA's work: tiles [n0, n1) of one head of batch row b. Handed to the consumers in shared
// memory; n0 = n1 is the end.
struct Piece {
  Keys keys;
  int b, head, n0, n1;
  int slot;  // of the partial result; -1: these are all tiles of the head
};

// The next piece that is handed over, which stays until the second after it.
DI const Piece& receive(const Piece* handed, u32 full, int& phase) {
  mb_wait(full, phase);
  const Piece& piece = handed[phase];
  phase ^= 1;
  return piece;
}

// The boxes of a piece's keys, in tiles of kKeys, that a producer warp brings: of each tile a lane
// has one, or several.
template <int kKeys>
struct Boxes {
  const Pages& pages;
  int count;              // of a tile
  int b, n1, begin, end;  // row of the batch; the tile after the last; keys
  // Where a box of tile n is, for `found`: asked for a tile ahead.
  DI Place look(int n, int box, bool early = false) const {
    const int key = n * kKeys + box * pages.box;
    if (n >= n1 || box >= count || key >= end || key + pages.box <= begin) return {0, -1};
    return ask_place(pages, b, key, early);
  }
  // -2: nothing of use.
  DI Place found(const Place& x) const { return x.row < 0 ? Place{-2, 0} : checked(pages, x); }
  // How many of tile n are there to be loaded; this lane's first is at `own`. `odd`: one is in a
  // page that does not exist.
  DI int live(int n, const Place& own, bool& odd) const {
    int live = __popc(__ballot_sync(~0u, own.good()));
    odd = __any_sync(~0u, own.page == -1);
    // Pages of so few keys that 32 boxes are not enough for a tile are slow, and right.
#pragma unroll 1
    for (int i = 32; i < count; i += 32) {
      const Place more = found(look(n, i + (threadIdx.x & 31)));
      live += __popc(__ballot_sync(~0u, more.good()));
      odd |= __any_sync(~0u, more.page == -1);
    }
    return live;
  }
};

// Scores are not just scaled: what `finish` leaves is then in natural units, else to be scaled yet.
DI bool is_bent(const flashjax::Problem& p) {
  return p.softcap != 0.f || p.alibi_slopes || !(p.scale > 0.f);
}

DI float sink(const DecodeArgs& a, int b, int h) {
  return a.p.sinks[b * a.p.sinks_shape.stride[0] + h];
}

// What a row of P V is multiplied by in the end, and its log-sum-exp, base 2. From its maximum and
// its sum.
struct End {
  float inv, lse;
};
DI End end_of(const DecodeArgs& a, const Piece& piece, const Row& row, float top, float l) {
  float keep = 1.f;
  if (a.p.sinks && piece.slot < 0) {  // one more term in the denominator
    const float sunk = sink(a, piece.b, row.h) * kLog2E, most = fmaxf(top, sunk);
    if (most != -infinity()) {
      keep = ex2(top - most), l = l * keep + ex2(sunk - most);
      top = most;
    }
  }
  // A NaN stays one.
  return {l > 0.f ? keep / l : l, l == 0.f ? -infinity() : top + lg2(l)};
}

// The list in tiles of N keys. With kCluster > 1 that many CTAs have a share together.
template <int N, int kCluster = 1>
struct List {
  // Calls f() for each piece that this CTA has to do, which is in x then. By one warp: x lives in
  // shared memory, where all lanes write the same. Also writes the joints. `early`, while the
  // kernel before still runs: only for the first piece, which is a guess, and nothing else is
  // written.
  template <class F>
  static DI void walk(const DecodeArgs& a, Piece& x, bool early, F f) {
    const int cta = blockIdx.x / kCluster, ctas = gridDim.x / kCluster;
    const int lane = threadIdx.x & 31, n = (int)a.p.b;
    int splits = a.splits, sum = 0, before = 0, all = 0, shares = 0;
    if (!splits) {
      if (!a.by_head && !early) a.joints[cta] = {0, 0, 0, 0};
      // A lane sums the tiles of the sequences of one bucket.
      int most = 0;
#pragma unroll 1
      for (int i = lane * a.bucket; i < min(n, (lane + 1) * a.bucket); i++) {
        const int tiles = Keys(a, i, N, early).tiles;
        sum += tiles, most = max(most, tiles);
      }
      most = __reduce_max_sync(~0u, most);
      before = sum *= a.heads;
#pragma unroll
      for (int k = 1; k < 32; k *= 2) {
        const int y = __shfl_up_sync(~0u, before, k);
        if (lane >= k) before += y;
      }
      all = __shfl_sync(~0u, before, 31), shares = min(ctas, all);  // no share is empty
      // Heads as a whole, or a few parts of each, where that is nearly as even: less to put
      // together.
#pragma unroll
      for (int parts = 4; parts; parts--)
        if (a.rounds[parts - 1] &&
            (long long)a.rounds[parts - 1] * ((u32)(most + parts - 1) / parts) * shares * 25 <=
                all * 26ll)
          splits = parts;
    }
    // Both ways are one loop, for f() is long.
    const int items = splits * n * a.heads;
    int item = cta, b = -1, tiles = 0, t = 0, t1 = 0, at = 0, each = 0, more = 0;
    if (!splits) {
      if (cta >= shares) return;
      before -= sum;
      // The first `more` shares have a tile more than the others.
      each = (u32)all / (u32)shares, more = all - each * shares;
      t = cta * each + min(cta, more), t1 = t + each + (cta < more);
      const int bucket = __popc(__ballot_sync(~0u, before <= t)) - 1;  // the last that begins by t
      at = __shfl_sync(~0u, before, bucket);  // where sequence b + 1 begins
      b = bucket * a.bucket - 1;
    }
#pragma unroll 1
    while (splits ? item < items : t < t1) {
      if (splits) {
        const int head = splits == 1 ? item : (u32)item / (u32)splits, part = item - head * splits;
        const int last = b;
        b = a.by_heads(head);
        __syncwarp();
        if (b != last) x.keys = Keys(a, b, N, early), x.b = b;
        __syncwarp();
        tiles = x.keys.tiles;
        const int parts = min(splits, tiles), slot = item;
        item += ctas;
        if (part >= parts) continue;
        const int some = parts == 1 ? tiles : (u32)tiles / (u32)parts, rest = tiles - some * parts;
        x.head = head - b * a.heads, x.n0 = x.keys.first + part * some + min(part, rest);
        x.n1 = x.n0 + some + (part < rest);
        x.slot = parts == 1 ? -1 : slot;
        if (part == 0 && a.by_head && !early) a.joints[head] = {head, slot, slot + 1, parts};
      } else {
        __syncwarp();
        if (t >= at) {
          x.keys = Keys(a, ++b, N, early), x.b = b;
          __syncwarp();
          tiles = x.keys.tiles, at += tiles * a.heads;
          continue;
        }
        const int left = at - t,
                  heads = (u32)(left + tiles - 1) / (u32)tiles;  // in tiles, in heads
        const int n0 = heads * tiles - left, n1 = min(tiles, n0 + t1 - t), head = a.heads - heads;
        x.head = head, x.n0 = x.keys.first + n0, x.n1 = x.keys.first + n1;
        x.slot = n1 - n0 == tiles ? -1 : n0 ? cta : ctas + cta;
        if (n0 == 0 && (n1 < tiles || a.by_head) && !early) {
          // As far as the CTA that has the last tile.
          const int end = t + tiles - 1, grown = more * (each + 1);
          const int last =
              end < grown ? (u32)end / (u32)(each + 1) : more + (u32)(end - grown) / (u32)each;
          const int at_head = b * a.heads + head;
          a.joints[a.by_head ? at_head : cta] = {at_head, ctas + cta, cta + 1, last - cta + 1};
        }
        t += n1 - n0;
      }
      f();
      if (early) return;
    }
  }

  // The results of batch rows where no query sees a key, by the threads that have nothing to do.
  static DI void without_keys(const DecodeArgs& a, int threads) {
    const int rows = (int)(a.p.s * a.p.h), pairs = (int)a.p.e / 2;
    for (int64_t b = blockIdx.x; b < a.p.b; b += gridDim.x) {
      if (Keys(a, (int)b, N).tiles) continue;
      if (a.by_head && !a.splits)
        for (int i = threadIdx.x - 32; i < a.heads; i += threads)
          a.joints[b * a.heads + i] = {0, 0, 0, 0};
      for (int64_t i = threadIdx.x - 32; i < (int64_t)rows * pairs; i += threads)
        a.out[b * rows * pairs + i] = 0;
      for (int i = threadIdx.x - 32; i < rows; i += threads)
        a.lse[b * rows + i] = a.p.sinks ? sink(a, (int)b, i / (int)a.p.s) : -infinity();
    }
  }

  // Scores of kKeys keys from j0: bent, and -inf where a query does not see a key. A thread has
  // rows r0 and r0 + 8.
  template <int kKeys>
  static DI void finish(float (&s)[kKeys / 2], const DecodeArgs& a, const Piece& piece, bool bent,
                        bool masked, int odd, int j0, int r0, int rank = 0) {
    const flashjax::Problem& p = a.p;
    const Keys& k = piece.keys;
    const int lane = threadIdx.x & 31;
    if (bent) {
      const float inv_cap = p.softcap != 0.f ? 1.f / p.softcap : 0.f;
#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        const Row row = row_of(a, piece.head, r0 + 8 * hh, rank);
        const int near = k.base + row.i + k.diagonal - j0 - 2 * (lane & 3);
        float slope = 0.f;
        if (p.alibi_slopes && row.live)
          slope = p.alibi_slopes[piece.b * p.alibi_shape.stride[0] + row.h];
#pragma unroll
        for (int j = 0; j < kKeys / 8; j++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float y = s[4 * j + 2 * hh + i] * p.scale;
            if (p.softcap != 0.f) y = p.softcap * tanh_ex2(y * inv_cap);
            s[4 * j + 2 * hh + i] = y - slope * fabsf((float)(8 * j + i - near));
          }
      }
    }
    if (masked) {
#pragma unroll
      for (int hh = 0; hh < 2; hh++) {
        int from, to;
        k.seen(a, row_of(a, piece.head, r0 + 8 * hh, rank).i, from, to);
        from -= j0 + 2 * (lane & 3), to -= j0 + 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < kKeys / 8; j++)
#pragma unroll
          for (int i = 0; i < 2; i++)
            if (8 * j + i < from || 8 * j + i >= to) s[4 * j + 2 * hh + i] = -infinity();
      }
    }
    if (odd) {
#pragma unroll
      for (int w = 0; w < kKeys / 32; w++) {
        const u32 dead = dead_keys(a, piece.b, k, j0 + 32 * w, true) >> (2 * (lane & 3));
#pragma unroll
        for (int i = 0; i < 16; i++)
          if (dead >> ((i / 4) * 8 + (i & 1)) & 1) s[16 * w + i] = -infinity();
      }
    }
  }

  // A bit for each of 32 keys that nobody may see.
  static DI u32 dead_keys(const DecodeArgs& a, int b, const Keys& k, int j0, bool odd) {
    const int j = j0 + (int)(threadIdx.x & 31);
    bool dead = j < k.begin || j >= k.end;
    if (odd && !dead) dead = !place(a.pages, b, j).good();
    return __ballot_sync(~0u, dead);
  }
};

// Puts the parts of a head together. A group of E / 4 threads goes through parts of one row; the
// groups of a block work on rows of their own, or as a team on the parts of one.
template <bool F16, int E, int N>
__global__ void __launch_bounds__(128) combine_kernel(const __grid_constant__ DecodeArgs a) {
  constexpr int kLanes = E / 4, kGroups = 128 / kLanes, kLoads = 8;
  __shared__ float tops[kGroups], sums[kGroups];
  __shared__ float4 outs[kGroups][kLanes];
  const int x = threadIdx.x % kLanes, group = threadIdx.x / kLanes, team = a.team;
  const int r = blockIdx.y * (kGroups / team) + group / team, rows = a.cluster * a.rows();
  pdl_launch();
  pdl_wait();
  Joint joint;
  if (a.splits) {
    const int head = blockIdx.x, parts = min(a.splits, Keys(a, head / a.heads, N).tiles);
    joint = {head, head * a.splits, head * a.splits + 1, parts};
  } else {
    joint = a.joints[blockIdx.x];
  }
  if (joint.parts < 2) return;
  const int b = joint.head / a.heads;
  const int rank = r / a.rows();
  const Row row = row_of(a, joint.head - b * a.heads, r - rank * a.rows(), rank);
  const int parts = row.live && r < rows ? joint.parts : 0;
  float m = -infinity(), l = 0.f;
  float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int i0 = group % team; i0 < parts; i0 += team * kLoads) {
    float w[kLoads];
    float4 y[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      const int i = i0 + u * team;
      const int64_t at = (int64_t)(i ? joint.next + i - 1 : joint.first) * rows + r;
      w[u] = i < parts ? __ldcg(a.part_lse + at) : -infinity();
      y[u] = i < parts ? __ldcg((const float4*)(a.part_out + at * E) + x)
                       : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    float top = m;
#pragma unroll
    for (int u = 0; u < kLoads; u++) top = fmaxf(top, w[u]);
    const float safe = top == -infinity() ? 0.f : top, f = ex2(m - safe);
    m = top, l *= f;
    acc.x *= f, acc.y *= f, acc.z *= f, acc.w *= f;
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      const float e = ex2(w[u] - safe);
      l += e;
      acc.x += e * y[u].x, acc.y += e * y[u].y, acc.z += e * y[u].z, acc.w += e * y[u].w;
    }
  }
  if (x == 0) tops[group] = m, sums[group] = l;
  outs[group][x] = acc;
  __syncthreads();
  if (group % team || !row.live || r >= rows) return;
  const float sunk = a.p.sinks ? sink(a, b, row.h) * kLog2E : -infinity();
  float top = sunk;
#pragma unroll 1
  for (int i = group; i < group + team; i++) top = fmaxf(top, tops[i]);
  const float safe = top == -infinity() ? 0.f : top;
  l = ex2(sunk - safe), acc = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int i = group; i < group + team; i++) {
    const float f = ex2(tops[i] - safe);
    const float4 y = outs[i][x];
    l += f * sums[i];
    acc.x += f * y.x, acc.y += f * y.y, acc.z += f * y.z, acc.w += f * y.w;
  }
  const float inv = l > 0.f ? 1.f / l : l;  // a NaN stays one
  const int64_t at = ((int64_t)b * a.p.s + row.i) * a.p.h + row.h;
  if (4 * x < a.p.e)
    ((uint2*)(a.out + at * (a.p.e / 2)))[x] =
        make_uint2(pack<F16>(acc.x * inv, acc.y * inv), pack<F16>(acc.z * inv, acc.w * inv));
  if (x == 0)
    a.lse[((int64_t)b * a.p.h + row.h) * a.p.s + row.i] =
        l == 0.f ? -infinity() : (safe + lg2(l)) * kLn2;
}

}  // namespace flashjax::sm90
