// Thin wrappers over the sm_90a PTX that the kernels use. Includes nothing, so that it also
// compiles at run time.
#pragma once

#define DI __device__ __forceinline__

namespace flashjax::sm90 {

typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(64) TMap {  // stands in for CUtensorMap
  u64 v[16];
};

DI float infinity() { return __int_as_float(0x7f800000); }
DI u32 smem_u32(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Built with FLASHJAX_JITTER, the roles of a kernel meet their barriers in orders that they usually
// do not.
#ifdef FLASHJAX_JITTER
constexpr bool kJitter = true;
#else
constexpr bool kJitter = false;
#endif

// A pause of up to 4 us, mostly short, different for each warp and each time. Without a branch,
// which would break the basic blocks of wgmma.
DI void jitter() {
#ifdef FLASHJAX_JITTER
  asm volatile(
      "{.reg .u32 x, y, z; mov.u32 x, %%clock; mov.u32 y, %%tid.x; shr.u32 y, y, 5;"
      " mad.lo.u32 x, y, 0x9E3779B9, x; mov.u32 y, %%ctaid.x; mad.lo.u32 x, y, 0x85EBCA6B, x;"
      " shr.u32 y, x, 15; xor.b32 x, x, y; mul.lo.u32 x, x, 0x2C1B3C6D;"
      " shr.u32 y, x, 12; xor.b32 x, x, y; mul.lo.u32 x, x, 0x297A2D39;"
      " shr.u32 y, x, 10; shr.u32 z, x, 20; and.b32 x, y, z; and.b32 x, x, %0;"
      " nanosleep.u32 x;}" ::"r"(0xFFF)
      : "memory");
#endif
}

// ---- mbarrier
DI void mb_init(u32 b, u32 n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n));
}
DI void mb_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DI void mb_expect(u32 b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes)
               : "memory");
}
DI void mb_arrive(u32 b) {
  jitter();
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory");
}
DI void mb_arrive_warp(u32 b) {  // once for a warp, all of whose lanes are done
  __syncwarp();
  if ((threadIdx.x & 31) == 0) mb_arrive(b);
}
DI void mb_arrive_at(u32 b, u32 rank) {  // the same barrier of another CTA of the cluster
  jitter();
  asm volatile(
      "{.reg .b32 x; mapa.shared::cluster.u32 x, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [x];}" ::"r"(b),
      "r"(rank)
      : "memory");
}
DI void mb_wait(u32 b, u32 parity) {
  jitter();
  asm volatile(
      "{.reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D; bra W; D: "
      "}" ::"r"(b),
      "r"(parity)
      : "memory");
  jitter();
}
// For a wait that may last as long as a tile: asks less often.
DI void mb_rest(u32 b, u32 parity) {
  jitter();
  asm volatile(
      "{.reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %2; @p bra D; bra W;"
      " D: }" ::"r"(b),
      "r"(parity), "r"(1000000)
      : "memory");
  jitter();
}
// Ends the basic block, so that ptxas cannot move work across it: a wait that is skipped as long as
// x >= 0. (An empty loop that is never taken is removed by ptxas.)
DI void sched_fence(int x, u32 bar) {
  asm volatile(
      "{.reg .pred p, q; setp.ge.s32 q, %0, 0; @q bra D; W: "
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;"
      " @p bra D; bra W; D: }" ::"r"(x),
      "r"(bar)
      : "memory");
}

// ---- bulk copies
constexpr u64 kEvictNormal = 0x1000000000000000ull, kEvictFirst = 0x12F0000000000000ull,
              kEvictLast = 0x14F0000000000000ull;
DI void prefetch_map(const TMap* m) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(m) : "memory");
}
DI void tma_load(u32 dst, const TMap* m, u32 bar, int c0, int c1, int c2, int c3, u64 hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_"
      "hint"
      " [%0], [%1, {%3,%4,%5,%6}], [%2], %7;" ::"r"(dst),
      "l"(m), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint)
      : "memory");
}
// The same box into the L2.
DI void tma_prefetch(const TMap* m, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1,%2,%3,%4}];" ::"l"(m),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
DI void tma_store(const TMap* m, u32 src, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::"l"(
          m),
      "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
DI void tma_add(const TMap* m, u32 src, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2,%3,%4,%5}], "
      "[%1];" ::"l"(m),
      "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// To the same place in every CTA of the cluster that `mask` names, each of which counts the bytes.
