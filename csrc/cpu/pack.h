// Rows of the operands, in their dtype, to and from the 32-bit elements that the micro-kernels
// read. Element: a float, or (Pairs) two bfloat16. Null rows are zeros, and so is every pad.
#pragma once
#include <cstring>

namespace flashjax::cpu {
namespace {

constexpr int kLanes = Simd::kLanes;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t bytes_of(DType type) { return type == DType::kF32 ? 4 : 2; }
inline const char* element(const void* x, DType type, int64_t i) {
  return static_cast<const char*>(x) + i * bytes_of(type);
}
inline char* element(void* x, DType type, int64_t i) {
  return static_cast<char*>(x) + i * bytes_of(type);
}

inline float from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_float(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

inline uint16_t float_to_bf16(float f) {
  uint32_t u = to_bits(f);
  if (f != f) return static_cast<uint16_t>((u | 0x400000) >> 16);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t x) {
  uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest << 13));
  if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + 0x38000000));
  return from_bits(sign | to_bits(static_cast<float>(rest) * 0x1p-24f));
}

inline uint16_t float_to_f16(float f) {
  uint32_t u = to_bits(f), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((rest >> 13) & 0x3ff));
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16
  if (rest >= 0x38800000) {
    rest += 0xfff + ((rest >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rest - 0x38000000) >> 13));
  }
  // Denormal: adding 1/2 leaves the value, rounded to multiples of 2^-24, in the low bits.
  uint32_t low = to_bits(from_bits(rest) + 0.5f) - 0x3f000000;
  return static_cast<uint16_t>(sign | low);
}

inline void load_row(DType type, const char* x, int64_t n, float* y) {
  int64_t i = 0;
  if (type == DType::kF32) {
    memcpy(y, x, n * 4);
    return;
  }
  const uint16_t* u = reinterpret_cast<const uint16_t*>(x);
  if (type == DType::kBF16) {
#ifdef FLASHJAX_SIMD_CONVERTS
    for (; i + kLanes <= n; i += kLanes) Simd::store(y + i, Simd::load_bf16(u + i));
#endif
    for (; i < n; ++i) y[i] = bf16_to_float(u[i]);
  } else {
#ifdef FLASHJAX_SIMD_CONVERTS
    for (; i + kLanes <= n; i += kLanes) Simd::store(y + i, Simd::load_f16(u + i));
#endif
    for (; i < n; ++i) y[i] = f16_to_float(u[i]);
  }
}

// y = x * scale.
inline void store_row(DType type, const float* x, int64_t n, float scale, char* y) {
  int64_t i = 0;
  const Simd::F factor = Simd::set(scale);
  if (type == DType::kF32) {
    float* f = reinterpret_cast<float*>(y);
    for (; i + kLanes <= n; i += kLanes) Simd::store(f + i, Simd::mul(Simd::load(x + i), factor));
    for (; i < n; ++i) f[i] = x[i] * scale;
    return;
  }
  uint16_t* u = reinterpret_cast<uint16_t*>(y);
  if (type == DType::kBF16) {
#ifdef FLASHJAX_SIMD_CONVERTS
    for (; i + kLanes <= n; i += kLanes)
      Simd::store_bf16(u + i, Simd::mul(Simd::load(x + i), factor));
#endif
    for (; i < n; ++i) u[i] = float_to_bf16(x[i] * scale);
  } else {
#ifdef FLASHJAX_SIMD_CONVERTS
    for (; i + kLanes <= n; i += kLanes)
      Simd::store_f16(u + i, Simd::mul(Simd::load(x + i), factor));
#endif
    for (; i < n; ++i) u[i] = float_to_f16(x[i] * scale);
  }
}

// y [columns, width] = the transpose of x [width, columns], 32-bit elements. Columns are rounded up
// to kLanes on both sides: x must be readable and y writable that far.
inline void transpose(const float* x, int64_t ldx, int64_t columns, float* y, int64_t width) {
  for (int64_t r = 0; r < width; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes)
      Simd::transpose(x + r * ldx + c, ldx, y + c * width + r, width);
}

// Rows lie apart, often on pages of their own, where no hardware prefetcher looks: so many of them
// ahead are worth asking for.
inline int64_t rows_ahead(int64_t bytes) { return 1 + 4096 / bytes; }
inline void prefetch_row(const char* x, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(x + i);
}

// How a dtype goes through the micro-kernels. kDepth values along the contracted dimension make one
// element.
struct AsFloats {
  using Op = Floats;
  static constexpr int kDepth = 1;
  // y [rows, ld] from rows of n values: the contracted dimension is the last.
  template <class Row>
  static void pack(DType type, int64_t rows, int64_t n, Row row, float* y, int64_t ld) {
    for (int64_t i = 0; i < rows; ++i, y += ld) {
      const char* x = row(i);
      int64_t filled = x ? n : 0;
      if (x) load_row(type, x, n, y);
      if (filled < ld) memset(y + filled, 0, (ld - filled) * 4);
    }
  }
  // The same for the rows as the contracted dimension: y [rows / kDepth, ld].
  template <class Row>
  static void pack_deep(DType type, int64_t rows, int64_t n, Row row, float* y, int64_t ld) {
    pack(type, rows, n, row, y, ld);
  }
};

#ifdef FLASHJAX_HAS_BF16
struct AsPairs {
  using Op = Pairs;
  static constexpr int kDepth = 2;
  template <class Row>
  static void pack(DType, int64_t rows, int64_t n, Row row, float* y, int64_t ld) {
    for (int64_t i = 0; i < rows; ++i, y += ld) {
      const char* x = row(i);
      int64_t filled = x ? n * 2 : 0;
      if (x) memcpy(y, x, filled);
      if (filled < ld * 4) memset(reinterpret_cast<char*>(y) + filled, 0, ld * 4 - filled);
    }
  }
  // rows is even.
  template <class Row>
  static void pack_deep(DType, int64_t rows, int64_t n, Row row, float* y, int64_t ld) {
    for (int64_t i = 0; i < rows; i += 2, y += ld) {
      const uint16_t* lo = reinterpret_cast<const uint16_t*>(row(i));
      const uint16_t* hi = reinterpret_cast<const uint16_t*>(row(i + 1));
      int64_t x = 0;
      for (; x + kLanes <= n; x += kLanes)
        Simd::store(y + x, Pairs::zip(lo ? lo + x : nullptr, hi ? hi + x : nullptr));
      for (; x < n; ++x)
        y[x] = from_bits((lo ? lo[x] : 0u) | static_cast<uint32_t>(hi ? hi[x] : 0) << 16);
      for (; x < ld; ++x) y[x] = 0;
    }
  }
};
#endif

template <class As>
int64_t elements(int64_t n) {
  return (n + As::kDepth - 1) / As::kDepth;
}

}  // namespace
}  // namespace flashjax::cpu
