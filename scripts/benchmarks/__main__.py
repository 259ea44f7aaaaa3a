"""Measure Closeout, its peers and its limits on private servers, interleaved in one run."""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from demo_run.setup import set_up
from rich.console import Console
from servers import PostgresServer, RabbitServer, start_all
from servers.process import ServerError
from servers.service_pair import end_on_signals

from benchmarks import citus, floor, growth, latency, people, pgbench, pooler, queue_leader, report, versions
from benchmarks.arena import SETTINGS, Arena
from benchmarks.race import Lap, lap
from benchmarks.subjects import THROUGHPUT, closeout

OURS = "Closeout"
FLOOR = "aio-pika alone: no database"
PGBENCH = "pgbench, one transaction per run"
PGBENCH_MARK = "pgbench, with the mark in a second one"

console = Console(highlight=False, soft_wrap=True, width=160)


@contextmanager
def arena(folder: Path) -> Iterator[Arena]:
    """Yield both servers, set up; kill them at the end."""
    postgres = PostgresServer(folder / "postgresql", settings=SETTINGS)
    rabbit = RabbitServer(folder / "rabbitmq")
    try:
        start_all(postgres, rabbit)
        environment = {"DATABASE_URL": postgres.create_database("closeout"), "AMQP_URL": rabbit.url()}
        set_up(environment)
        made = Arena(postgres, rabbit, environment)
        asyncio.run(made.declare())
        made.sql("CREATE EXTENSION pg_stat_statements")
        yield made
    finally:
        rabbit.kill()
        postgres.kill()


def throughput(place: Arena, options: argparse.Namespace, logs: Path) -> None:
    """Compare the throughput and the cost per run of all subjects."""
    laps: dict[str, list[Lap]] = defaultdict(list)
    ways: list[tuple[str, Callable[[int], Lap]]] = [
        (subject.name, partial(lap, place, subject, logs=logs)) for subject in THROUGHPUT
    ]
    ways += [
        (PGBENCH, lambda _: Lap(pgbench.tps(place, mark=False), {})),
        (PGBENCH_MARK, lambda _: Lap(pgbench.tps(place, mark=True), {})),
        (FLOOR, lambda seed: Lap(floor.rate(place, seed), {})),
    ]
    for number in range(options.rounds):
        # Forwards, then backwards, so that no subject always runs first.
        for name, way in ways if number % 2 == 0 else ways[::-1]:
            laps[name].append(way(number + 1))
            console.print(f"round {number + 1}  {name:40} {laps[name][-1].rate:8,.0f} runs/s", style="dim")
    ordered = {name: laps[name] for name, _ in ways}
    rows = report.throughput(console, ordered, OURS)
    report.plot(rows, OURS, [PGBENCH, PGBENCH_MARK, FLOOR], options.out / "throughput.png")
    report.write(options.out / "bench.json", {"throughput": rows})


def latencies(place: Arena, options: argparse.Namespace, logs: Path) -> None:
    """Compare Closeout's latency with a bare script's at low rates."""
    found: dict[str, dict[int, list[latency.Latency]]] = defaultdict(lambda: defaultdict(list))
    for number in range(options.rounds):
        for rate in latency.RATES:
            for subject in latency.SUBJECTS if number % 2 == 0 else latency.SUBJECTS[::-1]:
                found[subject.name][rate].append(latency.measure(place, subject, rate, number + 1, logs))
    bare = found[latency.SUBJECTS[1].name]
    for name, by_rate in found.items():
        for rate, seen in by_rate.items():
            ours = latency.Latency(*map(median, zip(*seen, strict=True)))
            floors = latency.Latency(*map(median, zip(*bare[rate], strict=True)))
            values = "  ".join(
                f"{n} {v:.1f} ms ({v / f:.2f})" for n, v, f in zip(ours._fields, ours, floors, strict=True)
            )
            console.print(f"{name:28} {rate:4} runs/s  {values}")
    report.write(options.out / "bench.json", {"latency": found})


def grow(place: Arena, options: argparse.Namespace, logs: Path) -> None:
    """Measure throughput with many stored runs and several workers, memory over many runs, and fairness."""
    seen: dict[str, object] = {}
    fair = growth.fairness(place, options.queued, logs)
    console.print(f"100 runs behind {options.queued:,} of another tenant: {fair}")
    memory = growth.memory(place, options.backlog, logs)
    console.print(
        f"memory over a backlog of {memory[-1][0]:,} runs: {memory[0][1]:.0f} to {memory[-1][1]:.0f} MiB, "
        f"the last third compared with the first: {100 * growth.flatness(memory):+.1f} %"
    )
    for workers in (1, 2, 4):
        laps = [lap(place, closeout(f"{workers} workers", processes=workers), n + 1, logs) for n in range(3)]
        rate, busy = median(found.rate for found in laps), median(found.cost["busy cores"] for found in laps)
        seen[f"{workers} workers"] = rate
        console.print(f"{workers} workers: {rate:,.0f} runs/s, {busy:.2f} cores busy")
    place.empty()
    stored = {}
    for number, found in growth.rates(place, tuple(options.stored), 3, logs):
        stored[number] = median(one.rate for one in found)
        console.print(f"{number:,} runs stored: {stored[number]:,.0f} runs/s ({[round(one.rate) for one in found]})")
    report.write(options.out / "bench.json", {"growth": {"memory": memory, "fairness": fair, "stored": stored, **seen}})


