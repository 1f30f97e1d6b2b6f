"""What a study runs, in which order, what it keeps, and what it refuses; cells here need no training."""

import json
from dataclasses import asdict, replace

import pytest

from dyadlm.compare import Budget, Cell, Recipe, Study, run_study
from dyadlm.compare.cell import Done
from dyadlm.compare.kept import taken_cells
from dyadlm.compare.study import Results, final_cells, next_cells, summary, swept, tokens_of
from dyadlm.errors import UserError
from dyadlm.evaluate.protocols import PROTOCOLS
from dyadlm.report.arena import write_arena

RECIPE = Recipe(data=("shakespeare",), parameters=300_000, length=64, batch=2)
BEST = {"dyad": 16e-3, "llama": 4e-3}
FAULTS: dict[str, list[str]] = {}


def made(recipe: Recipe, cell: Cell, best: dict[str, float] = BEST) -> tuple[dict, bytes]:
    """A cell whose loss is least at the rate in `BEST`."""
    found = {"cell": vars(cell) | {}, "recipe": json.loads(json.dumps(asdict(recipe))), "parameters": 300_000}
    if not cell.tokens:
        slow = 2.0 if cell.family == "dyad" else 1.0
        return found | {
            "seconds_per_token": slow * 1e-4,
            "flops_per_token": 2e6,
            "faults": FAULTS.get(cell.family, []),
            "decoding": [{"context": 0, "milliseconds": 1.0, "state_bytes": 8}],
            "decoding_ends": "",
        }, b""
    nats = 2.0 + abs(cell.rate / best[cell.family] - 1) + cell.seed / 100
    point = {"tokens": cell.tokens, "seconds": 1.0, "nats": nats}
    return found | {
        "curve": [point] if cell.final else [],
        "scores": {name: {"nats": nats, "bits": nats, "tokens": 9} for name in PROTOCOLS},
        "carried": True,
        "lengths": [{"multiple": n, "nats": None if n > 4 else nats + n / 100} for n in (1, 2, 4, 8)],
        "peak_mebibytes": 1.0,
    }, b"weights" if cell.final else b""


def lost(recipe: Recipe, cell: Cell) -> dict:
    """A cell that diverged."""
    return {name: made(recipe, cell)[0][name] for name in ("cell", "recipe")} | {"diverged": "The loss is nan."}


def study(**fields) -> Study:
    given = {"families": ("dyad", "llama"), "budget": Budget("tokens", 10_240.0), "seeds": 2}
    return Study(RECIPE, **given | fields)


@pytest.fixture
def ran(monkeypatch):
    """The cells that were run, in order."""
    cells: list[Cell] = []

    def run(recipe, wanted, jobs, engine, address, unfinished):
        while waiting := wanted():
            cells.append(waiting[0])
            yield Done(waiting[0], *made(recipe, waiting[0]))

    monkeypatch.setattr("dyadlm.compare.study.run_cells", run)
    return cells


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [("tokens=5M", "tokens", 5e6), ("seconds=300", "seconds", 300), ("flops=1e15", "flops", 1e15)],
)
def test_budgets(text, kind, amount):
    assert Budget.parse(text) == Budget(kind, amount)


@pytest.mark.parametrize(
    "text", ["5M", "tokens=", "tokens=0", "tokens=-1", "tokens=nan", "steps=3", "seconds=1h", "tokens=1e999M2"]
)
def test_budgets_that_are_none(text):
    with pytest.raises(UserError, match=r"(A budget is|is a number above 0)"):
        Budget.parse(text)


def test_a_budget_in_tokens_for_each_model():
    assert Budget("seconds", 30.0).tokens(1e-3, 5.0) == 30_000
    assert Budget("flops", 1e6).tokens(1e-3, 5.0) == 200_000
    assert Budget("tokens", 77.0).tokens(1e-3, 5.0) == 77
    assert Budget("tokens", 77.0).tokens(1e-3, 0.0) == 77
    with pytest.raises(UserError, match="no operations to budget"):
        Budget("flops", 1e6).tokens(1e-3, 0.0)


