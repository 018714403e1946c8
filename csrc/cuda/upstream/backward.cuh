// FlashAttention-2's backward: our launch of its device code, between our own passes over its
// accumulators.
#pragma once
#include "../simt/backward.cuh"
#include "tiles.cuh"
#include "translate.h"
// After ours, which have BlockInfo.
#include "flash_bwd_preprocess_kernel.h"
// After what it calls.
#include "flash_bwd_kernel.h"

namespace flashjax::upstream {

struct BackwardArgs : Arguments<flash::Flash_bwd_params> {
  int splits;  // copies of dq that are summed in order; 1 where blocks add to one
  const float* lse;
  const float* dlse;
};

// delta = keep * (sum of dout * out - dlse), in upstream's layout; 0 past a part's end, as far as
// a tile may reach.
template <typename T>
static __global__ void __launch_bounds__(256) statistics(const __grid_constant__ BackwardArgs a) {
  const Tile tile = a.tile();
  if (tile.part < 0) return;
  const flash::BlockInfo<true> part(a, tile.part);
  const int h = blockIdx.y, lane = threadIdx.x % 32;
  float* sums = static_cast<float*>(a.dsoftmax_sum) + int64_t{h} * a.parts.rows + kPad * tile.part +
                part.q_offset(-1, 1, tile.part);
  const int64_t first = part.q_offset(int64_t{0}, a.o_row_stride, tile.part) + h * a.o_head_stride;
  const int stat = h * a.parts.s + part.q_offset(0, 1, tile.part);
  for (int i = kPad * tile.index + threadIdx.x / 32; i < kPad * (tile.index + 1); i += 8) {
    float sum = 0.f;
    if (i < part.actual_seqlen_q && a.lse[stat + i] != -INFINITY) {
      const T* out = static_cast<const T*>(a.o_ptr) + first + i * a.o_row_stride;
      const T* dout = static_cast<const T*>(a.do_ptr) + first + i * a.o_row_stride;
      for (int j = lane; j < a.d; j += 32)
        sum += static_cast<float>(out[j]) * static_cast<float>(dout[j]);
#pragma unroll
      for (int x = 16; x; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
      sum = (sum - (a.dlse ? a.dlse[stat + i] : 0.f)) * a.p_dropout;
    }
    if (lane == 0) sums[i] = sum;
  }
}

template <typename Traits, int kOptions>
__device__ __forceinline__ void backward_cta(const BackwardArgs& args) {
  constexpr bool kDropout = kOptions & kWithDropout;
  const int h = blockIdx.y;
  const bool is_grid = (kOptions & kEvenRows) || args.deterministic;  // (blocks, heads, parts)
  const Tile tile = is_grid ? Tile{int(blockIdx.z), int(blockIdx.x)} : args.tile();
  if (tile.part < 0) return;
  // In a fixed order: CTA x of a part does its blocks x, x + splits, ..., and adds to its own dq.
  auto run = [&](const BackwardArgs& a) {
    for (int block = tile.index;; block += args.splits) {
      flash::compute_dq_dk_dv_1colblock<Traits, kDropout, bool(kOptions & kCausal),
                                        bool(kOptions & kLocal), bool(kOptions & kWithAlibi),
                                        bool(kOptions & kEvenRows), bool(kOptions & kEvenDim),
                                        bool(kOptions & kWithSoftcap), false, false, true>(
          a, tile.part, h, block);
      if (!args.deterministic) return;
      const flash::BlockInfo<true> part(a, tile.part);
      if ((block + args.splits) * Traits::kBlockN >= part.actual_seqlen_k) return;
    }
  };
  if constexpr (kOptions & (kLocal | kWithDropout)) {  // a copy costs registers
    BackwardArgs a = args;
    if constexpr (kOptions & kLocal) move_window(a, tile.part);
    uint64_t state[2] = {};
    if constexpr (kDropout) {
      const Stream stream(a, tile.part, h);
      state[0] = stream.seed, state[1] = stream.offset;
    }
    a.rng_state = state;
    run(a);
  } else {
    run(args);
  }
}

template <typename Traits, int kOptions, int kRoom>
static __global__ void backward(const __grid_constant__ BackwardArgs args) {
  if constexpr (kRoom == kRoomHere) backward_cta<Traits, kOptions>(args);
}

// dq from its accumulator, whose elements lie as the threads of the main kernel held them.
template <typename Traits>
static __global__ void __launch_bounds__(Traits::kNThreads)
    convert(const __grid_constant__ BackwardArgs a) {
  using namespace cute;
  using Element = typename Traits::Element;
  constexpr int M = Traits::kBlockM, D = Traits::kHeadDim;
  const Tile tile = a.tile();
  if (tile.part < 0) return;
  const flash::BlockInfo<true> part(a, tile.part);
  const int h = blockIdx.y;
  const int64_t pitch = int64_t{a.h} * D;
  const float* acc = static_cast<const float*>(a.dq_accum_ptr) +
                     part.q_offset(int64_t{-1}, pitch, tile.part) + tile.index * M * pitch + h * D;
  Element* dq = static_cast<Element*>(a.dq_ptr) +
                part.q_offset(int64_t{0}, a.dq_row_stride, tile.part) +
                tile.index * M * a.dq_row_stride + h * a.dq_head_stride;
  typename Traits::GmemTiledCopydQaccumAtomicAdd copy;
  auto mine = copy.get_thread_slice(threadIdx.x);
  typename Traits::TiledMmadQ mma;
  auto where =
      mma.get_thread_slice(threadIdx.x).partition_C(make_identity_tensor(Shape<Int<M>, Int<D>>{}));
  Tensor sum = partition_fragment_C(mma, Shape<Int<M>, Int<D>>{});
  clear(sum);
  for (int split = 0; split < a.splits; ++split, acc += a.dq_accum_split_stride) {
    Tensor from = mine.partition_S(
        make_tensor(make_gmem_ptr(acc), Shape<Int<M>, Int<D>>{}, make_stride(pitch, _1{})));
    CUTE_STATIC_ASSERT_V(size(from) == size(sum));
#pragma unroll
    for (int i = 0; i < size(sum); ++i) sum(i) += from(i);
  }
  const int rows = part.actual_seqlen_q - tile.index * M;
#pragma unroll
  for (int i = 0; i < size(sum); i += 2) {  // neighbours lie in a row
    const int row = get<0>(where(i)), column = get<1>(where(i));
    if (row >= rows || column >= a.d) continue;
    Element pair[2] = {static_cast<Element>(sum(i) * a.scale_softmax_rp_dropout),
                       static_cast<Element>(sum(i + 1) * a.scale_softmax_rp_dropout)};
    *reinterpret_cast<uint32_t*>(dq + row * a.dq_row_stride + column) =
        reinterpret_cast<const uint32_t&>(pair);
  }
}

// The gradient of a key head, from those of the query heads that share it.
template <typename T>
static __global__ void add_heads(const T* parts, T* sum, int64_t count, int d, int ratio) {
  const int64_t x = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (x >= count) return;
  const T* from = parts + x / d * ratio * d + x % d;
  float total = 0.f;
  for (int i = 0; i < ratio; ++i) total += static_cast<float>(from[i * d]);
  sum[x] = static_cast<T>(total);
}

// The copies of dq in a fixed order: enough CTAs for a GPU, as _ffi.py has it too.
inline int64_t copies_of_dq(const BwdParams& p) {
  const int64_t ctas = std::max<int64_t>(p.b * p.n * p.h, 1);
  return p.deterministic
             ? std::min<int64_t>((128 + ctas - 1) / ctas, std::max<int64_t>((p.t + 127) / 128, 1))
             : 1;
}

template <typename T, int D, int kRoom, int kOptions>
cudaError_t launch_options(const BwdParams& p, cudaStream_t stream) {
  using Traits = decltype(backward_traits<T, D, kRoom, kOptions>());
  auto a = translate<BackwardArgs>(p, D);
  Workspace space(p.workspace, p.workspace_bytes);
  const int64_t rows = a.parts.rows, keys = p.c * p.t, ratio = p.h / p.g;
  a.splits = static_cast<int>(copies_of_dq(p)), a.deterministic = p.deterministic;
  a.dq_accum_split_stride = p.b * rows * p.h * D;
  float* acc = space.take<float>(a.splits * a.dq_accum_split_stride);
  float* delta = space.take<float>(p.b * p.h * rows);
  T* dk = ratio > 1 ? space.take<T>(keys * p.h * p.d) : static_cast<T*>(p.dk);
  T* dv = ratio > 1 ? space.take<T>(keys * p.h * p.d) : static_cast<T*>(p.dv);
  a.lse = p.lse, a.dlse = p.dlse, a.softmax_lse_ptr = const_cast<float*>(p.lse);
  a.o_ptr = const_cast<void*>(p.out), a.do_ptr = const_cast<void*>(p.dout);
  a.do_row_stride = a.dq_row_stride = a.o_row_stride;
  a.do_head_stride = a.dq_head_stride = a.dk_head_stride = a.dv_head_stride = p.d;
  a.dk_row_stride = a.dv_row_stride = p.h * p.d;
  a.dq_ptr = p.dq, a.dk_ptr = dk, a.dv_ptr = dv, a.dq_accum_ptr = acc, a.dsoftmax_sum = delta;

  // Three walks over the parts: queries by kPad, keys, and queries by the tile.
  BackwardArgs by_rows = a, by_tile = a;
  int64_t row_tiles = 0, q_tiles = 0, k_tiles = 0;
  cudaError_t error = list(p, by_rows, space, {kPad}, &row_tiles, stream);
  auto check = [&](cudaError_t x) { error = cuda::first_error(error, x); };
  check(list(p, by_tile, space, {Traits::kBlockM}, &q_tiles, stream));
  check(list(p, a, space, {Traits::kBlockN, true}, &k_tiles, stream));
  if (error != cudaSuccess) return error;

  check(cudaMemsetAsync(acc, 0, a.splits * a.dq_accum_split_stride * 4, stream));
  if (a.parts.list || p.s == 0) {  // rows that belong to no part
    check(cudaMemsetAsync(p.dq, 0, p.b * p.s * p.h * p.d * 2, stream));
    check(cudaMemsetAsync(dk, 0, keys * p.h * p.d * 2, stream));
    check(cudaMemsetAsync(dv, 0, keys * p.h * p.d * 2, stream));
  }
  const unsigned heads = static_cast<unsigned>(p.h);
  auto grid = [&](int64_t tiles) { return dim3(static_cast<unsigned>(tiles), heads); };
  if (p.s > 0) {
    statistics<T><<<grid(row_tiles), 256, 0, stream>>>(by_rows);
    check(cudaGetLastError());
  }
  if (p.s > 0 && p.t > 0 && p.n > 0) {
    const unsigned parts = static_cast<unsigned>(p.b * p.n);
    const dim3 main = p.deterministic          ? dim3(a.splits, heads, parts)
                      : (kOptions & kEvenRows) ? dim3(a.blocks, heads, parts)
                                               : grid(k_tiles);
    check(launch(backward<Traits, kOptions, kRoom>, main, Traits::kNThreads,
                 Traits::kSmemSize1colblock, a, stream));
  }
  if (p.s > 0) {
    convert<Traits><<<grid(q_tiles), Traits::kNThreads, 0, stream>>>(by_tile);
    check(cudaGetLastError());
  }
  if (ratio > 1 && keys > 0) {
    const int64_t count = keys * p.g * p.d;
    const unsigned blocks = static_cast<unsigned>((count + 255) / 256);
    const int d = static_cast<int>(p.d), r = static_cast<int>(ratio);
    add_heads<<<blocks, 256, 0, stream>>>(dk, static_cast<T*>(p.dk), count, d, r);
    add_heads<<<blocks, 256, 0, stream>>>(dv, static_cast<T*>(p.dv), count, d, r);
    check(cudaGetLastError());
  }
  return error;
}

template <DType kType, int D, int E, int M, int N, cuda::Variant>
cudaError_t launch_backward(const BwdParams& p, const cuda::Device& device, cudaStream_t stream) {
  static_assert(D == E);
  using T = std::conditional_t<kType == DType::kF16, cutlass::half_t, cutlass::bfloat16_t>;
  using Traits = decltype(backward_traits<T, D, k227KB, 0>());
  static_assert(M == Traits::kBlockM && N == Traits::kBlockN);
  if (p.b * p.h == 0) return cudaSuccess;
  if (p.b * p.n > 65535 && p.deterministic) return cudaErrorInvalidConfiguration;
  // Dropout at d = 256 has no room in upstream's small tile, and is in no row's features.
  constexpr int kWithout = D == 256 ? kWithDropout : 0;
  cudaError_t error = with_room(device.smem, [&](auto room) {
    return with_options<kWithout>(options_of(p, D), [&](auto options) {
      return launch_options<T, D, decltype(room)::value, decltype(options)::value>(p, stream);
    });
  });
  if (error == cudaSuccess && p.dsinks)
    error = simt::launch(p.sinks_shape.dim[0] * p.sinks_shape.dim[1], stream,
                         simt::backward_sinks<typename simt::TypeOf<kType>::type>, p);
  return error;
}

}  // namespace flashjax::upstream
