// sequence.h against brute force: which keys a query sees, and the ranges over several queries or
// keys.
#include "attention/sequence.h"

#include <vector>

#include "test.h"

namespace flashjax::test {
namespace {

bool sees(const Problem& p, const Sequence& z, int64_t b, int64_t i, int64_t j) {
  int64_t diagonal = (p.top_left ? 0 : z.k_len - z.q_len) + (p.shift ? p.shift[b] : 0);
  if (p.window_left >= 0 && j < i + diagonal - p.window_left) return false;
  if (p.window_right >= 0 && j > i + diagonal + p.window_right) return false;
  return j >= 0 && j < z.k_len;
}

void ranges(const Problem& p, const Sequence& z, int64_t b, Random& random) {
  if (z.q_len == 0 || z.k_len == 0) return;
  int64_t i0 = random.integer(0, z.q_len - 1), i1 = random.integer(i0 + 1, z.q_len);
  int64_t j0 = random.integer(0, z.k_len - 1), j1 = random.integer(j0 + 1, z.k_len);
  Range keys = visible_keys(p, z, i0, i1), common = common_keys(p, z, i0, i1);
  Range queries = visible_queries(p, z, j0, j1);
  CHECK(keys.begin <= keys.end && keys.begin >= 0 && keys.end <= z.k_len);
  CHECK(common.begin <= common.end && common.begin >= 0 && common.end <= z.k_len);
  CHECK(queries.begin <= queries.end && queries.begin >= 0 && queries.end <= z.q_len);
  bool keys_ok = true, common_ok = true, queries_ok = true;
  for (int64_t j = 0; j < z.k_len; ++j) {
    bool any = false, all = true;
    for (int64_t i = i0; i < i1; ++i) sees(p, z, b, i, j) ? any = true : all = false;
    bool in = j >= keys.begin && j < keys.end, shared = j >= common.begin && j < common.end;
    if (any && !in) keys_ok = false;
    if (shared != all) common_ok = false;
  }
  for (int64_t i = 0; i < z.q_len; ++i) {
    bool any = false;
    for (int64_t j = j0; j < j1; ++j) any |= sees(p, z, b, i, j);
    if (any && !(i >= queries.begin && i < queries.end)) queries_ok = false;
  }
  // One query: the range is exact.
  Range one = visible_keys(p, z, i0, i0 + 1);
  bool one_ok = true;
  for (int64_t j = 0; j < z.k_len; ++j)
    one_ok &= sees(p, z, b, i0, j) == (j >= one.begin && j < one.end);
  CHECK(keys_ok);
  CHECK(common_ok);
  CHECK(queries_ok);
  CHECK(one_ok);
}

}  // namespace

void test_sequence() {
  Random random(1);
  for (int round = 0; round < 3000; ++round) {
    Problem p;
    p.b = random.integer(1, 3), p.s = random.integer(0, 20), p.t = random.integer(0, 20);
    p.n = random.chance(0.5) ? random.integer(1, 4) : 1;
    p.c = p.b;
    p.window_left = random.integer(-1, 6), p.window_right = random.integer(-1, 6);
    p.top_left = random.chance(0.3);
    p.max_seqlen_q = p.max_seqlen_k = -1;
    std::vector<int32_t> cu_q, cu_k, used_q, used_k, pad, shift;
    bool packed = p.n > 1, valid = random.chance(0.7);
    // Half of the time any numbers at all: nothing may leave its array.
    auto lengths = [&](int64_t extent) {
      std::vector<int32_t> x;
      for (int64_t b = 0; b < p.b; ++b) {
        int64_t at = 0;
        for (int64_t i = 0; i <= p.n; ++i) {
          at = valid ? random.integer(at, extent) : random.integer(-5, extent + 5);
          x.push_back(static_cast<int32_t>(at));
        }
      }
      return x;
    };
    auto anything = [&](int64_t count, int64_t extent) {
      std::vector<int32_t> x(count);
      for (int32_t& y : x) y = static_cast<int32_t>(random.integer(-3, extent + 3));
      return x;
    };
    if (packed) cu_q = lengths(p.s), p.cu_seqlens_q = cu_q.data();
    if (packed) cu_k = lengths(p.t), p.cu_seqlens_k = cu_k.data();
    if (random.chance(0.3)) used_q = anything(p.b * p.n, p.s), p.seqused_q = used_q.data();
    if (random.chance(0.3)) used_k = anything(p.b * p.n, p.t), p.seqused_k = used_k.data();
    if (random.chance(0.3)) pad = anything(p.b, p.t), p.leftpad = pad.data();
    if (random.chance(0.2)) shift = anything(p.b, p.t), p.shift = shift.data();
    for (int64_t b = 0; b < p.b; ++b)
      for (int64_t i = 0; i < p.n; ++i) {
        Sequence z = sequence(p, b, i);
        CHECK(z.q_begin >= 0 && z.q_len >= 0 && z.q_begin + z.q_len <= p.s);
        CHECK(z.k_begin >= 0 && z.k_len >= 0 && z.k_begin + z.k_len <= p.t);
        ranges(p, z, b, random);
      }
  }
}

}  // namespace flashjax::test
