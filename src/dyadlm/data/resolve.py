"""What `--data DIR|CORPUS|FILE[:weight] ...` means for training and evaluation."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dyadlm.data.chat import template_of
from dyadlm.data.corpora import cache_folder
from dyadlm.data.dataset import FORMAT, PreparedDataset, open_dataset
from dyadlm.data.encoding import tokenizer_identity
from dyadlm.data.formats import MOST_DECOMPRESSED
from dyadlm.data.preparation import find_source, prepare
from dyadlm.data.progress import Progress
from dyadlm.data.sources import MANIFEST_NAME, TEST, TRAIN, VALIDATION, Source
from dyadlm.data.streaming import StreamedText, stream_text
from dyadlm.data.streams import TokenStream
from dyadlm.data.tokenizer import byte_tokenizer, load_tokenizer
from dyadlm.errors import UserError


@dataclass(frozen=True)
class ResolvedData:
    """The streams of all sources under one tokenizer; their global indices do not overlap.

    datasets are the prepared folders in the order of the arguments, for their manifests.
    """

    tokenizer: PreTrainedTokenizerBase
    train: list[tuple[TokenStream, float]]
    validation: list[TokenStream]
    test: list[TokenStream]
    datasets: list[PreparedDataset]

    @property
    def identity(self) -> str:
        """A digest of the datasets and their weights."""
        weights = [weight for _, weight in self.train]
        mixture = [[data.manifest.dataset_id, weight] for data, weight in zip(self.datasets, weights, strict=True)]
        return hashlib.sha256(json.dumps(mixture).encode()).hexdigest()

    def split(self, name: str) -> list[TokenStream]:
        """The streams of a split. Raises `UserError` if no source has it."""
        splits = {TRAIN: [stream for stream, _ in self.train], VALIDATION: self.validation, TEST: self.test}
        if not splits.get(name):
            there = ", ".join(known for known, streams in splits.items() if streams)
            raise UserError(f"The data has no split {name!r}; it has {there}.")
        return splits[name]


def resolve_data(
    arguments: Sequence[str],
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    text_field: str = "text",
    num_proc: int = 1,
    most_decompressed: float = MOST_DECOMPRESSED,
    progress: Progress | None = None,
    verify: bool = True,
) -> ResolvedData:
    """Open prepared folders; fetch, and prepare into the cache, what is not prepared.

    An argument is a prepared folder, or a source that `prepare` takes, with an optional `:weight` behind it.
    The tokenizer is the one given (a model's own, or a name); else that of the first prepared folder; else the
    byte tokenizer. progress: told how far what is prepared here is. verify: read prepared folders whole, for their
    checksums; without it, another process has. Raises `UserError`, also if a prepared folder has another tokenizer.
    """
    if not arguments:
        raise UserError("There is no data; name a corpus, a file or a folder.")
    parsed = [parse_weight(argument) for argument in arguments]
    find = partial(find_source, text_field=text_field, most_decompressed=most_decompressed)
    opened = [open_dataset(name, verify) if (Path(name) / MANIFEST_NAME).exists() else find(name) for name, _ in parsed]
    if tokenizer is None:
        tokenizer = next((data.tokenizer for data in opened if isinstance(data, PreparedDataset)), byte_tokenizer())
    elif isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    prepared = [
        data
        if isinstance(data, PreparedDataset)
        else _prepare_once(data, tokenizer, text_field, num_proc, progress=progress, verify=verify)
        for data in opened
    ]
    identity = tokenizer_identity(tokenizer)
    for data in prepared:
        if data.manifest.tokenizer["identity"] != identity:
            raise UserError(
                f"{data.path} was prepared with another tokenizer ({data.manifest.tokenizer['name']}) than this "
                "model or the other data; prepare it again with the same one."
            )
        _share_template(tokenizer, data)
    resolved = ResolvedData(tokenizer, [], [], [], prepared)
    offset = 0
    for data, (_, weight) in zip(prepared, parsed, strict=True):
        streams = {name: data.split(name).shifted(offset) for name in data.manifest.splits}
        resolved.train.append((streams[TRAIN], weight))
        resolved.validation.append(streams[VALIDATION])
        if TEST in streams:
            resolved.test.append(streams[TEST])
        offset += sum(split.tokens for split in data.manifest.splits.values())
    return resolved


def resolve_streamed(
    arguments: Sequence[str], tokenizer: PreTrainedTokenizerBase, validation_tokens: int, seed: int, **reading: Any
) -> tuple[StreamedText, list[tuple[Source, float]]]:
    """The sources as a run with data.stream reads them, with their weights; what it holds out are the samples.

    reading: as `find_source` takes it. Raises `UserError`.
    """
    parsed = [parse_weight(argument) for argument in arguments]
    if any(name == "-" or (Path(name) / MANIFEST_NAME).exists() for name, _ in parsed):
        raise UserError("Standard input and prepared data cannot be streamed; leave data.stream out.")
    sources = [(find_source(name, **reading), weight) for name, weight in parsed]
    return stream_text(sources, tokenizer, math.ceil(validation_tokens / len(sources)), seed), sources


def _share_template(tokenizer: PreTrainedTokenizerBase, data: PreparedDataset) -> None:
    """Conversations make the model one that chats: its tokenizer has the template that they were written with.

    Raises `UserError` if it has another one.
    """
    if all(data.split(name).targets(0, 0) is None for name in data.manifest.splits):
        return
    if not tokenizer.chat_template:
        tokenizer.chat_template = data.tokenizer.chat_template
    elif template_of(tokenizer) != template_of(data.tokenizer):
        raise UserError(
            f"The conversations in {data.path} were prepared with another chat template than the model's; prepare them "
            "again with --tokenizer set to the model's folder."
        )


def resolve_text(
    arguments: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    most_decompressed: float = MOST_DECOMPRESSED,
) -> tuple[list[TokenStream], dict[str, str]]:
    """The text that a model is to be scored on: whole, unless its source names a split for validation.

    Returns the streams, and by argument what they hold of it: "whole" or "validation". Raises `UserError`.
    """
    streams, parts = [], {}
    for argument in arguments:
        name, _ = parse_weight(argument)
        prepared = (Path(name) / MANIFEST_NAME).exists()
        source = None if prepared else find_source(name, text_field, most_decompressed)
        if source is None or VALIDATION in source.splits:
            streams += resolve_data([name], tokenizer, text_field, 1, most_decompressed).validation
            parts[argument] = VALIDATION
        else:
            streams.append(_prepare_once(source, tokenizer, text_field, 1, whole=True).split(VALIDATION))
            parts[argument] = "whole"
    return streams, parts


def parse_weight(argument: str) -> tuple[str, float]:
    """Split `NAME:weight`; what exists under its whole name, or ends in no number, has weight 1."""
    name, colon, end = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return argument, 1.0
    try:
        weight = float(end)
    except ValueError:
        return argument, 1.0
    if not 0 < weight < float("inf"):
        raise UserError(f"The weight of {name} is {end}; give a positive number.")
    return name, weight


def _prepare_once(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
    num_proc: int,
    whole: bool = False,
    progress: Progress | None = None,
    verify: bool = True,
) -> PreparedDataset:
    """The source, prepared in the cache under a name that changes with its content and the tokenizer."""
    parts = [str(FORMAT), source.name, source.key, text_field, tokenizer_identity(tokenizer), *["whole"] * whole]
    if tokenizer.chat_template:
        parts.append(template_of(tokenizer))
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    folder = cache_folder() / "prepared" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', source.name)}-{digest[:16]}"
    if not (folder / MANIFEST_NAME).exists():
        try:
            prepare(
                [source], folder, tokenizer, text_field=text_field, num_proc=num_proc, whole=whole, progress=progress
            )
        except (OSError, UserError):
            if not (folder / MANIFEST_NAME).exists():  # else another process was first
                raise
    return open_dataset(folder, verify)
