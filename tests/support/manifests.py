"""The objects that Kustomize renders from deploy/kubernetes, and from overlays that tests write."""

import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from servers import ServerError
from servers.binaries.debian_program import KUBECTL

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())

# The base of the shipped alerts' runbook_url.
RUNBOOKS = "https://git.example.com/closeout/blob/main/deploy/prometheus/README.md"

Object = dict[str, Any]


@cache
def overlay(name: str) -> tuple[Object, ...]:
    """Return the objects of the shipped overlay *name*."""
    return _built(KUBERNETES / "overlays" / name)


def changed(
    folder: Path,
    *,
    components: Iterable[str] = (),
    settings: Iterable[str] = (),
    runbooks: str = "https://git.internal/README.md",
    **fields: Any,
) -> tuple[Object, ...]:
    """Return the objects of base, *components*, *settings* and Kustomize's *fields*.

    The overlay is written into a copy below *folder*; its alerts' runbook_url starts with *runbooks*.
    """
    copy = folder / "kubernetes"
    shutil.copytree(KUBERNETES, copy, dirs_exist_ok=True)
    mine = copy / "overlays" / "test"
    mine.mkdir(exist_ok=True)
    shipped = (KUBERNETES / "overlays" / "production" / "runbooks.yaml").read_text()
    (mine / "runbooks.yaml").write_text(shipped.replace(RUNBOOKS, runbooks))
    kustomization: Object = {
        "resources": ["../../base", "runbooks.yaml"],
        "components": [f"../../components/{name}" for name in components],
        **fields,
    }
    if literals := list(settings):
        kustomization["configMapGenerator"] = [
            {"name": "closeout-settings", "behavior": "merge", "literals": literals},
        ]
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return _built(mine)


def one(objects: Iterable[Object], kind: str, component: str | None = None) -> Object:
    """Return the only object of *kind*, among those of *component* if it is given."""
    (found,) = (o for o in objects if o["kind"] == kind and component in {None, component_of(o)})
    return found


def component_of(an_object: Object) -> str:
    """Return the label by which ``kubectl apply -l`` selects."""
    return str(an_object["metadata"].get("labels", {}).get("app.kubernetes.io/component", ""))


def pods(objects: Iterable[Object]) -> dict[str, Object]:
    """Return each pod template by its component: the label that NetworkPolicies see."""
    templates = [o["spec"]["template"] for o in objects if o["kind"] in {"Deployment", "Job"}]
    return {t["metadata"]["labels"]["app.kubernetes.io/component"]: t for t in templates}


def container(template: Object) -> Object:
    """Return a pod template's only container."""
    (only,) = template["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def environment(objects: Iterable[Object], component: str) -> dict[str, str]:
    """Return the environment that the pods of *component* start with."""
    objects = list(objects)
    found = container(pods(objects)[component])
    maps = {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "ConfigMap"}
    values: dict[str, str] = {}
    for source in found.get("envFrom", []):
        values |= maps[source["configMapRef"]["name"]]
    return values | {variable["name"]: variable["value"] for variable in found.get("env", [])}


def kustomize(folder: Path) -> str:
    """Return the output of ``kubectl kustomize`` for *folder*; raise ServerError with its message."""
    program = KUBECTL.find() / "usr/bin/kubectl"
    done = subprocess.run([program, "kustomize", folder], capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:  # a deprecated field only causes a warning
        raise ServerError(f"kubectl kustomize {folder}: {done.stderr.strip()}")
    return done.stdout


def _built(folder: Path) -> tuple[Object, ...]:
    return tuple(yaml.safe_load_all(kustomize(folder)))
