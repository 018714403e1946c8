// Python module flashjax._cuda. Imports, and answers what it could serve, without a driver.
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <map>
#include <vector>

#include "../attention/select.h"
#include "module.h"

namespace flashjax {
extern "C" XLA_FFI_Error* FlashjaxCudaFwd(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* FlashjaxCudaBwd(XLA_FFI_CallFrame*);

namespace {
namespace nb = nanobind;

nb::list kernel_rows() {
  nb::list rows;
  for (const Kernel& k : kernels()) {
    nb::dict row;
    row["id"] = k.id;
    row["direction"] = name_of(k.direction);
    row["family"] = k.family;
    row["arch_min"] = k.arch_min;
    row["arch_max"] = k.arch_max;
    row["dtype"] = name_of(k.dtype);
    row["d"] = k.d;
    row["e"] = k.e;
    row["unit"] = k.unit;
    row["variant"] = k.variant;
    row["tile"] = nb::make_tuple(k.m, k.n);
    row["lacks"] = feature_names(kEverything & ~k.features);
    row["ci"] = k.ci;
    row["built"] = k.built != nullptr;
    rows.append(row);
  }
  return rows;
}

// The facts of a call, as facts_of() has them, from what Python knows while it traces: the shapes
// of the slots that are there, perhaps with leading axes.
using Shapes = std::map<std::string, std::vector<int64_t>>;

Facts facts(const std::string& direction, const std::string& dtype, const Shapes& shapes,
            const nb::dict& attrs) {
  static const char here = 0;  // stands for an array that is there; never read
  BwdParams p;
  auto extent = [&](const char* slot, size_t from_end) {
    const std::vector<int64_t>& shape = shapes.at(slot);
    return shape.at(shape.size() - from_end);
  };
  p.d = extent("q", 1), p.e = extent("v", 1), p.s = extent("q", 3), p.t = extent("k", 3);
  p.h = extent("q", 2), p.g = extent("k", 2);
  if (shapes.count("page_table")) p.p = extent("page_table", 1), p.page = p.t, p.t *= p.p;
  p.dtype = dtype == "bfloat16" ? DType::kBF16 : dtype == "float16" ? DType::kF16 : DType::kF32;
  auto set = [&](const char* name, auto*& pointer) {
    if (shapes.count(name)) pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(&here);
  };
#define SLOT(name, type, dims) set(#name, p.name);
#include "../attention/slots.def"
#undef SLOT
#define ATTR(name, type) p.name = static_cast<type>(nb::cast<double>(nb::float_(attrs[#name])));
#include "../attention/attrs.def"
#undef ATTR
  return facts_of(direction == "backward" ? Direction::Backward : Direction::Forward, p);
}

std::string why_not(const std::string& direction, const std::string& dtype, const Shapes& shapes,
                    const nb::dict& attrs) {
  for (Direction x : {Direction::Forward, Direction::Backward}) {
    if (direction != name_of(x)) continue;
    for (DType y : {DType::kF32, DType::kBF16, DType::kF16}) {
      if (dtype != name_of(y)) continue;
      std::string why;
      return select(facts(direction, dtype, shapes, attrs), 0, &why) ? "" : why;
    }
    return "no CUDA kernel takes " + dtype;
  }
  return "no direction " + direction;
}

}  // namespace
}  // namespace flashjax

NB_MODULE(_cuda, m) {
  using namespace flashjax;
  define_common(m, FlashjaxCudaFwd, FlashjaxCudaBwd);
  m.attr("kernels") = kernel_rows();
  m.def("why_not", &why_not, nanobind::arg("direction"), nanobind::arg("dtype"),
        nanobind::arg("shapes"), nanobind::arg("attrs"),
        "Why no compiled kernel could serve such a call on any GPU; empty if one does.");
}
