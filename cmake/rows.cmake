# The kernel table, for CMake.

# flashjax_row(ROW): the columns of a line of kernels.def as variables: id, direction, family, arch_min, arch_max, dtype,
# d, e, unit, m, n, features, variant, ci.
macro(flashjax_row row)
  string(REGEX REPLACE "^KERNEL\\((.*)\\)$" "\\1" _columns "${row}")
  string(REGEX REPLACE ", *" ";" _columns "${_columns}")
  foreach(_name id direction family arch_min arch_max dtype d e unit m n features variant ci)
    list(POP_FRONT _columns ${_name})
  endforeach()
endmacro()

# flashjax_row_source(SOURCE): writes the source of the row that flashjax_row() has read.
function(flashjax_row_source source)
  string(TOLOWER "${direction}" lower)
  set(params "BwdParams")
  if(direction STREQUAL "Forward")
    set(params "FwdParams")
  endif()
  file(CONFIGURE OUTPUT "${source}" CONTENT [=[
#include "cuda/@family@/@lower@.cuh"

namespace flashjax::cuda {
cudaError_t launch_@id@(const @params@& p, const Device& device, cudaStream_t stream) {
  return @family@::launch_@lower@<DType::k@dtype@, @d@, @e@, @m@, @n@, Variant::@variant@>(p, device, stream);
}
}  // namespace flashjax::cuda
]=] @ONLY)
endfunction()
