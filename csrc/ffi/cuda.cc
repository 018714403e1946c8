// The CUDA handlers: decode, choose the kernel for the stream's device, enqueue. They neither wait
// nor allocate, so XLA may record them into a command buffer.
#include <array>

#include "../attention/select.h"
#include "../cuda/launch.h"
#include "decode.h"
#include "status.h"

namespace flashjax {
namespace {

using cuda::Device;

ffi::Error failed(const char* what, cudaError_t error) {
  return Internal(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                  cudaGetErrorString(error));
}

// What a handler needs to know of each device, read once in the life of the process.
constexpr int kMaxDevices = 64;
struct Devices {
  cudaError_t error = cudaSuccess;
  int count = 0;
  std::array<Device, kMaxDevices> of{};
};

Devices read_devices() {
  Devices x;
  x.error = cudaGetDeviceCount(&x.count);
  if (x.count > kMaxDevices) x.count = kMaxDevices;
  for (int i = 0; i < x.count && x.error == cudaSuccess; ++i) {
    int major = 0, minor = 0;
    x.error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
    x.error = cuda::first_error(
        x.error, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i));
    x.error = cuda::first_error(
        x.error, cudaDeviceGetAttribute(&x.of[i].sms, cudaDevAttrMultiProcessorCount, i));
    x.error = cuda::first_error(
        x.error, cudaDeviceGetAttribute(&x.of[i].smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, i));
    x.of[i].ordinal = i;
    x.of[i].arch = 10 * major + minor;
  }
  return x;
}

ffi::Error current_device(const Device*& device) {
  static const Devices devices = read_devices();
  if (devices.error != cudaSuccess) return failed("reading the CUDA devices", devices.error);
  int ordinal = 0;
  if (cudaError_t error = cudaGetDevice(&ordinal); error != cudaSuccess)
    return failed("cudaGetDevice", error);
  if (ordinal >= devices.count) return Internal("no device " + std::to_string(ordinal));
  device = &devices.of[ordinal];
  return ffi::Error::Success();
}

template <typename Params, typename Decode, typename Launcher>
ffi::Error run(Direction direction, Decode decode, Launcher (*launcher)(int), cudaStream_t stream,
               const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
               const ffi::Dictionary& attrs) {
  Params params;
  FLASHJAX_RETURN_IF_ERROR(decode(args, rets, attrs, params));
  const Device* device = nullptr;
  FLASHJAX_RETURN_IF_ERROR(current_device(device));
  std::string why;
  const Kernel* kernel = select(facts_of(direction, params), device->arch, &why);
  if (!kernel) return ffi::Error(ffi::ErrorCode::kUnimplemented, "flashjax: " + why);
  Launcher launch = launcher(kernel->index);
  if (!launch) return Internal(std::string("no launcher for ") + kernel->id);
  if (cudaError_t error = launch(params, *device, stream); error != cudaSuccess)
    return failed(kernel->id, error);
  return ffi::Error::Success();
}

ffi::Error fwd(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               ffi::Dictionary attrs) {
  return run<FwdParams>(Direction::Forward, decode_fwd, cuda::forward_launcher, stream, args, rets,
                        attrs);
}

ffi::Error bwd(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               ffi::Dictionary attrs) {
  return run<BwdParams>(Direction::Backward, decode_bwd, cuda::backward_launcher, stream, args,
                        rets, attrs);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxCudaFwd, fwd, binding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxCudaBwd, bwd, binding(), {ffi::Traits::kCmdBufferCompatible});

}  // namespace flashjax
