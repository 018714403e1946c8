// The building blocks of the sm_90a kernels, each against its meaning: swizzled shared memory,
// tensor-map boxes, matrix descriptors of both orders, fragment maps, stmatrix, additions to
// memory. Values are small integers, so that results are exact. tests/cuda_blocks/run builds and
// runs it on a machine with a Hopper GPU.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/sm90/host.h"
#include "wgmma.cuh"

using namespace flashjax;
using namespace flashjax::sm90;

static int failures = 0;
static void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

static unsigned short bf16(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<unsigned short>(bits >> 16);
}
static float value(int row, int column) {
  return static_cast<float>((row * 7 + column * 3) % 13 - 6);
}

// A [rows, columns] matrix of 16-bit values on the device.
struct Matrix {
  int rows, columns;
  std::vector<float> host;
  unsigned short* device = nullptr;
  Matrix(int rows, int columns, int salt) : rows(rows), columns(columns), host(rows * columns) {
    std::vector<unsigned short> bits(host.size());
    for (int i = 0; i < rows * columns; ++i)
      bits[i] = bf16(host[i] = value(i / columns + salt, i % columns));
    check(cudaMalloc(&device, bits.size() * 2), "malloc");
    check(cudaMemcpy(device, bits.data(), bits.size() * 2, cudaMemcpyHostToDevice), "copy");
  }
  float operator()(int r, int c) const { return host[r * columns + c]; }
};

// Where element (r, c) of a swizzled tile is, and its value.
static DI u32 place(u32 tile, int rows, int r, int c) {
  return tile + c / 64 * rows * 128 + r * 128 + ((((c % 64) / 8) ^ (r & 7)) << 4) + c % 8 * 2;
}
static DI float element(u32 tile, int rows, int r, int c) {
  const u32 at = place(tile, rows, r, c), pair = load_int(at & ~3u);
  return at & 2 ? high<false>(pair) : low<false>(pair);
}

// Row-major global memory to the swizzled tile that a tensor map would make: chunks of 64 columns,
// 128 bytes a row.
static DI void fill(u32 tile, const unsigned short* m, int rows, int columns) {
  for (int i = 2 * threadIdx.x; i < rows * columns; i += 2 * blockDim.x) {
    const int r = i / columns, c = i % columns;
    store_int(place(tile, rows, r, c), m[i + 1] << 16 | m[i]);
  }
  fence_async();
  __syncthreads();
}
// d of one warpgroup to [64, N] by the accumulator map.
template <int N>
static DI void spill(float* out, float (&d)[N / 2]) {
  int t = threadIdx.x, w = t / 32, l = t % 32;
  for (int j = 0; j < N / 8; j++)
    for (int h = 0; h < 2; h++)
      for (int e = 0; e < 2; e++)
        out[(16 * w + l / 4 + 8 * h) * N + 8 * j + 2 * (l % 4) + e] = d[4 * j + 2 * h + e];
}
// The sum of `STEPS` products, of which add(d, k) adds the k-th to the accumulator.
template <int N, int STEPS, typename Add>
static DI void accumulate(float* out, Add add) {
  float d[N / 2];
  pin(d);
  wg_fence();
#pragma unroll
  for (int k = 0; k < STEPS; k++) add(d, k);
  wg_commit();
  wg_wait<0>();
  pin(d);
  spill<N>(out, d);
}
static DI u32 base() {
  extern __shared__ unsigned char raw[];
  return (smem_u32(raw) + 1023) & ~1023u;
}

// A [64, 128] times B' with B [N, 128]: both K-major.
template <int N>
static __global__ void times_transposed(const unsigned short* a, const unsigned short* b,
                                        float* out) {
  u32 sa = base(), sb = sa + 64 * 256;
  fill(sa, a, 64, 128), fill(sb, b, N, 128);
  accumulate<N, 8>(out, [=](auto& d, int k) {
    Wgmma<N, false>::template ss<0, 0>(d, desc(desc_lo(sa + k / 4 * 64 * 128 + k % 4 * 32, 16)),
                                       desc(desc_lo(sb + k / 4 * N * 128 + k % 4 * 32, 16)), k > 0);
  });
}

