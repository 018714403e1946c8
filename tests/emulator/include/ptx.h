// The functions of csrc/cuda that are PTX, in C++. translate.py puts this in front of ptx.cuh, less
// those functions; so one that is missing here does not compile. Within namespace flashjax::sm90.
#pragma once
#include "device.h"
#include "tensor_map.h"

namespace flashjax::sm90 {

typedef unsigned int u32;
typedef unsigned long long u64;
struct TMap;

template <typename T>
const T& shared(u32 address) {
  return *static_cast<const T*>(emulator::read(address, sizeof(T)));
}
template <typename T>
void share(u32 address, const T& x) {
  *static_cast<T*>(emulator::write(address, sizeof(T))) = x;
}

inline void jitter() {}

// ---- mbarrier
inline void mb_init(u32 b, u32 n) { emulator::barrier_init(b, n); }
inline void mb_init_fence() {}
inline void mb_expect(u32 b, u32 bytes) { emulator::barrier_expect(b, bytes); }
inline void mb_arrive(u32 b) { emulator::barrier_arrive(b, -1); }
inline void mb_arrive_at(u32 b, u32 rank) { emulator::barrier_arrive(b, static_cast<int>(rank)); }
inline void mb_wait(u32 b, u32 parity) { emulator::barrier_wait(b, parity); }
inline void mb_rest(u32 b, u32 parity) { emulator::barrier_wait(b, parity); }
inline void sched_fence(int x, u32 b) {
  if (x < 0) emulator::barrier_wait(b, 0);
}

// ---- bulk copies
inline void prefetch_map(const TMap*) {}
inline void tma_load(u32 dst, const TMap* m, u32 bar, int c0, int c1, int c2, int c3, u64) {
  emulator::load_box(dst, emulator::box_at(m, c0, c1, c2, c3), bar, 1);
}
inline void tma_load_all(u32 dst, const TMap* m, u32 bar, int c0, int c1, int c2, int c3, u64,
                         unsigned short mask) {
  emulator::load_box(dst, emulator::box_at(m, c0, c1, c2, c3), bar, mask);
}
inline void tma_prefetch(const TMap*, int, int, int, int) {}
inline void tma_store(const TMap* m, u32 src, int c0, int c1, int c2, int c3) {
  emulator::store_box(src, emulator::box_at(m, c0, c1, c2, c3), false);
}
inline void tma_add(const TMap* m, u32 src, int c0, int c1, int c2, int c3) {
  emulator::store_box(src, emulator::box_at(m, c0, c1, c2, c3), true);
}
inline void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
  emulator::load_bytes(dst, src, bytes, bar);
}
inline void bulk_store(void* dst, u32 src, u32 bytes) {
  emulator::store_bytes(dst, src, bytes, false);
}
inline void bulk_add_f32(float* dst, u32 src, u32 bytes) {
  emulator::store_bytes(dst, src, bytes, true);
}
inline void bulk_commit() { emulator::commit_copies(); }
template <int N>
void bulk_wait_read() {
  emulator::wait_copies(N, true);
}
template <int N>
void bulk_wait() {
  emulator::wait_copies(N, false);
}
inline void copy16(u32 to, const void* from) { emulator::copy_line(to, from); }
inline void copies_wait() { emulator::wait_lines(); }

// ---- products
inline void wg_fence() {}
inline void wg_commit() { emulator::commit_products(); }
template <int N>
void wg_wait() {
  emulator::wait_products(N);
}
template <int N>
void pin(float (&d)[N]) {
  asm volatile("" : : "r"(&d) : "memory");
}
inline u64 desc(u32 lo) { return u64{(1024u >> 4) | (1u << 30)} << 32 | lo; }

// ---- lanes
inline bool elect_one() { return emulator::lane() == 0; }

// A 16-bit element of a register of a matrix fragment.
inline unsigned short half_of(u32 x, int i) { return static_cast<unsigned short>(x >> (16 * i)); }

template <bool F16>
float to_float(unsigned short x) {
  return F16 ? emulator::from_half(x) : emulator::from_bf16(x);
}
template <bool F16>
u32 pack(float lo, float hi) {
  auto to = F16 ? emulator::to_half : emulator::to_bf16;
  return u32{to(hi)} << 16 | to(lo);
}

template <bool F16>
void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  struct Mine {
    float* d;
    u32 a[4], b[2];
  } mine{d, {a0, a1, a2, a3}, {b0, b1}};
  emulator::together(~0u, "mma", mine, [](Mine* const* all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0; e < 2; e++) {
        const int r = lane / 4, c = 2 * (lane % 4) + e;
        for (int i = 0; i < 4; i++)
          a[r + i % 2 * 8][c + i / 2 * 8] = to_float<F16>(half_of(all[lane]->a[i], e));
        for (int i = 0; i < 2; i++) b[c + 8 * i][r] = to_float<F16>(half_of(all[lane]->b[i], e));
      }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int r = lane / 4 + i / 2 * 8, c = 2 * (lane % 4) + i % 2;
        float sum = 0.f;
        for (int k = 0; k < 16; k++) sum += a[r][k] * b[k][c];
        all[lane]->d[i] += sum;
      }
  });
}