def test_sweeps_go_on_at_their_ends_and_seeds_follow_the_best(tmp_path, ran):
    finals = run_study(study(), tmp_path / "out", 1)
    assert finals["dyad"] == [Cell("dyad", 10_240, 0.016, seed, final=True) for seed in (0, 1)]
    assert finals["llama"] == [Cell("llama", 10_240, 0.004, seed, final=True) for seed in (0, 1)]
    rates = {family: [cell.rate for cell in ran if cell.family == family and cell.tokens == 2_048] for family in BEST}
    assert sorted(rates["dyad"]) == [0.004, 0.008, 0.016, 0.032]
    assert sorted(rates["llama"]) == [0.002, 0.004, 0.008, 0.016]
    found = summary(study(), tmp_path / "out", finals)
    assert not any(family["rate_at_the_edge"] for family in found["families"].values())
    assert [seed["cell"]["seed"] for seed in found["families"]["dyad"]["seeds"]] == [0, 1]


def test_the_rate_is_settled_on_the_whole_budget(tmp_path, monkeypatch):
    """It is halved as long as that is better, and the other seeds wait for it."""
    cells: list[Cell] = []

    def run(recipe, wanted, jobs, engine, address, unfinished):
        while waiting := wanted():
            cells.append(waiting[0])
            yield Done(cells[-1], *made(recipe, cells[-1], {"dyad": 4e-3} if cells[-1].final else BEST))

    monkeypatch.setattr("dyadlm.compare.study.run_cells", run)
    asked = study(families=("dyad",))
    finals = run_study(asked, tmp_path / "out", 1)
    assert [(cell.rate, cell.seed) for cell in finals["dyad"]] == [(4e-3, 0), (4e-3, 1)]
    assert taken_cells(tmp_path / "out", "dyad") == finals["dyad"]
    tried = [(cell.rate, cell.seed) for cell in cells if cell.final]
    assert tried == [(0.016, 0), (0.008, 0), (0.004, 0), (0.002, 0), (0.004, 1)]
    found = summary(asked, tmp_path / "out", finals)
    assert list(found["families"]["dyad"]["settling"]) == [0.016, 0.008, 0.004, 0.002]
    assert not found["families"]["dyad"]["rate_at_the_edge"]
    page = write_arena(found, tmp_path / "out", "dyadlm compare").read_text()
    assert "Learning rates on the whole budget" in page
    for number, other in enumerate(({"sweep": 1.0}, {"rates": (0.016,)})):  # nothing to settle
        asked, folder = study(families=("dyad",), seeds=1, **other), tmp_path / str(number)
        assert not summary(asked, folder, run_study(asked, folder, 1))["families"]["dyad"]["settling"]


def test_a_study_goes_on_and_more_seeds_are_added(tmp_path, ran):
    run_study(study(seeds=1), tmp_path, 1)
    before = len(ran)
    run_study(study(seeds=1), tmp_path, 1)
    assert len(ran) == before
    run_study(study(seeds=3), tmp_path, 1)
    assert [(cell.family, cell.seed) for cell in ran[before:]] == [("dyad", 1), ("dyad", 2), ("llama", 1), ("llama", 2)]
    run_study(study(seeds=1, families=("dyad",)), tmp_path, 1)
    assert len(ran) == before + 4


def test_seconds_give_a_slower_model_fewer_tokens(tmp_path, ran):
    asked = study(budget=Budget("seconds", 2.0), seeds=1)
    finals = run_study(asked, tmp_path, 1)
    assert finals["llama"][0].tokens == 2 * 9_984 == 19_968  # whole steps of 128 tokens
    assert finals["dyad"][0].tokens == 9_984


def test_every_end_of_a_sweep_is_bounded(tmp_path, ran, monkeypatch):
    monkeypatch.setitem(BEST, "dyad", 10.0)
    finals = run_study(study(families=("dyad",)), tmp_path, 1)
    assert finals["dyad"][0].rate == 0.064
    assert summary(study(families=("dyad",)), tmp_path, finals)["families"]["dyad"]["rate_at_the_edge"]


def test_a_family_that_sees_the_future_is_refused_unless_forced(tmp_path, ran, monkeypatch):
    monkeypatch.setitem(FAULTS, "llama", ["perturbation: later tokens change earlier logits"])
    with pytest.raises(UserError, match=r"llama is not sound \(perturbation: .*--force"):
        run_study(study(), tmp_path, 1)
    assert not any(cell.tokens for cell in ran)
    finals = run_study(study(force=True), tmp_path, 1)
    assert summary(study(force=True), tmp_path, finals)["families"]["llama"]["faults"]


