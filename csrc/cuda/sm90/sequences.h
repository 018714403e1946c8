// Host side of sequences.cu: the tiles of a call whose rows hold sequences, planned on the device
// before the kernel that works on them.
#pragma once
#include "../../attention/params.h"
#include "../launch.h"
#include "problem.cuh"

namespace flashjax::sm90 {

// What to plan: the tiles of `size` queries (else keys), and their order. Spans come in chunks of
// `chunk` rows of the other operand; within a chunk those with most of it go first, or last. Or
// they come as they lie, from the front or from the back.
enum class Order { kMostFirst, kMostLast, kForwards, kBackwards };
struct PlanShape {
  bool by_query;
  int size;
  int64_t chunk;
  Order order = Order::kMostFirst;
  int padding = 0;         // backward: rows to which each sequence of queries is padded
  int* changes = nullptr;  // backward, of tiles of keys: as in BackwardArgs
  int64_t rows = 0;        // likewise
};

// Where the tiles lie, in the workspace.
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
  return 256 + plan_tiles(p, x) * 64 + (p.b * (p.n + 1) + 3) / 4 * 64;
}

// Enqueues what writes the plan of each of one or two shapes, one after the other in `workspace`,
// plan_bytes() each, aligned to 64. Segment ids narrow what tiles of the first meet.
cudaError_t plan_sequences(const flashjax::Problem& p, const PlanShape* shapes, int count,
                           void* workspace, Plan* plans, cudaStream_t stream);

}  // namespace flashjax::sm90
