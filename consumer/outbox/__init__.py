"""Events from commit to confirm: store, publisher, relay, drain and backlog; imports ``amqp`` and ``postgres``."""
