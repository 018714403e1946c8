// The backward pass on some rows of one key head: for every block of keys P = exp(S - lse), dP = V
// dO^T, dS = P (dP - delta), then dV += P^T dO, dK += dS^T Q and dQ += dS K: five products, each
// block of scores computed once. Scores lie transposed, [keys, width], as in the forward pass; dK
// and dV are summed in float32 outside the scratch.
#pragma once

namespace flashjax::cpu {
namespace {

template <class As>
struct Backward {
  const BwdParams& p;
  int64_t keys, d, e, wide_d, wide_e;  // d and e in elements; as rows of vectors
  Tile tile;
  Keys<As> block_keys, all_keys;
  bool packed;  // all_keys is in use, not block_keys
  // q_in, do_in [panels][d or e, width]; q_out, do_out [panels][width, wide]: contracted over d or
  // e, and over rows.
  float *q_in, *q_out, *do_in, *do_out, *dq;
  float *s, *ds, *slopes;  // [panels][keys, width]; slopes of one panel
  // The same as elements: [panels][keys, width] twice, and contracted over keys.
  float *p_flat, *ds_flat, *ds_deep;
  float *lse, *delta, *flat, *dbias_rows;

  static constexpr bool kPairs = As::kDepth == 2;

  // `count`: as many keys are packed at the start of the task, not block by block; 0: none.
  Backward(const BwdParams& p, const Blocks& blocks, int64_t count, Arena arena,
           int64_t* used = nullptr)
      : p(p),
        keys(blocks.keys),
        d(elements<As>(p.d)),
        e(elements<As>(p.e)),
        wide_d(round_up(p.d, kLanes)),
        wide_e(round_up(p.e, kLanes)),
        tile(p, blocks, arena),
        block_keys(p, true, count ? 0 : keys, arena),
        all_keys(p, true, count, arena),
        packed(count > 0) {
    int64_t rows = blocks.rows, deep = rows / As::kDepth;
    int64_t panels = (rows + kPanel - 1) / kPanel;
    q_in = arena.take(rows * round_up(d, kLanes)), do_in = arena.take(rows * round_up(e, kLanes));
    q_out = arena.take(deep * wide_d), do_out = arena.take(deep * wide_e);
    dq = arena.take(rows * wide_d);
    s = arena.take(panels * keys * kPanel), ds = arena.take(panels * keys * kPanel);
    slopes = p.softcap != 0 ? arena.take(keys * kPanel) : nullptr;
    p_flat = kPairs ? arena.take(panels * keys * kPanel / 2) : s;
    ds_flat = kPairs ? arena.take(panels * keys * kPanel / 2) : ds;
    ds_deep = kPairs ? arena.take(keys * kPanel / 2) : ds;
    lse = arena.take(rows), delta = arena.take(rows);
    flat = arena.take(kPanel * imax(wide_d, wide_e));
    dbias_rows = arena.take(p.dbias ? kLanes * round_up(keys, kLanes) : 0);
    if (used) *used = arena.used;
  }

  float* panel(float* x, int64_t i, int64_t size) const { return x + i * kPanel * size; }
  float* deep(float* x, int64_t i, int64_t size) const {
    return x + i * kPanel / As::kDepth * size;
  }

  void run(Task task, const KeyGrads& sums, const Blocks& blocks, float* weights) {
    memset(sums.dk, 0, (sums.keys.end - sums.keys.begin) * wide_d * sizeof(float));
    memset(sums.dv, 0, (sums.keys.end - sums.keys.begin) * wide_e * sizeof(float));
    if (packed) {
      all_keys.origin = sums.keys.begin;
      all_keys.pack(task, sequence(p, task.b, task.i), sums.keys.begin, sums.keys.end);
    }
    int64_t end = task.m1;
    for (int64_t m = task.m0; m < end; m += blocks.rows) {
      task.m0 = m, task.m1 = imin(m + blocks.rows, end);
      tile.set(task);
      load_rows(weights);
      Range seen = tile.seen();
      for (int64_t j = seen.begin; j < seen.end; j += keys)
        step(tile.block(j, imin(j + keys, seen.end)), sums);
      store_queries();
    }
  }