def test_a_rate_that_diverged_is_worse_than_all(tmp_path, ran, monkeypatch):
    def run(recipe, wanted, jobs, engine, address, unfinished):
        while cells := wanted():
            cell = cells[0]
            wild = cell.rate >= 8e-3 and not cell.final
            yield Done(cell, lost(recipe, cell), b"") if wild else Done(cell, *made(recipe, cell))

    monkeypatch.setattr("dyadlm.compare.study.run_cells", run)
    asked = study(families=("llama",))
    finals = run_study(asked, tmp_path, 1)
    found = summary(asked, tmp_path, finals)["families"]["llama"]
    assert found["rate"] == 4e-3
    assert found["sweep"][8e-3] is None
    assert not found["rate_at_the_edge"]


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_checkpoints_are_removed_with_their_cells(tmp_path, monkeypatch, engine):
    """Workers of a cluster get no folder. What an earlier run left behind goes, too; what belongs to no cell stays."""
    seen = set()

    def run(recipe, wanted, jobs, engine, address, unfinished):
        while cells := wanted():
            seen.add(unfinished)
            (tmp_path / "unfinished" / cells[0].file_name).mkdir(parents=True)
            yield Done(cells[0], *made(recipe, cells[0]))

    monkeypatch.setattr("dyadlm.compare.study.run_cells", run)
    asked = study(families=("llama",))
    finals = run_study(asked, tmp_path, 1, engine)["llama"]
    assert seen == {tmp_path / "unfinished" if engine == "local" else None}
    assert not (tmp_path / "unfinished").exists()
    for name in (finals[0].file_name, "other"):
        (tmp_path / "unfinished" / name).mkdir(parents=True)
    run_study(asked, tmp_path, 1, engine)
    assert [path.name for path in (tmp_path / "unfinished").iterdir()] == ["other"]


def test_a_seed_that_diverged_is_left_out_and_told(tmp_path, ran, monkeypatch):
    def run(recipe, wanted, jobs, engine, address, unfinished):
        while cells := wanted():
            wild = cells[0].final and (cells[0].seed == 1 or cells[0].family == "dyad")
            yield Done(cells[0], lost(recipe, cells[0]), b"") if wild else Done(cells[0], *made(recipe, cells[0]))

    monkeypatch.setattr("dyadlm.compare.study.run_cells", run)
    found = summary(study(), tmp_path, run_study(study(), tmp_path, 1))
    assert [found["families"][name]["diverged"] for name in ("dyad", "llama")] == [[0, 1], [1]]
    assert len(found["families"]["llama"]["seeds"]) == 1
    page = write_arena(found, tmp_path, "dyadlm compare").read_text()
    assert "Training diverged: llama with seed 1; dyad with seed 0, 1." in page
    assert page.count('<span class="value">diverged</span>') == 4 + 8  # and all halves of the rate of dyad


def test_longer_texts_than_trained_have_a_table(tmp_path, ran):
    found = summary(study(), tmp_path, run_study(study(), tmp_path, 1))
    page = write_arena(found, tmp_path, "dyadlm compare").read_text()
    table = page[page.index("Longer texts than trained") :]
    assert [f"{n:,} tokens" in table for n in (64, 128, 256, 512)] == [True] * 4
    assert "2.0250" in table  # the mean of both seeds, twice the trained length
    assert table.count("no positions") == 2
    for family in found["families"].values():
        for seed in family["seeds"]:
            del seed["lengths"]  # as earlier versions wrote them
    assert "Longer texts than trained" not in write_arena(found, tmp_path, "dyadlm compare").read_text()


def test_costs_are_measured_one_by_one(tmp_path):
    asked = study()
    results = Results(tmp_path, asked)
    assert next_cells(asked, results) == [Cell("dyad")]
    results.keep(Done(Cell("dyad"), *made(RECIPE, Cell("dyad"))))
    assert next_cells(asked, results) == [Cell("llama")]


def test_sweeps_begin_before_seeds(tmp_path):
    asked = study()
    results = Results(tmp_path, asked)
    llama = [Cell("llama", 2_048, rate) for rate in (2e-3, 4e-3, 8e-3, 1.6e-2)]
    for cell in (Cell("dyad"), Cell("llama"), *llama):
        results.keep(Done(cell, *made(RECIPE, cell)))
    waiting = next_cells(asked, results)
    assert [(cell.family, cell.final) for cell in waiting] == [("dyad", False)] * 3 + [("llama", True)] * 2


