"""flashjax in flax's own attention layer: nnx.MultiHeadAttention takes it as `attention_fn`.

python examples/drop_in_flax.py
"""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

import flashjax


def attention_fn(query, key, value, *, mask=None, dropout_rate=0.0, deterministic=True, dtype=None, **unused):
    """nnx.dot_product_attention by flashjax. Masks become a bias; dropout is refused rather than left out."""
    if dropout_rate and not deterministic:
        raise NotImplementedError("flashjax has no attention dropout")
    query, key, value = (x if dtype is None else x.astype(dtype) for x in (query, key, value))
    bias = None if mask is None else jnp.where(mask, 0.0, -jnp.inf)
    return flashjax.flash_mha(query, key, value, is_causal=unused.get("is_causal", False), bias=bias)


def layer(**options):
    return nnx.MultiHeadAttention(
        num_heads=8, num_kv_heads=2, in_features=256, decode=False, rngs=nnx.Rngs(0), **options
    )


def main():
    x = jax.random.normal(jax.random.key(0), (2, 192, 256))
    ours, theirs = layer(attention_fn=attention_fn), layer()
    loss = nnx.jit(nnx.value_and_grad(lambda model, x: (model(x, is_causal=True) ** 2).mean()))
    (a, grads_a), (b, grads_b) = loss(ours, x), loss(theirs, x)
    difference = max(
        float(jnp.abs(p - q).max()) for p, q in zip(jax.tree.leaves(grads_a), jax.tree.leaves(grads_b), strict=True)
    )
    print(f"loss: {float(a):.6f} with flashjax, {float(b):.6f} with flax; gradients differ by {difference:.1e} at most")
    assert abs(float(a - b)) < 1e-5
    assert difference < 1e-5


if __name__ == "__main__":
    main()
