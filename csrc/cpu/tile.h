// The rows of one task: what each sees, and their scores against a block of keys.
// Scores lie transposed, [keys, width]: a row of the problem is a lane, so that softmax needs no
// sum across lanes.
#pragma once

namespace flashjax::cpu {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int64_t kPanel = Simd::kVectors * Simd::kLanes;

inline float infinity() { return __builtin_inff(); }

// Hands out pieces of the scratch; with a null base it only counts.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return piece;
  }
  int32_t* take_ints(int64_t n) { return reinterpret_cast<int32_t*>(take(n)); }
};

// A range of keys of one sequence, and the least and greatest of their segment ids.
struct KeyBlock {
  int64_t j0, j1;
  int32_t least = 0, greatest = 0;
};

struct Tile {
  const Problem& p;
  int64_t rows, panels;
  Sequence z;
  Task task;
  // One entry a row; the last panel is filled up with copies of the last row.
  int32_t *lo, *hi;  // the keys [lo, hi) that the row sees, segments aside
  int32_t* at;       // the key on which it sits
  int32_t* segment;
  float* slope;                  // ALiBi
  int64_t* bias;                 // index into bias of key 0
  float *bias_rows, *bias_tile;  // [kLanes, keys], [keys, width]
  float* kept;                   // [keys, width]: dropout's factors of a panel; null without it

  Tile(const Problem& p, const Blocks& blocks, Arena& arena) : p(p) {
    int64_t n = blocks.rows;
    lo = arena.take_ints(n), hi = arena.take_ints(n), at = arena.take_ints(n);
    segment = arena.take_ints(n);
    slope = arena.take(n);
    bias = reinterpret_cast<int64_t*>(arena.take(2 * n));
    int64_t keys = p.bias ? round_up(blocks.keys, kLanes) : 0;
    bias_rows = arena.take(kLanes * keys);
    bias_tile = arena.take(kPanel * keys);
    kept = p.dropout_seed ? arena.take(kPanel * round_up(blocks.keys, kLanes)) : nullptr;
  }

  int64_t group() const { return p.h / p.g; }
  int64_t position(int64_t m) const { return (task.m0 + m) / group(); }
  int64_t head(int64_t m) const { return task.g * group() + (task.m0 + m) % group(); }
  // Row of [b, s, h] (q, out, dout, dq), and index into [b, h, s] (lse, dlse).
  int64_t query_row(int64_t m) const {
    return (task.b * p.s + z.q_begin + position(m)) * p.h + head(m);
  }
  int64_t lse_index(int64_t m) const {
    return (task.b * p.h + head(m)) * p.s + z.q_begin + position(m);
  }
  int64_t width(int64_t panel) const {
    return imin(kPanel, round_up(rows - panel * kPanel, kLanes));
  }
  bool plain() const { return p.softcap == 0 && !p.bias && !p.alibi_slopes && p.scale > 0; }

  void set(const Task& t) {
    task = t;
    z = sequence(p, t.b, t.i);
    rows = t.m1 - t.m0;
    panels = (rows + kPanel - 1) / kPanel;
    for (int64_t m = 0; m < round_up(rows, kLanes); ++m) {
      int64_t k = imin(m, rows - 1), i = position(k), n = head(k);
      Range seen = visible_keys(p, z, i, i + 1);
      lo[m] = static_cast<int32_t>(clamp(seen.begin, t.j0, t.j1));
      hi[m] = static_cast<int32_t>(clamp(seen.end, lo[m], t.j1));
      at[m] = static_cast<int32_t>(i + z.diagonal);
      if (p.segment_ids_q) segment[m] = p.segment_ids_q[t.b * p.s + z.q_begin + i];
      if (p.alibi_slopes)
        slope[m] = p.alibi_slopes[t.b * p.alibi_shape.stride[0] + n * p.alibi_shape.stride[1]];
      const int64_t* stride = p.bias_shape.stride;
      if (p.bias) bias[m] = t.b * stride[0] + t.i * stride[1] + n * stride[2] + i * stride[3];
    }
  }

  // What any row of the tile (from an even key on) or panel sees, and what all rows of it see.
  // lo and hi never decrease.
  Range seen() const { return {lo[0] - lo[0] % 2, imax(lo[0], hi[rows - 1])}; }
  Range seen(int64_t panel) const {
    int64_t first = panel * kPanel, last = imin(first + kPanel, rows) - 1;
    return {lo[first], imax(lo[first], hi[last])};
  }
  Range common(int64_t panel) const {
    int64_t first = panel * kPanel, last = imin(first + kPanel, rows) - 1;
    return {lo[last], imax(lo[last], hi[first])};
  }

  KeyBlock block(int64_t j0, int64_t j1) const {
    KeyBlock x{j0, j1};
    if (p.segment_ids_k) {
      const int32_t* id = p.segment_ids_k + task.b * p.t + z.k_begin;
      x.least = x.greatest = id[j0];
      for (int64_t j = j0 + 1; j < j1; ++j) {
        x.least = id[j] < x.least ? id[j] : x.least;
        x.greatest = id[j] > x.greatest ? id[j] : x.greatest;
      }
    }
    return x;
  }

  // How the segments of a block's keys meet those of a panel's rows.
  enum class Meet { kNone, kSome, kAll };
  Meet meet(int64_t panel, const KeyBlock& x) const {
    if (!p.segment_ids_q) return Meet::kAll;
    const int32_t* id = segment + panel * kPanel;
    int32_t least = id[0], greatest = id[0];
    for (int64_t m = 1; m < width(panel); ++m) {
      least = id[m] < least ? id[m] : least;
      greatest = id[m] > greatest ? id[m] : greatest;
    }
    if (least > x.greatest || greatest < x.least) return Meet::kNone;
    return least == greatest && x.least == x.greatest ? Meet::kAll : Meet::kSome;
  }