def test_cells_of_another_study_are_refused(tmp_path, ran):
    run_study(study(), tmp_path, 1)
    (tmp_path / "recipe.json").unlink()
    other = Study(replace(RECIPE, length=32), ("dyad",), Budget("tokens", 10_240.0))
    with pytest.raises(UserError, match="is no cell of this study"):
        run_study(other, tmp_path, 1)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UserError, match=r"recipe.json is damaged .*; choose another --output"):
        run_study(study(), tmp_path, 1)


def test_a_study_of_an_earlier_version_goes_on(tmp_path, ran):
    run_study(study(), tmp_path, 1)
    before = len(ran)
    for file in (tmp_path / "recipe.json", *(tmp_path / "cells").glob("*.json")):
        content = json.loads(file.read_text())
        for name in ("dtype", "compiled"):
            del content.get("recipe", content)[name]
        file.write_text(json.dumps(content))
    run_study(study(), tmp_path, 1)
    assert len(ran) == before
    other = Study(replace(RECIPE, dtype="bfloat16"), ("dyad",), Budget("tokens", 10_240.0))
    with pytest.raises(UserError, match="holds a study with another dtype"):
        run_study(other, tmp_path, 1)


def test_rates_of_an_earlier_sweep_are_not_those_of_this_one(tmp_path, ran):
    run_study(study(), tmp_path, 1)
    asked = study(rates=(4e-3, 8e-3))
    found = summary(asked, tmp_path, run_study(asked, tmp_path, 1))["families"]["llama"]
    assert list(found["sweep"]) == [2e-3, 4e-3, 8e-3]
    asked = study(rates=(4e-3,))
    assert summary(asked, tmp_path, run_study(asked, tmp_path, 1))["families"]["llama"]["sweep"] == {}


def test_a_model_that_only_counts_has_no_operations(tmp_path, ran, monkeypatch):
    def run(recipe, wanted, jobs, engine, address, unfinished):
        while cells := wanted():
            found, weights = made(recipe, cells[0])
            yield Done(cells[0], found | {"flops_per_token": 0.0}, weights)

    monkeypatch.setattr("dyadlm.compare.study.run_cells", run)
    asked = study(families=("llama",))
    assert summary(asked, tmp_path, run_study(asked, tmp_path, 1))["families"]["llama"]["flops_per_token"] == 0


def test_one_rate_is_no_sweep(tmp_path, ran):
    finals = run_study(study(families=("dyad",), rates=(1e-3,)), tmp_path, 1)
    assert finals["dyad"][0].rate == 1e-3
    assert [cell.tokens for cell in ran] == [0, 10_240, 10_240]


def test_a_damaged_cell_and_another_study_are_refused(tmp_path, ran):
    run_study(study(), tmp_path, 1)
    with pytest.raises(UserError, match="another budget"):
        run_study(study(budget=Budget("tokens", 999_936.0)), tmp_path, 1)
    place = tmp_path / "cells" / f"{Cell('llama').file_name}.json"
    kept = place.read_text()
    for content, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"cell": {}}', "damaged|no cell"),
        ("{}", "no cell"),
        (kept.replace("0.0001", '"fast"'), "no cell"),
        (kept.replace("0.0001", "NaN"), "no cell"),
    ):
        place.write_text(content)
        with pytest.raises(UserError, match=message):
            run_study(study(), tmp_path, 1)
    place.write_text(kept)
    (tmp_path / "cells" / "more.json").write_text(kept)
    with pytest.raises(UserError, match=r"more.json is no cell"):
        run_study(study(), tmp_path, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"families": ()}, "nothing to compare"),
        ({"families": ("dyad", "dyad")}, "twice"),
        ({"families": ("dyad", "lama")}, "the nearest is llama"),
        ({"families": ("linformer",)}, "linformer is not compared"),
        ({"sweep": 0.0}, "--sweep"),
        ({"seeds": 0}, "1 to 1000 seeds"),
        ({"seeds": 10**8}, "1 to 1000 seeds"),
        ({"rates": (0.0,)}, "rates above 0"),
        ({"rates": (1e300,)}, "up to 1,000,000"),
        ({"rates": (8e-3, 8.0000001e-3)}, "given twice"),
    ],
)
def test_studies_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        study(**fields)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("curve",), None),
        (("curve",), []),
        (("curve", 0), "x"),
        (("curve", 0, "seconds"), 1e400),
        (("curve", 0, "tokens"), 10**400),
        (("carried",), "yes"),
        (("peak_mebibytes",), None),
        (("lengths",), {}),
        (("lengths", 0, "multiple"), "1"),
        (("lengths", 0, "nats"), []),
        (("scores", "carried"), 2.0),
        (("cell", "rate"), 10**400),
    ],
)
def test_a_trained_cell_with_other_figures_than_its_page_shows_is_refused(tmp_path, ran, place, value):
    asked = study(families=("llama",), seeds=1)
    (final,) = run_study(asked, tmp_path, 1)["llama"]
    refuses_a_change(asked, tmp_path, final, place, value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("decoding_ends",), None),
        (("decoding", 0, "milliseconds"), "1"),
        (("decoding", 0), 1),
        (("faults",), [1]),
        (("flops_per_token",), -1),
        (("parameters",), True),
    ],
)
def test_a_measured_cost_of_another_kind_is_refused(tmp_path, ran, place, value):
    asked = study(families=("llama",), seeds=1)
    run_study(asked, tmp_path, 1)
    refuses_a_change(asked, tmp_path, Cell("llama"), place, value)


