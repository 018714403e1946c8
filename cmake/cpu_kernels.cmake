# The CPU kernels: plain C++17, no Python, no XLA. Needs FLASHJAX_ROOT.
file(GLOB FLASHJAX_CPU_SOURCES CONFIGURE_DEPENDS "${FLASHJAX_ROOT}/csrc/cpu/*.cc")
add_library(flashjax_cpu_kernels STATIC ${FLASHJAX_CPU_SOURCES})
target_include_directories(flashjax_cpu_kernels PUBLIC "${FLASHJAX_ROOT}/csrc")
target_compile_options(flashjax_cpu_kernels PRIVATE -O3 -Wall -Wextra)
set_target_properties(flashjax_cpu_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
