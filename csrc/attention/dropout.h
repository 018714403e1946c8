// Which attention weights dropout keeps: a function of the seed and of positions, the same for
// every kernel. The numbers are FlashAttention-2's: Philox 4x32 with 7 rounds, whose 16 bytes go to
// 16 weights of a block of 16 queries by 32 keys, as a warp's matrix instruction spreads them over
// its lanes.
#pragma once
#include "sequence.h"

namespace flashjax {

struct Philox {
  uint32_t word[4];
};

FLASHJAX_HD Philox philox(uint64_t low, uint32_t x, uint32_t y, uint32_t key0, uint32_t key1) {
  uint32_t c0 = static_cast<uint32_t>(low), c1 = static_cast<uint32_t>(low >> 32), c2 = x, c3 = y;
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    const uint32_t hi_a = static_cast<uint32_t>(a >> 32), hi_b = static_cast<uint32_t>(b >> 32);
    c0 = hi_b ^ c1 ^ key0, c1 = static_cast<uint32_t>(b);
    c2 = hi_a ^ c3 ^ key1, c3 = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The bytes of query i that lie in the `lane`-th of the 4 pairs of columns of keys [32 x, 32 x +
// 32), in sequence n of a row. Key 32 x + 8 w + 2 lane + c (w < 4, c < 2) has byte `shift(i) + 8 c`
// of word w.
FLASHJAX_HD Philox dropout_block(const int32_t* seed, int64_t n, int64_t i, int64_t lane,
                                 int64_t x) {
  return philox(static_cast<uint64_t>(32 * n + i % 8 * 4 + lane), static_cast<uint32_t>(i / 16),
                static_cast<uint32_t>(x), static_cast<uint32_t>(seed[0]),
                static_cast<uint32_t>(seed[1]));
}
FLASHJAX_HD int dropout_shift(int64_t i) { return static_cast<int>(i % 16 / 8 * 16); }

FLASHJAX_HD const int32_t* dropout_seed(const Problem& p, int64_t b, int64_t h) {
  return p.dropout_seed + 2 * (b * p.h + h);
}

// What multiplies the weight of query i and key j: 0, or what makes up for those that are dropped.
FLASHJAX_HD float dropout_factor(const Problem& p, const int32_t* seed, int64_t n, int64_t i,
                                 int64_t j) {
  const Philox bits = dropout_block(seed, n, i, j % 8 / 2, j / 32);
  const uint32_t low = j & 8 ? bits.word[1] : bits.word[0];
  const uint32_t high = j & 8 ? bits.word[3] : bits.word[2];
  const uint32_t byte = ((j & 16 ? high : low) >> (dropout_shift(i) + j % 2 * 8)) & 255;
  return byte < p.dropout_keep ? 256.f / static_cast<float>(p.dropout_keep) : 0.f;
}

}  // namespace flashjax
