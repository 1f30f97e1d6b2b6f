"""Training of many small models at once on one GPU: each is a lane, a stream with its whole step in a CUDA graph.

A step of a small model is thousands of small kernels. A graph starts them without the host, and lanes run beside each
other. On a CPU the same steps run one by one, without graphs: the reference, and a rehearsal.

Dimension letters: S steps, B rows, T tokens of a row.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import dyadlm
from dyadlm.data import TokenStream, TrainingWindows
from dyadlm.train.muon import muon_over
from dyadlm.train.optimizer import decayed_parameters, learning_rate_factor
from dyadlm.train.settings import TrainOptions

WARM_UP = 2
ADAMW = {"betas": (0.9, 0.99)}


def batches(
    streams: list[tuple[TokenStream, float]], steps: int, rows: int, length: int, seed: int
) -> dict[str, Tensor]:
    """All batches of a run in the order of the trainer: input_ids and labels, int64 (S, B, T) each."""
    windows = TrainingWindows(streams, length, steps * rows, seed=seed)
    parts: dict[str, list[Tensor]] = {"input_ids": [], "labels": []}
    for batch in DataLoader(windows, rows):
        for name, values in parts.items():
            values.append(batch[name])
    return {name: torch.stack(values) for name, values in parts.items()}


def optimizer_of(model: Any, name: str, rate: float, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices and AdamW for the rest."""
    options = {"lr": rate, "capturable": next(model.parameters()).is_cuda, **ADAMW}
    if name == "muon":
        return muon_over(model, weight_decay=weight_decay, adamw=options)
    decayed = set(decayed_parameters(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, **options)


class Lane:
    """One model in training. The learning rate warms up over 5 % of the steps and falls along a cosine.

    Both optimizers move weights in proportion to the learning rate. So the graph takes a whole step at the highest
    rate, and keeps of it the part that the schedule gives: a number that lies on the device.
    """

    def __init__(
        self,
        model: Any,
        data: dict[str, Tensor],
        *,
        optimizer: str,
        rate: float,
        final: float = 0.1,
        autocast: torch.dtype | None = None,
        record: bool = True,
    ):
        self.device = next(model.parameters()).device
        self.model, self.autocast = model.train(), autocast
        self.data = {name: values.to(self.device) for name, values in data.items()}
        self.steps, self.done = len(self.data["labels"]), 0
        options, warmup = TrainOptions(final_learning_rate=final), max(1, -(-self.steps // 20))
        factors = [
            learning_rate_factor(step, warmup_steps=warmup, max_steps=self.steps, options=options)
            for step in range(self.steps)
        ]
        self.factors = torch.tensor(factors, device=self.device)
        self.losses = torch.full((self.steps,), torch.nan, device=self.device)
        self.counter = torch.zeros(1, dtype=torch.long, device=self.device)
        self.optimizer = optimizer_of(model, optimizer, rate)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if record else None
        if record:
            self._record()

    def step(self) -> None:
        """Start one step; on a GPU the host does not wait for it."""
        if self.graph is None:
            self._step()
        else:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        self.done += 1

    def training_nats(self) -> float:
        """Mean loss of the last twentieth of the steps."""
        return float(self.losses[self.done - max(1, self.done // 20) : self.done].mean())

    @torch.no_grad()
    def rewind(self, weights: Sequence[Tensor]) -> None:
        """Begin again with these weights: what a warm-up has moved goes back to where it was."""
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.copy_(weight)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        self.counter.zero_()
        self.losses.fill_(torch.nan)
        self.done = 0

    def _step(self) -> None:
        batch = {name: values.index_select(0, self.counter)[0] for name, values in self.data.items()}
        if isinstance(self.model, dyadlm.DyadForCausalLM):
            self.model.model.progress.copy_(self.counter[0] / self.steps)
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        moved = [parameter for parameter in self.parameters if parameter.grad is not None]
        with torch.no_grad():
            before = [parameter.clone() for parameter in moved]
            self.optimizer.step()
            factor = self.factors.index_select(0, self.counter)[0]
            values = [parameter.data for parameter in moved]
            torch._foreach_sub_(values, before)
            torch._foreach_mul_(values, factor)
            torch._foreach_add_(values, before)
            self.losses.index_copy_(0, self.counter, loss.detach()[None].float())
            self.counter += 1

    def _record(self) -> None:
        weights = [parameter.detach().clone() for parameter in self.parameters]
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(self.stream)
        for parameter in self.parameters:
            parameter.grad = None
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._step()
        self.rewind(weights)


def run(lanes: Sequence[Lane], until: float, watch: Callable[[int], None] | None = None) -> bool:
    """Take steps with all lanes in turn until each has taken all, or until this time (`time.monotonic`). Whether all
    were taken. watch: called with the number of rounds now and then, when the device has done them."""
    rounds = 0
    while any(lane.done < lane.steps for lane in lanes):
        for lane in lanes:
            if lane.done < lane.steps:
                lane.step()
        rounds += 1
        if rounds % 20 == 0:
            if lanes[0].device.type == "cuda":
                torch.cuda.synchronize()
            if watch is not None:
                watch(rounds)
            if time.monotonic() > until:
                break
    if lanes and lanes[0].device.type == "cuda":
        torch.cuda.synchronize()
    return all(lane.done == lane.steps for lane in lanes)
