"""The table of all families in docs/arena.md is that of the committed results."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import arena_table

    results = json.loads(arena_table.RESULTS.read_text())
    made, page = arena_table.table(results), arena_table.PAGE.read_text()
    assert page == arena_table.page_with(page, made), "run benchmarks/arena_table.py --write"
    for name, family in results["families"].items():
        loss = family["seeds"][0]["scores"]["fresh"]["nats"]
        assert any(f"`{name}`" in line and f" {loss:.3f} " in line for line in page.splitlines())


def test_several_seeds_are_averaged(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import arena_table

    results = json.loads(arena_table.RESULTS.read_text())
    name, family = next(iter(results["families"].items()))
    seed = family["seeds"][0]
    other = seed | {"scores": {kind: score | {"nats": score["nats"] + 1} for kind, score in seed["scores"].items()}}
    made = arena_table.table({"families": {name: family | {"seeds": [seed, other]}}})
    assert f" {seed['scores']['fresh']['nats'] + 0.5:.3f} " in made
