"""The span exporters that the standard OTEL_* variables request; OpenTelemetry reads the other variables itself."""

import os
from collections.abc import Mapping

# Values of OTEL_EXPORTER_OTLP_PROTOCOL, and the entry points of their exporters.
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def span_exporters(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the entry points of the exporters that *environ* (default: the process's) requests; empty: no spans.

    An endpoint alone requests OTLP. OTEL_TRACES_EXPORTER names others, or ``none``; OTEL_SDK_DISABLED
    disables all.
    """
    environ = os.environ if environ is None else environ
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if not named:
        named = "otlp" if any(environ.get(variable) for variable in _ENDPOINTS) else "none"
    protocol = next((environ[variable] for variable in _PROTOCOLS if environ.get(variable)), "http/protobuf").strip()
    names = [name.strip() for name in named.split(",") if name.strip() not in {"", "none"}]
    return tuple(_OTLP.get(protocol, protocol) if name == "otlp" else name for name in names)
