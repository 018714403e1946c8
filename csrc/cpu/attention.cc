// The drivers: what is checked, how a problem is cut into tasks, and in which order partial results
// are added. The cut depends on the problem and the instruction set alone, never on the number of
// threads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../attention/sequence.h"
#include "kernels.h"

namespace flashjax::cpu {
namespace {

// Enough tasks to feed some cores; below it work is cut finer, at a price.
constexpr int64_t kTasks = 16;

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
int64_t size_of(DType type) { return type == DType::kF32 ? 4 : 2; }

class Scratch {
 public:
  // `count` pieces of `floats`, each on its own cache lines.
  Scratch(int64_t count, int64_t floats)
      : stride_(ceil_div(floats, 16) * 16 + 16),
        data_(static_cast<float*>(::operator new(count * stride_ * sizeof(float), kAlign))) {}
  float* operator[](int64_t i) const { return data_.get() + i * stride_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* x) const { ::operator delete(x, kAlign); }
  };
  int64_t stride_;
  std::unique_ptr<float, Free> data_;
};

// body(i, scratch) for i in [0, n), in roughly that order, with one piece of scratch for each
// thread.
template <class Body>
void for_each(Parallel& parallel, int64_t n, int64_t scratch_floats, const Body& body) {
  if (n <= 0) return;
  int64_t workers = std::max<int64_t>(1, std::min(n, parallel.threads()));
  Scratch scratch(workers, scratch_floats);
  std::atomic<int64_t> next{0};
  parallel.For(workers, [&](int64_t worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;)
      body(i, scratch[worker]);
  });
}

void fill_zero(Parallel& parallel, void* data, int64_t bytes) {
  constexpr int64_t kPiece = 1 << 20;
  for_each(parallel, ceil_div(bytes, kPiece), 0, [&](int64_t i, float*) {
    memset(static_cast<char*>(data) + i * kPiece, 0, std::min(kPiece, bytes - i * kPiece));
  });
}

// Whether every query (key) belongs to a sequence, so that every row of a result gets written.
bool covers_queries(const Problem& p) {
  return !p.cu_seqlens_q && !p.seqused_q && p.max_seqlen_q < 0;
}
bool covers_keys(const Problem& p) {
  return !p.cu_seqlens_k && !p.seqused_k && p.max_seqlen_k < 0 && !p.leftpad && !p.batch_idx &&
         !p.page_table;
}

// As many rows and keys as leave room in a second-level cache of 1 MiB: measured, see
// docs/kernels/cpu.md.
Blocks choose_blocks(const Problem& p, const Kernels& kernels, int64_t rows, int64_t keys,
                     int64_t row_bytes, int64_t rows_budget) {
  while (rows > kernels.panel && rows * row_bytes > rows_budget) rows /= 2;
  while (keys > 64 && keys * (p.d + p.e) * 4 > 192 * 1024) keys -= 64;
  return {rows, keys};
}

std::string at(const char* name, int64_t i, int64_t j, int64_t value) {
  std::string where = std::string("`") + name + "`[" + std::to_string(i);
  if (j >= 0) where += ", " + std::to_string(j);
  return where + "] is " + std::to_string(value);
}

std::string check_lengths(const Problem& p, const char* cu_name, const int32_t* cu,
                          const char* used_name, const int32_t* used, const char* longest_name,
                          int64_t longest, int64_t extent) {
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t i = 0; i < p.n; ++i) {
      int64_t len = extent;
      if (cu) {
        const int32_t* x = cu + b * (p.n + 1) + i;
        if (x[0] < 0) return at(cu_name, b, i, x[0]) + ", which is negative";
        if (x[1] < x[0])
          return at(cu_name, b, i + 1, x[1]) + ", less than the entry before it, " +
                 std::to_string(x[0]);
        if (x[1] > extent)
          return at(cu_name, b, i + 1, x[1]) + ", but there are only " + std::to_string(extent) +
                 " rows";
        len = x[1] - x[0];
      }
      if (used) {
        int64_t x = used[b * p.n + i];
        if ((x < 0 || x > len) && !cu)  // the KV cache; its lengths come with the new keys added
          return at("cache_seqlens", b, -1, x) + " with the new keys, outside [0, " +
                 std::to_string(len) + "]";
        if (x < 0 || x > len)
          return at(used_name, i, -1, x) + ", outside [0, " + std::to_string(len) + "]";
        len = x;
      }
      if (longest >= 0 && len > longest)
        return std::string("`") + longest_name + "` is " + std::to_string(longest) +
               ", but sequence " + std::to_string(i) + " has length " + std::to_string(len);
    }
  return {};
}

}  // namespace

