// What a handler takes in place of a stream, where there is none.
#pragma once
#include <cstring>
#include <optional>

#include "cuda_runtime_api.h"
#include "xla/ffi/api/ffi.h"

namespace emulator {
struct NoStream {};

inline void poison(const xla::ffi::RemainingRets& results) {  // workspace is one of them
  for (size_t i = 0; i < results.size(); i++) {
    auto buffer = results.get<xla::ffi::AnyBuffer>(i);
    if (buffer.has_value()) std::memset((*buffer)->untyped_data(), 0xFF, (*buffer)->size_bytes());
  }
}
}  // namespace emulator

template <>
struct xla::ffi::CtxDecoding<emulator::NoStream> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return nullptr;
  }
};
