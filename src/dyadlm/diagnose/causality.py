"""Does what comes after change what came before? By exchanging later tokens, by the gradient, and by what is gained on
streams that nobody can predict. The probe `leak` and the audit share it.

Dimension letters: B texts, T tokens, V vocabulary, S symbols, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dyadlm.diagnose.contract import Subject
from dyadlm.model import DyadConfig

# A causal model's running gain on unpredictable streams passes this with a probability of at most 1e-9.
GAIN_LIMIT = -math.log(1e-9)
# Longer texts are not chosen by themselves: their logits would not fit everywhere.
LONGEST = 2048
SPARSE_FIELDS = (
    "sliding_window",
    "window_size",
    "attention_window",
    "attention_window_size",
    "attention_chunk_size",
    "chunk_size",
    "mamba_chunk_size",
    "local_attn_chunk_length",
    "lsh_attn_chunk_length",
)

Logits = Callable[[Tensor], Tensor]


def telling_length(config: PreTrainedConfig) -> int:
    """The fewest tokens on which a model does all that it does on long texts: more than two of its windows or chunks,
    and as many as BigBird needs, which attends fully (and from then on always) to anything shorter."""
    if isinstance(config, DyadConfig):
        widest: int = 2 ** (len(config.alignments) - 1)
        return 2 * widest + 1
    config = config.get_text_config(decoder=True)
    needed = 1
    for name in SPARSE_FIELDS:
        value = getattr(config, name, None)
        sizes = value if isinstance(value, (list, tuple)) else [value]
        if name == "sliding_window" and getattr(config, "use_sliding_window", True) is False:
            continue
        needed = max([needed, *(2 * size + 1 for size in sizes if isinstance(size, int) and size > 0)])
    if getattr(config, "attention_type", None) == "block_sparse":
        needed = max(needed, (5 + 2 * config.num_random_blocks) * config.block_size + 1)
    return needed


def chosen_length(config: object, context: int | None, least: int) -> tuple[int, str]:
    """How many tokens to read, and what that leaves out, if anything. config: a model's, if it has one."""
    needed = telling_length(config) if isinstance(config, PreTrainedConfig) else 1
    length = max(least, needed + 4)
    longest = min(LONGEST, context or LONGEST)
    if needed > longest:
        return longest, f"its windows and chunks need {needed} tokens; only {longest} were read"
    return min(length, longest), ""


def special_tokens(subject: Subject) -> set[int]:
    """Ids that a model may treat apart: of its tokenizer and of its configuration."""
    special: set[Any] = set(subject.tokenizer.all_special_ids) if subject.tokenizer is not None else set()
    config = getattr(subject.module, "config", None)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        special |= set(value) if isinstance(value, list) else {value}
    return {token for token in special if isinstance(token, int)}


def ordinary_tokens(subject: Subject) -> Tensor:
    """(S,) int64: the ids of tokens that are not special; all, if that leaves fewer than two."""
    special = special_tokens(subject)
    tokens = [token for token in range(subject.vocabulary) if token not in special]
    return torch.tensor(tokens if len(tokens) > 1 else list(range(subject.vocabulary)))


def cuts(length: int, count: int = 12) -> list[int]:
    """At least ten places in a text of `length` tokens, where it is long enough: early, late, even, odd, and around
    powers of two. Tokens at and after a cut are the future."""
    spread = [round(1 + (length - 2) * i / (count - 5)) for i in range(count - 4)]
    around = 2 ** ((length - 1).bit_length() - 1)
    return sorted({cut for cut in (2, 3, around - 1, around, around + 1, *spread) if 1 <= cut < length})


@contextmanager
def fixed_chance(seed: int = 0) -> Iterator[None]:
    """Everything drawn inside is drawn alike each time: a model that hashes at random is no leak for that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Change:
    """The largest change of a logit before a cut, and where. scale: the standard deviation of the logits.

    elsewhere: the largest change in the other rows of the batch, of which nothing was exchanged.
    """

    largest: float
    elsewhere: float
    scale: float
    cut: int
    position: int

    @property
    def relative(self) -> float:
        """The larger of both changes in standard deviations of the logits."""
        return max(self.largest, self.elsewhere) / max(self.scale, 1e-12)

    @property
    def is_number(self) -> bool:
        """Whether all logits were."""
        return math.isfinite(self.largest + self.elsewhere + self.scale)


def perturb(
    logits: Logits,
    symbols: Tensor,
    length: int,
    rows: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Change:
    """Exchange all of the first row's tokens from each cut on, and see what becomes of the logits before it.

    logits: (B, T) → (B, T, V). symbols: (S,) int64, the tokens to write with; every one exchanged becomes another.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(symbols), (rows, length), generator=generator)
    with fixed_chance():
        before = logits(symbols[drawn])
    worst = Change(0.0, 0.0, float(before.float().std()), 0, 0)
    places = cuts(length)
    for number, cut in enumerate(places):
        other = drawn.clone()
        steps = torch.randint(1, len(symbols), (length - cut,), generator=generator)
        other[0, cut:] = (other[0, cut:] + steps) % len(symbols)
        with fixed_chance():
            after = logits(symbols[other])
        changes = (after[0, :cut] - before[0, :cut]).abs().amax(-1)
        elsewhere = float((after[1:] - before[1:]).abs().max()) if rows > 1 else 0.0
        largest = float(changes.max())
        if _worse(largest, worst.largest):
            worst = replace(worst, largest=largest, cut=cut, position=int(changes.argmax()))
        if _worse(elsewhere, worst.elsewhere):
            worst = replace(worst, elsewhere=elsewhere)
        progress(number + 1, len(places))
    return worst


