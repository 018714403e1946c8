// One call of the operation, as every kernel receives it: sizes, scalars, and pointers with their
// shapes. Plain C++17: no CUDA, XLA or Python header. Arrays are dense and row-major; an absent one
// is null.
#pragma once
#include <cstdint>

namespace flashjax {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

// An array that may be broadcast: extent of each dimension, and stride in elements (0 where the
// extent is 1).
template <int kRank>
struct Broadcast {
  int64_t dim[kRank] = {};
  int64_t stride[kRank] = {};
};

struct Problem {
  int64_t b = 0, s = 0, h = 0, g = 0, d = 0,
          e = 0;     // h % g == 0; query head i reads key head i / (h / g)
  int64_t t = 0;     // keys that one row can hold: rows of k[c], or p * page when paged
  int64_t n = 1;     // sequences packed into one row
  int64_t c = 0;     // leading extent of k and v
  int64_t p = 0;     // pages per sequence; 0: not paged
  int64_t page = 0;  // rows of one page; 0: not paged

  DType dtype = DType::kF32;       // q k v out dout dq dk dv
  DType bias_dtype = DType::kF32;  // dtype or f32

// Filled from the call, all of them; what each means is said in attrs.def. -1 is "no bound" where
// that is meant, so a Problem made by hand sets window_* and max_seqlen_* itself.
#define ATTR(name, type) type name = {};
#include "attrs.def"
#undef ATTR

  const void* q = nullptr;     // [b, s, h, d]
  const void* k = nullptr;     // [c, t, g, d]; paged [c, page, g, d]
  const void* v = nullptr;     // [c, t, g, e]; paged [c, page, g, e]
  const void* bias = nullptr;  // [b?, n?, h?, s?, t?], indexed by positions within a sequence
  Broadcast<5> bias_shape;
  const float* alibi_slopes = nullptr;  // [b?, h]
  Broadcast<2> alibi_shape;
  const float* sinks = nullptr;  // [b?, h]
  Broadcast<2> sinks_shape;
  const int32_t* segment_ids_q = nullptr;  // [b, s]
  const int32_t* segment_ids_k = nullptr;  // [b, t]
  const int32_t* cu_seqlens_q = nullptr;   // [b, n + 1], never decreasing, in [0, s]
  const int32_t* cu_seqlens_k = nullptr;   // [b, n + 1], never decreasing, in [0, t]
  const int32_t* seqused_q = nullptr;      // [b, n]: valid queries of each sequence
  const int32_t* seqused_k = nullptr;  // [b, n]: valid keys of each sequence, left padding included
  const int32_t* leftpad = nullptr;    // [b]: keys to skip at the front
  const int32_t* batch_idx = nullptr;  // [b]: the entry of k and v that a row reads
  const int32_t* page_table = nullptr;    // [b, p]: the pages of a row, in order
  const int32_t* shift = nullptr;         // [b]: keys by which the diagonal moves towards the end
  const int32_t* dropout_seed = nullptr;  // [b, h, 2]: the key of Philox, low word first
};

struct FwdParams : Problem {
  void* out = nullptr;   // [b, s, h, e]
  float* lse = nullptr;  // [b, h, s], natural logarithm; -inf: the row saw nothing
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

struct BwdParams : Problem {
  const void* out = nullptr;    // [b, s, h, e]
  const float* lse = nullptr;   // [b, h, s]
  const void* dout = nullptr;   // [b, s, h, e]
  const float* dlse = nullptr;  // [b, h, s]; null: 0
  void* dq = nullptr;           // [b, s, h, d]
  void* dk = nullptr;           // [c, t, g, d]
  void* dv = nullptr;           // [c, t, g, e]
  float* dbias = nullptr;       // shaped like bias, or not asked for
  void* dbias16 = nullptr;      // instead of it, in the bias's dtype of 16 bits; on CUDA only
  float* dsinks = nullptr;      // shaped like sinks, or not asked for
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

}  // namespace flashjax
