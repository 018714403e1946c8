// Plans the tiles of sequences: where each lies, what it meets, and in which order they are worked
// on. Rows of no sequence get tiles too, which are to be filled.
#include "../../attention/sequence.h"
#include "host.h"
#include "sequences.h"

namespace flashjax::sm90 {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = kThreads;  // of the order: chunks x classes
constexpr int kNear = 2048;      // runs that fit in shared memory

// Rows of one sequence, or of none: the number of the first tile, and the first row.
struct Run {
  int tile, row;
};

// One shape of tiles.
struct List {
  bool by_query;
  Order order;
  int size, padding, rows;  // rows: of the tiles' own operand
  int *changes, changes_of_row;
  int chunk, classes;
  float class_of_row;  // classes for a row that is met
  Span* spans;
  int *count, *ticket;
  Run* runs;  // [b, n + 1, 2]: before a sequence, and its own
};

struct PlanArgs {
  flashjax::Problem p;
  Problem own;  // as the kernels have it
  List list[2];
};

// Inclusive over a block; `shared` holds a value a warp, and then theirs. Gives the total too.
template <typename Op>
__device__ int scan(int x, int* shared, int& total, Op op) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int i = 1; i < 32; i *= 2) {
    const int y = __shfl_up_sync(~0u, x, i);
    if (lane >= i) x = op(x, y);
  }
  __syncthreads();  // of an earlier scan
  if (lane == 31) shared[warp] = x;
  __syncthreads();
  if (warp == 0) {
    int y = shared[lane];
    for (int i = 1; i < 32; i *= 2) {
      const int z = __shfl_up_sync(~0u, y, i);
      if (lane >= i) y = op(y, z);
    }
    shared[lane] = y;
  }
  __syncthreads();
  total = shared[31];
  return warp ? op(x, shared[warp - 1]) : x;
}

// Sequence i of a row of the batch; after the last, one without rows at the end.
__device__ Sequence slot(const flashjax::Problem& p, int b, int i) {
  return i < p.n ? sequence(p, b, i) : Sequence{p.s, 0, p.t, 0, 0};
}

// Visits to tiles of queries by a tile of keys, for the statistics to sum up. Nobody reads what
// lies past a sequence's last tile, which may be the next one's.
__device__ void count_visits(const PlanArgs& all, const List& a, const Span& x) {
  const int size = a.padding;
  const Blocks y = query_blocks(all.own, size, true, x.diagonal, x.first,
                                min(x.first + a.size, x.k_len), x.begin, x.end, x.q_len);
  int* to = a.changes + x.b * a.changes_of_row + x.padded / size;
  if (y.begin == y.end) return;
  atomicAdd(to + y.begin, 1);
  if (y.end * size < x.q_len) atomicAdd(to + y.end, -1);
}

// Tile x of all, unordered; returns its bin in the order. The last run that begins at x or before
// holds it, for those without tiles begin where the next one does.
__device__ int make_span(const flashjax::Problem& p, const List& a, const Run* runs, int x,
                         bool falls, Span& span) {
  const int slots = static_cast<int>(p.n) + 1;
  int lo = 0, hi = 2 * static_cast<int>(p.b) * slots;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (runs[mid].tile <= x)
      lo = mid;
    else
      hi = mid;
  }
  const Run run = runs[lo];
  const int b = lo / 2 / slots, i = lo / 2 % slots, row = run.row + (x - run.tile) * a.size;
  Sequence z = slot(p, b, i);
  const bool gap = lo % 2 == 0;
  if (gap)  // as a sequence that meets nothing
    z = a.by_query ? Sequence{run.row, z.q_begin - run.row, 0, 0, 0}
                   : Sequence{0, 0, run.row, z.k_begin - run.row, 0};
  const int64_t entry = p.batch_idx ? flashjax::clamp(p.batch_idx[b], 0, p.c - 1) : b;
  span.b = b, span.n = gap ? -1 : i;
  span.first = row - static_cast<int>(a.by_query ? z.q_begin : z.k_begin);
  span.q_len = static_cast<int>(z.q_len), span.k_len = static_cast<int>(z.k_len);
  span.q_end = static_cast<int>(b * p.s + z.q_begin + z.q_len);
  span.k_end = static_cast<int>((p.page_table ? b : entry) * p.t + z.k_begin + z.k_len);
  span.k_begin = static_cast<int>(z.k_begin);
  span.diagonal = static_cast<int>(flashjax::clamp(z.diagonal, -(1 << 29), 1 << 29));
  span.begin = 0, span.end = a.by_query ? span.k_len : falls ? 0 : span.q_len;
  span.compare = p.segment_ids_q && !gap;
  span.padded = a.padding ? static_cast<int>(z.q_begin / a.padding + i) * a.padding : 0;
  span.clean = p.segment_ids_q || (p.window_right >= 0 && z.diagonal + p.window_right < 0) ||
               (p.window_left >= 0 && z.q_len - 1 + z.diagonal - p.window_left >= z.k_len);
  if (a.padding % 64 && !gap) {  // the sequence's last tile is full, and its first begins before it
    const int64_t q_end = z.q_begin + z.q_len, beyond = (a.by_query ? q_end - run.row : z.q_len);
    const int lead = static_cast<int>((a.padding - beyond % a.padding) % a.padding);
    if (a.by_query)
      span.first -= lead, span.padded += lead;
    else
      span.q_len += lead, span.diagonal -= lead, span.begin = lead, span.end += falls ? 0 : lead;
  }
  span.head = 0, span.rank = 0;
  const int64_t last = imin(span.first + a.size, a.by_query ? z.q_len : z.k_len);
  const Range met =
      a.by_query ? visible_keys(p, z, span.first, last) : visible_queries(p, z, span.first, last);
  const int at =
      a.by_query ? static_cast<int>(b * p.t + z.k_begin) : static_cast<int>(b * p.s + z.q_begin);
  const int part = min(static_cast<int>(static_cast<float>(met.end - met.begin) * a.class_of_row),
                       a.classes - 1);
  return min(at / a.chunk * a.classes + (a.order == Order::kMostLast ? part : a.classes - 1 - part),
             kBins - 1);
}

