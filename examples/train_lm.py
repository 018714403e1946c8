"""Trains a small causal language model with flashjax, then lets it tell a tale from a KV cache.

The model is a byte-level transformer (grouped query heads, rotary embedding, a sliding window) in flax nnx,
trained with optax on examples/data/tales.txt. It runs on the GPU if JAX sees one, else on the CPU.

    python examples/train_lm.py [--steps 350] [--out out]
"""

import argparse
import pathlib
import time

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import flashjax

WINDOW = (127, 0)  # a token sees itself and so many before: what is learned holds at any length
DATA = pathlib.Path(__file__).parent / "data" / "tales.txt"


def rotary_tables(positions, dim, base=10_000.0):
    """cos and sin, (positions, dim / 2) each."""
    angles = np.arange(positions)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rotate(x, cos, sin):
    """Rotary embedding of x (b, s, heads, d) at positions 0, 1, ...: feature i turns with feature i + d / 2."""
    cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
    x0, x1 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((x0 * cos - x1 * sin, x0 * sin + x1 * cos), axis=-1)


class Attention(nnx.Module):
    def __init__(self, width, heads, kv_heads, *, rngs):
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.qkv = nnx.Linear(width, (heads + 2 * kv_heads) * self.dim, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def heads_of(self, x):
        x = self.qkv(x).reshape(*x.shape[:2], -1, self.dim)
        return jnp.split(x, (self.heads, self.heads + self.kv_heads), axis=2)

    def __call__(self, x, rotary):
        q, k, v = self.heads_of(x)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = flashjax.flash_mha(q, k, v, is_causal=True, window_size=WINDOW)
        return self.out(y.reshape(x.shape))

    def decode(self, x, rotary, cache, length):
        """The same for new tokens x (b, new, width) behind `length` cached ones; returns the updated cache too."""
        q, k, v = self.heads_of(x)
        y, *cache = flashjax.flash_mha_with_kvcache(
            q,
            *cache,
            k,
            v,
            cache_seqlens=length,
            rotary_cos=rotary[0],
            rotary_sin=rotary[1],
            rotary_interleaved=False,
            is_causal=True,
            window_size=WINDOW,
            update_cache=True,
        )
        return self.out(y.reshape(x.shape)), tuple(cache)


class Block(nnx.Module):
    def __init__(self, width, heads, kv_heads, *, rngs):
        self.norm1, self.norm2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, kv_heads, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def mlp(self, x):
        return self.down(nnx.gelu(self.up(self.norm2(x))))

    def __call__(self, x, rotary):
        x = x + self.attention(self.norm1(x), rotary)
        return x + self.mlp(x)

    def decode(self, x, rotary, cache, length):
        y, cache = self.attention.decode(self.norm1(x), rotary, cache, length)
        x = x + y
        return x + self.mlp(x), cache


class Model(nnx.Module):
    def __init__(self, *, width=128, layers=4, heads=4, kv_heads=2, positions=1024, rngs):
        self.kv_shape = (kv_heads, width // heads)
        self.positions = positions
        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, kv_heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

    def rotary(self):
        return rotary_tables(self.positions, self.kv_shape[1])

    def __call__(self, tokens):
        """Logits (b, s, 256) for the token after each of tokens (b, s)."""
        x, rotary = self.embed(tokens), self.rotary()
        for block in self.blocks:
            x = block(x, rotary)
        return self.head(self.norm(x))

    def empty_cache(self, batch):
        def zeros():
            return jnp.zeros((batch, self.positions, *self.kv_shape))

        return [(zeros(), zeros()) for _ in self.blocks]

    def decode(self, tokens, cache, length):
        """Logits for new tokens (b, new) behind `length` cached ones, and the updated cache."""
        x, rotary, updated = self.embed(tokens), self.rotary(), []
        for block, layer in zip(self.blocks, cache, strict=True):
            x, layer = block.decode(x, rotary, layer, length)
            updated.append(layer)
        return self.head(self.norm(x)), updated


def loss_of(model, batch):
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return loss


@nnx.jit(static_argnames="count")
def generate(model, prompt, count, key, temperature):
    """`count` sampled tokens after prompt (b, s), and the logits (b, count, 256) that they were sampled from.

    The scan carries the cache, so each step writes its keys and values in place.
    """
    logits, cache = model.decode(prompt, model.empty_cache(prompt.shape[0]), length=0)

    def step(carry, key):
        cache, logits, length = carry
        token = jax.random.categorical(key, logits / temperature)
        following, cache = model.decode(token[:, None], cache, length)
        return (cache, following[:, 0], length + 1), (token, logits)

    start = (cache, logits[:, -1], jnp.int32(prompt.shape[1]))
    _, (tokens, logits) = jax.lax.scan(step, start, jax.random.split(key, count))
    return tokens.T, jnp.swapaxes(logits, 0, 1)


def batches(text, batch, length, seed=0):
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - length - 1, batch)
        yield jnp.asarray(np.stack([text[i : i + length + 1] for i in starts]).astype(np.int32))


def plot(losses, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(np.arange(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="examples/train_lm.py")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=600, help="how many to generate")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()

    text = np.frombuffer(DATA.read_bytes(), np.uint8)
    model = Model(rngs=nnx.Rngs(0))
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, min(20, args.steps // 2), args.steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, b2=0.95, weight_decay=0.01), wrt=nnx.Param)
    data = batches(text, args.batch, args.length)
    tokens = jnp.zeros((args.batch, args.length), jnp.int32)
    calls = flashjax.support(model, tokens)
    runs = calls[0].runs if calls else "?"
    print(f"device: {jax.devices()[0].device_kind}; attention runs on: {runs}; parameters: {size:,}")

    losses = [float(train_step(model, optimizer, next(data)))]  # the first step compiles
    start = time.perf_counter()
    for step in (bar := tqdm(range(1, args.steps), desc="training", unit="step")):
        losses.append(float(train_step(model, optimizer, next(data))))
        if step % 10 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    rate = (args.steps - 1) * args.batch * args.length / (time.perf_counter() - start)
    last = float(np.mean(losses[-10:]))
    print(f"loss: {losses[0]:.3f} -> {last:.3f} nats per byte in {args.steps} steps")
    print(f"training: {rate:,.0f} tokens/s")
    plot(losses, args.out / "loss.png")
    print(f"wrote {args.out / 'loss.png'}")

    prompt = jnp.asarray(np.frombuffer(b"One day in winter, ", np.uint8)[None].astype(np.int32))
    sample = (model, prompt, args.tokens, jax.random.key(1), 0.7)
    jax.block_until_ready(generate(*sample))
    start = time.perf_counter()
    tokens, logits = jax.block_until_ready(generate(*sample))
    rate = args.tokens / (time.perf_counter() - start)
    tale = bytes(np.asarray(jnp.concatenate((prompt, tokens), 1))[0].astype(np.uint8)).decode(errors="replace")
    print("\n" + tale.strip() + "\n")
    print(f"generation: {rate:,.0f} tokens/s, one sequence, {args.tokens} tokens")

    # What came token by token out of the cache is what one pass over the whole sequence gives.
    whole = jax.jit(lambda t: model(t))(jnp.concatenate((prompt, tokens), 1))[:, prompt.shape[1] - 1 : -1]
    error = float(jnp.max(jnp.abs(whole - logits)))
    print(f"largest difference between cached and whole-sequence logits: {error:.1e}")
    assert error < (1e-3 if jax.default_backend() == "cpu" else 5e-2), "the cache disagrees with the whole sequence"
    if not last < 0.5 * losses[0]:
        raise SystemExit(f"the loss did not fall: {losses[0]:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
