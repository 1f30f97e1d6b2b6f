"""What a planner is taught is true: forecasts, targets, and the teacher's future, by slow loops; and its runs."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dyadlm.data.batches import IGNORED_LABEL
from dyadlm.model.extension import TrainingPass
from dyadlm.model.extras.planner import WORST, ForecastErrors, forecast_errors
from dyadlm.train import train
from dyadlm.train.companions import COMPANIONS_NAME
from dyadlm.train.planner import TAUGHT, PlannerLessons, TaughtWindows, ahead, reading_order, true_future
from dyadlm.train.settings import PlannerOptions

from ..model.conftest import SMALL, make_model, text_ids

pytestmark = pytest.mark.slow

WORDS = {**SMALL, "semantic_levels": ["word"], "num_levels": 3, "planner": "head", "planner_width": 4}
SIZES = (9, 1, 2, 20)  # documents of a row
EXACT = 1e-9


def taught(options: PlannerOptions | None = None, **fields):
    model = make_model(**{**WORDS, **fields}).train()
    model.accompany("planner", PlannerLessons(model, options or PlannerOptions()))
    return model


def packed_lesson(model, padding: int = 3) -> tuple[TrainingPass, list[int | None]]:
    """One row of several documents between pads, and the document of each column."""
    ids = torch.cat([torch.full((1, padding), 256), *(text_ids(1, n, seed=n) for n in SIZES)], 1)
    positions = torch.cat([torch.ones(padding), *(torch.arange(n) for n in SIZES)])[None].long()
    mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
    labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
    output = model.eval()(ids, attention_mask=mask, position_ids=positions, output_plan=True, output_hidden_states=True)
    lesson = TrainingPass(ids, labels, mask, positions, output.hidden_states[-1], {}, output.plan)
    return lesson, [None] * padding + [number for number, n in enumerate(SIZES) for _ in range(n)]


def test_targets_lie_ahead_in_the_same_document():
    lesson, documents = packed_lesson(taught())
    order, clock = reading_order(lesson)
    for steps in (1, 2, 30, 99):
        found = ahead(lesson.labels, order, clock, steps)[0].tolist()
        for t, document in enumerate(documents):
            later = t + steps
            inside = document is not None and later < len(documents) and documents[later] == document
            assert found[t] == (lesson.input_ids[0, later].item() if inside else IGNORED_LABEL)


def test_the_true_future_begins_after_next():
    model = taught()
    lesson, documents = packed_lesson(model)
    outlook = lesson.plan.outlook
    future = true_future(lesson.input_ids, outlook, *reading_order(lesson), model.config)
    ranks, seen = model.config.ranks, 0
    for t, document in enumerate(documents):
        rest = [c for c in range(t + 2, len(documents)) if document is not None and documents[c] == document]
        assert future.exists[0, t] == bool(rest)
        if not rest:
            continue
        assert future.token[0, t] == lesson.input_ids[0, t + 2]
        for level, rank in enumerate(ranks):
            start = sum(ranks[:level])
            if level < 3:
                near, far = rest[: 2**level], rest[2**level : 2 ** (level + 1)]
            else:
                begins = [c for c in rest[1:] if outlook.begins[0, c, level]] + [rest[-1] + 1] * 2
                near = [c for c in rest if c < begins[0]]
                far = [c for c in rest if begins[0] <= c < begins[1]]
            seen += bool(far)
            for found, columns in ((future.near, near), (future.far, far or near)):
                expected = outlook.values[0, columns, start : start + rank].mean(0)
                assert torch.allclose(found[0, t, start : start + rank], expected, rtol=0, atol=EXACT)
    assert seen > 20


def test_errors_are_those_of_persistence_at_first_and_their_gradient_is_the_forecasts():
    model = taught(semantic_levels=["word", "paragraph"])
    for forecaster in model.model.forecasters.exits:
        torch.nn.init.zeros_(forecaster.weight)
    lesson, _ = packed_lesson(model)
    errors = forecast_errors(lesson.plan.outlook, model.config.ranks)
    assert torch.equal(errors.missed, errors.stayed)
    assert not errors.skills().any()
    assert errors.cost() == 1
    assert not lesson.plan.outlook.judged[..., -1].any()
    assert [part[-1].item() for part in errors] == [0, 0, 0]
    model = taught()
    outlook = packed_lesson(model)[0].plan.outlook
    errors, start = forecast_errors(outlook, model.config.ranks), 0
    for level, rank in enumerate(model.config.ranks):
        own, at = slice(start, start + rank), outlook.judged[..., level]
        start += rank
        missed = (outlook.expected[..., own] - outlook.last[..., own])[at].square().sum()
        stayed = (outlook.previous[..., own] - outlook.last[..., own])[at].square().sum()
        assert errors.skills()[level].item() == pytest.approx(1 - (missed / stayed).item(), rel=1e-5)
        assert errors.size[level].item() == pytest.approx(outlook.last[..., own][at].square().sum().item())


def test_forecasts_learn_from_the_plain_ratio_at_levels_that_were_judged():
    model = taught(semantic_levels=["word", "paragraph"])
    errors = forecast_errors(packed_lesson(model)[0].plan.outlook, model.config.ranks)
    plain = (errors.missed[:-1] / errors.stayed[:-1]).mean()  # of all levels but paragraphs
    exits = [forecaster.weight for forecaster in model.model.forecasters.exits]
    assert errors.cost().item() == pytest.approx(plain.item(), rel=1e-7)
    found, expected = (torch.autograd.grad(cost, exits, retain_graph=True) for cost in (errors.cost(), plain))
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair)
    assert all(gradient.any() for gradient in expected[:-1])
    model.train()(text_ids(1, 1), labels=text_ids(1, 1)).loss.backward()  # of one token nothing is judged
    assert not any(weight.grad.any() for weight in exits)


def test_persistence_is_taken_to_be_wrong_and_forecasts_to_be_no_disaster():
    missed, stayed = torch.tensor([[0.5, 1.0], [0.5, 1e-3], [1e-3, 1e-5], [0.05, 0.0], [0.0, 0.0]]).T
    for size in (1.0, 7.0):
        for level, expected in enumerate((0.5, WORST, 0.1, 5.0, 0.0)):
            errors = ForecastErrors(*(size * part[level : level + 1] for part in (missed, stayed, torch.ones(5))))
            assert errors.cost().item() == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_text_that_repeats_one_token_ruins_no_step():
    """Nothing changes in it, so that persistence is right and no forecast can be."""
    usual = PlannerOptions()
    model = taught(PlannerOptions(forecast=usual.forecast, proposal=0.0, artist=0.0))
    exits = list(model.model.forecasters.exits.parameters())
    for weight in exits:
        torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(0))

    def lesson(ids: torch.Tensor) -> tuple[float, float, float]:
        """What forecasts cost, the length of their gradient, and that of all gradients."""
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        own, every = (torch.stack([w.grad.norm() for w in weights]).norm() for weights in (exits, model.parameters()))
        return output.metrics["cost"].item() / usual.forecast, own.item(), every.item()

    text, _, usual_step = lesson(text_ids(2, 256))
    assert 1 < text < 2
    for token in (32, 0, 256):
        cost, gradient, _ = lesson(torch.full((2, 256), token))
        assert 2 * text < cost <= WORST
        assert gradient < usual_step


def losses(model, lesson, progress: float) -> dict[str, float]:
    torch.manual_seed(0)
    model.set_progress(progress)
    found = model.companions["planner"].losses(lesson)
    found = {
        name: (value if value.dim() else torch.stack([value, torch.ones_like(value)])).tolist()
        for name, value in found.items()
    }
    return {name: above / below for name, (above, below) in found.items() if below}


def test_the_cost_is_the_weighed_sum_and_the_teacher_leaves():
    options = PlannerOptions(forecast=0.3, proposal=0.5, artist=0.7, teacher=0.9, teacher_until=0.5)
    model = taught(options)
    lesson, _ = packed_lesson(model)
    early, late = losses(model, lesson, 0.0), losses(model, lesson, 0.5)
    names = {
        "proposal_loss",
        "artist_loss",
        "teacher_loss",
        "cost",
        *(f"skill_{name}" for name in ("1", "2", "4", "word")),
    }
    assert early.keys() == names
    assert late.keys() == names - {"teacher_loss"}
    assert model.config.level_keys == ["1", "2", "4", "word"]
    assert abs(early["teacher_loss"] - early["artist_loss"]) > 1e-4
    # Of so many tokens that have one after them, so many have two.
    tokens, with_two = sum(size - 1 for size in SIZES), sum(max(0, size - 2) for size in SIZES)
    for found, teacher in ((early, 0.9 * early["teacher_loss"] * with_two / tokens), (late, 0.0)):
        unskilled = sum(1 - found[f"skill_{name}"] for name in model.config.level_keys) / 4
        expected = 0.3 * unskilled + 0.5 * found["proposal_loss"] + 0.7 * found["artist_loss"] + teacher
        assert found["cost"] == pytest.approx(expected)
    without = losses(taught(PlannerOptions()), lesson, 0.0)
    assert without["artist_loss"] == pytest.approx(early["artist_loss"])
    assert "teacher_loss" not in without


def test_the_teacher_alone_depends_on_the_true_future():
    """Its inputs reach neither logits nor any other loss, and what it teaches is the artist."""
    model = taught(PlannerOptions(teacher=1.0))
    lesson, _ = packed_lesson(model)
    before = losses(model, lesson, 0.0)
    changed = lesson.plan.outlook._replace(values=lesson.plan.outlook.values + torch.randn(1, 35, 1).double())
    after = losses(model, lesson._replace(plan=lesson.plan._replace(outlook=changed)), 0.0)
    assert {name for name in before if before[name] != after[name]} == {"teacher_loss", "cost"}
    torch.manual_seed(0)
    model.zero_grad()
    cost, _ = model.companions["planner"].teach(lesson, *reading_order(lesson), lesson.labels, 1.0)
    cost.backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert any("planner.artist" in name for name in reached)
    assert not any(".layers." in name or ".forecasters." in name for name in reached)


def test_which_windows_the_teacher_shows_is_drawn_by_seed_and_number_alone():
    base = [{"input_ids": torch.zeros(4, dtype=torch.int64)}] * 400
    windows, others = (TaughtWindows(base, seed) for seed in (1, 2))
    backwards = [windows[number][TAUGHT] for number in reversed(range(400))]
    drawn = torch.stack([windows[number][TAUGHT] for number in range(400)])
    assert torch.equal(drawn, torch.stack(backwards).flip(0))
    assert not torch.equal(drawn, torch.stack([others[number][TAUGHT] for number in range(400)]))
    assert drawn.dtype == torch.float32
    for share in (0.1, 0.5, 0.9):
        assert abs((drawn < share).float().mean() - share) < 4 * (share * (1 - share) / 400) ** 0.5


def test_the_teacher_shows_the_windows_that_were_drawn():
    model = taught(PlannerOptions(teacher=0.5, teacher_until=0.5))
    lesson, _ = packed_lesson(model)
    told = {draw: lesson._replace(extra={TAUGHT: torch.tensor([draw])}) for draw in (0.0, 0.49, 0.51)}
    everything = losses(model, lesson, 0.0)["teacher_loss"]
    for draw, progress, shown in ((0.51, 0.0, True), (0.49, 0.25, True), (0.51, 0.25, False), (0.0, 0.5, False)):
        assert losses(model, told[draw], progress).get("teacher_loss") == (everything if shown else None)


def test_the_teacher_weighs_as_many_rows_as_it_shows():
    """So that its lesson ends without a jump, and lends the artist's own no weight."""
    model = taught(PlannerOptions(teacher=0.5, teacher_until=0.5))
    ids = text_ids(4, 20)
    output = model.eval()(ids, output_plan=True, output_hidden_states=True)
    lesson = TrainingPass(ids, ids, None, None, output.hidden_states[-1], {TAUGHT: torch.arange(4) / 4}, output.plan)
    untaught = losses(model, lesson, 0.5)["cost"]
    for progress, rows in ((0.0, 4), (0.15, 3), (0.25, 2), (0.49, 1)):
        found = losses(model, lesson, progress)
        assert found["cost"] - untaught == pytest.approx(0.5 * found["teacher_loss"] * rows * 18 / (4 * 19))


