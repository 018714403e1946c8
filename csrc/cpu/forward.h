// The forward pass on one tile of rows: for every block of keys S = K Q^T, the online softmax down
// the columns, and O^T += V^T P. K and V are read through a packed copy of the block, so that
// neither the cache's layout (pages, padding) nor what lies beyond the valid keys reaches the
// arithmetic.
#pragma once

namespace flashjax::cpu {
namespace {

template <class As>
struct Forward {
  const FwdParams& p;
  int64_t keys, d, e;  // d in elements of the micro-kernels
  Tile tile;
  Keys<As> block_keys, all_keys;
  // q [panels][d, width], o [panels][e, width], s [keys, width]
  float *q, *o, *s;
  float *most, *sum, *alpha, *flat;

  // With packed keys in the task, its own blocks of keys stay unused.
  Forward(const FwdParams& p, const Blocks& blocks, const Task& task, Arena arena,
          int64_t* used = nullptr)
      : p(p),
        keys(blocks.keys),
        d(elements<As>(p.d)),
        e(p.e),
        tile(p, blocks, arena),
        block_keys(p, false, keys, arena),
        all_keys(packed(p, task)) {
    q = arena.take(blocks.rows * round_up(d, kLanes));
    o = arena.take(blocks.rows * round_up(e, kLanes));
    s = arena.take(keys * kPanel);
    most = arena.take(blocks.rows), sum = arena.take(blocks.rows), alpha = arena.take(kPanel);
    flat = arena.take(kPanel * imax(round_up(d, kLanes), round_up(e, kLanes)));
    if (used) *used = arena.used;
  }

  static Keys<As> packed(const Problem& p, const Task& task) {
    Arena arena{task.packed};
    return Keys<As>(p, false, task.packed_count, arena);
  }

  float* panel_q(int64_t x) const { return q + x * kPanel * round_up(d, kLanes); }
  float* panel_o(int64_t x) const { return o + x * kPanel * round_up(e, kLanes); }

  void start(const Task& task) {
    tile.set(task);
    for (int64_t m = 0; m < round_up(tile.rows, kLanes); ++m) most[m] = -infinity(), sum[m] = 0;
  }

  void clear() {
    for (int64_t x = 0; x < tile.panels; ++x)
      memset(panel_o(x), 0, e * tile.width(x) * sizeof(float));
  }

  void run() {
    clear();
    for (int64_t x = 0; x < tile.panels; ++x) {
      int64_t w = tile.width(x), ld = round_up(d, kLanes);
      As::pack(
          p.dtype, w, p.d,
          [&](int64_t m) -> const char* {
            m += x * kPanel;
            return m < tile.rows ? element(p.q, p.dtype, tile.query_row(m) * p.d) : nullptr;
          },
          flat, ld);
      transpose(flat, ld, d, panel_q(x), w);
    }
    Range seen = tile.seen();
    for (int64_t j = seen.begin; j < seen.end; j += keys) {
      KeyBlock block = tile.block(j, imin(j + keys, seen.end));
      bool ready = false;
      for (int64_t x = 0; x < tile.panels; ++x) {
        Range r = tile.columns(x, block);
        Tile::Meet meet = tile.meet(x, block);
        if (r.begin == r.end || meet == Tile::Meet::kNone) continue;
        if (!ready && !tile.task.packed) {
          block_keys.origin = j;
          block_keys.pack(tile.task, tile.z, j, block.j1);
        }
        ready = true;
        if (tile.task.packed) fetch(x, block.j1, seen.end);
        step(x, r, meet);
      }
    }
  }

  // Asks for this panel's share of the keys after j: the micro-kernels walk several rows side by
  // side, which the hardware does not foresee.
  void fetch(int64_t x, int64_t j, int64_t end) const {
    int64_t next = imin(j + keys, end) & ~int64_t{1};
    if (next <= j) return;
    auto touch = [&](const float* from, const float* to) {
      int64_t share = (to - from + tile.panels - 1) / tile.panels;
      for (int64_t i = 0; i < share; i += 16) __builtin_prefetch(from + x * share + i, 0, 2);
    };
    touch(all_keys.k_at(j), all_keys.k_at(next));
    touch(all_keys.v_deep_at(j), all_keys.v_deep_at(next));
  }

  void step(int64_t x, Range r, Tile::Meet meet) {
    using Op = typename As::Op;
    const Keys<As>& from = tile.task.packed ? all_keys : block_keys;
    int64_t w = tile.width(x), n = r.end - r.begin;
    gemm<Op, false>({n, w, d, from.k_at(r.begin), d, panel_q(x), w, s, w, Into::kStore});
    float c = tile.transform(x, r.begin, r.end, s, nullptr);
    tile.mask(x, r.begin, r.end, meet, s);
    softmax(x, n, w, c);
    gemm<Op, true>({e, w, n / As::kDepth, from.v_deep_at(r.begin), e, s, w, panel_o(x), w,
                    Into::kScaleAdd, alpha});
  }

