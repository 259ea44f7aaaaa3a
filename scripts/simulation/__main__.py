"""Simulate a day of many runs on N nodes, from the measured costs of a run."""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from simulation import model
from simulation.model import Cluster, simulate


def main() -> int:
    """Parse the command line, simulate, and print a row for each number of nodes."""
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description=f"{__doc__}\n\n{model.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=100_000_000, help="runs per day (default: 100 million)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    parser.add_argument("--cores", type=int, default=16, help="cores of each node (default: 16)")
    parser.add_argument("--tenants", type=int, default=5_000, help="tenants (default: 5,000)")
    parser.add_argument("--skew", type=float, default=0.9, help="0: all tenants are equally large (default: 0.9)")
    parser.add_argument("--peak", type=float, default=3.0, help="the peak, times the day's mean (default: 3)")
    parser.add_argument("--outage", type=int, default=10, help="minutes without one node (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="another distribution of the tenants (default: 1)")
    options = parser.parse_args()
    if min(options.runs, options.cores, options.tenants, *options.nodes) < 1 or options.peak <= 1:
        parser.error("--runs, --nodes, --cores and --tenants must be positive, --peak above 1")
    table = Table(
        "nodes", "runs/s at the peak", "fullest node", "all nodes", "worker cores", "RabbitMQ cores",
        f"longest wait, {options.outage} min outage", "over after", "WAL, fullest node", "stored, fullest node",
        box=None,
    )  # fmt: skip
    for nodes in options.nodes:
        cluster = Cluster(
            runs_per_day=options.runs, nodes=nodes, cores=options.cores, tenants=options.tenants, skew=options.skew,
            peak=options.peak, outage=options.outage,
        )  # fmt: skip
        day = simulate(cluster, options.seed)
        table.add_row(
            str(nodes), f"{day.peak_rate:,.0f}", f"{day.busiest:.0%}", f"{day.mean:.0%}", f"{day.workers:.1f}",
            f"{day.broker:.1f}", f"{day.longest_wait} min", f"{day.waited} min", f"{day.wal_mb:.1f} MB/s",
            f"{day.stored_gb:,.0f} GB/day",
        )  # fmt: skip
    Console(highlight=False, width=160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
