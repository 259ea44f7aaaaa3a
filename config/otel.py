"""Which exporters of spans the standard OTEL_* variables name; the rest of them OpenTelemetry reads itself."""

import os
from collections.abc import Mapping

# What OTEL_EXPORTER_OTLP_PROTOCOL can say, by the names under which the exporters are installed.
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def span_exporters(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the names of the exporters that *environ* (by default the process's) asks for; none: make no spans.

    An endpoint is enough to ask for OTLP. OTEL_TRACES_EXPORTER names others, or ``none``; OTEL_SDK_DISABLED turns all
    off.
    """
    environ = os.environ if environ is None else environ
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if not named:
        named = "otlp" if any(environ.get(variable) for variable in _ENDPOINTS) else "none"
    protocol = next((environ[variable] for variable in _PROTOCOLS if environ.get(variable)), "http/protobuf").strip()
    words = [word.strip() for word in named.split(",") if word.strip() not in {"", "none"}]
    return tuple(_OTLP.get(protocol, protocol) if word == "otlp" else word for word in words)
