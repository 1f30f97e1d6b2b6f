"""Training windows from text as it comes, without preparing it: sources of any size, mixed, resumable at any window.

Reading and mixing are those of the library datasets (`IterableDataset`), which also says where it stands.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dyadlm.data.chat import CONVERSATION
from dyadlm.data.formats import Passage
from dyadlm.data.parts import Piece
from dyadlm.data.preparation import WORK_BYTES, DocumentEncoder, encode_work
from dyadlm.data.sources import Source
from dyadlm.data.streams import TokenStream
from dyadlm.errors import UserError

FILE = "streamed_text.safetensors"
KEPT = 4  # places in the text that are remembered: the loader reads ahead of the step that is being saved


def mixed(sources: Sequence[tuple[Source, float]], held_out: Sequence[int], seed: int) -> datasets.IterableDataset:
    """The passages of all sources without end, each source again and again, drawn by their weights.

    Records are documents, or about a megabyte of longer ones: `content`, bytes, and `starts`, whether a document begins
    there. held_out: records at the beginning of each source that are left out. Reading raises `UserError` at the end of
    a source that has changed since it was opened.
    """
    total = sum(weight for _, weight in sources)
    read = [
        datasets.IterableDataset.from_generator(
            _records, gen_kwargs={"parts": [*source.parts, partial(_last_part, source)]}
        )
        .skip(left_out)
        .repeat(None)
        for (source, _), left_out in zip(sources, held_out, strict=True)
    ]
    if len(read) == 1:
        return read[0]
    return datasets.interleave_datasets(read, probabilities=[weight / total for _, weight in sources], seed=seed)


def _records(parts: Sequence[Callable[[], Iterator[Passage]]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for passages in _documents(part()):
            first, content = passages[0], b"".join(passage.content for passage in passages)
            yield {"content": content, "starts": first.starts, "name": _plain(first), "offset": first.offset}


def _last_part(source: Source) -> Iterator[Passage]:
    """Nothing, after all that a source has. Raises `UserError` if it has changed: what was read is not what the run
    says it read, and perhaps nothing is left."""
    source.require_unchanged()
    yield from ()


def _documents(passages: Iterator[Passage]) -> Iterator[list[Passage]]:
    """The passages of each document together, in lists of about WORK_BYTES: no other source is read between them."""
    held: list[Passage] = []
    size = 0
    for passage in passages:
        if held and (passage.starts or size >= WORK_BYTES):
            yield held
            held, size = [], 0
        held.append(passage)
        size += len(passage.content)
    if held:
        yield held


def _plain(passage: Passage) -> str:
    """The name of a document. Raises `UserError` for a conversation."""
    if passage.kind == CONVERSATION:
        raise UserError(f"{passage.document} is a conversation, which is not streamed; leave data.stream out.")
    return passage.document


def _encoded(encoder: DocumentEncoder, record: dict[str, Any]) -> Piece:
    """Raises `UserError` for what the tokenizer cannot read."""
    (piece,) = encode_work(encoder, [Passage(record["name"], record["content"], offset=record["offset"])])
    return piece


@dataclass(frozen=True)
class StreamedText:
    """A mixture to train on, and what stands for its text where a little of it is enough.

    passages: as `mixed` gives them. samples: the beginning of each source, which is not trained on. id: changes with
    the sources, their weights and what is held out.
    """

    passages: datasets.IterableDataset
    encoder: DocumentEncoder
    samples: list[TokenStream]
    id: str


def stream_text(
    sources: Sequence[tuple[Source, float]], tokenizer: PreTrainedTokenizerBase, held_out: int, seed: int
) -> StreamedText:
    """held_out: tokens at the beginning of each source, in whole records (`mixed`).

    Raises:
        UserError: a source has no more text than that, or holds conversations.
    """
    encoder = DocumentEncoder(tokenizer)
    samples, numbers = [], []
    for source, _ in sources:
        texts: list[bytes] = []
        found, records = 0, _records(source.parts)
        for record in records:
            texts.append(record["content"])
            found += len(_encoded(encoder, record).ids)
            if found >= held_out:
                break
        if next(records, None) is None:
            raise UserError(
                f"{source.name} has {found:,} tokens in {len(texts):,} passages (documents, or a megabyte of longer "
                f"ones); validation takes whole ones until it has {held_out:,} tokens, and nothing is left to train "
                "on; give more documents or a smaller data.validation_tokens, or leave data.stream out."
            )
        samples.append(TokenStream.from_text(texts, tokenizer, source.name))
        numbers.append(len(texts))
    mixture = [[source.key, weight, number] for (source, weight), number in zip(sources, numbers, strict=True)]
    told = json.dumps([encoder.identity, seed, mixture])
    return StreamedText(mixed(sources, numbers, seed), encoder, samples, hashlib.sha256(told.encode()).hexdigest())


class StreamedWindows(Dataset[dict[str, torch.Tensor]]):
    """`length` windows of `sequence_length` tokens that follow one another in the text; read in ascending order.

    Items are as those of `TrainingWindows`. The place of every `every`-th window is remembered, so that reading goes on
    from the last few of them, and from what `save` wrote, without tokenising the text before again.
    """

    def __init__(
        self,
        passages: datasets.IterableDataset,
        encoder: DocumentEncoder,
        sequence_length: int,
        length: int,
        every: int,
    ):
        """passages: as `mixed` gives them. encoder: of documents (`dyadlm.data.preparation`)."""
        self._passages, self._encoder = passages, encoder
        self._size, self._length, self._every = sequence_length, length, every
        self._left = np.empty(0, np.int32)
        self._next = 0
        self._places: dict[int, tuple[Any, np.ndarray]] = {0: (passages.state_dict(), self._left)}
        self._reader = iter(passages)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if not 0 <= number < self._length:
            raise IndexError(f"Window {number} of {self._length}.")
        nearest = max(place for place in self._places if place <= number)
        if not nearest <= self._next <= number:
            self._go_to(nearest)
        window = self._read()
        while self._next <= number:
            window = self._read()
        tokens = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": tokens, "labels": tokens.clone()}

    def _go_to(self, place: int) -> None:
        state, self._left = self._places[place]
        self._passages.load_state_dict(state)
        self._reader, self._next = iter(self._passages), place

    def _read(self) -> np.ndarray:
        # A place that is gone back to stays: until the first passage is read, `state_dict` is that of the place before.
        if self._next % self._every == 0 and self._next not in self._places:
            self._places[self._next] = (self._passages.state_dict(), self._left)
            for old in sorted(self._places)[1:-KEPT]:  # the first one stays
                del self._places[old]
        parts, size = [self._left], len(self._left)
        while size < self._size:
            record = next(self._reader, None)
            if record is None:  # sources are read again and again, unless nothing is left of one
                raise UserError("The sources of the run have no more text; put back what was there, and use --resume.")
            tokens = self._tokens(record)
            parts.append(tokens)
            size += len(tokens)
        read = np.concatenate(parts)
        self._left, self._next = read[self._size :], self._next + 1
        return read[: self._size]

    def _tokens(self, record: dict[str, Any]) -> np.ndarray:
        piece = _encoded(self._encoder, record)
        end = [np.array([self._encoder.end_id], np.int32)] * record["starts"]
        return np.concatenate([*end, piece.ids])

    def save(self, folder: Path, number: int) -> None:
        """Write where window `number` begins, one of those that are remembered."""
        while self._next < number:  # others read these windows
            self._read()
        if number not in self._places:
            assert self._next == number, "a place that is no longer remembered cannot be saved"
            self._places[number] = self._passages.state_dict(), self._left
        state, left = self._places[number]
        told = {"window": str(number), "passages": json.dumps(state)}
        save_file({"left": np.ascontiguousarray(left)}, folder / FILE, metadata=told)

    def load(self, folder: Path, number: int) -> None:
        """Remember what `save` wrote of window `number`.

        Raises:
            UserError: it is not there.
            ValueError, KeyError, SafetensorError: it is damaged.
        """
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} does not say where in the streamed text it is; begin anew in another --output.")
        with safe_open(str(folder / FILE), framework="np") as file:
            told, left = file.metadata() or {}, file.get_tensor("left")
        state = json.loads(told["passages"])
        begin, _ = self._places[0]
        fits = left.ndim == 1 and left.dtype == np.int32 and isinstance(state, dict) and state.keys() == begin.keys()
        if not fits or told["window"] != str(number):
            raise ValueError(f"{FILE} is not of window {number} of this text")
        self._places[number] = state, left
