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
  // q_in, do_in [panels][d or e, width]; q_out, do_out [panels][width, wide]: contracted over d or
  // e, and over rows.
  float *q_in, *q_out, *do_in, *do_out, *dq;
  // k_in [keys, d], k_out [keys, p.d], v_in [keys, e]
  float *k_in, *k_out, *v_in;
  float *s, *ds, *slopes;             // [keys, width]
  float *p_flat, *ds_flat, *ds_deep;  // as elements: [keys, width] twice, and contracted over keys
  float *lse, *delta, *flat, *dbias_rows;

  static constexpr bool kPairs = As::kDepth == 2;

  Backward(const BwdParams& p, const Blocks& blocks, Arena arena, int64_t* used = nullptr)
      : p(p),
        keys(blocks.keys),
        d((p.d + As::kDepth - 1) / As::kDepth),
        e((p.e + As::kDepth - 1) / As::kDepth),
        wide_d(round_up(p.d, kLanes)),
        wide_e(round_up(p.e, kLanes)),
        tile(p, blocks, arena) {
    int64_t rows = blocks.rows, deep = rows / As::kDepth;
    q_in = arena.take(rows * round_up(d, kLanes)), do_in = arena.take(rows * round_up(e, kLanes));
    q_out = arena.take(deep * wide_d), do_out = arena.take(deep * wide_e);
    dq = arena.take(rows * wide_d);
    k_in = arena.take(keys * d), v_in = arena.take(keys * e);
    k_out = kPairs ? arena.take(keys / 2 * p.d) : k_in;
    s = arena.take(keys * kPanel), ds = arena.take(keys * kPanel);
    slopes = p.softcap != 0 ? arena.take(keys * kPanel) : nullptr;
    p_flat = kPairs ? arena.take(keys * kPanel / 2) : s;
    ds_flat = kPairs ? arena.take(keys * kPanel / 2) : ds;
    ds_deep = kPairs ? arena.take(keys * kPanel / 2) : ds;
    lse = arena.take(rows), delta = arena.take(rows);
    flat = arena.take(kPanel * imax(wide_d, wide_e));
    dbias_rows = arena.take(p.dbias ? kLanes * round_up(keys, kLanes) : 0);
    if (used) *used = arena.used;
  }

  float* panel(float* x, int64_t i, int64_t size) const { return x + i * kPanel * size; }

  void run(Task task, const KeyGrads& sums, const Blocks& blocks, float* weights) {
    memset(sums.dk, 0, (sums.keys.end - sums.keys.begin) * wide_d * sizeof(float));
    memset(sums.dv, 0, (sums.keys.end - sums.keys.begin) * wide_e * sizeof(float));
    int64_t end = task.m1;
    for (int64_t m = task.m0; m < end; m += blocks.rows) {
      task.m0 = m, task.m1 = imin(m + blocks.rows, end);
      tile.set(task);
      load_rows(weights);
      Range seen = tile.seen();
      for (int64_t j = seen.begin; j < seen.end; j += keys) {
        KeyBlock block = tile.block(j, imin(j + keys, seen.end));
        bool packed = false;
        for (int64_t x = 0; x < tile.panels; ++x) {
          Range r = tile.columns(x, block);
          Tile::Meet meet = tile.meet(x, block);
          if (r.begin == r.end || meet == Tile::Meet::kNone) continue;
          if (!packed) pack_keys(block);
          packed = true;
          step(x, block, r, meet, sums);
        }
      }
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
        delta[m] = sum - p.dlse[index];
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

  float* deep(float* x, int64_t i, int64_t size) const {
    return x + i * kPanel / As::kDepth * size;
  }

  void pack_keys(const KeyBlock& block) {
    int64_t n = block.j1 - block.j0;
    auto row = [&](const void* from, int64_t size) {
      return [=](int64_t j) { return j < n ? tile.key(from, size, block.j0 + j) : nullptr; };
    };
    As::pack(p.dtype, round_up(n, 2), p.d, row(p.k, p.d), k_in, d);
    As::pack(p.dtype, round_up(n, 2), p.e, row(p.v, p.e), v_in, e);
    if (kPairs) As::pack_deep(p.dtype, round_up(n, 2), p.d, row(p.k, p.d), k_out, p.d);
  }

  void step(int64_t x, const KeyBlock& block, Range r, Tile::Meet meet, const KeyGrads& sums) {
    using Op = typename As::Op;
    int64_t w = tile.width(x), n = r.end - r.begin, skip = r.begin - block.j0;
    int64_t real = imin(r.end, block.j1) - r.begin;
    gemm<Op, false>(
        {n, w, d, k_in + skip * d, d, panel(q_in, x, round_up(d, kLanes)), w, s, w, Into::kStore});
    gemm<Op, false>({n, w, e, v_in + skip * e, e, panel(do_in, x, round_up(e, kLanes)), w, ds, w,
                     Into::kStore});
    float c = tile.transform(x, r.begin, r.end, s, slopes);
    tile.mask(x, r.begin, r.end, meet, s);
    weigh(x, n, w, c);
    if (p.dbias) add_dbias(x, r.begin, real);
    if (p.softcap != 0)
      for (int64_t i = 0; i < n * w; i += kLanes)
        Simd::store(ds + i, Simd::mul(Simd::load(ds + i), Simd::load(slopes + i)));
    if constexpr (kPairs) convert(n, w);
    int64_t j = r.begin - sums.keys.begin, rows = w / As::kDepth;
    gemm<Op, false>({real, wide_e, rows, p_flat, rows, deep(do_out, x, wide_e), wide_e,
                     sums.dv + j * wide_e, wide_e, Into::kAdd});
    gemm<Op, false>({real, wide_d, rows, ds_flat, rows, deep(q_out, x, wide_d), wide_d,
                     sums.dk + j * wide_d, wide_d, Into::kAdd});
    gemm<Op, true>({p.d, w, n / As::kDepth, k_out + skip / As::kDepth * p.d, p.d, ds_deep, w,
                    panel(dq, x, wide_d), w, Into::kAdd});
  }

  // s becomes P, ds (which is dP) becomes dS.
  void weigh(int64_t x, int64_t n, int64_t w, float c) {
    using S = Simd;
    const S::F factor = S::set(c);
    for (int64_t l = 0; l < w; l += kLanes) {
      S::F shift = S::sub(S::zero(), S::load(lse + x * kPanel + l));
      S::F mean = S::load(delta + x * kPanel + l);
      for (int64_t j = 0; j < n; ++j) {
        int64_t o = j * w + l;
        S::F weight = exp2(S::fma(S::load(s + o), factor, shift));
        S::store(s + o, weight);
        S::store(ds + o, S::mul(weight, S::sub(S::load(ds + o), mean)));
      }
    }
  }

  void convert(int64_t n, int64_t w) {
#ifdef FLASHJAX_HAS_BF16
    using S = Simd;
    for (int64_t j = 0; j < n; j += 2)
      for (int64_t l = 0; l < w; l += kLanes) {
        int64_t o = j * w + l;
        S::F a = S::load(ds + o), b = S::load(ds + o + w);
        Pairs::store_flat(p_flat + o / 2, S::load(s + o));
        Pairs::store_flat(p_flat + (o + w) / 2, S::load(s + o + w));
        Pairs::store_flat(ds_flat + o / 2, a);
        Pairs::store_flat(ds_flat + (o + w) / 2, b);
        S::store(ds_deep + j / 2 * w + l, Pairs::zip(a, b));
      }
#else
    (void)n, (void)w;
#endif
  }

  // Adds dS of n keys from j0 on to dbias, where bias is broadcast its sum.
  void add_dbias(int64_t x, int64_t j0, int64_t n) {
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