def test_every_weight_learns_so_that_processes_agree():
    """Also where all lessons weigh nothing: DistributedDataParallel waits for every gradient."""
    for fields in ({}, {"planner": "stack", "artist_sees": "both", "planner_futures": 2}):
        model = taught(PlannerOptions(0.0, 0.0, 0.0, 0.0), **fields)
        ids = text_ids(2, 30)
        model(ids, labels=ids).loss.backward()
        assert not [name for name, weight in model.named_parameters() if weight.grad is None]


# ---- Runs

PLANNED = ("model.planner=head", "model.consensus=0.9", "planner.teacher=0.3", "eval_steps=0")


def test_skills_are_logged_as_those_of_all_passes_together(tmp_path, small, words, console, monkeypatch):
    """Of accumulated batches and of steps alike, as if they had been one; of levels that were never judged nothing."""
    seen, lessons = [], PlannerLessons.losses
    monkeypatch.setattr(
        PlannerLessons,
        "losses",
        lambda self, lesson: (seen.append(forecast_errors(lesson.plan.outlook, model_ranks)), lessons(self, lesson))[1],
    )
    model_ranks = [4] * 6
    levels = ("model.num_levels=5", "model.semantic_levels=[paragraph]", "model.level_rank=4")
    steps = ("max_steps=6", "logging_steps=3", "learning_rate=0.05", "gradient_accumulation_steps=2")
    options = ("model.planner=head", "eval_steps=0", "per_device_train_batch_size=1", *levels, *steps)
    result = train(small(tmp_path / "run", *options), words(), console)
    lines = [line for line in result.metrics if "skill_1" in line]
    assert len(lines) == 2
    assert len(seen) == 12
    for line, passes in zip(lines, (seen[:6], seen[6:]), strict=True):
        missed, stayed, _ = (torch.stack(parts).sum(0) for parts in zip(*passes, strict=True))
        for level, name in enumerate(("1", "2", "4", "8", "16")):
            assert line[f"skill_{name}"] == pytest.approx((1 - missed / stayed)[level].item(), rel=1e-3, abs=1e-5)
        assert "skill_paragraph" not in line
    assert abs(lines[1]["skill_1"]) > 0.01


