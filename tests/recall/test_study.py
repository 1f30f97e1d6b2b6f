"""A study learns what can be learned, counts exactly, and continues where it was."""

import json

import pytest
import torch

from dyadlm.errors import UserError
from dyadlm.recall import Cell, Reader, Recipe, Study, build_model, parse_task, score, train, wilson
from dyadlm.recall.study import batch
from dyadlm.train.planner import PlannerLessons
from dyadlm.train.settings import PlannerOptions

pytestmark = pytest.mark.slow

TINY = {"num_hidden_layers": 1, "hidden_size": 16}


def recipe(**options):
    defaults = {"steps": 3, "batch_size": 4, "questions": 40}
    return Recipe(**{"task": "mqar", "parts": ("length=16,pairs=2,vocabulary=12",)} | defaults | options)


def test_induction_is_learned_in_seconds():
    learned = Recipe("induction", ("length=8,symbols=4",), steps=300, batch_size=64, questions=1000, weight_decay=0.0)
    cell = Cell("tiny", 1e-2, 0, {"num_hidden_layers": 2, "hidden_size": 32})
    result = Study(None, learned).run(cell)
    part = result["parts"]["length=8,symbols=4"]
    assert part["total"] == 1000
    assert part["chance"] == 0.25
    assert part["interval"][0] > 0.5


def test_a_cell_repeats_itself():
    one, same = (Study(None, recipe()).run(Cell("tiny", 1e-2, 1, TINY)) for _ in range(2))
    other = Study(None, recipe()).run(Cell("tiny", 1e-2, 2, TINY))
    exact = ("parts", "running_accuracy", "state_numbers", "parameters", "steps", "stopped")
    for result in (one, same, other):
        for part in result["parts"].values():
            del part["seconds"]
    assert {name: one[name] for name in exact} == {name: same[name] for name in exact}
    assert one["parts"] != other["parts"] or one["running_accuracy"] != other["running_accuracy"]
    assert (one["steps"], one["stopped"]) == (3, "steps")


def test_a_finished_cell_is_not_run_again(tmp_path, monkeypatch):
    path, measured = tmp_path / "study.json", []
    monkeypatch.setattr("dyadlm.recall.study.measure", lambda cell, *rest: measured.append(cell) or {"steps": 1})
    cells = [Cell("tiny", rate, 0, TINY) for rate in (1e-3, 1e-2)]
    first = Study(path, recipe()).run(cells[0])
    study = Study(path, recipe())
    assert [study.run(cell)["steps"] for cell in cells] == [1, 1]
    assert measured == cells
    assert study.results[cells[0].name] == first
    assert set(json.loads(path.read_text())["cells"]) == {cell.name for cell in cells}


def test_two_processes_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("dyadlm.recall.study.measure", lambda *rest: {})
    one, other = (Study(tmp_path / "study.json", recipe()) for _ in range(2))
    one.run(Cell("tiny", 1e-3, 0))
    other.run(Cell("llama", 1e-3, 0))
    assert len(json.loads((tmp_path / "study.json").read_text())["cells"]) == 2


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "something"}', '{"format": "dyadlm-recall"}'])
def test_another_file_is_left_alone(tmp_path, content):
    path = tmp_path / "study.json"
    path.write_text(content)
    with pytest.raises(UserError, match="choose another file"):
        Study(path, recipe())
    assert path.read_text() == content


def test_another_study_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("dyadlm.recall.study.measure", lambda *rest: {})
    Study(tmp_path / "study.json", recipe()).run(Cell("tiny", 1e-3, 0))
    with pytest.raises(UserError, match="another steps, questions"):
        Study(tmp_path / "study.json", recipe(steps=4, questions=50))


@pytest.mark.parametrize("planner", ["none", "head"])
@pytest.mark.parametrize("name", ["mqar", "path-star"])
def test_what_is_learned_from_are_the_answers_and_what_companions_add(name, planner, monkeypatch):
    task = parse_task(name, {"mqar": "length=16,vocabulary=12", "path-star": "length=23,nodes=12"}[name])
    model = build_model("tiny", task.vocabulary, 23, TINY | {"planner": planner})
    told: list[dict] = []
    if planner != "none":
        lessons = PlannerLessons(model, PlannerOptions(teacher=0.5))
        model.accompany("planner", lessons)
        model.set_progress(0.0)
        monkeypatch.setattr(lessons, "losses", lambda lesson, real=lessons.losses: told.append(real(lesson)) or told[0])
    tokens, answers = batch(task, "train", 0, 0, 4, torch.device("cpu"))
    asked, model = answers >= 0, model.train()
    logits, loss = Reader(model).learn(tokens, answers)
    torch.testing.assert_close(logits, model(tokens).logits[asked])
    answered = torch.nn.functional.cross_entropy(logits, answers[asked])
    loss.backward()
    if planner == "none":
        assert loss == answered
        return
    assert loss > answered + 0.5
    assert all(weight.grad is not None for weight in model.planner.parameters())
    before = asked[:, 1:]  # the token before a question proposes its answer
    proposal = model(tokens, output_plan=True).plan.proposal[:, :-1]
    expected = torch.nn.functional.cross_entropy(proposal[before], answers[:, 1:][before])
    torch.testing.assert_close(told[0]["proposal_loss"], expected)


