"""The values in the manifests equal those in the code: settings, ports, names, versions, grace periods."""

import re
import tomllib
from collections.abc import Iterable
from configparser import ConfigParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from config.settings import Settings, describe, load_settings
from consumer.cli import app
from consumer.contract.names import RUN_COMPLETED_QUEUE, consumed_queues
from consumer.postgres.engine import SPARE_CONNECTIONS
from tests.support.manifests import (
    OVERLAYS,
    ROOT,
    RUNBOOKS,
    Object,
    changed,
    container,
    environment,
    one,
    overlay,
    pods,
)

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
URLS = {"DATABASE_URL_FILE": "postgresql://u:p@db.example/closeout", "AMQP_URL_FILE": "amqps://u:p@mq.example/v"}
# Settings that differ from the code's defaults on purpose; the others are the defaults.
DEVIATIONS = {"TRANSACTION_COORDINATOR_ENABLED": "true"}
# A console in use holds two additional database sessions (consumer/console/README.md).
CONSOLE_SESSIONS = 2
# PostgreSQL's max_connections is 100, of which 3 are kept for its superuser.
POSTGRESQL_CONNECTIONS = 97


def settings_of(objects: Iterable[Object], component: str, folder: Path) -> Settings:
    """Return the settings that a pod of *component* would load, with its secret's files below *folder*."""
    environ = environment(objects, component)
    for variable in URLS.keys() & environ.keys():
        file = folder / Path(environ[variable]).name
        file.write_text(URLS[variable])
        environ[variable] = str(file)
    return load_settings(environ, need_amqp=component != "migrate", need_database=component != "topology")


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("component", ["worker", "migrate", "topology"])
def test_every_variable_is_a_setting_and_its_value_is_accepted_without_a_warning(name, component, tmp_path):
    settings = settings_of(overlay(name), component, tmp_path)
    assert settings.warnings == ()
    known = {field.upper() for field in Settings.model_fields} | set(URLS)
    assert environment(overlay(name), component).keys() <= known


