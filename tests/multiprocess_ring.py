"""One of two processes of test_ring.py: rings over the devices of both, against one device. Arguments: index, port."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashjax


def run(q, k, v, **options):
    def loss(q, k, v):
        out = flashjax.flash_mha(q, k, v, is_causal=True, **options)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def main():
    index, port = int(sys.argv[1]), sys.argv[2]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    assert jax.device_count() == 8
    assert jax.local_device_count() == 4
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(2, 32, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
    want = [np.asarray(x) for x in jax.jit(run)(*arrays)]
    for shape, spec in (((1, 8), P(None, "seq")), ((2, 4), P(None, ("seq", "data")))):
        mesh = jax.make_mesh(shape, ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
        layout = flashjax.SequenceLayout("zigzag", 8)
        sharding = NamedSharding(mesh, spec)
        placed = [
            jax.make_array_from_callback(x.shape, sharding, functools.partial(lambda x, at: x[at], layout.reorder(x)))
            for x in arrays
        ]
        got = jax.jit(functools.partial(run, sequence_layout=layout))(*placed)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(layout.restore(process_allgather(x, tiled=True)), y, 3e-5, 3e-5)
    print("the ring agrees")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
