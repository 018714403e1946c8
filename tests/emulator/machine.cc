#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>
#include <vector>

#include "device.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

// ---- fibres
extern "C" void flashjax_switch(void** from, void* to);
#if !defined(__x86_64__)
#error "the emulator changes between its threads by x86-64 instructions"
#endif
asm(R"(
.text
.type flashjax_switch, @function
flashjax_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size flashjax_switch, .-flashjax_switch
)");

constexpr size_t kStackBytes = 256 * 1024;

struct Stacks {  // kept from launch to launch
  std::vector<char*> free;
  char* take() {
    if (free.empty()) {
      void* x = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (x == MAP_FAILED) std::abort();
      return static_cast<char*>(x);
    }
    char* x = free.back();
    free.pop_back();
    return x;
  }
};

// ---- what a launch is made of
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
  u32 runnable = 0, left = 0;
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

Machine* machine = nullptr;
Stacks stacks;

Thread& now() { return *machine->now; }
Cta& cta() { return *machine->now->warp->cta; }

void to_scheduler() { flashjax_switch(&now().stack_pointer, machine->scheduler); }

void wake(Thread* x) { x->warp->runnable |= 1u << x->lane; }
void wake(std::vector<Thread*>& all) {
  for (Thread* x : all) wake(x);
  all.clear();
}

void sleep(const char* what, u64 a = 0, u64 b = 0) {
  Thread& me = now();
  me.waits = what, me.waits_for[0] = a, me.waits_for[1] = b;
  me.warp->runnable &= ~(1u << me.lane);
  to_scheduler();
  me.waits = "";
}

void happens_later(std::function<void()> what) {
  machine->events.push_back({machine->draw_rate(), std::move(what)});
}

void end_vote(Cta& c) {
  if (!c.votes || c.votes < c.alive) return;
  c.voted = c.vote, c.votes = 0, c.named[0].generation++;
  wake(c.named[0].waiting);
}

void entry() {
  machine->kernel();
  Thread& me = now();
  me.done = true;
  me.warp->runnable &= ~(1u << me.lane), me.warp->left |= 1u << me.lane;
  Cta& c = cta();
  c.alive--;
  end_vote(c);  // those who wait for all need not wait for this one
  to_scheduler();
  std::abort();
}

void begin(Cta& c, int threads, int bytes) {
  c.base = machine->base;
  c.memory.assign(bytes, 0xFF);  // NaN
  c.writer.assign((bytes + 3) / 4, 0);
  c.alive = threads;
  c.threads.resize(threads), c.warps.resize((threads + 31) / 32);
  c.groups.resize((threads + 127) / 128);
  for (size_t i = 0; i < c.groups.size(); i++)
    c.groups[i].cta = &c, c.groups[i].first = 128 * i, c.groups[i].rate = machine->draw_rate();
  for (size_t i = 0; i < c.warps.size(); i++)
    c.warps[i].cta = &c, c.warps[i].first = 32 * i, c.warps[i].rate = machine->draw_rate();
  for (int i = 0; i < threads; i++) {
    Thread& x = c.threads[i];
    x.warp = &c.warps[i / 32], x.lane = i % 32, x.index = i;
    x.stack = stacks.take();
    x.warp->runnable |= 1u << x.lane;
    void** top = reinterpret_cast<void**>(x.stack + kStackBytes) - 1;
    *--top = reinterpret_cast<void*>(entry);
    for (int k = 0; k < 6; k++) *--top = nullptr;
    x.stack_pointer = top;
  }
}

void end(Cta& c) {
  for (Thread& x : c.threads) stacks.free.push_back(x.stack);
}

void run_products(Group& g);

