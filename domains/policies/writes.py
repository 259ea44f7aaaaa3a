"""Writes policy evaluations, many per statement."""

from collections.abc import Sequence

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from domains.database.statements import Compiled, columns_of, insert_many, insert_row
from domains.policies.rules import Evaluation, PolicyFault, Shadowed, Violation
from domains.policies.tables import policy_evaluations
from domains.result import DomainResult
from domains.run import RunKey

_COLUMNS = (
    "tenant_id", "run_id", "policy_evaluation_id", "outcome", "policies_checked", "violations", "errors",
    "evaluated_at", "shadow",
)  # fmt: skip
_INSERT = insert_many(policy_evaluations, _COLUMNS)
_INSERT_ALL = Compiled(_INSERT, on_citus=insert_row(policy_evaluations, _COLUMNS))
_INSERT_ONE = Compiled(_INSERT.on_conflict_do_nothing().returning(policy_evaluations.c.run_id))


async def record(conn: AsyncConnection, evaluations: Sequence[Evaluation]) -> dict[RunKey, DomainResult]:
    """Write one row for each of *evaluations*, in one statement.

    Not idempotent: it depends on the claim made earlier in the same transaction.
    """
    await _INSERT_ALL.execute(conn, columns_of(_COLUMNS, map(_row, evaluations)))
    return {evaluation.key: result_of(evaluation) for evaluation in evaluations}


async def record_once(conn: AsyncConnection, evaluation: Evaluation) -> Evaluation:
    """Write *evaluation* unless its run has one, and return the stored one. For the legacy path."""
    inserted = await _INSERT_ONE.execute(conn, columns_of(_COLUMNS, [_row(evaluation)]))
    if inserted:
        return evaluation
    return await _existing(conn, evaluation.key)


async def _existing(conn: AsyncConnection, key: RunKey) -> Evaluation:
    table = policy_evaluations
    found = await conn.execute(select(table).where(table.c.tenant_id == key.tenant_id, table.c.run_id == key.run_id))
    row = dict(found.mappings().one())
    row["violations"] = tuple(msgspec.convert(row["violations"], list[Violation]))
    row["errors"] = tuple(msgspec.convert(row["errors"], list[PolicyFault]))
    row["shadow"] = tuple(msgspec.convert(row["shadow"] or [], list[Shadowed]))
    return Evaluation(**row)


def result_of(evaluation: Evaluation) -> DomainResult:
    """Return the domain result for the written *evaluation*."""
    return DomainResult(
        "policies",
        "created",
        evaluation.policy_evaluation_id,
        evaluation.outcome,
        shadow=tuple(shadowed.result for shadowed in evaluation.shadow),
    )


def _row(evaluation: Evaluation) -> tuple[object, ...]:
    return (
        evaluation.tenant_id, evaluation.run_id, evaluation.policy_evaluation_id, evaluation.outcome,
        evaluation.policies_checked, msgspec.json.encode(evaluation.violations).decode(),
        msgspec.json.encode(evaluation.errors).decode(), evaluation.evaluated_at,
        msgspec.json.encode(evaluation.shadow).decode() if evaluation.shadow else None,
    )  # fmt: skip
