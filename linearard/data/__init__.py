"""Text to training sequences: sources, tokenised cache, packing, and a stream whose position can be saved."""

from linearard.data.corpus import Corpus, Documents, Report, is_held_out, prepare
from linearard.data.packing import PackedDataset, evaluation_windows
from linearard.data.stream import BatchStream
from linearard.data.tokenizer import load_tokenizer, tokenizer_fingerprint

__all__ = [
    "BatchStream",
    "Corpus",
    "Documents",
    "PackedDataset",
    "Report",
    "evaluation_windows",
    "is_held_out",
    "load_tokenizer",
    "prepare",
    "tokenizer_fingerprint",
]