DI void tma_load_all(u32 dst, const TMap* m, u32 bar, int c0, int c1, int c2, int c3, u64 hint,
                     unsigned short mask) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::"
      "cluster.L2::cache_hint [%0], [%1, {%3,%4,%5,%6}], [%2], %8, %7;" ::"r"(dst),
      "l"(m), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint), "h"(mask)
      : "memory");
}
DI void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}
DI void bulk_store(void* dst, u32 src, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src),
               "r"(bytes)
               : "memory");
}
DI void bulk_add_f32(float* dst, u32 src, u32 bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst),
      "r"(src), "r"(bytes)
      : "memory");
}
DI void add_global4(float* p, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(a), "f"(b),
               "f"(c), "f"(d)
               : "memory");
}
DI void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
DI void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N>
DI void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// ---- wgmma control
DI void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DI void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DI void wg_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Stops the compiler from moving ordinary math on an accumulator across a wgmma issue or wait.
template <int N>
DI void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// Shared-memory matrix descriptor, 128-byte swizzle, 1024 bytes between groups of 8 rows. `lbo`
// matters only for an MN-major operand: the bytes between its 64-wide chunks. Only the low word
// varies, so that steps are 32-bit adds of bytes / 16.
DI u32 desc_lo(u32 addr, u32 lbo) {
  return ((addr & 0x3FFFF) >> 4) | (((lbo & 0x3FFFF) >> 4) << 16);
}
DI u64 desc(u32 lo) {
  u64 d;
  asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(lo), "r"((1024u >> 4) | (1u << 30)));
  return d;
}

// True in one lane of a warp all of whose lanes are here.
DI bool elect_one() {
  int x;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.s32 %0, 1, 0, p;}" : "=r"(x));
  return x;
}

