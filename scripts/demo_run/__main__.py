"""Close out 1,000 generated runs on private servers and check every one."""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from servers import up as background
from servers.process import ServerError
from servers.service_pair import end_on_signals, running_pair

from consumer.contract.refusals import MessageRefusedError
from demo_run.runs import realistic_runs
from demo_run.setup import set_up
from demo_run.show import Demonstration, console, decoded
from domains.run import CompletedRun, RunKey

KEPT = Path(tempfile.gettempdir()) / f"closeout-demo-{os.getuid()}"
NUMBER, RESENT = 1_000, 20
BROKEN = (b"{this is not JSON", b'{"schema_version": 7}', b'{"schema_version": 1, "tenant_id": "no spaces allowed"}')


def _messages(file: Path | None, seed: int) -> tuple[list[bytes], list[CompletedRun]]:
    """Return the messages to publish and the runs that they report."""
    if file is not None:
        bodies = [line.strip() for line in file.read_bytes().splitlines() if line.strip()]
    else:
        bodies = realistic_runs(NUMBER, seed)
        # A runner that lost a confirm publishes again; the broken messages will be parked.
        bodies += [*random.Random(seed).sample(bodies, RESENT), *BROKEN]  # noqa: S311 - for variety
    runs: dict[RunKey, CompletedRun] = {}
    for body in bodies:
        with suppress(MessageRefusedError):
            run = decoded(body)
            runs.setdefault(run.key, run)
    return bodies, list(runs.values())


def demonstrate(environment: dict[str, str], folder: Path, options: argparse.Namespace) -> int:
    """Run the demonstration and return the exit status. With --keep the worker keeps running."""
    bodies, runs = _messages(options.file, options.seed)
    demo = Demonstration(environment, folder)
    set_up(environment)
    worker = demo.start_worker()
    try:
        demo.await_ready()
        console.print(f"worker {worker.pid} is ready; publishing {len(bodies):,} messages about {len(runs):,} runs\n")
        faults = asyncio.run(demo.run(bodies, runs))
    finally:
        if not options.keep:
            worker.send_signal(signal.SIGTERM)
            status = worker.wait(30)
            console.print(f"the worker received SIGTERM, drained and exited with status {status}")
    for fault in faults[:20]:
        console.print(f"[red]INCOMPLETE[/red] {fault}")
    console.print(
        f"[bold]{'every run is complete' if not faults else 'NOT every run is complete'}[/bold]: "
        f"{len(runs) - len({fault.split(':')[0] for fault in faults}):,} of {len(runs):,}"
    )
    if options.keep:
        (folder / "worker.pid").write_text(str(worker.pid))
        _print_next_steps(demo, runs)
    return 1 if faults else 0


def _print_next_steps(demo: Demonstration, runs: Sequence[CompletedRun]) -> None:
    exports = "\n".join(f"  export {name}={value!r}" for name, value in demo.environment.items())
    console.print(
        f"\nThe servers and the worker keep running. Try:\n{exports}\n"
        f"  .venv/bin/closeout runs list\n"
        f"  .venv/bin/closeout runs show {runs[0].tenant_id}/{runs[0].run_id}\n"
        f"  .venv/bin/closeout parked list\n"
        f"  .venv/bin/closeout doctor\n"
        f"  .venv/bin/closeout policies backtest scripts/demo_run/policies.yaml --since 1d\n"
        f"  http://127.0.0.1:{demo.port}/   the console, in a browser\n"
        f"  curl http://127.0.0.1:{demo.port}/metrics   # and /readyz\n"
        f"  tail -f {demo.log}\n"
        f"To stop them: scripts/demo --stop",
        soft_wrap=True,
    )


def stop() -> int:
    """Stop the servers and the worker that --keep left running."""
    with suppress(OSError, ValueError):
        os.kill(int((KEPT / "worker.pid").read_text()), signal.SIGTERM)
        (KEPT / "worker.pid").unlink()
    console.print("stopped" if background.down(KEPT / "servers") else "nothing was running")
    return 0


def main() -> int:
    """Parse the command line and run the demonstration."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE.jsonl", help="runs to publish (default: 1,000 generated runs)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the servers and the worker running afterwards")
    parser.add_argument("--stop", action="store_true", help="stop what --keep left running")
    parser.add_argument("--rabbitmq", choices=("3.10", "4"), default="4", help="RabbitMQ version (default: 4)")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="generate the same runs again")
    options = parser.parse_args()
    if options.file is not None and not options.file.is_file():
        parser.error(f"{options.file} is not a file")
    try:
        if options.stop:
            return stop()
        console.print("starting a private PostgreSQL and a private RabbitMQ")
        if options.keep:
            KEPT.mkdir(mode=0o700, exist_ok=True)
            state = background.up(KEPT / "servers", options.rabbitmq, management=False)
            return demonstrate(state.environment, KEPT, options)
        end_on_signals()
        with tempfile.TemporaryDirectory(prefix="closeout-demo-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL may have to run as another user
            with running_pair(folder / "servers", options.rabbitmq, management=False) as (*_, environment):
                return demonstrate(environment, folder, options)
    except ServerError as error:
        console.print(f"[red]demo: {error}[/red]")
        return 1


if __name__ == "__main__":
    sys.exit(main())
