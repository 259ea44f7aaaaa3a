"""RabbitMQ's topology is defined in three places, which must agree.

``consumer/amqp/topology.py`` declares it, ``deploy/rabbitmq/definitions.json`` is imported, and the Topology Operator's
resources (rabbitmq.com/v1beta1) are applied. Field names are those of the operator's Go types, ``api/v1beta1``.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from consumer.amqp.intake_topology import topology_for
from consumer.amqp.topology import TOPOLOGY, UNREACHABLE_DELIVERY_LIMIT
from tests.support.manifests import changed, component_of
from tests.support.roles import DEFINITIONS, DEPLOY

COMPONENT = DEPLOY / "kubernetes/components/topology-operator"
SEVERAL = DEPLOY / "kubernetes/components/intake-queues-operator"
VHOST = "closeout"
CLUSTER = {"name": "rabbitmq"}


def resources() -> Iterator[dict[str, Any]]:
    for name in yaml.safe_load((COMPONENT / "kustomization.yaml").read_text())["resources"]:
        yield from yaml.safe_load_all((COMPONENT / name).read_text())


def specs(kind: str) -> list[dict[str, Any]]:
    """Return the specs of *kind*, without their common fields."""
    found = [dict(resource["spec"]) for resource in resources() if resource["kind"] == kind]
    assert all(spec.pop("rabbitmqClusterReference") == CLUSTER for spec in found)
    if kind not in {"User", "Vhost"}:
        assert all(spec.pop("vhost") == VHOST for spec in found)
    return found


def defined(kind: str) -> list[dict[str, Any]]:
    """Return the definitions of *kind*, without their common virtual host."""
    found = [dict(entry) for entry in DEFINITIONS[kind]]
    if kind not in {"users", "vhosts"}:
        assert all(entry.pop("vhost") == VHOST for entry in found)
    return found


def test_the_definitions_equal_the_topology_that_is_declared():
    common = {"durable": True, "auto_delete": False}
    assert defined("exchanges") == [
        {"name": exchange.name, "type": exchange.type, **common, "internal": False, "arguments": {}}
        for exchange in TOPOLOGY.exchanges
    ]
    assert defined("queues") == [
        {"name": queue.name, **common, "arguments": dict(queue.arguments)} for queue in TOPOLOGY.queues
    ]
    assert defined("bindings") == [
        {"source": exchange, "destination": queue, "destination_type": "queue", "routing_key": key, "arguments": {}}
        for queue, exchange, key in TOPOLOGY.bindings
    ]
    assert DEFINITIONS["vhosts"] == [{"name": VHOST}]


def test_every_queue_and_the_policy_have_the_same_delivery_limit():
    assert [queue["arguments"]["x-delivery-limit"] for queue in defined("queues")] == [UNREACHABLE_DELIVERY_LIMIT] * 3
    (policy,) = defined("policies")
    assert policy["definition"] == {"delivery-limit": UNREACHABLE_DELIVERY_LIMIT, "overflow": "reject-publish"}


def test_no_user_has_a_password_or_a_tag():
    assert {(user["password_hash"], *user["tags"]) for user in defined("users")} == {("",)}


def test_the_resources_have_the_operators_version_and_unique_names_per_kind():
    everything = list(resources())
    assert {resource["apiVersion"] for resource in everything} == {"rabbitmq.com/v1beta1"}
    names = [(resource["kind"], resource["metadata"]["name"]) for resource in everything]
    assert len(set(names)) == len(names)
    files = {path.name for path in COMPONENT.iterdir()} - {"kustomization.yaml"}
    assert files == set(yaml.safe_load((COMPONENT / "kustomization.yaml").read_text())["resources"])


@pytest.mark.parametrize(
    ("kind", "of", "fields"),
    [
        ("Vhost", "vhosts", {"name": "name"}),
        ("Exchange", "exchanges", {"name": "name", "type": "type", "durable": "durable", "autoDelete": "auto_delete"}),
        (
            "Binding",
            "bindings",
            {
                "source": "source",
                "destination": "destination",
                "destinationType": "destination_type",
                "routingKey": "routing_key",
            },
        ),
        (
            "Policy",
            "policies",
            {
                "name": "name",
                "pattern": "pattern",
                "applyTo": "apply-to",
                "priority": "priority",
                "definition": "definition",
            },
        ),
    ],
)
def test_every_field_of_a_resource_equals_its_definition(kind, of, fields):
    # Properties that the resources do not have keep their defaults.
    assert all(not entry.get("internal") for entry in defined(of))
    assert specs(kind) == [{theirs: entry[ours] for theirs, ours in fields.items()} for entry in defined(of)]


def test_the_queues_equal_the_definitions_with_their_type_among_the_arguments():
    for spec, queue in zip(specs("Queue"), defined("queues"), strict=True):
        assert {"x-queue-type": spec.pop("type"), **spec.pop("arguments")} == queue.pop("arguments")
        assert spec == {"name": queue["name"], "durable": queue["durable"], "autoDelete": queue["auto_delete"]}


def test_the_users_and_permissions_equal_the_definitions():
    names = [resource["metadata"]["name"] for resource in resources() if resource["kind"] == "User"]
    assert names == [user["name"] for user in defined("users")]
    assert specs("User") == [{"importCredentialsSecret": {"name": f"{name}-broker"}} for name in names]
    for kind, of in (("Permission", "permissions"), ("TopicPermission", "topic_permissions")):
        assert specs(kind) == [
            {"userReference": {"name": entry.pop("user")}, "permissions": entry} for entry in defined(of)
        ]


def test_with_the_component_the_operator_replaces_the_topology_job(tmp_path):
    objects = changed(tmp_path, components=["topology-operator"])
    assert not [o for o in objects if o["kind"] == "Job" and component_of(o) == "topology"]
    theirs = [o for o in objects if o["apiVersion"] == "rabbitmq.com/v1beta1"]
    assert len(theirs) == len(list(resources()))
    assert {component_of(o) for o in theirs} == {"topology"}


def test_the_definitions_with_three_queues_equal_the_topology_that_is_declared():
    several = json.loads((DEPLOY / "rabbitmq/definitions-3-queues.json").read_text())
    topology = topology_for(3)
    changing = ("exchanges", "queues", "bindings")
    assert {kind: several[kind] for kind in several if kind not in changing} == {
        kind: DEFINITIONS[kind] for kind in DEFINITIONS if kind not in changing
    }
    assert {entry["name"]: (entry["type"], entry["arguments"]) for entry in several["exchanges"]} == {
        exchange.name: (exchange.type, dict(exchange.arguments)) for exchange in topology.exchanges
    }
    assert {entry["name"]: entry["arguments"] for entry in several["queues"]} == {
        queue.name: dict(queue.arguments) for queue in topology.queues
    }
    bound = [(b["destination"], b["source"], b["routing_key"], b["destination_type"]) for b in several["bindings"]]
    assert bound == [
        *((*binding, "queue") for binding in topology.bindings),
        *((*binding, "exchange") for binding in topology.exchange_bindings),
    ]


def test_the_component_for_several_queues_renders_the_topology_with_three(tmp_path):
    objects = changed(tmp_path, components=["keda", "intake-queues", "topology-operator", "intake-queues-operator"])
    topology = topology_for(3)
    rendered = [o for o in objects if o["apiVersion"] == "rabbitmq.com/v1beta1"]
    assert {component_of(o) for o in rendered} == {"topology"}

    def specs_of(kind: str) -> list[dict[str, Any]]:
        return [o["spec"] for o in rendered if o["kind"] == kind]

    assert {spec["name"]: (spec["type"], spec.get("arguments", {})) for spec in specs_of("Exchange")} == {
        exchange.name: (exchange.type, dict(exchange.arguments)) for exchange in topology.exchanges
    }
    assert {spec["name"]: {"x-queue-type": spec["type"], **spec["arguments"]} for spec in specs_of("Queue")} == {
        queue.name: dict(queue.arguments) for queue in topology.queues
    }
    bound = {(b["destination"], b["source"], b["routingKey"], b["destinationType"]) for b in specs_of("Binding")}
    assert bound == {
        *((*binding, "queue") for binding in topology.bindings),
        *((*binding, "exchange") for binding in topology.exchange_bindings),
    }
    assert {path.name for path in SEVERAL.iterdir()} == {
        "kustomization.yaml", *yaml.safe_load((SEVERAL / "kustomization.yaml").read_text())["resources"],
    }  # fmt: skip
