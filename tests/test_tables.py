"""The two halves of every table agree, and what is forbidden in the package stays out of it."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import cases
import flashjax
from flashjax._slots import BIT, DIFFERENTIABLE, SLOTS
from flashjax._support import extension
from flashjax._types import Attrs

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(flashjax.__file__).parent
C_TYPE = {float: "float", int: "int64_t", bool: "bool"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def module(request):
    module = extension(request.param)
    if module is None and request.param == "cuda":
        pytest.skip("built without its CUDA module")
    assert module is not None, "flashjax was built without its CPU module"
    return module


def test_slots(module):
    assert [tuple(slot) for slot in module.slots] == [(slot.name, slot.type, slot.dims) for slot in SLOTS.values()]


def test_attributes(module):
    """In the same order, of the same types. `implementation` and `sequence` are Python's own and are never sent."""
    fields = [(field.name, C_TYPE.get(field.type)) for field in dataclasses.fields(Attrs)]
    assert fields[-2:] == [("implementation", None), ("sequence", None)]
    assert [tuple(attr) for attr in module.attrs] == fields[:-2]


def test_targets(module):
    assert set(module.targets) == {"flashjax_fwd", "flashjax_bwd"}
    assert len(tuple(module.ffi_api)) == 2


def test_slot_table():
    letters = set("bshdtgencpw")
    for slot in SLOTS.values():
        assert slot.type in ("T", "F", "F32", "S32")
        assert set(slot.letters) <= letters, slot.name
        assert slot.grad <= (slot.type != "S32"), f"{slot.name}: integers have no gradient"
        for dim in slot.dims.split():
            assert re.fullmatch(r"[a-z][?1]?", dim)
    assert sorted(BIT.values()) == [1 << i for i in range(len(SLOTS))]
    assert len(SLOTS) < 63, "the mask of present slots is an int64"


def test_every_differentiable_slot_has_a_case():
    """A slot with a gradient is an argument with cases; the backward tests compare every gradient of a case."""
    assert set(DIFFERENTIABLE) <= set(cases.DIFFERENTIABLE)
    seen = {name for case in cases.CASES if case.layout != "cached" for name in case.build().arrays}
    assert set(DIFFERENTIABLE) <= seen


def test_options_of_the_api_have_cases():
    """Every parameter of the public functions is set by some case, but for what other tests try."""
    elsewhere = {"return_lse", "return_softmax_lse", "deterministic", "implementation", "update_cache"}
    elsewhere |= {"sequence_layout", "strategy", "axis_name"}  # test_ring.py
    elsewhere |= {"value_dim"}  # test_decode.py
    for layout, name in cases.FUNCTION.items():
        parameters = set(inspect.signature(getattr(flashjax, name)).parameters)
        used = set()
        for case in cases.CASES:
            if case.layout == layout:
                inputs = case.build()
                used |= inputs.arrays.keys() | inputs.options.keys()
        assert used <= parameters
        assert parameters - used - elsewhere == set(), name


def test_public_names():
    """What `import flashjax` offers is public on purpose: everything else starts with an underscore."""
    public = {name for name in vars(flashjax) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(flashjax, name))}
    expected = {"flash_mha", "flash_mha_varlen", "flash_mha_with_kvcache", "SequenceLayout", "support", "Support"}
    assert public - modules >= expected
    for name in public - modules:
        assert getattr(flashjax, name).__doc__, f"{name} is public and undocumented"
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert all(name.startswith("_") for name in files if not hasattr(flashjax, name))


def test_signatures():
    """Names and positional order that callers of other packages already know."""
    positional = {
        "flash_mha": "q k v softmax_scale is_causal window_size",
        "flash_mha_varlen": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
        "softmax_scale is_causal window_size",
        "flash_mha_with_kvcache": "q k_cache v_cache k v cache_seqlens cache_batch_idx cache_leftpad page_table "
        "rotary_cos rotary_sin softmax_scale is_causal window_size num_splits return_softmax_lse",
    }
    for name, expected in positional.items():
        parameters = inspect.signature(getattr(flashjax, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == expected.split()


def test_docstrings_name_every_parameter():
    for name in ("flash_mha", "flash_mha_varlen", "flash_mha_with_kvcache"):
        function = getattr(flashjax, name)
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"\b{parameter}\b", function.__doc__), f"{name}: `{parameter}` is not documented"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_private_jax_only_in_compat(path):
    """JAX's private modules change without notice: one file holds every use of them, and one test watches it."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        private = [name for name in names if re.match(r"(jax|jaxlib)\.(_src|[a-z_.]*\._)", name)]
        assert not private or path.name == "_compat.py", f"{path.name}: {private}"


def test_import_starts_no_backend():
    """`jax.distributed.initialize` must still be possible after `import flashjax`."""
    script = (
        "import flashjax, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "import sys; assert 'flax' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_kernel_table_in_readme():
    """The support matrix in README is the one that the kernel table gives."""
    if not (ROOT / "docs" / "tables.py").exists():
        pytest.skip("docs/tables.py is not in this tree")
    done = subprocess.run(
        [sys.executable, "-m", "docs.tables", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cuda_rows_serve_the_core():
    """Calls that every training and decoding program makes are never declined by the CUDA module."""
    module = extension("cuda")
    if module is None:
        pytest.skip("built without its CUDA module")
    attrs = dataclasses.asdict(Attrs(scale=0.1, window_right=0))
    left_out = {row["id"] for row in module.kernels if not row["built"]}
    for dtype in ("bfloat16", "float16"):
        for direction in ("forward", "backward"):
            names = ["q", "k", "v"] + (["out", "lse", "dout", "dlse"] if direction == "backward" else [])
            for extra in ([], ["cu_seqlens_q", "cu_seqlens_k"], ["sinks"]):
                for d in (64, 128):
                    shapes = {name: [1, 256, 4, d] for name in names + extra}
                    why = module.why_not(direction, dtype, shapes, attrs)
                    assert not why or (left_out and "is not in this build" in why), why


def test_modules_import_alone():
    """Each file of the package says itself what it needs."""
    for path in PACKAGE.glob("*.py"):
        importlib.import_module(f"flashjax.{path.stem}" if path.stem != "__init__" else "flashjax")