// A block a list.
__global__ void __launch_bounds__(kThreads) plan(const __grid_constant__ PlanArgs all) {
  __shared__ int shared[32], bins[kBins];
  __shared__ Run near[kNear];
  const flashjax::Problem& p = all.p;
  const List& a = all.list[blockIdx.x];
  const int slots = static_cast<int>(p.n) + 1, count = static_cast<int>(p.b) * slots;
  Run* runs = 2 * count <= kNear ? near : a.runs;
  pdl_wait();
  pdl_launch();
  auto most = [](int x, int y) { return max(x, y); };
  auto sum = [](int x, int y) { return x + y; };
  auto up = [&](int x) { return (x + a.size - 1) / a.size; };
  // Queries whose offsets fall belong to several sequences, but their gradients have one place:
  // then no keys meet any.
  int falling = 0;
  if (a.changes && p.cu_seqlens_q)
    for (int x = threadIdx.x; x < count; x += kThreads)
      falling |= x % slots < p.n && p.cu_seqlens_q[x] > p.cu_seqlens_q[x + 1];
  const bool falls = __syncthreads_or(falling);
  if (a.changes)
    for (int x = threadIdx.x; x < p.b * a.changes_of_row; x += kThreads) a.changes[x] = 0;
  int furthest = 0, tiles = 0;  // end of the sequences so far, over [b, rows + 1]; tiles so far
  for (int first = 0; first < count; first += kThreads) {
    const int x = first + threadIdx.x, b = x / slots, base = b * (a.rows + 1);
    int begin = 0, end = 0;
    if (x < count) {
      const Sequence z = slot(p, b, x % slots);
      begin = static_cast<int>(a.by_query ? z.q_begin : z.k_begin);
      end = begin + static_cast<int>(a.by_query ? z.q_len : z.k_len);
    }
    // cu_seqlens that decrease make sequences overlap: a row belongs to the first that has it.
    int total;
    const int until = max(scan(x < count ? base + end : 0, shared, total, most), furthest);
    int before = __shfl_up_sync(~0u, until, 1);
    if ((threadIdx.x & 31) == 0)
      before = max(threadIdx.x ? shared[threadIdx.x / 32 - 1] : 0, furthest);
    before = max(before - base, 0);
    furthest = max(furthest, total);
    const int from = max(begin, before), gap = x < count ? up(from - before) : 0,
              own = x < count ? up(max(end - from, 0)) : 0;
    const int at = tiles + scan(gap + own, shared, total, sum) - gap - own;
    if (x < count) runs[2 * x] = {at, before}, runs[2 * x + 1] = {at + gap, from};
    tiles += total;
  }
  bins[threadIdx.x] = 0;
  __syncthreads();
  // Counted by bin, then put there; a second look only where a thread has several.
  Span span;
  int bin = 0;
  for (int x = threadIdx.x; x < tiles; x += kThreads) {
    atomicAdd(&bins[bin = make_span(p, a, runs, x, falls, span)], 1);
    if (a.changes && !p.segment_ids_q) count_visits(all, a, span);
  }
  __syncthreads();
  int total;
  const int mine = bins[threadIdx.x], upto = scan(mine, shared, total, sum);
  bins[threadIdx.x] = upto - mine;
  __syncthreads();
  for (int x = threadIdx.x; x < tiles; x += kThreads) {
    if (tiles > kThreads) bin = make_span(p, a, runs, x, falls, span);
    const int at = a.order == Order::kForwards    ? x
                   : a.order == Order::kBackwards ? tiles - 1 - x
                                                  : atomicAdd(&bins[bin], 1);
    a.spans[at] = span;
  }
  if (threadIdx.x == 0) *a.count = tiles, *a.ticket = 0;
}