// ---- the order of things
bool step() {
  Machine& m = *machine;
  double total = 0;
  for (auto& c : m.resident) {
    for (Warp& w : c->warps) total += w.runnable ? w.rate : 0;
    for (Group& g : c->groups) total += g.ready() ? g.rate : 0;
  }
  for (Event& e : m.events) total += e.rate;
  if (total == 0) return false;
  double at = std::uniform_real_distribution<double>(0, total)(m.random);
  const bool anew = m.random() % 64 == 0;
  for (size_t i = 0; i < m.events.size(); i++)
    if ((at -= m.events[i].rate) < 0) {
      auto happen = std::move(m.events[i].happen);
      std::swap(m.events[i], m.events.back());
      m.events.pop_back();
      m.idle = 0;
      happen();
      return true;
    }
  for (auto& c : m.resident) {
    for (Group& g : c->groups)
      if (g.ready() && (at -= g.rate) < 0) {
        if (anew) g.rate = m.draw_rate();
        m.idle = 0;
        run_products(g);
        return true;
      }
    for (Warp& w : c->warps)
      if (w.runnable && (at -= w.rate) < 0) {
        if (anew) w.rate = m.draw_rate();
        m.idle++;
        for (u32 lanes = w.runnable; lanes && !m.failed; lanes &= lanes - 1) {
          const int lane = __builtin_ctz(lanes);
          m.now = &c->threads[w.first + lane];
          threadIdx = dim3(w.first + lane, 0, 0), blockIdx = c->index;
          flashjax_switch(&m.scheduler, m.now->stack_pointer);
        }
        m.now = nullptr;
        return true;
      }
  }
  return true;  // rounding
}

void say_who_waits() {
  for (auto& c : machine->resident)
    for (Warp& w : c->warps) {
      const char* said = nullptr;
      u64 also[2] = {};
      for (int lane = 0; lane < 32 && w.first + lane < static_cast<int>(c->threads.size());
           lane++) {
        Thread& x = c->threads[w.first + lane];
        if (x.done || (w.runnable >> lane & 1)) continue;
        if (said && !std::strcmp(said, x.waits) && also[0] == x.waits_for[0]) continue;
        said = x.waits, also[0] = x.waits_for[0], also[1] = x.waits_for[1];
        std::fprintf(stderr, "  CTA %u,%u,%u thread %d waits: %s %#llx, %llu\n", c->index.x,
                     c->index.y, c->index.z, x.index, said, (unsigned long long)also[0],
                     (unsigned long long)also[1]);
      }
    }
}

std::mutex one_launch;
u64 last_seed = 0, launches = 0;  // since it was given

u64 from_environment(const char* name, u64 otherwise) {
  const char* x = std::getenv(name);
  return x ? std::strtoull(x, nullptr, 0) : otherwise;
}

}  // namespace

int multiprocessors() { return static_cast<int>(from_environment("FLASHJAX_EMULATED_SMS", 4)); }

bool launch(dim3 grid, int threads, int bytes, int cluster, std::function<void()> kernel) {
  std::lock_guard<std::mutex> lock(one_launch);
  Machine m;
  machine = &m;
  m.kernel = std::move(kernel);
  const u64 seed = from_environment("FLASHJAX_EMULATOR_SEED", 0);
  if (seed != last_seed) last_seed = seed, launches = 0;
  m.random.seed(seed * 0x9E3779B97F4A7C15u + launches++);
  m.base = 1024 + 16 * (m.random() % 64);
  // Kernels whose shared memory the compiler lays out have it in static variables, one for all: so
  // one block at a time.
  const int per_sm = bytes <= kSharedBytes / 2 ? 2 : 1;
  const size_t most = bytes ? std::max(multiprocessors() * per_sm / cluster, 1) * cluster : 1;
  gridDim = grid, blockDim = dim3(threads);
  const u64 count = u64{grid.x} * grid.y * grid.z;
  u64 next = 0;
  while (!m.failed) {
    while (next < count && m.resident.size() + cluster <= most) {
      m.clusters.push_back(std::make_unique<Cluster>());
      Cluster* of = m.clusters.back().get();
      of->threads = cluster * threads;
      for (int rank = 0; rank < cluster; rank++, next++) {
        auto c = std::make_unique<Cta>();
        c->index = dim3(next % grid.x, next / grid.x % grid.y, next / grid.x / grid.y);
        c->cluster = of, c->rank = rank, of->ctas[rank] = c.get();
        begin(*c, threads, bytes);
        m.resident.push_back(std::move(c));
      }
    }
    if (m.resident.empty()) break;
    if (!step()) {
      std::fprintf(stderr, "emulator: nobody can go on\n");
      for (auto& c : m.resident)
        std::fprintf(stderr, "  CTA %u,%u,%u: %d of %zu threads are left\n", c->index.x, c->index.y,
                     c->index.z, c->alive, c->threads.size());
      say_who_waits();
      m.failed = true;
    }
    if (m.idle > 20'000'000) {
      std::fprintf(stderr, "emulator: threads ask and ask, and nothing happens\n");
      say_who_waits();
      m.failed = true;
    }
    // A cluster leaves when all of it has.
    for (size_t i = 0; i < m.resident.size() && !m.failed; i += cluster) {
      int alive = 0, under_way = 0;
      for (int r = 0; r < cluster; r++)
        alive += m.resident[i + r]->alive, under_way += m.resident[i + r]->under_way;
      if (alive) continue;
      if (under_way) {
        std::fprintf(stderr, "emulator: a block ended with copies or products under way\n");
        m.failed = true;
      }
      for (int r = 0; r < cluster; r++) end(*m.resident[i + r]);
      m.resident.erase(m.resident.begin() + i, m.resident.begin() + i + cluster);
      i -= cluster;
    }
  }
  while (!m.failed && !m.events.empty()) step();  // writes to global memory that nobody waited for
  if (m.failed)
    for (auto& c : m.resident) end(*c);
  machine = nullptr;
  return !m.failed;
}

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::fprintf(stderr, "emulator: ");
  std::vfprintf(stderr, format, list);
  va_end(list);
  if (machine->now) {
    const Thread& x = now();
    std::fprintf(stderr, " (CTA %u,%u,%u thread %d)", blockIdx.x, blockIdx.y, blockIdx.z, x.index);
  }
  std::fprintf(stderr, "\n");
  trap();
}

