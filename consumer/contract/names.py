"""Names that runners, subscribers and operators program against: exchanges, queues, routing keys and headers."""

RUNS_EXCHANGE = "runs"
RUN_COMPLETED_KEY = "run.completed"
RUN_CONTENT_TYPE = "application/json"
RUN_COMPLETED_QUEUE = "closeout.run-completed"
RETRY_QUEUE = "closeout.run-completed.retry"
PARKED_QUEUE = "closeout.parked"
EVENTS_EXCHANGE = "governance.events"
# Routes to the worker's own queues only. A user that may write to the default exchange may write to every queue.
INTERNAL_EXCHANGE = "closeout.internal"

# Spreads runs over the numbered queues, by message id; exists only with INTAKE_QUEUES above 1.
INTAKE_EXCHANGE = "closeout.intake"


def numbered_queues(intake_queues: int) -> tuple[str, ...]:
    """Return the queues that runs are spread over; empty if there is only ``closeout.run-completed``."""
    return tuple(f"{RUN_COMPLETED_QUEUE}.{number}" for number in range(intake_queues)) if intake_queues > 1 else ()


def consumed_queues(intake_queues: int) -> tuple[str, ...]:
    """Return the queues that a worker consumes.

    ``closeout.run-completed`` is always one of them: retries return to it, and so does what was published before the
    number of queues changed.
    """
    return RUN_COMPLETED_QUEUE, *numbered_queues(intake_queues)


# Headers of a parked message, and of one that waits in the retry queue.
REASON_HEADER = "x-closeout-reason"
ERROR_HEADER = "x-closeout-error"
ATTEMPTS_HEADER = "x-closeout-attempts"
PARKED_AT_HEADER = "x-closeout-parked-at"
FIRST_SEEN_HEADER = "x-closeout-first-seen"
EXCHANGE_HEADER = "x-closeout-exchange"
ROUTING_KEY_HEADER = "x-closeout-routing-key"
DROPPED_HEADER = "x-closeout-dropped-headers"

# AMQP's delivery_mode of a message that the broker writes to disk.
PERSISTENT = 2

# The fields of a message whose values may be adjusted: those that do not decide whether it is accepted.
ADJUSTABLE_FIELDS = (
    "agent_id", "error_code", "error_message", "is_synthetic", "metadata", "model", "parent_run_id", "session_id",
    "steps", "synthetic_scenario_id", "trace_id", "usage",
)  # fmt: skip
