"""third_party/fetch.py: what it takes from an index, what it refuses, and that it says what to do."""

import hashlib
import importlib.util
import io
import pathlib
import tarfile

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "third_party" / "fetch.py"
FILES = {
    "LICENSE": "terms",
    "setup.py": "never run",
    "csrc/flash_attn/src/flash.h": "code",
    "csrc/flash_attn/src/flash_fwd.cu": "left out",
    "csrc/cutlass/LICENSE.txt": "terms",
    "csrc/cutlass/include/cute/arch/copy.hpp": "code",
    "csrc/cutlass/include/cutlass/cutlass.h": "code",
    "csrc/cutlass/include/cutlass/gemm/gemm.h": "left out",
}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, with an index of one archive in a folder, and another folder to unpack into."""
    if not SCRIPT.exists():
        pytest.skip("third_party/fetch.py is not in this tree")
    spec = importlib.util.spec_from_file_location("fetch", SCRIPT)
    fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, text in FILES.items():
            member = tarfile.TarInfo(f"flash_attn-{fetch.VERSION}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    page = tmp_path / "index" / "flash-attn"
    page.mkdir(parents=True)
    (page / fetch.ARCHIVE).write_bytes(data.getvalue())
    (page / "index.html").write_text(f'<a href="{fetch.ARCHIVE}#sha256=0">{fetch.ARCHIVE}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/index")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.delenv("FLASHJAX_FLASH_ATTN_SOURCE", raising=False)
    monkeypatch.setattr(fetch, "FOLDER", tmp_path / "flash-attn" / fetch.VERSION)
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(data.getvalue()).hexdigest())
    return fetch


def test_unpacks_what_is_compiled(script, capsys):
    script.main()
    assert capsys.readouterr().out.strip() == str(script.FOLDER)
    found = {str(path.relative_to(script.FOLDER)) for path in script.FOLDER.rglob("*") if path.is_file()}
    assert found == {name for name, text in FILES.items() if text in ("code", "terms")}
    (script.FOLDER / "csrc/flash_attn/src/flash.h").write_text("mine")
    script.main()
    assert (script.FOLDER / "csrc/flash_attn/src/flash.h").read_text() == "mine", "fetched again"


def test_refuses_another_archive(script, monkeypatch):
    monkeypatch.setattr(script, "SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="not the pinned one"):
        script.main()
    assert not script.FOLDER.exists()


def test_index_without_it(script, tmp_path):
    (tmp_path / "index/flash-attn/index.html").write_text("nothing")
    with pytest.raises(SystemExit, match=r"an index without this file.*FLASHJAX_FLASH_ATTN_SOURCE"):
        script.main()


def test_offline(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLASHJAX_FLASH_ATTN_SOURCE", str(tmp_path))
    with pytest.raises(SystemExit, match="does not hold csrc/flash_attn/src"):
        script.main()
    (tmp_path / "csrc/flash_attn/src").mkdir(parents=True)
    (tmp_path / "csrc/flash_attn/src/flash.h").write_text("")
    script.main()
    assert capsys.readouterr().out.strip() == str(tmp_path)