// Narrows what each tile meets to the rows whose segment can be one of the tile's: from the first
// to the last with an id between the tile's least and greatest. Exact for documents in order; for
// ids in any order it is right, if wide. A block a tile.
__global__ void __launch_bounds__(256) narrow(const __grid_constant__ PlanArgs all) {
  __shared__ int least, greatest, first, last, found;
  const flashjax::Problem& p = all.p;
  const List& a = all.list[0];
  pdl_wait();
  if (static_cast<int>(blockIdx.x) >= *a.count) return;
  Span& span = a.spans[blockIdx.x];
  if (span.n < 0 || span.begin == span.end) return;
  const int* queries = p.segment_ids_q + (span.q_end - span.q_len);
  const int* keys = p.segment_ids_k + span.b * p.t + span.k_begin;
  const int *own = a.by_query ? queries : keys, *others = a.by_query ? keys : queries;
  const int stop = min(span.first + a.size, a.by_query ? span.q_len : span.k_len);
  const Sequence z{0, span.q_len, 0, span.k_len, span.diagonal};
  const Range met =
      a.by_query ? visible_keys(p, z, span.first, stop) : visible_queries(p, z, span.first, stop);
  if (threadIdx.x == 0)
    least = INT32_MAX, greatest = INT32_MIN, first = INT32_MAX, last = 0, found = 0;
  __syncthreads();
  int lo = INT32_MAX, hi = INT32_MIN;
  for (int i = span.first + threadIdx.x; i < stop; i += 256)
    lo = min(lo, own[i]), hi = max(hi, own[i]);
  lo = __reduce_min_sync(~0u, lo), hi = __reduce_max_sync(~0u, hi);
  if (threadIdx.x % 32 == 0) atomicMin(&least, lo), atomicMax(&greatest, hi);
  __syncthreads();
  const int from = least, to = greatest, end = static_cast<int>(met.end);
  int begin = INT32_MAX, until = 0, hits = 0;
#pragma unroll 8
  for (int i = static_cast<int>(met.begin) + threadIdx.x; i < end; i += 256) {
    const bool hit = others[i] >= from && others[i] <= to;
    begin = min(begin, hit ? i : INT32_MAX), until = max(until, hit ? i + 1 : 0), hits += hit;
  }
  begin = __reduce_min_sync(~0u, begin), until = __reduce_max_sync(~0u, until);
  hits = __reduce_add_sync(~0u, hits);
  if (threadIdx.x % 32 == 0 && hits)
    atomicMin(&first, begin), atomicMax(&last, until), atomicAdd(&found, hits);
  __syncthreads();
  if (threadIdx.x == 0) {
    span.begin = min(first, last), span.end = last;
    span.compare = !(from == to && found == last - span.begin);
    if (a.changes) count_visits(all, a, span);
  }
}

}  // namespace

cudaError_t plan_sequences(const flashjax::Problem& p, const PlanShape* shapes, int count,
                           void* workspace, Plan* plans, cudaStream_t stream) {
  if (p.b * (p.s + 1) > INT32_MAX ||
      (p.page_table ? p.b : imax(p.b, p.c)) * (p.t + 1) > INT32_MAX ||
      2 * p.b * (p.n + 1) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  PlanArgs a{};
  a.p = p, a.own = problem(p);
  char* at = static_cast<char*>(workspace);
  for (int i = 0; i < count; ++i) {
    const PlanShape& x = shapes[i];
    List& y = a.list[i];
    const int64_t others = x.by_query ? p.t : p.s, tiles = plan_tiles(p, x);
    if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
    // As many chunks as there are, at most as many as bins; what is left is for classes of length.
    int64_t chunk = imax(x.chunk, 1), chunks = (p.b * others + chunk - 1) / chunk;
    while (chunks > kBins) chunk *= 2, chunks = (p.b * others + chunk - 1) / chunk;
    const int64_t bound = x.by_query ? p.max_seqlen_k : p.max_seqlen_q;
    const int64_t longest = imax(bound < 0 ? others : imin(bound, others), 1);
    y.by_query = x.by_query, y.order = x.order, y.size = x.size, y.padding = x.padding;
    y.changes = x.changes, y.changes_of_row = static_cast<int>(x.padding ? x.rows / x.padding : 0);
    y.rows = static_cast<int>(x.by_query ? p.s : p.t);
    y.chunk = static_cast<int>(imin(chunk, INT32_MAX));
    y.classes = static_cast<int>(kBins / imax(chunks, 1));
    y.class_of_row = static_cast<float>(y.classes) / static_cast<float>(longest);
    y.ticket = reinterpret_cast<int*>(at), y.count = y.ticket + 1;
    y.spans = reinterpret_cast<Span*>(at + 256);
    y.runs = reinterpret_cast<Run*>(at + 256 + tiles * int64_t{sizeof(Span)});
    plans[i] = {y.spans, y.count, y.ticket};
    at += plan_bytes(p, x);
  }
  cudaError_t error = launch_after(plan, dim3(count), kThreads, 0, 1, stream, a);
  if (p.segment_ids_q && error == cudaSuccess)
    error = launch_after(narrow, dim3(static_cast<unsigned>(plan_tiles(p, shapes[0]))), 256, 0, 1,
                         stream, a);
  return error;
}

}  // namespace flashjax::sm90
