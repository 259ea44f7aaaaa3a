"""The standard OTEL_* variables, and the warnings where an exporter is missing."""

import subprocess
import sys

import pytest
from structlog.testing import capture_logs

from config.otel import span_exporters
from consumer.tracing.loading import load_spans

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("environ", "exporters"),
    [
        ({}, ()),
        ({"OTEL_SERVICE_NAME": "mine"}, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ()),
        (ENDPOINT, ("otlp_proto_http",)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector/v1/traces"}, ("otlp_proto_http",)),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ("otlp_proto_grpc",)),
        (
            {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            ("otlp_proto_http",),
        ),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "TRUE"}, ()),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, ()),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ("otlp_proto_http",)),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ("otlp_proto_http", "console")),
    ],
)
def test_the_standard_variables_choose_the_exporters(environ, exporters):
    assert span_exporters(environ) == exporters


def test_a_missing_exporter_is_named_with_the_installed_ones():
    with capture_logs() as logs:
        assert load_spans(["otlp_proto_grpc"], amqp_url="amqp://broker") is None
    assert logs[0]["exporter"] == "otlp_proto_grpc"
    assert logs[0]["error"] == "LookupError: not installed"
    assert "otlp_proto_http" in logs[0]["installed"]


def test_opentelemetry_is_imported_only_when_configured():
    code = (
        "import sys, consumer.assembly, consumer.cli; from consumer.tracing.loading import load_spans; "
        "load_spans((), amqp_url='amqp://broker'); "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
