"""Messages set aside: the parked copy, reading the queue, replay and discard; imports ``amqp`` and below."""