  // Turns the scores of n keys into weights relative to the greatest score so far, as elements of
  // As.
  void softmax(int64_t x, int64_t n, int64_t w, float c) {
    using S = Simd;
    const S::F factor = S::set(c), none = S::set(-infinity());
    for (int64_t l = 0; l < w; l += kLanes) {
      float* column = s + l;
      S::F top0 = none, top1 = none;
      for (int64_t j = 0; j < n; j += 2) {
        top0 = S::max(top0, S::load(column + j * w));
        top1 = S::max(top1, S::load(column + (j + 1) * w));
      }
      int64_t m = x * kPanel + l;
      S::F old = S::load(most + m);
      S::F now = S::max(old, S::mul(S::max(top0, top1), factor));
      // A row that has seen nothing yet: any finite shift will do.
      S::F shift = S::select(S::less(now, S::set(-3.4e38f)), S::zero(), now);
      S::F back = exp2(S::sub(old, shift));
      S::F total0 = S::zero(), total1 = S::zero();
      S::F minus = S::sub(S::zero(), shift);
      for (int64_t j = 0; j < n; j += 2) {
        S::F p0 = exp2_to<As::kDepth == 2>(S::fma(S::load(column + j * w), factor, minus));
        S::F p1 = exp2_to<As::kDepth == 2>(S::fma(S::load(column + (j + 1) * w), factor, minus));
        total0 = S::add(total0, p0), total1 = S::add(total1, p1);
        if constexpr (As::kDepth == 2) {
          // Row j / 2 has been read already.
          S::store(column + j / 2 * w, As::Op::zip(p0, p1));
        } else {
          S::store(column + j * w, p0);
          S::store(column + (j + 1) * w, p1);
        }
      }
      S::store(most + m, now);
      S::store(sum + m, S::fma(S::load(sum + m), back, S::add(total0, total1)));
      S::store(alpha + l, back);
    }
  }

  // A partial result: most and sum of all rows, then o of the panels.
  void save(float* partial) const {
    int64_t n = round_up(tile.rows, kLanes);
    memcpy(partial, most, n * sizeof(float));
    memcpy(partial + n, sum, n * sizeof(float));
    partial += 2 * n;
    for (int64_t x = 0; x < tile.panels; ++x) {
      int64_t size = e * tile.width(x);
      memcpy(partial, panel_o(x), size * sizeof(float));
      partial += size;
    }
  }

  void merge(const float* partial) {
    using S = Simd;
    int64_t n = round_up(tile.rows, kLanes);
    const float* other_o = partial + 2 * n;
    for (int64_t x = 0; x < tile.panels; ++x) {
      int64_t w = tile.width(x);
      for (int64_t l = 0; l < w; l += kLanes) {
        int64_t m = x * kPanel + l;
        S::F mine = S::load(most + m), other = S::load(partial + m);
        S::F now = S::max(mine, other);
        S::F shift = S::select(S::less(now, S::set(-3.4e38f)), S::zero(), now);
        S::F a = exp2(S::sub(mine, shift)), b = exp2(S::sub(other, shift));
        S::store(most + m, now);
        S::store(sum + m, S::fma(S::load(sum + m), a, S::mul(S::load(partial + n + m), b)));
        for (int64_t i = 0; i < e; ++i) {
          float* to = panel_o(x) + i * w + l;
          S::F add = S::load(other_o + i * w + l);
          // Nothing seen there: its sums may be 0 * NaN.
          add = S::select(S::less(other, S::set(-3.4e38f)), S::zero(), add);
          S::store(to, S::fma(S::load(to), a, S::mul(add, b)));
        }
      }
      other_o += e * w;
    }
  }

  void finish() {
    int64_t ld = round_up(e, kLanes);
    for (int64_t x = 0; x < tile.panels; ++x) {
      int64_t w = tile.width(x);
      transpose_back(panel_o(x), w, flat, ld);
      for (int64_t l = 0; l < w && x * kPanel + l < tile.rows; ++l) {
        int64_t m = x * kPanel + l, head = tile.head(m);
        float top = most[m] * kLn2, total = sum[m], lse = -infinity();
        bool any = !(total == 0);  // NaN passes
        if (any) lse = top + logf(total);
        float scale = 1 / total;
        if (p.sinks) {
          const int64_t* stride = p.sinks_shape.stride;
          float sink = p.sinks[tile.task.b * stride[0] + head * stride[1]];
          // exp(lse) + exp(sink), from the greater.
          float high = sink > lse ? sink : lse, low = sink > lse ? lse : sink;
          float with = low == -infinity() ? high : high + log1pf(expf(low - high));
          scale *= any ? expf(lse - with) : 0;
          lse = with;
        }
        char* to = element(p.out, p.dtype, tile.query_row(m) * p.e);
        if (any)
          store_row(p.dtype, flat + l * ld, p.e, scale, to);
        else
          memset(to, 0, p.e * bytes_of(p.dtype));
        p.lse[tile.lse_index(m)] = lse;
      }
    }
  }

  // y [width, ld] = the transpose of x [e, width].
  void transpose_back(const float* x, int64_t w, float* y, int64_t ld) const {
    for (int64_t i = 0; i < e; i += kLanes)
      for (int64_t l = 0; l < w; l += kLanes) Simd::transpose(x + i * w + l, w, y + l * ld + i, ld);
  }
};

}  // namespace
}  // namespace flashjax::cpu
