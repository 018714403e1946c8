// Numbers of 16 bits.
#include <cmath>
#include <cstring>
#include <vector>

#include "machine.h"

namespace emulator {

float from_half(uint16_t x) {
  static const std::vector<float> all = [] {
    std::vector<float> y(65536);
    for (int i = 0; i < 65536; i++) {
      const int exponent = i >> 10 & 31, fraction = i & 1023;
      const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                         : exponent     ? std::ldexp(1.f + fraction / 1024.f, exponent - 15)
                                        : std::ldexp(fraction / 1024.f, -14);
      y[i] = i >> 15 ? -size : size;
    }
    return y;
  }();
  return all[x];
}

// To nearest, ties to even.
uint16_t to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7FFF;
  if (size >= 65520.f) return sign | 0x7C00;
  if (size == 0) return sign;
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place
  const float places = std::nearbyint(std::ldexp(size, -unit));
  // Places of 2^unit: the exponent's field follows by adding.
  const int field = unit == -24 ? 0 : unit + 24;
  return sign | static_cast<uint16_t>((field << 10) + static_cast<int>(places));
}

uint16_t to_bf16(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator
