// Products of a warpgroup: asked for by all its threads, done in order at a time of their own.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace emulator {

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
  if (descriptor >> 62 != 1) wrong("an operand of unknown layout");
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

void run_products(Group& g) {
  Issued& x = g.queue.front();
  static float a[64 * 16], b[256 * 16], bt[16 * 256], d[256];
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

}  // namespace emulator
