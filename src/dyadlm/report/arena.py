"""The page of `dyadlm compare`: tables and learning curves in one file that needs no network and no script."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from dyadlm.diagnose.pool import STUDENT
from dyadlm.diagnose.result import Curve
from dyadlm.evaluate.protocols import PROTOCOLS
from dyadlm.files import printable, write_atomically
from dyadlm.report.comparison import Look, compact, draw_curves, looks, to_svg
from dyadlm.report.page import render


class Shown(NamedTuple):
    """A figure of a table. note: the interval of the mean over seeds, 95 %, or how the figure was measured."""

    value: str
    note: str = ""
    best: bool = False


def write_arena(summary: Mapping[str, Any], folder: Path, command: str) -> Path:
    """Write results.json and index.html into the folder of a study, in place of earlier ones. command: that made it."""
    families = dict(sorted(summary["families"].items(), key=lambda item: _mean(_nats(item[1], "fresh"))))
    shown = dict(zip(families, looks(list(families), []), strict=True))
    recipe = summary["recipe"]
    facts = [
        f"{len(families)} families",
        f"about {compact(recipe['parameters'])} parameters each, n-gram tables aside",
        f"budget {recipe['budget']}",
        f"seeds: {summary['seeds']}",
        f"text: {', '.join(recipe['data'])}",
        f"optimizer {recipe['optimizer']}, windows of {recipe['length']} tokens, {recipe['batch']} a step",
        f"n-grams: {', '.join(map(str, recipe['ngrams'])) or 'none'}",
        f"trained in {recipe['dtype']}, with torch.compile: {', '.join(recipe['compiled']) or 'none'}",
    ]
    page = render(
        "arena.html",
        title="Families of models on the same text",
        facts=[printable(fact) for fact in facts],
        warnings=_warnings(families),
        tables=[
            _losses(families, shown),
            *_lengths(families, shown, recipe["length"]),
            _costs(families, shown),
            *_rates(families, shown),
        ],
        pictures=_pictures(families, shown),
        command=printable(command),
    )
    write_atomically(folder / "results.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(folder / "index.html", page)
    return folder / "index.html"


def _warnings(families: Mapping[str, Any]) -> list[str]:
    warnings = []
    if edge := [name for name, one in families.items() if one["rate_at_the_edge"]]:
        warnings.append(f"The best rate of {', '.join(edge)} is at the end of its sweep. A better one may exist.")
    if diverged := {name: one["diverged"] for name, one in families.items() if one["diverged"]}:
        told = "; ".join(f"{name} with seed {', '.join(map(str, seeds))}" for name, seeds in diverged.items())
        warnings.append(f"Training diverged: {told}. These seeds are left out of all figures.")
    return warnings


def _nats(family: Mapping[str, Any], protocol: str) -> list[float]:
    return [seed["scores"][protocol]["nats"] for seed in family["seeds"]]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.inf


def _shown(values: Sequence[float], form: Callable[[float], str]) -> Shown:
    """The mean, and Student's interval where there are several; of a training that diverged there is none."""
    if not values:
        return Shown("diverged")
    if len(values) < 2:
        return Shown(form(values[0]))
    return Shown(form(_mean(values)), f"± {form(_half(values))}")


