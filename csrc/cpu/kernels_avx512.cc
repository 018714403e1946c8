// The kernels for AVX-512, with and without its bf16 instructions; without a compiler for them,
// none.

// The intrinsics of GCC 12 leave lanes undefined on purpose, and then warn about it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
// Simd comes first.
#include "kernels.inc"

namespace flashjax::cpu {
const Kernels* kernels_avx512() { return Table<false>::get("avx512"); }
#ifdef FLASHJAX_HAS_BF16
const Kernels* kernels_avx512_bf16() { return Table<true>::get("avx512_bf16"); }
#else
const Kernels* kernels_avx512_bf16() { return nullptr; }
#endif
}  // namespace flashjax::cpu
#else
namespace flashjax::cpu {
const Kernels* kernels_avx512() { return nullptr; }
const Kernels* kernels_avx512_bf16() { return nullptr; }
}  // namespace flashjax::cpu
#endif
