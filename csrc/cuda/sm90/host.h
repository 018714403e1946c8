// Host side of the sm_90a kernels: tensor maps, and the part of the arguments that both directions
// share.
#pragma once
#include <cuda.h>

#include <cstring>
#include <numeric>

#include "../launch.h"
#include "pages.cuh"
#include "problem.cuh"

namespace flashjax::sm90 {

// Enqueues a kernel that may begin while the one before it ends: what it does up to its
// griddepcontrol.wait is hidden. With clusters of so many CTAs.
template <typename... Args>
cudaError_t launch_after(void (*kernel)(Args...), dim3 grid, int threads, int smem, int cluster,
                         cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attrs[2] = {};
  attrs[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attrs[0].val.programmaticStreamSerializationAllowed = 1;
  attrs[1].id = cudaLaunchAttributeClusterDimension;
  attrs[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = smem;
  config.stream = stream, config.attrs = attrs, config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Dimensions from the innermost; strides in elements, of all but the innermost.
struct Map {
  int64_t extent[4], stride[3];
  int box[4];
};

// A map of an array of 16-bit elements. `promotion`: the bytes that a miss brings into the L2.
inline cudaError_t tensor_map(TMap& map, const void* data, DType dtype, const Map& m,
                              int promotion = 256) {
  static_assert(sizeof(TMap) == sizeof(CUtensorMap));
  using Encode = decltype(&cuTensorMapEncodeTiled);
  struct Driver {
    Encode encode = nullptr;
    cudaError_t error;
    Driver() {  // the library is not linked to the driver's
      cudaDriverEntryPointQueryResult found;
      void* function = nullptr;
      error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                               cudaEnableDefault, &found);
      encode = reinterpret_cast<Encode>(function);
      if (error == cudaSuccess && !encode) error = cudaErrorNotSupported;
    }
  };
  static const Driver driver;
  if (driver.error != cudaSuccess) return driver.error;
  cuuint64_t extent[4], stride[3];
  cuuint32_t box[4];
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i)
    extent[i] = m.extent[i] < 1 ? 1 : m.extent[i], box[i] = static_cast<cuuint32_t>(m.box[i]);
  const int bytes = dtype == DType::kF32 ? 4 : 2;
  for (int i = 0; i < 3; ++i) stride[i] = m.stride[i] < 8 ? 16 : m.stride[i] * bytes;
  CUtensorMap encoded;
  CUresult result = driver.encode(
      &encoded,
      dtype == DType::kF32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
      : dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(data), extent, stride, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B,
      promotion == 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  std::memcpy(&map, &encoded, sizeof map);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A [b, rows, heads, width] array, read or written by boxes of 64 columns and `box` rows.
inline cudaError_t tensor_map(TMap& map, const void* data, DType dtype, int64_t b, int64_t rows,
                              int64_t heads, int64_t width, int box, int promotion = 256) {
  return tensor_map(
      map, data, dtype,
      {{width, rows, heads, b}, {heads * width, width, rows * heads * width}, {64, box, 1, 1}},
      promotion);
}

// The same array for boxes that end where a sequence of its rows ends, of at most `rows` rows each:
// by (column, rows - length + i, head, end), where row i of the sequence is number end - length + i
// over [b, rows]. So i is past the end of the second dimension where it is past that of the
// sequence: it is read as zeros, and not written. The map begins `rows` rows before the array,
// which no coordinate of a sequence reaches.
inline cudaError_t sequence_map(TMap& map, const void* data, DType dtype, int64_t b, int64_t rows,
                                int64_t heads, int64_t width, int box, int promotion = 256) {
  const int64_t row = heads * width;
  return tensor_map(map, static_cast<const char*>(data) - rows * row * 2, dtype,
                    {{width, rows, heads, b * rows + 1}, {row, width, row}, {64, box, 1, 1}},
                    promotion);
}

// The same for boxes that begin where a sequence begins, or up to a box before: by (column, i,
// head, begin), where row i of the sequence is number begin + i. Rows before the first are read as
// zeros; nobody may ask for those after the last.
inline cudaError_t leading_map(TMap& map, const void* data, DType dtype, int64_t b, int64_t rows,
                               int64_t heads, int64_t width, int box, int promotion = 256) {
  const int64_t row = heads * width;
  return tensor_map(map, data, dtype,
                    {{width, rows, heads, b * rows}, {row, width, row}, {64, box, 1, 1}},
                    promotion);
}

// Where the keys of a problem lie, for tiles of `tile` keys.
inline Pages pages(const flashjax::Problem& p, int tile) {
  Pages x{};
  x.table = p.page_table, x.entry = p.batch_idx;
  x.per_row = static_cast<int>(p.p), x.count = static_cast<int>(p.c);
  x.size = static_cast<int>(p.page_table ? p.page : p.t);
  x.box = p.page_table ? static_cast<int>(std::gcd(p.page, int64_t{tile})) : tile;
  return x;
}

inline Problem problem(const flashjax::Problem& p) {
  auto bound = [](int64_t x) { return static_cast<int>(x < 0 ? -1 : x > 1 << 29 ? 1 << 29 : x); };
  Problem x{};
  x.b = static_cast<int>(p.b), x.s = static_cast<int>(p.s), x.t = static_cast<int>(p.t);
  x.h = static_cast<int>(p.h), x.g = static_cast<int>(p.g);
  x.d = static_cast<int>(p.d), x.e = static_cast<int>(p.e);
  x.left = bound(p.window_left), x.right = bound(p.window_right);
  x.diagonal = p.top_left ? 0 : x.t - x.s;
  x.scale = p.scale, x.softcap = p.softcap, x.inv_cap = p.softcap != 0 ? 1 / p.softcap : 0;
  x.bias = p.bias, x.bias_f32 = p.bias_dtype == DType::kF32;
  const auto& stride = p.bias_shape.stride;
  x.bias_b = stride[0], x.bias_n = stride[1], x.bias_h = stride[2];
  x.bias_s = stride[3], x.bias_t = stride[4];
  x.bias_queries = static_cast<int>(p.bias_shape.dim[3]);
  x.bias_keys = static_cast<int>(p.bias_shape.dim[4]);
  x.alibi = p.alibi_slopes, x.alibi_b = p.alibi_shape.stride[0];
  x.sinks = p.sinks, x.sinks_b = p.sinks_shape.stride[0];
  x.segment_q = p.segment_ids_q, x.segment_k = p.segment_ids_k;
  x.page_table = p.page_table;
  x.pages = static_cast<int>(p.p), x.page = static_cast<int>(p.page);
  return x;
}

// Heads whose K and V, or Q and dO, fit in half of the L2 together, to be worked on at a time.
inline int64_t heads_in_l2(int64_t bytes_of_one) {
  int64_t heads = 1;
  while (heads < 1 << 20 && 2 * heads * bytes_of_one <= int64_t{32} << 20) heads *= 2;
  return heads;
}

}  // namespace flashjax::sm90
