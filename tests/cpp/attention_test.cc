// Forward and Backward against the definition in double precision, over random problems with every
// feature. What lies outside the sequences holds NaN, and so do the results beforehand; every
// instruction set; 1, 2 and 5 threads bitwise.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "attention/sequence.h"
#include "levels.h"
#include "test.h"

namespace flashjax::test {
namespace {

class Threads final : public cpu::Parallel {
 public:
  explicit Threads(int64_t n) : n_(n) {}
  int64_t threads() const override { return n_; }
  void For(int64_t n, const std::function<void(int64_t)>& body) override {
    if (n_ == 1) {
      for (int64_t i = 0; i < n; ++i) body(i);
      return;
    }
    std::atomic<int64_t> next{0};
    std::vector<std::thread> threads;
    for (int64_t x = 0; x < n_; ++x)
      threads.emplace_back([&] {
        for (int64_t i; (i = next++) < n;) body(i);
      });
    for (std::thread& x : threads) x.join();
  }

 private:
  int64_t n_;
};

uint16_t to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return f != f ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float from_bf16(uint16_t x) {
  uint32_t u = static_cast<uint32_t>(x) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
uint16_t to_f16(float f) {
  if (f != f) return 0x7e00;
  uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  double a = std::fabs(f);
  if (a >= 65520) return sign | 0x7c00;
  int exponent = a < 0x1p-14 ? -14 : std::ilogb(a);
  int mantissa = static_cast<int>(std::nearbyint(std::ldexp(a, 10 - exponent)));
  // A mantissa of 2048 carries into the exponent by itself.
  int biased = mantissa < 1024 ? 0 : exponent + 14;
  return static_cast<uint16_t>(sign | (biased * 1024 + mantissa));
}
float from_f16(uint16_t x) {
  int exponent = (x >> 10) & 31, mantissa = x & 1023;
  double a = exponent == 31  ? (mantissa ? NAN : INFINITY)
             : exponent == 0 ? std::ldexp(mantissa, -24)
                             : std::ldexp(mantissa + 1024, exponent - 25);
  return static_cast<float>(x & 0x8000 ? -a : a);
}

// An array in any dtype, with its values in float.
struct Array {
  DType type = DType::kF32;
  std::vector<float> f32;
  std::vector<uint16_t> u16;
  Array() = default;
  Array(DType type, int64_t n) : type(type), f32(n), u16(type == DType::kF32 ? 0 : n) {
    for (int64_t i = 0; i < n; ++i) set(i, NAN);
  }
  int64_t size() const { return static_cast<int64_t>(f32.size()); }
  void set(int64_t i, float x) {
    if (type == DType::kBF16) u16[i] = to_bf16(x), x = from_bf16(u16[i]);
    if (type == DType::kF16) u16[i] = to_f16(x), x = from_f16(u16[i]);
    f32[i] = x;
  }
  double operator[](int64_t i) const {
    if (type == DType::kBF16) return from_bf16(u16[i]);
    if (type == DType::kF16) return from_f16(u16[i]);
    return f32[i];
  }
  void* data() {
    return type == DType::kF32 ? static_cast<void*>(f32.data()) : static_cast<void*>(u16.data());
  }
  bool same(const Array& x) const {
    if (f32.empty()) return x.f32.empty();
    return type == DType::kF32 ? !memcmp(f32.data(), x.f32.data(), f32.size() * 4)
                               : !memcmp(u16.data(), x.u16.data(), u16.size() * 2);
  }
};

struct Case {
  BwdParams p;
  Array q, k, v, bias, out, dout;
  std::vector<float> alibi, sinks, lse, dlse;
  std::vector<int32_t> segment_q, segment_k, cu_q, cu_k, used_q, used_k, leftpad, shift, batch_idx,
      pages;
  bool paged = false, indirect = false;
};

Case make(Random& r, int64_t extent) {
  Case x;
  BwdParams& p = x.p;
  p.b = r.integer(1, 3), p.g = r.integer(1, 3), p.h = p.g * r.integer(1, r.chance(0.5) ? 1 : 5);
  p.s = r.chance(0.05) ? 0 : r.integer(1, r.chance(0.3) ? 4 : extent);
  p.t = r.chance(0.05) ? 0 : r.integer(1, extent * (r.chance(0.2) ? 8 : 1));
  int64_t dims[] = {1, 3, 8, 16, 24, 40, 64, 72, 128};
  p.d = dims[r.integer(0, 8)], p.e = r.chance(0.5) ? p.d : dims[r.integer(0, 8)];
  if (r.chance(0.03))
    p.d = 512, p.s = std::min<int64_t>(p.s, 40), p.t = std::min<int64_t>(p.t, 150);
  p.dtype = static_cast<DType>(r.integer(0, 2));
  p.c = p.b;
  p.scale = r.chance(0.05) ? -0.1f : 1 / std::sqrt(static_cast<float>(p.d));
  if (r.chance(0.2)) p.softcap = static_cast<float>(0.5 + 3 * r.real());
  p.window_left = r.chance(0.6) ? -1 : r.integer(0, extent / 2);
  p.window_right = r.chance(0.5) ? -1 : r.chance(0.6) ? 0 : r.integer(0, extent / 2);
  p.top_left = r.chance(0.3);
  if (r.chance(0.15)) {
    for (int64_t b = 0; b < p.b; ++b)
      x.shift.push_back(static_cast<int32_t>(r.integer(-extent, extent)));
    p.shift = x.shift.data();
  }
  p.max_seqlen_q = p.max_seqlen_k = -1;
  p.num_splits = r.chance(0.2) ? r.integer(1, 5) : 0;
  x.paged = p.t > 0 && r.chance(0.12);
  x.indirect = !x.paged && r.chance(0.1);
  if (x.paged) {
    p.page = r.integer(1, 2) * 8, p.p = (p.t + p.page - 1) / p.page, p.t = p.p * p.page;
    p.c = p.b * p.p + 2;
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < p.c; ++i) ids.push_back(static_cast<int32_t>(i));
    for (int64_t i = p.c - 1; i > 0; --i) std::swap(ids[i], ids[r.integer(0, i)]);
    x.pages.assign(ids.begin(), ids.begin() + p.b * p.p);
    p.page_table = x.pages.data();
  }
  if (x.indirect) {
    p.c = p.b + 2;
    for (int64_t b = 0; b < p.b; ++b)
      x.batch_idx.push_back(static_cast<int32_t>(r.integer(0, p.c - 1)));
    p.batch_idx = x.batch_idx.data();
  }
  if (!x.paged && r.chance(0.3)) {
    p.n = r.integer(1, 4);
    auto lengths = [&](int64_t end) {
      std::vector<int32_t> y;
      for (int64_t b = 0; b < p.b; ++b) {
        std::vector<int32_t> cuts;
        for (int64_t i = 0; i <= p.n; ++i) cuts.push_back(static_cast<int32_t>(r.integer(0, end)));
        std::sort(cuts.begin(), cuts.end());
        y.insert(y.end(), cuts.begin(), cuts.end());
      }
      return y;
    };
    x.cu_q = lengths(p.s), p.cu_seqlens_q = x.cu_q.data();
    x.cu_k = lengths(p.t), p.cu_seqlens_k = x.cu_k.data();
  }
  auto used = [&](bool keys) {
    std::vector<int32_t> y;
    for (int64_t b = 0; b < p.b; ++b)
      for (int64_t i = 0; i < p.n; ++i) {
        Sequence z = sequence(p, b, i);
        y.push_back(static_cast<int32_t>(r.integer(0, keys ? z.k_len : z.q_len)));
      }
    return y;
  };
  if (r.chance(0.25)) x.used_q = used(false), p.seqused_q = x.used_q.data();
  if (r.chance(0.25)) x.used_k = used(true), p.seqused_k = x.used_k.data();
  if (r.chance(0.15)) {
    for (int64_t b = 0; b < p.b; ++b) {
      int64_t least = p.t;
      for (int64_t i = 0; i < p.n; ++i) least = std::min(least, sequence(p, b, i).k_len);
      x.leftpad.push_back(static_cast<int32_t>(r.integer(0, least)));
    }
    p.leftpad = x.leftpad.data();
  }
  if (!x.paged && r.chance(0.2)) {
    for (int64_t i = 0; i < p.b * p.s; ++i)
      x.segment_q.push_back(static_cast<int32_t>(i % std::max<int64_t>(1, p.s) * 3 / (p.s + 1)));
    for (int64_t i = 0; i < p.b * p.t; ++i)
      x.segment_k.push_back(r.chance(0.05) ? 7 : static_cast<int32_t>(i % p.t * 3 / (p.t + 1)));
    p.segment_ids_q = x.segment_q.data(), p.segment_ids_k = x.segment_k.data();
  }
  if (r.chance(0.3)) {
    int64_t full[5] = {p.b, p.n, p.h, p.s, p.t}, count = 1;
    for (int i = 4; i >= 0; --i) {
      p.bias_shape.dim[i] = r.chance(0.4) ? 1 : full[i];
      p.bias_shape.stride[i] = p.bias_shape.dim[i] == 1 ? 0 : count;
      count *= p.bias_shape.dim[i];
    }
    p.bias_dtype = r.chance(0.5) ? p.dtype : DType::kF32;
    x.bias = Array(p.bias_dtype, count);
    for (int64_t i = 0; i < count; ++i) x.bias.set(i, r.chance(0.05) ? -INFINITY : r.normal());
    p.bias = x.bias.data();
  }
  auto per_head = [&](Broadcast<2>& shape, std::vector<float>& y) {
    shape.dim[0] = r.chance(0.5) ? 1 : p.b, shape.dim[1] = p.h;
    shape.stride[0] = shape.dim[0] == 1 ? 0 : p.h, shape.stride[1] = p.h == 1 ? 0 : 1;
    for (int64_t i = 0; i < shape.dim[0] * p.h; ++i) y.push_back(static_cast<float>(r.real()));
    return y.data();
  };
  if (r.chance(0.2)) p.alibi_slopes = per_head(p.alibi_shape, x.alibi);
  if (r.chance(0.2)) p.sinks = per_head(p.sinks_shape, x.sinks);

  x.q = Array(p.dtype, p.b * p.s * p.h * p.d);
  int64_t rows = x.paged ? p.c * p.page : p.c * p.t;
  x.k = Array(p.dtype, rows * p.g * p.d), x.v = Array(p.dtype, rows * p.g * p.e);
  x.dout = Array(p.dtype, p.b * p.s * p.h * p.e), x.out = x.dout;
  x.lse.assign(p.b * p.h * p.s, NAN), x.dlse = x.lse;
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t i = 0; i < p.n; ++i) {
      Sequence z = sequence(p, b, i);
      for (int64_t y = z.q_begin; y < z.q_begin + z.q_len; ++y) {
        int64_t row = (b * p.s + y) * p.h;
        for (int64_t w = 0; w < p.h * p.d; ++w) x.q.set(row * p.d + w, r.normal());
        for (int64_t w = 0; w < p.h * p.e; ++w) x.dout.set(row * p.e + w, r.normal());
        for (int64_t h = 0; h < p.h; ++h)
          x.dlse[(b * p.h + h) * p.s + y] = r.chance(0.3) ? 0 : r.normal();
      }
      for (int64_t j = 0; j < z.k_len; ++j) {
        int64_t row = key_row(p, b, z, j) * p.g;
        for (int64_t w = 0; w < p.g * p.d; ++w) x.k.set(row * p.d + w, r.normal());
        for (int64_t w = 0; w < p.g * p.e; ++w) x.v.set(row * p.e + w, r.normal());
      }
    }
  p.q = x.q.data(), p.k = x.k.data(), p.v = x.v.data();
  return x;
}

struct Wanted {
  std::vector<double> out, lse, dq, dk, dv, dbias, dsinks;
};

Wanted define(const Case& x) {
  const BwdParams& p = x.p;
  Wanted y;
  y.out.assign(p.b * p.s * p.h * p.e, 0), y.lse.assign(p.b * p.h * p.s, -INFINITY);
  y.dq.assign(p.b * p.s * p.h * p.d, 0);
  y.dk.assign(x.k.size(), 0), y.dv.assign(x.v.size(), 0);
  y.dbias.assign(x.bias.size(), 0), y.dsinks.assign(x.sinks.size(), 0);
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t n = 0; n < p.n; ++n)
      for (int64_t h = 0; h < p.h; ++h) {
        Sequence z = sequence(p, b, n);
        int64_t g = h / (p.h / p.g);
        int64_t diagonal = (p.top_left ? 0 : z.k_len - z.q_len) + (p.shift ? x.shift[b] : 0);
        for (int64_t i = 0; i < z.q_len; ++i) {
          int64_t query = (b * p.s + z.q_begin + i) * p.h + h;
          int64_t lse = (b * p.h + h) * p.s + z.q_begin + i;
          std::vector<double> score(z.k_len, -INFINITY), slope(z.k_len, 1), weight(z.k_len);
          std::vector<int64_t> row(z.k_len), bias(z.k_len);
          double most = -INFINITY, sum = 0;
          for (int64_t j = 0; j < z.k_len; ++j) {
            row[j] = key_row(p, b, z, j) * p.g + g;
            const int64_t* stride = p.bias_shape.stride;
            bias[j] = b * stride[0] + n * stride[1] + h * stride[2] + i * stride[3] + j * stride[4];
            if (p.window_left >= 0 && j < i + diagonal - p.window_left) continue;
            if (p.window_right >= 0 && j > i + diagonal + p.window_right) continue;
            if (p.segment_ids_q &&
                x.segment_q[b * p.s + z.q_begin + i] != x.segment_k[b * p.t + z.k_begin + j])
              continue;
            double a = 0;
            for (int64_t w = 0; w < p.d; ++w) a += x.q[query * p.d + w] * x.k[row[j] * p.d + w];
            a *= p.scale;
            if (p.softcap != 0) {
              double tanh = std::tanh(a / p.softcap);
              a = p.softcap * tanh, slope[j] = 1 - tanh * tanh;
            }
            if (p.bias) a += x.bias[bias[j]];
            if (p.alibi_slopes)
              a -= x.alibi[b * p.alibi_shape.stride[0] + h * p.alibi_shape.stride[1]] *
                   std::abs(i + diagonal - j);
            score[j] = a;
            most = std::max(most, a);
          }
          int64_t sink = 0;
          if (p.sinks) {
            sink = b * p.sinks_shape.stride[0] + h * p.sinks_shape.stride[1];
            most = std::max<double>(most, x.sinks[sink]);
          }
          if (most == -INFINITY) continue;
          for (int64_t j = 0; j < z.k_len; ++j) sum += weight[j] = std::exp(score[j] - most);
          if (p.sinks) sum += std::exp(x.sinks[sink] - most);
          y.lse[lse] = most + std::log(sum);
          double delta = -x.dlse[lse];
          for (int64_t w = 0; w < p.e; ++w) {
            double a = 0;
            for (int64_t j = 0; j < z.k_len; ++j)
              if (weight[j] != 0) a += weight[j] / sum * x.v[row[j] * p.e + w];
            y.out[query * p.e + w] = a;
            delta += a * x.dout[query * p.e + w];
          }
          if (p.sinks) y.dsinks[sink] -= std::exp(x.sinks[sink] - y.lse[lse]) * delta;
          for (int64_t j = 0; j < z.k_len; ++j) {
            if (weight[j] == 0) continue;
            double a = weight[j] / sum, da = 0;
            for (int64_t w = 0; w < p.e; ++w) {
              da += x.dout[query * p.e + w] * x.v[row[j] * p.e + w];
              y.dv[row[j] * p.e + w] += a * x.dout[query * p.e + w];
            }
            double ds = a * (da - delta);
            if (p.bias) y.dbias[bias[j]] += ds;
            ds *= slope[j] * p.scale;
            for (int64_t w = 0; w < p.d; ++w) {
              y.dq[query * p.d + w] += ds * x.k[row[j] * p.d + w];
              y.dk[row[j] * p.d + w] += ds * x.q[query * p.d + w];
            }
          }
        }
      }
  return y;
}