def _half(values: Sequence[float]) -> float:
    """Half of Student's interval of the mean, 95 %."""
    return STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def _losses(families: Mapping[str, Any], shown: Mapping[str, Look]) -> dict[str, Any]:
    """All protocols; the least of a column is marked where its interval overlaps no other's."""
    cells = {name: [Shown("; ".join(one["faults"]) or "sound")] for name, one in families.items()}
    for protocol in PROTOCOLS:
        values = {name: _nats(one, protocol) for name, one in families.items()}
        figures = {name: _shown(own, lambda value: f"{value:.4f}") for name, own in values.items()}
        best = _clear_best(values)
        for name, figure in figures.items():
            windows = protocol in ("carried", "remembered") and not all(
                seed["carried"] for seed in families[name]["seeds"]
            )
            note = ", ".join(filter(None, (figure.note, "windows" if windows else "")))
            cells[name].append(figure._replace(best=name == best, note=note))
    return {
        "id": "losses",
        "title": "Loss",
        "text": "The audit asks whether later tokens change earlier logits, and, where a model keeps a state, if "
        "a text in pieces gives the same logits. Losses are nats per token of the validation text, on which the rates "
        "were chosen, too; less is better: in fresh windows, at the same places after a long context, and in a text "
        "that is read once from its beginning. Models with a state of constant size carry it through that text. The "
        "others, and those that do worse with their state, read overlapping windows (“windows”) of the trained length "
        "or of 1,024 tokens, whichever suits them better. The last column mixes into the same predictions what "
        "followed each short context of the text so far: a memory of bounded size, the same for all, as in “dyadlm "
        "evaluate --memory”. Marked: the best, where its interval overlaps no other.",
        "marked": "best",
        "columns": ["audit", *PROTOCOLS.values()],
        "rows": [(shown[name], cells[name]) for name in families],
    }


def _lengths(families: Mapping[str, Any], shown: Mapping[str, Look], length: int) -> list[dict[str, Any]]:
    """The table of longer texts than trained; none where no cell has tried them."""
    found = {name: [_by_multiple(seed) for seed in one["seeds"]] for name, one in families.items()}
    multiples = sorted({multiple for seeds in found.values() for seed in seeds for multiple in seed})
    if not multiples:
        return []
    rows = []
    for name, seeds in found.items():
        cells = []
        for multiple in multiples:
            tried = [seed[multiple] for seed in seeds if multiple in seed]
            nats = [loss for loss in tried if loss is not None]
            whole = tried and len(nats) == len(tried)
            cells.append(
                _shown(nats, lambda value: f"{value:.4f}")
                if whole
                else Shown("–", "no positions or no number" if tried else "")
            )
        rows.append((shown[name], cells))
    return [
        {
            "id": "lengths",
            "title": "Longer texts than trained",
            "text": f"Loss of the same tokens at the end of texts of 1, 2, 4 and 8 times the trained length ({length} "
            "tokens). A loss that falls from left to right says that a longer past helps; one that rises, that it does "
            "harm. The tokens are fewer than those of the first table, so that only figures of one row can be compared "
            "with each other closely.",
            "marked": "",
            "columns": [f"{multiple * length:,} tokens" for multiple in multiples],
            "rows": rows,
        }
    ]


def _by_multiple(seed: Mapping[str, Any]) -> dict[int, float | None]:
    return {int(point["multiple"]): point["nats"] for point in seed.get("lengths", [])}


def _clear_best(values: Mapping[str, Sequence[float]]) -> str | None:
    """The family whose interval lies below all others; none where there is one seed alone."""
    values = {name: own for name, own in values.items() if own}
    if len(values) < 2 or any(len(own) < 2 for own in values.values()):
        return None
    best = min(values, key=lambda name: _mean(values[name]))
    end = _mean(values[best]) + _half(values[best])
    return best if all(end < _mean(own) - _half(own) for name, own in values.items() if name != best) else None