// ---- the product of a warp: D (16 x 8, f32) += A (16 x 16) B (16 x 8), all in registers. With
// r = lane / 4 and c = 2 (lane % 4): a thread has rows r and r + 8 and columns c, c + 1 of D; of A
// the pairs of columns (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8); of B the pairs of rows c and
// c + 8 of column r.
template <bool F16>
DI void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (F16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- barriers and registers
DI void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DI u32 load_acquire(const u32* p) {
  u32 x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
DI int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
DI void store_release(int* p, int x) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
DI void add_release(u32* p, u32 x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
DI void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DI void add_relaxed(u32* p, u32 x) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
DI void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DI void bar_sync(int id, int n) {
  jitter();
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory");
}
DI void bar_arrive(int id, int n) {
  jitter();
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory");
}
DI int cluster_rank() {
  int x;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}
DI void cluster_sync() {
  jitter();
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
template <int N>
DI void reg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DI void reg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
DI void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DI void pdl_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- shared memory
DI void stmatrix4(u32 a, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
DI void stmatrix4_trans(u32 a, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
DI void stmatrix2_trans(u32 a, u32 r0, u32 r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(a), "r"(r0),
               "r"(r1)
               : "memory");
}
DI void ldmatrix4(u32 a, u32& r0, u32& r1, u32& r2, u32& r3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(a)
               : "memory");
}
DI void ldmatrix4_trans(u32 a, u32& r0, u32& r1, u32& r2, u32& r3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(a)
               : "memory");
}
DI float load_shared(u32 p) {
  float a;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(a) : "r"(p) : "memory");
  return a;
}
DI void store_float(u32 p, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(p), "f"(x) : "memory");
}
DI void load_shared2(float& a, float& b, u32 p) {
  asm volatile("ld.shared.v2.f32 {%0,%1},[%2];" : "=f"(a), "=f"(b) : "r"(p));
}
DI void load_shared4(float (&x)[4], u32 p) {
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3},[%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(p)
               : "memory");
}
DI int load_int(u32 p) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(p) : "memory");
  return x;
}
DI void load_int2(int& a, int& b, u32 p) {
  asm volatile("ld.shared.v2.s32 {%0,%1},[%2];" : "=r"(a), "=r"(b) : "r"(p) : "memory");
}
// 16 bytes to shared memory, by this thread: there after copies_wait().
DI void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DI void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DI void store_int(u32 p, int x) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(p), "r"(x) : "memory");
}
DI int add_int(u32 p, int x) {  // what was there before
  int a;
  asm volatile("atom.shared.add.s32 %0, [%1], %2;" : "=r"(a) : "r"(p), "r"(x) : "memory");
  return a;
}
DI int4 load_int4(u32 a) {
  int4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(a)
               : "memory");
  return x;
}
DI void store_int4(u32 p, int4 x) {
  asm volatile("st.shared.v4.s32 [%0], {%1,%2,%3,%4};" ::"r"(p), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
DI void store_shared4(u32 p, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(p), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// Clears the rows of a swizzled tile of `rows` rows and kChunks x 64 columns that `dead` (a bit a
// lane) names, from r0. By a whole warp; a fence and a barrier or an arrival must follow.
template <int kChunks>
DI void clear_rows(u32 tile, int rows, int r0, u32 dead) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (; dead; dead &= dead - 1)
    if (lane < 8 * kChunks)
      store_shared4(
          tile + (r0 + __ffs(dead) - 1) * 128 + (lane & 7) * 16 + (lane >> 3) * rows * 128, 0.f,
          0.f, 0.f, 0.f);
}

// Chunks of 64 columns that hold some of `width`. Boxes of others lie wholly outside a map, which
// must not be where the map begins before its array (sequence_map): they are not asked for, and
// what they would have filled is cleared once.
DI int chunks_of(int width) { return (width + 63) / 64; }
DI bool has_chunk(int c, int width) { return c == 0 || c * 64 < width; }
// By all threads of the CTA; a fence and a barrier must follow.
DI void clear_chunks(u32 tile, int rows, int begin, int end) {
  for (int i = begin * rows * 8 + (int)threadIdx.x; i < end * rows * 8; i += (int)blockDim.x)
    store_shared4(tile + i * 16, 0.f, 0.f, 0.f, 0.f);
}

// The transpose of an 8 x 8 matrix of 16-bit elements, of which a lane has (lane / 4, 2 (lane % 4))
// and its neighbour.
DI u32 transpose_matrix(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Lane q of a quad has x[k], k < 4; it gets what lane k had as x[q].
DI void transpose_quad(u32 (&x)[4], int q) {
  const bool odd = q & 1, high = q & 2;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {  // blocks of 2 x 2
    const u32 got = __shfl_xor_sync(~0u, odd ? x[k] : x[k + 1], 1);
    (odd ? x[k] : x[k + 1]) = got;
  }
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const u32 got = __shfl_xor_sync(~0u, high ? x[k] : x[k + 2], 2);
    (high ? x[k] : x[k + 2]) = got;
  }
}

// ---- math
DI float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DI float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// About log2 of a number that is not negative, at most 0.09 too small, by its bits: no MUFU, of
// which softmax has none to spare. -127 for 0.
DI float log2_of(float x) {
  return __uint_as_float(0x4b000000u | __float_as_uint(x) >> 8) * 0x1p-15f - 383.f;
}
DI float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// By ex2, for a small absolute error: tanh.approx is off by 2^-11, which a cap multiplies.
DI float tanh_ex2(float x) { return 1.f - 2.f * rcp(1.f + ex2(2.f * kLog2E * x)); }

// Two floats to a pair of 16-bit ones, `lo` in the lower half; and back.
template <bool F16>
DI u32 pack(float lo, float hi) {
  u32 r;
  if constexpr (F16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <bool F16>
DI float to_float(unsigned short x) {
  if constexpr (F16) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  } else {
    return __uint_as_float((u32)x << 16);
  }
}
template <bool F16>
DI float low(u32 x) {
  return to_float<F16>((unsigned short)x);
}
template <bool F16>
DI float high(u32 x) {
  if constexpr (F16)
    return to_float<true>((unsigned short)(x >> 16));
  else
    return __uint_as_float(x & 0xffff0000u);
}

}  // namespace flashjax::sm90
