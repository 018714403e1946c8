// The CPU handlers: decode, check what only run time shows, compute on XLA's own thread pool.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "../cpu/attention.h"
#include "decode.h"
#include "status.h"

namespace flashjax {
namespace {

// Waits for the work, never for the helpers: one that starts late finds nothing left and touches
// nothing of the caller.
class XlaParallel final : public cpu::Parallel {
 public:
  explicit XlaParallel(ffi::ThreadPool pool) : pool_(pool) {}

  int64_t threads() const override {
    return std::max<int64_t>(1, static_cast<int64_t>(pool_.num_threads()));
  }

  void For(int64_t n, const std::function<void(int64_t)>& body) override {
    if (n <= 0) return;
    struct State {
      std::atomic<int64_t> next{0}, done{0};
      std::mutex mutex;
      std::condition_variable all_done;
    };
    auto state = std::make_shared<State>();
    auto work = [state, n, &body] {
      int64_t mine = 0;
      for (int64_t i; (i = state->next.fetch_add(1)) < n; ++mine) body(i);
      if (mine && state->done.fetch_add(mine) + mine == n) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all_done.notify_all();
      }
    };
    for (int64_t i = std::min(threads(), n) - 1; i > 0; --i) pool_.Schedule(decltype(work)(work));
    work();
    std::unique_lock<std::mutex> lock(state->mutex);
    state->all_done.wait(lock, [&] { return state->done.load() == n; });
  }

 private:
  ffi::ThreadPool pool_;
};

template <typename Params, typename Decode, typename Compute>
ffi::Error run(Decode decode, Compute compute, ffi::ThreadPool pool, const ffi::RemainingArgs& args,
               const ffi::RemainingRets& rets, const ffi::Dictionary& attrs) {
  try {
    Params params;
    FLASHJAX_RETURN_IF_ERROR(decode(args, rets, attrs, params));
    if (params.shared_e > 0) return InvalidArgument("the CPU kernels take values of their own");
    if (std::string why = cpu::Check(params); !why.empty()) return InvalidArgument(why);
    XlaParallel parallel(pool);
    compute(params, parallel);
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "flashjax: out of memory");
  }
}

ffi::Error fwd(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
               ffi::Dictionary attrs) {
  return run<FwdParams>(decode_fwd, cpu::Forward, pool, args, rets, attrs);
}

ffi::Error bwd(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
               ffi::Dictionary attrs) {
  auto decode = [](const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                   const ffi::Dictionary& attrs, BwdParams& p) {
    FLASHJAX_RETURN_IF_ERROR(decode_bwd(args, rets, attrs, p));
    if (p.dbias16) return InvalidArgument("the CPU kernels write dbias in float32");
    return ffi::Error::Success();
  };
  return run<BwdParams>(decode, cpu::Backward, pool, args, rets, attrs);
}

auto binding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxCpuFwd, fwd, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(FlashjaxCpuBwd, bwd, binding());

}  // namespace flashjax
