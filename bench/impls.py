"""The implementations that are compared: one class each, and the table IMPLS.

An implementation says in `prepare(cell)` how it computes a cell: a function of n that enqueues n calls and blocks. It
raises NotImplementedError for what it does not have. A package that is not installed is reported as absent.

The backward is the pull-back alone, given what the forward saved: jax.vjp's function, jitted by itself, or
torch.autograd.grad on a kept graph.
"""

import dataclasses
import functools
import importlib
import os

import numpy as np

from bench.cells import Cell

CHAIN = 64  # calls in one program in mode "chain"
STEPS = 8  # likewise in mode "decode", as a decoding program has them, where out has the shape of q


def steps_of(cell: Cell) -> int:
    """Decode steps in one program: each takes the result of the last as its queries."""
    return STEPS if cell.mode == "decode" and cell.d == cell.e else 1


@functools.lru_cache(maxsize=12)  # of three shapes
def _normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def _generator():
    import jax

    return jax.jit(
        lambda seed, shape, dtype: jax.random.normal(jax.random.key(seed), shape, dtype), static_argnums=(1, 2)
    )


@functools.lru_cache(maxsize=5)  # those of one cell: everybody is timed on the same arrays
def _operand(shape, dtype, seed):
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":  # the same values as torch has
        return jnp.asarray(_normal(shape, seed), dtype)
    return _generator()(seed, shape, dtype)


def _extents(cell):
    return {
        "q": (cell.b, cell.s, cell.h, cell.d),
        "k": (cell.b, cell.t, cell.g, cell.d),
        "v": (cell.b, cell.t, cell.g, cell.e),
        "dout": (cell.b, cell.s, cell.h, cell.e),
        "bias": tuple(1 if x == "1" else getattr(cell, x) for x in cell.bias.split()),
    }


def _cu_seqlens(cell):
    import jax.numpy as jnp

    return jnp.asarray(np.concatenate(([0], np.cumsum(cell.lengths))).astype(np.int32))


def _mask(cell, causal="is_causal", window="window_size"):
    """The options of a cell's mask, by a package's names for them; a window is causal too."""
    options = {causal: cell.mask in ("causal", "window")}
    return options | {window: (cell.window, 0)} if cell.mask == "window" else options


def _bias(cell):
    return [_operand(_extents(cell)["bias"], cell.dtype, 4)] if cell.bias else []


class Jax:
    """What is written in JAX: subclasses give the function of (q, k, v) for a cell."""

    package = "jax"
    takes_bias = False

    def load(self):
        self.module = importlib.import_module(self.package)

    def function(self, cell: Cell):
        """(f, more): out = f(q, k, v, *more), with arrays `more`, of which only a bias gets a gradient."""
        raise NotImplementedError(f"no function for mode {cell.mode}")

    def decode(self, cell: Cell):
        """(f, arrays): out = f(*arrays)."""
        raise NotImplementedError("no KV cache")

    @staticmethod
    def inputs(cell, names="q k v"):
        shapes = _extents(cell)
        return [_operand(shapes[name], cell.dtype, seed) for seed, name in enumerate(names.split())]

    def prepare(self, cell):
        import jax

        if cell.deterministic and not isinstance(self, Flashjax):
            raise NotImplementedError("no such option in the public function")
        if cell.bias and not self.takes_bias:
            raise NotImplementedError("no bias in the public function")
        if cell.mode == "decode":
            f, arrays = self.decode(cell)

            def steps(q, *rest):
                for _ in range(steps_of(cell)):
                    q = f(q, *rest)
                return q

            call = functools.partial(jax.jit(steps), *arrays)
        elif cell.mode == "chain":
            f, more = self.function(dataclasses.replace(cell, mode="fwd"))
            q, k, v = self.inputs(cell)

            def chain(q, k, v, *more):
                for _ in range(CHAIN):
                    q = f(q, k, v, *more)
                return q

            call = functools.partial(jax.jit(chain), q, k, v, *more)
        else:
            f, more = self.function(cell)
            q, k, v, dout = self.inputs(cell, "q k v dout")
            if cell.packed:
                dout = dout[0]
                q, k, v = q[0], k[0], v[0]
            if cell.mode == "fwd":
                call = functools.partial(jax.jit(f), q, k, v, *more)
            else:
                fixed = len(more) if cell.frozen or not cell.bias else 0
                moving = [q, k, v, *more[: len(more) - fixed]]
                rest = more[len(more) - fixed :]
                _, pull = jax.jit(lambda xs, rest: jax.vjp(lambda *xs: f(*xs, *rest), *xs))(moving, rest)
                call = functools.partial(jax.jit(lambda pull, dout: pull(dout)), pull, dout)

        def run(n):
            for _ in range(n):
                out = call()
            jax.block_until_ready(out)

        return run


