"""Families of one's own in the commands: `--plugin`."""

import errno
import json
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from dyadlm.cli import main
from dyadlm.compare import Cell, Recipe
from dyadlm.compare.cell import run_cell
from dyadlm.errors import UserError
from dyadlm.zoo import FAMILIES, Family, Sizes, count, register_family, solve
from dyadlm.zoo.mixer import MIXERS
from dyadlm.zoo.plugins import blaming, load_plugins

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


def test_all_modules_of_a_package_are_its_code(plugin, tmp_path, monkeypatch):
    package = tmp_path / "dyadlm_plugin_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = load_plugins([package.name])
    (package / "part.py").write_text("x = 2\n")
    assert load_plugins([package.name]) != before


def test_what_a_plugin_prints_is_not_among_the_results(plugin, tmp_path, capsys):
    (tmp_path / plugin).write_text(
        PLUGIN.replace("        return self.out", '        print("looking")\n        return self.out')
        + "print('hello')\n"
    )
    assert call("zoo", "list", "--json", "--plugin", plugin) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)
    assert "hello" in told.err
    assert call("zoo", "check", "previous", "--json", "--plugin", plugin, "--parameters", "60000") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)[0]["family"] == "previous"
    assert "looking" in told.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("super().__init__(config)", "raise KeyError('mine')", r"KeyError: 'mine', mine\.py, line \d+"),
        ("super().__init__(config)", "raise SystemExit(3)", r"SystemExit: 3, mine\.py, line \d+"),
    ],
)
def test_a_family_that_fails_is_named(plugin, tmp_path, capsys, old, new, message):
    (tmp_path / plugin).write_text(PLUGIN.replace(old, new))
    assert call("zoo", "check", "previous", "--plugin", plugin, "--parameters", "60000") == 2
    assert re.search(rf"The family previous failed \({message}.*\); mend it, or leave it out", capsys.readouterr().err)
    recipe = Recipe(data=("x",), parameters=60_000, length=16, plugins=(plugin,), code=load_plugins([plugin]))
    with pytest.raises(UserError, match=message):
        run_cell(recipe, Cell("previous"))


def test_errors_of_other_families_stay_what_they_are():
    with pytest.raises(KeyError), blaming("llama"):
        raise KeyError("ours")
    with pytest.raises(OSError, match="left"), blaming("mine"):
        raise OSError(errno.ENOSPC, "No space left")
    with pytest.raises(MemoryError), blaming("mine"):
        raise MemoryError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"name": name}, "letters, digits") for name in ("", "../up", "a/b", "a b", "a\n", "<b>", "x" * 65)),
        ({"decodes": "sometimes"}, "state, cache, nothing"),
        ({"layers": 0}, "at least one layer"),
        ({"step": 0}, "at least one layer"),
    ],
)
def test_families_that_cannot_be_compared_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        register_family(replace(FAMILIES["llama"], **{"name": "mine"} | fields))
    assert "mine" not in FAMILIES


@pytest.mark.parametrize("made", [None, torch.nn.Linear(2, 2)])
def test_a_builder_gives_a_model_of_transformers(made):
    with pytest.raises(UserError, match=r"builds a (NoneType|Linear)"):
        solve(Family("mine", "", "", "", lambda sizes: made), 10_000, None, 259, 16)


def test_a_builder_that_does_not_heed_the_inner_width():
    family = Family("mine", "", "", "", lambda sizes: FAMILIES["llama"].make(replace(sizes, inner=64)))
    sizes = Sizes(64, 5, 64, 259, 16)
    assert solve(family, count(family, sizes), None, 259, 16).width == 64


def test_a_part_of_a_package_that_is_missing():
    assert replace(FAMILIES["llama"], packages=("no_such_package.part",)).missing == ["no_such_package.part"]


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