std::string describe(const Case& x) {
  const BwdParams& p = x.p;
  char text[400];
  snprintf(text, sizeof text,
           "b %d s %d t %d h %d g %d d %d e %d n %d dtype %d scale %g softcap %g window %d %d "
           "top_left %d shift %d splits %d bias %d alibi %d sinks %d segments %d cu %d used %d %d "
           "pad %d idx %d "
           "pages %d",
           int(p.b), int(p.s), int(p.t), int(p.h), int(p.g), int(p.d), int(p.e), int(p.n),
           int(p.dtype), p.scale, p.softcap, int(p.window_left), int(p.window_right), p.top_left,
           p.shift != nullptr, int(p.num_splits), p.bias != nullptr, p.alibi_slopes != nullptr,
           p.sinks != nullptr, p.segment_ids_q != nullptr, p.cu_seqlens_q != nullptr,
           p.seqused_q != nullptr, p.seqused_k != nullptr, p.leftpad != nullptr, x.indirect,
           x.paged);
  return text;
}

// Largest difference, relative to the root mean square of what is wanted or to the value itself.
template <class Got>
bool near(const char* name, const Got& got, const std::vector<double>& want, double tolerance,
          const Case& x, const char* level) {
  double square = 0;
  int64_t finite = 0;
  for (double y : want)
    if (std::isfinite(y)) square += y * y, ++finite;
  double unit = finite ? std::sqrt(square / finite) : 0, worst = 0;
  int64_t at = -1;
  for (size_t i = 0; i < want.size(); ++i) {
    double error;
    if (!std::isfinite(want[i]))
      error = got[i] == want[i] ? 0 : INFINITY;
    else
      error = std::fabs(got[i] - want[i]) / (unit + std::fabs(want[i]) + 0.02);
    if (!(error <= worst)) worst = error, at = i;
    if (std::isnan(worst)) break;
  }
  bool ok = worst <= tolerance;
  if (!CHECK(ok) && failed < 20)
    std::printf("  %s %s: error %.3g at %d (%g for %g); %s\n", level, name, worst, int(at),
                double(got[at]), want[at], describe(x).c_str());
  return ok;
}

