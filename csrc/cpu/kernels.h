// What an instruction set provides to the drivers in attention.cc: functions on one task each, and
// their scratch needs. Only plain pointers cross this line. The files behind it are compiled once
// per instruction set, so they define nothing that the linker could share between them (no inline
// functions with linkage, no standard library templates).
#pragma once
#include <cstdint>

#include "../attention/dropout.h"
#include "../attention/params.h"
#include "../attention/sequence.h"

namespace flashjax::cpu {

// Rows of a task are (position, head) pairs, the heads of one key head innermost: row m of sequence
// i of batch row b is query m / (h / g) of head g * (h / g) + m % (h / g).
struct Task {
  int64_t b, i, g;  // batch row, sequence in it, key head
  int64_t m0, m1;   // rows
  int64_t j0, j1;   // keys
  int64_t part;     // forward: number of the partial result; -1: the task has all keys
  // Forward: the keys of the sequence, packed, with room for packed_count; null: the task packs
  // them block by block. Backward: packed_count keys are packed in the scratch; 0: block by block.
  float* packed;
  int64_t packed_count;
};

// The keys are walked in blocks of `keys`, against `rows` rows at a time.
struct Blocks {
  int64_t rows;  // a multiple of Kernels::panel
  int64_t keys;  // even
};

// Gradients of one key head over a range of keys, float32, rows of dk_stride and dv_stride floats.
struct KeyGrads {
  Range keys;
  float* dk;
  float* dv;
};

struct Kernels {
  const char* name;
  int64_t panel;  // rows that go through the micro-kernels side by side
  int64_t lanes;  // dk_stride is d rounded up to lanes, dv_stride e rounded up to lanes

  // Floats for `count` (even) packed keys, and packing of the task's, from an even one on.
  int64_t (*packed_keys)(const FwdParams&, int64_t count);
  void (*pack_keys)(const FwdParams&, const Task&);

  // Scratch is counted in floats and starts on a cache line. A partial result of forward is (e + 2)
  // * rows floats.
  int64_t (*forward_scratch)(const FwdParams&, const Blocks&);
  // With `partial`, the unnormalized result of the task's keys goes there; without, out and lse are
  // written.
  void (*forward)(const FwdParams&, const Blocks&, const Task&, float* partial, float* scratch);
  // Writes out and lse of the task's rows from `count` partial results, `stride` floats apart.
  void (*combine)(const FwdParams&, const Blocks&, const Task&, const float* partial, int64_t count,
                  int64_t stride, float* scratch);

  // Room for `count` (even) packed keys included.
  int64_t (*backward_scratch)(const BwdParams&, const Blocks&, int64_t count);
  // Writes dq of the rows, adds to dbias, sets sums (which cover all keys that the rows see, and
  // need no initialization), and with `weights` [b, h, s] leaves there what dsinks is the sum of.
  void (*backward)(const BwdParams&, const Blocks&, const Task&, const KeyGrads& sums,
                   float* weights, float* scratch);
  // Writes dk and dv of the task's keys: the sum of `count` parts in their order.
  void (*store_keys)(const BwdParams&, const Task&, const KeyGrads* parts, int64_t count);

  // For the tests.
  void (*exp2)(const float* x, float* y, int64_t n);
  void (*tanh)(const float* x, float* y, int64_t n);
  // c [m, n] (+)= a b, with a [m, k], or [k, m] if `transposed`; n is a multiple of lanes. `bf16`:
  // a and b hold pairs of bfloat16 along k, if the instruction set has them.
  void (*gemm)(bool bf16, bool transposed, bool add, int64_t m, int64_t n, int64_t k,
               const float* a, const float* b, float* c);
  bool has_bf16;
};

// Null where the compiler or the architecture lacks the instruction set.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

// The best for this CPU, or the one that FLASHJAX_CPU_SIMD asks for; null if there is none such.
const Kernels* select_kernels();

}  // namespace flashjax::cpu
