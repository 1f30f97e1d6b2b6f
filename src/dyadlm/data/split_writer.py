"""The tokens of a split as rows in checksummed shards (`dyadlm.data.dataset`); every document is ended."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from dyadlm.data.dataset import ROW_TOKENS, Shard, Split
from dyadlm.data.encoding import TextEncoder
from dyadlm.data.parts import Piece
from dyadlm.files import sha256_of

ROWS_PER_WRITE = 64
SHARD_TOKENS = 1 << 26


class SplitWriter:
    """Cuts the tokens of a split into rows and the rows into shards; ends every document."""

    def __init__(self, folder: Path, split: str, encoder: TextEncoder, index_start: int):
        self._folder, self._split, self._encoder = folder, split, encoder
        self._index_start = index_start
        self._features = _features(with_byte_lengths=not encoder.is_byte)
        self._shards: list[Shard] = []
        self._writer: ArrowWriter | None = None
        self._shard_tokens = 0
        self._ids: list[np.ndarray] = []  # not yet written, `_held` tokens in all
        self._byte_lengths: list[np.ndarray] = []
        self._segments: list[tuple[int, str, str, str]] = []  # of these; starts count from the split's first token
        self._held = self._written = 0
        self._bytes = self._documents = 0
        self._name = self._unique_name = ""

    def add(self, piece: Piece) -> None:
        first = piece.passages[0][1]
        if first.starts or self._documents == 0:
            self._end_document()
            self._documents += 1
            repeated = first.document == self._name  # neighbours are told apart by their names
            self._unique_name = f"{first.document}#{self._documents}" if repeated else first.document
            self._name = first.document
        for place, passage in piece.passages:
            tags = (self._unique_name, passage.section, passage.kind)
            start = self._written + self._held + place
            if self._segments and self._segments[-1][0] == start:
                self._segments.pop()  # it got no token of its own
            if not self._segments or self._segments[-1][1:] != tags:
                self._segments.append((start, *tags))
        self._append(piece.ids, piece.byte_lengths)

    def finish(self) -> Split:
        if self._documents:
            self._end_document()
            self._flush(everything=True)
            self.close()
        ratio = self._bytes / max(self._written, 1)
        return Split(self._written, self._bytes, ratio, self._documents, self._index_start, self._shards)

    def _end_document(self) -> None:
        if self._documents:
            self._append(np.array([self._encoder.end_id], np.int32), np.zeros(1, np.int32))

    def _append(self, ids: np.ndarray, byte_lengths: np.ndarray) -> None:
        self._ids.append(ids)
        self._byte_lengths.append(byte_lengths)
        self._held += len(ids)
        self._bytes += int(byte_lengths.sum(dtype=np.int64)) if len(byte_lengths) else 0
        if self._held >= ROW_TOKENS * ROWS_PER_WRITE:
            self._flush()

    def _flush(self, everything: bool = False) -> None:
        """Write what is held in whole rows, at the end with the rest."""
        ids, lengths = np.concatenate(self._ids), np.concatenate(self._byte_lengths)
        size = len(ids) if everything else len(ids) // ROW_TOKENS * ROW_TOKENS
        row_starts = range(0, size, ROW_TOKENS)
        segment_starts = np.array([segment[0] for segment in self._segments]) - self._written
        columns: dict[str, Any] = {
            "input_ids": _rows(ids[:size]),
            "index_start": pa.array([self._index_start + self._written + start for start in row_starts], pa.int64()),
            "segments": [
                self._row_segments(segment_starts, start, min(start + ROW_TOKENS, size)) for start in row_starts
            ],
        }
        if not self._encoder.is_byte:
            columns["byte_lengths"] = _rows(lengths[:size])
        if size:
            self._write(pa.table(columns, schema=self._features.arrow_schema.remove_metadata()), size)
        self._segments = self._segments[max(int(np.searchsorted(segment_starts, size, side="right")) - 1, 0) :]
        self._ids, self._byte_lengths = [ids[size:]], [lengths[size:]]
        self._held -= size
        self._written += size

    def _row_segments(self, segment_starts: np.ndarray, start: int, stop: int) -> list[dict[str, Any]]:
        first = max(int(np.searchsorted(segment_starts, start, side="right")) - 1, 0)
        last = int(np.searchsorted(segment_starts, stop, side="left"))
        return [
            {"start": int(segment_starts[at]) - start, "document": document, "section": section, "kind": kind}
            for at, (_, document, section, kind) in enumerate(self._segments[first:last], first)
        ]

    def _write(self, table: pa.Table, tokens: int) -> None:
        if self._writer is None:
            self._path = self._folder / self._split / f"shard-{len(self._shards):05}.arrow"
            self._path.parent.mkdir(exist_ok=True)
            self._writer = ArrowWriter(path=str(self._path), features=self._features)
        self._writer.write_table(table)
        self._shard_tokens += tokens
        if self._shard_tokens >= SHARD_TOKENS:
            self.close()

    def close(self) -> None:
        """Finish the shard that is being written, if there is one."""
        if self._writer is not None:
            self._writer.finalize()
            self._writer = None
            file = self._path.relative_to(self._folder).as_posix()
            self._shards.append(Shard(file, self._shard_tokens, sha256_of(self._path)))
            self._shard_tokens = 0


def _features(with_byte_lengths: bool) -> datasets.Features:
    text = datasets.Value("string")
    segment = {"start": datasets.Value("int64"), "document": text, "section": text, "kind": text}
    columns = {
        "input_ids": datasets.List(datasets.Value("int32")),
        "index_start": datasets.Value("int64"),
        "segments": datasets.List(segment),
    }
    if with_byte_lengths:
        columns["byte_lengths"] = datasets.List(datasets.Value("int32"))
    return datasets.Features(columns)


def _rows(values: np.ndarray) -> pa.ListArray:
    """Values in rows of ROW_TOKENS, the last one shorter."""
    edges = [*range(0, len(values), ROW_TOKENS), len(values)]
    return pa.ListArray.from_arrays(pa.array(edges, pa.int32()), pa.array(values, pa.int32()))