std::string Check(const Problem& p) {
  if (!select_kernels())
    return std::string("FLASHJAX_CPU_SIMD=") + std::getenv("FLASHJAX_CPU_SIMD") +
           " is not among portable, avx2, avx512, avx512_bf16, or this CPU does not have it";
  std::string why = check_lengths(p, "cu_seqlens_q", p.cu_seqlens_q, "seqused_q", p.seqused_q,
                                  "max_seqlen_q", p.max_seqlen_q, p.s);
  if (why.empty())
    why = check_lengths(p, "cu_seqlens_k", p.cu_seqlens_k, "seqused_k", p.seqused_k, "max_seqlen_k",
                        p.max_seqlen_k, p.t);
  if (!why.empty()) return why;
  for (int64_t b = 0; b < p.b; ++b) {
    if (p.batch_idx && (p.batch_idx[b] < 0 || p.batch_idx[b] >= p.c))
      return at("cache_batch_idx", b, -1, p.batch_idx[b]) + ", outside [0, " + std::to_string(p.c) +
             ")";
    for (int64_t i = 0; i < p.n; ++i) {
      Problem unpadded = p;
      unpadded.leftpad = nullptr;
      int64_t len = sequence(unpadded, b, i).k_len;
      if (p.leftpad && (p.leftpad[b] < 0 || p.leftpad[b] > len))
        return at("cache_leftpad", b, -1, p.leftpad[b]) + ", outside [0, " + std::to_string(len) +
               "], the keys of the row";
      Sequence z = sequence(p, b, i);
      const Broadcast<5>& bias = p.bias_shape;
      if (p.bias && bias.dim[3] != 1 && z.q_len > bias.dim[3])
        return "row " + std::to_string(b) + " has a sequence of " + std::to_string(z.q_len) +
               " queries, `bias` only " + std::to_string(bias.dim[3]);
      if (p.bias && bias.dim[4] != 1 && z.k_len > bias.dim[4])
        return "row " + std::to_string(b) + " has a sequence of " + std::to_string(z.k_len) +
               " keys, `bias` only " + std::to_string(bias.dim[4]);
      if (!p.page_table || z.k_len == 0) continue;
      for (int64_t x = z.k_begin / p.page; x <= (z.k_begin + z.k_len - 1) / p.page; ++x) {
        int64_t id = p.page_table[b * p.p + x];
        if (id < 0 || id >= p.c)
          return at("page_table", b, x, id) + ", outside [0, " + std::to_string(p.c) + ")";
      }
    }
  }
  return {};
}

std::string Check(const BwdParams& p) {
  if (p.page_table) return "`page_table` has no backward on the CPU: gather the pages first";
  if (p.batch_idx) return "`batch_idx` has no backward on the CPU: gather the rows first";
  return Check(static_cast<const Problem&>(p));
}

const Kernels* select_kernels() {
  struct Level {
    const char* name;
    const Kernels* kernels;
    bool usable;
  };
  static const std::vector<Level> levels = [] {
    std::vector<Level> x;
    bool avx2 = false, avx512 = false, bf16 = false;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
    avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    x.push_back({"avx512_bf16", kernels_avx512_bf16(), bf16});
    // The table without bf16 instructions is compiled with leave to use them all the same.
    x.push_back({"avx512", kernels_avx512(), avx512});
    x.push_back({"avx2", kernels_avx2(), avx2});
    x.push_back({"portable", kernels_portable(), true});
    return x;
  }();
  const char* want = std::getenv("FLASHJAX_CPU_SIMD");
  for (const Level& x : levels)
    if (x.kernels && x.usable && (!want || !*want || !strcmp(want, x.name))) return x.kernels;
  return nullptr;
}

