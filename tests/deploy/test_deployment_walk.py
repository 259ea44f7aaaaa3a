"""The README's way from an empty cluster to a running worker names what the manifests have."""

import re
import shlex
from pathlib import Path

import pytest
from imaging.dockerfile import read_dockerfile

from config.settings import load_settings
from consumer.metrics import Metrics
from tests.deploy.manifests import ROOT, component_of, container, environment, one, overlay, pods
from tests.deploy.test_alerts import ALERTS

README = (ROOT / "README.md").read_text()
SECTION = README.partition("\n## Deploying to Kubernetes\n")[2].partition("\n## ")[0]
ROLLOUT = SECTION.partition("\n### Turning the coordinator on by tenant\n")[2]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith(("kubectl", "docker"))
]


def test_the_secrets_have_the_names_and_the_keys_that_the_pods_read():
    made = {
        words[words.index("generic") + 1]: {
            word.removeprefix("--from-file=").partition("=")[0] for word in words if word.startswith("--from-file=")
        }
        for words in COMMANDS
        if "secret" in words
    }
    read = {
        template["spec"]["volumes"][0]["secret"]["secretName"]: {
            Path(value).name
            for variable, value in environment(overlay("production"), component).items()
            if variable.endswith("_FILE")
        }
        for component, template in pods(overlay("production")).items()
    }
    assert made == read


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


def test_image_and_command_are_the_dockerfile_s():
    (built,) = {words[words.index("--tag") + 1] for words in COMMANDS if words[:2] == ["docker", "build"]}
    assert built == container(pods(overlay("production"))["worker"])["image"]
    inside = next(words[words.index("--") + 1 :] for words in COMMANDS if "exec" in words)
    last = read_dockerfile(ROOT / "deploy" / "Dockerfile")[-1]
    assert inside[:1] == last.last("ENTRYPOINT").words


def test_the_rollout_s_example_is_for_the_named_tenant_alone():
    (example,) = re.findall(r"```yaml\n(.*?)```", ROLLOUT, re.DOTALL)
    environ = dict(re.findall(r"- (\w+)=(\S*)", example))
    settings = load_settings(environ, need_amqp=False, need_database=False)
    assert settings.transaction_coordinator_enabled
    assert settings.transaction_coordinator_tenants == {"acme"}


@pytest.mark.parametrize("pattern", [r"\bcloseout_\w+", r"\bCloseout[A-Z]\w+"])
def test_what_is_watched_during_a_rollout_exists(pattern):
    known = {metric.name for metric in Metrics().described} | set(ALERTS)
    named = set(re.findall(pattern, ROLLOUT))
    assert named
    assert named <= known
