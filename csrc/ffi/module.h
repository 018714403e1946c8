// What both extension modules tell Python: their handlers, the FFI version they were built with,
// and the C++ halves of the tables, for the test that compares them with the Python halves.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "decode.h"

namespace flashjax {

inline void define_common(nanobind::module_& m, XLA_FFI_Handler* fwd, XLA_FFI_Handler* bwd) {
  namespace nb = nanobind;
  nb::dict targets;
  targets["flashjax_fwd"] = nb::capsule(reinterpret_cast<void*>(fwd));
  targets["flashjax_bwd"] = nb::capsule(reinterpret_cast<void*>(bwd));
  m.attr("targets") = targets;
  m.attr("ffi_api") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  nb::list slots;
  static constexpr const char* kTypes[] = {"T", "F", "F32", "S32"};
  for (const SlotInfo& slot : kSlots)
    slots.append(nb::make_tuple(slot.name, kTypes[static_cast<int>(slot.type)], slot.dims));
  m.attr("slots") = slots;
  nb::list attrs;
#define ATTR(name, type) attrs.append(nb::make_tuple(#name, #type));
#include "../attention/attrs.def"
#undef ATTR
  m.attr("attrs") = attrs;
}

}  // namespace flashjax
