"""What docs/diagnose.md lists is there."""

import re
from pathlib import Path

from dyadlm.diagnose import PROBES, Subject

PAGE = (Path(__file__).parents[2] / "docs" / "diagnose.md").read_text(encoding="utf-8")


def test_the_adapter_is_as_short_as_promised():
    (example,) = re.findall(r"class Bigrams.*?\n\n\n", PAGE, re.DOTALL)
    assert len(example.strip().splitlines()) <= 20


def test_every_probe_is_in_the_table():
    listed = re.findall(r"^\| `(\w+)` \| .*\?", PAGE, re.MULTILINE)
    assert set(PROBES) <= set(listed)
    assert [name for name in listed if name in PROBES] == list(PROBES)


def test_every_member_of_the_contract_in_the_table_is_there():
    table = PAGE.split("| member |")[1].split("\n\n")[0]
    members = re.findall(r"`(\w+)(?:\(.*?\))?`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:]))
    known = {name for name in {*vars(Subject), *Subject.__annotations__} if not name.startswith("_")}
    assert sorted(members) == sorted(known - {"logits"})  # that one is required, and stands above


def test_every_published_value_stands_with_its_command_in_the_page():
    known = [value for probe in PROBES.values() for value in probe.published]
    assert len(known) >= 5
    for value in known:
        row = next(line for line in PAGE.splitlines() if line.startswith("|") and value.model in line)
        assert value.value in row.replace("`", "")
        assert f"`{value.command}`" in row