def refuses_a_change(asked, folder, cell, place, value):
    file = folder / "cells" / f"{cell.file_name}.json"
    content = json.loads(file.read_text())
    part = content
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{cell.file_name}.json is no cell of this study"):
        run_study(asked, folder, 1)


def test_files_nested_too_deeply_are_damaged(tmp_path, ran):
    run_study(study(), tmp_path, 1)
    (tmp_path / "cells" / f"{Cell('llama').file_name}.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"is damaged .*recursion"):
        run_study(study(), tmp_path, 1)


def test_results_hold_no_value_that_json_has_not(tmp_path, ran):
    asked = study(families=("llama",), seeds=1)
    (final,) = run_study(asked, tmp_path, 1)["llama"]
    file = tmp_path / "cells" / f"{final.file_name}.json"
    content = json.loads(file.read_text())
    content["lengths"][1]["nats"] = float("nan")  # as earlier versions wrote it
    file.write_text(json.dumps(content))
    found = summary(asked, tmp_path, run_study(asked, tmp_path, 1))
    write_arena(found, tmp_path, "dyadlm compare")
    told = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert told["families"]["llama"]["seeds"][0]["lengths"][1]["nats"] is None


def test_a_page_without_any_training_that_converged(tmp_path, monkeypatch):
    def run(recipe, wanted, jobs, engine, address, unfinished):
        while cells := wanted():
            yield Done(cells[0], lost(recipe, cells[0]) if cells[0].final else made(recipe, cells[0])[0], b"")

    monkeypatch.setattr("dyadlm.compare.study.run_cells", run)
    found = summary(study(), tmp_path, run_study(study(), tmp_path, 1))
    page = write_arena(found, tmp_path, "dyadlm compare").read_text()
    assert "Training diverged: dyad with seed 0, 1; llama with seed 0, 1." in page
    assert "<svg" not in page


def test_a_page_of_a_file_with_any_name(tmp_path, ran):
    """Also of one that is no UTF-8, as the command line gives it."""
    name = "<script>alert(1)</script>" + b"\xff".decode("utf-8", "surrogateescape")
    asked = replace(study(families=("llama",), seeds=1), recipe=replace(RECIPE, data=(name,)))
    page = write_arena(summary(asked, tmp_path, run_study(asked, tmp_path, 1)), tmp_path, f"--data {name}").read_text()
    assert "<script" not in page
    assert page.count(r"&lt;script&gt;alert(1)&lt;/script&gt;\xff") == 2


def test_results_say_what_is_next(tmp_path, ran):
    asked = study(families=("dyad",), seeds=1)
    results = Results(tmp_path, asked)
    assert next_cells(asked, results) == [Cell("dyad")]
    results.keep(Done(Cell("dyad"), *made(RECIPE, Cell("dyad"))))
    assert tokens_of(asked, results, "dyad", 0.2) == 2_048
    _, missing, best = swept(asked, results, "dyad")
    assert best is None
    assert missing == next_cells(asked, results) == [Cell("dyad", 2_048, rate) for rate in (4e-3, 8e-3, 1.6e-2)]
    (final,) = final_cells(asked, results, "dyad", 8e-3)
    results.keep(Done(final, *made(RECIPE, final)))
    assert (tmp_path / "cells" / f"{final.file_name}.safetensors").read_bytes() == b"weights"
    assert json.loads((tmp_path / "cells" / f"{final.file_name}.json").read_text())["cell"]["final"]
