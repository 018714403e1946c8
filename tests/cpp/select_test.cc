// select.h: which row of the kernel table serves a call, and what it says when none does.
#include "attention/select.h"

#include <cstring>

#include "test.h"

namespace flashjax::test {
namespace {

bool picks(const Facts& facts, int arch, const char* id) {
  std::string why;
  const Kernel* kernel = select(facts, arch, &why);
  if (kernel && !std::strcmp(kernel->id, id)) return true;
  std::printf("wanted %s, got %s\n", id, kernel ? kernel->id : why.c_str());
  return false;
}

bool says(const Facts& facts, int arch, const char* words) {
  std::string why;
  if (select(facts, arch, &why)) return false;
  return why.find(words) != why.npos;
}

// Each column of the table decides something.
void columns() {
  const DType bf16 = DType::kBF16, f32 = DType::kF32;
  const Direction fwd = Direction::Forward, bwd = Direction::Backward;
  CHECK(picks({fwd, bf16, 128, 128, 0}, 90, "sm90_fwd_bf16_128_full"));
  CHECK(picks({fwd, bf16, 128, 128, kWindow}, 90, "sm90_fwd_bf16_128"));
  CHECK(picks({fwd, bf16, 128, 128, kWindow | kSoftcap}, 90, "sm90_fwd_bf16_128_scores"));
  CHECK(picks({fwd, DType::kF16, 128, 128, 0}, 90, "sm90_fwd_f16_128_full"));
  CHECK(picks({fwd, bf16, 72, 72, 0}, 90, "sm90_fwd_bf16_128_full"));
  CHECK(picks({fwd, bf16, 192, 128, kWindow}, 90, "sm90_fwd_bf16_192_128"));
  CHECK(picks({bwd, bf16, 128, 128, kWindow}, 90, "sm90_bwd_bf16_128"));
  for (Feature x : {kPacked, kSeqused, kBatchIdx, kShift, kSegments}) {
    CHECK(picks({fwd, bf16, 64, 64, x}, 90, "sm90_fwd_bf16_64_seq"));
    CHECK(picks({fwd, bf16, 128, 128, x | kWindow}, 90, "sm90_fwd_bf16_128_seq"));
    CHECK(picks({fwd, DType::kF16, 256, 256, x | kSinks}, 90, "sm90_fwd_f16_256_seq"));
    CHECK(picks({fwd, bf16, 192, 128, uint32_t{x} | kBias}, 90, "sm90_fwd_bf16_192_128_scores"));
    if (x == kBatchIdx) continue;
    CHECK(picks({bwd, bf16, 128, 128, x | kWindow | kDeterministic}, 90, "sm90_bwd_bf16_128_seq"));
    CHECK(picks({bwd, bf16, 64, 64, x | kSinks}, 90, "sm90_bwd_bf16_64_seq"));
    CHECK(picks({bwd, DType::kF16, 128, 128, x | kWindow}, 90, "sm90_bwd_f16_128_seq"));
    CHECK(picks({bwd, bf16, 192, 128, x | kWindow}, 90, "sm90_bwd_bf16_192_128_seq"));
    CHECK(picks({bwd, bf16, 192, 128, uint32_t{x} | kBias}, 90, "sm90_bwd_bf16_192_128_scores"));
    CHECK(picks({bwd, bf16, 256, 256, uint32_t{x} | kSoftcap}, 90, "sm90_bwd_bf16_256_scores"));
  }
  CHECK(picks({fwd, bf16, 128, 128, kPaged}, 90, "upstream_split_bf16_128"));
  CHECK(picks({fwd, bf16, 128, 128, kPaged | kOddPages}, 90, "simt_fwd_bf16"));
  CHECK(picks({fwd, bf16, 128, 128, kPaged, 512}, 90, "sm90_decode_bf16_128"));
  CHECK(picks({fwd, bf16, 128, 128, kPaged, 513}, 90, "upstream_split_bf16_128"));
  CHECK(picks({fwd, bf16, 128, 128, kPaged, 0}, 90, "sm90_decode_bf16_128"));
  CHECK(picks({fwd, bf16, 64, 64, 0, 1}, 90, "sm90_decode_bf16_64"));
  CHECK(picks({fwd, bf16, 100, 100, 0}, 90, "simt_fwd_bf16"));
  CHECK(picks({fwd, bf16, 128, 128, 0}, 80, "upstream_split_bf16_128"));
  CHECK(picks({fwd, bf16, 128, 128, kManyQueries}, 120, "upstream_fwd_bf16_128"));
  CHECK(picks({fwd, bf16, 128, 128, kManyQueries | kDropout}, 90, "upstream_fwd_bf16_128"));
  CHECK(picks({fwd, bf16, 128, 128, kBias}, 80, "simt_fwd_bf16"));
  CHECK(picks({fwd, bf16, 128, 64, kUnequalDims}, 80, "simt_fwd_bf16"));
  CHECK(picks({fwd, bf16, 128, 128, 0}, 75, "simt_fwd_bf16"));
  CHECK(picks({bwd, bf16, 64, 64, 0}, 86, "upstream_bwd_bf16_64"));
  CHECK(picks({bwd, bf16, 256, 256, kDropout}, 80, "simt_bwd_bf16"));
  Facts asked{fwd, bf16, 128, 128, kWindow | kManyQueries};
  asked.upstream = true;
  CHECK(picks(asked, 90, "upstream_fwd_bf16_128"));
  asked.features |= kBias;
  CHECK(says(asked, 90, "does not take bias"));
  CHECK(picks({fwd, f32, 512, 512, kEverything}, 90, "simt_fwd_f32"));
  CHECK(picks({bwd, bf16, 128, 128, kDeterministic}, 90, "sm90_bwd_bf16_128"));
  CHECK(picks({bwd, bf16, 192, 128, kDense}, 90, "sm90_bwd_bf16_192_128"));
  CHECK(picks({bwd, bf16, 192, 136, kDense}, 90, "sm90_bwd_bf16_256"));
  CHECK(picks({bwd, bf16, 256, 256, kDense}, 90, "sm90_bwd_bf16_256"));
  CHECK(picks({bwd, bf16, 64, 64, kSoftcap | kDeterministic}, 90, "sm90_bwd_bf16_64_scores"));
  CHECK(says({fwd, f32, 513, 64, 0}, 90, "d = 513"));
  CHECK(says({fwd, f32, 513, 64, 0}, 90, "simt_fwd_f32"));
  CHECK(says({fwd, f32, 0, 64, 0}, 90, "d = 0"));
  CHECK(says({fwd, f32, 64, 64, 0}, 70, "sm_70"));
  CHECK(says({bwd, f32, 64, 64, kPaged}, 90, "page_table"));
  Facts many{fwd, bf16, 128, 128, kPaged | kSeqused, 0};
  many.paged = true;
  CHECK(picks(many, 90, "sm90_fwd_bf16_128_paged"));
  CHECK(picks(many, 80, "upstream_split_bf16_128"));
  many.features |= kAlibi | kUnequalDims, many.d = 72;
  CHECK(picks(many, 90, "sm90_fwd_bf16_128_paged_scores"));
  Facts latent{fwd, bf16, 576, 512, kUnequalDims | kSeqused, 128};
  CHECK(says(latent, 90, "d = 576"));
  latent.shared = true;
  CHECK(picks(latent, 90, "sm90_latent_bf16"));
  CHECK(says(latent, 80, "sm_90"));
}

// The first row that can, whatever is asked.
void first_of_table() {
  Random random(7);
  for (int trial = 0; trial < 2000; ++trial) {
    Facts f{random.chance(0.5) ? Direction::Forward : Direction::Backward,
            static_cast<DType>(random.integer(0, 2)), random.integer(0, 300),
            random.integer(0, 300), 0};
    if (random.chance(0.7)) f.d -= f.d % 8, f.e -= f.e % 8;
    for (uint32_t x = 1; x < kFeatureEnd; x <<= 1)
      if (random.chance(0.15)) f.features |= x;
    const int archs[] = {0, 70, 75, 80, 90, 100, 120};
    const int arch = archs[random.integer(0, 6)];
    if (random.chance(0.5)) f.queries = random.integer(1, 1000);
    f.upstream = random.chance(0.2), f.shared = random.chance(0.1), f.paged = random.chance(0.2);
    const Kernel* first = nullptr;
    for (const Kernel& k : kernels()) {
      bool dims = f.d >= 1 && f.e >= 1 && f.d <= k.d && f.e <= k.e && f.d % k.unit == 0 &&
                  f.e % k.unit == 0;
      bool here = arch == 0 || (arch >= k.arch_min && arch <= k.arch_max);
      bool serves = k.direction == f.direction && k.dtype == f.dtype && dims && here && k.built &&
                    f.shared == k.shared && (f.paged || !k.paged) &&
                    (!f.upstream || !std::strcmp(k.family, "upstream")) &&
                    (f.features & ~k.features) == 0 && (!k.few || f.queries <= k.m);
      if (serves && !first) first = &k;
    }
    std::string why;
    CHECK(select(f, arch, &why) == first);
    CHECK(first ? why.empty() : !why.empty());
  }
}

// A call's options become facts.
void facts() {
  const float number = 0;
  const int32_t ids = 0;
  Problem p;
  p.s = p.t = 16, p.scale = 1;
  p.window_left = p.window_right = p.max_seqlen_q = p.max_seqlen_k = -1;
  auto features = [&](auto change, Direction direction = Direction::Backward) {
    Problem changed = p;
    change(changed);
    return facts_of(direction, changed).features;
  };
  auto queries = [&](int64_t s, int64_t t, int64_t h, int64_t g) {
    p.s = s, p.t = t, p.h = h, p.g = g;
    return facts_of(Direction::Forward, p).queries;
  };
  CHECK(queries(1, 4, 8, 2) == 4);
  CHECK(queries(64, 256, 2, 2) == 64);
  CHECK(queries(65, 512, 2, 2) == Facts::kMany);
  CHECK(queries(2, 7, 2, 2) == Facts::kMany);
  CHECK(queries(1, 8, 0, 0) == Facts::kMany);
  p.page_table = &ids;
  CHECK(queries(65, 512, 2, 2) == 0);
  CHECK(queries(64, 256, 2, 2) == 64);
  p.page_table = nullptr;
  p.s = p.t = 16;
  CHECK(features([](Problem&) {}) == 0);
  CHECK(features([](Problem& x) { x.scale = 0; }) == kScale);
  CHECK(features([](Problem& x) { x.scale = -1; }) == kScale);
  CHECK(features([](Problem& x) { x.window_right = 0; }) == kWindow);
  CHECK(features([](Problem& x) { x.window_left = 3; }) == kWindow);
  CHECK(features([](Problem& x) { x.softcap = 20; }) == kSoftcap);
  CHECK(features([&](Problem& x) { x.bias = &number; }) == kBias);
  CHECK(features([&](Problem& x) { x.alibi_slopes = &number; }) == kAlibi);
  CHECK(features([&](Problem& x) { x.sinks = &number; }) == kSinks);
  CHECK(features([&](Problem& x) { x.segment_ids_q = x.segment_ids_k = &ids; }) == kSegments);
  CHECK(features([&](Problem& x) { x.seqused_k = &ids; }) == kSeqused);
  CHECK(features([&](Problem& x) { x.leftpad = &ids; }) == kSeqused);
  CHECK(features([&](Problem& x) { x.batch_idx = &ids; }) == kBatchIdx);
  CHECK(features([&](Problem& x) { x.page_table = &ids; }) == kPaged);
  auto paged = [&](int64_t s, int64_t h, int64_t page, const int32_t* leftpad = nullptr) {
    Problem x = p;
    x.page_table = &ids, x.leftpad = leftpad, x.b = 2, x.s = s, x.h = h, x.page = page;
    return facts_of(Direction::Forward, x).paged;
  };
  CHECK(paged(65, 48, 16) && paged(65, 48, 48) && paged(257, 16, 64));
  CHECK(!paged(64, 48, 16) && !paged(65, 47, 16) && !paged(65, 48, 40) && !paged(65, 48, 16, &ids));
  CHECK(features([&](Problem& x) { x.shift = &ids; }) == kShift);
  CHECK(features([&](Problem& x) { x.dropout_seed = &ids; }) == kDropout);
  CHECK(features([](Problem& x) { x.e = 8; }) == kUnequalDims);
  CHECK(features([](Problem& x) { x.s = x.t = 65; }) == kManyQueries);
  CHECK(features([](Problem& x) { x.top_left = true, x.t = 32; }) == 0);
  CHECK(features([&](Problem& x) { x.alibi_slopes = &number, x.top_left = true; }) == kAlibi);
  CHECK(features([&](Problem& x) { x.alibi_slopes = &number, x.top_left = true, x.t = 32; }) ==
        (kAlibi | kAlibiMoved));
  CHECK(features([&](Problem& x) { x.page_table = &ids, x.page = 17; }) == (kPaged | kOddPages));
  CHECK(features([&](Problem& x) { x.page_table = x.leftpad = &ids, x.page = 64; }) ==
        (kPaged | kSeqused | kOddPages));
  CHECK(features([](Problem& x) { x.deterministic = true; }) == kDeterministic);
  CHECK(features([](Problem& x) { x.deterministic = true; }, Direction::Forward) == 0);
  CHECK(features([&](Problem& x) { x.cu_seqlens_q = x.cu_seqlens_k = &ids; }) == kPacked);
  CHECK(features([](Problem& x) { x.max_seqlen_k = 7; }) == kSeqused);
}

}  // namespace

void test_select() {
  columns();
  first_of_table();
  facts();
}

}  // namespace flashjax::test
