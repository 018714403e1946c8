// Grids whose blocks own a tile of rows each, and the launch of any grid.
#pragma once
#include "../launch.h"
#include "tile.cuh"

namespace flashjax::simt {

struct Grid {
  int64_t tiles, chunks;  // of rows, of columns
};

// Takes the last digit, of base n, off a block's number.
__device__ __forceinline__ int64_t digit(int64_t& x, int64_t n) {
  const int64_t last = x % n;
  x /= n;
  return last;
}

inline int64_t parts(int64_t extent, int64_t part) { return (extent + part - 1) / part; }

template <typename Kernel, typename Params, typename... More>
cudaError_t launch(int64_t blocks, cudaStream_t stream, Kernel kernel, const Params& p,
                   More... more) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, more...);
  return cudaGetLastError();
}

}  // namespace flashjax::simt
