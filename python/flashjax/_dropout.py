"""Which attention weights dropout keeps: a function of the seed and of positions, the same for every backend.

The random numbers are those of FlashAttention-2: Philox 4x32 with 7 rounds, keyed by the seed of batch row and head. A
counter gives 16 bytes, one for each of 16 weights; what the counter is, and which byte is whose, follows from how a
warp holds a block of 16 queries by 32 keys.
"""

import jax.numpy as jnp

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85


def weights(seed, keep: int, queries, key_position):
    """(b, h, s, t): 256 / keep where a weight is kept, else 0.

    seed (b, h, 2); queries: sequence and position (b, s) of each row; key_position (b, t). Positions count within a
    sequence.
    """
    i = queries.position[:, None, :, None].astype(jnp.uint32)
    j = key_position[:, None, None, :].astype(jnp.uint32)
    n = queries.sequence[:, None, :, None].astype(jnp.uint32)
    lane = i % 8 * 4 + j % 8 // 2
    key = [seed[..., word, None, None].astype(jnp.uint32) for word in range(2)]
    block = _philox([n * 32 + lane, jnp.uint32(0), i // 16, j // 32], key)
    word = j % 32 // 8
    bits = jnp.where(word < 2, jnp.where(word == 0, block[0], block[1]), jnp.where(word == 2, block[2], block[3]))
    byte = bits >> (8 * (i % 16 // 8 * 2 + j % 2)) & 255
    return jnp.where(byte < keep, jnp.float32(256 / keep), 0)


def _philox(counter, key):
    """The four words of a block: 7 rounds."""
    for number in range(7):
        if number:
            key = [word + jnp.uint32(step) for word, step in zip(key, _STEPS, strict=True)]
        (high_0, low_0), (high_1, low_1) = (
            _product(m, counter[at]) for m, at in zip(_MULTIPLIERS, (0, 2), strict=True)
        )
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
    return counter


def _product(multiplier: int, x):
    """The two halves of a product of 32 bits by 32, without integers of 64."""
    a1, a0 = jnp.uint32(multiplier >> 16), jnp.uint32(multiplier & 0xFFFF)
    b1, b0 = x >> 16, x & 0xFFFF
    middle = a1 * b0 + (a0 * b0 >> 16)
    other = a0 * b1 + (middle & 0xFFFF)
    return a1 * b1 + (middle >> 16) + (other >> 16), jnp.uint32(multiplier) * x
