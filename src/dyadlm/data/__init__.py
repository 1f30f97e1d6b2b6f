"""Text in, training windows and evaluation streams out. Names are imported when they are first used."""

from typing import TYPE_CHECKING

from dyadlm.lazy import attach

if TYPE_CHECKING:
    from dyadlm.data.batches import TrainingWindows
    from dyadlm.data.corpora import cache_folder, fetch_corpus, list_corpora
    from dyadlm.data.dataset import Manifest, PreparedDataset, open_dataset
    from dyadlm.data.encoding import decode_bytes, encode_bytes, tokenizer_identity
    from dyadlm.data.formats import Passage
    from dyadlm.data.preparation import prepare
    from dyadlm.data.resolve import ResolvedData, resolve_data, resolve_text
    from dyadlm.data.sources import Source, open_source
    from dyadlm.data.streams import Document, Segment, TokenStream
    from dyadlm.data.tokenizer import byte_tokenizer, load_tokenizer

__getattr__, __dir__ = attach(
    __name__,
    {
        "Document": "dyadlm.data.streams",
        "Manifest": "dyadlm.data.dataset",
        "Passage": "dyadlm.data.formats",
        "PreparedDataset": "dyadlm.data.dataset",
        "ResolvedData": "dyadlm.data.resolve",
        "Segment": "dyadlm.data.streams",
        "Source": "dyadlm.data.sources",
        "TokenStream": "dyadlm.data.streams",
        "TrainingWindows": "dyadlm.data.batches",
        "byte_tokenizer": "dyadlm.data.tokenizer",
        "cache_folder": "dyadlm.data.corpora",
        "decode_bytes": "dyadlm.data.encoding",
        "encode_bytes": "dyadlm.data.encoding",
        "fetch_corpus": "dyadlm.data.corpora",
        "list_corpora": "dyadlm.data.corpora",
        "load_tokenizer": "dyadlm.data.tokenizer",
        "open_dataset": "dyadlm.data.dataset",
        "open_source": "dyadlm.data.sources",
        "prepare": "dyadlm.data.preparation",
        "resolve_data": "dyadlm.data.resolve",
        "resolve_text": "dyadlm.data.resolve",
        "tokenizer_identity": "dyadlm.data.encoding",
    },
)

__all__ = [
    "Document",
    "Manifest",
    "Passage",
    "PreparedDataset",
    "ResolvedData",
    "Segment",
    "Source",
    "TokenStream",
    "TrainingWindows",
    "byte_tokenizer",
    "cache_folder",
    "decode_bytes",
    "encode_bytes",
    "fetch_corpus",
    "list_corpora",
    "load_tokenizer",
    "open_dataset",
    "open_source",
    "prepare",
    "resolve_data",
    "resolve_text",
    "tokenizer_identity",
]