class Flashjax(Jax):
    package = "flashjax"
    takes_bias = True

    def __init__(self, implementation=None):
        self.implementation = implementation

    def function(self, cell):
        options = _mask(cell) | {"deterministic": cell.deterministic, "implementation": self.implementation}
        if cell.packed:
            options |= {f"max_seqlen_{x}": max(cell.lengths) for x in "qk"}
            return lambda q, k, v, cu: self.module.flash_mha_varlen(q, k, v, cu, **options), [_cu_seqlens(cell)]
        if cell.mask == "segments":
            import jax.numpy as jnp

            ids = jnp.asarray(np.repeat(np.arange(len(cell.lengths)), cell.lengths)[None].astype(np.int32))
            return lambda q, k, v, ids: self.module.flash_mha(
                q, k, v, segment_ids=ids, **options | {"is_causal": True}
            ), [ids]
        return lambda q, k, v, bias=None: self.module.flash_mha(q, k, v, bias=bias, **options), _bias(cell)

    def decode(self, cell, **options):
        import jax.numpy as jnp

        q, k, *v = self.inputs(cell, "q k" if cell.shared else "q k v")
        more = {"cache_seqlens": jnp.full((cell.b,), cell.t, jnp.int32)}
        if cell.shared:
            options |= {"value_dim": cell.e}
        if cell.page:
            pages = cell.t // cell.page
            table = np.random.default_rng(0).permutation(cell.b * pages).reshape(cell.b, pages)
            more["page_table"] = jnp.asarray(table.astype(np.int32))
            k, *v = (x.reshape(cell.b * pages, cell.page, *x.shape[2:]) for x in (k, *v))
        causal = cell.mask == "causal"
        return (
            lambda q, k, v, more: self.module.flash_mha_with_kvcache(q, k, v, is_causal=causal, **options, **more),
            [q, k, v[0] if v else None, more],
        )


class JaxNN(Jax):
    """jax.nn.dot_product_attention with one of its implementations."""

    package = "jax.nn"
    takes_bias = True

    def __init__(self, implementation):
        self.implementation = implementation

    def load(self):
        super().load()
        if self.implementation == "cudnn":
            import jax

            if jax.default_backend() != "gpu":
                raise ImportError("needs a GPU")

    def call(self, *args, **kwargs):
        return self.module.dot_product_attention(*args, implementation=self.implementation, **kwargs)

    def function(self, cell):
        if cell.packed or cell.mask == "segments":
            raise NotImplementedError("no packed sequences in the public function")
        options = _mask(cell, window="local_window_size")
        return lambda q, k, v, bias=None: self.call(q, k, v, bias, **options), _bias(cell)

    def decode(self, cell):
        if cell.page:
            raise NotImplementedError("no paged cache in the public function")
        if cell.mask == "causal":
            raise NotImplementedError("causal is aligned top-left")
        import jax.numpy as jnp

        lengths = jnp.full((cell.b,), cell.t, jnp.int32)
        return lambda q, k, v, n: self.call(q, k, v, key_value_seq_lengths=n), [*self.inputs(cell), lengths]


class Dew(Jax):
    """dew-flash-attn: FlashAttention-3 on Hopper, -2 elsewhere."""

    package = "dew_flash_attn"

    def function(self, cell):
        options = _mask(cell)
        if cell.packed:
            longest, cu = max(cell.lengths), _cu_seqlens(cell)
            return lambda q, k, v, cu: self.module.flash_mha_varlen(q, k, v, cu, longest, **options), [cu]
        if cell.mask == "segments":
            raise NotImplementedError("no segment ids")
        return lambda q, k, v: self.module.flash_mha(q, k, v, **options), []


