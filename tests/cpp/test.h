// Checks that count, and what all tests share. A test is a function that main.cc lists.
#pragma once
#include <cstdint>
#include <cstdio>

namespace flashjax::test {

inline int passed = 0, failed = 0;

// Counts, and says so when it fails; at most 50 failures are printed.
inline bool check(bool ok, const char* what, const char* file, int line) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 50) std::printf("%s:%d: failed: %s\n", file, line, what);
  return ok;
}

#define CHECK(x) ::flashjax::test::check((x), #x, __FILE__, __LINE__)

// Numbers that are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x1234567) {}
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ * 0x2545f4914f6cdd1d;
  }
  // In [lo, hi].
  int64_t integer(int64_t lo, int64_t hi) {
    return lo + static_cast<int64_t>((bits() >> 11) % static_cast<uint64_t>(hi - lo + 1));
  }
  bool chance(double p) { return real() < p; }
  double real() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  // Variance 1, enough like a normal variable.
  float normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += real();
    return static_cast<float>(sum - 6);
  }

 private:
  uint64_t state_;
};

void test_sequence();
void test_select();
void test_kernels();
void test_attention();
void test_check();

}  // namespace flashjax::test
