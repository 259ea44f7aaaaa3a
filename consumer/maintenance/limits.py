"""Limits of pruning, apart from it so that help can print them without loading SQLAlchemy."""

from datetime import timedelta

# Below this age a message may still arrive again: from the parked queue, a runner that retries, a broker's backup. Once
# its inbox row is removed it would be a new run.
SAFE_AGE = timedelta(days=7)
# Runs per transaction: about 50 ms, for which a worker that receives one of these runs again would wait.
BATCH_RUNS = 500