struct Results {
  Array out, dq, dk, dv;
  std::vector<float> lse, dbias, dsinks;
  bool same(const Results& x) const {
    auto equal = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && (a.empty() || !memcmp(a.data(), b.data(), a.size() * 4));
    };
    return out.same(x.out) && dq.same(x.dq) && dk.same(x.dk) && dv.same(x.dv) &&
           equal(lse, x.lse) && equal(dbias, x.dbias) && equal(dsinks, x.dsinks);
  }
};

Results run(Case& x, int64_t threads) {
  Threads parallel(threads);
  Results y;
  FwdParams f;
  static_cast<Problem&>(f) = x.p;
  y.out = Array(f.dtype, f.b * f.s * f.h * f.e), y.lse.assign(f.b * f.h * f.s, NAN);
  f.out = y.out.data(), f.lse = y.lse.data();
  std::string why = cpu::Check(f);
  if (!CHECK(why.empty())) std::printf("  %s; %s\n", why.c_str(), describe(x).c_str());
  cpu::Forward(f, parallel);
  if (x.paged || x.indirect) return y;
  BwdParams p = x.p;
  y.dq = Array(p.dtype, x.q.size()), y.dk = Array(p.dtype, x.k.size());
  y.dv = Array(p.dtype, x.v.size());
  y.dbias.assign(x.bias.size(), NAN), y.dsinks.assign(x.sinks.size(), NAN);
  p.out = x.out.data(), p.lse = x.lse.data(), p.dout = x.dout.data(), p.dlse = x.dlse.data();
  p.dq = y.dq.data(), p.dk = y.dk.data(), p.dv = y.dv.data();
  p.dbias = p.bias ? y.dbias.data() : nullptr, p.dsinks = p.sinks ? y.dsinks.data() : nullptr;
  cpu::Backward(p, parallel);
  return y;
}

