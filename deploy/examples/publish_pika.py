"""A runner with pika, a blocking client: publish that a run has completed, and wait for the confirm.

AMQP_URL=amqp://user:password@host/vhost python publish_pika.py
"""

import json
import os
import uuid

import pika

RUN = {
    "schema_version": 1,
    "tenant_id": "acme",
    "run_id": str(uuid.uuid4()),
    "status": "succeeded",
    "started_at": "2026-11-01T12:00:00Z",
    "completed_at": "2026-11-01T12:00:30Z",
}

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.confirm_delivery()  # basic_publish now waits for the confirm, and raises NackError or UnroutableError
channel.basic_publish(
    "runs",
    "run.completed",
    json.dumps(RUN).encode(),
    pika.BasicProperties(content_type="application/json", delivery_mode=2, message_id=RUN["run_id"]),
    mandatory=True,
)
connection.close()
print(f"confirmed: {RUN['tenant_id']}/{RUN['run_id']}")
