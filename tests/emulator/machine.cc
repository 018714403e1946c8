// Fibres, and who is next.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "state.h"

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

Stacks stacks;

void to_scheduler() { flashjax_switch(&now().stack_pointer, machine->scheduler); }

}  // namespace

Machine* machine = nullptr;

void wake(Thread* x) { x->warp->runnable |= 1u << x->lane; }
void wake(std::vector<Thread*>& all) {
  for (Thread* x : all) wake(x);
  all.clear();
}

void sleep(const char* what, u64 a, u64 b) {
  Thread& me = now();
  me.waits = what, me.waits_for[0] = a, me.waits_for[1] = b;
  me.warp->runnable &= ~(1u << me.lane);
  to_scheduler();
  me.waits = "";
}

void happens_later(std::function<void()> what) {
  machine->events.push_back({machine->draw_rate(), std::move(what)});
}

namespace {

void entry() {
  machine->kernel();
  Thread& me = now();
  me.done = true;
  me.warp->runnable &= ~(1u << me.lane);
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
      wrong("nobody can go on");
      for (auto& c : m.resident)
        std::fprintf(stderr, "  CTA %u,%u,%u: %d of %zu threads are left\n", c->index.x, c->index.y,
                     c->index.z, c->alive, c->threads.size());
      say_who_waits();
    }
    if (m.idle > 20'000'000) {
      wrong("threads ask and ask, and nothing happens");
      say_who_waits();
    }
    // A cluster leaves when all of it has.
    for (size_t i = 0; i < m.resident.size() && !m.failed; i += cluster) {
      int alive = 0, under_way = 0;
      for (int r = 0; r < cluster; r++)
        alive += m.resident[i + r]->alive, under_way += m.resident[i + r]->under_way;
      if (alive) continue;
      if (under_way) wrong("a block ended with copies or products under way");
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

static void say(const char* format, va_list list) {
  machine->failed = true;
  std::fprintf(stderr, "emulator: ");
  std::vfprintf(stderr, format, list);
  if (machine->now)
    std::fprintf(stderr, " (CTA %u,%u,%u thread %d)", blockIdx.x, blockIdx.y, blockIdx.z,
                 now().index);
  std::fprintf(stderr, "\n");
}

void wrong(const char* format, ...) {
  va_list list;
  va_start(list, format);
  say(format, list);
  va_end(list);
}

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  say(format, list);
  va_end(list);
  to_scheduler();  // which does not come back
  std::abort();
}

int lane() { return now().lane; }
int cluster_rank() { return cta().rank; }
unsigned char* shared_memory() { return cta().memory.data(); }

void yield() { to_scheduler(); }

}  // namespace emulator
