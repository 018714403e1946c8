// Host side of sequences.cu: the tiles of a call whose rows hold sequences, planned on the device
// before the kernel that works on them.
#pragma once
#include "../../attention/params.h"
#include "../launch.h"
#include "problem.cuh"

namespace flashjax::sm90 {

// What to plan: the tiles of `size` queries (else keys), and their order. Spans come in chunks of
// `chunk` rows of the other operand; within a chunk those with most of it go first.
struct PlanShape {
  bool by_query;
  int size;
  int64_t chunk;
  int padding;  // rows to which each sequence of queries is padded where that is done
};

// Where a plan lies, in the workspace.
struct Plan {
  Span* spans;
  int* count;   // of them
  int* ticket;  // 0 when the kernel starts
};

// More tiles there cannot be: the sequences and the gaps between them share their rows.
inline int64_t plan_tiles(const flashjax::Problem& p, const PlanShape& x) {
  return p.b * ((x.by_query ? p.s : p.t) / x.size + 2 * p.n + 1);
}

inline int64_t plan_bytes(const flashjax::Problem& p, const PlanShape& x) {
  return 256 + plan_tiles(p, x) * 64 + 16 * p.b * (p.n + 1);
}

// Enqueues what writes the plan to `workspace`, of plan_bytes(), aligned to 64.
cudaError_t plan_sequences(const flashjax::Problem& p, const PlanShape& x, void* workspace,
                           Plan& plan, cudaStream_t stream);

}  // namespace flashjax::sm90
