// Copies between shared and global memory, which happen at a time of their own.
#include <cstring>

#include "state.h"

namespace emulator {

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

}  // namespace emulator
