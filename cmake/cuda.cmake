# The CUDA module: one object for each row of kernels.def that FLASHJAX_KERNELS and FLASHJAX_CUDA_ARCHS leave.
# nvcc comes from CUDACXX, CUDA_HOME, PATH, or the wheels nvidia-cuda-nvcc, -crt, -runtime, -cccl and nvidia-nvvm.
set(FLASHJAX_NVCC_JOBS "" CACHE STRING "how many nvcc run at a time; empty: as many as there are cores, at most 16")

# Called where nothing else names a compiler. The wheels keep their libraries in lib/, where nvcc does not look.
function(flashjax_find_nvcc)
  if(CMAKE_CUDA_COMPILER OR DEFINED ENV{CUDACXX})
    return()
  endif()
  if(DEFINED ENV{CUDA_HOME} AND EXISTS "$ENV{CUDA_HOME}/bin/nvcc")
    set(ENV{CUDACXX} "$ENV{CUDA_HOME}/bin/nvcc")
    return()
  endif()
  find_program(FLASHJAX_NVCC nvcc)
  if(FLASHJAX_NVCC)
    set(ENV{CUDACXX} "${FLASHJAX_NVCC}")
    return()
  endif()
  execute_process(COMMAND "${Python_EXECUTABLE}" -c
"import glob, os, sys
for entry in sys.path:
    for root in sorted(glob.glob(os.path.join(entry or '.', 'nvidia', 'cu*')), reverse=True):
        if os.path.exists(os.path.join(root, 'bin', 'nvcc')):
            print(root)
            raise SystemExit"
    OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(root)
    set(ENV{CUDACXX} "${root}/bin/nvcc")
    set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${root}/lib")
  endif()
endfunction()

if(NOT FLASHJAX_CUDA MATCHES "^(0|1|AUTO|ON|OFF)$")
  message(FATAL_ERROR "FLASHJAX_CUDA is 0, 1 or AUTO; got ${FLASHJAX_CUDA}")
endif()
if(FLASHJAX_CUDA MATCHES "^(0|OFF)$")
  return()
endif()
flashjax_find_nvcc()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(FLASHJAX_CUDA STREQUAL "AUTO")
    message(STATUS "flashjax: no working nvcc, so no CUDA module (FLASHJAX_CUDA=1 makes this an error)")
    return()
  endif()
  message(FATAL_ERROR "FLASHJAX_CUDA=1, but no working nvcc. Set CUDACXX or CUDA_HOME, put nvcc on PATH, or "
    "pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvvm, all five of one "
    "release, and build without isolation.")
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF) # each row has its own
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)

set(jobs "${FLASHJAX_NVCC_JOBS}")
if(jobs STREQUAL "")
  cmake_host_system_information(RESULT jobs QUERY NUMBER_OF_LOGICAL_CORES)
  if(jobs GREATER 16)
    set(jobs 16)
  endif()
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS flashjax_nvcc=${jobs})

# The wrappers of wgmma, whose every instruction names every accumulator register, are written by a script.
file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/generated")
set(wgmma "${CMAKE_SOURCE_DIR}/csrc/cuda/sm90/wgmma.py")
execute_process(COMMAND "${Python_EXECUTABLE}" "${wgmma}" "${CMAKE_BINARY_DIR}/generated/wgmma.cuh" COMMAND_ERROR_IS_FATAL ANY)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${wgmma}")

include("${CMAKE_CURRENT_LIST_DIR}/archs.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/rows.cmake")

# What FlashAttention-2's sources are compiled with, which are fetched once.
function(flashjax_upstream result)
  execute_process(COMMAND "${CMAKE_COMMAND}" -E env "FLASHJAX_FLASH_ATTN_SOURCE=${FLASHJAX_FLASH_ATTN_SOURCE}"
    "${Python_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/third_party/fetch.py"
    OUTPUT_VARIABLE source OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "no sources of FlashAttention-2; without its kernels: FLASHJAX_CUDA_ARCHS=90a, or FLASHJAX_KERNELS")
  endif()
  set(${result} --use_fast_math --expt-relaxed-constexpr
    "--system-include=${source}/csrc/flash_attn/src,${source}/csrc/cutlass/include,${CMAKE_SOURCE_DIR}/csrc/cuda/upstream/shims"
    PARENT_SCOPE)
