// A model of a GPU in which the CUDA kernels run on a CPU. Every thread of a kernel is a fibre; all
// run on one thread of the host, one at a time, and change over where they wait. What a kernel
// leaves to the hardware - copies, matrix products - happens at some time of its own, in any order
// that the instructions allow. Which fibre or copy is next is drawn at random, so that each seed is
// another order. What the hardware would not catch is an error here: see docs/emulator.md.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

using u32 = uint32_t;
using u64 = uint64_t;

// The device, as the environment says: FLASHJAX_EMULATED_SMS, 4 if it does not.
int multiprocessors();
constexpr int kSharedBytes = 227 * 1024;  // that a block may have

// Runs a kernel to its end. False: something was wrong, and has been said.
bool launch(dim3 grid, int threads, int shared_bytes, int cluster, std::function<void()> kernel);

// ---- for kernels: what the current thread is
int cluster_rank();
unsigned char* shared_memory();

// Ends the launch with a message; does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Lets others run, as one that asks again and again must.
void yield();

// ---- shared memory, by address, as ordinary instructions have it
u32 address_of(const void* p);
const void* read(u32 address, u32 bytes);
void* write(u32 address, u32 bytes);
void fence_async();  // what this thread wrote may be read by copies and products

// ---- lanes of a warp that meet: `work` runs once, with what each of them brings
void meet(u32 mask, const char* what, void* mine, const std::function<void(void* const*)>& work);
template <typename T, typename Work>
void together(u32 mask, const char* what, T& mine, Work work) {
  meet(mask, what, &mine, [&](void* const* all) { work(reinterpret_cast<T* const*>(all)); });
}
int lane();

// ---- barriers
void barrier_init(u32 address, u32 count);
void barrier_expect(u32 address, u32 bytes);  // and arrive
void barrier_arrive(u32 address, int rank);   // rank: of the cluster; -1: this CTA
void barrier_wait(u32 address, u32 parity);
void named_barrier(int id, int threads, bool wait);
int block_barrier(int vote);  // of all threads that have not left; the OR of their votes
void cluster_barrier();

// ---- copies
struct Box {  // of a tensor map, and where
  char* base;
  int64_t extent[4], stride[4];  // stride in bytes
  int box[4], at[4];
  int element;  // bytes
  enum Type { kBF16, kF16, kF32 } type;
};
void load_box(u32 to, const Box& box, u32 barrier,
              u32 ctas);  // ctas: a bit for each of the cluster
void store_box(u32 from, const Box& box, bool add);
void load_bytes(u32 to, const void* from, u32 bytes, u32 barrier);
void store_bytes(void* to, u32 from, u32 bytes, bool add_floats);
void commit_copies();
void wait_copies(int left, bool only_read);
void copy_line(u32 to, const void* from);  // 16 bytes: cp.async
void wait_lines();

// ---- products of a warpgroup
struct Product {
  int n;
  bool f16, a_in_registers, a_transposed, b_transposed, add;
  u64 a, b;  // descriptors
};
void multiply(const Product& product, float* d, const u32* a_registers);
void commit_products();
void wait_products(int left);

// ---- numbers
float from_half(uint16_t x);
uint16_t to_half(float x);
inline float from_bf16(uint16_t x) {
  union {
    u32 i;
    float f;
  } y{u32{x} << 16};
  return y.f;
}
uint16_t to_bf16(float x);

}  // namespace emulator