// Matrices of 8 x 8: lane l has of matrix j, in register j, (l / 4, 2 (l % 4) + {0, 1}), or with
// `trans` the same of its transpose. Lane 8 j + i has the address of its row i.
struct Matrices {
  u32 address, x[4];
};
template <int kCount>
void store_matrices(u32 a, u32 r0, u32 r1, u32 r2, u32 r3, bool trans) {
  Matrices mine{a, {r0, r1, r2, r3}};
  emulator::together(~0u, "stmatrix", mine, [trans](Matrices* const* all) {
    for (int j = 0; j < kCount; j++)
      for (int row = 0; row < 8; row++) {
        unsigned short line[8];
        for (int c = 0; c < 8; c++) {
          const int r = trans ? c : row, k = trans ? row : c;
          line[c] = half_of(all[4 * r + k / 2]->x[j], k % 2);
        }
        std::memcpy(emulator::write(all[8 * j + row]->address, 16), line, 16);
      }
  });
}
inline void stmatrix4(u32 a, u32 r0, u32 r1, u32 r2, u32 r3) {
  store_matrices<4>(a, r0, r1, r2, r3, false);
}
inline void stmatrix4_trans(u32 a, u32 r0, u32 r1, u32 r2, u32 r3) {
  store_matrices<4>(a, r0, r1, r2, r3, true);
}
inline void stmatrix2_trans(u32 a, u32 r0, u32 r1) { store_matrices<2>(a, r0, r1, 0, 0, true); }

inline Matrices load_matrices(u32 a, bool trans) {
  Matrices mine{a, {}};
  emulator::together(~0u, "ldmatrix", mine, [trans](Matrices* const* all) {
    for (int j = 0; j < 4; j++) {
      unsigned short rows[8][8];
      for (int row = 0; row < 8; row++)
        std::memcpy(rows[row], emulator::read(all[8 * j + row]->address, 16), 16);
      for (int lane = 0; lane < 32; lane++) {
        const int r = lane / 4, c = 2 * (lane % 4);
        all[lane]->x[j] =
            trans ? u32{rows[c + 1][r]} << 16 | rows[c][r] : u32{rows[r][c + 1]} << 16 | rows[r][c];
      }
    }
  });
  return mine;
}
inline void ldmatrix4(u32 a, u32& r0, u32& r1, u32& r2, u32& r3) {
  const Matrices x = load_matrices(a, false);
  r0 = x.x[0], r1 = x.x[1], r2 = x.x[2], r3 = x.x[3];
}
inline void ldmatrix4_trans(u32 a, u32& r0, u32& r1, u32& r2, u32& r3) {
  const Matrices x = load_matrices(a, true);
  r0 = x.x[0], r1 = x.x[1], r2 = x.x[2], r3 = x.x[3];
}
inline u32 transpose_matrix(u32 x) {
  Matrices mine{0, {x, 0}};
  emulator::together(~0u, "movmatrix", mine, [](Matrices* const* all) {
    for (int lane = 0; lane < 32; lane++) {
      const int r = lane / 4, c = 2 * (lane % 4);
      u32 y = 0;
      for (int e = 0; e < 2; e++)
        y |= u32{half_of(all[4 * (c + e) + r / 2]->x[0], r % 2)} << (16 * e);
      all[lane]->x[1] = y;
    }
  });
  return mine.x[1];
}

// ---- barriers and memory
inline void fence_async_global() {}
inline u32 load_acquire(const u32* p) { return emulator::yield(), *p; }
inline int load_acquire(const int* p) { return emulator::yield(), *p; }
inline void store_release(int* p, int x) { *p = x; }
inline void add_release(u32* p, u32 x) { *p += x; }
inline void add_relaxed(u32* p, u32 x) { *p += x; }
inline void fence_gpu() {}
inline void fence_async() { emulator::fence_async(); }
inline void bar_sync(int id, int n) { emulator::named_barrier(id, n, true); }
inline void bar_arrive(int id, int n) { emulator::named_barrier(id, n, false); }
inline int cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync() { emulator::cluster_barrier(); }
template <int N>
void reg_inc() {}
template <int N>
void reg_dec() {}
inline void pdl_wait() {}
inline void pdl_launch() {}

inline void add_global4(float* p, float a, float b, float c, float d) {
  p[0] += a, p[1] += b, p[2] += c, p[3] += d;
}
inline float load_shared(u32 p) { return shared<float>(p); }
inline void store_float(u32 p, float x) { share(p, x); }
inline void load_shared2(float& a, float& b, u32 p) {
  const float2 x = shared<float2>(p);
  a = x.x, b = x.y;
}
inline void load_shared4(float (&x)[4], u32 p) {
  const float4 y = shared<float4>(p);
  x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}
inline int load_int(u32 p) { return shared<int>(p); }
inline void load_int2(int& a, int& b, u32 p) {
  const int2 x = shared<int2>(p);
  a = x.x, b = x.y;
}
inline int4 load_int4(u32 p) { return shared<int4>(p); }
inline void store_int(u32 p, int x) { share(p, x); }
inline void store_int4(u32 p, int4 x) { share(p, x); }
inline void store_shared4(u32 p, float a, float b, float c, float d) {
  share(p, float4{a, b, c, d});
}
inline int add_int(u32 p, int x) {
  const int before = shared<int>(p);
  share(p, before + x);
  return before;
}

// ---- numbers: small ones are nothing, as with .ftz
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float ex2(float x) { return flushed(std::exp2(flushed(x))); }
inline float lg2(float x) { return std::log2(flushed(x)); }
inline float rcp(float x) { return flushed(1.f / flushed(x)); }

inline void write(float* to, float x, bool on, int by) {
  if (on && by == 1) *to = x;
  if (on && by > 1) *to += x;
}
inline void write2(float* to, float x, float y, bool on, int by) {
  write(to, x, on, by), write(to + 1, y, on, by);
}

}  // namespace flashjax::sm90
