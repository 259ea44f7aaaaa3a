"""The durable record of each attempt that was rolled back."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine
from uuid_utils.compat import uuid7

from consumer.errors import lies_in_data, one_line
from consumer.phases import TransactionPhase
from domains.completions import rollbacks
from domains.database.statements import columns_of, insert_many, unnest
from domains.run import RunKey

log = structlog.get_logger(__name__)

# Seconds to write the record. In an outage it is abandoned: the first error matters more.
_RECORD_TIMEOUT_SECONDS = 10.0
_OF_ANOTHER = "another run of this batch could not be written; see that run's own record"
_COLUMNS = (
    "tenant_id", "rollback_id", "run_id", "phase_reached", "operations", "error_type", "error", "occurred_at",
)  # fmt: skip
_KEYS = ("tenant_id", "run_id")
_given = unnest(rollbacks, _KEYS)
_EARLIER = (
    select(rollbacks.c.tenant_id, rollbacks.c.run_id, func.count())
    .join(_given, (rollbacks.c.tenant_id == _given.c.tenant_id) & (rollbacks.c.run_id == _given.c.run_id))
    .group_by(rollbacks.c.tenant_id, rollbacks.c.run_id)
)
_INSERT = insert_many(rollbacks, (*_COLUMNS, "attempt"))


async def record_rollbacks(
    engine: AsyncEngine,
    keys: Sequence[RunKey],
    *,
    phase: TransactionPhase,
    operations: Sequence[str],
    error: BaseException,
) -> None:
    """Write one row for each of *keys* in a separate transaction, after the rollback.

    *operations* is the rollback stack, last first. Raises the database's errors; the caller must not let them hide the
    first error. The error's text is omitted if one run's data may have caused it and *keys* span tenants, because
    PostgreSQL quotes rows: the bad run is retried alone, and its own record then has the text.
    """
    done = msgspec.json.encode(list(operations)).decode()
    kind = type(getattr(error, "orig", None) or error).__name__
    # PostgreSQL's text cannot hold a NUL that the error may quote.
    shared = lies_in_data(error) and len({key.tenant_id for key in keys}) > 1
    words = _OF_ANOTHER if shared else one_line(error, 2000).replace("\x00", "\\u0000")
    now = datetime.now(UTC)
    async with engine.begin() as conn:
        # The attempt number counts the run's rollbacks by all workers, this one included.
        earlier = {RunKey(tenant, run): n for tenant, run, n in await conn.execute(_EARLIER, columns_of(_KEYS, keys))}
        rows = [
            (key.tenant_id, uuid7(), key.run_id, phase.value, done, kind, words, now, 1 + earlier.get(key, 0))
            for key in keys
        ]
        await conn.execute(_INSERT, columns_of((*_COLUMNS, "attempt"), rows))


async def try_to_record_rollbacks(
    engine: AsyncEngine,
    keys: Sequence[RunKey],
    *,
    phase: TransactionPhase,
    operations: Sequence[str],
    error: BaseException,
) -> None:
    """Like :func:`record_rollbacks`, but log a failure instead of raising it: it must not hide the first error."""
    try:
        async with asyncio.timeout(_RECORD_TIMEOUT_SECONDS):
            await record_rollbacks(engine, keys, phase=phase, operations=operations, error=error)
    except Exception as secondary:  # noqa: BLE001 - whatever it is
        log.warning("rollback not recorded", phase=phase, error=one_line(secondary))
