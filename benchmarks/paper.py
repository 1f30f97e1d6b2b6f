"""The paper's system beside `tiny`, and what a consensus is worth: as a product, and with a learned weight.

    python benchmarks/paper.py [--arm paper ...] [--tokens 307200] [--seeds 1]
    python benchmarks/paper.py --times     # what a step of each takes, in turns

`dyadlm train` on Shakespeare's plays, windows of 256 bytes, four a step, equal tokens and nearly equal parameters at
inference. Scored are nats of fresh text, the windows that would have been trained on next: by the engineer alone, by
its artist alone and by each consensus. The control asks what part of a gain the artist brings: exponents that the
hidden state gives, fitted afterwards on half of the fresh text and scored on the other half, of the artist (`weight`),
of the engineer without an artist (`exponent`), and of both.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from transformers import PreTrainedModel

from common import Cells, arguments, dyad, require_green, size, step_times
from dyadlm import DyadForCausalLM
from dyadlm.data import TrainingWindows, resolve_data
from dyadlm.model.loading import load_weights
from dyadlm.ops.consensus import consensus
from dyadlm.train import TrainSettings, train
from dyadlm.train.prepared_run import prepare_run
from structure import PLANNER, fresh_nats, rank_for

# By arm: the preset, and what training is told beside it.
ARMS: dict[str, tuple[str, Sequence[str]]] = {
    "tiny": ("tiny", ()),
    "planner": ("tiny", [*(f"model.{name}={value}" for name, value in PLANNER.items()), "model.pool=learned"]),
    "paper": ("paper", ()),
    # What the whole is made of, each taken away from it.
    "paper, no fingerprints": ("paper", ("fingerprint.shown=false",)),
    "paper, no twin": ("paper", ("twin.conditioning=off",)),
    "paper, no decision slots": ("paper", ("model.decision_slots=false",)),
}
FRESH_WINDOWS = 512
FITTING_STEPS, FITTED_TOKENS = 300, 2048


def exponents(kind: str, outputs: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Those of the engineer and of the artist, (N, 1) each or one number, from outputs (N, 2)."""
    engineer, artist = 1 + outputs[:, :1], outputs[:, 1:]
    return {"weight": (1.0, artist), "exponent": (engineer, 0.0), "both": (engineer, artist)}[kind]


@torch.no_grad()
def opinions(model: DyadForCausalLM, windows: Dataset[dict[str, Tensor]]) -> list[Tensor]:
    """Hidden states (N, D), logits of engineer and artist (N, V) each, and next tokens (N,) of some windows."""
    model.config.consensus = 0.0
    parts = []
    for batch in DataLoader(windows, 8):
        found = model(batch["input_ids"], output_plan=True, output_hidden_states=True, use_cache=False)
        each = (found.hidden_states[-1], found.logits, found.plan.artist)
        parts.append([*(part[:, :-1].flatten(0, 1) for part in each), batch["labels"][:, 1:].flatten()])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@torch.no_grad()
def scored(model: DyadForCausalLM, parts: list[Tensor]) -> dict[str, Any]:
    """Nats by each way of choosing, and the weights that the artist has."""
    hidden, engineer, artist, labels = parts
    weight = model.planner.believe(hidden)
    ways = {"engineer": engineer, "artist": artist}
    for mass in (0.9, 1.0):
        ways[f"product, {mass:g}"] = consensus(engineer, artist, mass)
        ways[f"learned, {mass:g}"] = consensus(engineer, artist, mass, weight)
    nats = {way: round(nn.functional.cross_entropy(logits, labels).item(), 5) for way, logits in ways.items()}
    return nats | {"weight": {"mean": round(weight.mean().item(), 4), "deviation": round(weight.std().item(), 4)}}


