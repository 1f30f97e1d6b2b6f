"""Does tokenization bias predictions?"""

import math
from bisect import bisect_left
from typing import ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dyadlm.data.encoding import TextEncoder
from dyadlm.data.streams import TokenStream
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.material import Material
from dyadlm.diagnose.oracles import NEVER, Oracle, material_of
from dyadlm.diagnose.probe import Budget, Control, Expected, NotApplicable, Probe, TooLittle
from dyadlm.diagnose.result import ProbeResult, Reading
from dyadlm.diagnose.statistics import mean_interval, percentiles, redrawn
from dyadlm.diagnose.tokens import spelled_bytes
from dyadlm.evaluate.bootstrap import ratio_interval

LENGTH = 256
REACH = 8  # tokens before a cut from which another token may reach over it


class Bytes(Probe):
    """Bits per byte, and what it costs when a prompt ends inside a token.

    Definition: bits_per_byte = surprise of windows of 256 tokens / bytes they stand for. mid_token_penalty = the
        surprise at the next byte after a prompt cut inside a token of the text − that at the same byte from the same
        bytes, read from the token boundaries before the cut: the sum over all ways in which the last tokens can end, a
        single token reaching over the cut among them (Phan et al.: exact for tokenizers that encode one text one way).
        Without tokens of several bytes there is no such cut, and the penalty is 0. boundary_penalty = the same after
        cuts between tokens; share_inside = the share of bytes that do not begin a token.
        mid_minus_boundary = the surprise at the next byte after cuts inside tokens − that after cuts between
        them, neither set against what it might have been; only where there are tokens of several bytes.
    Units: bits per byte. Direction: lower; a penalty of 0 says that it does not matter where a prompt ends.
    Paper: Phan et al. 2024 (arXiv 2406.16829, 2410.09303).
    Pitfalls: a cut prompt is encoded anew, as a user's would be. Cuts inside a character are not made. Bits per byte of
        windows that start anywhere are higher than those of a rolling evaluation. The penalty has a heavy tail: what a
        tokenizer never produces has almost no probability. A negative boundary_penalty is no merit: that a token ends
        there tells what follows, and only the text's own boundaries are asked.
    """

    id: ClassVar[str] = "bytes"
    failure_mode: ClassVar[str] = "F1"
    question: ClassVar[str] = "Does tokenization bias predictions?"
    meaning: ClassVar[str] = (
        "How many bits the next byte costs more when a prompt ends inside a token; 0 means that it does not "
        "matter where a prompt ends."
    )
    tokens: ClassVar[int] = 60 * 1024

    def run(self, subject: Subject, material: Material, budget: Budget) -> ProbeResult:
        if subject.tokenizer is None:
            raise NotApplicable("its tokens are no text")
        length = min(LENGTH, subject.context or LENGTH)
        if length < 16:
            raise TooLittle(f"a context of {length} tokens is too short")
        count, fewer = self.texts(budget, 3 * length)
        ids, documents = material.windows(count, length, budget.seed)
        table = spelled_bytes(subject.tokenizer, subject.vocabulary, material.text)
        total = 3 * len(ids)
        nats = _in_rows(subject, ids, budget, total)
        sizes = np.array([[len(table[token]) for token in row] for row in ids.tolist()])
        units = documents if len(np.unique(documents)) > 1 else np.arange(len(ids))
        _, place = np.unique(units, return_inverse=True)
        spent = np.bincount(place, weights=nats.sum(1) / math.log(2))
        read = np.bincount(place, weights=sizes[:, 1:].sum(1).astype(float))
        bits, interval = float(spent.sum() / read.sum()), ratio_interval(spent, read)
        inside = float(np.maximum(sizes - 1, 0).sum() / sizes.sum())
        cutter = _Cutter(subject.tokenizer, table)
        readings, left_out = {}, [fewer] if fewer else []
        random = np.random.default_rng(budget.seed)
        penalties: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        cut_at: dict[str, np.ndarray] = {}
        for number, (name, middle) in enumerate((("mid_token_penalty", True), ("boundary_penalty", False))):
            places = [cutter.cut(row, length, middle and inside > 0, random) for row in ids.tolist()]
            kept = [i for i, cut in enumerate(places) if cut is not None]
            if len(kept) < max(4, len(ids) // 4):
                left_out.append(f"{name.replace('_', ' ')}: prompts cut there cannot be encoded again as they were")
                continue
            cut_tokens = torch.tensor([places[i][0] for i in kept])  # type: ignore[index]
            following = [places[i][1] for i in kept]  # type: ignore[index]
            naive, covered = _surprises(subject, cutter, cut_tokens, following, budget, (number + 1) * len(ids), total)
            penalties[name] = (naive, covered)
            cut_at[name] = _spread(naive, kept, len(ids))
            penalty = naive - covered
            readings[name] = Reading(
                float(penalty.mean()), "bits/byte", "lower", mean_interval(penalty, documents[kept]),
                note=f"{naive.mean():.3f} against {covered.mean():.3f}, over {len(kept)} prompts",
            )  # fmt: skip
        budget.progress(total, total)
        if len(cut_at) == 2 and inside > 0:
            drawn = redrawn(np.concatenate(list(cut_at.values()), 1), documents)
            deltas = drawn[:, 0] / np.maximum(drawn[:, 1], 1) - drawn[:, 2] / np.maximum(drawn[:, 3], 1)
            readings["mid_minus_boundary"] = Reading(
                float(deltas[0]), "bits/byte", "lower", percentiles(deltas), "other bytes follow the one than the other"
            )
        readings["bits_per_byte"] = Reading(bits, "bits/byte", "lower", interval)
        readings["share_inside"] = Reading(inside, "share of bytes", "profile", note="do not begin a token")
        if "mid_token_penalty" not in penalties:
            sentence = f"{bits:.3f} bits per byte; what a cut inside a token costs cannot be told."
        elif inside == 0:
            sentence = f"Every byte is a token: no prompt can end inside one. {bits:.3f} bits per byte."
        else:
            naive, covered = penalties["mid_token_penalty"]
            sentence = (
                f"A prompt that ends inside a token makes the next byte {(naive - covered).mean():.2f} bits more "
                f"surprising than the same bytes need be ({naive.mean():.2f} against {covered.mean():.2f})."
            )
        settings = {"length": length, "windows": len(ids), "reach": REACH, "seed": budget.seed}
        return ProbeResult(self.id, readings, {}, sentence, settings, left_out="; ".join(left_out))

    def controls(self) -> list[Control]:
        share = ANEW / (ANEW + 1 - AGAIN)  # of A
        entropy = share * _entropy(AGAIN) + (1 - share) * _entropy(ANEW)
        return [
            Control(
                "A, B and AA",
                True,
                _merged,
                {
                    "bits_per_byte": Expected(entropy, 0.02),
                    "mid_token_penalty": Expected(-NEVER / math.log(2) - 1 + math.log2(AGAIN), 1e-6),
                },
                "after a single A, longest matching writes neither A nor AA: e^-30 each for the oracle; in truth α",
            ),
            Control(
                "one token a byte",
                False,
                _plain,
                {"bits_per_byte": Expected(entropy, 0.02), "mid_token_penalty": Expected(0.0, 0.0)},
                "no token to cut; the entropy of the chain",
            ),
        ]


class _Cutter:
    """Cuts prompts, encodes them again, and knows which tokens reach over a cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, table: list[bytes]):
        self.table = table
        self._encoder = TextEncoder(tokenizer)
        self._sorted = sorted((content, token) for token, content in enumerate(table) if content)
        self._contents = [content for content, _ in self._sorted]
        self._tokens = np.array([token for _, token in self._sorted])
        self._longest = max(map(len, self._contents))

    def cut(
        self, row: list[int], length: int, middle: bool, random: np.random.Generator
    ) -> tuple[list[int], int] | None:
        """The last tokens of a prompt cut from a window, always as many, and the byte that follows; None if there is no
        such cut. middle: inside a token; else between two."""
        places = []
        for number in range(len(row) // 2, len(row)):
            content = self.table[row[number]]
            steps = range(1, len(content)) if middle else range(min(1, len(content)))
            places += [(number, step) for step in steps if content[step] & 0xC0 != 0x80]
        wanted = length // 2 - 4  # after some loss, for cut text may need fewer tokens
        for place in random.permutation(len(places))[:4]:
            number, step = places[place]
            prompt = b"".join(self.table[token] for token in row[:number]) + self.table[row[number]][:step]
            while prompt and prompt[0] & 0xC0 == 0x80:  # a window may begin inside a character
                prompt = prompt[1:]
            try:
                tokens = self._encoder.encode(prompt)[0].tolist()[-wanted:]
            except UnicodeDecodeError:
                continue
            if len(tokens) == wanted and prompt.endswith(b"".join(self.table[token] for token in tokens)):
                return tokens, self.table[row[number]][step]
        return None

    def next_byte(self, tokens: list[int], scores: Tensor, byte: int) -> tuple[float, float]:
        """The surprise in bits at the byte after these tokens: by the last token alone, and over all ways to end.

        scores: log-probabilities (R, V) of the token after each of the last R tokens.
        """
        follows = self._mass(scores[-1], bytes([byte]), whole=True)
        above, below = [follows], [0.0]
        rest, weight = b"", 0.0
        for back in range(1, len(scores)):
            token = tokens[-back]
            rest = self.table[token] + rest
            # Relative to having read the tokens as they stand: what they cost from here on is not spent.
            weight -= float(scores[-1 - back, token])
            if len(rest) >= self._longest:
                break
            above.append(weight + self._mass(scores[-1 - back], rest + bytes([byte]), whole=True))
            below.append(weight + self._mass(scores[-1 - back], rest, whole=False))
        return -follows / math.log(2), (_log_sum(below) - _log_sum(above)) / math.log(2)

    def _mass(self, scores: Tensor, start: bytes, whole: bool) -> float:
        """The log-probability of all tokens that begin with these bytes, those that are nothing else if whole."""
        low = bisect_left(self._contents, start if whole else start + b"\0")
        high = bisect_left(self._contents, _after(start))
        if low >= high:
            return -math.inf
        return float(scores[torch.from_numpy(self._tokens[low:high])].logsumexp(0))


def _log_sum(logarithms: list[float]) -> float:
    return float(torch.tensor(logarithms, dtype=torch.float64).logsumexp(0))


def _after(start: bytes) -> bytes:
    """The first bytes, in order, that do not begin with `start`."""
    trimmed = start.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\xff" * 64


def _spread(values: np.ndarray, kept: list[int], count: int) -> np.ndarray:
    """(count, 2): the values of the windows that are kept, with a one beside each; 0 of the others."""
    spread = np.zeros((count, 2))
    spread[kept] = np.stack([values, np.ones(len(kept))], 1)
    return spread


def _in_rows(subject: Subject, ids: Tensor, budget: Budget, total: int) -> np.ndarray:
    rows = budget.rows(ids.shape[1])
    parts = []
    for start in range(0, len(ids), rows):
        parts.append(subject.nats(ids[start : start + rows]))
        budget.progress(min(start + rows, len(ids)), total)
    nats: np.ndarray = torch.cat(parts).double().numpy()
    return nats


def _surprises(
    subject: Subject, cutter: _Cutter, tokens: Tensor, following: list[int], budget: Budget, done: int, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bits at the byte after each row of tokens (B, T): as the tokens are read, and over all ways to end."""
    rows = budget.rows(tokens.shape[1])
    found = []
    for start in range(0, len(tokens), rows):
        part = tokens[start : start + rows]
        scores = subject.logits(part)[:, -REACH:].double().log_softmax(-1)
        for row, score, byte in zip(part.tolist(), scores, following[start : start + rows], strict=True):
            found.append(cutter.next_byte(row, score, byte))
        budget.progress(done + min(start + rows, len(tokens)), total)
    naive, covered = np.array(found).T
    return naive, covered


# ---- controls: text of A and B, after A another A with 0.6, after B an A with 0.5

AGAIN, ANEW = 0.6, 0.5


def _entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def _chain(documents: int, length: int) -> np.ndarray:
    """(documents, length) bool: where an A stands."""
    random = np.random.default_rng(0)
    drawn = random.random((documents, length))
    stands = np.zeros((documents, length), dtype=bool)
    for place in range(1, length):
        stands[:, place] = drawn[:, place] < np.where(stands[:, place - 1], AGAIN, ANEW)
    return stands


def _by_last(table: Tensor, vocabulary: int, tokenizer: PreTrainedTokenizerBase, name: str) -> Subject:
    """An oracle whose next token depends on the last: table (V, V) of probabilities."""
    scores = table.log().clamp_min(NEVER).float()
    oracle = Oracle(vocabulary, lambda ids: scores[ids], name)
    oracle.tokenizer = tokenizer
    return oracle


def _merged() -> tuple[Subject, Material]:
    model = models.BPE(vocab={"A": 0, "B": 1, "AA": 2}, merges=[("A", "A")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<|end|>")  # type: ignore[no-untyped-call]
    one, two = 1 - AGAIN, AGAIN  # how a run that has begun is written: A alone, or AA first
    table = torch.tensor(
        [
            [0.0, 1.0, 0.0],  # a single A ends a run
            [ANEW * one, 1 - ANEW, ANEW * two],
            [AGAIN * one, 1 - AGAIN, AGAIN * two],  # after AA it may go on
        ]
    )
    encoder = TextEncoder(tokenizer)
    texts = ["".join(np.where(row, "A", "B")) for row in _chain(16, 4096)]
    oracle = _by_last(table, 3, tokenizer, "longest match")
    return oracle, _sized([encoder.encode(text.encode())[0] for text in texts], [1, 1, 2], "runs of A")


def _sized(documents: list[np.ndarray], sizes: list[int], name: str) -> Material:
    streams = [
        TokenStream.from_tokens(document, byte_lengths=np.array(sizes)[document], name=f"{name} {number}")
        for number, document in enumerate(documents)
    ]
    return Material(streams, None, name)


def _plain() -> tuple[Subject, Material]:
    table = torch.zeros(259, 259)
    a, b = ord("A"), ord("B")
    table[:, a], table[:, b] = ANEW, 1 - ANEW
    table[a, a], table[a, b] = AGAIN, 1 - AGAIN
    documents = list(np.where(_chain(16, 4096), a, b))
    return _by_last(table, 259, byte_tokenizer(), "bytes"), material_of(documents, "runs of A")
