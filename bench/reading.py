"""A program that reads as many bytes as a cell's keys and values, as often, and does nothing else: what decoding on a
GPU is measured by, shape by shape. It is XLA's reduction of rows, of that width with which it is fastest."""

import functools

from bench import timing

WIDTHS = tuple(1 << i for i in (9, 11, 13, 15))  # words of a row


def program(width: int, steps: int):
    """The maximum of each row. A step needs the result of the last one, of another row: else XLA would read a row once
    for all of them."""
    import jax.numpy as jnp

    def run(words):
        rows, last = words.reshape(-1, width), jnp.zeros(1, words.dtype)
        for _ in range(steps):
            last = jnp.max(rows ^ last[-1], axis=1)
        return last

    return run


@functools.lru_cache(maxsize=1)
def _words(n):
    import jax
    import jax.numpy as jnp

    return jax.jit(lambda: jax.random.bits(jax.random.key(0), (n,), jnp.uint32))()


def runs(nbytes: int, steps: int) -> dict[int, timing.Run]:
    """By width: a call reads `nbytes` in each of `steps` steps."""
    import jax

    def runner(width):
        call = jax.jit(program(width, steps))

        def run(n):
            for _ in range(n):
                out = call(_words(nbytes // 4))
            jax.block_until_ready(out)

        return run

    return {width: runner(width) for width in WIDTHS if nbytes // 4 % width == 0}


@functools.cache
def fastest_width(nbytes: int, steps: int) -> int:
    """By a short burst of each."""
    times = timing.interleaved({str(width): run for width, run in runs(nbytes, steps).items()}, 2, 0.03)
    return int(min(times, key=lambda name: times[name]["ms_median"]))


def fastest(nbytes: int, steps: int) -> timing.Run:
    return runs(nbytes, steps)[fastest_width(nbytes, steps)]
