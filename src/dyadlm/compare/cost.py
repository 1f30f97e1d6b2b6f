"""What a family costs: a step of training, one more token, the bytes of its state."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from dyadlm.causal_lm import FAULTS, first_state, state_bytes, state_of
from dyadlm.errors import first_line
from dyadlm.train.muon import muon_over
from dyadlm.version import __version__

TIMED = 6  # steps that are timed, after two
CONTEXTS = (0, 1_000, 4_000)  # tokens read before decoding is timed
WRITTEN = 24


def training_cost(model: PreTrainedModel, batch: int, length: int, optimizer: str) -> dict[str, float]:
    """Of a training step on random tokens (batch, length): seconds of thread time and operations, both for a token.
    Operations are those of products of matrices and of attention."""
    model.train()
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))
    muon = optimizer == "muon"
    moves = (
        muon_over(model, weight_decay=0.0, adamw={"lr": 0.0}) if muon else torch.optim.AdamW(model.parameters(), 0.0)
    )

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        moves.zero_grad()
        loss.backward()
        moves.step()

    # What torch does not count: the products of a mixture of experts.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_products})
    with counter:
        step()
    step()
    times = []
    for _ in range(TIMED):
        begun = time.thread_time()
        step()
        times.append(time.thread_time() - begun)
    return {
        "seconds_per_token": sorted(times)[len(times) // 2] / ids.numel(),
        "flops_per_token": counter.get_total_flops() / ids.numel(),
    }


def grouped_products(
    one: Sequence[int], other: Sequence[int], *rest: Any, out_shape: Sequence[int], **options: Any
) -> int:
    """Operations of `torch._grouped_mm`: of rows (N, I) by a matrix for each group (E, I, O), or of what both have in
    common, (I, N) by (N, O), group by group."""
    if len(one) == len(other) == 3:
        return 2 * math.prod(one) * other[-1]
    # Each row belongs to one group, so that the groups together are as one product.
    return 2 * one[-2] * one[-1] * other[-1]


@torch.no_grad()
def decoding(model: PreTrainedModel) -> tuple[list[dict[str, float]], str]:
    """Milliseconds of thread time for one more token after some contexts, and the bytes of the state; why there are not
    more: what keeps no state reads its text again, and a context can be longer than a model reads."""
    found: list[dict[str, float]] = []
    model.train(False)
    for context in CONTEXTS:
        ids = torch.randint(0, 256, (1, max(context, 1)), generator=torch.Generator().manual_seed(1))
        try:
            output = model(input_ids=ids, use_cache=True, **first_state(model))
            state = state_of(model, output)
            if not state:
                return found, "it keeps no state"
            times = []
            for _ in range(WRITTEN):
                begun = time.thread_time()
                output = model(input_ids=ids[:, -1:], use_cache=True, **state)
                state = state_of(model, output)
                times.append(time.thread_time() - begun)
        except FAULTS as error:
            return found, f"after {context:,} tokens: {first_line(error)}"
        found.append(
            {"context": context, "milliseconds": round(1000 * min(times), 4), "state_bytes": state_bytes(state)}
        )
    return found, ""


def circumstances() -> dict[str, Any]:
    """Versions and the kind of machine."""
    return {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {"dyadlm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