  void load_rows(float* weights) {
    using S = Simd;
    for (int64_t x = 0; x < tile.panels; ++x) {
      int64_t w = tile.width(x), ld;
      // delta and lse first: a row that saw nothing is left out, whatever its dout holds.
      for (int64_t l = 0; l < w; ++l) {
        int64_t m = x * kPanel + l;
        lse[m] = infinity(), delta[m] = 0;
        if (m >= tile.rows) continue;
        int64_t index = tile.lse_index(m), row = tile.query_row(m) * p.e;
        if (p.lse[index] == -infinity()) continue;
        float *out = flat, *dout = flat + wide_e;  // kPanel >= 2 rows
        load_row(p.dtype, element(p.out, p.dtype, row), p.e, out);
        load_row(p.dtype, element(p.dout, p.dtype, row), p.e, dout);
        S::F dot = S::zero();
        int64_t i = 0;
        for (; i + kLanes <= p.e; i += kLanes)
          dot = S::fma(S::load(out + i), S::load(dout + i), dot);
        float lanes[kLanes], sum = 0;
        S::store(lanes, dot);
        for (float y : lanes) sum += y;
        for (; i < p.e; ++i) sum += out[i] * dout[i];
        lse[m] = p.lse[index] * kLog2e;
        delta[m] = sum - (p.dlse ? p.dlse[index] : 0);
        if (weights) {
          const int64_t* stride = p.sinks_shape.stride;
          float sink = p.sinks[tile.task.b * stride[0] + tile.head(m) * stride[1]];
          weights[index] = sink == -infinity() ? 0 : -expf(sink - p.lse[index]) * delta[m];
        }
      }
      auto row = [&](const void* from, int64_t size) {
        return [=](int64_t m) -> const char* {
          m += x * kPanel;
          if (m >= tile.rows || lse[m] == infinity()) return nullptr;
          return element(from, p.dtype, tile.query_row(m) * size);
        };
      };
      ld = round_up(d, kLanes);
      As::pack(p.dtype, w, p.d, row(p.q, p.d), flat, ld);
      transpose(flat, ld, d, panel(q_in, x, ld), w);
      ld = round_up(e, kLanes);
      As::pack(p.dtype, w, p.e, row(p.dout, p.e), flat, ld);
      transpose(flat, ld, e, panel(do_in, x, ld), w);
      As::pack_deep(p.dtype, w, p.d, row(p.q, p.d), deep(q_out, x, wide_d), wide_d);
      As::pack_deep(p.dtype, w, p.e, row(p.dout, p.e), deep(do_out, x, wide_e), wide_e);
      memset(panel(dq, x, wide_d), 0, p.d * w * sizeof(float));
    }
  }

  void step(const KeyBlock& block, const KeyGrads& sums) {
    using Op = typename As::Op;
    bool ready = packed;
    // The panels [first, x) have the range `r` of keys in common, and wait for their part in dV and
    // dK.
    int64_t first = 0;
    Range r{0, 0};
    for (int64_t x = 0; x <= tile.panels; ++x) {
      Range own{0, 0};
      Tile::Meet meet = Tile::Meet::kNone;
      if (x < tile.panels) {
        own = tile.columns(x, block);
        meet = tile.meet(x, block);
        if (meet == Tile::Meet::kNone) own = {0, 0};
      }
      bool same =
          own.begin == r.begin && own.end == r.end && x < tile.panels && tile.width(x) == kPanel;
      if (!same) {
        int64_t n = imin(r.end, block.j1) - r.begin, j = r.begin - sums.keys.begin;
        int64_t w = tile.width(first) / As::kDepth, stride = keys * kPanel / As::kDepth;
        if (n > 0) {
          gemm<Op, false>({n, wide_e, w, p_flat + first * stride, w, deep(do_out, first, wide_e),
                           wide_e, sums.dv + j * wide_e, wide_e, Into::kAdd, nullptr, x - first,
                           stride});
          gemm<Op, false>({n, wide_d, w, ds_flat + first * stride, w, deep(q_out, first, wide_d),
                           wide_d, sums.dk + j * wide_d, wide_d, Into::kAdd, nullptr, x - first,
                           stride});
        }
        first = x, r = own;
      }
      if (own.begin == own.end) continue;
      if (!ready) {
        block_keys.origin = block.j0;
        block_keys.pack(tile.task, tile.z, block.j0, block.j1);
        ready = true;
      }
      panel_step(x, block, own, meet);
    }
  }

