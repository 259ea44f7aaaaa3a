"""RabbitMQ: connections, channels, acks, frames and topology; imports ``contract``, ``errors`` and ``metrics``."""
