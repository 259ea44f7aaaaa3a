"""The steps of a stage, carried out in a root: RUN in a chroot, COPY by hand."""

import shutil
import subprocess
from pathlib import Path

from imaging.dockerfile import Stage

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class StepError(Exception):
    """A step failed; the text is the instruction and the end of what it said."""


def make_context(checkout: Path, ignore: Path, context: Path) -> None:
    """Copy to *context* what of *checkout* an engine would be sent: what *ignore* takes back from its ``*``."""
    lines = [line for line in ignore.read_text().splitlines() if line and not line.startswith("#")]
    if lines[0] != "*" or lines[-1] != "**/__pycache__":
        raise StepError(f"{ignore.name}: expected * first and **/__pycache__ last, and names taken back between them")
    for line in lines[1:-1]:
        found, copy = checkout / line.removeprefix("!"), context / line.removeprefix("!")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(found, copy)


def carry_out(stage: Stage, root: Path, *, context: Path, roots: dict[str, Path], environ: dict[str, str]) -> None:
    """Do in *root* what *stage* says; *roots* are the earlier stages, *context* what an engine would be sent."""
    folder = "/"
    for name, rest in stage.instructions:
        match name:
            case "RUN":
                print(f"  RUN {rest[:100]}", flush=True)
                _run(rest, root, folder, environ)
            case "WORKDIR":
                folder = rest
                (root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "COPY":
                print(f"  COPY {rest}", flush=True)
                _copy(rest, root, folder, context, roots)
            case _:  # about the image, not about its files
                pass


def _run(command: str, root: Path, folder: str, environ: dict[str, str]) -> None:
    inside = ["--mount", "--pid", "--fork", "--kill-child", "--root", str(root), "--mount-proc", "--wd", folder]
    done = subprocess.run(
        ["unshare", *inside, "/bin/sh", "-c", command],
        env={"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive", **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise StepError(f"RUN {command}\n{(done.stdout + done.stderr)[-2000:]}")


def _copy(rest: str, root: Path, folder: str, context: Path, roots: dict[str, Path]) -> None:
    words = rest.split()
    source = context
    if words[0].startswith("--from="):
        source = roots[words.pop(0).removeprefix("--from=")]
    *names, target = words
    for name in names:
        found = source / name.lstrip("/")
        place = root / Path(folder, target).relative_to("/")  # an absolute target takes the place of the folder
        if target.endswith("/"):
            place /= found.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if found.is_dir():
            shutil.copytree(found, place, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(found, place)
