"""A split as one long sequence of tokens, with its documents, its segments and its global indices."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dyadlm.data.chat import is_target
from dyadlm.data.encoding import NUM_BYTES, TextEncoder


class Document(NamedTuple):
    """A document's tokens are start..stop-1 of its stream; the last is its end-of-document token."""

    start: int
    stop: int
    name: str


class Segment(NamedTuple):
    """A run of tokens that begins at `start` and carries the same tags: document, section, kind of text."""

    start: int
    document: str
    section: str
    kind: str


@dataclass(frozen=True)
class SegmentTable:
    """All segments of a stream in order. Neighbouring documents have different names.

    starts: int64 (S,), the first is 0; documents, sections, kinds: int32 (S,), positions in the tables of names. Names
    are strings of Arrow: as objects of Python, those of millions of documents take gigabytes.
    """

    starts: np.ndarray
    documents: np.ndarray
    sections: np.ndarray
    kinds: np.ndarray
    document_names: pa.Array
    section_names: pa.Array
    kind_names: pa.Array

    @classmethod
    def from_arrow(cls, starts: np.ndarray, document: pa.Array, section: pa.Array, kind: pa.Array) -> "SegmentTable":
        """From columns of strings, each (S,)."""
        columns = [column.dictionary_encode() for column in (document, section, kind)]
        codes = [column.indices.to_numpy(zero_copy_only=False) for column in columns]
        return cls(starts, *codes, *[column.dictionary for column in columns])

    @classmethod
    def from_segments(cls, segments: Sequence[Segment]) -> "SegmentTable":
        starts = np.array([segment.start for segment in segments], dtype=np.int64)
        return cls.from_arrow(starts, *[pa.array([segment[i] for segment in segments], pa.string()) for i in (1, 2, 3)])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Segment:
        return Segment(
            int(self.starts[number]),
            self.document_names[int(self.documents[number])].as_py(),
            self.section_names[int(self.sections[number])].as_py(),
            self.kind_names[int(self.kinds[number])].as_py(),
        )


