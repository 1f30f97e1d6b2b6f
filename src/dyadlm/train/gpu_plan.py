"""What a run would take on GPUs that are not here: memory counted, time from rates measured on one GPU.

Three things are assumed, and said with every plan: a larger model moves as many floating-point operations in a second
as the measured one; several GPUs share the windows of a step and lose `1 - efficiency` of their time to each other;
and the GPU is as fast as the one that was measured.

rates.json is written by benchmarks/rates.py from benchmarks/results/gpu*.json.
"""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dyadlm.accounting import activation_bytes, forward_flops, parameters, training_flops_per_token
from dyadlm.errors import UserError, first_line
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.train.arguments import require_width
from dyadlm.train.cost import static_bytes
from dyadlm.train.prepared_run import configuration_of, require_countable
from dyadlm.train.settings import TrainSettings


class Rate(NamedTuple):
    """One measurement. kind: `eager`, ours as torch runs it; `graph`, ours with compiled blocks and each step in one
    CUDA graph; `llama`, a compiled Llama with flash attention. peak_bytes: of memory in a step of ours, of which
    activation_bytes are what `dyadlm.accounting.activation_bytes` counts; None where it was not measured."""

    gpu: str
    torch: str
    commit: str
    kind: str
    preset: str
    sequence_length: int
    parameters: int
    tokens_per_second: float
    flops_per_second: float
    peak_bytes: int | None = None
    activation_bytes: int | None = None


GPUS = (1, 8, 64)


@cache
def measured_rates() -> list[Rate]:
    """All that was measured on GPUs."""
    path = Path(__file__).with_name("rates.json")
    return [Rate(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def plan(
    settings: TrainSettings, gpus: Sequence[int] | None = None, efficiency: float = 1.0, price: float | None = None
) -> dict[str, Any]:
    """What the run of these settings would take on so many GPUs together; nothing is run, and no text is read.

    The GPUs share the windows of a step, so that the model that comes out does not depend on their number: such a run
    has train.windows_per_step and the gradient_accumulation_steps of its number of GPUs. What trains beside a model is
    not counted. gpus: by default those of 1, 8 and 64 that can share a step evenly. efficiency: of several GPUs,
    beside as many GPUs that do not wait for each other.
    price: of one GPU for one hour, in any currency.

    Returns parameters, steps, windows_per_step, sequence_length, tokens, flops (of all steps), static_memory_bytes
    (weights, gradients and what the optimizer keeps), rates (by kind: what was measured, as in `Rate`), and gpus: for
    each number of GPUs rows (windows that one GPU computes at once), gradient_accumulation_steps (for the run on so
    many GPUs), memory_bytes of each GPU, sharded_memory_bytes (with FSDP), and by kind of rate seconds, gpu_hours
    and cost (without a price: {}). left_out: numbers of GPUs that are usual and cannot share the windows of a step.

    Raises `UserError` for settings that do not fit, and where GPUs cannot share the windows of a step evenly.
    """
    if settings.preset is None:
        raise UserError("A plan is for a new model; give --preset, and --set for fields of your own.")
    if gpus is not None and min(gpus, default=0) < 1:
        raise UserError("There is at least one GPU; give the numbers of GPUs as --gpus 1 8 64.")
    if not 0 < efficiency <= 1:
        raise UserError("The efficiency of several GPUs lies above 0 and at most at 1; 1 loses nothing.")
    if price is not None and not (price > 0 and math.isfinite(price)):
        raise UserError("The price of a GPU for an hour is a number above 0.")
    config = configuration_of(settings)
    length, arguments = settings.data.sequence_length, settings.arguments
    if "max_steps" not in arguments:
        raise UserError("How long an epoch is depends on the text, which a plan does not read; set max_steps.")
    recomputed = any(bool(arguments.get(f"{name}_checkpointing")) for name in ("gradient", "activation"))
    rows, windows = windows_of(settings)
    require_countable(arguments["max_steps"], windows, length)
    left_out = [] if gpus else [count for count in GPUS if windows % count]
    gpus = gpus or [count for count in GPUS if count not in left_out]
    if uneven := next((count for count in gpus if windows % count), 0):
        more = "train.windows_per_step" if settings.train.windows_per_step else "gradient_accumulation_steps"
        raise UserError(
            f"{uneven} GPUs cannot share the {windows} windows of a step evenly; change {more}, or give other --gpus."
        )
    tokens = arguments["max_steps"] * windows * length
    passes_of = {count: passes_over(windows // count, rows) for count in gpus}
    rows_of = {count: windows // count // passes for count, passes in passes_of.items()}
    try:
        # Several GPUs copy gradients into buckets that they sum (DDP); with FSDP a GPU has the whole weights and
        # gradients of one block and of all that is in no block, and the weights of the next block.
        buckets = 4 * parameters(config)
        per_token = training_flops_per_token(config, length) + recomputed * forward_flops(config, length) / length
        with torch.device("meta"):
            model = DyadForCausalLM(config)
        if settings.train.base_width:
            require_width(settings.train.base_width, model)
        static = static_bytes(model, settings.train)
        blocks = [sum(weight.numel() for weight in block.parameters()) for block in model.model.layers]
        gathered = 12 * max(blocks) + 8 * (sum(weight.numel() for weight in model.parameters()) - sum(blocks))
        memory = {own: activation_bytes(config, own, length, recomputed=recomputed) for own in set(rows_of.values())}
        flops = float(tokens) * per_token
    except (RuntimeError, OverflowError) as error:  # torch, too, counts in 64 bits
        raise UserError(
            f"A run of this size is beyond what can be counted ({first_line(error)}); give smaller numbers."
        ) from error
    rates = {kind: rate for kind in ("eager", "graph", "llama") if (rate := nearest_rate(kind, config, length))}
    told: list[dict[str, Any]] = []
    for count in gpus:
        own, share = rows_of[count], windows // count
        kept = round(overhead(rates["eager"]) * memory[own])
        operations = flops / windows * share / (efficiency if count > 1 else 1)
        seconds = {kind: operations / rate.flops_per_second for kind, rate in rates.items()}
        hours = {kind: count * taken / 3600 for kind, taken in seconds.items()}
        told.append(
            {
                "gpus": count,
                "rows": own,
                "gradient_accumulation_steps": passes_of[count],
                "memory_bytes": static + kept + (buckets if count > 1 else 0),
                "sharded_memory_bytes": math.ceil(static / count) + kept + (gathered if count > 1 else 0),
                "seconds": seconds,
                "gpu_hours": hours,
                "cost": {} if price is None else {kind: price * taken for kind, taken in hours.items()},
            }
        )
    amounts = [entry[name].values() for entry in told for name in ("seconds", "gpu_hours", "cost")]
    if not all(math.isfinite(amount) for kinds in amounts for amount in kinds):
        raise UserError("Such a time or cost is beyond what can be counted; give a larger efficiency, a smaller price.")
    return {
        "parameters": parameters(config),
        "steps": arguments["max_steps"],
        "windows_per_step": windows,
        "sequence_length": length,
        "tokens": tokens,
        "flops": flops,
        "static_memory_bytes": static,
        "rates": {kind: rate._asdict() for kind, rate in rates.items()},
        "efficiency": efficiency,
        "left_out": left_out,
        "gpus": told,
    }


def windows_of(settings: TrainSettings) -> tuple[int, int]:
    """How many windows one GPU alone computes at once, and how many a step has."""
    rows = settings.arguments["per_device_train_batch_size"]
    passes, total = settings.arguments.get("gradient_accumulation_steps", 1), settings.train.windows_per_step
    return (math.ceil(total / passes), total) if total else (rows, rows * passes)


def passes_over(windows: int, rows: int) -> int:
    """In how many equal passes a GPU computes its windows of a step, at most `rows` of them at once."""
    small = [number for number in range(1, math.isqrt(windows) + 1) if windows % number == 0]
    return min(passes for number in small for passes in (number, windows // number) if windows // passes <= rows)


def nearest_rate(kind: str, config: DyadConfig, length: int) -> Rate | None:
    """What was measured on the model nearest in size, and of that at the nearest length; None: nothing of this kind."""
    size = parameters(config)
    found = [rate for rate in measured_rates() if rate.kind == kind]
    if not found:
        return None
    preset = min(found, key=lambda rate: abs(math.log(size / rate.parameters))).preset
    alike = [rate for rate in found if rate.preset == preset]
    return min(alike, key=lambda rate: abs(math.log(length / rate.sequence_length)))


def overhead(rate: Rate) -> float:
    """By how much the measured memory of a step exceeds what is counted: buffers that live for a moment."""
    assert rate.peak_bytes is not None
    assert rate.activation_bytes is not None
    return (rate.peak_bytes - 16 * rate.parameters) / rate.activation_bytes