def _costs(families: Mapping[str, Any], shown: Mapping[str, Look]) -> dict[str, Any]:
    contexts = sorted({int(point["context"]) for one in families.values() for point in one["decoding"]})
    rows = []
    for name, one in families.items():
        points = {int(point["context"]): point for point in one["decoding"]}
        missing = Shown("–", one["decoding_ends"])
        decoding = [Shown(f"{points[at]['milliseconds']:.2f}") if at in points else missing for at in contexts]
        state = [Shown(compact(points[at]["state_bytes"])) if at in points else Shown("–") for at in contexts]
        peaks = [seed["peak_mebibytes"] for seed in one["seeds"]]
        cells = [
            Shown(f"{one['parameters']:,}"),
            Shown(f"{one['tokens']:,}"),
            Shown(compact(one["flops_per_token"])),
            Shown(f"{1e6 * one['seconds_per_token']:.0f}"),
            Shown(f"{max(peaks):,.0f}" if peaks else "–"),
        ]
        rows.append((shown[name], [*cells, *decoding, *state]))
    columns = ["parameters, tables too", "tokens trained on", "operations a token", "µs a token, training", "peak MiB"]
    columns += [f"ms a token after {at:,}" for at in contexts]
    columns += [f"state bytes after {at:,}" for at in contexts]
    return {
        "id": "costs",
        "title": "Cost",
        "text": "Operations and microseconds of training are those of whole steps, one thread. Operations are those of "
        "products of matrices, convolutions and attention; what is done element by element, in scans or in Fourier "
        "transforms is not counted. Peak memory is that of the process after training. Decoding is one more token by a "
        "call of the model, after so many tokens. dyadlm decodes faster with its engine, which is not used here.",
        "marked": "",
        "columns": columns,
        "rows": rows,
    }


def _rates(families: Mapping[str, Any], shown: Mapping[str, Look]) -> list[dict[str, Any]]:
    """Of the sweep, and of the whole budget where the rate was settled on that."""
    found = []
    for key, title, text in (
        ("sweep", "Sweep of learning rates", "Loss in fresh windows after a part of the budget."),
        (
            "settling",
            "Learning rates on the whole budget",
            "Loss in fresh windows with the first seed. The rate of the sweep is halved as long as that is better.",
        ),
    ):
        losses = {
            name: {float(rate): nats for rate, nats in one.get(key, {}).items()} for name, one in families.items()
        }
        if rates := sorted({rate for own in losses.values() for rate in own}):
            found.append(
                {
                    "id": key,
                    "title": title,
                    "text": f"{text} Marked: the rate that the seeds were trained at.",
                    "marked": "taken",
                    "columns": [f"{rate:g}" for rate in rates],
                    "rows": [
                        (shown[name], [_at_rate(own, rate, families[name]["rate"]) for rate in rates])
                        for name, own in losses.items()
                    ],
                }
            )
    return found


def _at_rate(losses: Mapping[float, float | None], rate: float, taken: float) -> Shown:
    if rate not in losses:
        return Shown("–")
    nats = losses[rate]
    return Shown("diverged" if nats is None else f"{nats:.4f}", best=rate == taken)


def _pictures(families: Mapping[str, Any], shown: Mapping[str, Look]) -> list[dict[str, Any]]:
    found = []
    kinds: tuple[tuple[str, str, Callable[[Mapping[str, float], Mapping[str, Any]], float]], ...] = (
        ("tokens", "tokens", lambda point, one: point["tokens"]),
        ("seconds", "seconds of one thread", lambda point, one: point["seconds"]),
        ("operations", "floating-point operations", lambda point, one: point["tokens"] * one["flops_per_token"]),
    )
    for key, label, place in kinds:
        curves = []
        for name, one in families.items():
            if not one["seeds"]:
                continue
            runs = [seed["curve"] for seed in one["seeds"]]
            points = list(zip(*runs, strict=True))
            heights = [[run["nats"] for run in point] for point in points]
            curve = Curve(
                [_mean([place(run, one) for run in point]) for point in points],
                [_mean(height) for height in heights],
                label,
                "loss, nats per token",
                low=[min(height) for height in heights] if len(runs) > 1 else None,
                high=[max(height) for height in heights] if len(runs) > 1 else None,
                log_x=True,
            )
            curves.append((shown[name], curve))
        if not curves:  # all diverged
            continue
        text = f"Loss against {label}: {', '.join(families)}"
        found.append({"svg": Markup(to_svg(draw_curves(curves), f"arena{key}", text)), "caption": f"against {label}"})
    return found