void trap() {
  machine->failed = true;
  if (machine->now) to_scheduler();
  std::abort();  // events do not fail: they report and go on
}

int lane() { return now().lane; }
int cluster_rank() { return cta().rank; }
unsigned char* shared_memory() { return cta().memory.data(); }

void yield() { to_scheduler(); }

// ---- shared memory
u32 address_of(const void* p) {
  Cta& c = cta();
  return c.base + static_cast<u32>(static_cast<const unsigned char*>(p) - c.memory.data());
}

static unsigned char* at(Cta& c, u32 address, u32 bytes) {
  const u32 offset = address - c.base;
  if (address < c.base || offset + bytes > c.memory.size()) {
    machine->failed = true;
    std::fprintf(stderr, "emulator: %u bytes at shared address %u + %u of %zu\n", bytes, c.base,
                 offset, c.memory.size());
    if (machine->now) to_scheduler();
    return nullptr;
  }
  return c.memory.data() + offset;
}

// Copies and products must not touch what threads wrote and did not fence.
static unsigned char* hardware_at(Cta& c, u32 address, u32 bytes, const char* what) {
  unsigned char* p = at(c, address, bytes);
  if (!p) return nullptr;
  const u32 offset = address - c.base;
  for (u32 word = offset / 4; word < (offset + bytes + 3) / 4; word++)
    if (c.writer[word] && !machine->failed) {
      std::fprintf(
          stderr,
          "emulator: %s shared address %u + %u, which thread %d of CTA %u,%u,%u wrote without "
          "a fence for it\n",
          what, c.base, word * 4, c.writer[word] - 1, c.index.x, c.index.y, c.index.z);
      machine->failed = true;
    }
  return p;
}

const void* read(u32 address, u32 bytes, By by) {
  if (address % std::min(bytes, 16u)) fail("%u bytes read at address %u", bytes, address);
  return by == By::kThread ? at(cta(), address, bytes)
                           : hardware_at(cta(), address, bytes, "a read of");
}

void* write(u32 address, u32 bytes, By) {
  if (address % std::min(bytes, 16u)) fail("%u bytes written at address %u", bytes, address);
  Cta& c = cta();
  unsigned char* p = at(c, address, bytes);
  for (u32 word = (address - c.base) / 4; word < (address - c.base + bytes + 3) / 4; word++) {
    c.writer[word] = static_cast<uint16_t>(1 + now().index);
    now().unfenced.push_back(word);
  }
  return p;
}

void fence_async() {
  Thread& me = now();
  for (u32 word : me.unfenced)
    if (cta().writer[word] == 1 + me.index) cta().writer[word] = 0;
  me.unfenced.clear();
}

