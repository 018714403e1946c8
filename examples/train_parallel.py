"""Trains a small causal language model data- and sequence-parallel: a batch over some devices, a sequence over others.

Attention finds the sharding of its arguments and becomes a ring; nothing else in the model knows that there is more
than one device. The order of the sequence is zigzag, so that every device has the same work under the causal mask:
tokens, targets and positions are reordered once, where the data come from.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/train_parallel.py [--data 2] [--steps 20]
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashjax

DATA = pathlib.Path(__file__).parent / "data" / "tales.txt"
HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 16, 2
WIDTH = HEADS * DIM


def init(key):
    """Parameters: a list of layers, each a dict of matrices, and the embedding of bytes."""

    def matrix(key, *shape):
        return jax.random.normal(key, shape) * shape[0] ** -0.5

    shapes = {
        "qkv": (WIDTH, (HEADS + 2 * KV_HEADS) * DIM),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }
    keys = iter(jax.random.split(key, LAYERS * len(shapes) + 1))
    layers = [{name: matrix(next(keys), *shape) for name, shape in shapes.items()} for _ in range(LAYERS)]
    return {"layers": layers, "embed": jax.random.normal(next(keys), (256, WIDTH)) * 0.1}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def rotate(x, positions):
    """Rotary embedding of x (b, s, heads, d), whose rows are at these positions (s,) of the sequence."""
    angles = positions[:, None] * 10_000.0 ** (-jnp.arange(0, DIM, 2) / DIM)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    x0, x1 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((x0 * cos - x1 * sin, x0 * sin + x1 * cos), axis=-1)


def logits_of(parameters, tokens, positions, layout):
    x = parameters["embed"][tokens]
    for layer in parameters["layers"]:
        qkv = (norm(x) @ layer["qkv"]).reshape(*tokens.shape, -1, DIM)
        q, k, v = jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=2)
        q, k = rotate(q, positions), rotate(k, positions)
        y = flashjax.flash_mha(q, k, v, is_causal=True, sequence_layout=layout)
        x = x + y.reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
    return norm(x) @ parameters["embed"].T


def loss_of(parameters, batch, layout):
    logits = logits_of(parameters, batch["tokens"], batch["positions"], layout)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def batches(batch, length, layout, seed=0):
    """Batches whose sequences are in the order of the layout."""
    text = np.frombuffer(DATA.read_bytes(), np.uint8)
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(text) - length - 1, batch)
        rows = np.stack([text[i : i + length + 1] for i in starts]).astype(np.int32)
        yield {
            "tokens": layout.reorder(rows[:, :-1]),
            "targets": layout.reorder(rows[:, 1:]),
            "positions": layout.positions(length),
        }


def make_step(layout, optimizer):
    def step(parameters, state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(parameters, batch, layout)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def train(devices, data_parallel, steps, batch=4, length=256):
    """The loss of every step, trained on these devices: `data_parallel` groups of them, each with whole sequences."""
    sequence_parallel = len(devices) // data_parallel
    mesh = jax.sharding.Mesh(
        np.asarray(devices[: data_parallel * sequence_parallel]).reshape(data_parallel, sequence_parallel),
        ("data", "seq"),
        axis_types=(AxisType.Auto,) * 2,
    )
    layout = flashjax.SequenceLayout("zigzag", parts=sequence_parallel)
    specs = {"tokens": P("data", "seq"), "targets": P("data", "seq"), "positions": P("seq")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    optimizer = optax.adamw(3e-3)
    parameters = jax.device_put(init(jax.random.key(0)), NamedSharding(mesh, P()))
    state = optimizer.init(parameters)
    step = make_step(layout, optimizer)
    losses = []
    for _, rows in zip(range(steps), batches(batch, length, layout), strict=False):
        parameters, state, loss = step(parameters, state, jax.device_put(rows, shardings))
        losses.append(float(loss))
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=2, help="over how many devices the batch is split")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()

    devices = jax.devices()
    if len(devices) % args.data:
        parser.error(f"--data {args.data} does not divide the {len(devices)} devices")
    many = train(devices, args.data, args.steps, args.batch, args.length)
    one = train(devices[:1], 1, args.steps, args.batch, args.length)
    print(f"step  {args.data} x {len(devices) // args.data} devices   1 device")
    for i, (x, y) in enumerate(zip(many, one, strict=True)):
        print(f"{i:4}  {x:13.5f}  {y:9.5f}")
    print(f"largest difference: {max(abs(x - y) for x, y in zip(many, one, strict=True)):.1e}")


if __name__ == "__main__":
    main()
