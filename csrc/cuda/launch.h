// The host side of every CUDA kernel: what a launcher is given, and the launchers by row of
// kernels.def.
#pragma once
#include <cuda_runtime_api.h>

#include "../attention/params.h"

namespace flashjax::cuda {

struct Device {
  int ordinal = 0;
  int arch = 0;  // compute capability: 90 is 9.0
  int sms = 0;
  int smem = 0;  // bytes of shared memory that a block may have
};

// What a kernel was compiled for, where a family has more than one.
enum class Variant {
  kAny,        // all its features
  kFull,       // every query sees every key
  kMasked,     // windows
  kSequences,  // windows, sequences of any length in the rows, segment ids
  kScores,     // these, and what changes scores: softcap, bias, alibi
  kPaged,      // many queries against keys in pages
  kPagedScores,
  kDecode,  // few queries against many keys
  kLatent,  // likewise, where the values are columns of the keys
  kSplit,   // few queries against many keys, or keys in pages
};

// Enqueues the work; neither waits nor allocates.
using ForwardLauncher = cudaError_t (*)(const FwdParams&, const Device&, cudaStream_t);
using BackwardLauncher = cudaError_t (*)(const BwdParams&, const Device&, cudaStream_t);

// By Kernel::index; null where the row is of the other direction, or not in this build.
ForwardLauncher forward_launcher(int index);
BackwardLauncher backward_launcher(int index);

inline cudaError_t first_error(cudaError_t a, cudaError_t b) { return a != cudaSuccess ? a : b; }

}  // namespace flashjax::cuda
