"""Tokenizers as transformers knows them: the byte tokenizer of this project, and any fast Hugging Face tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dyadlm.data.encoding import BEGIN_TOKEN, END_TOKEN, PAD_TOKEN, byte_backend
from dyadlm.errors import UserError, first_line
from dyadlm.shipped import place_of_model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer: ids 0..255 are the bytes; 256 `<|pad|>`, 257 `<|begin|>` (bos), 258 `<|end|>` (eos).

    Lossless on every text, and it adds no special tokens. Where a text spells one, it becomes that token, as with
    other tokenizers of Hugging Face; data, scores and streams are encoded by `TextEncoder`, under which text stays
    text. For bytes that are no UTF-8 see `encode_bytes` and `decode_bytes`.
    """
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=byte_backend(),
        pad_token=PAD_TOKEN,
        bos_token=BEGIN_TOKEN,
        eos_token=END_TOKEN,
        padding_side="left",  # what is generated follows the text
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer called "byte", that of a local folder or tokenizer.json, of a model that comes with the package, or
    of a Hugging Face name.

    Raises `UserError` if there is none. Code that comes with a tokenizer is never run.
    """
    if name_or_path == "byte":
        return byte_tokenizer()
    name_or_path = str(place_of_model(name_or_path))
    if Path(name_or_path).is_file():
        return _of_file(Path(name_or_path))
    if name_or_path.endswith(".json"):
        raise UserError(f"There is no file {name_or_path}; give the path of a tokenizer.json, or its folder.")
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # the hub, the network and broken files raise errors of many kinds
        raise UserError(
            f"There is no tokenizer {name_or_path!r}: give `byte`, a folder with a tokenizer, or a Hugging Face "
            f"name that can be reached ({first_line(error)})."
        ) from error


# Names of the token that ends a text, in the order in which they are looked for in a file that does not say.
ENDS = ("<|end|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>", "[SEP]")


def _of_file(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a `tokenizer.json`, which does not say what its special tokens are for."""
    try:
        loaded = PreTrainedTokenizerFast(tokenizer_file=str(path))  # type: ignore[no-untyped-call]
    except Exception as error:  # the library under it raises errors of its own
        raise UserError(f"{path} is no tokenizer.json ({first_line(error)}).") from error
    known = loaded.get_vocab()
    end = next((token for token in ENDS if token in known), None)
    if end is None:
        raise UserError(
            f"{path} has no token that ends a text (such as {', '.join(ENDS[:3])}); give a folder whose "
            "tokenizer_config.json names the eos_token."
        )
    loaded.eos_token = end
    return loaded