class Fa4(Jax):
    """fa4-jax: FlashAttention-4 in CuTe-DSL."""

    package = "fa4_jax"

    def function(self, cell):
        options = _mask(cell, "causal")
        if cell.packed:
            return lambda q, k, v, cu: self.module.flash_attn_varlen(q, k, v, cu, cu, **options), [_cu_seqlens(cell)]
        if cell.mask == "segments":
            raise NotImplementedError("document masks skip no blocks")
        return lambda q, k, v: self.module.flash_attn(q, k, v, **options), []


class Kyutai(Jax):
    """flash-attn3-jax; its wheel has head dimension 128 only."""

    package = "flash_attn3_jax"

    def function(self, cell):
        options = _mask(cell)
        if cell.d > 128 or cell.e != cell.d:
            raise NotImplementedError("head dimension up to 128, the same for q and v")
        if cell.packed:
            options |= {f"max_seqlen_{x}": max(cell.lengths) for x in "qk"}
            return lambda q, k, v, cu: self.module.flash_mha_varlen(q, k, v, cu, cu, **options), [_cu_seqlens(cell)]
        if cell.mask == "segments":
            raise NotImplementedError("no segment ids")
        return lambda q, k, v: self.module.flash_mha(q, k, v, **options), []

    def decode(self, cell):
        """Its default is not to split the keys; here as often as makes a block for each of 132 multiprocessors."""
        return Flashjax.decode(self, cell, num_splits=max(1, min(32, 132 // (cell.b * cell.g))))


class Torch:
    """torch's scaled_dot_product_attention, its flash kernel; on CUDA FlashAttention-2.

    Inputs (b, h, s, d), as it wants them; on CUDA views of (b, s, h, d), as the kernel wants them.
    """

    package = "torch"

    def __init__(self, device="cpu"):
        self.device = device

    def load(self):
        self.module = importlib.import_module(self.package)
        self.module.set_num_threads(os.cpu_count())
        self.module.zeros(1, device=self.device)

    def prepare(self, cell):
        torch = self.module
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if cell.mode not in ("fwd", "bwd") or cell.mask not in ("full", "causal") or cell.packed or cell.h != cell.g:
            raise NotImplementedError("compared on dense attention only")
        if cell.deterministic or cell.bias:
            raise NotImplementedError("compared as it comes")
        shapes, dtype = _extents(cell), getattr(torch, cell.dtype)
        on_cpu = self.device == "cpu"
        lay = torch.Tensor.contiguous if on_cpu else lambda x: x
        wait = (lambda: None) if on_cpu else torch.cuda.synchronize
        q, k, v, dout = (
            lay(torch.from_numpy(_normal(shapes[name], seed)).to(self.device, dtype).transpose(1, 2))
            for seed, name in enumerate(("q", "k", "v", "dout"))
        )

        def attention():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=cell.mask == "causal")

        if cell.mode == "fwd":

            def run(n):
                with torch.no_grad():
                    for _ in range(n):
                        attention()
                wait()

            return run
        for x in (q, k, v):
            x.requires_grad_()
        out = attention()

        def run(n):
            for _ in range(n):
                torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            wait()

        return run


IMPLS = {  # in the order of the tables' columns; ours first
    "flashjax": Flashjax(),
    "jax.nn-xla": JaxNN("xla"),
    "jax.nn-cudnn": JaxNN("cudnn"),
    "flashjax-upstream": Flashjax("upstream"),
    "torch-sdpa-cpu": Torch(),
    "torch-sdpa-cuda": Torch("cuda"),
    "dew-flash-attn": Dew(),
    "fa4-jax": Fa4(),
    "flash-attn3-jax": Kyutai(),
}

PEERS = {  # suite prefix -> who is asked for; whoever cannot be loaded is recorded as absent
    "cpu": ["flashjax", "jax.nn-xla", "torch-sdpa-cpu"],
    "smoke": ["flashjax", "jax.nn-xla", "torch-sdpa-cpu"],
    "upstream": ["flashjax-upstream", "torch-sdpa-cuda"],
    "h200": ["flashjax", "jax.nn-cudnn", "dew-flash-attn", "fa4-jax", "flash-attn3-jax"],
}
