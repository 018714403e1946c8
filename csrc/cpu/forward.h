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
  const char **k_rows, **v_rows;  // of a block of keys

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
    k_rows = reinterpret_cast<const char**>(arena.take(2 * keys));
    v_rows = reinterpret_cast<const char**>(arena.take(2 * keys));
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
    tile.drop(x, r.begin, r.end);
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
        if (tile.kept) {
          p0 = S::mul(p0, S::load(tile.kept + j * w + l));
          p1 = S::mul(p1, S::load(tile.kept + (j + 1) * w + l));
        }
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

  // Few rows, as in decoding: lanes run along d and e instead of the rows, of which there are not
  // enough to fill them, and K and V are read where they lie.
  static constexpr int kThin = 4;
  static bool thin(const Problem& p, const Task& task) {
#ifdef FLASHJAX_SIMD_CONVERTS
    bool converts = true;
#else
    bool converts = p.dtype == DType::kF32;
#endif
    return task.m1 - task.m0 <= kThin && converts && p.d % kLanes == 0 && p.e % kLanes == 0 &&
           p.d <= 512 && p.e <= 512;
  }

  void run_thin() {
    if (p.dtype == DType::kF32) run_thin<DType::kF32>();
#ifdef FLASHJAX_SIMD_CONVERTS
    if (p.dtype == DType::kBF16) run_thin<DType::kBF16>();
    if (p.dtype == DType::kF16) run_thin<DType::kF16>();
#endif
  }

  template <DType kType>
  static Simd::F load_lanes(const char* row, int64_t i) {
#ifdef FLASHJAX_SIMD_CONVERTS
    if (kType == DType::kBF16) return Simd::load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
    if (kType == DType::kF16) return Simd::load_f16(reinterpret_cast<const uint16_t*>(row) + i);
#endif
    return Simd::load(reinterpret_cast<const float*>(row) + i);
  }

  template <DType kType>
  void run_thin() {
    // [kThin, d] and [kThin, e]: kPanel rows are room enough.
    float *q_rows = flat, *o_rows = flat + kThin * p.d;
    for (int64_t m = 0; m < kThin; ++m) {
      if (m < tile.rows)
        load_row(kType, element(p.q, kType, tile.query_row(m) * p.d), p.d, q_rows + m * p.d);
      else
        memset(q_rows + m * p.d, 0, p.d * sizeof(float));
    }
    memset(o_rows, 0, kThin * p.e * sizeof(float));
    Range seen = tile.seen();
    for (int64_t j = seen.begin; j < seen.end; j += keys) {
      KeyBlock block = tile.block(j, imin(j + keys, seen.end));
      Range r = tile.columns(0, block);
      Tile::Meet meet = tile.meet(0, block);
      if (r.begin == r.end || meet == Tile::Meet::kNone) continue;
      int64_t n = imin(r.end, block.j1) - r.begin;
      alignas(8) static const char zeros[512 * 4] = {};
      for (int64_t i = 0; i < n; ++i) {
        int64_t row = key_row(p, tile.task.b, tile.z, r.begin + i) * p.g + tile.task.g;
        bool bad = row < 0;
        k_rows[i] = bad ? zeros : element(p.k, kType, row * p.d);
        v_rows[i] = bad ? zeros : element(p.v, kType, row * p.e);
      }
      thin_scores<kType>(n, q_rows);
      for (int64_t i = n; i < r.end - r.begin; ++i) Simd::store(s + i * kLanes, Simd::zero());
      float c = tile.transform(0, r.begin, r.end, s, nullptr);
      tile.mask(0, r.begin, r.end, meet, s);
      tile.drop(0, r.begin, r.end);
      softmax(0, r.end - r.begin, kLanes, c);
      for (int64_t m = 0; m < kThin; ++m)
        for (int64_t i = 0; i < p.e; ++i) o_rows[m * p.e + i] *= alpha[m];
      // Pieces that stay in the first-level cache while the columns of V are walked.
      constexpr int64_t kPiece = 32;
      for (int64_t i = 0; i < n; i += kPiece) {
        for (int64_t y = i + kPiece; y < imin(n, i + 2 * kPiece); ++y)
          prefetch_row(v_rows[y], p.e * bytes_of(kType));
        thin_values<kType, Simd::kVectors>(i, imin(n, i + kPiece), 0, o_rows);
      }
    }
    for (int64_t i = 0; i < p.e; ++i)
      for (int64_t m = 0; m < kLanes; ++m)
        panel_o(0)[i * kLanes + m] = m < kThin ? o_rows[m * p.e + i] : 0;
  }

  template <DType kType>
  void thin_scores(int64_t n, const float* q_rows) {
    using S = Simd;
    constexpr int kKeys = kLanes / kThin;
    const int64_t bytes = p.d * bytes_of(kType), ahead = rows_ahead(bytes);
    for (int64_t j = 0; j < n; j += kKeys) {
      const char* row[kKeys];
      for (int a = 0; a < kKeys; ++a) {
        row[a] = k_rows[imin(j + a, n - 1)];
        if (j + a + ahead < n) prefetch_row(k_rows[j + a + ahead], bytes);
      }
      S::F sum[kKeys * kThin];
#pragma GCC unroll 16
      for (int x = 0; x < kKeys * kThin; ++x) sum[x] = S::zero();
      for (int64_t i = 0; i < p.d; i += kLanes) {
        S::F k[kKeys];
#pragma GCC unroll 4
        for (int a = 0; a < kKeys; ++a) k[a] = load_lanes<kType>(row[a], i);
#pragma GCC unroll 4
        for (int m = 0; m < kThin; ++m) {
          S::F q = S::load(q_rows + m * p.d + i);
#pragma GCC unroll 4
          for (int a = 0; a < kKeys; ++a) sum[a * kThin + m] = S::fma(k[a], q, sum[a * kThin + m]);
        }
      }
      // All sums across lanes at once.
      float square[kLanes * kLanes], turned[kLanes * kLanes];
#pragma GCC unroll 16
      for (int x = 0; x < kLanes; ++x) S::store(square + x * kLanes, sum[x]);
      S::transpose(square, kLanes, turned, kLanes);
      S::F total = S::load(turned);
      for (int x = 1; x < kLanes; ++x) total = S::add(total, S::load(turned + x * kLanes));
      S::store(square, total);
      for (int a = 0; a < kKeys && j + a < n; ++a) {
        float* to = s + (j + a) * kLanes;
        S::store(to, S::zero());
        memcpy(to, square + a * kThin, kThin * sizeof(float));
      }
    }
  }

  // o_rows += P V for the keys [j0, j1) and the columns from i on.
  template <DType kType, int kWide>
  void thin_values(int64_t j0, int64_t j1, int64_t i, float* o_rows) {
    using S = Simd;
    for (; i + kWide * kLanes <= p.e; i += kWide * kLanes) {
      S::F sum[kThin][kWide];
#pragma GCC unroll 4
      for (int m = 0; m < kThin; ++m)
#pragma GCC unroll 4
        for (int x = 0; x < kWide; ++x) sum[m][x] = S::load(o_rows + m * p.e + i + x * kLanes);
      for (int64_t j = j0; j < j1; ++j) {
        S::F v[kWide];
#pragma GCC unroll 4
        for (int x = 0; x < kWide; ++x) v[x] = load_lanes<kType>(v_rows[j], i + x * kLanes);
        const float* weight = s + j * kLanes;
#pragma GCC unroll 4
        for (int m = 0; m < kThin; ++m) {
          S::F w = S::set(weight[m]);
#pragma GCC unroll 4
          for (int x = 0; x < kWide; ++x) sum[m][x] = S::fma(w, v[x], sum[m][x]);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < kThin; ++m)
#pragma GCC unroll 4
        for (int x = 0; x < kWide; ++x) S::store(o_rows + m * p.e + i + x * kLanes, sum[m][x]);
    }
    if constexpr (kWide > 1) {
      if (i < p.e) thin_values<kType, kWide / 2>(j0, j1, i, o_rows);
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
