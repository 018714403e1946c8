"""Greedy decoding over a paged KV cache inside jax.lax.scan, and how near it comes to the speed of reading memory.

The "model" is one attention layer with random weights: enough to decide the next token from the cache. The cache is
carried by the scan and donated to it, so every step writes its key and value in place.

    python examples/decode_loop.py [--batch 8] [--context 2048] [--steps 64]
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

import flashjax

HEADS, KV_HEADS, DIM, VOCAB = 32, 8, 128, 1024


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def decode(weights, token, cache, page_table, length, steps):
    """(b, steps) tokens after `token` (b,), and the cache (pages, page size, g, d) that now holds their keys too."""

    def step(carry, _):
        token, cache, length = carry
        qkv = (weights["embed"][token] @ weights["qkv"]).reshape(token.shape[0], 1, -1, DIM)
        q, k, v = jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=2)
        out, *cache = flashjax.flash_mha_with_kvcache(
            q, *cache, k, v, cache_seqlens=length, page_table=page_table, is_causal=True, update_cache=True
        )
        token = jnp.argmax(out.reshape(token.shape[0], -1) @ weights["head"], axis=-1)
        return (token, tuple(cache), length + 1), token

    (_, cache, _), tokens = jax.lax.scan(step, (token, cache, length), length=steps)
    return tokens.T, cache


def reading_speed(x, times=8):
    """Bytes a second of a program that reads x and little else."""
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    jax.block_until_ready(total(x))
    start = time.perf_counter()
    jax.block_until_ready([total(x) for _ in range(times)])
    return times * x.nbytes / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048, help="keys in the cache when decoding starts")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--page", type=int, default=64)
    args = parser.parse_args()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {"embed": (VOCAB, 512), "qkv": (512, (HEADS + 2 * KV_HEADS) * DIM), "head": (HEADS * DIM, VOCAB)}
    weights = {name: jax.random.normal(next(keys), shape, dtype) * shape[0] ** -0.5 for name, shape in shapes.items()}
    pages = -(-(args.context + args.steps) // args.page)  # of one sequence
    page_table = jax.random.permutation(next(keys), args.batch * pages).reshape(args.batch, pages).astype(jnp.int32)
    cache_shape = (args.batch * pages, args.page, KV_HEADS, DIM)
    token = jax.random.randint(next(keys), (args.batch,), 0, VOCAB)
    length = jnp.full((args.batch,), args.context, jnp.int32)

    def fresh():
        return tuple(jax.random.normal(jax.random.key(i), cache_shape, dtype) for i in (1, 2))

    run = functools.partial(decode, weights, token, page_table=page_table, length=length, steps=args.steps)
    jax.block_until_ready(run(cache=fresh()))  # compiles
    cache = jax.block_until_ready(fresh())
    size = sum(x.nbytes for x in cache)
    start = time.perf_counter()
    tokens, cache = jax.block_until_ready(run(cache=cache))
    elapsed = time.perf_counter() - start

    # More than a GPU's cache holds; on a CPU the keys will do.
    bandwidth = reading_speed(cache[0] if jax.default_backend() == "cpu" else jnp.ones(1 << 29, dtype))
    read = size * (args.context + args.steps / 2) / (pages * args.page)  # keys and values that a step needs
    read += sum(weights[name].nbytes for name in ("qkv", "head"))
    bound = args.batch * bandwidth / read
    speed = tokens.size / elapsed
    print(f"{args.batch} sequences, {args.context} keys each, pages of {args.page}, {dtype.__name__}")
    print(f"{speed:,.0f} tokens/s, {1e3 * elapsed / args.steps:.2f} ms a step")
    print(f"reading memory at {bandwidth / 1e9:,.0f} GB/s allows {bound:,.0f} tokens/s: {speed / bound:.0%} of that")


if __name__ == "__main__":
    main()
