"""The Kubernetes guide, from an empty cluster to a running worker, agrees with the manifests."""

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from config.settings import load_settings
from consumer.metrics import Metrics
from tests.deploy.dockerfile import read_dockerfile
from tests.deploy.test_alerts import ALERTS
from tests.support.guides import read, section
from tests.support.manifests import (
    COMPONENTS,
    ROOT,
    changed,
    component_of,
    container,
    environment,
    one,
    overlay,
    pods,
)
from tests.support.roles import DEFINITIONS, OWNER, TOPOLOGY_USER, WORKER, WORKER_USER

GUIDE = "deploy/kubernetes/README.md"
ROLLOUT = section(GUIDE, "## Turning the coordinator on by tenant")
INTAKE = section(GUIDE, "## Several intake queues")


def commands(text: str) -> list[list[str]]:
    """Return the commands in the shell blocks of *text*."""
    return [
        shlex.split(line, comments=True)
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", "").splitlines()
        if line.startswith(("kubectl", "docker", "psql", "rabbitmqctl", "printf"))
    ]


COMMANDS = commands(read(GUIDE).replace(INTAKE, ""))
SECRETS = {words[words.index("generic") + 1]: words for words in COMMANDS if "secret" in words}
# The service accounts of the pods that read each secret.
NAMES = {
    "closeout-migrate": {"database-url": OWNER},
    "closeout-topology": {"amqp-url": TOPOLOGY_USER},
    "closeout-worker": {"database-url": WORKER, "amqp-url": WORKER_USER},
}


def files_of(words: list[str]) -> dict[str, str]:
    """Return the files of a secret by the keys that they get."""
    pairs = (word.removeprefix("--from-file=").partition("=") for word in words if word.startswith("--from-file="))
    return {key: file for key, _, file in pairs}


def place_of(*words: str) -> int:
    """Return the position of the only command with all of *words*."""
    (found,) = (number for number, command in enumerate(COMMANDS) if set(words) <= set(command))
    return found


def test_the_secrets_have_the_names_and_the_keys_that_the_pods_read():
    made = {name: set(files_of(words)) for name, words in SECRETS.items()}
    read = {
        template["spec"]["volumes"][0]["secret"]["secretName"]: {
            Path(value).name
            for variable, value in environment(overlay("production"), component).items()
            if variable.endswith("_FILE")
        }
        for component, template in pods(overlay("production")).items()
    }
    assert made == read


def test_each_url_names_a_role_or_user_that_gets_a_password():
    """Without a new line at its end: KEDA parses the worker's secret, and refuses one."""
    urls = {words[3].removeprefix(">"): words[2] for words in COMMANDS if words[:2] == ["printf", "%s"]}
    named: dict[str, dict[str, str]] = {}
    for secret, words in SECRETS.items():
        for key, file in files_of(words).items():
            variable = key.replace("-", "_").upper()
            needs = {"need_amqp": variable == "AMQP_URL", "need_database": variable == "DATABASE_URL"}
            load_settings({variable: urls[file]}, **needs)
            url = urlsplit(urls[file])
            assert url.path == ("/closeout" if needs["need_database"] else f"/{DEFINITIONS['vhosts'][0]['name']}")
            named.setdefault(secret, {})[key] = str(url.username)
    assert named == NAMES
    everybody = {name for names in named.values() for name in names.values()}
    set_in_psql = [word for words in COMMANDS for word in words if word.startswith("\\password ")]
    # RabbitMQ 4's rabbitmqctl cannot read a password from the terminal: it would wait forever.
    changed = [words[2] for words in COMMANDS if words[1] == "change_password" and len(words) == 4]
    assert sorted([word.split()[1] for word in set_in_psql] + changed) == sorted(everybody)


def test_roles_users_and_privileges_are_created_before_they_are_needed():
    assert place_of("deploy/postgresql/roles.sql") < place_of("closeout-migrate")
    assert place_of("import_definitions", "deploy/rabbitmq/definitions.json") < place_of("closeout-topology", "generic")
    waited, last = place_of("wait"), len(COMMANDS) - 1 - COMMANDS[::-1].index(["kubectl", "apply", "-k", "$overlay"])
    assert waited < place_of("deploy/postgresql/rights.sql") < last


def test_each_step_applies_the_part_that_the_next_one_needs():
    steps = []
    for words in COMMANDS:
        if words[1] == "apply":
            selector = words[words.index("-l") + 1] if "-l" in words else ""
            chosen = set(re.findall(r"\w+", selector.partition("component")[2])) - {"in"}
            steps.append([o for o in overlay("production") if not chosen or component_of(o) in chosen])
    foundation, jobs, everything = steps
    assert {o["kind"] for o in foundation} == {"Namespace", "ServiceAccount", "NetworkPolicy"}
    assert jobs == [o for o in overlay("production") if o["kind"] == "Job"]
    assert everything == list(overlay("production"))


def test_every_object_that_a_command_names_exists():
    objects = {f"{o['kind'].lower()}/{o['metadata']['name']}" for o in overlay("production")}
    named = {word for words in COMMANDS for word in words if re.match(r"(job|deployment|service)/", word)}
    assert len(named) == 4
    assert named <= objects
    spaces = {words[words.index("-n") + 1] for words in COMMANDS if "-n" in words}
    assert spaces == {one(overlay("production"), "Namespace")["metadata"]["name"]}


def test_every_object_that_the_steps_to_several_intake_queues_name_exists(tmp_path):
    components = [name for name in re.findall(r"`([a-z-]+)`", INTAKE) if name in COMPONENTS]
    assert set(components) == {"keda", "intake-queues", "topology-operator", "intake-queues-operator"}
    several = changed(tmp_path, components=["keda", "topology-operator", "intake-queues", "intake-queues-operator"])
    objects = [*overlay("production"), *several, *changed(tmp_path, components=["topology-operator"])]
    names = {o["metadata"]["name"] for o in objects}
    for words in commands(INTAKE):
        if "delete" in words:
            assert words[words.index("delete") + 2] in names
        if "-l" in words:
            assert words[words.index("-l") + 1].rpartition("=")[2] in {component_of(o) for o in objects}
    for name in re.findall(r"binding `([a-z-]+)`|delete `([a-z-]+)`", INTAKE):
        assert "".join(name) in names


def test_image_and_command_match_the_dockerfile():
    (built,) = {words[words.index("--tag") + 1] for words in COMMANDS if words[:2] == ["docker", "build"]}
    assert built == container(pods(overlay("production"))["worker"])["image"]
    inside = next(words[words.index("--") + 1 :] for words in COMMANDS if "exec" in words)
    last = read_dockerfile(ROOT / "deploy" / "Dockerfile")[-1]
    assert inside[:1] == last.last("ENTRYPOINT").words


def test_the_rollout_example_is_for_the_named_tenant_only():
    (example,) = re.findall(r"```yaml\n(.*?)```", ROLLOUT, re.DOTALL)
    environ = dict(re.findall(r"- (\w+)=(\S*)", example))
    settings = load_settings(environ, need_amqp=False, need_database=False)
    assert settings.transaction_coordinator_enabled
    assert settings.transaction_coordinator_tenants == {"acme"}


@pytest.mark.parametrize("pattern", [r"\bcloseout_\w+", r"\bCloseout[A-Z]\w+"])
def test_every_metric_and_alert_of_the_rollout_exists(pattern):
    known = {metric.name for metric in Metrics().described} | set(ALERTS)
    named = set(re.findall(pattern, ROLLOUT))
    assert named
    assert named <= known
