// Plans the tiles of sequences: where each lies, what it meets, and in which order they are worked
// on. Rows of no sequence get tiles too, which are to be filled.
#include "../../attention/sequence.h"
#include "sequences.h"

namespace flashjax::sm90 {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = kThreads;  // of the order: chunks x classes

struct PlanArgs {
  flashjax::Problem p;
  bool by_query;
  int size, padding, rows;      // rows: of the tiles' own operand
  int chunk, classes, longest;  // see bin_of
  Span* spans;
  int *count, *ticket;
  // [b, n + 1, 2]: of the rows of none before a sequence, and of the sequence's, the number of the
  // first tile and the first row.
  int2* runs;
};

// Inclusive over a block; `shared` holds 33 values. Returns the total too.
template <typename Op>
__device__ int scan(int x, int zero, int* shared, int& total, Op op) {
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
  return warp ? op(x, shared[warp - 1]) : op(x, zero);
}

// The rows of slot i of a row of the batch: of sequence i, or none at the end for i = n.
__device__ Range own_rows(const PlanArgs& a, int b, int i) {
  if (i == a.p.n) return {a.rows, a.rows};
  const Sequence z = sequence(a.p, b, i);
  const int64_t begin = a.by_query ? z.q_begin : z.k_begin;
  return {begin, begin + (a.by_query ? z.q_len : z.k_len)};
}

// Tile x of all, unordered; its place in the order. The last run that begins at x or before holds
// it, for those without tiles begin where the next one does.
__device__ int make_span(const PlanArgs& a, int x, Span& span) {
  const int slots = static_cast<int>(a.p.n) + 1;
  int lo = 0, hi = 2 * static_cast<int>(a.p.b) * slots;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (a.runs[mid].x <= x)
      lo = mid;
    else
      hi = mid;
  }
  const int b = lo / 2 / slots, i = lo / 2 % slots,
            row = a.runs[lo].y + (x - a.runs[lo].x) * a.size;
  const bool gap = lo % 2 == 0;
  const Range own = own_rows(a, b, i);
  Sequence z{};
  if (i < a.p.n) z = sequence(a.p, b, i);
  if (gap) {  // as a sequence that meets nothing
    const int64_t begin = a.runs[lo].y, len = own.begin - begin;
    z = a.by_query ? Sequence{begin, len, 0, 0, 0} : Sequence{0, 0, begin, len, 0};
  }
  const int64_t c = a.p.batch_idx ? flashjax::clamp(a.p.batch_idx[b], 0, a.p.c - 1) : b;
  span.b = b, span.n = gap ? -1 : i;
  span.first = row - static_cast<int>(a.by_query ? z.q_begin : z.k_begin);
  span.q_len = static_cast<int>(z.q_len), span.k_len = static_cast<int>(z.k_len);
  span.q_end = static_cast<int>(b * a.p.s + z.q_begin + z.q_len);
  span.k_end = static_cast<int>((a.p.page_table ? b : c) * a.p.t + z.k_begin + z.k_len);
  span.k_begin = static_cast<int>(z.k_begin);
  span.diagonal = static_cast<int>(flashjax::clamp(z.diagonal, -(1 << 29), 1 << 29));
  span.begin = 0, span.end = a.by_query ? span.k_len : span.q_len;
  span.compare = a.p.segment_ids_q && !gap;
  span.padded = a.padding ? static_cast<int>(z.q_begin / a.padding + i) * a.padding : 0;
  span.head = 0, span.unused[0] = span.unused[1] = 0;
  const int64_t last = imin(span.first + a.size, a.by_query ? z.q_len : z.k_len);
  const Range met = a.by_query ? visible_keys(a.p, z, span.first, last)
                               : visible_queries(a.p, z, span.first, last);
  const int64_t others = a.by_query ? a.p.t : a.p.s;
  const int64_t at = b * others + (a.by_query ? z.k_begin : z.q_begin);
  const int64_t part = imin((met.end - met.begin) * a.classes / a.longest, a.classes - 1);
  return static_cast<int>(imin(at / a.chunk * a.classes + a.classes - 1 - part, kBins - 1));
}