// ---- lanes that meet
void meet(u32 mask, const char* what, void* mine, const std::function<void(void* const*)>& work) {
  Thread& me = now();
  Meeting& x = me.warp->meeting;
  const u32 bit = 1u << me.lane;
  const int size = static_cast<int>(cta().threads.size()) - me.warp->first;
  if (size < 32) mask &= (1u << size) - 1;
  if (!(mask & bit)) fail("%s: a lane that the mask %#x does not name", what, mask);
  if (!x.here)
    x.mask = mask, x.what = what;
  else if (x.mask != mask || std::strcmp(x.what, what))
    fail("lanes of a warp meet for %s and for %s", x.what, what);
  x.here |= bit, x.brought[me.lane] = mine;
  if (x.here == mask) {
    void* all[32];
    std::copy(x.brought, x.brought + 32, all);
    x.here = 0, x.number++;
    work(all);
    for (int i = 0; i < 32; i++)
      if ((mask & ~bit) >> i & 1) wake(&cta().threads[me.warp->first + i]);
  } else {
    const u64 number = x.number;
    while (x.number == number) sleep(what);  // a copy that ends may wake it too
  }
}

// ---- barriers
static Barrier& barrier(Cta& c, u32 address) {
  auto found = c.barriers.find(address);
  if (found == c.barriers.end())
    fail("no barrier at shared address %u + %u", c.base, address - c.base);
  return found->second;
}

static void advance(Barrier& b) {
  if (b.pending || b.bytes) return;
  b.phase++, b.pending = b.count;
  wake(b.waiting);
}

void barrier_init(u32 address, u32 count) {
  if (address % 8) fail("a barrier at address %u", address);
  at(cta(), address, 8);
  Barrier& b = cta().barriers[address];
  b = Barrier{};
  b.count = b.pending = count;
}

void barrier_arrive(u32 address, int rank) {
  Cta& c = cta();
  Cta* of = &c;
  if (rank >= 0) of = c.cluster->ctas[rank];
  Barrier& b = barrier(*of, address);
  if (!b.pending) fail("one arrival too many at shared address %u + %u", c.base, address - c.base);
  b.pending--;
  advance(b);
}

void barrier_expect(u32 address, u32 bytes) {
  barrier(cta(), address).bytes += bytes;
  barrier_arrive(address, -1);
}

void barrier_wait(u32 address, u32 parity) {
  Barrier& b = barrier(cta(), address);
  while ((b.phase & 1) == (parity & 1)) {
    b.waiting.push_back(&now());
    sleep("mbarrier", address - cta().base, parity);
  }
}

void named_barrier(int id, int threads, bool wait) {
  Named& x = cta().named[id];
  if (threads % 32) fail("named barrier %d of %d threads", id, threads);
  if (x.arrived && x.expected != threads)
    fail("named barrier %d of %d and of %d threads", id, x.expected, threads);
  x.expected = threads;
  if (++x.arrived == threads) {
    x.arrived = 0, x.generation++;
    wake(x.waiting);
  } else if (wait) {
    const u64 generation = x.generation;
    while (x.generation == generation) {
      x.waiting.push_back(&now());
      sleep("named barrier", id, threads);
    }
  }
}

int block_barrier(int vote) {
  Cta& c = cta();
  Named& x = c.named[0];
  const u64 generation = x.generation;
  c.vote = (c.votes ? c.vote : 0) | vote;
  c.votes++;
  end_vote(c);
  if (x.generation == generation) {
    while (x.generation == generation) {
      x.waiting.push_back(&now());
      sleep("all threads of the block");
    }
  }
  return c.voted;
}

void cluster_barrier() {
  Cluster& x = *cta().cluster;
  const u64 generation = x.generation;
  if (++x.arrived == x.threads) {
    x.arrived = 0, x.generation++;
    wake(x.waiting);
  } else {
    while (x.generation == generation) {
      x.waiting.push_back(&now());
      sleep("cluster barrier");
    }
  }
}

// ---- copies. An address and the 128-byte swizzle: bits 4 to 6 are changed by bits 7 to 9.
static u32 swizzled(u32 address) { return address ^ (address >> 3 & 0x70); }

static char* element(const Box& x, const int64_t (&i)[4]) {
  char* p = x.base + i[0] * x.element;
  for (int k = 0; k < 4; k++) {
    if (i[k] < 0 || i[k] >= x.extent[k]) return nullptr;
    if (k) p += i[k] * x.stride[k];
  }
  return p;
}

