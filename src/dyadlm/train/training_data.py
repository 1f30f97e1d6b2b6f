"""The text of a run: the sources that its settings name, under one tokenizer, prepared or streamed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from dyadlm.data import TokenStream, resolve_data
from dyadlm.data.progress import Progress
from dyadlm.data.resolve import resolve_streamed
from dyadlm.data.streaming import StreamedText
from dyadlm.data.tokenizer import load_tokenizer
from dyadlm.errors import UserError
from dyadlm.evaluate.streams import target_bytes, targets_of
from dyadlm.train.settings import TrainSettings, reading_options

# Bytes per token is taken from the beginning of each stream.
SAMPLED_TOKENS = 2**20


@dataclass(frozen=True)
class TrainingData:
    """What a run reads. id: changes when the text or its tokens do.

    train: streams with their weights in the mixture. licences: of the texts, for the model card. streamed: what is
    trained on in place of them; they are then samples of it.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Sequence[tuple[TokenStream, float]]
    validation: Sequence[TokenStream]
    id: str
    licences: Sequence[str] = ()
    streamed: StreamedText | None = None


def resolve_training_data(settings: TrainSettings, seed: int, progress: Progress | None, verify: bool) -> TrainingData:
    """The sources under the model's own tokenizer, or for a new model under the one asked for.

    progress: told how far the text is that is prepared here. verify: whether to read prepared text whole, for its
    checksums. Raises `UserError` for sources that cannot be read.
    """
    tokenizer = settings.data.tokenizer
    if settings.model is not None:
        if tokenizer is not None:
            raise UserError("A model to continue from has its own tokenizer; leave data.tokenizer out.")
        tokenizer = settings.model
    if settings.data.stream:
        return _streamed(settings, tokenizer, seed)
    options = reading_options(settings.to_dict())
    resolved = resolve_data(settings.sources, tokenizer, progress=progress, verify=verify, **options)
    return TrainingData(
        tokenizer=resolved.tokenizer,
        train=resolved.train,
        validation=resolved.validation,
        id=resolved.identity,
        licences=sorted({source["licence"] for data in resolved.datasets for source in data.manifest.sources}),
    )


def require_streamable(settings: TrainSettings, arguments: TrainingArguments) -> None:
    """Raise `UserError` for what needs prepared text."""
    asked = {
        "data.document_reset": settings.data.document_reset,
        "data.canaries": settings.data.canaries,
        "train.carry_state": settings.train.carry_state,
        "train.goldfish": settings.train.goldfish,
        "fingerprint.shown": settings.fingerprint.shown,
        "planner.teacher": settings.planner.teacher,
        "dataloader_num_workers": arguments.dataloader_num_workers,
    }
    if names := [name for name, value in asked.items() if value]:
        raise UserError(f"{' and '.join(names)} cannot be used with data.stream; leave it out, or data.stream.")
    if "max_steps" not in settings.arguments:
        raise UserError("How much text there is is not known with data.stream; set max_steps.")


def _streamed(settings: TrainSettings, tokenizer: str | None, seed: int) -> TrainingData:
    """The sources as they come, under the tokenizer of that name; the byte tokenizer for None."""
    loaded = load_tokenizer(tokenizer or "byte")
    reading = reading_options(settings.to_dict())
    streamed, sources = resolve_streamed(settings.sources, loaded, settings.data.validation_tokens, seed, **reading)
    return TrainingData(
        tokenizer=loaded,
        train=[(sample, weight) for sample, (_, weight) in zip(streamed.samples, sources, strict=True)],
        validation=streamed.samples,
        id=streamed.id,
        licences=sorted({source.licence for source, _ in sources}),
        streamed=streamed,
    )


def held_out_of(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[TokenStream] | None:
    """What a run with data.stream, of these flat keys, did not train on: the beginning of each source. Its last tenth,
    the validation split of prepared text, it was trained on. None for other runs."""
    if not settings.get("data.stream"):
        return None
    tokens, reading = settings["data.validation_tokens"], reading_options(settings)
    streamed, _ = resolve_streamed(settings["data"], tokenizer, tokens, settings["seed"], **reading)
    return streamed.samples


def first_words(data: TrainingData) -> str:
    """The first few words of the text; of another text than words some characters, or "Once"."""
    stream = data.train[0][0]
    text = data.tokenizer.decode(stream.tokens(0, min(64, len(stream))).tolist(), skip_special_tokens=True)
    words = "".join(letter if letter.isprintable() else " " for letter in text).split()
    while len(words) > 1 and len(" ".join(words)) > 24:
        words.pop()
    return " ".join(words)[:24].replace('"', "").replace("\\", "") or "Once"


def bytes_per_token(streams: Sequence[tuple[TokenStream, float]]) -> float:
    """Of the mixture, from the beginning of each stream."""
    total = sum(weight for _, weight in streams)
    sizes = [min(len(stream), SAMPLED_TOKENS) for stream, _ in streams]
    return sum(
        weight / total * _bytes_of_target(stream, size) for (stream, weight), size in zip(streams, sizes, strict=True)
    )


def _bytes_of_target(stream: TokenStream, size: int) -> float:
    """Bytes of text for each target among the first `size` tokens."""
    targets = targets_of(stream, 0, size)
    return target_bytes(stream, 0, size) / max(1, size if targets is None else int(targets.sum()))
