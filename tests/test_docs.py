"""What the documentation shows runs, and says what it says."""

import doctest
import inspect
import pathlib
import re

import jax
import pytest

import flashjax
import oracle

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]


@pytest.mark.parametrize(
    "name", ["flash_mha", "flash_mha_varlen", "flash_mha_with_kvcache", "SequenceLayout", "support"]
)
def test_docstring_example(name):
    function = getattr(flashjax, name)
    tests = doctest.DocTestFinder().find(function, name)
    assert sum(len(test.examples) for test in tests) > 0
    for test in tests:
        result = doctest.DocTestRunner(verbose=False).run(test)
        assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page):
    """The Python blocks of a page, one after the other in one namespace."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    if any("make_mesh" in block for block in blocks) and jax.device_count() < 8:
        pytest.skip("its meshes have 8 devices")
    namespace = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    """A file of this repository that a page names in `code` is there."""
    for path in re.findall(r"`((?:python|csrc|tests|bench|docs|examples)/[\w./*-]+)`", page.read_text()):
        if not any(mark in path for mark in "*<"):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_error_bound_is_the_documented_one():
    """docs/numerics.md states the rule of tests/oracle.py in numbers."""
    page = ROOT / "docs" / "numerics.md"
    text = page.read_text()
    source = inspect.getsource(oracle.compare)
    (biggest, big_floor), (mean, mean_floor) = re.findall(r"np\.(?:max|mean), ([\d.]+), ([\d.]+)\)", source)
    assert float(re.search(r"max  \|R - E\| <= ([\d.]+) max", text)[1]) == float(biggest)
    assert float(re.search(r"mean \|R - E\| <= ([\d.]+) mean", text)[1]) == float(mean)
    assert [float(x) for x in re.findall(r"\+ ([\d.]+) floor\(", text)] == [float(big_floor), float(mean_floor)]