// Goes through the elements of a box in order, 16 bytes of shared memory at a time.
template <typename Do>
static void for_lines(const Box& x, u32 address, Do line) {
  const int per_line = 16 / x.element;
  u32 offset = 0;
  int64_t i[4];
  for (i[3] = x.at[3]; i[3] < x.at[3] + x.box[3]; i[3]++)
    for (i[2] = x.at[2]; i[2] < x.at[2] + x.box[2]; i[2]++)
      for (i[1] = x.at[1]; i[1] < x.at[1] + x.box[1]; i[1]++)
        for (i[0] = x.at[0]; i[0] < x.at[0] + x.box[0]; i[0] += per_line, offset += 16)
          line(swizzled(address + offset), i);
}

static u32 bytes_of(const Box& x) {
  return static_cast<u32>(x.box[0] * x.box[1] * x.box[2] * x.box[3] * x.element);
}

static void complete(Cta& c, u32 address, u32 bytes) {
  auto found = c.barriers.find(address);
  if (found == c.barriers.end()) {
    std::fprintf(stderr, "emulator: a copy for no barrier\n");
    machine->failed = true;
    return;
  }
  found->second.bytes -= bytes;
  advance(found->second);
}

void load_box(u32 to, const Box& box, u32 bar, u32 ctas) {
  Cta& mine = cta();
  if (to % 128) fail("a box to address %u", to);
  for (int rank = 0; rank < 8; rank++) {
    if (!(ctas >> rank & 1)) continue;
    Cta* c = ctas == 1 ? &mine : mine.cluster->ctas[rank];
    if (!c) fail("a box for CTA %d of a cluster, which it does not have", rank);
    barrier(*c, bar);
    c->under_way++;
    happens_later([=] {
      for_lines(box, to, [&](u32 address, int64_t (&i)[4]) {
        unsigned char* p = hardware_at(*c, address, 16, "a copy to");
        if (!p) return;
        int64_t at[4] = {i[0], i[1], i[2], i[3]};
        for (int k = 0; k < 16 / box.element; k++, at[0]++) {
          const char* from = element(box, at);
          if (from)
            std::memcpy(p + k * box.element, from, box.element);
          else
            std::memset(p + k * box.element, 0, box.element);
        }
      });
      c->under_way--;
      complete(*c, bar, bytes_of(box));
    });
  }
}

void load_bytes(u32 to, const void* from, u32 bytes, u32 bar) {
  Cta* c = &cta();
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    fail("a bulk copy out of line");
  barrier(*c, bar);
  c->under_way++;
  happens_later([=] {
    if (unsigned char* p = hardware_at(*c, to, bytes, "a copy to")) std::memcpy(p, from, bytes);
    c->under_way--;
    complete(*c, bar, bytes);
  });
}

// A copy out: `take` reads, `put` writes what was read.
static void copy_out(std::function<void()> take, std::function<void()> put) {
  Thread* me = &now();
  Cta* c = &cta();
  auto copy = std::make_shared<Copy>();
  me->open.push_back(copy);
  c->under_way++;
  happens_later([=] {
    take();
    copy->was_read = true;
    c->under_way--;
    if (!me->done) wake(me);
    happens_later([=] {
      put();
      copy->was_written = true;
    });
  });
}

void store_box(u32 from, const Box& box, bool add) {
  if (from % 128) fail("a box from address %u", from);
  Cta* c = &cta();
  auto bytes = std::make_shared<std::vector<unsigned char>>();
  copy_out(
      [=] {
        for_lines(box, from, [&](u32 address, int64_t (&)[4]) {
          const unsigned char* p = hardware_at(*c, address, 16, "a copy from");
          for (int k = 0; k < 16; k++) bytes->push_back(p ? p[k] : 0);
        });
      },
      [=] {
        size_t offset = 0;
        for_lines(box, from, [&](u32, int64_t (&i)[4]) {
          int64_t at[4] = {i[0], i[1], i[2], i[3]};
          for (int k = 0; k < 16 / box.element; k++, at[0]++, offset += box.element) {
            char* to = element(box, at);
            const unsigned char* x = bytes->data() + offset;
            if (!to) continue;
            if (!add) {
              std::memcpy(to, x, box.element);
            } else if (box.type == Box::kF32) {
              float a, b;
              std::memcpy(&a, to, 4), std::memcpy(&b, x, 4);
              a += b;
              std::memcpy(to, &a, 4);
            } else {
              uint16_t a, b;
              std::memcpy(&a, to, 2), std::memcpy(&b, x, 2);
              a = box.type == Box::kF16 ? to_half(from_half(a) + from_half(b))
                                        : to_bf16(from_bf16(a) + from_bf16(b));
              std::memcpy(to, &a, 2);
            }
          }
        });
      });
}

