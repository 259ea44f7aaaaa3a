"""The command behind scripts/image-proof."""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.messages import bodies, fill
from servers import PostgresServer, ServerError
from servers.ports import Port
from servers.service_pair import DATABASE, end_on_signals, running_pair

from imaging.building import StepError, carry_out, make_context
from imaging.dockerfile import DockerfileError, read_dockerfile
from imaging.roots import lend_the_registry_s_settings, make_build_root, make_python_root
from imaging.running import Image, ProofError, first_process, http_state, status_of, stop, until

CHECKOUT = Path(__file__).resolve().parents[2]
RUNS = 20_000  # of which a worker is still busy when the signal comes
SECRETS = "/run/secrets/closeout"


def main(arguments: list[str]) -> int:
    """Build and run; return 0 if everything was as it must be."""
    parser = argparse.ArgumentParser("scripts/image-proof", description=_DESCRIPTION)
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="build here and leave the roots; used again if there"
    )
    options = parser.parse_args(arguments)
    if os.getuid() != 0 or not shutil.which("unshare"):
        print("image-proof: needs root and unshare (util-linux), for chroot and mounts of its own", file=sys.stderr)
        return 2
    end_on_signals()
    with tempfile.TemporaryDirectory(prefix="closeout-image-", ignore_cleanup_errors=True) as scratch:
        try:
            image = _build(Path(options.keep or scratch).absolute())
            _prove(image, Path(scratch))
        except (DockerfileError, StepError, ProofError, ServerError) as error:
            print(f"image-proof: {error}", file=sys.stderr)
            return 1
    return 0


_DESCRIPTION = """Carry out deploy/Dockerfile without a container engine, in roots made of Debian's packages, and run
the result as Kubernetes would: read-only, as user 65532 without rights, secrets as files. What it cannot show: that the
base images of the registry are what these roots are, and that an engine reads the Dockerfile as this does."""


def _build(folder: Path) -> Image:
    build, last = read_dockerfile(CHECKOUT / "deploy/Dockerfile")
    roots, scratch = {"build": folder / "build", "last": folder / "last"}, folder / "scratch"
    if not roots["last"].exists():
        scratch.mkdir(parents=True)
        began = time.monotonic()
        print(f"in the place of {build.image}: debootstrap", flush=True)
        make_build_root(roots["build"], scratch)
        make_context(CHECKOUT, CHECKOUT / "deploy/Dockerfile.dockerignore", scratch / "context")
        environ = lend_the_registry_s_settings(roots["build"])
        carry_out(build, roots["build"], context=scratch / "context", roots={}, environ=environ)
        print(f"in the place of {last.image}: Debian's packages, unpacked", flush=True)
        roots["last"].mkdir()
        make_python_root(roots["last"], scratch)
        carry_out(last, roots["last"], context=scratch / "context", roots=roots, environ={})
        print(f"built in {time.monotonic() - began:.0f} s", flush=True)
    return Image(roots["last"], last)


def _prove(image: Image, scratch: Path) -> None:
    shells = [name for name in ("sh", "bash", "dash", "busybox") if (image.root / "usr/bin" / name).exists()]
    if shells:
        raise ProofError(f"the image has {shells}")
    print("no shell in it", flush=True)
    with running_pair(scratch / "servers", "4", management=False) as (postgres, _, addresses):
        image.give_secrets({"database-url": addresses["DATABASE_URL"], "amqp-url": addresses["AMQP_URL"]})
        environ = {"DATABASE_URL_FILE": f"{SECRETS}/database-url", "AMQP_URL_FILE": f"{SECRETS}/amqp-url"}
        print(image.run(["migrate"], environ, scratch / "migrate.log"))
        print(image.run(["topology"], environ, scratch / "topology.log").splitlines()[-1], flush=True)
        doctor = image.run(["doctor"], {**environ, "TRANSACTION_COORDINATOR_ENABLED": "true"}, scratch / "doctor.log")
        print(f"doctor: {doctor.splitlines()[-1]}", flush=True)
        asyncio.run(fill(addresses["AMQP_URL"], bodies(RUNS, seed=1)))
        _work_and_stop(image, environ, postgres, scratch)
        _end_at_once(image, environ, scratch)


def _work_and_stop(image: Image, environ: dict[str, str], postgres: PostgresServer, scratch: Path) -> None:
    port, log = Port().number, scratch / "worker.log"
    more = {"HTTP_PORT": str(port), "TRANSACTION_COORDINATOR_ENABLED": "true"}
    began = time.monotonic()
    process = image.start(["worker"], {**environ, **more}, log)
    until(lambda: http_state(port, "/livez") or process.poll() is not None, "/livez does not answer")
    print(f"/livez answers after {time.monotonic() - began:.1f} s", flush=True)
    pid = first_process(process)
    _check_rights(image, status_of(pid))
    until(lambda: int(postgres.psql("SELECT count(*) FROM governance.run_completions", DATABASE)) > 500, "no run done")
    status, seconds = stop(process, pid, signal.SIGTERM)
    done = int(postgres.psql("SELECT count(*) FROM governance.run_completions", DATABASE))
    said = log.read_text()
    if status or '"event": "stopped"' not in said or done >= RUNS:
        raise ProofError(f"SIGTERM under load: status {status}, {done} of {RUNS} runs, and the log:\n{said[-2000:]}")
    print(f"SIGTERM under load, after {done} of {RUNS} runs: drained, exit 0 after {seconds:.1f} s", flush=True)


def _check_rights(image: Image, state: dict[str, str]) -> None:
    wanted = {"Uid": {image.user[0]}, "Gid": {image.user[1]}, "CapEff": {"0" * 16}, "NoNewPrivs": {"1"}}
    for key, values in wanted.items():
        if set(state[key].split()) != values:
            raise ProofError(f"{key} is {state[key]}, expected {values}")
    if state["NSpid"].split()[-1] != "1":
        raise ProofError(f"Python is not process 1: {state['NSpid']}")
    print(f"process 1 as user {image.user[0]}, no capability, root read-only", flush=True)


def _end_at_once(image: Image, environ: dict[str, str], scratch: Path) -> None:
    """Show that a second signal ends process 1, for which the kernel drops signals that have no handler."""
    port, log = Port().number, scratch / "second.log"
    process = image.start(["worker"], {**environ, "HTTP_PORT": str(port)}, log)
    until(lambda: http_state(port, "/readyz"), "the worker does not become ready")
    status, seconds = stop(process, first_process(process), signal.SIGTERM, signal.SIGTERM)
    if status != 128 + signal.SIGTERM or seconds > 2:
        raise ProofError(f"two signals: status {status} after {seconds:.1f} s, expected {128 + signal.SIGTERM} at once")
    print(f"two signals: exit {status} after {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
