# The CPU kernels: plain C++17, no Python, no XLA. Needs FLASHJAX_ROOT.
file(GLOB FLASHJAX_CPU_SOURCES CONFIGURE_DEPENDS "${FLASHJAX_ROOT}/csrc/cpu/*.cc")
add_library(flashjax_cpu_kernels STATIC ${FLASHJAX_CPU_SOURCES})
target_include_directories(flashjax_cpu_kernels PUBLIC "${FLASHJAX_ROOT}/csrc")
target_compile_options(flashjax_cpu_kernels PRIVATE -O3 -Wall -Wextra)
set_target_properties(flashjax_cpu_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
# Chosen at run time, so only these files may use the instructions. Where the compiler lacks a flag, the kernels that
# need it are left out.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  include(CheckCXXCompilerFlag)
  foreach(flag -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16)
    string(MAKE_C_IDENTIFIER "FLASHJAX_HAS${flag}" has)
    check_cxx_compiler_flag(${flag} ${has})
    if(${has})
      list(APPEND FLASHJAX_AVX512_FLAGS ${flag})
      if(NOT flag MATCHES "avx512")
        list(APPEND FLASHJAX_AVX2_FLAGS ${flag})
      endif()
    endif()
  endforeach()
  set_source_files_properties("${FLASHJAX_ROOT}/csrc/cpu/kernels_avx2.cc"
    PROPERTIES COMPILE_OPTIONS "${FLASHJAX_AVX2_FLAGS}")
  set_source_files_properties("${FLASHJAX_ROOT}/csrc/cpu/kernels_avx512.cc"
    PROPERTIES COMPILE_OPTIONS "${FLASHJAX_AVX512_FLAGS}")
endif()
