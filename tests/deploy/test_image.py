"""The Dockerfile: linted, and in agreement with the manifests. `scripts/image-proof` carries it out."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from imaging.building import make_context
from imaging.dockerfile import DockerfileError, Stage, read_dockerfile

from config.settings import Settings
from tests.support.manifests import ROOT, container, overlay, pods

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return read_dockerfile(DOCKERFILE)


def test_hadolint_has_nothing_to_say():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_environment_moves_between_stages_of_one_debian_and_a_shell_stays_behind(stages):
    build, last = stages
    assert re.findall(r"debian:?(\d+)", build.image) == re.findall(r"debian:?(\d+)", last.image)
    assert [i.rest for i in last.instructions if i.name == "COPY"] == ["--from=build /opt/closeout /opt/closeout"]
    assert "RUN" not in {i.name for i in last.instructions}, "there is no shell"
    for name in ("ENTRYPOINT", "CMD"):
        assert last.last(name).rest.startswith("["), "a shell would get the signals"


def test_whatever_pip_installs_is_a_wheel_of_a_known_hash_or_our_own(stages):
    commands = [step for i in stages[0].instructions if i.name == "RUN" for step in i.rest.split("&&")]
    installs = [step for step in commands if "pip" in step and " install " in step and "apt-get" not in step]
    assert len(installs) == 3
    for step in installs:
        own = "--no-deps --no-index" in step and "/opt/wheel/" in step
        assert own or ("--require-hashes" in step and "--only-binary :all:" in step), step


def test_the_image_runs_as_the_manifests_say(stages):
    last = stages[-1]
    for template in pods(overlay("production")).values():
        security = template["spec"]["securityContext"]
        assert last.last("USER").rest == f"{security['runAsUser']}:{security['runAsGroup']}"
        assert security["fsGroup"] == security["runAsGroup"]
        assert "command" not in container(template), "the image's ENTRYPOINT"
    assert int(last.last("EXPOSE").rest) == Settings.model_fields["http_port"].default


def test_what_is_sent_to_the_builder_is_what_the_dockerfile_copies(stages, tmp_path):
    make_context(ROOT, DOCKERFILE.with_name("Dockerfile.dockerignore"), tmp_path)
    copied = {word for i in stages[0].instructions if i.name == "COPY" for word in i.words[:-1]}
    sent = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert sent
    assert all(name in copied or name.partition("/")[0] in copied for name in sent)
    assert all((tmp_path / name).exists() for name in copied)


def test_an_instruction_that_the_proof_does_not_carry_out_is_refused(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\nADD x y\n")
    with pytest.raises(DockerfileError, match="ADD is not understood"):
        read_dockerfile(tmp_path / "Dockerfile")
