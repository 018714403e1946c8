#include "select.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

namespace flashjax {
namespace {

constexpr const char* kFeatureNames[] = {"a window or causal mask",
                                         "softcap",
                                         "bias",
                                         "alibi_slopes",
                                         "sinks",
                                         "segment ids",
                                         "cu_seqlens",
                                         "seqused or leftpad",
                                         "batch_idx",
                                         "page_table",
                                         "deterministic",
                                         "a shift of the diagonal",
                                         "a scale that is not positive",
                                         "dropout",
                                         "head dims of k and v that differ",
                                         "alibi_slopes off the corner",
                                         "page_table with left padding or odd pages",
                                         "more than 64 queries"};
static_assert(1u << (sizeof(kFeatureNames) / sizeof(*kFeatureNames)) == kFeatureEnd);

// The rows that this build holds, and the archs of each: FLASHJAX_BUILT_KERNELS is
// " id:arch,arch, id:arch, ..."; undefined where nothing is left out.
const char* built_for(const char* id) {
#ifdef FLASHJAX_BUILT_KERNELS
  const std::string entry = std::string(" ") + id + ":";
  const char* found = std::strstr(FLASHJAX_BUILT_KERNELS, entry.c_str());
  return found ? found + entry.size() : nullptr;
#else
  return id ? "0+," : nullptr;
#endif
}

// Machine code runs on later capabilities of its major number, PTX (a plus) on all later ones; but
// code for 8.0 may count on more shared memory than 8.6 and 8.9 have.
bool runs_on(const char* built, int arch) {
  for (; std::isdigit(static_cast<unsigned char>(*built)); ++built) {
    char* end;
    const long x = std::strtol(built, &end, 10);
    built = end;
    const bool ptx = *built == '+';
    built += ptx;
    if (x == arch || (x < arch && (ptx || (x / 10 == arch / 10 && x != 80)))) return true;
  }
  return false;
}

template <typename... Names>
bool is_one_of(const char* x, Names... names) {
  return ((std::strcmp(x, names) == 0) || ...);
}

enum RowIndex {
#define KERNEL(id, ...) kRow_##id,
#include "kernels.def"
#undef KERNEL
};

std::string sm(int arch) { return "sm_" + std::to_string(arch); }

std::string describe(const Facts& f, int arch) {
  std::string x = std::string(name_of(f.direction)) + " in " + name_of(f.dtype) +
                  " with d = " + std::to_string(f.d) + ", e = " + std::to_string(f.e);
  if (f.features) x += ", " + feature_names(f.features);
  return arch ? x + " on " + sm(arch) : x;
}

// What keeps a kernel from serving: how far off it is, and in words.
struct Gap {
  int weight = 0;
  std::string words;
  void add(int w, const std::string& x) {
    weight += w;
    words += (words.empty() ? "" : "; ") + x;
  }
};

Gap gap(const Kernel& k, const Facts& f, int arch) {
  Gap g;
  if (k.dtype != f.dtype) g.add(8, std::string("takes ") + name_of(k.dtype));
  if (f.d < 1 || f.d > k.d || f.e < 1 || f.e > k.e || f.d % k.unit || f.e % k.unit)
    g.add(4, "takes head dims up to d = " + std::to_string(k.d) + ", e = " + std::to_string(k.e) +
                 (k.unit > 1 ? ", multiples of " + std::to_string(k.unit) : ""));
  if (uint32_t missing = f.features & ~k.features)
    g.add(2, "does not take " + feature_names(missing));
  if (k.few && f.queries > k.m)
    g.add(4, "takes up to " + std::to_string(k.m) + " queries of a key head");
  if (arch && (arch < k.arch_min || arch > k.arch_max))
    g.add(2, "runs on " + sm(k.arch_min) + (k.arch_max == k.arch_min ? "" : " and later"));
  if (k.shared != f.shared)
    g.add(4, k.shared ? "takes values that are columns of the keys" : "takes values of their own");
  if (k.paged && !f.paged) g.add(4, "takes many queries against pages of multiples of 16 keys");
  if (f.upstream && std::strcmp(k.family, "upstream") != 0) g.add(16, "is not FlashAttention-2's");
  if (!k.built || (arch && arch >= k.arch_min && arch <= k.arch_max && !runs_on(k.built, arch)))
    g.add(1,
          "is not in this build: add it to FLASHJAX_KERNELS, or its arch to FLASHJAX_CUDA_ARCHS");
  return g;
}

}  // namespace

const char* name_of(Direction direction) {
  return direction == Direction::Forward ? "forward" : "backward";
}

const char* name_of(DType dtype) {
  return dtype == DType::kF32 ? "float32" : dtype == DType::kBF16 ? "bfloat16" : "float16";
}

std::string feature_names(uint32_t features) {
  std::string names;
  for (int i = 0; (1u << i) < kFeatureEnd; ++i)
    if (features >> i & 1) names += (names.empty() ? "" : ", ") + std::string(kFeatureNames[i]);
  return names;
}

KernelTable kernels() {
  static const Kernel table[] = {
#define KERNEL(id, direction, family, arch_min, arch_max, dtype, d, e, unit, m, n, features, \
               variant, ci)                                                                  \
  {#id,                                                                                      \
   Direction::direction,                                                                     \
   #family,                                                                                  \
   arch_min,                                                                                 \
   arch_max,                                                                                 \
   DType::k##dtype,                                                                          \
   d,                                                                                        \
   e,                                                                                        \
   unit,                                                                                     \
   m,                                                                                        \
   n,                                                                                        \
   features,                                                                                 \
   #variant,                                                                                 \
   is_one_of(#variant, "kDecode", "kLatent"),                                                \
   is_one_of(#variant, "kLatent"),                                                           \
   is_one_of(#variant, "kPaged", "kPagedScores"),                                            \
   ci != 0,                                                                                  \
   built_for(#id),                                                                           \
   kRow_##id},
#include "kernels.def"
#undef KERNEL
  };
  return {table, table + sizeof(table) / sizeof(*table)};
}

Facts facts_of(Direction direction, const Problem& p) {
  Facts f{direction, p.dtype, p.d, p.e, 0};
  f.upstream = p.upstream, f.shared = p.shared_e > 0;
  auto add = [&](bool on, Feature x) { f.features |= on ? x : 0u; };
  add(p.window_left >= 0 || p.window_right >= 0, kWindow);
  add(p.softcap != 0, kSoftcap);
  add(p.bias, kBias);
  add(p.alibi_slopes, kAlibi);
  add(p.sinks, kSinks);
  add(p.segment_ids_q, kSegments);
  add(p.cu_seqlens_q || p.cu_seqlens_k, kPacked);
  const bool used = p.seqused_q || p.seqused_k || p.leftpad;
  add(used || p.max_seqlen_q >= 0 || p.max_seqlen_k >= 0, kSeqused);
  add(p.batch_idx, kBatchIdx);
  add(p.page_table, kPaged);
  add(p.shift, kShift);
  add(!(p.scale > 0), kScale);
  add(p.dropout_seed, kDropout);
  add(p.e != p.d, kUnequalDims);
  const bool corner = !p.top_left || (p.s == p.t && !used && !p.cu_seqlens_q && !p.cu_seqlens_k);
  add(p.alibi_slopes && (p.shift || !corner), kAlibiMoved);
  const int64_t unit = p.d <= 32 || (p.d > 64 && p.d <= 96) ? 32 : 16;
  add(p.page_table && (p.leftpad || p.page % unit), kOddPages);
  add(!p.page_table && p.s > 64, kManyQueries);
  add(p.deterministic && direction == Direction::Backward, kDeterministic);
  // Tiles of 128 queries that keep a Hopper GPU busy, and boxes of at least 16 keys.
  const bool many = p.s > 64 && p.b * p.h * ((p.s + 127) / 128) >= 96;
  f.paged = p.page_table && many && !p.leftpad && p.page % 16 == 0;
  if (p.g > 0 && p.s <= 64 && p.t >= 4 * p.s)
    f.queries = p.s * (p.h / p.g);
  else if (p.page_table)
    f.queries = 0;
  return f;
}

const Kernel* select(const Facts& facts, int arch, std::string* why) {
  const Kernel* nearest = nullptr;
  Gap least;
  for (const Kernel& k : kernels()) {
    if (k.direction != facts.direction) continue;
    Gap g = gap(k, facts, arch);
    if (g.weight == 0) return &k;
    if (!nearest || g.weight < least.weight) nearest = &k, least = g;
  }
  if (why) {
    *why = "no CUDA kernel serves " + describe(facts, arch);
    if (nearest) *why += std::string("; the nearest, ") + nearest->id + ", " + least.words;
  }
  return nullptr;
}

}  // namespace flashjax
