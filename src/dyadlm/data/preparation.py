"""From sources to a prepared folder (`dyadlm.data.dataset`): splits, whose text is tokenised in order and written."""

import copy
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dyadlm.cluster import Engine, ray_cluster
from dyadlm.data.chat import CONVERSATION, ChatEncoder, template_of
from dyadlm.data.corpora import CORPORA, open_corpus
from dyadlm.data.dataset import Manifest, Split
from dyadlm.data.encoding import TextEncoder
from dyadlm.data.formats import MOST_DECOMPRESSED, Passage
from dyadlm.data.parts import Piece, Tokenise, kept_parts, tokenise_on_ray
from dyadlm.data.progress import TOKENISING, Progress, Reading
from dyadlm.data.sources import (
    MANIFEST_NAME,
    TEST,
    TRAIN,
    VALIDATION,
    Source,
    open_source,
    with_validation,
)
from dyadlm.data.split_writer import SplitWriter
from dyadlm.data.tokenizer import load_tokenizer
from dyadlm.errors import UserError
from dyadlm.files import require_new, staged_folder, write_atomically
from dyadlm.version import __version__

WORK_BYTES = 1 << 20  # text that is tokenised at once


def prepare(
    sources: Sequence[str | Path | Source],
    output: str | Path,
    tokenizer: str | PreTrainedTokenizerBase = "byte",
    validation: str | Path | Source | None = None,
    text_field: str = "text",
    num_proc: int = 1,
    most_decompressed: float = MOST_DECOMPRESSED,
    whole: bool = False,
    engine: Engine = "local",
    address: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Tokenise sources (corpora, files, folders, `-`, hub datasets) into the new folder `output`.

    A source's own validation and test splits are kept; of a source without, the last tenth of bytes becomes
    validation, unless `validation` names a source for it; with `whole`, for data that is scored and not trained on,
    all of it does, and there is no train split. Memory is bounded; `num_proc` workers tokenise at
    once and change nothing in the result. The folder appears when it is complete, or not at all.

    engine: where they tokenise: local, in threads; ray, as tasks of the Ray cluster at `address` (None: one that is
    started here), with the same result. What they have done stands in a folder beside `output` (`dyadlm.data.parts`),
    so that a preparation that was stopped goes on from there. progress: told how far it is.

    Raises `UserError`, for text that the tokenizer cannot read with the place of the first bad byte.
    """
    output = Path(output)
    require_new(output, "the prepared data")
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    encoder = DocumentEncoder(loaded)
    opened = [find_source(source, text_field, most_decompressed) for source in sources]
    held_out = None if validation is None else find_source(validation, text_field, most_decompressed)
    if not opened:
        raise UserError("There is nothing to prepare; name at least one source.")
    read = opened if held_out is None else [*opened, held_out]

    name = tokenizer if isinstance(tokenizer, str) else loaded.name_or_path or "custom"
    if encoder.is_byte:  # wherever it was loaded from
        name = "byte"
    with _tokenising(encoder, output, num_proc, engine, address) as tokenise, staged_folder(output) as staging:
        splits: dict[str, Split] = {}
        index = 0
        splits_of, total = (_one_split(opened), None) if whole else _splits(opened, held_out, progress)
        reading = Reading(progress, TOKENISING, total)
        for split, passages in splits_of.items():
            pieces = reading.made(tokenise(_work(reading.of(passages))))
            written = _write_split(staging, split, pieces, encoder, index)
            if written.tokens:
                splits[split] = written
                index += written.tokens
            elif split != TEST:
                raise UserError(f"There is no text for the {split} split; give a source with more text in it.")
        for source in read:
            source.require_unchanged()
        if encoder.chat is not None:
            loaded = copy.copy(loaded)
            loaded.chat_template = template_of(loaded)
        loaded.save_pretrained(staging / "tokenizer")
        shards = [shard.sha256 for split in splits.values() for shard in split.shards]
        manifest = Manifest(
            dataset_id=hashlib.sha256("\0".join([encoder.identity, *shards]).encode()).hexdigest(),
            tokenizer={
                "identity": encoder.identity,
                "name": name,
                "vocabulary_size": len(loaded),
                "end_id": encoder.end_id,
            },
            sources=[{"name": source.name, "licence": source.licence} for source in read],
            splits=splits,
        )
        write_atomically(staging / MANIFEST_NAME, manifest.to_json())
    return manifest


def find_source(
    source: str | Path | Source, text_field: str = "text", most_decompressed: float = MOST_DECOMPRESSED
) -> Source:
    """The corpus of that name, or what `open_source` makes of it."""
    if isinstance(source, Source):
        return source
    if not str(source).strip():
        raise UserError("A source has an empty name; give a corpus, a file or a folder.")
    if str(source) in CORPORA:
        return open_corpus(str(source))
    return open_source(source, text_field, most_decompressed, known=CORPORA)


def _splits(
    sources: Sequence[Source], held_out: Source | None, progress: Progress | None
) -> tuple[dict[str, Iterator[Passage]], int | None]:
    """The passages of each split, and the bytes of all of them where they were counted."""
    if held_out is None:
        sources = [with_validation(source, progress) for source in sources]
        validation = [source.splits[VALIDATION] for source in sources]
    else:
        validation = [held_out.splits.get(VALIDATION, held_out.splits[TRAIN])]
    readers = {
        TRAIN: [source.splits[TRAIN] for source in sources],
        VALIDATION: validation,
        TEST: [source.splits[TEST] for source in sources if TEST in source.splits],
    }
    counted = [source.bytes for source in sources if source.bytes is not None]
    total = sum(counted) if held_out is None and len(counted) == len(sources) else None
    return {split: (passage for read in all_ for passage in read()) for split, all_ in readers.items()}, total


def _one_split(sources: Sequence[Source]) -> dict[str, Iterator[Passage]]:
    """All text of sources that come without splits."""
    return {VALIDATION: (passage for source in sources for passage in source.splits[TRAIN]())}


# ---- tokenising


class DocumentEncoder(TextEncoder):
    """Also of conversations. chat: their encoder, once one was met."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        self._tokenizer = tokenizer
        self.chat: ChatEncoder | None = None
        self.parts_identity = f"{__version__} {self.identity} {tokenizer.chat_template}"

    def encode_chat(self, passage: Passage) -> Piece:
        self.chat = self.chat or ChatEncoder(self._tokenizer)
        ids, byte_lengths, kinds = self.chat.encode(passage.content, passage.document)
        return Piece(ids, byte_lengths, [(place, replace(passage, kind=kind)) for place, kind in kinds])

    def noticing(self, work: Iterable[list[Passage]]) -> Iterator[list[Passage]]:
        """The work as it comes; that a conversation is among it is kept, though others encode it."""
        for passages in work:
            if self.chat is None and any(passage.kind == CONVERSATION for passage in passages):
                self.chat = ChatEncoder(self._tokenizer)
            yield passages


def _write_split(
    folder: Path, split: str, tokenised: Iterable[list[Piece]], encoder: DocumentEncoder, index: int
) -> Split:
    writer = SplitWriter(folder, split, encoder, index)
    try:
        for pieces in tokenised:
            for piece in pieces:
                writer.add(piece)
        return writer.finish()
    finally:
        writer.close()


@contextmanager
def _tokenising(
    encoder: DocumentEncoder, output: Path, workers: int, engine: Engine, address: str | None
) -> Iterator[Tokenise]:
    """What tokenises lists of passages, several at once, and gives them back in order."""
    if engine == "local":
        yield lambda work: _ordered_map(partial(encode_work, encoder), work, workers)
        return
    with ray_cluster(address, workers) as ray, kept_parts(output) as folder:
        yield lambda work: tokenise_on_ray(ray, encoder, encode_work, folder, encoder.noticing(work))


def _work(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Passages in lists of about WORK_BYTES."""
    work: list[Passage] = []
    size = 0
    for passage in passages:
        work.append(passage)
        size += len(passage.content)
        if size >= WORK_BYTES:
            yield work
            work, size = [], 0
    if work:
        yield work


def encode_work(encoder: DocumentEncoder, work: list[Passage]) -> list[Piece]:
    """Each document of the work, or what there is of it, is tokenised as one text."""
    starts = [at for at, passage in enumerate(work) if passage.starts or at == 0]
    return [
        _encode_document(encoder, work[start:stop])
        for start, stop in zip(starts, [*starts[1:], len(work)], strict=True)
    ]


def _encode_document(encoder: DocumentEncoder, passages: list[Passage]) -> Piece:
    if passages[0].kind == CONVERSATION and passages[0].starts:
        return encoder.encode_chat(passages[0])
    content = b"".join(passage.content for passage in passages)
    try:
        ids, byte_starts = encoder.encode(content)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{passages[0].document} is not UTF-8 text: byte {passages[0].offset + error.start} is "
            f"0x{content[error.start]:02x} ({error.reason}); convert it, or use the byte tokenizer."
        ) from error
    edges = np.cumsum([0, *[len(passage.content) for passage in passages[:-1]]])
    places = np.searchsorted(byte_starts, edges).tolist()
    lengths = np.diff(byte_starts, append=len(content)).astype(np.int32)
    return Piece(ids, lengths, list(zip(places, passages, strict=True)))


def _ordered_map(function: Any, items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map` on threads (the tokenizers leave Python while they work), with few items in flight, in order."""
    if workers <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Any]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
