"""This machine's pip settings for a build: package indexes, proxy and certificate authorities."""

import re
import subprocess
import sys
from pathlib import Path

# Settings that name where packages come from. Others, such as constraints, are not the image's.
_KEPT = {"index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout", "cert"}
_SETTING = re.compile(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", re.MULTILINE)
_LOCAL_FOLDER = re.compile(r"(?:file://)?(/[^\s\\]+)")
_CERTIFICATES = "/run/closeout-certificates.pem"


def pip_mounts(folder: Path) -> list[str]:
    """Return buildah's options that mount this machine's pip settings into each RUN; none of them enters the image.

    A pip.conf with the settings is written below *folder*.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listed = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    settings = {key: value for key, value in _SETTING.findall(listed) if key in _KEPT}
    mounted: dict[Path, str] = {}
    if certificates := settings.pop("cert", None):
        settings["cert"] = _CERTIFICATES
        mounted[Path(certificates)] = _CERTIFICATES
    for key in settings.keys() & {"index-url", "extra-index-url", "find-links"}:
        # The links of an index lead out of its folder "simple".
        found = (Path(name.removesuffix("/simple")) for name in _LOCAL_FOLDER.findall(settings[key]))
        mounted |= {path: str(path) for path in found if path.is_dir()}
    file = folder / "pip.conf"
    lines = (f"{key} = {value.replace(chr(92) + 'n', ' ')}" for key, value in settings.items())
    file.write_text("\n".join(["[global]", *lines, ""]))
    mounted[file] = "/etc/pip.conf"
    return [word for source, target in mounted.items() for word in ("--volume", f"{source.resolve()}:{target}:ro")]
