// What a launch consists of, for the parts of the machine: threads, CTAs, and what is under way.
#pragma once
#include <cmath>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "device.h"

namespace emulator {

struct Cta;
struct Warp;

struct Copy {  // from shared memory: it is read, and later what was read is written
  bool was_read = false, was_written = false;
};
using Copies = std::vector<std::shared_ptr<Copy>>;

struct Flight {  // accumulators that products are still to write
  float* d;
  int products;
};

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Warp* warp = nullptr;
  int index = 0, lane = 0;
  bool done = false;
  const char* waits = "";
  u64 waits_for[2] = {};
  Copies open;  // copies not yet in a group
  std::deque<Copies> groups;
  std::vector<std::shared_ptr<Copy>> lines;
  std::vector<u32> unfenced;  // words of shared memory that it wrote
  u64 products = 0;           // that it has issued
  std::vector<u64> product_groups;
  std::vector<Flight> flights;
};

struct Meeting {
  u32 here = 0, mask = 0;
  u64 number = 0;
  const char* what = nullptr;
  void* brought[32];
};

struct Warp {
  Cta* cta;
  int first;  // thread
  u32 runnable = 0;
  double rate = 1;
  Meeting meeting;
};

struct Issued : Product {
  int threads = 0;
  float* d[128];
  u32 registers[128][4];
  std::vector<float> before[128];  // of accumulators that no product had under way
};

struct Group {  // a warpgroup
  Cta* cta;
  int first;
  std::deque<Issued> queue;
  u64 done = 0;
  double rate = 1;
  std::vector<Thread*> waiting;
  bool ready() const { return !queue.empty() && queue.front().threads == 128; }
};

struct Barrier {
  u32 count = 0, pending = 0;
  int64_t bytes = 0;
  u64 phase = 0;
  std::vector<Thread*> waiting;
};

struct Named {
  int arrived = 0, expected = 0;
  u64 generation = 0;
  std::vector<Thread*> waiting;
};

struct Cluster {
  int arrived = 0, threads = 0;
  u64 generation = 0;
  std::vector<Thread*> waiting;
  Cta* ctas[8] = {};
};

struct Cta {
  dim3 index;
  Cluster* cluster = nullptr;
  int rank = 0, alive = 0, votes = 0, vote = 0, voted = 0, under_way = 0;
  u32 base = 0;  // address of the first byte
  std::vector<unsigned char> memory;
  std::vector<uint16_t> writer;  // of each word: 1 + the thread that wrote it and has not fenced
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Group> groups;
  std::unordered_map<u32, Barrier> barriers;
  Named named[16];
};

struct Event {  // what the hardware does at a time of its own
  double rate;
  std::function<void()> happen;
};

struct Machine {
  std::function<void()> kernel;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Cta>> resident;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Event> events;
  Thread* now = nullptr;
  void* scheduler = nullptr;
  bool failed = false;
  u32 base = 0;  // address of the first byte of shared memory
  u64 idle = 0;  // steps in which threads only asked again

  double draw_rate() { return std::exp2(-8. * std::uniform_real_distribution<double>()(random)); }
};

extern Machine* machine;

inline Thread& now() { return *machine->now; }
inline Cta& cta() { return *machine->now->warp->cta; }

// Says what is wrong, and ends the launch with the present step.
void wrong(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The present thread does not go on until somebody wakes it, perhaps for another reason.
void sleep(const char* what, u64 a = 0, u64 b = 0);
void wake(Thread* x);
void wake(std::vector<Thread*>& all);
void happens_later(std::function<void()> what);

// Shared memory of a CTA; null if there is none, which has been said. What copies and products
// touch must not be what threads wrote and did not fence.
unsigned char* at(Cta& c, u32 address, u32 bytes);
unsigned char* hardware_at(Cta& c, u32 address, u32 bytes, const char* what);
// An address and the 128-byte swizzle: bits 4 to 6 are changed by bits 7 to 9.
inline u32 swizzled(u32 address) { return address ^ (address >> 3 & 0x70); }

Barrier& barrier(Cta& c, u32 address);
void end_vote(Cta& c);                          // at __syncthreads, if all are there
void complete(Cta& c, u32 address, u32 bytes);  // bytes that a barrier was told to expect
void run_products(Group& g);                    // the first that is asked for

}  // namespace emulator
