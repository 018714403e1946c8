# The CPU module: always built. Python-free kernels in a static library, one tiny extension module on top.
set(FLASHJAX_ROOT "${CMAKE_SOURCE_DIR}")
include(cmake/cpu_kernels.cmake)

nanobind_add_module(_cpu STABLE_ABI NB_STATIC NB_DOMAIN flashjax csrc/ffi/module_cpu.cc csrc/ffi/cpu.cc)
target_include_directories(_cpu SYSTEM PRIVATE "${FLASHJAX_FFI_INCLUDE}")
target_link_libraries(_cpu PRIVATE flashjax_cpu_kernels)
install(TARGETS _cpu LIBRARY DESTINATION flashjax)
