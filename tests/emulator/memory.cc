// Shared memory, by address.
#include <algorithm>

#include "state.h"

namespace emulator {

u32 address_of(const void* p) {
  Cta& c = cta();
  return c.base + static_cast<u32>(static_cast<const unsigned char*>(p) - c.memory.data());
}

unsigned char* at(Cta& c, u32 address, u32 bytes) {
  const u32 offset = address - c.base;
  if (address < c.base || offset + bytes > c.memory.size()) {
    if (machine->now) fail("%u bytes at shared address %u + %u", bytes, c.base, offset);
    return wrong("%u bytes at shared address %u + %u", bytes, c.base, offset), nullptr;
  }
  return c.memory.data() + offset;
}

unsigned char* hardware_at(Cta& c, u32 address, u32 bytes, const char* what) {
  unsigned char* p = at(c, address, bytes);
  if (!p) return nullptr;
  const u32 offset = address - c.base;
  for (u32 word = offset / 4; word < (offset + bytes + 3) / 4; word++)
    if (c.writer[word] && !machine->failed)
      wrong("%s shared address %u + %u, which thread %d of CTA %u,%u,%u wrote and did not fence",
            what, c.base, word * 4, c.writer[word] - 1, c.index.x, c.index.y, c.index.z);
  return p;
}

const void* read(u32 address, u32 bytes) {
  if (address % std::min(bytes, 16u)) fail("%u bytes read at address %u", bytes, address);
  return at(cta(), address, bytes);
}

void* write(u32 address, u32 bytes) {
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

}  // namespace emulator
