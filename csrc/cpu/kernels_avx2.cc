// The kernels for AVX2, FMA and F16C; without a compiler for them, none.

#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
// Simd comes first.
#include "kernels.inc"

namespace flashjax::cpu {
const Kernels* kernels_avx2() { return Table<false>::get("avx2"); }
}  // namespace flashjax::cpu
#else
namespace flashjax::cpu {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace flashjax::cpu
#endif
