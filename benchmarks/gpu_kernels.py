"""Time of the Triton kernels on a GPU beside the time of a copy of as many bytes, and beside the forms in torch.

    python benchmarks/gpu_kernels.py --folder DIR [--rehearse]

The floor is what device memory takes to read each argument and write each result once, at the rate at which this card
copies a large tensor; the plan of slots sorts, and moves more. Tokens are bfloat16 and features float32, as in a
training step under autocast; 32,768 tokens in windows of 2,048 and of 32,768. The caches of the device are emptied
between calls. With `--rehearse`, few tokens on any device; without a GPU, in Triton's interpreter.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyadlm import DyadConfig, kernels
from dyadlm.files import write_atomically
from dyadlm.model.cache import BlockState
from dyadlm.model.layout import ChunkLayout, chunk_layout
from dyadlm.model.presets import COMPOSITION
from dyadlm.model.slots import IdentitySlots, plan_slots
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import Clock, make_clock
from dyadlm.ops.contexts import Contexts, context_tags
from dyadlm.ops.segments import segment_ends, segment_plan

SHAPES = ((16, 2048), (1, 32768))
SIZES = {"small": (288, 54), "base": (768, 100)}  # width and rank
# Tokens of a segment, as bytes of English have them.
LENGTHS = {"syllable": 3, "word": 5, "sentence": 100, "line": 60}
LONGEST = 2048
WORDS, LETTERS = 1000, 5  # of the text that slots are planned for
COPIED = 2**29  # bytes


def milliseconds(call: Callable[[], Any], gpu: bool) -> float:
    """Of one call: on a GPU the median of many with empty caches, as Triton measures it."""
    if gpu:
        import triton

        return float(triton.testing.do_bench(call, return_mode="median"))
    begun = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begun)


def size(parts: Sequence[Tensor]) -> int:
    """Bytes of all numbers, as many as the shapes say."""
    return sum(part.numel() * part.element_size() for part in parts)


def tower_of(width: int, rank: int, device: str) -> Tower:
    """Four sliding levels and four semantic ones, as the presets have them."""
    tower = Tower(
        DyadConfig(
            hidden_size=width, num_hidden_layers=1, num_levels=4, level_alignment="sliding", salience=True,
            level_rank=rank, semantic_levels=list(LENGTHS),
        )
    )  # fmt: skip
    return tower.to(device)


def cell(call: Callable[[], Any], moved: int, rate: float, gpu: bool) -> dict[str, float]:
    """Milliseconds of a call beside those of a copy that moves as many bytes, at `rate` bytes a second."""
    taken, floor = milliseconds(call, gpu), 1000 * moved / rate
    return {"milliseconds": round(taken, 4), "floor": round(floor, 4), "ratio": round(taken / floor, 2)}


def measured(rank: int, batch: int, length: int, device: str, rate: float) -> dict[str, Any]:
    """Milliseconds of each family of four levels, forward and backward. rate: bytes a second of a copy."""
    from dyadlm.kernels.segment_gradients import segment_gradients
    from dyadlm.kernels.segments import segment_features
    from dyadlm.kernels.windows import window_features, window_gradients

    gpu = device == "cuda"
    chance = torch.tensor([1 / each for each in LENGTHS.values()])
    begins = (torch.rand(batch, length, len(LENGTHS)) < chance).to(device)
    clock = make_clock(batch, length, device=torch.device(device))
    plan, _ = segment_plan(begins, clock, LONGEST)
    ends = segment_ends(plan.begins)
    # As they lie in a model: all levels side by side.
    tokens = torch.randn(batch, length, 4 * rank, device=device, dtype=torch.bfloat16).split(rank, -1)
    weights = (torch.rand(batch, length, 8, device=device) + 0.5).unbind(-1)
    slope = torch.randn(batch, length, 3 * rank, device=device)
    found: dict[str, Any] = {}

    places = [(clock.index,)] * 4 + [(plan.last[..., s], plan.complete[..., s], ends[..., s]) for s in range(4)]
    for family, first in (("sliding", 0), ("semantic", 4)):
        read = [(k, tokens[k % 4], weights[k], places[k]) for k in range(first, first + 4)]

        def features(k: int, x: Tensor, w: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            if len(at) == 1:
                return window_features(x, w, *at, None, None, k, torch.float32)
            return segment_features(x, w, *at, torch.float32)

        made = [features(*level) for level in read]

        def gradients(
            level: tuple[int, Tensor, Tensor, tuple[Tensor, ...]], out: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor]:
            k, x, w, at = level
            if len(at) == 1:
                return window_gradients(x, w, *at, out[0], slope, out[1], k)
            return segment_gradients(x, w, *at, out[0], slope, out[1])

        moved = sum(size((x, w, *at, *out)) for (_, x, w, at), out in zip(read, made, strict=True))
        found[f"{family} forward"] = cell(lambda read=read: [features(*level) for level in read], moved, rate, gpu)
        # Two thirds of the features are read, and a gradient is as large as what it belongs to.
        moved = sum(
            size((x, w, x, w, *at, slope, out[1])) + size(out[:1]) * 2 // 3
            for (_, x, w, at), out in zip(read, made, strict=True)
        )
        both = list(zip(read, made, strict=True))
        found[f"{family} backward"] = cell(
            lambda both=both: [gradients(level, out) for level, out in both], moved, rate, gpu
        )
    return found


def slot_tables(width: int) -> DyadConfig:
    """A block of a preset, as far as it has slots."""
    return DyadConfig(hidden_size=width, num_hidden_layers=1, slot_contexts=COMPOSITION["slot_contexts"])


def slot_contexts(config: DyadConfig, batch: int, length: int, device: str) -> tuple[Contexts, Clock]:
    """Of words that are drawn about as often as those of a language."""
    words = torch.randint(97, 123, (WORDS, LETTERS + 1))
    words[:, LETTERS] = 32
    drawn = torch.multinomial(1 / torch.arange(1.0, WORDS + 1), batch * length, replacement=True)
    ids = words[drawn].flatten()[: batch * length].view(batch, length).to(device)
    clock = make_clock(batch, length, device=torch.device(device))
    contexts = config.slot_contexts or []
    return context_tags(ids, contexts, config.vocab_size, clock, word_begins=ids == 32)[0], clock


def measured_slots(width: int, batch: int, length: int, device: str, rate: float) -> dict[str, Any]:
    """Milliseconds of a plan, and of what one block reads by it, forward and backward."""
    from dyadlm.kernels.slot_read import slot_recall, slot_recall_gradients

    gpu, config = device == "cuda", slot_tables(width)
    contexts, clock = slot_contexts(config, batch, length, device)
    plan = plan_slots(contexts, clock, config, None)
    assert plan.following is not None, "the plan of a kernel"
    values = torch.randn(batch, length, 1, config.slot_width, device=device, dtype=torch.bfloat16)
    by = (plan.found, plan.column, plan.following)
    slope = slot_recall(values, *by[:2], None, None, None)
    read = (lambda: slot_recall(values, *by[:2], None, None, None), size((values, *by[:2], slope)))
    gradients = (lambda: slot_recall_gradients(slope, *by, 1), size((slope, *by, values)))
    planned = size((contexts.words, clock.index, clock.length, *by, plan.pending))
    return {
        "slots plan": cell(lambda: plan_slots(contexts, clock, config, None), planned, rate, gpu),
        "slots read forward": cell(*read, rate, gpu),
        "slots read backward": cell(*gradients, rate, gpu),
    }


class Count(TorchDispatchMode):
    """Counts operations that are more than another view, and the bytes of their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(
        self, called: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = called(*args, **(kwargs or {}))
        if not called.is_view:
            self.operations += 1
            self.bytes += size([part for part in tree_leaves((args, kwargs, result)) if isinstance(part, Tensor)])
        return result


def beside_torch(width: int, rank: int, batch: int, length: int, device: str) -> dict[str, Any]:
    """Of all levels of a block forward and backward, bottlenecks included, with kernels and without: milliseconds,
    operations, and the bytes of their arguments and results."""
    tower, gpu, where = tower_of(width, rank, device), device == "cuda", torch.device(device)
    chance = torch.tensor([1 / each for each in LENGTHS.values()])
    clock = make_clock(batch, length, device=where)
    plan, _ = segment_plan((torch.rand(batch, length, len(LENGTHS)) < chance).to(where), clock, LONGEST)
    x = torch.randn(batch, length, width, device=where, requires_grad=True)
    progress = torch.ones((), device=where)
    layouts = [chunk_layout(clock, plan, progress, tower.config, torch.float32, keep) for keep in (False, True)]

    def step(layout: ChunkLayout) -> None:
        with torch.autocast(device, torch.bfloat16):
            features = tower.read_levels(x, layout, BlockState())[0].features.values()
        torch.autograd.backward(list(features), [torch.ones_like(feature) for feature in features])

    # A state is left by the forms in torch alone.
    found = {}
    for name, layout in zip(("with kernels", "forms in torch"), layouts, strict=True):
        with Count() as count:
            step(layout)
        taken = milliseconds(lambda layout=layout: step(layout), gpu)
        found[name] = {"milliseconds": round(taken, 4), "operations": count.operations, "bytes": count.bytes}
    return found


def slots_beside_torch(width: int, batch: int, length: int, device: str) -> dict[str, Any]:
    """The same of the plan of slots, and of the slots of one block by it."""
    config, gpu, rule = slot_tables(width), device == "cuda", kernels.usable
    contexts, clock = slot_contexts(config, batch, length, device)
    slots = IdentitySlots(config).to(device)
    x = torch.randn(batch, length, width, device=device, requires_grad=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            read, _, _ = slots(x, contexts, clock, plan, (), False)
        torch.autograd.grad(read, [x, *slots.parameters()], torch.ones_like(read))

    found = {}
    for name, usable in (("with kernels", rule), ("forms in torch", lambda x: False)):
        kernels.usable = usable
        plan = plan_slots(contexts, clock, config, None)
        for part, call in (("plan", lambda: plan_slots(contexts, clock, config, None)), ("block", step)):
            with Count() as count:
                call()
            taken = milliseconds(call, gpu)
            counted = {"operations": count.operations, "bytes": count.bytes}
            found[f"slots {part} {name}"] = {"milliseconds": round(taken, 4), **counted}
    kernels.usable = rule
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--until", type=float, default=float("inf"), help="unix time at which to stop")
    parser.add_argument("--rehearse", action="store_true", help="few tokens")
    options = parser.parse_args()
    if not kernels.INSTALLED:
        print("the kernels need Triton, which is not installed here", flush=True)
        return
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported
        kernels.usable = lambda x: x.dtype in kernels.DTYPES  # type: ignore[assignment]
    path = options.folder / "kernels.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    source = torch.empty(2**16 if options.rehearse else COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / milliseconds(lambda: target.copy_(source), gpu) * 1000
    found["copied_gb_per_second"] = round(rate / 1e9, 1)
    for preset, (width, rank) in list(SIZES.items())[: 1 if options.rehearse else None]:
        for batch, length in ((1, 128),) if options.rehearse else SHAPES:
            name = f"{preset} {batch} x {length}"
            if name in found or time.time() > options.until:
                continue
            found[name] = {
                **measured(rank, batch, length, device, rate),
                **measured_slots(width, batch, length, device, rate),
                **beside_torch(width, rank, batch, length, device),
                **slots_beside_torch(width, batch, length, device),
            }
            print(name, json.dumps(found[name]), flush=True)
            write_atomically(path, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
