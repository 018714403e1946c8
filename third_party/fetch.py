#!/usr/bin/env python3
"""Fetches the FlashAttention-2 sources that the `upstream` kernels are compiled from, and prints their folder.

    python third_party/fetch.py

The archive comes from the package index that pip is configured for, is compared with the pin below, and what is
compiled of it is unpacked into third_party/flash-attn/ (ignored by git). Nothing is done where that is there already.
FLASHJAX_FLASH_ATTN_SOURCE=/path names the unpacked archive instead: nothing is fetched then.
"""

import hashlib
import html
import io
import os
import pathlib
import re
import ssl
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request

VERSION = "2.8.3.post2"
ARCHIVE = f"flash_attn-{VERSION}.tar.gz"
SHA256 = "d0f9f0b08a986cdeadbffcf5ec8b3a8f514366c68ad1853d3ab061bc83cc340b"
NEEDED = re.compile(
    r"LICENSE|csrc/flash_attn/src/[^/]*\.(h|cuh)|csrc/cutlass/(LICENSE\.txt|include/cute/.*"
    r"|include/cutlass/([^/]*|(arch|detail|layout|platform|transform/thread)/.*))"
)
FOLDER = pathlib.Path(__file__).resolve().parent / "flash-attn" / VERSION


def pip(*arguments: str) -> str:
    """What pip says; of the interpreter's own pip, also inside an isolated build, which has none on its path."""
    for isolation in (["-I"], []):
        run = subprocess.run([sys.executable, *isolation, *arguments], capture_output=True, text=True, check=False)
        if run.returncode == 0:
            return run.stdout
    raise SystemExit(
        f"{sys.executable} has no pip to ask for the package index: run third_party/fetch.py with a Python that has, "
        f"or set FLASHJAX_FLASH_ATTN_SOURCE to the unpacked {ARCHIVE}"
    )


def configuration() -> dict[str, str]:
    """pip's options; the environment wins over files, and a later file over an earlier one."""
    lines = re.findall(r"^(\S+?)\.([\w-]+)='(.*)'$", pip("-m", "pip", "config", "list"), re.MULTILINE)
    lines.sort(key=lambda line: {"global": 0, "install": 1, ":env:": 2}.get(line[0], -1))
    return {option: value for where, option, value in lines if where in ("global", "install", ":env:")}


def fetch() -> bytes:
    options = configuration()
    default = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    indexes = [options.get("index-url") or pip("-c", default).strip(), *options.get("extra-index-url", "").split()]
    context = ssl.create_default_context(cafile=options.get("cert"))
    told = []
    for index in indexes:
        page = index.rstrip("/") + "/flash-attn/" + ("index.html" if index.startswith("file:") else "")
        try:
            with urllib.request.urlopen(page, timeout=60, context=context) as response:
                links = re.findall(r'href="([^"]+)"', response.read().decode())
            link = next((x for x in map(html.unescape, links) if x.split("#")[0].split("/")[-1] == ARCHIVE), None)
            if link is None:
                told.append("an index without this file")
                continue
            with urllib.request.urlopen(urllib.parse.urljoin(page, link), timeout=300, context=context) as response:
                data = response.read()
        except OSError as error:
            told.append(str(error))
            continue
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise SystemExit(f"{ARCHIVE} is not the pinned one: its sha256 is {hashlib.sha256(data).hexdigest()}")
        return data
    raise SystemExit(
        f"could not fetch {ARCHIVE} from pip's package index ({'; '.join(told)}). "
        "Set FLASHJAX_FLASH_ATTN_SOURCE to the unpacked archive to build offline."
    )


def unpack(data: bytes) -> None:
    scratch = FOLDER.with_name(f"{FOLDER.name}.{os.getpid()}")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            name = pathlib.PurePosixPath(*pathlib.PurePosixPath(member.name).parts[1:])
            if member.isfile() and NEEDED.fullmatch(str(name)) and ".." not in name.parts:
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).write_bytes(archive.extractfile(member).read())
    scratch.rename(FOLDER)  # all of it, or nothing


def main() -> None:
    given = os.environ.get("FLASHJAX_FLASH_ATTN_SOURCE")
    folder = pathlib.Path(given).expanduser().resolve() if given else FOLDER
    if not given and not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        unpack(fetch())
    if not (folder / "csrc/flash_attn/src/flash.h").exists():
        raise SystemExit(f"{folder} does not hold csrc/flash_attn/src: it should be the unpacked {ARCHIVE}")
    print(folder)


if __name__ == "__main__":
    main()
