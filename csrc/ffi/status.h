// Errors that leave a handler: XLA turns them into exceptions; nothing here throws.
#pragma once
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace flashjax {

namespace ffi = xla::ffi;

inline ffi::Error InvalidArgument(std::string message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "flashjax: " + std::move(message));
}

inline ffi::Error Internal(std::string message) {
  return ffi::Error(ffi::ErrorCode::kInternal, "flashjax: " + std::move(message));
}

#define FLASHJAX_RETURN_IF_ERROR(expr)   \
  do {                                   \
    ::xla::ffi::Error error_ = (expr);   \
    if (error_.failure()) return error_; \
  } while (0)

}  // namespace flashjax
