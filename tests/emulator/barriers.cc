// Where threads wait for each other: lanes of a warp, mbarriers, named barriers, the block, the
// cluster.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace emulator {

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

Barrier& barrier(Cta& c, u32 address) {
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

void complete(Cta& c, u32 address, u32 bytes) {
  auto found = c.barriers.find(address);
  if (found == c.barriers.end()) return wrong("a copy for a barrier that there no longer is");
  found->second.bytes -= bytes;
  advance(found->second);
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

// Those who wait for all need not wait for threads that have left.
void end_vote(Cta& c) {
  if (!c.votes || c.votes < c.alive) return;
  c.voted = c.vote, c.votes = 0, c.named[0].generation++;
  wake(c.named[0].waiting);
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

}  // namespace emulator