void store_bytes(void* to, u32 from, u32 bytes, bool add_floats) {
  if (from % 16 || reinterpret_cast<uintptr_t>(to) % 16 || bytes % 16)
    fail("a bulk copy out of line");
  Cta* c = &cta();
  auto taken = std::make_shared<std::vector<unsigned char>>(bytes);
  copy_out(
      [=] {
        if (const unsigned char* p = hardware_at(*c, from, bytes, "a copy from"))
          std::memcpy(taken->data(), p, bytes);
      },
      [=] {
        if (!add_floats) {
          std::memcpy(to, taken->data(), bytes);
          return;
        }
        for (u32 i = 0; i < bytes / 4; i++) {
          float x;
          std::memcpy(&x, taken->data() + 4 * i, 4);
          static_cast<float*>(to)[i] += x;
        }
      });
}

void commit_copies() {
  Thread& me = now();
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void wait_copies(int left, bool only_read) {
  Thread& me = now();
  auto done = [&] {
    for (size_t i = 0; i + left < me.groups.size(); i++)
      for (auto& copy : me.groups[i])
        if (!(only_read ? copy->was_read : copy->was_written)) return false;
    return true;
  };
  while (!done()) {
    // A write does not wake: it is asked for again.
    if (only_read)
      sleep("its copies");
    else
      yield();
  }
  if (!only_read)
    while (me.groups.size() > static_cast<size_t>(left)) me.groups.pop_front();
}

void copy_line(u32 to, const void* from) {
  Thread* me = &now();
  Cta* c = &cta();
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("16 bytes copied out of line");
  auto copy = std::make_shared<Copy>();
  me->lines.push_back(copy);
  c->under_way++;
  happens_later([=] {
    if (unsigned char* p = at(*c, to, 16)) std::memcpy(p, from, 16);
    for (u32 word = (to - c->base) / 4; word < (to - c->base) / 4 + 4; word++) {
      c->writer[word] = static_cast<uint16_t>(1 + me->index);
      me->unfenced.push_back(word);
    }
    copy->was_read = true;
    c->under_way--;
    if (!me->done) wake(me);
  });
}

void wait_lines() {
  Thread& me = now();
  for (auto& copy : me.lines)
    while (!copy->was_read) sleep("16 bytes");
  me.lines.clear();
}

// ---- products
void multiply(const Product& product, float* d, const u32* a_registers) {
  Thread& me = now();
  Group& g = cta().groups[me.index / 128];
  const u64 i = me.products++ - g.done;
  const int own = me.index % 128;
  if (i == g.queue.size()) {
    g.queue.emplace_back();
    static_cast<Product&>(g.queue.back()) = product;
    g.cta->under_way++;
  }
  Issued& x = g.queue[i];
  if (x.n != product.n || x.a != product.a || x.b != product.b || x.add != product.add ||
      x.a_in_registers != product.a_in_registers)
    fail("threads of a warpgroup ask for unlike products");
  x.threads++, x.d[own] = d;
  if (a_registers) std::copy(a_registers, a_registers + 4, x.registers[own]);
  auto found =
      std::find_if(me.flights.begin(), me.flights.end(), [&](Flight& f) { return f.d == d; });
  if (found != me.flights.end()) {
    found->products++;
    return;
  }
  me.flights.push_back({d, 1});
  x.before[own].assign(d, d + product.n / 2);
  std::fill(d, d + product.n / 2, NAN);  // whoever reads it now sees
}

// Of an operand: `rows` x 16, rows along its M or N.
static void fetch(Cta& c, float* to, u64 descriptor, bool transposed, bool f16, int rows) {
  const u32 start = static_cast<u32>(descriptor & 0x3FFF) << 4,
            chunk = static_cast<u32>(descriptor >> 16 & 0x3FFF) << 4,
            group = static_cast<u32>(descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1)
    std::fprintf(stderr, "emulator: an operand of unknown layout\n"), machine->failed = true;
  auto convert = [&](u32 address, float (&y)[8]) {
    const unsigned char* p = hardware_at(c, swizzled(address), 16, "a product with");
    for (int e = 0; e < 8; e++) {
      uint16_t bits = 0;
      if (p) std::memcpy(&bits, p + 2 * e, 2);
      y[e] = f16 ? from_half(bits) : from_bf16(bits);
    }
  };
  float y[8];
  if (!transposed) {
    for (int r = 0; r < rows; r++)
      for (int k = 0; k < 16; k += 8) {
        convert(start + r / 8 * group + r % 8 * 128 + 2 * k, y);
        std::copy(y, y + 8, to + 16 * r + k);
      }
  } else {
    for (int k = 0; k < 16; k++)
      for (int r = 0; r < rows; r += 8) {
        convert(start + r / 64 * chunk + k / 8 * group + k % 8 * 128 + 2 * (r % 64), y);
        for (int e = 0; e < 8; e++) to[16 * (r + e) + k] = y[e];
      }
  }
}

namespace {
void run_products(Group& g) {
  Issued& x = g.queue.front();
  static float a[64 * 16], b[256 * 16], bt[16 * 256], d[256];
  // Addresses of shared memory in descriptors have 18 bits.
  fetch(*g.cta, b, x.b, x.b_transposed, x.f16, x.n);
  for (int j = 0; j < x.n; j++)
    for (int k = 0; k < 16; k++) bt[k * x.n + j] = b[16 * j + k];
  if (!x.a_in_registers) {
    fetch(*g.cta, a, x.a, x.a_transposed, x.f16, 64);
  } else {
    for (int t = 0; t < 128; t++)
      for (int i = 0; i < 4; i++)
        for (int e = 0; e < 2; e++) {
          const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, k = t % 4 * 2 + i / 2 * 8 + e;
          const uint16_t bits = static_cast<uint16_t>(x.registers[t][i] >> (16 * e));
          a[16 * row + k] = x.f16 ? from_half(bits) : from_bf16(bits);
        }
  }
  for (int t = 0; t < 128; t++)
    if (!x.before[t].empty()) std::copy(x.before[t].begin(), x.before[t].end(), x.d[t]);
  for (int row = 0; row < 64; row++) {
    std::fill(d, d + x.n, 0.f);
    for (int k = 0; k < 16; k++) {
      const float y = a[16 * row + k];
      const float* z = bt + k * x.n;
      for (int j = 0; j < x.n; j++) d[j] += y * z[j];
    }
    const int first = row / 16 * 32 + row % 8 * 4, half = row / 8 % 2;
    for (int j = 0; j < x.n; j += 2) {
      float* to = x.d[first + j / 2 % 4] + j / 8 * 4 + 2 * half;
      to[0] = x.add ? to[0] + d[j] : d[j];
      to[1] = x.add ? to[1] + d[j + 1] : d[j + 1];
    }
  }
  for (int t = 0; t < 128; t++) {
    auto& flights = g.cta->threads[g.first + t].flights;
    auto found =
        std::find_if(flights.begin(), flights.end(), [&](Flight& f) { return f.d == x.d[t]; });
    if (--found->products == 0) flights.erase(found);
  }
  g.queue.pop_front();
  g.done++, g.cta->under_way--;
  wake(g.waiting);
}
}  // namespace

void commit_products() { now().product_groups.push_back(now().products); }

void wait_products(int left) {
  Thread& me = now();
  Group& g = cta().groups[me.index / 128];
  const size_t groups = me.product_groups.size();
  if (groups <= static_cast<size_t>(left)) return;
  const u64 needed = me.product_groups[groups - left - 1];
  while (g.done < needed) {
    g.waiting.push_back(&me);
    sleep("products", needed, g.done);
  }
}

// ---- numbers
float from_half(uint16_t x) {
  static const std::vector<float> all = [] {
    std::vector<float> y(65536);
    for (int i = 0; i < 65536; i++) {
      const int exponent = i >> 10 & 31, fraction = i & 1023;
      const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                         : exponent     ? std::ldexp(1.f + fraction / 1024.f, exponent - 15)
                                        : std::ldexp(fraction / 1024.f, -14);
      y[i] = i >> 15 ? -size : size;
    }
    return y;
  }();
  return all[x];
}

// To nearest, ties to even.
uint16_t to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7FFF;
  if (size >= 65520.f) return sign | 0x7C00;
  if (size == 0) return sign;
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place
  const float places = std::nearbyint(std::ldexp(size, -unit));
  // Places of 2^unit: the exponent's field follows by adding.
  const int field = unit == -24 ? 0 : unit + 24;
  return sign | static_cast<uint16_t>((field << 10) + static_cast<int>(places));
}

uint16_t to_bf16(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator
