"""The paper's system beside `tiny`, and what a consensus is worth: as a product, and with a learned weight.

    python benchmarks/paper.py [--arm paper ...] [--tokens 307200] [--seeds 1]

`dyadlm train` on Shakespeare's plays (Hamlet for validation), windows of 256 bytes, four a step, equal tokens and
nearly equal parameters at inference. Scored are nats of fresh text, the windows that would have been trained on next, and of
Hamlet: by the engineer alone and by each consensus. The control asks what part of a gain the artist brings: exponents
that the hidden state gives, fitted afterwards on half of the fresh text and scored on the other half, of the artist
(`weight`), of the engineer without an artist (`exponent`), and of both.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from common import Cells, arguments, dyad, require_green, size, validation_nats
from dyadlm import DyadForCausalLM
from dyadlm.data import TokenStream, TrainingWindows, resolve_data
from dyadlm.model.loading import load_weights
from dyadlm.train import TrainSettings, train
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
    """At every token of some windows: hidden states (N, D), both log-probabilities (N, V), and the next token (N,)."""
    mass, model.config.consensus = model.config.consensus, 0.0
    parts = []
    for batch in DataLoader(windows, 8):
        found = model(batch["input_ids"], output_plan=True, output_hidden_states=True, use_cache=False)
        each = (found.hidden_states[-1], found.logits.log_softmax(-1), found.plan.artist.log_softmax(-1))
        parts.append([*(part[:, :-1].flatten(0, 1) for part in each), batch["labels"][:, 1:].flatten()])
    model.config.consensus = mass
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def fitted(model: DyadForCausalLM, fresh: Subset[dict[str, Tensor]]) -> dict[str, float]:
    """Nats of the second half of fresh text with exponents fitted on the first, by kind, and of the engineer there."""
    half = len(fresh) // 2
    known, asked = (opinions(model, Subset(fresh, part)) for part in (range(half), range(half, 2 * half)))

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
            picked = torch.randint(len(known[3]), (FITTED_TOKENS,), generator=generator)
            adam.zero_grad()
            nats(kind, gate, [part[picked] for part in known]).backward()
            adam.step()
            schedule.step()
        with torch.no_grad():
            found[kind] = nats(kind, gate, asked).item()
    return {kind: round(value, 5) for kind, value in found.items()}


def scored(
    model: DyadForCausalLM, validation: TokenStream, fresh: Dataset[dict[str, Tensor]], mass: float
) -> dict[str, float]:
    """By the consensus of this mass; 0: by the engineer alone."""
    model.config.consensus = mass
    return {"nats": validation_nats(model, validation, 256)["nats"], "fresh_nats": round(fresh_nats(model, fresh), 5)}


def measure(arm: str, seed: int, tokens: int, learning_rate: float, target: int) -> dict[str, Any]:
    """Train one arm and score it in every way that it has."""
    data = resolve_data(["shakespeare"])
    seen = 4 * (tokens // 1024)
    order = TrainingWindows(data.train, 256, seen + FRESH_WINDOWS, seed=seed)
    fresh = Subset(order, range(seen, seen + FRESH_WINDOWS))
    preset, told = ARMS[arm]
    length = f"max_steps={tokens // 1024}"
    assignments = [length, f"seed={seed}", f"learning_rate={learning_rate}", "eval_steps=0", *told]
    if arm == "planner":
        assignments.append(f"model.level_rank={rank_for({**PLANNER, 'pool': 'learned'}, target)}")
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings.create(
            Path(folder) / "run",
            preset=preset,
            data=["shakespeare"],
            device="cpu",
            dtype="float32",
            assignments=assignments,
        )
        result = train(settings, console=Console(quiet=True))
        model = load_weights(result.output, torch.float32)
        assert isinstance(model, DyadForCausalLM)
    model.eval()
    found = {
        "parameters": size(model),
        "tokens": result.tokens,
        "milliseconds_per_step": round(1000 * result.seconds / result.steps, 2),
        "engineer": scored(model, data.validation[0], fresh, 0.0),
    }
    if model.planner is not None:
        found["control"] = fitted(model, fresh)
        for mass in (0.9, 1.0):
            found[f"learned, {mass:g}"] = scored(model, data.validation[0], fresh, mass)
        with torch.no_grad():
            batches = DataLoader(fresh, 8)
            weights = torch.cat([model(batch["input_ids"], output_plan=True).plan.weight for batch in batches])
        found["weight"] = {"mean": round(weights.mean().item(), 4), "deviation": round(weights.std().item(), 4)}
        model.planner.belief = None
        for mass in (0.9, 1.0):
            found[f"product, {mass:g}"] = scored(model, data.validation[0], fresh, mass)
    return found


def main() -> None:
    parser = arguments(__doc__ or "", "paper.json")
    parser.add_argument("--arm", action="append", choices=ARMS, help="measure these arms only")
    parser.add_argument("--tokens", type=int, default=307_200)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    cells, target = Cells(options.output), size(dyad())
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
        for way in [name for name, value in seeds[0].items() if isinstance(value, dict) and "fresh_nats" in value]:
            means = [statistics.fmean(one[way][kind] for one in seeds) for kind in ("fresh_nats", "nats")]
            print(f"{arm:26s} {way:14s} {means[0]:.4f} nats of fresh text, {means[1]:.4f} of Hamlet")


if __name__ == "__main__":
    main()
