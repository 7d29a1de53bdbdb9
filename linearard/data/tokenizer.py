"""Tokenizers: loading, fingerprint, and encoding of whole documents with BOS exactly once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from linearard.errors import UserError

# Spaces, newlines, digits, words, accents and bytes: where conversions of sentencepiece models go wrong.
_PROBES = ("Hello world", "  def f(x):\n    return x + 12\n", "naïve café 中文 😀\t\n\n", "a", "x  y   z ")


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """Loads any tokenizer that `AutoTokenizer` knows, and folders that hold only a sentencepiece `tokenizer.model`.

    Args:
        path: A folder, a `tokenizer.model` file, or a name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        A transformers tokenizer.

    Raises:
        UserError: The tokenizer is missing or unreadable.
    """
    from transformers import AutoTokenizer

    local = Path(path).expanduser()
    if local.is_file() and local.name == "tokenizer.model":
        return _from_sentencepiece(local)
    if local.is_dir():
        model = local / "tokenizer.model"
        described = any((local / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
        if model.exists() and not described:
            return _from_sentencepiece(model)
        path = str(local)
    elif path.startswith(("/", "./", "../", "~")):
        raise UserError(f"tokenizer {path}: no such folder; give a model folder or a name on the Hugging Face hub")
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main")
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        reason = _first_line(error)
    except Exception as error:  # tokenizers raises bare Exceptions about a malformed tokenizer.json
        if type(error) is not Exception:
            raise
        reason = _first_line(error)
    raise UserError(
        f"tokenizer {path}: cannot be loaded ({reason}); the folder needs tokenizer.json or tokenizer.model, "
        "a name on the hub needs network access or a filled cache"
    )


def _from_sentencepiece(model: Path) -> Any:
    """A fast tokenizer that encodes exactly as the sentencepiece model does, and adds its BOS.

    transformers 5 reads a bare `tokenizer.model` into a tokenizer that has the right pieces but loses the dummy
    prefix and the BOS, and `LlamaTokenizer` takes every model for BPE. So the pieces come from transformers, the
    normalisation from the model's own specification, and sentencepiece itself is the judge.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, normalizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    remedy = "give a folder with tokenizer.json or with a sentencepiece tokenizer.model"
    spec: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        spec.ParseFromString(model.read_bytes())
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        backend = AutoTokenizer.from_pretrained(str(model.parent)).backend_tokenizer
    except Exception as error:  # protobuf, sentencepiece and tokenizers each raise classes of their own
        raise UserError(f"tokenizer {model}: not a sentencepiece model ({_first_line(error)}); {remedy}") from None

    normalization = spec.normalizer_spec
    steps: list[Any] = []
    if normalization.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalization.precompiled_charsmap))
    if normalization.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalization.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = None

    def special(identifier: int) -> str | None:
        return processor.id_to_piece(identifier) if identifier >= 0 else None

    bos, bos_id = special(processor.bos_id()), processor.bos_id()
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=special(processor.eos_id()),
        unk_token=special(processor.unk_id()),
        pad_token=special(processor.pad_id()),
        clean_up_tokenization_spaces=False,
    )
    for text in _PROBES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != processor.encode(text):
            raise UserError(f"tokenizer {model}: cannot be converted faithfully; give a folder with tokenizer.json")
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what the tokenizer does to text: its serialised pipeline and its special tokens."""
    digest = hashlib.sha256(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    if _is_fast(tokenizer):
        # Truncation and padding are left behind by earlier calls; they say nothing about the tokenizer.
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        pipeline.pop("truncation", None)
        pipeline.pop("padding", None)
        pipeline["split_special_tokens"] = tokenizer.split_special_tokens
    else:
        pipeline = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    digest.update(json.dumps(pipeline, sort_keys=True).encode())
    return digest.hexdigest()


def encode_documents(tokenizer: Any, texts: list[str], *, add_bos: bool, add_eos: bool) -> list[list[int]]:
    """Token ids of whole documents, with BOS and EOS at most once.

    The tokenizer's own special tokens are switched off and put here instead: whether a tokenizer adds BOS by itself
    depends on its class and its files. A tokenizer without a BOS or EOS token adds none.
    """
    if _is_fast(tokenizer):
        # The same pipeline as calling the tokenizer, without the offsets that make the call 2 to 4 times slower.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for ids in encoded:
        if add_eos and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        if add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
    return encoded


def largest_token_id(tokenizer: Any) -> int:
    """The largest id that encoding can give."""
    return max(tokenizer.get_vocab().values())


def _is_fast(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerFast

    return isinstance(tokenizer, PreTrainedTokenizerFast)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
