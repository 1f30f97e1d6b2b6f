"""Gradients in bfloat16, as in training: those of kernels and of the forms in torch, both beside float32."""

import pytest
import torch
from torch import Tensor

from dyadlm import DyadForCausalLM, kernels

WORSE, WORSE_ON_AVERAGE = 2.0, 1.25  # at most so many times the error of the forms in torch
ROUNDING = 2**-8  # relative, of a single number


def gradients(model: DyadForCausalLM, ids: Tensor, bfloat16: bool) -> dict[str, Tensor]:
    """Of every weight that has one, under autocast or in float32."""
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_kernels_as_exact(model: DyadForCausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels, which the model is to use, gradients in bfloat16 are about as near to those in float32 as without.
    Errors are relative to the norm of a weight's gradient.
    """
    own, asked = kernels.usable, list[bool]()
    monkeypatch.setattr(kernels, "usable", lambda x: asked.append(own(x)) or asked[-1])
    by_kernels = gradients(model, ids, True)
    assert any(asked), "no kernel was used"
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    by_torch, exact = gradients(model, ids, True), gradients(model, ids, False)
    assert by_kernels.keys() == by_torch.keys() == exact.keys()
    errors = []
    for name, gradient in exact.items():
        if (norm := gradient.norm()) > 1e-6:
            found, expected = (float((part[name] - gradient).norm() / norm) for part in (by_kernels, by_torch))
            assert found < WORSE * max(expected, ROUNDING), name
            errors.append((found, expected))
    sums = [sum(each) for each in zip(*errors, strict=True)]
    assert sums[0] < WORSE_ON_AVERAGE * sums[1]