void compare(Random& random, int64_t extent, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    Case x = make(random, extent);
    Wanted want = define(x);
    // The backward gets the true out and lse, rounded.
    for (int64_t b = 0; b < x.p.b; ++b)
      for (int64_t n = 0; n < x.p.n; ++n) {
        Sequence z = sequence(x.p, b, n);
        for (int64_t i = z.q_begin; i < z.q_begin + z.q_len; ++i)
          for (int64_t h = 0; h < x.p.h; ++h) {
            int64_t row = ((b * x.p.s + i) * x.p.h + h) * x.p.e, lse = (b * x.p.h + h) * x.p.s + i;
            for (int64_t w = 0; w < x.p.e; ++w)
              x.out.set(row + w, static_cast<float>(want.out[row + w]));
            x.lse[lse] = static_cast<float>(want.lse[lse]);
          }
      }
    double rough = x.p.dtype == DType::kF32 ? 2e-5 : x.p.dtype == DType::kF16 ? 4e-3 : 3e-2;
    for (const char* level : levels()) {
      Level forced(level);
      Results got = run(x, 1);
      near("out", got.out, want.out, rough, x, level);
      near("lse", got.lse, want.lse, 1e-5, x, level);
      if (!x.paged && !x.indirect) {
        near("dq", got.dq, want.dq, 4 * rough, x, level);
        near("dk", got.dk, want.dk, 4 * rough, x, level);
        near("dv", got.dv, want.dv, 4 * rough, x, level);
        near("dbias", got.dbias, want.dbias, 4 * rough, x, level);
        near("dsinks", got.dsinks, want.dsinks, 4 * rough, x, level);
      }
      if (round % 2 == 0) {
        CHECK(run(x, 2).same(got));
        CHECK(run(x, 5).same(got));
      }
    }
  }
}

}  // namespace

