"""Is identity kept, and is the fingerprint a crutch?

Dimension letters: B windows, T tokens, M tokens sampled of a window, N examples, L layers, D width, C classes, P pairs.
"""

import math
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dyadlm.data.streams import TokenStream
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import NEVER, Shown, independent, material_of
from dyadlm.diagnose.probe import Budget, Control, Expected, Probe, TooLittle
from dyadlm.diagnose.result import Better, Curve, ProbeResult, Reading
from dyadlm.diagnose.states import by_frequency, rows_of, states_at
from dyadlm.diagnose.statistics import mean_interval
from dyadlm.evaluate.linear_probe import fitted_on, ridge, ridge_classes

LENGTH, LEAST = 128, 32
SAMPLED = 16  # tokens of a window
EXAMPLES = 4096
CLASSES = 32  # most frequent tokens
BINS = 8  # of positions
DOCUMENTS = 16
PAIRS = 8  # of a key and its value
LAG = 1


class Identity(Probe):
    """What can still be read of which token stood where, and in which text; and what recalls it.

    Definition: token, position, document = accuracy of a ridge probe on the last layer's output (by depth: the curves):
        which of the 32 most frequent tokens this is, in which eighth of the window of 128 it stands, which of up to 16
        documents the window is of (from the mean of its states). Token and position are fitted on three quarters of the
        documents and scored on the rest, document on the first windows of each and scored on its last ones.
        *_chance = the share, among the tested, of the class that is most frequent among the fitted; *_embedding = the
        same probe on the embedding. recall = accuracy of the most probable token after a key that was shown with its
        value among 8 pairs k v k v ..., random frequent tokens, recall_among = the same among the values shown (chance
        1/8). cosine_same_token, cosine_same_next = how well the cosine of two last states of different windows tells
        pairs of the same token (of the same next token) from others: area under the ROC curve, 0.5 is chance.
        affine_previous = how often the embedding nearest to an affine map of the last state is that of the token
        before. index_train, index_held_out = R_idx = NLL without − with the fingerprint, *_permuted = with another's.
    Units: shares; bits per token for R_idx. Direction: higher; R_idx of training text alone → 0.
    Paper: Adi et al. 2017 (arXiv 1608.04207) for probes of content and order; Arora et al. 2023 (arXiv 2312.04927) for
        associative recall; Hernandez et al. 2023 (arXiv 2308.09124) for relations as affine maps.
    Pitfalls: a linear probe is a lower bound. A model that predicts has reason to forget the token it has just read.
        Cosine of raw states is dominated by their common mean, which is left in on purpose: it is what is used.
        An index that is ignored scores 0 in R_idx as one that is not needed does: compare true with permuted. Recall on
        random pairs asks a model of text for what text does not have.
    """

    id: ClassVar[str] = "identity"
    failure_mode: ClassVar[str] = "F9"
    question: ClassVar[str] = "Is identity kept, and is the fingerprint a crutch?"
    meaning: ClassVar[str] = (
        "How often the current token can be read from the last state by a linear probe; compare it with "
        "chance, near 1 it is fully kept."
    )
    tokens: ClassVar[int] = 60 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        length = min(LENGTH, subject.context or LENGTH)
        if length < LEAST:
            raise TooLittle(f"a context of {length} tokens is shorter than the {LEAST} that are read")
        count, fewer = self.texts(budget, 2 * length, least=16)
        left_out = [fewer] if fewer else []
        readings: dict[str, Reading] = {}
        curves: dict[str, Curve] = {}
        ids, documents = material.windows(count, length, budget.seed)
        if len(ids) < 8:
            raise TooLittle(f"{material.name} fills {len(ids)} windows of {length} tokens, too few to test on too")
        sample = _sampled(subject, ids, documents, budget)
        if sample is None:
            left_out.append("everything read from hidden states, which this model does not show")
        else:
            readings |= _token_and_position(sample, curves)
            said = _documents(sample, curves)
            readings |= said
            if not said:
                left_out.append("documents, for there are not two with four windows each")
            readings |= _cosines(sample)
            readings |= _affine(sample)
        recalled = _recall(subject, ids, max(32, int(budget.tokens * self.tokens) // (8 * PAIRS)), budget)
        readings |= recalled
        if not recalled:
            left_out.append(f"recall, for the text has not {2 * PAIRS} different tokens")
        relied = _reliance(subject, material, max(16, int(budget.tokens * self.tokens) // (8 * length)), length, budget)
        readings |= relied
        if not relied:
            left_out.append("reliance on fingerprints, of which this model takes none")
        elif "index_train" not in relied:
            left_out.append("reliance on fingerprints in training text, of which there is none")
        if not readings:
            raise TooLittle(f"{material.name} has too few different tokens to tell apart")
        sentence = ""
        if "token" in readings:
            sentence = (
                f"In the last layer the current token is read right {100 * readings['token'].value:.0f} % of the time"
            )
            sentence += f" ({100 * readings['token_chance'].value:.0f} % by chance)"
        if recalled:
            said_recall = f"of {PAIRS} pairs shown it recalls {100 * recalled['recall'].value:.0f} %"
            sentence = f"{sentence}, and {said_recall}" if sentence else said_recall.capitalize()
        settings = {"length": length, "texts": len(ids), "classes": CLASSES, "pairs": PAIRS, "lag": LAG}
        return ProbeResult(self.id, readings, curves, sentence + ".", settings, left_out="; ".join(left_out))

    def controls(self) -> list[Control]:
        symbols, counted = 32, 29  # 29: no two windows begin alike
        column = torch.eye(LENGTH)

        def kept(ids: Tensor) -> list[Tensor]:
            tokens = one_hot(ids, symbols).float()
            before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
            where = column[: ids.shape[1]].expand(len(ids), -1, -1)
            return [torch.cat([tokens, 0.1 * before, 0.1 * where], -1)] * 3

        def constant(ids: Tensor) -> list[Tensor]:
            return [torch.ones(*ids.shape, 8)] * 3

        def certain(ids: Tensor, index: Tensor) -> Tensor:
            """Knows the text of every index: the tokens are their own index, modulo the symbols."""
            return (1 - one_hot((index + 1) % counted, counted).float()) * NEVER

        def blind(ids: Tensor, index: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, symbols)

        return [
            Control(
                "three layers that keep all, and a dictionary",
                True,
                lambda: (
                    Shown(symbols, "keeps", hidden=kept, logits=lambda ids: _dictionary(ids, symbols)),
                    _leaning(symbols, 12, 8 * LENGTH),
                ),
                {
                    "token": Expected(1.0, 0.0),
                    "token_embedding": Expected(1.0, 0.0),
                    "position": Expected(1.0, 0.0),
                    "document": Expected(1.0, 0.0),
                    "recall": Expected(1.0, 0.0),
                    "recall_among": Expected(1.0, 0.0),
                    "cosine_same_token": Expected(1.0, 1e-3),
                    "affine_previous": Expected(1.0, 0.0),
                },
                "token, token before and position stand in the state; the value is looked up by its key",
            ),
            Control(
                "states that are always the same, and an index that is ignored",
                False,
                lambda: (
                    Shown(symbols, "constant", hidden=constant, fingerprinted=blind),
                    independent(symbols, 12, 8 * LENGTH),
                ),
                {
                    "token_above_chance": Expected(0.0, 0.0),
                    "position_above_chance": Expected(0.0, 0.0),
                    "document_above_chance": Expected(0.0, 0.0),
                    "recall_among": Expected(1 / PAIRS, 0.05),
                    "cosine_same_token": Expected(0.5, 1e-9),
                    "cosine_same_next": Expected(0.5, 1e-9),
                    "index_held_out": Expected(0.0, 0.0),
                    "index_held_out_permuted": Expected(0.0, 0.0),
                },
                "the majority class at every depth; exactly nothing is lost without the index",
            ),
            Control(
                "an index that tells all",
                True,
                lambda: (
                    Shown(counted, "crutch", fingerprinted=certain),
                    _counted(counted),
                ),
                {
                    "index_train": Expected(math.log2(counted), 1e-4),
                    "index_held_out": Expected(math.log2(counted), 1e-4),
                    "index_train_permuted": Expected((math.log(counted) + NEVER) / math.log(2), 1e-3),
                },
                "log2 V bits without it, none with it; with that of another text, sure of the wrong token",
            ),
        ]


class _Sample(NamedTuple):
    """N = B M tokens of windows, window by window."""

    states: list[Tensor]  # L + 1 × (B, M, D)
    token: Tensor  # (N,) int64: its class, by how frequent it is
    before: Tensor  # (N,) int64: of the token before
    after: Tensor  # (N,) int64: of the token after
    documents: np.ndarray  # (B,) int64


def _sampled(subject: Subject, ids: Tensor, documents: np.ndarray, budget: Budget) -> _Sample | None:
    """Tokens spread over windows, as many of each eighth; None if the model does not show its states."""
    if subject.hidden(ids[:1, :LEAST]) is None:
        return None
    if len(ids) > EXAMPLES // SAMPLED:
        some = np.linspace(0, len(ids) - 1, EXAMPLES // SAMPLED).astype(int)
        ids, documents = ids[some], documents[some]
    length, random = ids.shape[1], np.random.default_rng(budget.seed)
    bins = [np.arange(part[0], part[-1] + 1) for part in np.array_split(np.arange(1, length - 1), BINS)]
    each = SAMPLED // BINS
    drawn = [np.concatenate([random.choice(part, each, replace=False) for part in bins]) for _ in range(len(ids))]
    columns = torch.from_numpy(np.stack(drawn))
    ranked = by_frequency(ids)
    rank = torch.empty(int(ranked.max()) + 1, dtype=torch.int64)
    rank[ranked] = torch.arange(len(ranked))
    token, before, after = (rank[ids.gather(1, columns + shift)].flatten() for shift in (0, -1, 1))
    states = states_at(subject, ids, columns, budget)
    return _Sample(states, token, before, after, documents)


def _read(
    name: str,
    label: str,
    states: list[Tensor],
    labels: Tensor,
    fits: Tensor,
    units: np.ndarray,
    curves: dict[str, Curve],
) -> dict[str, Reading]:
    """The accuracy of probes on states (N, D) by depth. units: (N,) what examples are resampled by."""
    classes = int(labels.max()) + 1
    right = [
        (ridge_classes(state[fits], labels[fits], state[~fits], classes) == labels[~fits]).double().numpy()
        for state in states
    ]
    most = labels[fits].bincount(minlength=classes).argmax()
    chance = (labels[~fits] == most).double().numpy()
    tested = units[~fits.numpy()]

    def reading(values: np.ndarray, better: Better = "higher", note: str = "") -> Reading:
        return Reading(float(values.mean()), "share", better, mean_interval(values, tested), note)

    depths = [float(depth) for depth in range(len(states))]
    bands = [reading(values).interval or (float(values.mean()),) * 2 for values in right]
    curves[f"{label} by depth"] = Curve(
        depths,
        [float(values.mean()) for values in right],
        "layer",
        "accuracy",
        low=[low for low, _ in bands],
        high=[high for _, high in bands],
    )
    return {
        name: reading(right[-1], note="read from the last layer"),
        f"{name}_above_chance": reading(right[-1] - chance),
        f"{name}_embedding": reading(right[0]),
        f"{name}_chance": reading(chance, "profile", "always the most frequent class"),
    }


def _token_and_position(sample: _Sample, curves: dict[str, Curve]) -> dict[str, Reading]:
    fits = fitted_on(sample.documents).repeat_interleave(SAMPLED)
    units = sample.documents.repeat(SAMPLED)
    flat = [state.flatten(0, 1) for state in sample.states]
    frequent = sample.token < CLASSES
    found: dict[str, Reading] = {}
    if len(by_frequency(sample.token[frequent])) > 1:
        some = [state[frequent] for state in flat]
        found |= _read("token", "token", some, sample.token[frequent], fits[frequent], units[frequent.numpy()], curves)
    # The eighths of what can be sampled, as they were drawn: as many tokens of each.
    eighth = torch.arange(BINS).repeat_interleave(SAMPLED // BINS).repeat(len(sample.documents))
    return found | _read("position", "position", flat, eighth, fits, units, curves)


def _documents(sample: _Sample, curves: dict[str, Curve]) -> dict[str, Reading]:
    """Which document a window is of; nothing if there are not two with four windows each."""
    named, counts = np.unique(sample.documents, return_counts=True)
    chosen = named[counts >= 4][:DOCUMENTS]
    if len(chosen) < 2:
        return {}
    inside = np.isin(sample.documents, chosen)
    labels = np.searchsorted(chosen, sample.documents[inside])
    fits = np.zeros(len(labels), dtype=bool)
    for label in range(len(chosen)):
        own = np.flatnonzero(labels == label)
        fits[own[: 3 * len(own) // 4]] = True
    means = [state[torch.from_numpy(inside)].mean(1) for state in sample.states]
    told = torch.from_numpy(labels)
    return _read("document", "document", means, told, torch.from_numpy(fits), sample.documents[inside], curves)


def _cosines(sample: _Sample) -> dict[str, Reading]:
    """Cosine as a classifier of pairs of tokens of different windows: the mean over groups of neighbouring windows."""
    together = 16  # windows of a group: 256 tokens
    state = torch.nn.functional.normalize(sample.states[-1].flatten(0, 1).double(), dim=1)
    windows = torch.arange(len(sample.documents)).repeat_interleave(SAMPLED)
    found: dict[str, Reading] = {}
    for name, labels in (("cosine_same_token", sample.token), ("cosine_same_next", sample.after)):
        areas = []
        for group in torch.split(torch.arange(len(state)), together * SAMPLED):
            own, where = labels[group], windows[group]
            pairs = torch.triu(where[:, None] != where)
            same = (own[:, None] == own)[pairs]
            if bool(same.any()) and not bool(same.all()):
                areas.append(_area((state[group] @ state[group].T)[pairs].numpy(), same.numpy()))
        if areas:
            values = np.array(areas)
            interval = mean_interval(values, np.arange(len(values)))
            found[name] = Reading(float(values.mean()), "area under ROC", "higher", interval, "0.5 is chance")
    return found


def _area(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counted half; scores to six decimals."""
    _, place, counts = np.unique(scores.round(6), return_inverse=True, return_counts=True)
    middle = counts.cumsum() - (counts - 1) / 2  # mean ranks
    hits, misses = positive.sum(), (~positive).sum()
    return float((middle[place][positive].sum() - hits * (hits + 1) / 2) / (hits * misses))


def _affine(sample: _Sample) -> dict[str, Reading]:
    """Whether an affine map of the last state lies nearest to the embedding of the token before."""
    classes = min(CLASSES, int(sample.token.max()) + 1)
    embedded, last = (sample.states[depth].flatten(0, 1) for depth in (0, -1))
    own = one_hot(sample.token.clamp(max=classes), classes + 1)[:, :classes].float()
    seen = own.sum(0)
    known = (sample.before < classes) & (seen[sample.before.clamp(max=classes - 1)] > 0)
    if int(known.sum()) < 2 or classes < 2:
        return {}
    meant = (own.T @ embedded / seen.clamp(min=1)[:, None]).double()  # of each token, its mean embedding
    meant[seen == 0] = math.inf
    fits = fitted_on(sample.documents).repeat_interleave(SAMPLED)
    asked = known & ~fits
    labels = sample.before
    told = ridge(last[known & fits], meant[labels[known & fits]], last[asked])
    right = (torch.cdist(told, meant).nan_to_num(math.inf).argmin(1) == labels[asked]).double().numpy()
    most = labels[known & fits].bincount(minlength=classes).argmax()
    chance = (labels[asked] == most).double().numpy()
    units = sample.documents.repeat(SAMPLED)[asked.numpy()]
    return {
        "affine_previous": Reading(float(right.mean()), "share", "higher", mean_interval(right, units)),
        "affine_previous_chance": Reading(float(chance.mean()), "share", "profile", mean_interval(chance, units)),
    }


def _recall(subject: Subject, ids: Tensor, count: int, budget: Budget) -> dict[str, Reading]:
    """Whether the value of a key is known, of pairs of the most frequent tokens of windows (B, T)."""
    pool = by_frequency(ids)[: 4 * PAIRS].numpy()
    if len(pool) < 2 * PAIRS or (subject.context or LENGTH) < 2 * PAIRS + 1:
        return {}
    random = np.random.default_rng(budget.seed)
    drawn = random.permuted(np.tile(pool, (count, 1)), axis=1)[:, : 2 * PAIRS]  # key, value, key, value ...
    asked = random.integers(PAIRS, size=(count, 1))
    keys = np.take_along_axis(drawn, 2 * asked, 1)
    values = torch.from_numpy(np.take_along_axis(drawn, 2 * asked + 1, 1)[:, 0])
    text = torch.from_numpy(np.concatenate([drawn, keys], 1))
    rows = rows_of(subject, budget, text.shape[1])
    parts = [subject.logits(text[start : start + rows])[:, -1] for start in range(0, count, rows)]
    logits = torch.cat(parts)
    shown = text[:, 1 : 2 * PAIRS : 2]
    among = shown.gather(1, logits.gather(1, shown).argmax(1, keepdim=True)).squeeze(1)
    each = np.arange(count)
    found = {}
    for name, said in (("recall", logits.argmax(1)), ("recall_among", among)):
        right = (said == values).double().numpy()
        note = f"chance is 1/{PAIRS}" if name == "recall_among" else ""
        found[name] = Reading(float(right.mean()), "share", "higher", mean_interval(right, each), note)
    return found


def _reliance(subject: Subject, material: Material, count: int, length: int, budget: Budget) -> dict[str, Reading]:
    """R_idx on the text and on what the model was trained on; nothing of a model without fingerprints."""
    probe = torch.zeros(1, 2, dtype=torch.int64)
    if subject.fingerprinted(probe, probe) is None:
        return {}
    found: dict[str, Reading] = {}
    texts: list[tuple[str, Material]] = [("index_held_out", material)]
    if material.train is not None:
        texts.insert(0, ("index_train", Material(material.train, name=f"training text of {material.name}")))
    for name, text in texts:
        places = text.places(count, length, budget.seed)
        ids = torch.from_numpy(np.stack([s.tokens(a, a + length).astype(np.int64) for s, a, _ in places]))
        index = torch.from_numpy(np.stack([stream.index(first, first + length) for stream, first, _ in places]))
        documents = np.array([number for *_, number in places])
        for suffix, shown in (("", index), ("_permuted", index.roll(1, 0))):
            bits = _relied(subject, ids, shown, budget)
            note = "with the index of another text" if suffix else ""
            found[name + suffix] = Reading(
                float(bits.mean()), "bits/token", "lower", mean_interval(bits, documents), note
            )
    return found


def _relied(subject: Subject, ids: Tensor, index: Tensor, budget: Budget) -> np.ndarray:
    """(B,) bits per token that windows (B, T) cost more without their indices (B, T)."""
    rows, parts = rows_of(subject, budget, ids.shape[1]), []
    for start in range(0, len(ids), rows):
        some = ids[start : start + rows]
        logits = subject.fingerprinted(some[:, :-1], index[start : start + rows, :-1])
        assert logits is not None
        known = torch.nn.functional.cross_entropy(logits.transpose(1, 2), some[:, 1:], reduction="none")
        parts.append((subject.nats(some).double() - known.double()).mean(1))
    bits: np.ndarray = (torch.cat(parts) / math.log(2)).numpy()
    return bits


def _dictionary(ids: Tensor, symbols: int) -> Tensor:
    """Is sure of what followed the last time that the token stood; all alike if it has not."""
    time = ids.shape[1]
    before = (ids[:, :, None] == ids[:, None]) & torch.tril(torch.ones(time, time, dtype=torch.bool), -1)
    last = torch.where(before, torch.arange(time), -1).amax(2)
    following = ids.gather(1, (last + 1).clamp(max=time - 1))
    return (1 - one_hot(following, symbols).float()) * NEVER * (last >= 0)[..., None]


def _leaning(symbols: int, documents: int, length: int, seed: int = 0) -> Material:
    """Documents of independent tokens, half of them the document's own one."""
    random = np.random.default_rng(seed)
    drawn = random.integers(symbols, size=(documents, length))
    own = random.random((documents, length)) < 0.5
    return material_of(list(np.where(own, np.arange(documents)[:, None], drawn)), "documents that lean")


def _counted(symbols: int) -> Material:
    """Training and other text in which each token is its global index, modulo the symbols."""
    tokens = np.arange(64 * LENGTH) % symbols
    train, held_out = TokenStream.from_tokens(tokens), TokenStream.from_tokens(tokens)
    return Material([held_out.shifted(symbols * 10**6)], [train], "counted tokens")
