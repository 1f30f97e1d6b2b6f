"""What a family costs: a step of training, one more token, the bytes of its state."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from dyadlm.causal_lm import FAULTS, first_state, state_bytes, state_of
from dyadlm.errors import UserError, first_line
from dyadlm.train.muon import muon_over
from dyadlm.version import __version__

TIMED_STEPS = 6  # after two others
CONTEXTS = (0, 1_000, 4_000)  # tokens read before decoding is timed
NEW_TOKENS = 24
GRADIENT_TOLERANCE = {"float32": 0.01, "bfloat16": 0.25}  # of the norm of a row of a gradient, and of a typical row
LEAST_GRADIENT = 4e-4  # of the norm of all gradients


def training_cost(
    model: PreTrainedModel, batch: int, length: int, optimizer: str, dtype: str = "float32", compiles: bool = False
) -> dict[str, float]:
    """Of a training step on random tokens (batch, length): seconds of thread time and operations, both for a token.
    The time to compile is left out.

    Raises:
        UserError: the compiled model has other gradients.

    Operations are those of products of matrices, convolutions and attention; element by element, in scans and in
    Fourier transforms none is counted.
    """
    model.train()
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))
    adamw: dict[str, Any] = {
        "lr": 0.0,
        "fused": True,
    }  # as training has it: what it refuses shows here, before hours of training
    optimizing = (
        muon_over(model, weight_decay=0.0, adamw=adamw)
        if optimizer == "muon"
        else torch.optim.AdamW(model.parameters(), **adamw)
    )

    def step(model: Any) -> None:
        optimizing.zero_grad()
        backward(model, ids, dtype)
        optimizing.step()

    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with counter:
        step(model)
    timed = torch.compile(model) if compiles else model
    if compiles:
        require_equal_gradients(model, timed, ids, dtype)
    step(timed)
    times = []
    for _ in range(TIMED_STEPS):
        begun = time.thread_time()
        step(timed)
        times.append(time.thread_time() - begun)
    return {
        "seconds_per_token": statistics.median(times) / ids.numel(),
        "flops_per_token": counter.get_total_flops() / ids.numel(),
    }


def backward(model: Any, ids: torch.Tensor, dtype: str) -> None:
    """Add the gradients of the loss on ids (B, T). dtype: that products are computed in."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def require_equal_gradients(model: PreTrainedModel, compiled: Any, ids: torch.Tensor, dtype: str) -> None:
    """Raise `UserError` where compiled code computes another gradient of any row of a weight than the model does.

    compiled: the same weights. Both are compared with the model in float32, and without dropout. A row may differ from
    that by twice what the row of the model itself does, and by a part of its norm and of that of a typical row
    (`GRADIENT_TOLERANCE`): a row that is lost or read from elsewhere is found, and rounding is not.
    """

    def gradients(which: Any, computed_in: str) -> dict[str, torch.Tensor]:
        model.zero_grad()
        backward(which, ids, computed_in)
        return {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            for name, weight in model.named_parameters()
        }

    dropouts = [(part, part.p) for part in model.modules() if isinstance(part, torch.nn.Dropout)]
    for part, _ in dropouts:
        part.p = 0.0
    try:
        exact, plain, other = gradients(model, "float32"), gradients(model, dtype), gradients(compiled, dtype)
    finally:
        for part, share in dropouts:
            part.p = share
        model.zero_grad()
    # What is zero but for rounding is measured by the rest.
    whole = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    for name, gradient in exact.items():
        rows = gradient.reshape(len(gradient), -1) if gradient.ndim else gradient.reshape(1, 1)
        typical = rows.norm() / math.sqrt(len(rows)) + LEAST_GRADIENT * whole
        rounding = (plain[name].reshape(rows.shape) - rows).norm(dim=1)
        differences = (other[name].reshape(rows.shape) - rows).norm(dim=1)
        allowed = 2 * rounding + GRADIENT_TOLERANCE[dtype] * (rows.norm(dim=1) + typical)
        if not (differences <= allowed).all():  # also NaN
            raise UserError(
                f"Compiled, a {model.config.model_type} has another gradient of {name} here; leave it out of --compile."
            )


def grouped_products(
    one: Sequence[int], other: Sequence[int], *rest: Any, out_shape: Sequence[int], **options: Any
) -> int:
    """Operations of `torch._grouped_mm`: of rows (N, I) by a matrix for each group (E, I, O), or of what both have in
    common, (I, N) by (N, O), group by group."""
    if len(one) == len(other) == 3:
        return 2 * math.prod(one) * other[-1]
    # Each row belongs to one group, so that the groups together are as one product.
    return 2 * one[-2] * one[-1] * other[-1]


def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **options: Any) -> int:
    """Operations of attention on a CPU, forward: shapes (B, heads, T, D)."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def attention_backward(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **options: Any
) -> int:
    """Operations of attention on a CPU, backward."""
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


# What torch does not count by itself: the products of a mixture of experts, and attention on a CPU.
UNCOUNTED = {
    torch.ops.aten._grouped_mm: grouped_products,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def decoding_cost(model: PreTrainedModel, keeps_state: bool) -> dict[str, Any]:
    """decoding: as `decoding` measures it; decoding_ends: why there is no longer context, or none at all."""
    if not keeps_state:
        return {"decoding": [], "decoding_ends": "it keeps no state, and reads its text again"}
    found, reason = decoding(model)
    return {"decoding": found, "decoding_ends": reason}


@torch.no_grad()
def decoding(model: PreTrainedModel) -> tuple[list[dict[str, float]], str]:
    """Milliseconds of thread time (median) for one more token after contexts of some lengths, and bytes of the state.
    The text says why a length is missing; it is empty where none is."""
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
            for _ in range(NEW_TOKENS):
                begun = time.thread_time()
                output = model(input_ids=ids[:, -1:], use_cache=True, **state)
                state = state_of(model, output)
                times.append(time.thread_time() - begun)
        except FAULTS as error:
            return found, f"after {context:,} tokens: {first_line(error)}"
        found.append(
            {
                "context": context,
                "milliseconds": round(1000 * statistics.median(times), 4),
                "state_bytes": state_bytes(state),
            }
        )
    return found, ""


def circumstances(dtype: str) -> dict[str, Any]:
    """Versions and the kind of machine. dtype: that the training computes in."""
    return {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "versions": {"dyadlm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
