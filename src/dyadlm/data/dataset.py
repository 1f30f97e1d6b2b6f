"""A prepared folder: its manifest, and its splits as memory-mapped streams.

FOLDER/manifest.json     what is in the folder (`Manifest`)
FOLDER/tokenizer/        the tokenizer
FOLDER/SPLIT/shard-*.arrow
                         rows of tokens; `datasets.Dataset.from_file` reads a shard, memory-mapped
A row holds
    input_ids    int32   up to ROW_TOKENS consecutive tokens of the split (only its last row is shorter)
    index_start  int64   the global index of its first token; indices are unique over all splits
    segments     list of {start, document, section, kind}: the tags of its tokens. start counts from the row's
                 first token; it is negative for the segment that an earlier row began
    byte_lengths int32   for tokenizers of text only: the bytes of text that each token stands for
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dyadlm.data.sources import MANIFEST_NAME
from dyadlm.data.streams import SegmentTable, TokenStream
from dyadlm.data.tokenizer import load_tokenizer
from dyadlm.errors import UserError
from dyadlm.files import sha256_of

FORMAT = 1
ROW_TOKENS = 4_096
SEGMENT = pa.struct([("start", pa.int64()), ("document", pa.string()), ("section", pa.string()), ("kind", pa.string())])


@dataclass(frozen=True)
class Shard:
    """file: its path in the folder; sha256: of the file, hexadecimal."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """tokens: with one end-of-document token a document; bytes: of text; index_start: of its first token."""

    tokens: int
    bytes: int
    bytes_per_token: float
    documents: int
    index_start: int
    shards: list[Shard]


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    dataset_id: a digest of the tokenizer and of every shard: equal ids, equal data. tokenizer: `identity`
    (`tokenizer_identity`), `name`, `vocabulary_size` and `end_id`. sources: `name` and `licence` of each.
    """

    dataset_id: str
    tokenizer: dict[str, Any]
    sources: list[dict[str, str]]
    splits: dict[str, Split]
    format: int = field(default=FORMAT)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises `UserError` if the folder is no prepared one."""
        path = folder / MANIFEST_NAME
        if not path.exists():
            raise UserError(f"{folder} is no prepared data (it has no {MANIFEST_NAME}); use `dyadlm data prepare`.")
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise UserError(f"{folder} has format {content['format']}, not {FORMAT}; prepare it again.")
            splits = {
                name: Split(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
                for name, split in content.pop("splits").items()
            }
            manifest = cls(splits=splits, **content)
            manifest._require_types(folder)
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is damaged or no manifest of prepared data ({type(error).__name__}: {error}); "
                "prepare the data again, or move the file away if the folder is one of texts."
            ) from error

    def _require_types(self, folder: Path) -> None:
        """Raise ValueError where something is not what this package writes, or a file lies outside the folder."""
        counts = {"vocabulary_size": self.tokenizer["vocabulary_size"], "end_id": self.tokenizer["end_id"]}
        for source in self.sources:
            if not isinstance(source["name"], str) or not isinstance(source["licence"], str):
                raise ValueError(f"a source is {source!r}")
        if not isinstance(self.dataset_id, str) or not isinstance(self.tokenizer["identity"], str):
            raise ValueError("an identity is missing")
        for name, split in self.splits.items():
            counts |= {f"{name}.{key}": getattr(split, key) for key in ("tokens", "bytes", "documents", "index_start")}
            counts |= {f"tokens of {shard.file}": shard.tokens for shard in split.shards}
            if not isinstance(split.shards, list) or not split.shards:
                raise ValueError(f"{name} has no shards")
            for shard in split.shards:
                if not (folder / shard.file).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{shard.file} lies outside the folder")
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"{name} is {count!r}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


class PreparedDataset:
    """A prepared folder: its `path` and `manifest`, its tokenizer, and its splits as streams."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self.path / "tokenizer"))

    def split(self, name: str) -> TokenStream:
        """One split, memory-mapped. Raises `UserError` if there is no such split."""
        if name not in self.manifest.splits:
            raise UserError(f"{self.path} has no split {name!r}; it has {', '.join(self.manifest.splits)}.")
        split = self.manifest.splits[name]
        tables = [datasets.Dataset.from_file(str(self.path / shard.file)).data for shard in split.shards]
        columns = tables[0].column_names
        return TokenStream(
            _values(tables, "input_ids"),
            partial(_read_segments, tables),
            _values(tables, "byte_lengths") if "byte_lengths" in columns else None,
            split.index_start,
            f"{self.title} ({name})",
        )

    @property
    def title(self) -> str:
        return " + ".join(source["name"] for source in self.manifest.sources)