void Forward(const FwdParams& p, Parallel& parallel) {
  const Kernels* kernels = select_kernels();
  if (!kernels) return;
  if (!covers_queries(p)) {
    fill_zero(parallel, p.out, p.b * p.s * p.h * p.e * size_of(p.dtype));
    std::fill(p.lse, p.lse + p.b * p.h * p.s, -INFINITY);
  }
  if (p.b * p.s * p.h == 0 || p.g == 0) return;
  const int64_t group = p.h / p.g;

  // Tiles of rows; smaller ones, and then parts of the keys, where there would be too few.
  Blocks blocks = choose_blocks(p, *kernels, 256, 192, (p.d + p.e) * 4, 128 * 1024);
  auto count_tiles = [&](int64_t rows) {
    int64_t tiles = 0;
    for (int64_t b = 0; b < p.b; ++b)
      for (int64_t i = 0; i < p.n; ++i)
        tiles += ceil_div(sequence(p, b, i).q_len * group, rows) * p.g;
    return tiles;
  };
  while (blocks.rows > 64 && blocks.rows > kernels->panel && count_tiles(blocks.rows) < kTasks)
    blocks.rows /= 2;
  int64_t tiles = count_tiles(blocks.rows);
  // A part is worth its combining from so many keys on.
  const int64_t worthwhile = p.num_splits > 0 ? blocks.keys : 2 * blocks.keys;
  const int64_t wanted =
      p.num_splits > 0 ? p.num_splits : ceil_div(kTasks, std::max<int64_t>(1, tiles));

  // The tiles of one key head share its keys: packed once, if there are enough tiles. Units go in
  // waves, so that little is packed at a time: fresh memory costs more than the copy. How large the
  // waves are changes no result; the tiles of one keep the threads busy until its end.
  struct Unit {
    Task task;
    int64_t floats;
  };
  std::vector<Unit> units;
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t i = 0; i < p.n; ++i) {
      Sequence z = sequence(p, b, i);
      int64_t rows = z.q_len * group, count = z.k_len + z.k_len % 2;
      bool shared = rows > 2 * blocks.rows && count > 0;
      for (int64_t g = 0; rows > 0 && g < p.g; ++g)
        units.push_back({Task{b, i, g, 0, rows, 0, z.k_len, -1, nullptr, count},
                         shared ? kernels->packed_keys(p, count) : 0});
    }

  struct Wave {
    size_t first, last;
  };
  std::vector<Wave> waves;
  const int64_t wave_rows = 8 * parallel.threads() * blocks.rows;
  int64_t packed_floats = 0;
  for (size_t first = 0, last = 0; first < units.size(); first = last) {
    int64_t rows = 0, floats = 0;
    for (; last < units.size() && rows < wave_rows; ++last) {
      floats += units[last].floats;
      // Units without packed keys cost nothing to keep in the wave.
      if (units[last].floats) rows += units[last].task.m1;
    }
    waves.push_back({first, last});
    packed_floats = std::max(packed_floats, floats);
  }
  Scratch packed(1, packed_floats);

  constexpr int64_t kPiece = 512;
  struct Run {
    Task task;
    int64_t keys;
  };
  struct Split {
    Task task;
    int64_t first, count;  // partial results
  };
  const int64_t scratch_floats = kernels->forward_scratch(p, blocks);
  const int64_t partial_floats = (blocks.rows + kernels->lanes) * (p.e + 2);
  for (const Wave& wave : waves) {
    float* next = packed[0];
    std::vector<Task> pack;
    std::vector<Run> runs;
    std::vector<Split> splits;
    int64_t partials = 0;
    for (size_t u = wave.first; u < wave.last; ++u) {
      Task unit = units[u].task;
      Sequence z = sequence(p, unit.b, unit.i);
      if (units[u].floats) {
        unit.packed = next;
        next += units[u].floats;
        Range seen = visible_keys(p, z, 0, z.q_len);
        for (int64_t j = seen.begin - seen.begin % 2; j < seen.end; j += kPiece) {
          pack.push_back(unit);
          pack.back().j0 = j, pack.back().j1 = std::min(seen.end, j + kPiece);
        }
      }
      for (int64_t m = 0; m < unit.m1; m += blocks.rows) {
        Task task = unit;
        task.m0 = m, task.m1 = std::min(unit.m1, m + blocks.rows);
        Range seen = visible_keys(p, z, task.m0 / group, (task.m1 - 1) / group + 1);
        int64_t keys = seen.end - seen.begin;
        int64_t parts = std::min(wanted, ceil_div(keys, worthwhile));
        if (parts <= 1) {
          runs.push_back({task, keys});
          continue;
        }
        int64_t size = ceil_div(ceil_div(keys, parts), 64) * 64;
        splits.push_back({task, partials, 0});
        for (int64_t j = seen.begin; j < seen.end; j += size) {
          task.j0 = j, task.j1 = std::min(seen.end, j + size);
          task.part = partials++;
          ++splits.back().count;
          runs.push_back({task, task.j1 - j});
        }
      }
    }
    // The longest first, so that threads finish together.
    std::stable_sort(runs.begin(), runs.end(),
                     [](const Run& x, const Run& y) { return x.keys > y.keys; });
    Scratch partial(partials, partial_floats);
    for_each(parallel, pack.size(), 0, [&](int64_t i, float*) { kernels->pack_keys(p, pack[i]); });
    for_each(parallel, runs.size(), scratch_floats, [&](int64_t i, float* scratch) {
      const Task& task = runs[i].task;
      kernels->forward(p, blocks, task, task.part < 0 ? nullptr : partial[task.part], scratch);
    });
    for_each(parallel, splits.size(), scratch_floats, [&](int64_t i, float* scratch) {
      const Split& x = splits[i];
      kernels->combine(p, blocks, x.task, partial[x.first], x.count, partial[1] - partial[0],
                       scratch);
    });
  }
}