def test_a_resumed_run_is_the_whole_run_and_needs_no_companion_after_it(tmp_path, small, words, console):
    options = (*PLANNED, "max_steps=4", "logging_steps=1")
    whole = train(small(tmp_path / "run", *options), words(), console)
    for name, lines in (("skill_1", 4), ("proposal_loss", 4), ("artist_loss", 4), ("teacher_loss", 2), ("cost", 4)):
        assert len([line for line in whole.metrics if name in line]) == lines
    last = whole.output / "checkpoint-4"
    expected = load_file(last / "model.safetensors")
    assert not (last / COMPANIONS_NAME).exists()  # lessons have no weights
    (last / "checkpoint.json").unlink()  # as if killed before it was complete
    train(small(whole.output, *options, "logging_steps=2", resume=True), words(), console)
    assert "Going on from" in console.file.getvalue()
    found = load_file(last / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    model = AutoModelForCausalLM.from_pretrained(whole.output)
    assert model.config.consensus == 0.9
    assert model.generate(text_ids(1, 8), max_new_tokens=3, do_sample=False).shape[1] <= 11


def test_a_longer_run_says_what_begins_again_and_whose_the_validation_is(tmp_path, small, words, console):
    options = (
        "model.planner=head", "model.consensus=0.9", "planner.teacher=0.3", "fingerprint.shown=true",
        "fingerprint.cooldown=0.25", "data.validation_tokens=32",
    )  # fmt: skip
    train(small(tmp_path / "run", *options, "max_steps=2"), words(), console)
    assert "from there on" not in console.file.getvalue()
    assert "validation: scored with consensus 0.9; the loss in training is the engineer's" in console.file.getvalue()
    assert "scored with consensus 0.9" in (tmp_path / "run" / "README.md").read_text()
    train(small(tmp_path / "run", *options, "max_steps=4", resume=True), words(), console)
    shown = console.file.getvalue()
    for what, share in (("fingerprints: shown", 75), ("teacher: sees the true future", 50)):
        first = f"over the first {share}% of"
        assert f"{what} {first} 2 steps until step 2, {first} 4 from there on" in shown
