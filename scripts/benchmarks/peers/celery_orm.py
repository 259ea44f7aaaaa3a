"""Celery and SQLAlchemy's ORM: tasks on a quorum queue, late acks, one transaction per task."""

import os
import sys
from pathlib import Path

from celery import Celery
from celery.signals import worker_process_init
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from benchmarks.peers import orm
from benchmarks.peers.work import CONTENT_TYPE, EXCHANGE, SELECT_POLICIES, Rows, json_text, policies_in_force, rows_for
from domains.policies.rules import PolicySet

QUEUE = "bench.celery"
# 4, 8 and 16 processes reached 201, 184 and 192 runs/s on two cores (medians of two rounds): within the noise.
PROCESSES = 8

app = Celery("bench", broker=os.environ["AMQP_URL"])
app.conf.update(
    task_default_queue=QUEUE,
    task_default_queue_type="quorum",
    task_default_exchange_type="topic",
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=4,
    broker_transport_options={"confirm_publish": True},
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)
engine = create_engine(
    os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://"),
    pool_size=1,
    max_overflow=0,
    json_serializer=json_text,
)
sessions = sessionmaker(engine, expire_on_commit=False)
books: list[PolicySet] = []


@worker_process_init.connect
def read_policies(**_: object) -> None:
    """Give each process separate connections and the policies."""
    engine.dispose(close=False)
    with engine.connect() as conn:
        books.append(policies_in_force([dict(row) for row in conn.execute(SELECT_POLICIES).mappings()]))


@app.task(name="bench.close_out")
def close_out(body: str) -> None:
    """Close out one run; Celery acks when this returns."""
    rows = rows_for(body.encode(), books[0])
    with sessions.begin() as session:
        new = orm.write(session, rows)
    if new:
        publish(rows)
        with sessions.begin() as session:
            for statement in orm.mark_of(rows.key):
                session.execute(statement)


def publish(rows: Rows) -> None:
    """Publish a run's events, each after the confirm of the one before: the client offers no other way."""
    with app.producer_pool.acquire(block=True) as producer:
        for event in rows.events:
            producer.publish(
                event.body.encode(),
                exchange=EXCHANGE,
                routing_key=event.routing_key,
                serializer=None,
                content_type=CONTENT_TYPE,
                content_encoding="binary",
                delivery_mode=2,
                mandatory=True,
                correlation_id=str(event.run_id),
                message_id=str(event.event_id),
                type=event.type,
            )


def fill(file: Path) -> None:
    """Publish a task for each line of *file*."""
    with app.producer_or_acquire() as producer:
        for line in file.read_text().splitlines():
            close_out.apply_async((line,), producer=producer)


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        fill(Path(sys.argv[2]))
    else:
        app.worker_main(
            ["worker", "--pool=prefork", f"--concurrency={PROCESSES}", "--loglevel=WARNING", "--without-gossip",
             "--without-mingle", "--without-heartbeat"]
        )  # fmt: skip
