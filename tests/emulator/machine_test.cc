// What the emulator must catch, and what it must let pass. Each kernel runs in many orders.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "device.h"

using namespace emulator;

static int failed = 0;

static void check(bool ok, const char* what) {
  if (!ok) failed++, std::printf("FAILED: %s\n", what);
}

// In how many of 50 orders a kernel of one block goes wrong.
static int wrong(int threads, const std::function<void()>& kernel) {
  int count = 0;
  for (int i = 0; i < 50; i++) count += !launch(dim3(1), threads, 16384, 1, kernel);
  return count;
}
static void always(const char* what, int threads, const std::function<void()>& kernel) {
  check(wrong(threads, kernel) == 50, what);
}
static void never(const char* what, int threads, const std::function<void()>& kernel) {
  check(wrong(threads, kernel) == 0, what);
}
static void sometimes(const char* what, int threads, const std::function<void()>& kernel) {
  const int count = wrong(threads, kernel);
  check(count > 0 && count < 50, what);
}

static u32 base() { return (address_of(shared_memory()) + 1023) & ~1023u; }
static int tid() { return static_cast<int>(threadIdx.x); }
static const float* floats(u32 at) { return static_cast<const float*>(read(at, 4)); }

static void barriers() {
  never("a barrier lets its waiters go", 64, [] {
    if (tid() == 0) barrier_init(base(), 32);
    __syncthreads();
    if (tid() < 32)
      barrier_arrive(base(), -1);
    else
      barrier_wait(base(), 0);
  });
  always("a wait that never ends", 32, [] {
    if (tid() == 0) barrier_init(base(), 1);
    __syncwarp();
    barrier_wait(base(), 0);
  });
  always("one arrival too many", 32, [] {
    if (tid() == 0) {
      barrier_init(base(), 2);
      barrier_expect(base(), 16);
      barrier_arrive(base(), -1);
      barrier_arrive(base(), -1);
    }
  });
  always("a barrier that is none", 32, [] { barrier_arrive(base() + 8, -1); });
  always("a lane that does not come", 32, [] {
    if (tid() != 5) __syncwarp();
  });
  always("lanes that meet for two things", 32, [] {
    if (tid() < 16)
      __syncwarp();
    else
      __shfl_sync(~0u, 1, 0);
  });
  // The warps 0 and 1 go round twice, and their second arrivals stand in for warps of the other
  // side that have not come yet.
  auto turns = [](int ids) {
    return [ids] {
      if (tid() == 0) barrier_init(base(), 64), barrier_init(base() + 8, 64);
      __syncthreads();
      for (int turn = 0; turn < 4; turn++) {
        const int id = 1 + turn % ids;
        if (tid() < 64) {
          named_barrier(id, 128, false);
          // At most a turn ahead, as by a ring of two stages.
          if (turn > 0) barrier_wait(base() + 8 * ((turn - 1) % 2), (turn - 1) / 2 % 2);
        } else {
          named_barrier(id, 128, true);
          barrier_arrive(base() + 8 * (turn % 2), -1);
        }
      }
    };
  };
  sometimes("a named barrier that takes anybody's arrival", 128, turns(1));
  never("two of them in turn", 128, turns(2));
}

static void copies() {
  static float data[64];
  for (int i = 0; i < 64; i++) data[i] = static_cast<float>(i);
  static int unseen;
  unseen = 0;
  never("a copy that is waited for", 32, [] {
    if (tid() == 0) {
      barrier_init(base() + 512, 1);
      barrier_expect(base() + 512, 256);
      load_bytes(base(), data, 256, base() + 512);
      unseen += std::isnan(*floats(base() + 4));
    }
    __syncwarp();
    barrier_wait(base() + 512, 0);
    if (*floats(base() + 4 * tid()) != static_cast<float>(tid())) fail("another number");
  });
  check(unseen > 0, "a copy is not there at once");
  always("a copy that nobody waits for", 32, [] {
    if (tid() == 0) {
      barrier_init(base() + 512, 1);
      for (int i = 0; i < 50; i++)  // or it may have landed
        barrier_expect(base() + 512, 256), load_bytes(base(), data, 256, base() + 512);
    }
  });
  static float to[64];
  auto out = [](bool fence) {
    return [fence] {
      *static_cast<float*>(write(base() + 4 * tid(), 4)) = 1.f;
      if (fence) fence_async();
      __syncwarp();
      if (tid() == 0) {
        store_bytes(to, base(), 128, false);
        commit_copies();
        wait_copies(0, true);
      }
    };
  };
  never("a copy out of what was fenced", 32, out(true));
  always("a copy out of what was not", 32, out(false));
  sometimes("what a copy still reads is written", 32, [] {
    if (tid() == 0) {
      *static_cast<float*>(write(base(), 16)) = 1.f;
      fence_async();
      store_bytes(to, base(), 16, false);
      commit_copies();
      yield();
      *static_cast<float*>(write(base(), 16)) = 2.f;
      wait_copies(0, false);
      if (to[0] != 1.f) fail("another number");
    }
  });
  always("shared memory that the block does not have", 32, [] { read(base() + 16384, 4); });
}

static void products() {
  auto product = [](bool wait) {
    return [wait] {
      float d[4] = {1, 1, 1, 1};
      for (int i = 0; i < 4; i++)  // zeros
        std::memset(write(base() + 2048 * i + 16 * tid(), 16), 0, 16);
      fence_async();
      __syncthreads();
      const u64 operand = u64{1} << 62 | u64{64} << 32 | base() >> 4;
      multiply({8, false, false, false, false, true, operand, operand}, d, nullptr);
      commit_products();
      if (wait) wait_products(0);
      const float x = d[0];
      if (!wait) wait_products(0);
      if (x != 1.f) fail("another number");
    };
  };
  never("a product that is waited for", 128, product(true));
  always("accumulators read before", 128, product(false));
}

static void numbers() {
  for (int i = 0; i < 65536; i++) {
    const float x = from_half(static_cast<uint16_t>(i));
    if (std::isnan(x) ? !std::isnan(from_half(to_half(x))) : to_half(x) != i)
      return check(false, "float16 and back");
  }
  check(to_half(1.f + 1.f / 2048) == to_half(1.f), "ties to even, down");
  check(to_half(1.f + 3.f / 2048) == to_half(1.f + 4.f / 2048), "ties to even, up");
  check(from_half(to_half(2047.6f)) == 2048.f, "to the next power of two");
  check(from_bf16(to_bf16(1.f + 1.f / 256)) == 1.f, "bfloat16, ties to even");
}

int main() {
  std::freopen("/dev/null", "w", stderr);  // where what is wrong is said
  barriers(), copies(), products(), numbers();
  std::printf(failed ? "%d failed\n" : "passed\n", failed);
  return failed != 0;
}