def defaults(place: Arena, options: argparse.Namespace, logs: Path) -> None:
    """Draw the curves behind the defaults of PREFETCH_COUNT, BATCH_MAX_RUNS and MAX_CONCURRENT_TRANSACTIONS."""
    combinations = [
        (batch, at_once, batch * (at_once + 1)) for at_once in (1, 2, 3) for batch in (10, 25, 50, 100, 200, 400)
    ]
    combinations += [(200, 2, prefetch) for prefetch in (200, 400, 800, 2000)]
    rates: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for number in range(options.rounds):
        for batch, at_once, prefetch in combinations if number % 2 == 0 else combinations[::-1]:
            subject = closeout(
                "defaults",
                BATCH_MAX_RUNS=str(batch),
                MAX_CONCURRENT_TRANSACTIONS=str(at_once),
                PREFETCH_COUNT=str(prefetch),
            )
            rates[batch, at_once, prefetch].append(lap(place, replace(subject, runs=6_000), number + 1, logs).rate)
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (batch, at_once, prefetch), found in rates.items():
        console.print(f"batch {batch:4}  concurrent {at_once}  prefetch {prefetch:5}  {median(found):8,.0f} runs/s")
        if prefetch == batch * (at_once + 1):
            series[f"{at_once} concurrent"].append((batch, median(found)))
    report.curves(
        series, "BATCH_MAX_RUNS (PREFETCH_COUNT: one batch more than in transactions)", options.out / "defaults.png"
    )
    report.write(options.out / "bench.json", {"defaults": {str(key): found for key, found in rates.items()}})


def pooled(place: Arena, options: argparse.Namespace, logs: Path) -> None:
    """Compare a worker with a direct connection and one behind PgBouncer in transaction mode."""
    folder = logs / "pgbouncer"
    folder.mkdir()
    rows = report.throughput(console, pooler.race(place, folder, options.rounds), pooler.DIRECT)
    report.write(options.out / "bench.json", {"pooler": rows})


def on_citus(place: Arena, options: argparse.Namespace, logs: Path) -> None:
    """Compare a worker on a Citus cluster of this machine with one on a single PostgreSQL; needs CITUS_PG_BIN."""
    folder = logs / "citus"
    folder.mkdir()
    folder.chmod(0o755)
    rows = report.throughput(console, citus.race(place, folder, options.rounds), citus.PLAIN)
    report.write(options.out / "bench.json", {"citus": rows})


def queue_limit(place: Arena, options: argparse.Namespace, _logs: Path) -> None:
    """Measure how many messages one quorum queue, and several, pass on to clients that do nothing else."""
    found: dict[tuple[int, int], list[queue_leader.Limit]] = defaultdict(list)
    for _ in range(options.rounds):
        for queues, pairs in ((1, 1), (1, 2), (2, 2)):
            found[queues, pairs].append(queue_leader.measure(place.rabbit, queues, pairs))
    for (queues, pairs), seen in found.items():
        rate, cpu, cores = map(median, zip(*seen, strict=True))
        console.print(
            f"{queues} queues, {pairs} publishers and consumers: {rate:8,.0f} messages/s "
            f"({min(one.rate for one in seen):,.0f} to {max(one.rate for one in seen):,.0f}), "
            f"{cpu:.3f} ms of RabbitMQ's CPU each, {cores:.2f} cores"
        )
    report.write(options.out / "bench.json", {"queue": {str(key): seen for key, seen in found.items()}})


def compare_versions(place: Arena, options: argparse.Namespace, logs: Path) -> None:
    """Compare this version with the one whose ``closeout`` is given by --other."""
    ratios = versions.compare(place, console, options.other, options.rounds, logs)
    report.write(options.out / "bench.json", {"versions": ratios})


def what_people_wait_for(_place: Arena, options: argparse.Namespace, logs: Path) -> None:
    """Time commands over stored runs, next to the version whose ``closeout`` is given by --other."""
    found = people.compare(logs / "people", console, options.other, options.rounds, options.runs)
    report.factors({name: one["factors"] for name, one in found.items()}, options.out / "people.png")
    report.write(options.out / "bench.json", {"people": found})


PARTS = {
    "throughput": throughput, "latency": latencies, "growth": grow, "defaults": defaults, "pooler": pooled,
    "versions": compare_versions, "citus": on_citus, "queue": queue_limit,
    "people": what_people_wait_for,
}  # fmt: skip


def main() -> int:
    """Parse the command line and run the benchmarks."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: the first two)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are reported (default: 5)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench"), help="folder for bench.json and plots (default: bench)"
    )
    parser.add_argument(
        "--stored", type=int, nargs="*", default=[0, 1_000_000, 5_000_000], help="growth: numbers of stored runs"
    )
    parser.add_argument("--backlog", type=int, default=300_000, help="growth: runs over which memory is measured")
    parser.add_argument(
        "--queued", type=int, default=100_000, help="growth: queued runs of one tenant before another's"
    )
    parser.add_argument(
        "--other", type=Path, metavar="CLOSEOUT", help="versions, people: another checkout's .venv/bin/closeout"
    )
    parser.add_argument("--runs", type=int, default=1_000_000, help="people: number of stored runs (default: 1000000)")
    options = parser.parse_args()
    if {"versions", "people"} & set(options.parts) and not options.other:
        parser.error("--other is missing; expected another checkout's .venv/bin/closeout")
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"PART: unknown {', '.join(unknown)}; expected {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    end_on_signals()
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="closeout-bench-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL may have to run as another user
            with arena(folder / "servers") as place:
                for part in options.parts or list(PARTS)[:2]:
                    console.print(f"\n{part}: {PARTS[part].__doc__}", style="bold")
                    PARTS[part](place, options, folder)
    except ServerError as error:
        console.print(f"bench: {error}", style="red", markup=False)
        return 1
    console.print(f"\n{time.monotonic() - started:.0f} s; bench.json and plots are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