  // P and dS of one panel, and its dQ.
  void panel_step(int64_t x, const KeyBlock& block, Range r, Tile::Meet meet) {
    using Op = typename As::Op;
    const Keys<As>& from = packed ? all_keys : block_keys;
    int64_t w = tile.width(x), n = r.end - r.begin;
    float *own_s = s + x * keys * kPanel, *own_ds = ds + x * keys * kPanel;
    gemm<Op, false>({n, w, d, from.k_at(r.begin), d, panel(q_in, x, round_up(d, kLanes)), w, own_s,
                     w, Into::kStore});
    gemm<Op, false>({n, w, e, from.v_at(r.begin), e, panel(do_in, x, round_up(e, kLanes)), w,
                     own_ds, w, Into::kStore});
    float c = tile.transform(x, r.begin, r.end, own_s, slopes);
    tile.mask(x, r.begin, r.end, meet, own_s);
    tile.drop(x, r.begin, r.end);
    bool in_between = p.dbias || p.softcap != 0 || tile.kept;
    float *flat_p = p_flat + x * keys * kPanel / As::kDepth,
          *flat_ds = ds_flat + x * keys * kPanel / As::kDepth;
    if (kPairs && !in_between) {
      weigh_pairs(x, n, w, c, own_s, own_ds, flat_p, flat_ds);
    } else {
      weigh(x, n, w, c, own_s, own_ds);
      if (p.dbias) add_dbias(x, r.begin, imin(r.end, block.j1) - r.begin, own_ds);
      if (p.softcap != 0)
        for (int64_t i = 0; i < n * w; i += kLanes)
          Simd::store(own_ds + i, Simd::mul(Simd::load(own_ds + i), Simd::load(slopes + i)));
      if (kPairs) convert(n, w, own_s, own_ds, flat_p, flat_ds);
    }
    gemm<Op, true>({p.d, w, n / As::kDepth, from.k_deep_at(r.begin), p.d, kPairs ? ds_deep : own_ds,
                    w, panel(dq, x, wide_d), w, Into::kAdd});
  }

  // s becomes P, ds (which is dP) becomes dS.
  void weigh(int64_t x, int64_t n, int64_t w, float c, float* s, float* ds) const {
    using S = Simd;
    const S::F factor = S::set(c);
    for (int64_t l = 0; l < w; l += kLanes) {
      S::F shift = S::sub(S::zero(), S::load(lse + x * kPanel + l));
      S::F mean = S::load(delta + x * kPanel + l);
      for (int64_t j = 0; j < n; ++j) {
        int64_t o = j * w + l;
        S::F weight = exp2(S::fma(S::load(s + o), factor, shift)), dweight = S::load(ds + o);
        S::F used = weight;
        if (tile.kept) {
          const S::F kept = S::load(tile.kept + o);
          used = S::mul(weight, kept), dweight = S::mul(dweight, kept);
        }
        S::store(s + o, used);
        S::store(ds + o, S::mul(weight, S::sub(dweight, mean)));
      }
    }
  }

  // P and dS, in float32, as elements.
  void convert(int64_t n, int64_t w, const float* s, const float* ds, float* flat_p,
               float* flat_ds) const {
    for (int64_t j = 0; j < n; j += 2)
      for (int64_t l = 0; l < w; l += kLanes) {
        int64_t o = j * w + l;
        store_pairs(o, w, Simd::load(s + o), Simd::load(s + o + w), Simd::load(ds + o),
                    Simd::load(ds + o + w), flat_p, flat_ds, ds_deep + j / 2 * w + l);
      }
  }

  // Both at once.
  void weigh_pairs(int64_t x, int64_t n, int64_t w, float c, const float* s, const float* ds,
                   float* flat_p, float* flat_ds) const {
    using S = Simd;
    const S::F factor = S::set(c);
    for (int64_t l = 0; l < w; l += kLanes) {
      S::F shift = S::sub(S::zero(), S::load(lse + x * kPanel + l));
      S::F mean = S::load(delta + x * kPanel + l);
      for (int64_t j = 0; j < n; j += 2) {
        int64_t o = j * w + l;
        S::F p0 = exp2_to<true>(S::fma(S::load(s + o), factor, shift));
        S::F p1 = exp2_to<true>(S::fma(S::load(s + o + w), factor, shift));
        S::F d0 = S::mul(p0, S::sub(S::load(ds + o), mean));
        S::F d1 = S::mul(p1, S::sub(S::load(ds + o + w), mean));
        store_pairs(o, w, p0, p1, d0, d1, flat_p, flat_ds, ds_deep + j / 2 * w + l);
      }
    }
  }

