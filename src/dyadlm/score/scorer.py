"""Reading lines with a model and its state, in chunks, and the surprise at each byte of them.

Dimension letters: T tokens, V vocabulary, D width.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dyadlm.data.encoding import AnyTokenizer, TextEncoder, prefix_token
from dyadlm.errors import RunFailed, UserError
from dyadlm.generate.engine_reader import EngineModel
from dyadlm.generate.session import Model, Session
from dyadlm.score.bits import EncodedLine, encoded_line, scored_line
from dyadlm.score.drift import Drift
from dyadlm.score.follow import Place
from dyadlm.score.learning import Learner
from dyadlm.score.lines import Line
from dyadlm.score.units import ScoredLine
from dyadlm.score.usual import Usual
from dyadlm.state_file import read_beside


class Scorer:
    """A session that reads lines and gives the surprise at each byte. The state is carried from line to line.

    The beginning token stands before the first line, and the end-of-document token between two documents, as in
    prepared data. Each line is tokenised by itself; all lines of a call are read at once.

    A memory of the session, if it has one, is mixed in, and reads what the model reads.

    drift: of all lines that were read. learner: None where nothing is learned. lines, size, bits: how many lines (or
    parts of long ones), bytes and bits were read since the scorer was made.
    """

    def __init__(self, session: Session, tokenizer: AnyTokenizer, drift: Drift, learner: Learner | None = None):
        self._session, self._encoder, self.drift, self.learner = session, TextEncoder(tokenizer), drift, learner
        self.lines, self.size, self.bits = 0, 0, 0.0
        self._usual = Usual()
        self._between = False  # whether a document that starts has one before it
        if session.begins:
            self._surprises(np.array([prefix_token(tokenizer)]), [])

    def read(self, lines: Sequence[Line]) -> list[ScoredLine]:
        """Read lines; the surprise at each byte of them. A token that nothing predicted counts as 0 bits.

        Raises:
            UserError: bytes that are no text, under a tokenizer of text.
            RunFailed: the model's logits are not numbers.
        """
        ids: list[np.ndarray] = []
        places: list[tuple[int, EncodedLine]] = []  # of each line: its first token, and the line
        at = 0
        for line in lines:
            if line.starts_document and self._between:
                ids.append(np.array([self._encoder.end_id]))
                at += 1
            self._between = True
            places.append((at, encoded_line(self._encoder, line)))
            ids.append(places[-1][1].ids)
            at += len(ids[-1])
        if not places:
            return []
        nats = self._surprises(np.concatenate(ids), [at + len(encoded.ids) for at, encoded in places])
        scored = []
        for at, encoded in places:
            found = scored_line(encoded, nats[at : at + len(encoded.ids)], self._usual)
            scored.append(found)
            total, size = float(found.bits.sum()), len(found.bits)
            self.drift.add(total, size)
            self.lines, self.size, self.bits = self.lines + 1, self.size + size, self.bits + total
        return scored

    def _surprises(self, ids: np.ndarray, line_ends: Sequence[int]) -> np.ndarray:
        """Nats (T,) of ids (T,). line_ends: the token behind each line; what is learned ends a block there."""
        if self.learner is None:
            return self._session.read(ids)
        logits, hidden = self._session.read_inside(ids)
        edges = [0, *line_ends, *([] if line_ends else [len(ids)])]
        nats = [self.learner.nats(logits[a:b], hidden[a:b], ids[a:b]) for a, b in pairwise(edges)]
        found = self._session.remember(ids, np.concatenate(nats))
        if np.isnan(found[int(np.isnan(logits[0, 0])) :]).any():
            raise RunFailed("The model's logits are not numbers; its weights are damaged or diverged.")
        return found

    def save(self, path: Path, place: Place | None = None) -> None:
        """Write the state of the model, and beside it all that reading on needs, atomically, replacing the file.

        place: up to where a file was followed. Reading on from the file gives what reading on without it gives: to the
        bit where torch reads (with a learner always), else up to rounding. Raises `UserError` if the model has no state
        that can be saved.
        """
        beside: dict[str, Any] = {"drift": np.array(self.drift.numbers()), "between": np.array([self._between])}
        beside["usual"] = self._usual.numbers()
        if self._session.predicts:
            beside["logits"] = self._session.expected
        if self.learner is not None:
            beside["delta"], beside["hidden"] = self.learner.delta, self._session.hidden
        if place is not None:
            beside["place"] = np.array(place, np.int64)
        self._session.save(path, {name: np.ascontiguousarray(tensor) for name, tensor in beside.items()})

    def load(self, path: Path) -> Place | None:
        """Take up what was saved beside the state of a session that was opened with it; where the file was followed to.

        A state that another command wrote has nothing beside it: the first token is then predicted by nothing.
        Raises `UserError` for a file of other learning, or a damaged one.
        """
        beside = read_beside(path)
        if ("delta" in beside) != (self.learner is not None) and "drift" in beside:
            how = "leave out --learn" if self.learner is not None else "add --learn"
            raise UserError(f"{path} was written by other options; {how}, or begin without --state-in.")
        try:
            if self.learner is not None and "delta" in beside:
                self.learner.take(beside["delta"])
            if "logits" in beside:
                self._session.expect(beside["logits"], beside.get("hidden"))
            if "drift" in beside:
                self.drift.continue_from(beside["drift"].tolist())
                self._between = bool(beside["between"][0])
                self._usual.take(beside["usual"])
            return Place(*beside["place"].tolist()) if "place" in beside else None
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"What stands beside the state in {path} is damaged; begin without --state-in.") from error


def identity_of_weights(model: Model) -> str:
    """What tells the weights of any model from those of others."""
    if isinstance(model, EngineModel):
        return model.engine.identity
    from dyadlm.model.empty_state import identity_of

    return identity_of(model)
