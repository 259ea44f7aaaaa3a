"""The tables as ORM classes, and one run's unit of work."""

from typing import Any

from sqlalchemy import delete, func, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Session

from benchmarks.peers.storing import EVENT
from benchmarks.peers.work import Rows
from domains.database.schema import metadata as the_metadata
from domains.run import RunKey
from domains.tables import incidents, outbox_events, policy_evaluations, prevention_records, run_completions, traces


class Base(DeclarativeBase):
    """Declarative classes on existing tables."""

    metadata = the_metadata


class RunCompletion(Base):
    """A row of ``run_completions``."""

    __table__ = run_completions


class Incident(Base):
    """A row of ``incidents``."""

    __table__ = incidents


class PreventionRecord(Base):
    """A row of ``prevention_records``."""

    __table__ = prevention_records


class PolicyEvaluation(Base):
    """A row of ``policy_evaluations``."""

    __table__ = policy_evaluations


class Trace(Base):
    """A row of ``traces``."""

    __table__ = traces


class Event(Base):
    """A row of ``outbox_events``."""

    __table__ = outbox_events


_CLAIM = insert(RunCompletion).on_conflict_do_nothing().returning(RunCompletion.run_id)
_TRACE = insert(Trace).on_conflict_do_nothing().returning(Trace.run_id)


def write(session: Session, rows: Rows) -> bool:
    """Write one run's rows; return false for a duplicate, and write nothing."""
    if session.execute(_CLAIM, rows.completion).one_or_none() is None:
        return False
    session.add_all(objects_of(rows))
    if rows.trace is not None and session.execute(_TRACE, rows.trace).one_or_none() is None:
        session.execute(completion_of(rows.trace))
    return True


def objects_of(rows: Rows) -> list[Base]:
    """Return the objects whose insert cannot conflict."""
    objects: list[Base] = [PolicyEvaluation(**rows.evaluation)]
    if rows.incident is not None:
        objects.append(Incident(**rows.incident))
    if rows.prevention is not None:
        objects.append(PreventionRecord(**rows.prevention))
    return objects + [Event(**{name: getattr(event, name) for name in EVENT}) for event in rows.events]


def completion_of(trace: dict[str, Any]) -> Any:  # noqa: ANN401 - an UPDATE
    """Return the update that completes a trace which the runner inserted."""
    return (
        update(Trace)
        .where(*(getattr(Trace, name) == trace[name] for name in ("tenant_id", "trace_id", "run_id")))
        .where(Trace.status == "running")
        .values({name: trace[name] for name in ("status", "started_at", "completed_at", "steps")})
        .execution_options(synchronize_session=False)
    )


def mark_of(key: RunKey) -> tuple[Any, Any]:
    """Return the two statements that mark a run's events as confirmed."""
    return (
        delete(Event)
        .where(Event.tenant_id == key.tenant_id, Event.run_id == key.run_id)
        .execution_options(synchronize_session=False),
        update(RunCompletion)
        .where(RunCompletion.tenant_id == key.tenant_id, RunCompletion.run_id == key.run_id)
        .values(phase="EVENTS_PUBLISHED", events_published_at=func.clock_timestamp())
        .execution_options(synchronize_session=False),
    )
