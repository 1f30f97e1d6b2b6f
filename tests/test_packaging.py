"""What is installed: the lock pins all that pyproject.toml asks for, by hash, and agrees with the constraints."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
