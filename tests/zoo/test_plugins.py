"""Families of one's own in the commands: `--plugin`."""

import json
import sys
from functools import partial

import pytest

from dyadlm.cli import main
from dyadlm.compare import Cell, Recipe
from dyadlm.compare.cell import run_cell
from dyadlm.errors import UserError
from dyadlm.zoo import FAMILIES
from dyadlm.zoo.mixer import MIXERS
from dyadlm.zoo.plugins import load_plugins

PLUGIN = """
import torch
from dyadlm.zoo import Family, Mixer, register_family, register_mixer
from dyadlm.zoo.families import mixed


class Previous(Mixer):
    def __init__(self, config):
        super().__init__(config)
        self.out = torch.nn.Linear(self.width, self.width, bias=False)

    def forward(self, x, state=None):
        return self.out(torch.nn.functional.pad(x, (0, 0, 1, -1))), None


register_mixer("previous", Previous)
register_family(Family("previous", "the token before", "mine", "-", mixed("previous"), decodes="nothing"))
"""


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def forget():
    FAMILIES.pop("previous", None)
    MIXERS.pop("previous", None)
    for name in [name for name in sys.modules if name.startswith("dyadlm_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    yield "mine.py"
    forget()


def test_commands_know_the_families_of_a_plugin(plugin, capsys):
    assert call("zoo", "list", "--json", "--plugin", plugin) == 0
    assert json.loads(capsys.readouterr().out)[-1]["name"] == "previous"
    assert call("zoo", "check", "previous", "--plugin", plugin, "--parameters", "60000") == 0
    assert "previous: sound" in capsys.readouterr().out
    plan = partial(call, "compare", "--models", "previous", "--data", "x", "--output", "out", "--dry-run")
    assert plan("--plugin", plugin) == 0
    forget()
    assert plan() == 2
    assert "'previous'" in capsys.readouterr().err


def test_a_worker_runs_the_code_that_the_study_began_with(plugin, tmp_path):
    recipe = Recipe(data=("x",), parameters=60_000, length=16, plugins=(plugin,), code=load_plugins([plugin]))
    forget()  # as a process that was started anew
    assert run_cell(recipe, Cell("previous"))[0]["faults"] == []
    forget()
    (tmp_path / plugin).write_text(PLUGIN + "# changed\n")
    with pytest.raises(UserError, match=r"mine\.py is other code here"):
        run_cell(recipe, Cell("previous"))


def test_a_module_is_a_plugin_too(plugin, tmp_path, monkeypatch):
    (tmp_path / "dyadlm_plugin_module.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_plugins(["dyadlm_plugin_module"]) == load_plugins(["dyadlm_plugin_module"]) != ""
    assert "previous" in FAMILIES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.py", None, r"There is no file none\.py"),
        ("no_such_module_here", None, "failed .ModuleNotFoundError"),
        ("bad.py", "1 / 0", r"bad\.py failed .ZeroDivisionError: division by zero"),
        ("bad.py", "x = = 1", r"bad\.py failed .SyntaxError"),
    ],
)
def test_a_plugin_that_fails_is_one_sentence(name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    for _ in range(2):  # a second try does not find what the first has left
        with pytest.raises(UserError, match=message):
            load_plugins([name])
