// Python module flashjax._cpu.
#include "module.h"

namespace flashjax {
extern "C" XLA_FFI_Error* FlashjaxCpuFwd(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* FlashjaxCpuBwd(XLA_FFI_CallFrame*);
}  // namespace flashjax

NB_MODULE(_cpu, m) {
  using namespace flashjax;
  define_common(m, FlashjaxCpuFwd, FlashjaxCpuBwd);
}
