"""What is installed and released: the lock, the constraints, the files of a release, and the Dockerfile."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dyadlm.cli.app import app
from dyadlm.version import __version__

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, tuple[str, int]]:
    """name: version and number of hashes, of requirements.lock."""
    found = {}
    for part in re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text()):
        if match := re.match(r"([A-Za-z0-9._-]+)==(\S+)", part):
            found[canonicalize_name(match[1])] = (match[2], part.count("--hash=sha256:"))
    return found


def test_the_lock_pins_everything_by_hash():
    locked = pins()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        asked = Requirement(text)
        version, _ = locked[canonicalize_name(asked.name)]
        assert asked.specifier.contains(version, prereleases=True), text
    assert len(locked) > 100
    assert all(hashes for _, hashes in locked.values())


def test_the_constraints_agree_with_the_lock():
    locked = pins()
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        asked = Requirement(line)
        assert asked.specifier.contains(locked[canonicalize_name(asked.name)][0]), line


def test_the_changelog_has_the_version():
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("script", sorted((ROOT / "release").glob("*.sh")), ids=lambda script: script.name)
def test_scripts_of_the_release_can_be_read_and_run(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111


def instruction(name: str) -> list[str]:
    """The words of an instruction of the Dockerfile, which it gives as JSON."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return json.loads(re.search(rf"^{name} .*?(\[.*\])$", text, re.MULTILINE)[1])


def test_the_image_runs_a_command_that_there_is():
    """With options that it has."""
    program, verb, *rest = instruction("ENTRYPOINT")
    assert program == "dyadlm"
    command = typer.main.get_command(app).commands[verb]
    context = command.make_context(verb, rest)
    assert context.params["port"] == 8000
    (health,) = (word for word in instruction("HEALTHCHECK") if "/health" in word)
    compile(health, "health", "exec")
    assert f"127.0.0.1:{context.params['port']}/health" in health


def test_the_image_installs_an_extra_that_there_is():
    """And copies what the build reads."""
    text = (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = re.findall(r'"\.\[(\w+)\]"', text)
    assert extra in project["optional-dependencies"]
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split())
