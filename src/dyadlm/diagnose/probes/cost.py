"""How does cost grow with length?"""

import time
import weakref
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyadlm.diagnose.causality import module_logits
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import Oracle, independent
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, Probe, in_words
from dyadlm.diagnose.result import Curve, ProbeResult, Reading

SHORTEST, LONGEST = 64, 2048
REPEATS = 3
# No single call is begun that is expected to take longer, but at the few lengths without which nothing is seen to grow.
PATIENCE_SECONDS, FAST_PATIENCE_SECONDS = 4.0, 1.0
LEAST = 3
DECODING = 4  # times as much, for as many calls make one
PROMPT, WRITTEN = 16, 256


class Cost(Probe):
    """Seconds and peak memory at lengths T = 64, 128, 256 …, and the exponent of their growth.

    Definition: the least-squares slope of ln y in ln T over the three longest lengths, one row of random tokens; y =
        the least of three timings. Reading: one pass, logits of every position. Training: one pass and all gradients.
        Decoding: greedily writing T tokens after 16, all together: 1 where a token costs the same whatever was read,
        2 where it costs T. Memory: the most bytes allocated at once during the call, beyond what stood there before; in
        decoding the cache or state is among them, 0 where it does not grow.
    Units: none; 1 is linear. Direction: lower.
    Paper: none; attention is quadratic, recurrences are linear.
    Pitfalls: overheads that do not grow hide what does, so short lengths show exponents that are too low: look at the
        curve; a busy machine disturbs seconds, not memory; kernels that never hold the T × T weights are linear in
        memory at quadratic time; on a CPU, what an operator frees before it returns is not seen. The interval is that
        of repeated timings alone.
    """

    id: ClassVar[str] = "cost"
    failure_mode: ClassVar[str] = "F12"
    question: ClassVar[str] = "How does cost grow with length?"
    meaning: ClassVar[str] = (
        "The power of the text's length with which the time of a training step grows; 1 is linear, 2 is quadratic."
    )
    tokens: ClassVar[int] = 16 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        longest = min(LONGEST, subject.context or LONGEST)
        lengths = [length for length in _doubling(SHORTEST) if length <= longest]
        if len(lengths) < 2:
            raise NotApplicable(f"a context of {longest} tokens is too short to see anything grow")
        written = [length for length in _doubling(SHORTEST // 4) if length <= min(WRITTEN, longest - PROMPT)]
        patience = FAST_PATIENCE_SECONDS if budget.fast else PATIENCE_SECONDS
        device = next((weight.device for weight in subject.module.parameters()), None) if subject.module else None
        draw = torch.Generator().manual_seed(budget.seed)
        row = torch.randint(subject.vocabulary, (1, longest), generator=draw)
        kinds: dict[str, Callable[[int], object]] = {"reading": lambda length: subject.logits(row[:, :length])}
        if subject.module is not None:
            kinds["training"] = _trainer(subject.module, row)
        kinds["decoding"] = lambda length: subject.greedy(row[:, :PROMPT], length)
        readings, curves, left_out = {}, {}, []
        for number, (kind, call) in enumerate(kinds.items()):
            allowed = written if kind == "decoding" else lengths
            allows = patience * (DECODING if kind == "decoding" else 1)
            try:
                seconds = _timed(call, allowed, allows, device)
                reached = list(seconds)
                memory = [[_peak_bytes(call, length, device)] for length in reached]
            except Exception as error:
                if kind != "training":
                    raise
                left_out.append(f"training, which fails in evaluation mode ({in_words(error)})")
                continue
            if len(seconds) < 2:
                left_out.append(f"{kind}, which has no room in the context")
                continue
            if reached[-1] < allowed[-1]:
                left_out.append(f"{kind} at more than {reached[-1]} tokens, for time")
            values = {f"{kind}_seconds": list(seconds.values()), f"{kind}_memory": memory}
            for name, measured in values.items():
                least = [min(each) for each in measured]
                if min(least) <= 0:
                    left_out.append(f"{name.replace('_', ' of ')}: nothing was seen to be allocated")
                    continue
                slope, interval = exponent(reached, measured)
                unit = "seconds" if name.endswith("seconds") else "bytes"
                note = f"{least[-1]:.3g} {unit} at {reached[-1]} tokens"
                readings[name] = Reading(slope, "exponent", "lower", interval, note)
                curves[name.replace("_", ": ")] = Curve(reached, least, "tokens", unit, log_x=True, log_y=True)
            budget.progress(number + 1, len(kinds))
        assert readings, "reading takes time"
        order = (
            "training_seconds",
            "reading_seconds",
            "decoding_seconds",
            "training_memory",
            "reading_memory",
            "decoding_memory",
        )
        readings = {name: readings[name] for name in order if name in readings}
        headline, first = next(iter(readings.items()))
        what = headline.replace("_", " ").replace("seconds", "time")
        sentence = f"The {what} grows with the length to the power of {first.value:.2f} ({first.note})."
        settings = {
            "lengths": lengths,
            "repeats": REPEATS,
            "device": str(device or "cpu"),
            "threads": torch.get_num_threads(),
            "patience_seconds": patience,
        }
        return ProbeResult(self.id, readings, curves, sentence, settings, left_out="; ".join(left_out))

    def controls(self) -> list[Control]:
        def material() -> Material:
            return independent(2, 1, 64)

        return [
            Control(
                "sleeps T² long",
                True,
                lambda: (Sleeper(2, 0.1), material()),
                {
                    "reading_seconds": Expected(2.0, 0.2),
                    "reading_memory": Expected(2.0, 0.1),
                    "decoding_seconds": Expected(2.0, 0.2),
                    "decoding_memory": Expected(2.0, 0.1),
                },
                "time and memory are made to grow with the square",
            ),
            Control(
                "always sleeps as long",
                False,
                lambda: (Sleeper(0, 0.01), material()),
                {
                    "reading_seconds": Expected(0.0, 0.2),
                    "reading_memory": Expected(0.0, 0.1),
                    "decoding_seconds": Expected(0.0, 0.2),
                    "decoding_memory": Expected(0.0, 0.1),
                },
                "a call costs the same whatever the length",
            ),
        ]


class Sleeper(Oracle):
    """Takes these seconds, and four megabytes, at the longest; else less by the given power of the length."""

    def __init__(self, power: int, seconds: float):
        super().__init__(2, lambda ids: self._read(ids), f"sleeper {power}", context=1024)
        self._power, self._seconds = power, seconds

    def _read(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        time.sleep(self._seconds * (length / 1024) ** self._power)
        torch.empty(int(2**20 * (length / 1024) ** self._power))
        return torch.zeros(1, 1, 1).expand(1, length, 2)

    def greedy(self, ids: Tensor, count: int) -> Tensor:
        time.sleep(self._seconds * (count / WRITTEN) ** self._power)
        torch.empty(int(2**20 * (count / WRITTEN) ** self._power))
        return ids.new_zeros(1, count)


def exponent(lengths: list[int], measured: list[list[float]]) -> tuple[float, tuple[float, float] | None]:
    """The slope of ln y in ln T over the three longest lengths, y the least of the repeats at each; and the interval in
    which it lies for 95 % of the ways to take one repeat of each. None where nothing was repeated."""
    x, repeats = np.log(lengths[-3:]), [np.log(each) for each in measured[-3:]]

    def slope(y: Sequence[float]) -> float:
        return float(np.polyfit(x, y, 1)[0])

    best = slope([float(each.min()) for each in repeats])
    ways = [slope(chosen) for chosen in product(*repeats)]
    if len(ways) < 2:
        return best, None
    low, high = np.percentile(ways, [2.5, 97.5])
    return best, (float(min(low, best)), float(max(high, best)))


def _doubling(first: int) -> list[int]:
    return [first * 2**power for power in range(12)]


def _trainer(module: nn.Module, row: Tensor) -> Callable[[int], object]:
    weights = [weight for weight in module.parameters() if weight.requires_grad]

    def call(length: int) -> object:
        with torch.enable_grad():
            ids = row[:, :length]
            logits = module_logits(module, ids)[:, :-1]
            loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:].to(logits.device))
            return torch.autograd.grad(loss, weights, allow_unused=True)

    return call


def _timed(
    call: Callable[[int], object], lengths: list[int], patience: float, device: torch.device | None
) -> dict[int, list[float]]:
    """Seconds by length, while a call stays within patience; of twice the tokens, three times as many are expected. At
    `LEAST` lengths in any case, less often where patience ends."""
    seconds: dict[int, list[float]] = {}
    for length in lengths:
        if len(seconds) >= LEAST and 3 * min(list(seconds.values())[-1]) > patience:
            break
        took = []
        for repeat in range(REPEATS + (not seconds)):  # the very first one warms up
            _settle(device)
            begin = time.perf_counter()
            call(length)
            _settle(device)
            took.append(time.perf_counter() - begin)
            if took[-1] * REPEATS > patience and repeat:
                break
        seconds[length] = took[-REPEATS:]
    return seconds


def _settle(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(call: Callable[[int], object], length: int, device: torch.device | None) -> float:
    """The most bytes that a call has allocated at once."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(length)
        return float(torch.cuda.max_memory_allocated(device) - before)
    with Allocations() as seen:
        call(length)
    return float(seen.peak)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many bytes the tensors hold that are made inside; what an operator frees before it returns is not seen.

    peak: the most at any time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        for tensor in tree_leaves((arguments, options)):
            self._note(tensor, new=False)  # a view of what stood there before is nothing new
        output = function(*arguments, **(options or {}))
        for tensor in tree_leaves(output):
            self._note(tensor, new=True)
        return output

    def _note(self, tensor: Any, new: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if new else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
