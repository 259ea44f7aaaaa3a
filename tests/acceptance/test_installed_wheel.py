"""The wheel, installed outside the checkout."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support import roles

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it into a folder; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)],
        check=True,
    )
    return target


def closeout(installed: Path, *words: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import consumer.cli, sys; print(consumer.cli.__file__); consumer.cli.main()", *words],
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    assert first.startswith(str(installed)), "the checkout's code ran instead of the wheel's"
    return rest


def test_the_installed_wheel_migrates_a_database_that_then_passes_the_check(installed, postgres, empty_database_url):
    url = roles.as_role(empty_database_url, roles.OWNER)
    roles.make_roles(postgres, urlsplit(url).path[1:])
    assert "empty -> " in closeout(installed, "migrate", DATABASE_URL=url)
    assert "agree" in closeout(installed, "migrate", "--check", DATABASE_URL=url)


def test_the_installed_wheel_prints_its_documents_and_its_version(installed):
    assert "urn:closeout:run-completed:1" in closeout(installed, "schema", "run-completed")
    assert closeout(installed, "--version").strip()


def test_the_installed_wheel_is_described_by_the_readme_and_contains_no_guide(installed):
    (metadata,) = installed.glob("closeout-*.dist-info/METADATA")
    assert metadata.read_text().endswith((CHECKOUT / "README.md").read_text())
    assert list(installed.rglob("README.md")) == []


def test_the_installed_wheel_declares_its_packages_as_typed(installed):
    assert {path.parent.name for path in installed.rglob("py.typed")} >= {"config", "consumer", "domains"}


def test_the_installed_wheel_has_the_consoles_templates_and_files(installed):
    program = (
        "import asyncio; from consumer.console import rendering, responses\n"
        "page = asyncio.run(rendering.Rendering().page('message.html', title='<t>', lines=['x']))\n"
        "print(responses.__file__, sorted(responses.StaticFiles()._files), b'&lt;t&gt;' in page.body)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert done.stdout.startswith(str(installed)), "the checkout's code ran instead of the wheel's"
    assert done.stdout.strip().endswith("['console.css', 'icon.svg', 'live.js'] True")


def test_get_transaction_coordinator_returns_one_instance_and_create_a_new_one(installed, database_url):
    url = roles.as_role(database_url, roles.WORKER)
    program = (
        "import consumer; a = consumer.get_transaction_coordinator()\n"
        "assert a is consumer.get_transaction_coordinator()\n"
        f"b = consumer.create_transaction_coordinator(database_url={url!r}); assert a is not b; print(b.mode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=installed,
        env={**os.environ, "DATABASE_URL": url, "AMQP_URL": "amqp://u:p@localhost/"},
    )
    assert done.stdout.strip() == "atomic"
