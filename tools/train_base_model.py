"""Train the small Llama base model, with its own tokenizer, that `make demo` restores.

The text is every machine's own: the Python standard library and, on request, the installed packages. The
library files that the demo evaluates on (`linearard.data.is_held_out`) stay out of it, copies included.

    export PYTHONPATH=$PWD
    python3 tools/train_base_model.py --output assets/base_model --site-packages --time-budget 360

The output folder is a Hugging Face model: bf16 weights, config, tokenizer, and a README.md of measured numbers.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
import transformers
from base_model_text import BOS, EOS, HELD_OUT_FRACTION, PAD, encode, read_corpus, train_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearard.errors import UserError

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 672,
}


def build_config(options: argparse.Namespace) -> LlamaConfig:
    """The Llama architecture that the options describe."""
    return LlamaConfig(
        **{name: getattr(options, name) for name in SHAPE},
        max_position_embeddings=options.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mean next-token loss in nats of `ids` [batch, seq_len + 1].

    Calls the layers one by one: with no mask object in sight, SDPA always takes its causal flash kernel.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:]
    hidden = model.model.embed_tokens(inputs).to(dtype)
    position_ids = torch.arange(inputs.shape[1], device=ids.device)[None]
    rotary = model.model.rotary_emb(hidden, position_ids=position_ids)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=position_ids, position_embeddings=rotary)
    logits = model.lm_head(model.model.norm(hidden))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def learning_rate(progress: float, step: int, options: argparse.Namespace) -> float:
    """Linear warm-up over steps, then a cosine to zero over `progress` (0 to 1) of the budget."""
    warm = min(1.0, (step + 1) / options.warmup_steps)
    return options.lr * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def train(model: LlamaForCausalLM, documents: list[torch.Tensor], options: argparse.Namespace) -> dict[str, float]:
    """Train until the budget of tokens or seconds is spent; a quarter of the samples are documents' starts."""
    device, cuda = model.device, model.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    stream = torch.cat(documents).to(device)
    span = torch.arange(options.seq_len + 1, device=device)
    last_start = len(stream) - len(span)
    if last_start < 0:
        raise UserError(f"the training text has {len(stream)} tokens; --seq-len {options.seq_len} needs more")
    lengths = torch.tensor([len(document) for document in documents])
    starts = (lengths.cumsum(0) - lengths).to(device)
    starts = starts[starts <= last_start]
    generator = torch.Generator(device).manual_seed(options.seed)

    def draw() -> torch.Tensor:
        index = torch.randint(last_start + 1, (options.batch_size,), generator=generator, device=device)
        quarter = options.batch_size // 4
        index[:quarter] = starts[torch.randint(len(starts), (quarter,), generator=generator, device=device)]
        return stream[index[:, None] + span].long()

    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=cuda)
    loss_function = torch.compile(next_token_loss) if cuda and options.compile else next_token_loss

    def forward_backward() -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=cuda):
            loss = loss_function(model, draw(), dtype)
        loss.backward()
        return loss.detach()

    model.train()
    first_loss = float(forward_backward())  # compiles; its gradient is thrown away, its time not counted
    optimizer.zero_grad(set_to_none=True)
    tokens_per_step = options.batch_size * options.seq_len
    total_steps = math.ceil(options.tokens / tokens_per_step) if options.tokens else 0
    step, recent, report_at, start = 0, first_loss, 5.0, time.perf_counter()
    while True:
        seconds = time.perf_counter() - start
        progress = step / total_steps if total_steps else seconds / options.time_budget
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step, options)
        loss = forward_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:  # reading the loss keeps the host from running ahead of the clock
            recent = 0.8 * recent + 0.2 * float(loss)
            if not math.isfinite(recent):
                raise UserError(f"the loss is not finite at step {step}; lower --lr {options.lr}")
            if seconds >= report_at:
                speed, left = step * tokens_per_step / seconds, seconds / max(progress, 1e-9) - seconds
                line = f"step {step:6d}  loss {recent:.4f}  {speed / 1e6:.3f} M tokens/s  {left:4.0f} s left"
                print(line, flush=True)
                report_at = seconds + 5.0
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"steps": step, "tokens": step * tokens_per_step, "seconds": seconds, "first_loss": first_loss,
            "last_loss": recent, "peak_gib": peak}  # fmt: skip