def test_the_base_names_the_defaults_and_deviates_only_on_purpose():
    lines = (ROOT / "deploy/kubernetes/base/settings.env").read_text().splitlines()
    named = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    defaults = {variable: default for variable, default, _ in describe()}
    deviating = {key: value for key, value in named.items() if value != defaults[key]}
    assert deviating == DEVIATIONS


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_shipped_deployment_is_atomic_for_all_tenants(name, tmp_path):
    settings = settings_of(overlay(name), "worker", tmp_path)
    assert settings.transaction_coordinator_enabled
    assert not settings.transaction_coordinator_tenants


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_worker_exits_before_it_is_killed(name, tmp_path):
    spec = pods(overlay(name))["worker"]["spec"]
    assert (
        spec["terminationGracePeriodSeconds"]
        >= settings_of(overlay(name), "worker", tmp_path).shutdown_grace_seconds + 10
    )
    assert "lifecycle" not in container(pods(overlay(name))["worker"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_ports_and_paths_are_those_that_the_worker_serves(name, tmp_path):
    objects = overlay(name)
    only = container(pods(objects)["worker"])
    (port,) = only["ports"]
    assert port["containerPort"] == settings_of(objects, "worker", tmp_path).http_port
    (service,) = one(objects, "Service")["spec"]["ports"]
    assert (service["port"], service["targetPort"]) == (port["containerPort"], port["name"])
    policy = next(o for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == "closeout-worker")
    assert [p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]] == [port["name"]]
    probes = {kind: only[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: get["path"] for kind, get in probes.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    assert {get["port"] for get in probes.values()} == {port["name"]}
    monitors = [e for o in objects if o["kind"] == "PodMonitor" for e in o["spec"]["podMetricsEndpoints"]]
    assert all((end["port"], end["path"]) == (port["name"], "/metrics") for end in monitors)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_runs_a_command_with_its_own_secret_and_only_the_urls_that_it_needs(name):
    needs = {"worker": set(URLS), "migrate": {"DATABASE_URL_FILE"}, "topology": {"AMQP_URL_FILE"}}
    for component, template in pods(overlay(name)).items():
        only = container(template)
        assert only["args"] == [component]
        assert CliRunner().invoke(app, [*only["args"], "--help"]).exit_code == 0
        (volume,) = template["spec"]["volumes"]
        (mount,) = only["volumeMounts"]
        assert volume["secret"] == {"secretName": f"closeout-{component}", "defaultMode": 0o440}
        assert mount["name"] == volume["name"]
        files = {k: v for k, v in environment(overlay(name), component).items() if k in URLS}
        assert files.keys() == needs[component]
        assert {str(Path(file).parent) for file in files.values()} == {mount["mountPath"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_object_is_a_secret_or_holds_a_url(name):
    assert not [o for o in overlay(name) if o["kind"] == "Secret"]
    assert not re.search(r"\w+://", str(overlay(name)).replace(RUNBOOKS, ""))


@pytest.mark.parametrize("name", OVERLAYS)
def test_memory_has_a_limit_and_cpu_has_none(name):
    for template in pods(overlay(name)).values():
        resources = container(template)["resources"]
        assert set(resources["requests"]) == {"cpu", "memory"}
        # A throttled event loop fails its probes and delays runs; the request is its share.
        assert set(resources["limits"]) == {"memory"}


def test_a_job_with_invalid_settings_is_not_retried():
    for component in ("migrate", "topology"):
        spec = one(overlay("production"), "Job", component)["spec"]
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        first = spec["podFailurePolicy"]["rules"][0]
        assert first["action"] == "FailJob"
        assert first["onExitCodes"]["containerName"] == container(spec["template"])["name"]
        # The command line's exit status for a usage error.
        done = CliRunner().invoke(app, [component], env={"DATABASE_URL": "", "AMQP_URL": ""})
        assert first["onExitCodes"]["values"] == [done.exit_code]


def test_all_workers_together_fit_into_max_connections(tmp_path):
    settings = settings_of(overlay("production"), "worker", tmp_path)
    a_worker = settings.max_concurrent_transactions + SPARE_CONNECTIONS + CONSOLE_SESSIONS
    surge = one(overlay("production"), "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    most = one(overlay("production"), "ScaledObject")["spec"]["maxReplicaCount"]
    assert (most + surge) * a_worker <= POSTGRESQL_CONNECTIONS


def test_keda_reads_the_workers_queue_with_its_secret_and_never_scales_to_zero(tmp_path):
    scaled = one(overlay("production"), "ScaledObject")["spec"]
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["queueName"] == RUN_COMPLETED_QUEUE
    # KEDA does not count the deliveries that workers hold.
    assert (
        int(trigger["metadata"]["value"]) >= 10 * settings_of(overlay("production"), "worker", tmp_path).prefetch_count
    )
    assert scaled["minReplicaCount"] >= 2
    authentication = one(overlay("production"), "TriggerAuthentication")
    assert trigger["authenticationRef"] == {"name": authentication["metadata"]["name"]}
    (secret,) = authentication["spec"]["secretTargetRef"]
    mounted = environment(overlay("production"), "worker")["AMQP_URL_FILE"]
    assert secret == {"parameter": "host", "name": "closeout-worker", "key": Path(mounted).name}


def test_with_several_intake_queues_keda_reads_each_and_workers_and_topology_have_the_same_number(tmp_path):
    objects = changed(tmp_path, components=["keda", "intake-queues"])
    settings = settings_of(objects, "worker", tmp_path)
    assert settings.intake_queues == settings_of(objects, "topology", tmp_path).intake_queues == 3
    triggers = one(objects, "ScaledObject")["spec"]["triggers"]
    assert [trigger["metadata"]["queueName"] for trigger in triggers] == list(consumed_queues(settings.intake_queues))
    (single,) = one(overlay("production"), "ScaledObject")["spec"]["triggers"]
    for trigger in triggers:
        assert int(trigger["metadata"]["value"]) == int(single["metadata"]["value"]) / settings.intake_queues
        assert trigger["authenticationRef"] == single["authenticationRef"]
        assert trigger["metadata"] | {"queueName": "", "value": ""} == single["metadata"] | {
            "queueName": "",
            "value": "",
        }


def test_tags_and_jobs_carry_the_version_of_this_checkout():
    for template in pods(overlay("production")).values():
        assert container(template)["image"].endswith(f"/closeout:{VERSION}")
    for component in ("migrate", "topology"):
        name = one(overlay("production"), "Job", component)["metadata"]["name"]
        assert name == f"closeout-{component}-{VERSION.replace('.', '-')}"


def test_a_worker_may_connect_to_each_server_and_to_the_shipped_pooler():
    policies = {o["metadata"]["name"]: o for o in overlay("production") if o["kind"] == "NetworkPolicy"}
    reached = {port["port"] for rule in policies["closeout-worker"]["spec"]["egress"] for port in rule["ports"]}
    pooler = ConfigParser(inline_comment_prefixes=None)
    pooler.read(ROOT / "deploy/pgbouncer/pgbouncer.ini")
    assert reached == {53, 5432, 5671, 5672, pooler.getint("pgbouncer", "listen_port")}
