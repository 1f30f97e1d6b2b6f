"""Whether what levels say holds which word and which sentence has just ended: linear probes with a control.

A probe is a ridge regression from a level's feature to one-hot classes (Alain and Bengio 2016, arXiv 1610.01644),
fitted on the first windows of a text and scored on the last. Beside it stands the same probe fitted to shuffled labels
(Hewitt and Liang 2019, arXiv 1909.03368).

Dimension letters: B windows, T tokens, F numbers of a feature, N examples, C classes.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.data.encoding import TextEncoder
from dyadlm.errors import UserError
from dyadlm.evaluate.bootstrap import ratio_interval
from dyadlm.evaluate.inspection import level_names
from dyadlm.evaluate.linear_probe import ridge_classes
from dyadlm.model import DyadForCausalLM
from dyadlm.model.trace import level_features

WORD = re.compile(rb"[A-Za-z0-9'\x80-\xff]+")
SENTENCE = re.compile(rb"[^.!?]*[.!?]")
FITTED = 0.75  # of the windows
WINDOWS_AT_ONCE = 16


@dataclass(frozen=True)
class LevelScore:
    """How often a probe is right on the windows that it was not fitted on.

    interval: 95 %, by windows drawn anew; None for a single one. shuffled: of the probe fitted to shuffled labels.
    """

    block: int
    level: str
    accuracy: float
    interval: tuple[float, float] | None
    shuffled: float


@dataclass(frozen=True)
class IdentityScores:
    """The probes for one kind of identity. classes: the most frequent ones, which alone are told apart.

    chance: the share, among the tested, of the class that is most frequent among the fitted.
    """

    classes: list[str]
    fitted: int
    tested: int
    chance: float
    levels: list[LevelScore]

    def mean(self) -> float:
        """The mean accuracy of all levels of all blocks."""
        return float(np.mean([score.accuracy for score in self.levels]))


@dataclass(frozen=True)
class LevelProbe:
    """word: read at a word's last token. sentence: its first word, read at the stop that ends it."""

    word: IdentityScores
    sentence: IdentityScores

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Span(NamedTuple):
    begin: int  # byte
    end: int  # byte after the last
    label: str


def words_of(content: bytes) -> list[_Span]:
    """Every word, in lower case."""
    return [_Span(*match.span(), match[0].decode(errors="replace").lower()) for match in WORD.finditer(content)]


def sentences_of(content: bytes) -> list[_Span]:
    """Every sentence of two words or more, from its first word to its stop, as that word."""
    found = []
    for match in SENTENCE.finditer(content):
        words = words_of(match[0])
        if len(words) > 1:
            found.append(_Span(match.start() + words[0].begin, match.end(), words[0].label))
    return found