@torch.no_grad()
def evaluate(folder: Path, documents: list[torch.Tensor], device: torch.device, factor: float) -> tuple[float, float]:
    """Loss (nats per token) and top-1 accuracy of the saved weights, RoPE positions divided by `factor`.

    Each document (BOS first) is cut in windows of the native length; all tokens but each window's first are scored.
    """
    config = LlamaConfig.from_pretrained(folder)
    window = config.max_position_embeddings
    if factor != 1.0:
        config.rope_parameters = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)
    model.to(device)  # pyright: ignore[reportArgumentType]
    pieces = [piece for document in documents for piece in document.split(window) if len(piece) > 1]
    loss_sum = correct = count = 0.0
    for start in range(0, len(pieces), 128):
        batch = pieces[start : start + 128]
        rows = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100).long().to(device)
        targets = rows[:, 1:].flatten()
        logits = model(input_ids=rows.clamp(min=0), use_cache=False).logits[:, :-1].flatten(0, 1).float()
        loss_sum += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        correct += float((logits.argmax(-1) == targets).sum())
        count += float((targets >= 0).sum())
    return loss_sum / count, correct / count


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the weights in bf16, the config and the tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")  # pyright: ignore[reportArgumentType]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


CARD = """\
# Base model of the LinearARD demo

A Llama of {parameters:,} parameters ({size_mb:.1f} MB in bf16) with a native window of {seq_len} tokens, trained
from scratch so that RoPE scaling has something to damage and `make demo` something to restore. It continues
Python code and package documentation, and is of no use for anything else. The training program wrote this card,
every number as measured.

| held-out text, windows of {seq_len} tokens | loss (nats per token) | top-1 accuracy |
|---|---|---|
| as trained | {loss:.4f} | {accuracy:.4f} |
| linear RoPE x8, not restored | {scaled_loss:.4f} | {scaled_accuracy:.4f} |

Measured on the saved bf16 weights, reloaded, over {held_out_files} held-out standard-library files
({held_out_tokens:,} tokens). A document's first window begins with `<s>`; a window's first token is not scored.

## Training
- Command: `{command}`
- Seed {seed}; git commit {commit}
- {device}; Python {python}, torch {torch}, transformers {transformers}
- {steps:,} steps, {tokens:,} tokens in {seconds:.0f} s ({speed:.2f} M tokens/s, peak memory {peak_gib:.1f} GiB);
  training loss {first_loss:.3f} at first, {last_loss:.3f} at last

## Text
The Python standard library and the packages installed on the training machine, under their own licences.
- {train_files:,} files ({library_files} of the standard library, each {stdlib_repeat} times in the training
  stream, every other file once), {train_bytes:,} bytes, {train_tokens:,} tokens, each file counted once
- Files left out: {skipped}
- Held out: {held_out_files} standard-library files ({held_out_bytes:,} bytes), chosen by their path
  (`linearard.data.is_held_out`, fraction {fraction}); copies of them, exact or near, are not trained on
- Tokenizer: byte-level BPE, {vocab_size:,} entries, learnt from the training text; digits one by one
"""


def command_line(argv: list[str]) -> str:
    """The command as typed, absolute paths cut to their last part."""
    words = [Path(word).name if os.path.isabs(word) else word for word in argv]
    return shlex.join(["python3", "tools/train_base_model.py", *words])