def fitted(parts: list[Tensor]) -> dict[str, float]:
    """Nats of the second half of some text with exponents fitted on the first, by kind, and of the engineer there."""
    hidden, engineer, artist, labels = parts
    parts = [hidden, engineer.log_softmax(-1), artist.log_softmax(-1), labels]
    half = len(labels) // 2
    known, asked = [part[:half] for part in parts], [part[half:] for part in parts]

    def nats(kind: str, gate: nn.Linear, parts: list[Tensor]) -> Tensor:
        hidden, engineer, artist, labels = parts
        one, other = exponents(kind, gate(hidden))
        return nn.functional.cross_entropy(one * engineer + other * artist, labels)

    found = {"engineer": nn.functional.nll_loss(asked[1], asked[3]).item()}
    for kind in ("weight", "exponent", "both"):
        generator = torch.Generator().manual_seed(0)
        gate = nn.Linear(known[0].shape[1], 2)
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
        adam = torch.optim.Adam(gate.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, FITTING_STEPS)
        for _ in range(FITTING_STEPS):
            picked = torch.randint(half, (FITTED_TOKENS,), generator=generator)
            adam.zero_grad()
            nats(kind, gate, [part[picked] for part in known]).backward()
            adam.step()
            schedule.step()
        with torch.no_grad():
            found[kind] = nats(kind, gate, asked).item()
    return {kind: round(value, 5) for kind, value in found.items()}


def settings_of(arm: str, seed: int, tokens: int, learning_rate: float, target: int, output: Path) -> TrainSettings:
    """target: how many parameters the model has for inference, or nearly so."""
    preset, told = ARMS[arm]
    length = f"max_steps={tokens // 1024}"
    assignments = [length, f"seed={seed}", f"learning_rate={learning_rate}", "eval_steps=0", *told]
    if arm == "planner":
        assignments.append(f"model.level_rank={rank_for({**PLANNER, 'pool': 'learned'}, target)}")
    return TrainSettings.create(
        output, preset=preset, data=["shakespeare"], device="cpu", dtype="float32", assignments=assignments
    )


def ready(arm: str, target: int) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model with all that trains beside it, and a batch of four windows as its training reads them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(arm, 0, 4096, 2e-3, target, Path(folder) / "run")
        prepared = prepare_run(settings, None, settings.output)
    return prepared.model, default_collate([prepared.windows[number] for number in range(4)])


def measure(arm: str, seed: int, tokens: int, learning_rate: float, target: int) -> dict[str, Any]:
    """Train one arm and score it in every way that it has."""
    data = resolve_data(["shakespeare"])
    seen = 4 * (tokens // 1024)
    order = TrainingWindows(data.train, 256, seen + FRESH_WINDOWS, seed=seed)
    fresh = Subset(order, range(seen, seen + FRESH_WINDOWS))
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(arm, seed, tokens, learning_rate, target, Path(folder) / "run")
        result = train(settings, console=Console(quiet=True))
        model = load_weights(result.output, torch.float32)
        assert isinstance(model, DyadForCausalLM)
    model.eval()
    found: dict[str, Any] = {
        "parameters": size(model),
        "tokens": result.tokens,
        "milliseconds_per_step": round(1000 * result.seconds / result.steps, 2),
    }
    if model.planner is None:
        return found | {"nats": {"engineer": round(fresh_nats(model, fresh), 5)}}
    parts = opinions(model, fresh)
    return found | {"nats": scored(model, parts), "control": fitted(parts)}


def main() -> None:
    parser = arguments(__doc__ or "", "paper.json")
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only")
    parser.add_argument("--tokens", type=int, default=307_200)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--times", action="store_true", help="measure what a step takes instead, all arms in turns")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    cells, target = Cells(options.output), size(dyad())
    if options.times:
        arms = options.arm or ("tiny", "planner", "paper")
        cells.store("milliseconds", step_times({arm: ready(arm, target) for arm in arms}))
        return
    todo = {
        f"{arm} / {options.tokens} / {options.learning_rate:g} / {seed}": (arm, seed)
        for seed in range(options.seeds)
        for arm in options.arm or ("tiny", "planner", "paper")
    }
    for cell in cells.missing(list(todo)):
        arm, seed = todo[cell]
        cells.store(cell, measure(arm, seed, options.tokens, options.learning_rate, target))
    for arm in dict.fromkeys(arm for arm, _ in todo.values()):
        seeds = [cells.results[cell] for cell, key in todo.items() if key[0] == arm]
        for way in [way for way, value in seeds[0]["nats"].items() if isinstance(value, float)]:
            print(f"{arm:26s} {way:14s} {statistics.fmean(one['nats'][way] for one in seeds):.4f} nats of fresh text")


if __name__ == "__main__":
    main()