def test_a_planner_is_taught_with_its_model(monkeypatch):
    made = []
    monkeypatch.setattr("dyadlm.recall.study.build_model", lambda *given: made.append(build_model(*given)) or made[0])
    asked = recipe(task="lookahead", parts=("length=12,strings=2,tokens=3,symbols=6",))
    Study(None, asked).run(Cell("tiny", 1e-2, 0, TINY | {"planner": "head", "consensus": 0.9}))
    new = build_model("tiny", 9, 12, TINY | {"planner": "head"})
    learned = dict(made[0].named_parameters())
    assert all(not torch.equal(weight, learned[name]) for name, weight in new.named_parameters() if "artist" in name)
    assert made[0].model.progress == 1.0


def test_scores_are_counted_exactly():
    """Against answers worked out one by one from the logits of each row alone, read whole."""
    task = parse_task("mqar", "length=1200,pairs=5,vocabulary=12")
    reader = Reader(build_model("tiny", 12, 64, TINY))
    train(reader, recipe(steps=40, batch_size=16), 1e-2, 0)  # enough to name some value
    result = score(reader, task, recipe(questions=100))
    correct = 0
    with reader.resting():
        for number in range(20):
            tokens, answers = (torch.from_numpy(part) for part in task.item("test", 0, number))
            said = reader.model(input_ids=tokens[None]).logits[0].argmax(-1)
            correct += int((said == answers).sum())
    assert (result["correct"], result["total"], result["ended"]) == (correct, 100, "all")
    assert 0 < correct < 100
    assert result["interval"] == [round(bound, 4) for bound in wilson(correct, 100)]


def test_time_and_positions_end():
    reader = Reader(build_model("tiny", 12, 64, TINY))
    task = parse_task("mqar", "length=64,pairs=5,vocabulary=12")
    assert score(reader, task, recipe(test_minutes=1e-9))["ended"] == "minutes"
    short = Reader(build_model("gpt2", 12, 32, TINY))
    result = score(short, task, recipe())
    assert (result["ended"], result["total"], result["accuracy"]) == ("positions", 0, None)
    assert result["interval"] == [0.0, 1.0]


def test_training_ends_when_all_is_right_or_lost_or_late():
    solved = Recipe("parity", ("length=1",), steps=400, batch_size=32, questions=10)
    result = Study(None, solved).run(Cell("tiny", 1e-2, 0, TINY))
    assert result["stopped"] == "solved"
    assert result["steps"] < 400
    assert result["parts"]["length=1"]["accuracy"] == 1.0
    lost = Study(None, recipe(steps=50)).run(Cell("tiny", float("inf"), 0, TINY))
    assert lost["stopped"] == "diverged"
    hard = {"task": "parity", "parts": ("length=200",)}  # nothing learns this in a moment
    late = Study(None, recipe(steps=None, minutes=0.005, **hard)).run(Cell("tiny", 1e-3, 0, TINY))
    assert late["stopped"] == "minutes"
    assert late["steps"] > 0


def test_wilson_is_the_interval_of_wilson():
    low, high = wilson(9, 10)
    assert (round(low, 4), round(high, 4)) == (0.5958, 0.9821)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    for bound in wilson(37, 50):  # where the score test has its edge
        assert abs(0.74 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 50) ** 0.5)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({"steps": 0}, "at least 1"), ({"minutes": 0}, "above 0"), ({"parts": ("length=-1",)}, "at least 1")],
)
def test_a_recipe_that_cannot_be_says_why(options, remedy):
    with pytest.raises(UserError, match=remedy):
        recipe(**options)


@pytest.mark.slow
def test_processes_find_what_one_finds(tmp_path):
    cells = [Cell("tiny", 1e-2, seed, TINY) for seed in range(2)]
    alone, together = Study(None, recipe()), Study(tmp_path / "study.json", recipe())
    assert {cell.seed for cell, _ in together.run_all(cells, 2)} == {0, 1}
    for cell in cells:
        one, other = alone.run(cell), together.results[cell.name]
        assert one["running_accuracy"] == other["running_accuracy"]
        assert [part["correct"] for part in one["parts"].values()] == [
            part["correct"] for part in other["parts"].values()
        ]
    assert not list(Study(tmp_path / "study.json", recipe()).run_all(cells, 2))
