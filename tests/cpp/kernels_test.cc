// The building blocks of every instruction set that this CPU has: exp2, tanh and the matrix
// products.
#include "cpu/kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "levels.h"
#include "test.h"

namespace flashjax::test {
namespace {

// In units of the last place of the result.
double ulps(float got, double want) {
  float rounded = static_cast<float>(want);
  double unit = std::nextafter(std::fabs(rounded), INFINITY) - std::fabs(rounded);
  return std::fabs(got - want) / unit;
}

void functions(const cpu::Kernels& kernels) {
  std::vector<float> x, y;
  for (double v = -126; v < 128; v += 0.00137) x.push_back(static_cast<float>(v));
  y.resize(x.size());
  kernels.exp2(x.data(), y.data(), x.size());
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i)
    worst = std::fmax(worst, ulps(y[i], std::exp2(double(x[i]))));
  if (!CHECK(worst < 1.5)) std::printf("  %s: exp2 off by %.2f ulp\n", kernels.name, worst);

  float special[] = {-INFINITY, -1e30f, -127.f, 0.f, 1.f, NAN}, result[6];
  kernels.exp2(special, result, 6);
  CHECK(result[0] == 0 && result[1] == 0 && result[2] == 0);
  CHECK(result[3] == 1 && result[4] == 2 && std::isnan(result[5]));

  x.clear();
  for (double v = 1e-6; v < 20; v *= 1.0007)
    x.push_back(static_cast<float>(v)), x.push_back(-x.back());
  y.resize(x.size());
  kernels.tanh(x.data(), y.data(), x.size());
  worst = 0;
  for (size_t i = 0; i < x.size(); ++i)
    worst = std::fmax(worst, ulps(y[i], std::tanh(double(x[i]))));
  if (!CHECK(worst < 4)) std::printf("  %s: tanh off by %.2f ulp\n", kernels.name, worst);
  float ends[] = {INFINITY, -INFINITY, 0.f, NAN};
  kernels.tanh(ends, result, 4);
  CHECK(result[0] == 1 && result[1] == -1 && result[2] == 0 && std::isnan(result[3]));
}

void products(const cpu::Kernels& kernels, Random& random) {
  for (int round = 0; round < 200; ++round) {
    bool bf16 = kernels.has_bf16 && random.chance(0.5);
    bool transposed = random.chance(0.5), add = random.chance(0.5);
    int64_t m = random.integer(1, 40), n = random.integer(1, 9) * kernels.lanes;
    int64_t k = random.integer(1, 70), depth = bf16 ? 2 : 1;
    std::vector<float> a(m * k), b(k * n), c(m * n), got;
    std::vector<double> want(m * n);
    // Small integers: exact in bfloat16, and so are the sums.
    std::vector<int> a_values(m * k * depth), b_values(k * n * depth);
    auto element = [&](std::vector<float>& x, std::vector<int>& values, int64_t i) {
      uint32_t bits = 0;
      float f = 0;
      for (int64_t y = 0; y < depth; ++y) {
        values[i * depth + y] = static_cast<int>(random.integer(-8, 8));
        f = static_cast<float>(values[i * depth + y]);
        uint32_t u;
        memcpy(&u, &f, 4);
        bits |= (u >> 16) << (16 * y);
      }
      if (bf16) memcpy(&f, &bits, 4);
      memcpy(&x[i], &f, 4);
    };
    for (int64_t i = 0; i < m * k; ++i) element(a, a_values, i);
    for (int64_t i = 0; i < k * n; ++i) element(b, b_values, i);
    for (int64_t i = 0; i < m * n; ++i) c[i] = static_cast<float>(random.integer(-8, 8));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = add ? c[i * n + j] : 0;
        for (int64_t x = 0; x < k; ++x)
          for (int64_t y = 0; y < depth; ++y)
            sum += a_values[(transposed ? x * m + i : i * k + x) * depth + y] *
                   b_values[(x * n + j) * depth + y];
        want[i * n + j] = sum;
      }
    got = c;
    kernels.gemm(bf16, transposed, add, m, n, k, a.data(), b.data(), got.data());
    bool same = true;
    for (int64_t i = 0; i < m * n; ++i) same &= got[i] == want[i];
    if (!CHECK(same))
      std::printf("  %s: bf16 %d transposed %d add %d m %d n %d k %d\n", kernels.name, bf16,
                  transposed, add, int(m), int(n), int(k));
  }
}

}  // namespace

void test_kernels() {
  Random random(2);
  for (const char* level : levels()) {
    Level forced(level);
    const cpu::Kernels* kernels = cpu::select_kernels();
    CHECK(!strcmp(kernels->name, level));
    functions(*kernels);
    products(*kernels, random);
  }
  Level unknown("sse9");
  CHECK(cpu::select_kernels() == nullptr);
}

}  // namespace flashjax::test