class TokenStream:
    """One long sequence of tokens: in memory, or views of memory-mapped shards (`PreparedDataset.split`).

    index_start is the global index of its first token; name says what it is in messages.
    """

    def __init__(
        self,
        chunks: Sequence[np.ndarray],
        load_segments: Callable[[], SegmentTable],
        byte_lengths: Sequence[np.ndarray] | None = None,
        index_start: int = 0,
        name: str = "tokens",
    ):
        """chunks: the tokens, int32, in arrays to be read one after another.

        byte_lengths: likewise, the bytes of text that each token stands for; none under the byte tokenizer,
        whose ids below 256 stand for one byte each and whose others stand for none.
        """
        self.index_start = index_start
        self.name = name
        self._chunks = list(chunks)
        self._byte_lengths = None if byte_lengths is None else list(byte_lengths)
        self._load_segments = load_segments
        self._edges = np.concatenate([[0], np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)])

    @classmethod
    def from_tokens(
        cls,
        tokens: Sequence[int] | np.ndarray,
        end_id: int | None = None,
        byte_lengths: np.ndarray | None = None,
        name: str = "tokens",
    ) -> "TokenStream":
        """A stream in memory. Each `end_id` ends a document; without it, everything is one document."""
        array = np.asarray(tokens, dtype=np.int32)
        ends: list[int] = [] if end_id is None else (np.flatnonzero(array[:-1] == end_id) + 1).tolist()
        segments = [
            Segment(start, _numbered(name, number), "", "text") for number, start in enumerate([0, *ends], start=1)
        ]
        return cls(
            [array],
            partial(SegmentTable.from_segments, segments),
            None if byte_lengths is None else [np.asarray(byte_lengths, dtype=np.int32)],
            name=name,
        )

    @classmethod
    def from_text(
        cls,
        texts: str | bytes | Iterable[str | bytes],
        tokenizer: PreTrainedTokenizerBase,
        name: str = "text",
    ) -> "TokenStream":
        """A stream in memory; each text is a document and ends with the tokenizer's end-of-document token."""
        encoder = TextEncoder(tokenizer)
        ids: list[np.ndarray] = []
        byte_lengths: list[np.ndarray] = []
        for text in [texts] if isinstance(texts, str | bytes) else texts:
            content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
            tokens, starts = encoder.encode(content)
            ids += [tokens, np.array([encoder.end_id])]
            byte_lengths += [np.diff(starts, append=len(content)), np.array([0])]
        lengths = None if encoder.is_byte else np.concatenate(byte_lengths)
        return cls.from_tokens(np.concatenate(ids), encoder.end_id, lengths, name)

    def __len__(self) -> int:
        return int(self._edges[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids start..stop-1, int32 (stop - start,); read-only where the stream is memory-mapped."""
        return self._slice(self._chunks, start, stop)

    def index(self, start: int, stop: int) -> np.ndarray:
        """Global indices of the tokens start..stop-1, int64 (stop - start,)."""
        return np.arange(self.index_start + start, self.index_start + stop, dtype=np.int64)

    def bytes_of(self, start: int, stop: int) -> int:
        """Bytes of text that the tokens start..stop-1 stand for; special tokens stand for none."""
        return int(self.byte_sizes(start, stop).sum(dtype=np.int64))

    def byte_sizes(self, start: int, stop: int) -> np.ndarray:
        """Bytes of text that each of the tokens start..stop-1 stands for, (stop - start,)."""
        if self._byte_lengths is None:
            return (self.tokens(start, stop) < NUM_BYTES).astype(np.int32)
        return self._slice(self._byte_lengths, start, stop)

    def targets(self, start: int, stop: int) -> np.ndarray | None:
        """Which of the tokens start..stop-1 are to be learned and scored, bool (stop - start,); None: all."""
        if self._learned is None:
            return None
        learned: np.ndarray = self._learned[self.segment_numbers(start, stop)]
        return learned

    @cached_property
    def _learned(self) -> np.ndarray | None:
        """By segment, bool (S,); None where every one is."""
        learned = np.array([is_target(kind) for kind in self.segments.kind_names.to_pylist()])
        return None if learned.all() else learned[self.segments.kinds]

    @cached_property
    def segments(self) -> SegmentTable:
        """All segments; `segments[n]` is the n-th."""
        return self._load_segments()

    def segment_numbers(self, start: int, stop: int) -> np.ndarray:
        """For each token start..stop-1 the number of its segment in `segments`, int64 (stop - start,)."""
        numbers: np.ndarray = np.searchsorted(self.segments.starts, np.arange(start, stop), side="right") - 1
        return numbers

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Where documents begin, int64 (documents,)."""
        starts: np.ndarray = self.segments.starts[np.diff(self.segments.documents, prepend=-1) != 0]
        return starts

    @cached_property
    def documents(self) -> list[Document]:
        """All documents in order; together they cover the stream."""
        starts = self.document_starts.tolist()
        codes = self.segments.documents[np.searchsorted(self.segments.starts, starts)]
        return [
            Document(start, stop, self.segments.document_names[int(code)].as_py())
            for start, stop, code in zip(starts, [*starts[1:], len(self)], codes, strict=True)
        ]

    def shifted(self, offset: int) -> "TokenStream":
        """The same stream with its global indices moved up, to keep those of several datasets apart."""
        return TokenStream(self._chunks, self._load_segments, self._byte_lengths, self.index_start + offset, self.name)

    def _slice(self, arrays: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Tokens {start}..{stop} of {self.name}, which has {len(self)}.")
        first = int(np.searchsorted(self._edges, start, side="right")) - 1
        last = int(np.searchsorted(self._edges, stop, side="left"))
        parts = [
            arrays[number][max(start - self._edges[number], 0) : stop - self._edges[number]]
            for number in range(first, last)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.int32)])


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}#{number}"
