// Keys of one key head as the micro-kernels read them: one block at a time, or all keys of a
// sequence, packed once for many tiles of rows. After the copy no layout of the cache (strides,
// pages, padding) is left, and nothing that lies beyond the valid keys has been read.
#pragma once

namespace flashjax::cpu {
namespace {

template <class As>
struct Keys {
  const Problem& p;
  int64_t d, e;  // in elements
  // Contracted over d and e: [keys, d], [keys, e]; over keys: [keys / kDepth, p.d], [keys / kDepth,
  // p.e].
  float *k, *v = nullptr, *k_deep = nullptr, *v_deep = nullptr;
  int64_t origin = 0;  // the first key; even

  // Room for `count` keys, an even number. The forward pass uses k and v_deep, the backward pass
  // all but v_deep.
  Keys(const Problem& p, bool backward, int64_t count, Arena& arena)
      : p(p), d(elements<As>(p.d)), e(elements<As>(p.e)) {
    k = arena.take(count * d);
    if (backward) {
      v = arena.take(count * e);
      k_deep = As::kDepth == 1 ? k : arena.take(count / As::kDepth * p.d);
    } else {
      v_deep = arena.take(count / As::kDepth * p.e);
    }
  }

  const float* k_at(int64_t j) const { return k + (j - origin) * d; }
  const float* v_at(int64_t j) const { return v + (j - origin) * e; }
  const float* k_deep_at(int64_t j) const { return k_deep + (j - origin) / As::kDepth * p.d; }
  const float* v_deep_at(int64_t j) const { return v_deep + (j - origin) / As::kDepth * p.e; }

  // Packs the keys [j0, j1) of the task's sequence, j0 even; an odd end is followed by a key of
  // zeros.
  void pack(const Task& task, const Sequence& z, int64_t j0, int64_t j1) {
    int64_t n = j1 - j0, even = round_up(n, 2);
    auto row = [&](const void* from, int64_t size) {
      return [=, &task, &z, this](int64_t j) -> const char* {
        int64_t row = j < n ? key_row(p, task.b, z, j0 + j) : -1;
        return row < 0 ? nullptr : element(from, p.dtype, (row * p.g + task.g) * size);
      };
    };
    auto put = [](const float* x) { return const_cast<float*>(x); };
    As::pack(p.dtype, even, p.d, row(p.k, p.d), put(k_at(j0)), d);
    if (v) As::pack(p.dtype, even, p.e, row(p.v, p.e), put(v_at(j0)), e);
    if (k_deep && k_deep != k)
      As::pack_deep(p.dtype, even, p.d, row(p.k, p.d), put(k_deep_at(j0)), p.d);
    if (v_deep) As::pack_deep(p.dtype, even, p.e, row(p.v, p.e), put(v_deep_at(j0)), p.e);
  }
};

}  // namespace
}  // namespace flashjax::cpu