def git_commit() -> str:
    """The commit of the repository that holds this file, or "not available"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not available"


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write; must be new or empty")
    add("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="standard-library tree")
    add("--site-packages", type=Path, nargs="*", metavar="DIR", help="package trees (default: sys.path's)")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--time-budget", type=float, metavar="SECONDS", help="training time, without compilation")
    budget.add_argument("--tokens", type=int, help="training tokens")
    whole = {"seq_len": 256, "batch_size": 512, "warmup_steps": 200, "stdlib_repeat": 3}
    for name, default in {**SHAPE, **whole, "tokenizer_bytes": 48_000_000}.items():
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    for name, number in {"lr": 3e-3, "weight_decay": 0.1, "clip": 1.0}.items():
        add(f"--{name.replace('_', '-')}", type=float, default=number, help=f"default {number}")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-compile", dest="compile", action="store_false", help="run the model uncompiled")
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        number = isinstance(value, (int, float)) and name not in ("seed", "weight_decay", "compile")
        if number and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a number above zero")
    if not 260 <= options.vocab_size <= 32767:
        raise UserError(f"--vocab-size {options.vocab_size}: must be 260 to 32767")
    heads = options.num_attention_heads
    if options.hidden_size % (2 * heads) or heads % options.num_key_value_heads:
        raise UserError("--num-attention-heads: must divide --hidden-size / 2; --num-key-value-heads must divide it")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UserError(f"--output {options.output}: exists and is not an empty folder")
    if options.site_packages == []:
        ends = ("site-packages", "dist-packages")
        trees = {Path(entry).resolve() for entry in sys.path if entry.endswith(ends)}
        options.site_packages = sorted(tree for tree in trees if tree.is_dir())
    for tree in [options.stdlib, *(options.site_packages or [])]:
        if not tree.is_dir():
            raise UserError(f"{tree}: not a folder")
    return options


def run(argv: list[str]) -> dict[str, float | int | str]:
    """Do all the work; return what the model card reports."""
    options = parse(argv)
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    transformers.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(options.device)
    corpus = read_corpus(options.stdlib, options.site_packages or [])
    train_bytes = sum(len(text.encode()) for text in corpus.train)
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(corpus.skipped.items())) or "none"
    counts = f"{len(corpus.train)} files, {train_bytes / 1e6:.1f} MB, and {len(corpus.held_out)} held out"
    say(f"{counts}; left out: {skipped}")
    tokenizer = train_tokenizer(corpus.train, options.vocab_size, options.tokenizer_bytes, options.seed)
    say(f"tokenizer of {tokenizer.get_vocab_size()} entries")
    documents, held_out = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)
    train_tokens, held_out_tokens = sum(map(len, documents)), sum(map(len, held_out))
    say(f"{train_tokens / 1e6:.2f} M training tokens, {train_bytes / train_tokens:.2f} bytes each")
    documents += documents[: corpus.library_files] * (options.stdlib_repeat - 1)
    model = LlamaForCausalLM(build_config(options)).to(device)  # pyright: ignore[reportArgumentType]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"model of {parameters:,} parameters on {device}")
    measured = train(model, documents, options)
    say(f"trained {measured['steps']:.0f} steps")
    save(model, tokenizer, options.output)
    loss, accuracy = evaluate(options.output, held_out, device, 1.0)
    scaled_loss, scaled_accuracy = evaluate(options.output, held_out, device, 8.0)
    say(f"held-out loss {loss:.4f}, accuracy {accuracy:.4f}; linear RoPE x8 untrained {scaled_loss:.4f}")
    facts: dict[str, float | int | str] = {
        **measured,
        **{"loss": loss, "accuracy": accuracy, "scaled_loss": scaled_loss, "scaled_accuracy": scaled_accuracy},
        **{"train_files": len(corpus.train), "library_files": corpus.library_files, "skipped": skipped},
        **{"train_bytes": train_bytes, "train_tokens": train_tokens, "stdlib_repeat": options.stdlib_repeat},
        **{"held_out_files": len(corpus.held_out), "held_out_tokens": held_out_tokens},
        **{"fraction": HELD_OUT_FRACTION, "vocab_size": tokenizer.get_vocab_size(), "seed": options.seed},
        **{"parameters": parameters, "seq_len": options.seq_len, "command": command_line(argv)},
        **{"commit": git_commit(), "python": platform.python_version(), "torch": torch.__version__},
        "held_out_bytes": sum(len(text.encode()) for text in corpus.held_out),
        "size_mb": (options.output / "model.safetensors").stat().st_size / 1e6,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "speed": measured["tokens"] / measured["seconds"] / 1e6,
        "transformers": transformers.__version__,
    }
    (options.output / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    say(f"wrote {options.output}")
    return facts


def main(argv: list[str] | None = None) -> int:
    """Run the program; a bad argument is one line on stderr and status 2."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"train_base_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
