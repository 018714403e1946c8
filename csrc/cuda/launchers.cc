// The launchers that this build holds. built_kernels.def is made by the build: the rows of
// kernels.def that it compiled.
#include "launch.h"

namespace flashjax::cuda {
namespace {

enum RowIndex {
#define KERNEL(id, ...) kRow_##id,
#include "../attention/kernels.def"
#undef KERNEL
};

// A launcher is found under the direction that its parameters show.
[[maybe_unused]] ForwardLauncher as_forward(ForwardLauncher x) { return x; }
[[maybe_unused]] ForwardLauncher as_forward(BackwardLauncher) { return nullptr; }
[[maybe_unused]] BackwardLauncher as_backward(BackwardLauncher x) { return x; }
[[maybe_unused]] BackwardLauncher as_backward(ForwardLauncher) { return nullptr; }

using ForwardParams = FwdParams;
using BackwardParams = BwdParams;

}  // namespace

#define KERNEL(id, direction, ...) \
  cudaError_t launch_##id(const direction##Params&, const Device&, cudaStream_t);
#include "built_kernels.def"
#undef KERNEL

ForwardLauncher forward_launcher(int index) {
  switch (index) {
#define KERNEL(id, ...) \
  case kRow_##id:       \
    return as_forward(launch_##id);
#include "built_kernels.def"
#undef KERNEL
  }
  return nullptr;
}

BackwardLauncher backward_launcher(int index) {
  switch (index) {
#define KERNEL(id, ...) \
  case kRow_##id:       \
    return as_backward(launch_##id);
#include "built_kernels.def"
#undef KERNEL
  }
  return nullptr;
}

}  // namespace flashjax::cuda
