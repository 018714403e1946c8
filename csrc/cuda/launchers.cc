// The launchers that this build holds. built_kernels.def is made by the build: the rows of
// kernels.def that it compiled.
#include <type_traits>

#include "launch.h"

namespace flashjax::cuda {
namespace {

enum RowIndex {
#define KERNEL(id, ...) kRow_##id,
#include "../attention/kernels.def"
#undef KERNEL
};

using ForwardParams = FwdParams;
using BackwardParams = BwdParams;

}  // namespace

#define KERNEL(id, direction, ...) \
  cudaError_t launch_##id(const direction##Params&, const Device&, cudaStream_t);
#include "built_kernels.def"
#undef KERNEL

// A launcher is found under the direction that its parameters show.
template <typename Launcher>
static Launcher launcher(int index) {
  [[maybe_unused]] auto found = [](auto* x) -> Launcher {
    if constexpr (std::is_same_v<decltype(x), Launcher>)
      return x;
    else
      return nullptr;
  };
  switch (index) {
#define KERNEL(id, ...) \
  case kRow_##id:       \
    return found(launch_##id);
#include "built_kernels.def"
#undef KERNEL
  }
  return nullptr;
}

ForwardLauncher forward_launcher(int index) { return launcher<ForwardLauncher>(index); }
BackwardLauncher backward_launcher(int index) { return launcher<BackwardLauncher>(index); }

}  // namespace flashjax::cuda