endfunction()

# Rows to sources.
set(generated "${CMAKE_BINARY_DIR}/kernels")
set(table "${CMAKE_SOURCE_DIR}/csrc/attention/kernels.def")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${table}")
file(STRINGS "${table}" rows REGEX "^KERNEL\\(")
set(upstream "")
set(built "")
set(built_ids " ")
set(sources "")
foreach(row IN LISTS rows)
  flashjax_row("${row}")
  if(NOT FLASHJAX_KERNELS STREQUAL "all" AND NOT id IN_LIST FLASHJAX_KERNELS
     AND NOT (FLASHJAX_KERNELS STREQUAL "ci" AND ci))
    continue()
  endif()
  flashjax_gencode(gencode archs ${family} ${arch_min} ${arch_max})
  if(gencode STREQUAL "")
    continue()
  endif()
  set(more "")
  if(family STREQUAL "upstream")
    if(NOT upstream)
      flashjax_upstream(upstream)
    endif()
    set(more "${upstream}")
  endif()
  set(source "${generated}/${id}.cu")
  flashjax_row_source("${source}")
  set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${gencode};${more}")
  list(APPEND sources "${source}")
  string(APPEND built "${row}\n")
  string(APPEND built_ids "${id}:${archs} ")
endforeach()
if(sources STREQUAL "")
  message(FATAL_ERROR "no row of kernels.def is left by FLASHJAX_KERNELS=${FLASHJAX_KERNELS} and "
    "FLASHJAX_CUDA_ARCHS=${FLASHJAX_CUDA_ARCHS}")
endif()
file(CONFIGURE OUTPUT "${generated}/built_kernels.def" CONTENT "${built}" @ONLY)

# dbias by itself: what the other families' backward does not write, the portable one does.
flashjax_gencode(gencode archs simt 75 999)
set_source_files_properties(csrc/cuda/simt/bias.cu PROPERTIES COMPILE_OPTIONS "${gencode}")

list(APPEND sources csrc/cuda/simt/bias.cu)

# What plans the tiles of sequences for the Hopper rows.
flashjax_gencode(gencode archs sm90 90 90)
if(gencode)
  set_source_files_properties(csrc/cuda/sm90/sequences.cu PROPERTIES COMPILE_OPTIONS "${gencode}")
  list(APPEND sources csrc/cuda/sm90/sequences.cu)
endif()

add_library(flashjax_cuda_kernels STATIC ${sources})
target_include_directories(flashjax_cuda_kernels PRIVATE "${CMAKE_SOURCE_DIR}/csrc" "${CMAKE_BINARY_DIR}/generated")
target_compile_options(flashjax_cuda_kernels PRIVATE -Xfatbin=-compress-all -Xptxas=-v)
# Random pauses at the barriers of the Hopper kernels, for tests of their order.
option(FLASHJAX_JITTER "pause at barriers" OFF)
if(FLASHJAX_JITTER)
  target_compile_definitions(flashjax_cuda_kernels PRIVATE FLASHJAX_JITTER)
endif()
# What ptxas -v says goes to a log next to the object: csrc/cuda/check_ptxas.py reads it.
set(launcher "${Python_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/csrc/cuda/log_ptxas.py" ${CMAKE_CUDA_COMPILER_LAUNCHER})
set_target_properties(flashjax_cuda_kernels PROPERTIES
  JOB_POOL_COMPILE flashjax_nvcc CUDA_COMPILER_LAUNCHER "${launcher}")

nanobind_add_module(_cuda STABLE_ABI NB_STATIC NB_DOMAIN flashjax
  csrc/ffi/module_cuda.cc csrc/ffi/cuda.cc csrc/attention/select.cc csrc/cuda/launchers.cc)
target_include_directories(_cuda SYSTEM PRIVATE "${FLASHJAX_FFI_INCLUDE}" ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_include_directories(_cuda PRIVATE "${generated}")
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
set_property(SOURCE csrc/attention/select.cc APPEND PROPERTY
  COMPILE_DEFINITIONS "FLASHJAX_BUILT_KERNELS=\"${built_ids}\"")
target_link_libraries(_cuda PRIVATE flashjax_cuda_kernels)
install(TARGETS _cuda LIBRARY DESTINATION flashjax)
