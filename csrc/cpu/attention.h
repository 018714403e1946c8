// Attention on the CPU, forward and backward, for every problem that params.h can describe.
// Results do not depend on the number of threads: work is cut by the problem alone and added in a
// fixed order. The environment variable FLASHJAX_CPU_SIMD=portable|avx2|avx512|avx512_bf16 forces
// an instruction set (the default is the best that the CPU has; avx512 is without the bf16
// instructions). Check() refuses an unknown or absent one.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "../attention/params.h"

namespace flashjax::cpu {

// Runs body(i) for every i in [0, n), on as many threads as it likes; returns when all are done.
class Parallel {
 public:
  virtual ~Parallel() = default;
  virtual int64_t threads() const = 0;
  virtual void For(int64_t n, const std::function<void(int64_t)>& body) = 0;
};

// Empty: the values in the index arrays are fine. Otherwise what is wrong: argument, index and
// value.
std::string Check(const Problem& p);
std::string Check(const BwdParams& p);  // also refuses page_table and batch_idx

// After an empty Check(). Both throw std::bad_alloc, on the calling thread only, before any work.
void Forward(const FwdParams& p, Parallel& parallel);
void Backward(const BwdParams& p, Parallel& parallel);

}  // namespace flashjax::cpu
