"""The manifests: Kustomize builds them, and each object is one that a cluster accepts."""

import json
import subprocess
from collections import Counter
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ValidationError
from servers import ServerError

from tests.deploy.test_alerts import RULES
from tests.support.manifests import (
    COMPONENTS,
    KUBERNETES,
    OVERLAYS,
    ROOT,
    changed,
    component_of,
    container,
    kustomize,
    one,
    overlay,
    pods,
)

# The oldest version that the base supports, and the newest with published schemas.
VERSIONS = ("1.31", "1.37")
AUTOSCALERS = ("ScaledObject", "HorizontalPodAutoscaler")


@cache
def operators() -> dict[str, type[BaseModel]]:
    """Return the models of the operators' resources; importing them takes two seconds, which other tests avoid."""
    from cloudcoil.models.keda.v1alpha1 import ScaledObject, TriggerAuthentication
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

    return {model.__name__: model for model in (ScaledObject, TriggerAuthentication, PodMonitor, PrometheusRule)}


def check(an_object: dict[str, Any]) -> None:
    """Raise unless *an_object* is valid, without unknown fields and without text in place of a number."""
    model = operators().get(an_object["kind"])
    if model is not None:
        model.model_validate_json(json.dumps(an_object), strict=True, extra="forbid")
        return
    for version in VERSIONS:
        kubernetes_validate.validate(an_object, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_is_valid_by_its_schema(name):
    for an_object in overlay(name):
        check(an_object)


def test_the_objects_for_clusters_without_keda_are_valid_too(tmp_path):
    check(one(changed(tmp_path, components=["hpa"]), "HorizontalPodAutoscaler"))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec.minReadySecond", 10),
        ("Deployment", "spec.minReadySeconds", "10"),
        ("Job", "spec.podFailurePolicy.rules", [{"actions": "FailJob"}]),
        ("NetworkPolicy", "spec.policyTypes", "Ingress"),
        ("ScaledObject", "spec.minReplicas", 2),
        ("ScaledObject", "spec.minReplicaCount", "2"),
        ("PodMonitor", "spec.podMetricsEndpoint", []),
        ("PrometheusRule", "spec.groups", [{"name": "x", "rules": [{"alert": "X"}]}]),
    ],
)
def test_a_misspelled_field_or_a_value_of_the_wrong_type_is_detected(kind, path, value):
    an_object = json.loads(json.dumps(next(o for o in overlay("production") if o["kind"] == kind)))
    *folders, field = path.split(".")
    place = an_object
    for folder in folders:
        place = place[folder]
    place[field] = value
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError)):
        check(an_object)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_meets_the_restricted_standard(name):
    namespace = one(overlay(name), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for template in pods(overlay(name)).values():
        spec, only = template["spec"], container(template)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 10_000  # no user of the node's
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all(set(volume) == {"name", "secret"} for volume in spec["volumes"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_pod_has_a_token_or_the_variables_of_neighbouring_services(name):
    accounts = {o["metadata"]["name"]: o for o in overlay(name) if o["kind"] == "ServiceAccount"}
    for template in pods(overlay(name)).values():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert accounts[spec["serviceAccountName"]]["automountServiceAccountToken"] is False
    assert not [o for o in overlay(name) if "Role" in o["kind"]]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_belongs_to_one_namespace_and_to_one_step_of_the_readme(name):
    (namespace,) = {o["metadata"].get("namespace", o["metadata"]["name"]) for o in overlay(name)}
    assert namespace.startswith("closeout")
    for an_object in overlay(name):
        assert component_of(an_object) in {"foundation", "migrate", "topology", "worker"}, an_object["metadata"]
        assert an_object["metadata"]["labels"]["app.kubernetes.io/name"] == "closeout"
    steps = Counter(map(component_of, overlay(name)))
    assert steps["migrate"] == steps["topology"] == 1
    # The Jobs' prerequisites are applied before them.
    needed = {"Namespace", "ServiceAccount", "NetworkPolicy"}
    assert {o["kind"] for o in overlay(name) if component_of(o) == "foundation"} == needed


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_worker_has_either_one_autoscaler_or_a_number_of_replicas(name):
    scalers = [o for o in overlay(name) if o["kind"] in AUTOSCALERS]
    deployment = one(overlay(name), "Deployment")
    assert len(scalers) == (0 if "replicas" in deployment["spec"] else 1)
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert scaler["spec"]["scaleTargetRef"]["kind"] == deployment["kind"]


def test_an_overlay_without_a_namespace_keeps_all_objects_in_that_of_the_base(tmp_path):
    objects = changed(tmp_path, components=COMPONENTS)
    assert {o["metadata"].get("namespace") for o in objects if o["kind"] != "Namespace"} == {"closeout"}


def test_the_references_of_an_autoscaler_follow_an_overlays_names(tmp_path):
    secret = {"name": "closeout-worker", "literals": ["database-url=postgresql://h/d", "amqp-url=amqp://h"]}
    named: dict[str, Any] = {"namespace": "mine", "namePrefix": "eu-", "secretGenerator": [secret]}
    for component in ("keda", "hpa"):
        objects = changed(tmp_path, components=[component], **named)
        names = {o["kind"]: o["metadata"]["name"] for o in objects}
        (scaler,) = (o["spec"] for o in objects if o["kind"] in AUTOSCALERS)
        assert scaler["scaleTargetRef"]["name"] == names["Deployment"] == "eu-closeout-worker"
        mounted = pods(objects)["worker"]["spec"]["volumes"][0]["secret"]["secretName"]
        assert mounted == names["Secret"] != "closeout-worker"
        if component == "keda":
            assert [trigger["authenticationRef"]["name"] for trigger in scaler["triggers"]] == ["eu-closeout-queue"]
            targets = one(objects, "TriggerAuthentication")["spec"]["secretTargetRef"]
            assert {target["name"] for target in targets} == {mounted}


def test_a_secret_created_by_hand_keeps_its_name_for_the_worker_and_for_keda(tmp_path):
    objects = changed(tmp_path, components=["keda"], namePrefix="eu-")
    mounted = pods(objects)["worker"]["spec"]["volumes"][0]["secret"]["secretName"]
    targets = one(objects, "TriggerAuthentication")["spec"]["secretTargetRef"]
    assert {target["name"] for target in targets} == {mounted} == {"closeout-worker"}


def test_the_version_without_keda_scales_the_same_deployment_between_the_same_bounds(tmp_path):
    objects = changed(tmp_path, components=["hpa"])
    scaler, keda = one(objects, "HorizontalPodAutoscaler")["spec"], one(overlay("production"), "ScaledObject")["spec"]
    assert scaler["scaleTargetRef"]["name"] == one(objects, "Deployment")["metadata"]["name"]
    assert "replicas" not in one(objects, "Deployment")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (keda["minReplicaCount"], keda["maxReplicaCount"])
    assert scaler["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_selector_matches_only_the_intended_pods(name):
    labels = {component: template["metadata"]["labels"] for component, template in pods(overlay(name)).items()}
    for an_object in overlay(name):
        spec = an_object.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if an_object["kind"] in {"Deployment", "Service", "PodDisruptionBudget", "PodMonitor", "NetworkPolicy"}:
            wanted = selector.get("matchLabels", selector)
            chosen = {component for component, has in labels.items() if wanted.items() <= has.items()}
            is_policy = an_object["kind"] == "NetworkPolicy"
            assert chosen == {an_object["metadata"]["name"].removeprefix("closeout-") if is_policy else "worker"}
    spread = pods(overlay(name))["worker"]["spec"]["topologySpreadConstraints"]
    assert all(rule["labelSelector"]["matchLabels"] == labels["worker"] for rule in spread)
    # Every pod is behind a policy for both directions.
    policies = [o for o in overlay(name) if o["kind"] == "NetworkPolicy"]
    assert len(policies) == len(labels)
    assert all(sorted(policy["spec"]["policyTypes"]) == ["Egress", "Ingress"] for policy in policies)


def test_a_changed_setting_replaces_the_workers_and_leaves_the_jobs_unchanged(tmp_path):
    before = changed(tmp_path / "before")
    after = changed(tmp_path / "after", settings=["BATCH_MAX_RUNS=50"])
    for component in ("migrate", "topology"):
        assert one(before, "Job", component) == one(after, "Job", component)
    assert one(before, "Deployment")["spec"]["template"] != one(after, "Deployment")["spec"]["template"]


def test_the_prometheus_rule_contains_the_tested_rules_as_the_script_writes_them(tmp_path):
    rule = one(overlay("production"), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES.read_text())
    made = tmp_path / "rules.yaml"
    subprocess.run([ROOT / "scripts" / "prometheusrule", made], check=True)
    shipped = KUBERNETES / "components" / "monitoring" / "rules.yaml"
    assert shipped.read_text() == made.read_text(), "run scripts/prometheusrule"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("resources: [missing.yaml]\n", "missing.yaml"), ("commonLabels: {a: b}\nresources: []\n", "deprecated")],
)
def test_a_kustomize_error_or_warning_is_reported_unmodified(tmp_path, content, complaint):
    (tmp_path / "kustomization.yaml").write_text(content)
    with pytest.raises(ServerError, match=complaint):
        kustomize(tmp_path)