__global__ void __launch_bounds__(kThreads) plan(const __grid_constant__ PlanArgs a) {
  __shared__ int shared[32], bins[kBins];
  const int slots = static_cast<int>(a.p.n) + 1, count = static_cast<int>(a.p.b) * slots;
  auto most = [](int x, int y) { return max(x, y); };
  auto sum = [](int x, int y) { return x + y; };
  int furthest = 0, tiles = 0;  // end of the sequences so far, over [b, rows + 1]; tiles so far
  for (int first = 0; first < count; first += kThreads) {
    const int x = first + threadIdx.x, b = x / slots, i = x % slots, base = b * (a.rows + 1);
    Range own{0, 0};
    if (x < count) own = own_rows(a, b, i);
    // cu_seqlens that decrease make sequences overlap: a row belongs to the first that has it.
    const int end = x < count ? base + static_cast<int>(own.end) : 0;
    int total;
    const int until = max(scan(end, 0, shared, total, most), furthest);
    int before = __shfl_up_sync(~0u, until, 1);
    if ((threadIdx.x & 31) == 0)
      before = max(threadIdx.x ? shared[threadIdx.x / 32 - 1] : 0, furthest);
    before = max(before - base, 0);
    furthest = max(furthest, total);
    const int from = max(static_cast<int>(own.begin), before);
    const int gap = x < count ? (from - before + a.size - 1) / a.size : 0;
    const int mine =
        x < count ? (max(static_cast<int>(own.end) - from, 0) + a.size - 1) / a.size : 0;
    const int at = tiles + scan(gap + mine, 0, shared, total, sum) - gap - mine;
    if (x < count) a.runs[2 * x] = {at, before}, a.runs[2 * x + 1] = {at + gap, from};
    tiles += total;
  }
  bins[threadIdx.x] = 0;
  __syncthreads();
  Span span;
  for (int x = threadIdx.x; x < tiles; x += kThreads) atomicAdd(&bins[make_span(a, x, span)], 1);
  __syncthreads();
  int total;
  const int mine = bins[threadIdx.x], upto = scan(mine, 0, shared, total, sum);
  bins[threadIdx.x] = upto - mine;
  __syncthreads();
  for (int x = threadIdx.x; x < tiles; x += kThreads) {
    const int at = atomicAdd(&bins[make_span(a, x, span)], 1);
    a.spans[at] = span;
  }
  if (threadIdx.x == 0) *a.count = tiles, *a.ticket = 0;
}

// Narrows the range of each tile to the rows whose segment can be one of the tile's: from the first
// to the last with an id between the tile's least and greatest. Exact for documents in order; for
// ids in any order it is right, if wide. A block a tile.
__global__ void __launch_bounds__(256) narrow(const __grid_constant__ PlanArgs a) {
  __shared__ int least, greatest, first, last, found;
  if (static_cast<int>(blockIdx.x) >= *a.count) return;
  Span& span = a.spans[blockIdx.x];
  if (span.n < 0) return;
  const int own_len = a.by_query ? span.q_len : span.k_len;
  const int* queries = a.p.segment_ids_q + (span.q_end - span.q_len);
  const int* keys = a.p.segment_ids_k + span.b * a.p.t + span.k_begin;
  const int *own = a.by_query ? queries : keys, *others = a.by_query ? keys : queries;
  const int stop = min(span.first + a.size, own_len);
  const Sequence z{0, span.q_len, 0, span.k_len, span.diagonal};
  const Range met = a.by_query ? visible_keys(a.p, z, span.first, stop)
                               : visible_queries(a.p, z, span.first, stop);
  if (threadIdx.x == 0)
    least = 0x7fffffff, greatest = -0x7fffffff - 1, first = 0x7fffffff, last = 0, found = 0;
  __syncthreads();
  for (int i = span.first + threadIdx.x; i < stop; i += 256)
    atomicMin(&least, own[i]), atomicMax(&greatest, own[i]);
  __syncthreads();
  int lo = 0x7fffffff, hi = 0, hits = 0;
  for (int i = static_cast<int>(met.begin) + threadIdx.x; i < met.end; i += 256)
    if (others[i] >= least && others[i] <= greatest) lo = min(lo, i), hi = i + 1, ++hits;
  if (hits) atomicMin(&first, lo), atomicMax(&last, hi), atomicAdd(&found, hits);
  __syncthreads();
  if (threadIdx.x == 0) {
    span.begin = min(first, last), span.end = last;
    span.compare = !(least == greatest && found == last - min(first, last));
  }
}

}  // namespace

cudaError_t plan_sequences(const flashjax::Problem& p, const PlanShape& x, void* workspace,
                           Plan& plan_at, cudaStream_t stream) {
  const int64_t rows = x.by_query ? p.s : p.t, others = x.by_query ? p.t : p.s,
                tiles = plan_tiles(p, x);
  if (p.b * (p.s + 1) > INT32_MAX ||
      (p.page_table ? p.b : imax(p.b, p.c)) * (p.t + 1) > INT32_MAX || tiles > INT32_MAX ||
      2 * p.b * (p.n + 1) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  PlanArgs a{};
  a.p = p;
  a.by_query = x.by_query, a.size = x.size, a.padding = x.padding;
  a.rows = static_cast<int>(rows);
  // As many chunks as there are, at most as many as bins; what is left is for classes of length.
  int64_t chunk = imax(x.chunk, 1), chunks = (p.b * others + chunk - 1) / chunk;
  while (chunks > kBins) chunk *= 2, chunks = (p.b * others + chunk - 1) / chunk;
  const int64_t bound = x.by_query ? p.max_seqlen_k : p.max_seqlen_q;
  a.chunk = static_cast<int>(imin(chunk, INT32_MAX));
  a.classes = static_cast<int>(kBins / imax(chunks, 1));
  a.longest = static_cast<int>(imax(bound < 0 ? others : imin(bound, others), 1));
  char* at = static_cast<char*>(workspace);
  a.ticket = reinterpret_cast<int*>(at), a.count = a.ticket + 1;
  a.spans = reinterpret_cast<Span*>(at + 256);
  a.runs = reinterpret_cast<int2*>(at + 256 + tiles * int64_t{sizeof(Span)});
  plan_at = {a.spans, a.count, a.ticket};
  plan<<<1, kThreads, 0, stream>>>(a);
  if (p.segment_ids_q) narrow<<<static_cast<unsigned>(tiles), 256, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace flashjax::sm90
