// Which kernel serves a call: the only dispatcher. Plain C++17, so that it can be tested, and
// asked, without a GPU.
#pragma once
#include <cstdint>
#include <string>

#include "params.h"

namespace flashjax {

enum class Direction { Forward, Backward };

// The options of a call that a kernel may lack. A bit each; names as the caller knows them are in
// select.cc.
enum Feature : uint32_t {
  kWindow = 1u << 0,  // causal is one
  kSoftcap = 1u << 1,
  kBias = 1u << 2,
  kAlibi = 1u << 3,
  kSinks = 1u << 4,
  kSegments = 1u << 5,
  kPacked = 1u << 6,   // cu_seqlens
  kSeqused = 1u << 7,  // and left padding
  kBatchIdx = 1u << 8,
  kPaged = 1u << 9,
  kDeterministic = 1u << 10,
  kShift = 1u << 11,
  kScale = 1u << 12,  // not positive: a maximum of scores is then not one of dot products
  kDropout = 1u << 13,
  kUnequalDims = 1u << 14,  // e other than d
  kAlibiMoved = 1u << 15,   // alibi, and a diagonal that does not end at the last key
  kOddPages = 1u << 16,     // page_table with left padding, or with pages of odd sizes
  kManyQueries = 1u << 17,  // more than 64 in a row, and keys not in pages
  kFeatureEnd = 1u << 18,
};
inline constexpr uint32_t kEverything = kFeatureEnd - 1;
inline constexpr uint32_t kInPlace =
    kEverything & ~(kBatchIdx | kPaged);  // keys where the row says

inline constexpr uint32_t kAllKeys = kSinks | kUnequalDims | kManyQueries;  // every key is seen
inline constexpr uint32_t kDense = kAllKeys | kWindow | kDeterministic;     // rows of equal length
inline constexpr uint32_t kInRows =
    kDense | kSegments | kPacked | kSeqused | kShift;  // sequences of any length
inline constexpr uint32_t kInRowsScores =
    kInRows | kSoftcap | kBias | kAlibi | kAlibiMoved | kScale;
inline constexpr uint32_t kCached = kWindow | kSoftcap | kAlibi | kSinks | kSeqused | kBatchIdx |
                                    kPaged | kOddPages | kShift | kScale | kAlibiMoved |
                                    kUnequalDims;  // one sequence a row
inline constexpr uint32_t kInPages =
    kDense | kSeqused | kShift | kPaged | kOddPages;  // many queries of each
inline constexpr uint32_t kInPagesScores = kInPages | kSoftcap | kAlibi | kAlibiMoved | kScale;

// FlashAttention-2's: any lengths, by lists of sequences; few queries, or keys in pages; gradients.
inline constexpr uint32_t kUpstreamSplit =
    kWindow | kSoftcap | kAlibi | kSinks | kSeqused | kShift | kBatchIdx | kPaged;
inline constexpr uint32_t kUpstreamWide = kWindow | kSoftcap | kAlibi | kSinks | kSeqused | kShift |
                                          kPacked | kDeterministic | kManyQueries;
inline constexpr uint32_t kUpstream = kUpstreamWide | kDropout;
inline constexpr uint32_t kUpstreamForward = kUpstream | kBatchIdx;

struct Kernel {
  const char* id;
  Direction direction;
  const char* family;
  int arch_min, arch_max;  // compute capability: 90 is 9.0
  DType dtype;
  int d, e;  // the largest served
  int unit;  // of which both are multiples
  int m, n;  // tile
  uint32_t features;
  const char* variant;
  bool few;     // m is the most queries of a key head that it serves, all heads of a group together
  bool shared;  // it serves calls whose values are columns of the keys, and no others
  bool paged;   // it serves many queries against keys in pages, and no others
  bool ci;
  const char* built;  // the archs that this build holds it for: "80,86,", "75+,"; null: none
  int index;          // its place in the table
};

// What of a call decides the kernel.
struct Facts {
  Direction direction;
  DType dtype;
  int64_t d, e;
  uint32_t features;
  // Of a key head, where they are few against many keys: then reading the keys takes the time.
  // 0: whatever they are, for what reads keys in pages well is made for few queries.
  int64_t queries = kMany;
  static constexpr int64_t kMany = INT64_MAX;
  bool upstream = false;  // asked for by name
  bool shared = false;    // the values are columns of the keys
  bool paged = false;     // many queries against keys in pages that tiles can be made of
};

struct KernelTable {
  const Kernel* begin_;
  const Kernel* end_;
  const Kernel* begin() const { return begin_; }
  const Kernel* end() const { return end_; }
};
KernelTable kernels();

Facts facts_of(Direction direction, const Problem& p);

// The first built kernel that serves the facts on an arch (0: on any). Otherwise null, and `why`
// says what was required, which kernel comes nearest, and what would help.
const Kernel* select(const Facts& facts, int arch, std::string* why);

const char* name_of(Direction direction);
const char* name_of(DType dtype);
std::string feature_names(uint32_t features);

}  // namespace flashjax