void Backward(const BwdParams& p, Parallel& parallel) {
  const Kernels* kernels = select_kernels();
  if (!kernels || p.page_table || p.batch_idx) return;
  const bool nothing = p.b * p.s * p.h == 0 || p.g == 0;
  if (!covers_queries(p)) fill_zero(parallel, p.dq, p.b * p.s * p.h * p.d * size_of(p.dtype));
  if (!covers_keys(p) || nothing) {
    fill_zero(parallel, p.dk, p.c * p.t * p.g * p.d * size_of(p.dtype));
    fill_zero(parallel, p.dv, p.c * p.t * p.g * p.e * size_of(p.dtype));
  }
  if (p.dbias) {
    int64_t n = 1;
    for (int64_t x : p.bias_shape.dim) n *= x;
    fill_zero(parallel, p.dbias, n * sizeof(float));
  }
  if (p.dsinks) std::fill(p.dsinks, p.dsinks + p.sinks_shape.dim[0] * p.sinks_shape.dim[1], 0.f);
  if (nothing) return;

  const int64_t group = p.h / p.g;
  Blocks blocks = choose_blocks(p, *kernels, 128, 128, (p.d + p.e) * 12, 400 * 1024);
  const int64_t stride_k = ceil_div(p.d, kernels->lanes) * kernels->lanes;
  const int64_t stride_v = ceil_div(p.e, kernels->lanes) * kernels->lanes;
  // What dsinks is the sum of, [b, h, s].
  std::vector<float> weights(p.dsinks ? p.b * p.h * p.s : 0);

  // Tasks that add to the same elements of dbias follow one another: in rounds, or (rows) within
  // one task.
  const Broadcast<5>& bias = p.bias_shape;
  auto shared = [&](int dim, int64_t extent) {
    return p.dbias && bias.dim[dim] == 1 && extent > 1;
  };
  const bool by_b = shared(0, p.b), by_i = shared(1, p.n), by_g = shared(2, p.g);
  const bool whole = shared(3, p.s);
  struct Unit {
    int64_t b, i, g;
    Sequence z;
    int64_t first, count;  // tasks
  };
  const int64_t rounds = (by_b ? p.b : 1) * (by_i ? p.n : 1) * (by_g ? p.g : 1);
  for (int64_t round = 0; round < rounds; ++round) {
    int64_t rest = round;
    auto range = [&](bool one, int64_t extent) {
      if (!one) return Range{0, extent};
      int64_t x = rest % extent;
      rest /= extent;
      return Range{x, x + 1};
    };
    Range gs = range(by_g, p.g), is = range(by_i, p.n), bs = range(by_b, p.b);
    std::vector<Unit> units;
    for (int64_t b = bs.begin; b < bs.end; ++b)
      for (int64_t i = is.begin; i < is.end; ++i)
        for (int64_t g = gs.begin; g < gs.end; ++g)
          units.push_back({b, i, g, sequence(p, b, i), 0, 0});
    // Too few units are cut into parts of their rows, each with its own sums over dk and dv.
    const int64_t parts = whole ? 1 : ceil_div(kTasks, units.size());
    std::vector<Task> tasks;
    std::vector<KeyGrads> grads;
    int64_t longest = 0, packed = 0;
    for (Unit& x : units) {
      int64_t rows = x.z.q_len * group;
      int64_t count = std::max<int64_t>(1, std::min(parts, rows / (2 * blocks.rows)));
      int64_t size = std::max<int64_t>(1, ceil_div(x.z.q_len, count));
      x.first = tasks.size();
      for (int64_t i = 0; i < std::max<int64_t>(1, x.z.q_len); i += size) {
        int64_t end = std::min(x.z.q_len, i + size);
        Range keys = end > i ? visible_keys(p, x.z, i, end) : Range{0, 0};
        keys.begin -= keys.begin % 2;
        int64_t count = keys.end - keys.begin;
        if ((end - i) * group <= 2 * blocks.rows) count = 0;
        tasks.push_back(
            {x.b, x.i, x.g, i * group, end * group, 0, x.z.k_len, -1, nullptr, count + count % 2});
        packed = std::max(packed, tasks.back().packed_count);
        grads.push_back({keys, nullptr, nullptr});
        longest = std::max(longest, keys.end - keys.begin);
      }
      x.count = tasks.size() - x.first;
    }
    const int64_t floats = std::max(kernels->backward_scratch(p, blocks, 0),
                                    kernels->backward_scratch(p, blocks, packed));
    const bool cut = tasks.size() > units.size();
    // The sums: with the scratch of a thread, or if they must wait for others, of each task.
    const int64_t sums = longest * (stride_k + stride_v);
    Scratch waiting(cut ? tasks.size() : 0, sums);
    for_each(parallel, tasks.size(), floats + (cut ? 0 : sums), [&](int64_t i, float* scratch) {
      KeyGrads& grad = grads[i];
      grad.dk = cut ? waiting[i] : scratch + floats;
      grad.dv = grad.dk + longest * stride_k;
      kernels->backward(p, blocks, tasks[i], grad, p.dsinks ? weights.data() : nullptr, scratch);
      if (!cut) kernels->store_keys(p, tasks[i], &grad, 1);
    });
    if (!cut) continue;
    constexpr int64_t kPiece = 256;
    const int64_t pieces = std::max<int64_t>(1, ceil_div(p.t, kPiece));
    for_each(parallel, units.size() * pieces, 0, [&](int64_t i, float*) {
      const Unit& x = units[i / pieces];
      int64_t j = i % pieces * kPiece;
      if (j >= x.z.k_len) return;
      Task task{x.b, x.i, x.g, 0, 0, j, std::min(x.z.k_len, j + kPiece), -1, nullptr, 0};
      kernels->store_keys(p, task, &grads[x.first], x.count);
    });
  }

  if (p.dsinks)
    for (int64_t b = 0; b < p.b; ++b)
      for (int64_t h = 0; h < p.h; ++h) {
        double sum = 0;
        for (int64_t i = 0; i < p.s; ++i) sum += weights[(b * p.h + h) * p.s + i];
        p.dsinks[b * p.sinks_shape.stride[0] + h * p.sinks_shape.stride[1]] +=
            static_cast<float>(sum);
      }
}

}  // namespace flashjax::cpu