// A [64, 64] from registers, as the accumulator map packs it, times B [64, N], MN-major.
template <int N>
static __global__ void from_registers(const unsigned short* a, const unsigned short* b,
                                      float* out) {
  u32 sb = base();
  fill(sb, b, 64, N);
  int t = threadIdx.x, w = t / 32, l = t % 32;
  u32 frag[16];
  for (int i = 0; i < 16; i++) {
    int j = i / 2, h = i % 2, row = 16 * w + l / 4 + 8 * h, c = 8 * j + 2 * (l % 4);
    frag[i] = pack<false>(to_float<false>(a[row * 64 + c]), to_float<false>(a[row * 64 + c + 1]));
  }
  accumulate<N, 4>(out, [&](auto& d, int k) {
    Wgmma<N, false>::template rs<1>(d, frag[4 * k], frag[4 * k + 1], frag[4 * k + 2],
                                    frag[4 * k + 3], desc(desc_lo(sb, 64 * 128) + (k * 2048 >> 4)),
                                    k > 0);
  });
}

// A' with A [128, 64] (MN-major A) times B [128, N] (MN-major B).
template <int N>
static __global__ void transposed_times(const unsigned short* a, const unsigned short* b,
                                        float* out) {
  u32 sa = base(), sb = sa + 128 * 128;
  fill(sa, a, 128, 64), fill(sb, b, 128, N);
  accumulate<N, 8>(out, [=](auto& d, int k) {
    Wgmma<N, false>::template ss<1, 1>(d, desc(desc_lo(sa, 16) + (k * 2048 >> 4)),
                                       desc(desc_lo(sb, 128 * 128) + (k * 2048 >> 4)), k > 0);
  });
}

// A box of 96 rows and two chunks by tensor map, read back through the swizzle; rows past the end
// are zeros.
static __global__ void box(const __grid_constant__ TMap map, int first, int last, float* out) {
  u32 tile = base(), bar = tile + 2 * 96 * 128;
  if (threadIdx.x == 0) {
    mb_init(bar, 1);
    mb_init_fence();
    mb_expect(bar, 2 * 96 * 128);
    for (int c = 0; c < 2; c++)
      tma_load(tile + c * 96 * 128, &map, bar, c * 64, first, 1, last, kEvictFirst);
  }
  __syncthreads();
  mb_wait(bar, 0);
  for (int i = threadIdx.x; i < 96 * 128; i += blockDim.x)
    out[i] = element(tile, 96, i / 128, i % 128);
}

// Ones from shared memory to a box of 64 rows and columns.
static __global__ void put_box(const __grid_constant__ TMap map, int first, int last) {
  u32 tile = base();
  for (int i = threadIdx.x; i < 64 * 32; i += blockDim.x) store_int(tile + 4 * i, 0x3f803f80);
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) tma_store(&map, tile, 0, first, 1, last), bulk_commit(), bulk_wait<0>();
}

static __global__ void widen(const unsigned short* x, int count, float* out) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = to_float<false>(x[i]);
}

// stmatrix of accumulator fragments, as rows and transposed, read back through the swizzle. One
// warp: 16 x 64.
static __global__ void matrix_stores(float* rows, float* columns) {
  u32 tile = base(), turned = tile + 1024 * 16;
  int l = threadIdx.x;
  auto x = [](int r, int c) { return (float)((r * 7 + c * 3) % 13 - 6); };
  int rr = (l & 7) + ((l >> 3) & 1) * 8, tr = (l & 7) + ((l >> 4) & 1) * 8, kc = (l >> 3) & 1;
  for (int k = 0; k < 4; k++) {
    u32 f[4];
    for (int i = 0; i < 4; i++) {
      int row = l / 4 + 8 * (i % 2), c = 16 * k + 8 * (i / 2) + 2 * (l % 4);
      f[i] = pack<false>(x(row, c), x(row, c + 1));
    }
    stmatrix4(tile + rr * 128 + (((2 * k + (l >> 4)) ^ (rr & 7)) << 4), f[0], f[1], f[2], f[3]);
    stmatrix4_trans(turned + k * 2048 + tr * 128 + ((kc ^ (tr & 7)) << 4), f[0], f[1], f[2], f[3]);
  }
  __syncwarp();
  for (int i = l; i < 16 * 64; i += 32) rows[i] = element(tile, 16, i / 64, i % 64);
  for (int i = l; i < 64 * 16; i += 32) columns[i] = element(turned, 64, i / 16, i % 16);
}

// Both ways of adding a tile to memory.
static __global__ void additions(float* a, float* b) {
  u32 tile = base();
  store_shared4(tile + threadIdx.x * 16, 1, 2, 3, threadIdx.x);
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) bulk_add_f32(a, tile, 128 * 16), bulk_commit(), bulk_wait<0>();
  add_global4(b + threadIdx.x * 4, 1, 2, 3, threadIdx.x);
}