def _worse(figure: float, than: float) -> bool:
    """Larger; what is not a number is worse than all else."""
    return not (figure <= than or math.isnan(than))


def module_logits(module: nn.Module, ids: Tensor) -> Tensor:
    """(B, T) → (B, T, V) with gradients: of a model of transformers, or of any module from ids to logits."""
    if isinstance(module, PreTrainedModel):
        return cast(Tensor, module(input_ids=ids.to(module.device), use_cache=False).logits)
    output: Any = module(ids)
    return cast(Tensor, getattr(output, "logits", output))


def future_gradient(module: nn.Module, ids: Tensor, positions: Sequence[int]) -> float | None:
    """The largest gradient of logits ≤ t with respect to an embedding > t, over that with respect to one ≤ t.

    All logits up to t count at once, under random weights. None if the module has no input embeddings, they are
    not what the logits come from, or there are no gradients in evaluation mode.
    """
    find = getattr(module, "get_input_embeddings", None)
    embedding = find() if find is not None else None
    if not isinstance(embedding, nn.Module):
        return None
    seen: list[Tensor] = []

    def leaf(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # some change it in place, which a leaf does not allow

    worst = 0.0
    handle = embedding.register_forward_hook(leaf)
    try:
        for t in positions:
            seen.clear()
            with fixed_chance(), torch.enable_grad():
                logits = module_logits(module, ids)[:, : t + 1].float()
                weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(t)).to(logits.device)
                # Some embed pads of their own behind the text, or other things beside it.
                read = next((embedded for embedded in seen if embedded.shape[1] >= ids.shape[1]), None)
                if read is None or not logits.requires_grad:
                    return None
                try:
                    (gradient,) = torch.autograd.grad((logits * weights).sum(), read, allow_unused=True)
                except (RuntimeError, AssertionError):  # some have gradients in training alone
                    return None
            if gradient is None:
                return None
            past, future = gradient[:, : t + 1].abs().max(), gradient[:, t + 1 : ids.shape[1]].abs().max()
            ratio = float(future) / max(float(past), 1e-30)
            worst = ratio if _worse(ratio, worst) else worst
    finally:
        handle.remove()
    return worst


def unpredictable(length: int, symbols: int, step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two rows of fresh symbols, (2, T) int64, and where a symbol is fresh, (2, T) bool.

    The first is uniform. In the second every run of d fresh symbols is followed by its copy, d = 1, 2, 8, 32 by the
    step: a model shown only x_{t+2} gains nothing on the first, but much there.
    """
    generator = torch.Generator().manual_seed(seed * 7919 + step)
    distance = (1, 2, 8, 32)[step % 4]
    blocks = torch.randint(symbols, (-(-length // (2 * distance)), 1, distance), generator=generator)
    copied = blocks.expand(-1, 2, -1).reshape(-1)[:length]
    uniform = torch.randint(symbols, (length,), generator=generator)
    fresh = torch.arange(length) // distance % 2 == 0
    return torch.stack([uniform, copied]), torch.stack([torch.ones_like(fresh), fresh])


def stream_gain(
    logits: Logits,
    symbols: Tensor,
    length: int,
    steps: int,
    learn: Callable[[Tensor], None] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """The highest running sum of (ln S − loss), in nats, over fresh symbols, each scored before it is learned from.

    exp of the sum is a martingale of mean at most 1 for a causal model: it passes `GAIN_LIMIT` with probability 1e-9.
    learn: to be called with the loss of each step. Not a number as soon as a loss is none, if nothing was told before.
    """
    total = highest = 0.0
    for step in range(steps):
        drawn, fresh = unpredictable(length, len(symbols), step, seed)
        scores = logits(symbols[drawn])[:, :-1]
        scores = scores[..., symbols.to(scores.device)]
        targets, scored = drawn[:, 1:].to(scores.device), fresh[:, 1:].to(scores.device)
        losses = nn.functional.cross_entropy(scores.float().transpose(1, 2), targets, reduction="none")
        for row in range(2):  # one after the other, each token a step of the martingale
            gains = (math.log(len(symbols)) - losses[row][scored[row]].detach().double()).cumsum(0) + total
            total, highest = float(gains[-1]), max(highest, float(gains.nan_to_num(0.0).max()))
            if math.isnan(total):
                return highest if highest > GAIN_LIMIT else math.nan
        if learn is not None:
            learn(losses[scored].mean())
        progress(step + 1, steps)
    return highest
