"""cmake/archs.cmake: which rows of the kernel table a list of archs builds, and for what."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1]
CMAKE = shutil.which("cmake", path=pathlib.Path(sys.executable).parent) or shutil.which("cmake")
UPSTREAM, HOPPER, PORTABLE = ("upstream", 80, 999), ("sm90", 90, 90), ("simt", 75, 999)

pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")


def built_for(archs: str, row: tuple, tmp_path) -> tuple[list[str], str]:
    """What nvcc is asked for, and what the dispatcher is told."""
    script = tmp_path / "script.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.16...4.4)\n"  # as CMakeLists.txt has it: without, old meanings of if() hold
        f'set(FLASHJAX_CUDA_ARCHS "{archs}")\n'
        f'include("{FOLDER.as_posix()}/cmake/archs.cmake")\n'
        f"flashjax_gencode(gencode held {' '.join(map(str, row))})\n"
        'message(STATUS "${gencode} ${held}")\n'
    )
    run = subprocess.run([CMAKE, "-P", script], capture_output=True, text=True, check=True)
    return re.findall(r",code=(\w+)", run.stdout), run.stdout.split()[-1] if "code" in run.stdout else ""


@pytest.mark.parametrize(
    ("archs", "row", "codes", "held"),
    [
        ("90a", UPSTREAM, [], ""),
        ("75", UPSTREAM, [], ""),
        ("80;86;89;90;120", UPSTREAM, ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"], "80,86,89,90,120,"),
        ("90a;80", UPSTREAM, ["sm_80"], "80,"),
        ("90;90a", UPSTREAM, ["sm_90"], "90,"),
        ("90;90a", HOPPER, ["sm_90a"], "90,"),
        ("80;86;89;90;120", HOPPER, [], ""),
        ("90a", PORTABLE, ["sm_90", "compute_75"], "90,75+,"),
        ("80;120", PORTABLE, ["sm_80", "sm_120", "compute_75"], "80,120,75+,"),
    ],
)
def test_archs(archs, row, codes, held, tmp_path):
    assert built_for(archs, row, tmp_path) == (codes, held)
