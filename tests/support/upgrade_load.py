"""Two workers next to each other, each of which must be seen to process runs."""

from tests.support.faults.running_worker import RunningWorker
from tests.support.faults.scenario import Scenario

# Small, so that neither of two workers receives all messages.
FEW = {"PREFETCH_COUNT": "5", "BATCH_MAX_RUNS": "5"}
COMMITTED = 'closeout_deliveries_total{result="committed"}'


async def works(scenario: Scenario, *workers: RunningWorker) -> None:
    """Wait until each of *workers* has closed out more runs than it has by now."""
    before = [await worker.metric(COMMITTED) for worker in workers]

    async def all_do() -> bool:
        now = [await worker.metric(COMMITTED) for worker in workers]
        return all(more > less for more, less in zip(now, before, strict=True))

    await scenario.until(all_do, what="a run closed out by each worker")