template <typename Want>
static void compare(const char* what, const float* device, int rows, int columns, Want want) {
  check(cudaDeviceSynchronize(), what);
  std::vector<float> got(rows * columns);
  check(cudaMemcpy(got.data(), device, got.size() * 4, cudaMemcpyDeviceToHost), "copy");
  int wrong = 0;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) wrong += got[r * columns + c] != want(r, c);
  std::printf("%s %s\n", wrong ? "FAIL" : "ok  ", what);
  failures += wrong != 0;
}

template <int N>
static void products(float* out) {
  constexpr int kShared = 200 * 1024;
  char what[64];
  Matrix a(64, 128, 1), b(N, 128, 2), c(64, 64, 3), d(64, N, 4), e(128, 64, 5), f(128, N, 6);
  auto sum = [](int k, auto term) {
    float x = 0;
    for (int i = 0; i < k; ++i) x += term(i);
    return x;
  };
  for (auto kernel : {times_transposed<N>, from_registers<N>, transposed_times<N>})
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
          "shared");
  times_transposed<N><<<1, 128, kShared>>>(a.device, b.device, out);
  std::snprintf(what, sizeof what, "K-major A and B, n = %d", N);
  compare(what, out, 64, N,
          [&](int r, int x) { return sum(128, [&](int k) { return a(r, k) * b(x, k); }); });
  if constexpr (N % 64 == 0) {
    from_registers<N><<<1, 128, kShared>>>(c.device, d.device, out);
    std::snprintf(what, sizeof what, "A in registers, MN-major B, n = %d", N);
    compare(what, out, 64, N,
            [&](int r, int x) { return sum(64, [&](int k) { return c(r, k) * d(k, x); }); });
    transposed_times<N><<<1, 128, kShared>>>(e.device, f.device, out);
    std::snprintf(what, sizeof what, "MN-major A and B, n = %d", N);
    compare(what, out, 64, N,
            [&](int r, int x) { return sum(128, [&](int k) { return e(k, r) * f(k, x); }); });
  }
}

int main() {
  float *out, *more;
  check(cudaMalloc(&out, 1 << 20), "malloc");
  check(cudaMalloc(&more, 1 << 20), "malloc");
  products<64>(out);
  products<80>(out);
  products<112>(out);
  products<128>(out);
  products<160>(out);
  products<256>(out);

  Matrix x(100 * 2, 104, 7);  // [1, 100, 2, 104]: the box runs past rows and columns
  TMap map;
  check(tensor_map(map, x.device, DType::kBF16, 1, 100, 2, 104, 96), "map");
  box<<<1, 128, 30 * 1024>>>(map, 10, 0, out);
  check(cudaGetLastError(), "box");
  compare("tensor-map box", out, 96, 128,
          [&](int r, int c) { return r + 10 < 100 && c < 104 ? x(2 * (r + 10) + 1, c) : 0.f; });

  // Of [2, 50, 2, 104] a sequence of 30 rows that ends at row 40 of the second: from its row 5 on.
  check(sequence_map(map, x.device, DType::kBF16, 2, 50, 2, 104, 96), "map");
  box<<<1, 128, 30 * 1024>>>(map, 50 - 30 + 5, 50 + 40, out);
  check(cudaGetLastError(), "box of a sequence");
  compare("tensor-map box of a sequence", out, 96, 128, [&](int r, int c) {
    return 5 + r < 30 && c < 104 ? x(2 * (50 + 10 + 5 + r) + 1, c) : 0.f;
  });
  check(sequence_map(map, x.device, DType::kBF16, 2, 50, 2, 104, 64), "map");
  put_box<<<1, 128, 30 * 1024>>>(map, 50 - 30 + 5, 50 + 40);
  widen<<<1, 128>>>(x.device, 200 * 104, out);
  check(cudaGetLastError(), "store of a sequence");
  compare("tensor-map store of a sequence", out, 200, 104, [&](int r, int c) {
    const int row = r / 2 - 60;  // of the sequence
    return r % 2 == 1 && row >= 5 && row < 30 && c < 64 ? 1.f : x(r, c);
  });

  matrix_stores<<<1, 32, 40 * 1024>>>(out, more);
  compare("stmatrix", out, 16, 64, [](int r, int c) { return value(r, c); });
  compare("stmatrix.trans", more, 64, 16, [](int r, int c) { return value(c, r); });

  check(cudaMemset(out, 0, 2048), "set");
  check(cudaMemset(more, 0, 2048), "set");
  for (int i = 0; i < 3; ++i) additions<<<1, 128, 8 * 1024>>>(out, more);
  auto thrice = [](int r, int c) { return 3.f * (c == 3 ? r : c + 1); };
  compare("bulk addition", out, 128, 4, thrice);
  compare("vector addition", more, 128, 4, thrice);
  return failures != 0;
}