void test_attention() {
  Random random(3);
  compare(random, 30, 250);
  compare(random, 300, 40);
}

void test_check() {
  FwdParams p;
  p.b = 2, p.s = 4, p.t = 8, p.h = p.g = 1, p.d = p.e = 8, p.c = 2, p.n = 1;
  p.max_seqlen_q = p.max_seqlen_k = -1;
  CHECK(cpu::Check(p).empty());
  auto says = [&](const char* text) {
    std::string why = cpu::Check(p);
    if (!CHECK(why.find(text) != std::string::npos))
      std::printf("  `%s`, not %s\n", why.c_str(), text);
  };
  {
    Level forced("sse9");
    says("FLASHJAX_CPU_SIMD=sse9");
  }
  int32_t two[] = {3, 9};
  p.seqused_k = two;
  says("`cache_seqlens`[1] is 9");
  p.seqused_k = nullptr, p.leftpad = two;
  says("`cache_leftpad`[1] is 9");
  p.leftpad = nullptr, p.batch_idx = two;
  says("`cache_batch_idx`[0] is 3");
  p.batch_idx = nullptr;
  int32_t falling[] = {0, 3, 2, 1}, over[] = {0, 4, 0, 5}, negative[] = {-1, 2, 0, 2};
  p.cu_seqlens_q = falling;
  says("`cu_seqlens_q`[1, 1] is 1");
  p.cu_seqlens_q = over;
  says("`cu_seqlens_q`[1, 1] is 5");
  p.cu_seqlens_q = negative;
  says("`cu_seqlens_q`[0, 0] is -1");
  p.cu_seqlens_q = nullptr;
  p.max_seqlen_k = 7;
  says("`max_seqlen_k` is 7");
  p.max_seqlen_k = -1;
  // Two pages of four keys; only the first of row 1 is in use.
  int32_t pages[] = {0, 1, 2, 77}, used[] = {8, 4};
  p.c = 3, p.p = 2, p.page = 4, p.page_table = pages, p.seqused_k = used;
  CHECK(cpu::Check(p).empty());
  used[1] = 5;
  says("`page_table`[1, 1] is 77");
  BwdParams backward;
  static_cast<Problem&>(backward) = p;
  CHECK(cpu::Check(backward).find("page_table") != std::string::npos);
}

}  // namespace flashjax::test
