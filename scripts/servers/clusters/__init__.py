"""Several private servers that work together: a RabbitMQ cluster, a standby, a Citus cluster."""