  // The keys of a block against which a panel is computed, from an even offset into the block to an
  // even one; the key that this may add at the end is a row of zeros, which no row sees.
  Range columns(int64_t panel, const KeyBlock& x) const {
    Range r = seen(panel);
    int64_t begin = imax(r.begin, x.j0), end = imin(r.end, x.j1);
    if (begin >= end) return {x.j0, x.j0};
    return {begin - (begin - x.j0) % 2, end + (end - x.j0) % 2};
  }

  // From products q.k to scores in units of log2, in place; s is [j1 - j0, width]. If `slopes`, the
  // derivative of softcap goes there. The result is the factor still to be applied (the plain case
  // leaves it to the caller's fma).
  float transform(int64_t panel, int64_t j0, int64_t j1, float* s, float* slopes) {
    if (plain()) return p.scale * kLog2e;
    int64_t base = panel * kPanel, w = width(panel);
    if (p.bias) load_bias(panel, j0, imin(j1, z.k_len));
    using S = Simd;
    const S::F scale = S::set(p.scale), cap = S::set(p.softcap), log2e = S::set(kLog2e);
    const S::F uncap = S::set(p.softcap != 0 ? p.scale / p.softcap : 0);
    for (int64_t r = 0; r < w; r += kLanes) {
      S::F steep = p.alibi_slopes ? S::load(slope + base + r) : S::zero();
      S::F here = S::to_float(S::loadi(at + base + r));
      for (int64_t j = j0; j < j1; ++j) {
        int64_t o = (j - j0) * w + r;
        S::F x = S::load(s + o);
        if (p.softcap != 0) {
          x = tanh(S::mul(x, uncap));
          if (slopes) S::store(slopes + o, S::nfma(x, x, S::set(1.f)));
          x = S::mul(x, cap);
        } else {
          x = S::mul(x, scale);
        }
        if (p.bias) x = S::add(x, S::load(bias_tile + o));
        if (p.alibi_slopes)
          x = S::nfma(steep, S::abs(S::sub(here, S::set(static_cast<float>(j)))), x);
        S::store(s + o, S::mul(x, log2e));
      }
    }
    return 1;
  }

  // -inf where a row does not see a key.
  void mask(int64_t panel, int64_t j0, int64_t j1, Meet meet, float* s) const {
    using S = Simd;
    Range all = common(panel);
    int64_t base = panel * kPanel, w = width(panel);
    const S::F none = S::set(-infinity());
    bool segments = meet == Meet::kSome;
    const int32_t* id = segments ? p.segment_ids_k + task.b * p.t + z.k_begin : nullptr;
    for (int64_t j = j0; j < j1; ++j) {
      bool edge = j < all.begin || j >= all.end;
      if (!edge && !segments) {
        // Jump over what all rows see.
        j = imin(all.end, j1) - 1;
        continue;
      }
      S::I key = S::seti(static_cast<int32_t>(j));
      S::I own = S::seti(segments && j < z.k_len ? id[j] : 0);
      float* row = s + (j - j0) * w;
      for (int64_t r = 0; r < w; r += kLanes) {
        S::M m =
            S::andnot(S::less(key, S::loadi(lo + base + r)), S::less(key, S::loadi(hi + base + r)));
        if (segments) m = S::both(m, S::equal(own, S::loadi(segment + base + r)));
        S::store(row + r, S::select(m, S::load(row + r), none));
      }
    }
  }

  // Fills `kept` for the keys [j0, j1) of a panel.
  void drop(int64_t panel, int64_t j0, int64_t j1) {
    if (!kept) return;
    const int64_t base = panel * kPanel, w = width(panel);
    const float scale = 256.f / static_cast<float>(p.dropout_keep);
    for (int64_t r = 0; r < w; ++r) {
      const int64_t m = imin(base + r, rows - 1), i = position(m);
      const int32_t* seed = dropout_seed(p, task.b, head(m));
      for (int64_t x = j0 / 32; 32 * x < j1; ++x)
        for (int64_t pair = 0; pair < 4; ++pair) {
          const Philox bits = dropout_block(seed, task.i, i, pair, x);
          for (int64_t y = 0; y < 8; ++y) {
            const int64_t j = 32 * x + y / 2 * 8 + 2 * pair + y % 2;
            const uint32_t byte = bits.word[y / 2] >> (dropout_shift(i) + y % 2 * 8) & 255;
            if (j >= j0 && j < j1) kept[(j - j0) * w + r] = byte < p.dropout_keep ? scale : 0;
          }
        }
    }
  }

 private:
  void load_bias(int64_t panel, int64_t j0, int64_t j1) {
    int64_t base = panel * kPanel, w = width(panel), n = j1 - j0, ld = round_up(n, kLanes);
    for (int64_t r = 0; r < w; r += kLanes) {
      if (p.bias_shape.stride[4] == 0) {
        for (int64_t x = 0; x < kLanes; ++x)
          load_row(p.bias_dtype, element(p.bias, p.bias_dtype, bias[base + r + x]), 1,
                   bias_rows + x);
        Simd::F row = Simd::load(bias_rows);
        for (int64_t j = 0; j < n; ++j) Simd::store(bias_tile + j * w + r, row);
        continue;
      }
      for (int64_t x = 0; x < kLanes; ++x)
        load_row(p.bias_dtype, element(p.bias, p.bias_dtype, bias[base + r + x] + j0), n,
                 bias_rows + x * ld);
      for (int64_t j = 0; j < n; j += kLanes)
        Simd::transpose(bias_rows + j, ld, bias_tile + j * w + r, w);
    }
  }
};

}  // namespace
}  // namespace flashjax::cpu
