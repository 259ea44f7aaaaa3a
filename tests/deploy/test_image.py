"""The Dockerfile is linted, agrees with the manifests, and builds an image whose command runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.settings import Settings
from consumer.version import installed_version
from tests.deploy.dockerfile import DockerfileError, Stage, make_context, read_dockerfile
from tests.support.manifests import ROOT, container, overlay, pods

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
CANNOT_BUILD = 2  # exit status of scripts/image where it has no root or no apt


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return read_dockerfile(DOCKERFILE)


def test_hadolint_reports_nothing():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_both_stages_use_one_debian_release_and_the_last_has_no_shell(stages):
    build, last = stages
    assert re.findall(r"debian:?(\d+)", build.image) == re.findall(r"debian:?(\d+)", last.image)
    assert [i.rest for i in last.instructions if i.name == "COPY"] == ["--from=build /opt/closeout /opt/closeout"]
    assert "RUN" not in {i.name for i in last.instructions}, "there is no shell"
    for name in ("ENTRYPOINT", "CMD"):
        assert last.last(name).rest.startswith("["), "a shell would get the signals"


def test_pip_installs_only_hashed_wheels_and_the_project_itself(stages):
    commands = [step for i in stages[0].instructions if i.name == "RUN" for step in i.rest.split("&&")]
    installs = [step for step in commands if "pip" in step and " install " in step and "apt-get" not in step]
    assert len(installs) == 3
    for step in installs:
        own = "--no-deps --no-index" in step and "/opt/wheel/" in step
        assert own or ("--require-hashes" in step and "--only-binary :all:" in step), step


def test_the_image_runs_as_the_manifests_require(stages):
    last = stages[-1]
    for template in pods(overlay("production")).values():
        security = template["spec"]["securityContext"]
        assert last.last("USER").rest == f"{security['runAsUser']}:{security['runAsGroup']}"
        assert security["fsGroup"] == security["runAsGroup"]
        assert "command" not in container(template), "the image's ENTRYPOINT"
    assert int(last.last("EXPOSE").rest) == Settings.model_fields["http_port"].default


def test_the_build_context_is_what_the_dockerfile_copies(stages, tmp_path):
    make_context(ROOT, DOCKERFILE.with_name("Dockerfile.dockerignore"), tmp_path)
    copied = {word for i in stages[0].instructions if i.name == "COPY" for word in i.words[:-1]}
    sent = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert sent
    assert all(name in copied or name.partition("/")[0] in copied for name in sent)
    assert all((tmp_path / name).exists() for name in copied)


def test_an_unknown_instruction_is_refused(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\nADD x y\n")
    with pytest.raises(DockerfileError, match="unknown instruction ADD"):
        read_dockerfile(tmp_path / "Dockerfile")


@pytest.mark.timeout(900)  # the first build on a machine downloads a Debian base system
def test_the_image_builds_and_its_command_runs_on_a_read_only_root():
    done = subprocess.run([ROOT / "scripts" / "image"], capture_output=True, text=True, check=False)
    if done.returncode == CANNOT_BUILD and "CI" not in os.environ:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    version, _, usage = done.stdout.partition("\n")
    assert version == installed_version()
    assert "Usage: closeout" in usage