  static void store_pairs(int64_t o, int64_t w, Simd::F p0, Simd::F p1, Simd::F d0, Simd::F d1,
                          float* flat_p, float* flat_ds, float* deep_ds) {
    if constexpr (kPairs) {
      As::Op::store_flat(flat_p + o / 2, p0);
      As::Op::store_flat(flat_p + (o + w) / 2, p1);
      As::Op::store_flat(flat_ds + o / 2, d0);
      As::Op::store_flat(flat_ds + (o + w) / 2, d1);
      Simd::store(deep_ds, As::Op::zip(d0, d1));
    } else {
      (void)o, (void)w, (void)p0, (void)p1, (void)d0, (void)d1;
      (void)flat_p, (void)flat_ds, (void)deep_ds;
    }
  }

  // Adds dS of n keys from j0 on to dbias, where bias is broadcast its sum.
  void add_dbias(int64_t x, int64_t j0, int64_t n, const float* ds) {
    using S = Simd;
    int64_t w = tile.width(x), stride = p.bias_shape.stride[4];
    for (int64_t l = 0; l < w; l += kLanes) {
      int64_t m = x * kPanel + l, count = imin(kLanes, tile.rows - m);
      if (stride == 0) {
        S::F sum = S::zero();
        for (int64_t j = 0; j < n; ++j) sum = S::add(sum, S::load(ds + j * w + l));
        S::store(dbias_rows, sum);
        for (int64_t r = 0; r < count; ++r) p.dbias[tile.bias[m + r]] += dbias_rows[r];
        continue;
      }
      // ds is written in whole blocks of keys; what lies behind the last is not added.
      int64_t ld = round_up(n, kLanes);
      for (int64_t j = 0; j < n; j += kLanes) S::transpose(ds + j * w + l, w, dbias_rows + j, ld);
      for (int64_t r = 0; r < count; ++r) {
        float* to = p.dbias + tile.bias[m + r] + j0;
        const float* from = dbias_rows + r * ld;
        int64_t j = 0;
        for (; j + kLanes <= n; j += kLanes)
          S::store(to + j, S::add(S::load(to + j), S::load(from + j)));
        for (; j < n; ++j) to[j] += from[j];
      }
    }
  }

  void store_queries() {
    for (int64_t x = 0; x < tile.panels; ++x) {
      int64_t w = tile.width(x);
      const float* from = panel(dq, x, wide_d);
      for (int64_t i = 0; i < p.d; i += kLanes)
        for (int64_t l = 0; l < w; l += kLanes)
          Simd::transpose(from + i * w + l, w, flat + l * wide_d + i, wide_d);
      for (int64_t l = 0; l < w && x * kPanel + l < tile.rows; ++l) {
        int64_t m = x * kPanel + l;
        store_row(p.dtype, flat + l * wide_d, p.d, p.scale,
                  element(p.dq, p.dtype, tile.query_row(m) * p.d));
      }
    }
  }
};

inline void store_key_grads(const BwdParams& p, const Task& task, const KeyGrads* parts,
                            int64_t count) {
  Sequence z = sequence(p, task.b, task.i);
  int64_t wide_d = round_up(p.d, kLanes), wide_e = round_up(p.e, kLanes);
  // d and e are at most 512 for the tuned kernels, but nothing here depends on it: sum in pieces.
  constexpr int64_t kPiece = 256;
  float sum[kPiece];
  auto store = [&](void* to, int64_t n, int64_t wide, int64_t j, float scale, auto part) {
    int64_t row = key_row(p, task.b, z, j);
    if (row < 0) return;
    for (int64_t i = 0; i < n; i += kPiece) {
      int64_t size = imin(kPiece, n - i);
      for (int64_t y = 0; y < size; ++y) sum[y] = 0;
      for (int64_t x = 0; x < count; ++x) {
        if (j < parts[x].keys.begin || j >= parts[x].keys.end) continue;
        const float* from = part(parts[x]) + (j - parts[x].keys.begin) * wide + i;
        for (int64_t y = 0; y < size; ++y) sum[y] += from[y];
      }
      store_row(p.dtype, sum, size, scale, element(to, p.dtype, (row * p.g + task.g) * n + i));
    }
  };
  for (int64_t j = task.j0; j < task.j1; ++j) {
    store(p.dk, p.d, wide_d, j, p.scale, [](const KeyGrads& x) { return x.dk; });
    store(p.dv, p.e, wide_e, j, 1.f, [](const KeyGrads& x) { return x.dv; });
  }
}

}  // namespace
}  // namespace flashjax::cpu
