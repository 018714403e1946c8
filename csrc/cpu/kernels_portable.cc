// The kernels for any architecture.
#include "simd_portable.h"
// Simd comes first.
#include "kernels.inc"

namespace flashjax::cpu {
const Kernels* kernels_portable() { return Table<false>::get("portable"); }
}  // namespace flashjax::cpu
