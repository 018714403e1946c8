# The CPU kernels: plain C++17, no Python, no XLA. Needs FLASHJAX_ROOT.
file(GLOB FLASHJAX_CPU_SOURCES CONFIGURE_DEPENDS "${FLASHJAX_ROOT}/csrc/cpu/*.cc")
add_library(flashjax_cpu_kernels STATIC ${FLASHJAX_CPU_SOURCES})
target_include_directories(flashjax_cpu_kernels PUBLIC "${FLASHJAX_ROOT}/csrc")
target_compile_options(flashjax_cpu_kernels PRIVATE -O3 -Wall -Wextra)
set_target_properties(flashjax_cpu_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
# Chosen at run time, so only these files may use the instructions.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set_source_files_properties("${FLASHJAX_ROOT}/csrc/cpu/kernels_avx2.cc"
    PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties("${FLASHJAX_ROOT}/csrc/cpu/kernels_avx512.cc"
    PROPERTIES COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512bf16;-mavx2;-mfma;-mf16c")
endif()