def open_dataset(path: str | Path, verify: bool = True) -> PreparedDataset:
    """Open a prepared folder. `verify` compares every shard with its checksum.

    Raises `UserError` if the folder is no prepared one, or names the first shard that is missing or damaged.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    for split in manifest.splits.values():
        for shard in split.shards:
            file = path / shard.file
            if not file.exists():
                raise UserError(f"{file} is missing; remove {path} and prepare the data again.")
            if verify and sha256_of(file) != shard.sha256:
                raise UserError(
                    f"{file} is damaged (its checksum is not the manifest's); remove {path} and prepare the data again."
                )
            if verify:
                _require_sound(file, shard.tokens, manifest.tokenizer["vocabulary_size"])
    return PreparedDataset(path, manifest)


def _require_sound(file: Path, tokens: int, vocabulary: int) -> None:
    """Raise `UserError` unless a shard is what this package writes: arrays are read past their ends if offsets are
    believed. A checksum that stands beside its file shows damage, not who wrote it."""
    try:
        table = datasets.Dataset.from_file(str(file)).data.table
        table.validate(full=True)
        kinds = {name: table.schema.field(name).type for name in table.column_names}
        wanted = {"input_ids": pa.list_(pa.int32()), "index_start": pa.int64()}
        if "byte_lengths" in kinds:
            wanted["byte_lengths"] = pa.list_(pa.int32())
        wanted["segments"] = pa.list_(SEGMENT)
        if any(kinds.get(name) != kind for name, kind in wanted.items()):
            raise ValueError(f"its columns are {', '.join(f'{name}: {kind}' for name, kind in kinds.items())}")
        if any(table.column(name).null_count for name in wanted):
            raise ValueError("values are missing")
        for chunk in table.column("segments").chunks:
            if any(chunk.flatten().field(field.name).null_count for field in SEGMENT):
                raise ValueError("tags of segments are missing")
        ids = [chunk.flatten().to_numpy() for chunk in table.column("input_ids").chunks]
        found = sum(map(len, ids))
        if found != tokens:
            raise ValueError(f"it holds {found} tokens, not {tokens}")
        if any(len(part) and (part.min() < 0 or part.max() >= vocabulary) for part in ids):
            raise ValueError("it holds tokens that the tokenizer does not have")
        if "byte_lengths" in wanted:
            lengths = [chunk.flatten().to_numpy() for chunk in table.column("byte_lengths").chunks]
            if sum(map(len, lengths)) != tokens or any(len(part) and part.min() < 0 for part in lengths):
                raise ValueError("its byte lengths are not those of its tokens")
    except (pa.ArrowException, ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); remove the folder and prepare the data again.") from error


def _values(tables: Sequence[Any], column: str) -> list[np.ndarray]:
    """Views of the values of a column of lists."""
    return [chunk.flatten().to_numpy(zero_copy_only=True) for table in tables for chunk in table.column(column).chunks]


def _read_segments(tables: Sequence[Any]) -> SegmentTable:
    """Every segment once, where it begins; starts counted from the split's first token."""
    index_start, lists = (
        pa.chunked_array([chunk for table in tables for chunk in table.column(name).chunks]).combine_chunks()
        for name in ("index_start", "segments")
    )
    segments = lists.flatten()
    in_row = segments.field("start").to_numpy()
    lengths = lists.value_lengths().to_numpy()
    rows = np.repeat(index_start.to_numpy() - index_start[0].as_py(), lengths)
    begins = in_row >= 0
    first = np.isin(np.arange(len(in_row)), np.cumsum(lengths) - lengths)  # which an earlier row may have begun
    tags = segments.filter(pa.array(begins))
    starts = (rows + in_row)[begins]
    if not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any() or not (begins | first).all():
        raise UserError("The segments of the prepared data are out of order; it is damaged, prepare it again.")
    return SegmentTable.from_arrow(starts, tags.field("document"), tags.field("section"), tags.field("kind"))
