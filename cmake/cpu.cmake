# The CPU module: always built. Python-free kernels in a static library, one tiny extension module on top.
file(GLOB FLASHJAX_CPU_SOURCES CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/cpu/*.cc")

add_library(flashjax_cpu STATIC ${FLASHJAX_CPU_SOURCES} csrc/ffi/cpu.cc)
target_include_directories(flashjax_cpu SYSTEM PRIVATE "${FLASHJAX_FFI_INCLUDE}")
target_compile_options(flashjax_cpu PRIVATE -O3 -Wall -Wextra)

nanobind_add_module(_cpu STABLE_ABI NB_STATIC NB_DOMAIN flashjax csrc/ffi/module_cpu.cc)
target_include_directories(_cpu SYSTEM PRIVATE "${FLASHJAX_FFI_INCLUDE}")
target_link_libraries(_cpu PRIVATE flashjax_cpu)
install(TARGETS _cpu LIBRARY DESTINATION flashjax)