def probe_levels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    content: bytes,
    window: int = 256,
    classes: int = 32,
    seed: int = 0,
) -> LevelProbe:
    """What the levels of a model hold of words and sentences of a text, read in windows from a fresh state each.

    Only words and sentences that begin in the window in which they end are asked for. classes: at most so many.

    Raises:
        UserError: a model without levels, or a text too short to fit and to test on.
    """
    if not isinstance(model, DyadForCausalLM):
        raise UserError(f"A {model.config.model_type} model has no levels to probe; give a dyadlm model.")
    ids, starts = TextEncoder(tokenizer).encode(content)
    count = len(ids) // window
    fitted = int(FITTED * count)
    if fitted < 1 or fitted == count:
        raise UserError(f"The text fills {count} windows of {window} tokens; give a longer text or shorter windows.")
    tokens = torch.from_numpy(ids[: count * window].astype("int64")).view(count, window).to(model.device)
    examples = [
        _examples(spans, np.asarray(starts), count, window, fitted, classes)
        for spans in (words_of(content), sentences_of(content))
    ]
    was_training = model.training
    model.train(False)
    names = level_names(model.config)
    scores: list[list[LevelScore]] = [[], []]
    for block, levels in enumerate(_features(model, tokens, [where for where, _, _ in examples])):
        for level, features in levels.items():
            for found, feature, (where, labels, named) in zip(scores, features, examples, strict=True):
                found.append(_score(feature, labels, where // window, fitted, len(named), seed, block, names[level]))
    model.train(was_training)
    return LevelProbe(*(_scores(*part, window, fitted) for part in zip(examples, scores, strict=True)))


def _examples(
    spans: list[_Span], starts: np.ndarray, count: int, window: int, fitted: int, most: int
) -> tuple[Tensor, Tensor, list[str]]:
    """The token at which each span ends (N,) int64, its class (N,) int64, and the classes."""
    first, last = (
        np.searchsorted(starts, [span.begin for span in spans], side="right") - 1,
        np.searchsorted(starts, [span.end - 1 for span in spans], side="right") - 1,
    )
    whole = (first // window == last // window) & (last < count * window)
    kept = [(int(at), span.label) for at, span, fits in zip(last, spans, whole, strict=True) if fits]
    frequent = Counter(label for at, label in kept if at // window < fitted).most_common(most)
    named = [label for label, _ in frequent]
    number = {label: index for index, label in enumerate(named)}
    kept = [(at, label) for at, label in kept if label in number]
    if len(named) < 2 or not any(at // window >= fitted for at, _ in kept):
        raise UserError("The text has too few words or sentences to fit probes and to test them; give a longer text.")
    return torch.tensor([at for at, _ in kept]), torch.tensor([number[label] for _, label in kept]), named


@torch.no_grad()
def _features(model: DyadForCausalLM, tokens: Tensor, wanted: list[Tensor]) -> list[dict[int, list[Tensor]]]:
    """By block that listens and by level: what the level says at each of the wanted lists of tokens, (N, F) each."""
    gathered: list[dict[int, list[list[Tensor]]]] = []
    for begin in range(0, len(tokens), WINDOWS_AT_ONCE):
        ids = tokens[begin : begin + WINDOWS_AT_ONCE]
        inside = [
            where[(where // ids.shape[1] >= begin) & (where // ids.shape[1] < begin + len(ids))] for where in wanted
        ]
        for block, levels in enumerate(level_features(model, ids)):
            if block == len(gathered):
                gathered.append({level: [[] for _ in wanted] for level in levels})
            for level, feature in levels.items():
                rows = feature.flatten(0, 1).double().cpu()
                for parts, where in zip(gathered[block][level], inside, strict=True):
                    parts.append(rows[where - begin * ids.shape[1]])
    return [{level: [torch.cat(parts) for parts in lists] for level, lists in levels.items()} for levels in gathered]


def _score(
    features: Tensor, labels: Tensor, windows: Tensor, fitted: int, classes: int, seed: int, block: int, level: str
) -> LevelScore:
    """features (N, F) float64, labels and windows (N,) int64: the probe of one level."""
    fits = windows < fitted
    order = torch.randperm(int(fits.sum()), generator=torch.Generator().manual_seed(seed))
    right = [
        (ridge_classes(features[fits], told, features[~fits], classes) == labels[~fits]).double()
        for told in (labels[fits], labels[fits][order])
    ]
    place = windows[~fits] - fitted
    hits, asked = (torch.bincount(place, weights).numpy() for weights in (right[0], torch.ones_like(right[0])))
    accuracy, shuffled = (part.mean().item() for part in right)
    return LevelScore(block, level, accuracy, ratio_interval(hits, asked), shuffled)


def _scores(
    examples: tuple[Tensor, Tensor, list[str]], scores: list[LevelScore], window: int, fitted: int
) -> IdentityScores:
    where, labels, named = examples
    fits = where // window < fitted
    most = torch.bincount(labels[fits]).argmax()
    chance = (labels[~fits] == most).double().mean().item()
    return IdentityScores(named, int(fits.sum()), int((~fits).sum()), chance, scores)
