"""Text in, training windows and evaluation streams out."""

from dyadlm.data.batches import TrainingWindows
from dyadlm.data.corpora import cache_folder, fetch_corpus, list_corpora
from dyadlm.data.dataset import Manifest, PreparedDataset, open_dataset
from dyadlm.data.prepare import prepare
from dyadlm.data.resolve import ResolvedData, resolve_data
from dyadlm.data.sources import Passage, Source, open_source
from dyadlm.data.streams import Document, Segment, TokenStream
from dyadlm.data.tokenizer import byte_tokenizer, decode_bytes, encode_bytes, load_tokenizer, tokenizer_identity

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
    "tokenizer_identity",
]
