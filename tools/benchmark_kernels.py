"""Measures the relation_kl kernels: first whether they are right, then how fast they are and what memory they take.

    python tools/benchmark_kernels.py [--lengths 4096,16384] [--segments one,documents:64] [--csv out.csv]

Gate: before anything is timed, rows and gradients of our kernels are compared with the dense float64 reference at a
small awkward length, for each head_dim and kind of segments. They may err twice as much as the dense version in the
same low precision, and equal student and teacher must give exactly 0. Otherwise the status is 1 and nothing is timed.

Time: `rows = relation_kl(...)` on inputs that want a gradient (forward), and that followed by `rows.backward(g)` with a
prepared g (forward+backward), as a user calls them. Each sample lies between two CUDA events; nothing is flushed or
waited for between samples, so launches hide behind earlier work as in a training step. The providers of a shape are
sampled in turns; shown are the median and (10th..90th percentile). On a CPU it is the wall clock.

Floor: the rate of one large matrix product on random data, measured here too. A half product is one n x n product of
which causality needs half: 2 forward and 4 backward (SDPA: 2 and 5), over each segment by itself. `of floor` is the
time they take at that rate over the measured time. Dense versions are credited with this work, though they do more.

/SDPA: time over that of torch's SDPA, all heads, with the kernel that torch picks ("sdpa"; on Hopper it is cuDNN's
FlashAttention, the faster one; "sdpa_flash" is the FlashAttention-2 that torch carries). With segments SDPA runs one
segment, the longest, and the ratio is that of the times per pair of tokens: for scale only.

Under a launcher (deepspeed or torchrun), with more than one process, one sequence is sharded: see benchmark_group.py.

Memory: the peak of a forward and backward beyond inputs, upstream and returned gradients; fp32/row/head is the same in
numbers of 4 bytes per row and head.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_group
import numpy as np
import relation_kl as rk
import torch
from measuring import Parser, checked, conditions, list_of, positive
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention import SDPBackend, sdpa_kernel

from linearard.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OURS = ("relation_kl", "attention_kl", "torch_chunked")
PROVIDERS = (*OURS, "dense", "dense_compiled", "sdpa", "sdpa_flash")
PARTS = ("forward", "forward+backward")
GATE_LENGTH, GATE_BATCH, GATE_HEADS, GATE_KV_HEADS, GATE_FLOOR = 333, 2, 4, 2, 1e-6
DENSE_MATRICES = 6  # T x T float32 tensors that a dense version holds at once, about
COLUMNS = (
    *("provider", "backend", "part", "batch", "heads", "kv_heads", "seq_len", "head_dim", "dtype", "segments"),
    *("status", "tokens_timed", "samples", "median_ms", "p10_ms", "p90_ms", "tflops", "floor_share", "over_sdpa"),
    *("peak_mib", "fp32_per_row_head", "floor_tflops", "deterministic", "gate"),
    *("gpu", "driver", "torch", "triton", "commit"),
)
LAYOUT = "{:>7} {:>4}  {:14} {:14} {:>28} {:>8} {:>6} {:>28} {:>8} {:>8} {:>6} {:>9} {:>13}"
TITLES = ("tokens", "dim", "segments", "provider", "forward ms", "TFLOP/s", "/SDPA")
TITLES += ("forward+backward ms", "TFLOP/s", "of floor", "/SDPA", "peak MiB", "fp32/row/head")


class Segments(NamedTuple):
    """How a sequence is divided: `one`, `windows:LENGTH` or `documents:COUNT`."""

    kind: str
    number: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "one" else f"{self.kind}:{self.number}"

    def lengths(self, seq_len: int) -> list[int]:
        """Lengths of the segments, in order; those of documents are random and the same in every run."""
        if self.kind == "one":
            return [seq_len]
        if self.kind == "windows":
            return [min(self.number, seq_len - start) for start in range(0, seq_len, self.number)]
        generator = torch.Generator().manual_seed(seq_len)
        cuts = torch.randperm(seq_len - 1, generator=generator)[: self.number - 1].sort().values + 1
        return torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([seq_len])).tolist()

    def ids(self, batch: int, seq_len: int, device: torch.device) -> Tensor | None:
        """segment_ids [batch, seq_len]; None for one segment."""
        if self.kind == "one":
            return None
        lengths = torch.tensor(self.lengths(seq_len))
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).int().repeat(batch, 1).to(device)


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    dtype: str
    segments: Segments

    def half_product(self, lengths: Sequence[int]) -> int:
        """Floating-point operations of one causal product over segments of these lengths."""
        return self.batch * self.heads * self.head_dim * sum(n * n for n in lengths)


class Call(NamedTuple):
    """What is timed: a forward of leaves that want a gradient, the upstream gradient, lengths of the segments."""

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    upstream: Tensor
    lengths: list[int]

    def forward_backward(self) -> None:
        self.forward().backward(self.upstream)
        for leaf in self.leaves:
            leaf.grad = None


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by a launcher
        return benchmark_group.main(options, lambda: machine(options))
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch refuses matrix products
        torch.use_deterministic_algorithms(True)
    failures = [] if options.skip_gate else gate(options)
    if failures:
        print("\n".join([*failures, "the gate failed: nothing was timed"]), file=sys.stderr)
        return 1

    rate = matmul_rate(DTYPES[options.dtype], options.device)
    facts = {**machine(options), "deterministic": options.deterministic, "floor_tflops": rate}
    print("{gpu}, driver {driver}, torch {torch}, triton {triton}, commit {commit}".format(**facts))
    print(f"{options.dtype}, batch {options.batch}, {options.heads} heads (attention_kl: {options.kv_heads} key heads)")
    print(f"backend {options.backend}, deterministic {options.deterministic}, correctness gate {facts['gate']}")
    print(f"floor: a large matrix product at {rate:.4g} TFLOP/s\n\n{LAYOUT.format(*TITLES)}", flush=True)
    kinds = list(product(options.head_dims, options.lengths, options.segments))
    with open(options.csv or os.devnull, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, (head_dim, seq_len, segments) in enumerate(kinds, 1):
            print(f"{number}/{len(kinds)}: {seq_len} tokens, head_dim {head_dim}, {segments}", file=sys.stderr)
            heads = options.batch, options.heads, options.kv_heads
            rows = measure(Shape(*heads, seq_len, head_dim, options.dtype, segments), options, rate)
            writer.writerows({**row, **facts} for row in rows)
            file.flush()
            for forward, both in zip(rows[::2], rows[1::2], strict=True):
                print(table_line(forward, both), flush=True)
    return 0


def measure(shape: Shape, options: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """Measures all providers of a shape in turns: values for COLUMNS, two rows a provider in the order of PARTS."""
    device, calls, status = options.device, {}, dict.fromkeys(options.providers, "ok")
    tasks: dict[tuple[str, str], tuple[Callable[[], object], int]] = {}
    peaks: dict[str, int] = {}
    for name in options.providers:
        torch.cuda.empty_cache()
        try:
            call = build(name, shape, options.backend, device)
            if isinstance(call, str):
                status[name] = call
                continue
            functions = {PARTS[0]: call.forward, PARTS[1]: call.forward_backward}
            estimates = {part: warm_up(function, device) for part, function in functions.items()}
            if device.type == "cuda":
                peaks[name] = peak_bytes(call)
        except (torch.OutOfMemoryError, TorchDynamoException) as error:
            status[name] = "does not fit" if isinstance(error, torch.OutOfMemoryError) else "does not compile"
            continue
        calls[name] = call
        most = 50 if device.type == "cuda" else 5
        for part, function in functions.items():
            tasks[name, part] = function, options.repeats or min(max(math.ceil(400 / estimates[part]), 5), most)
    times = dict(zip(tasks, sample_in_turns(list(tasks.values()), device), strict=True))

    rows = []
    for name, part in product(options.providers, PARTS):
        row: dict[str, Any] = {**shape._asdict(), "provider": name, "part": part, "status": status[name]}
        row["kv_heads"] = shape.kv_heads if name == "attention_kl" else shape.heads
        row["backend"] = "torch" if name == "torch_chunked" else options.backend if name in OURS else ""
        if name in calls:
            lengths, milliseconds = calls[name].lengths, times[name, part]
            p10, median, p90 = np.percentile(milliseconds, (10, 50, 90)).tolist()
            half_products = 2 if part == PARTS[0] else 7 if name.startswith("sdpa") else 6
            tflops = half_products * shape.half_product(lengths) / median * 1e-9
            row |= {"tokens_timed": sum(lengths), "samples": len(milliseconds), "floor_share": tflops / rate}
            row |= {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "tflops": tflops}
            if "sdpa" in calls:
                scale = shape.half_product(lengths) / shape.half_product(calls["sdpa"].lengths)
                row["over_sdpa"] = median / float(np.median(times["sdpa", part])) / scale
            if name in peaks and part == PARTS[1]:
                row["peak_mib"] = peaks[name] / 2**20
                row["fp32_per_row_head"] = peaks[name] / (4 * shape.batch * shape.heads * sum(lengths))
        rows.append(row)
    return rows


def build(name: str, shape: Shape, backend: str, device: torch.device) -> Call | str:
    """Function and inputs of a provider, or why it cannot run the shape, as the table says it."""
    torch.manual_seed(0)
    dtype, lengths = DTYPES[shape.dtype], shape.segments.lengths(shape.seq_len)

    def random(heads: int, tokens: int = shape.seq_len) -> Tensor:
        return torch.randn(shape.batch, heads, tokens, shape.head_dim, dtype=dtype, device=device)

    if name.startswith("sdpa"):
        if name == "sdpa_flash" and dtype == torch.float32 and device.type == "cuda":
            return "FlashAttention has no fp32"
        choice = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION) if name == "sdpa_flash" else nullcontext
        q, k, v = (random(shape.heads, max(lengths)).requires_grad_() for _ in range(3))

        def attention() -> Tensor:
            with choice():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return Call(attention, (q, k, v), torch.randn_like(q), [max(lengths)])

    if name not in OURS:
        on_cpu = device.type == "cpu"
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if on_cpu else torch.cuda.mem_get_info()[0]
        if shape.batch * shape.heads * shape.seq_len**2 * 4 * DENSE_MATRICES > 0.6 * free:
            return "does not fit"
    function = kernel(name, backend) if name in OURS else rk.reference.relation_kl
    if name == "dense_compiled":
        torch.compiler.reset()  # or a later shape meets the limit of recompilations
        function = torch.compile(function, dynamic=False, fullgraph=True)
    students = [random(heads) for heads in (shape.heads, shape.kv_heads)[: 2 if name == "attention_kl" else 1]]
    teachers = [student + 0.3 * torch.randn_like(student) for student in students]
    leaves = [student.requires_grad_() for student in students]
    segment_ids = shape.segments.ids(shape.batch, shape.seq_len, device)
    upstream = torch.randn(shape.batch, shape.heads, shape.seq_len, device=device)
    upstream = upstream if name in OURS else upstream.to(dtype)
    return Call(partial(function, *leaves, *teachers, segment_ids=segment_ids), leaves, upstream, lengths)


def kernel(name: str, backend: str) -> Callable[..., Tensor]:
    """The public function behind a provider of ours; it takes students, teachers and segment_ids."""
    if name == "torch_chunked":
        return partial(rk.relation_kl, backend="torch")
    return partial(rk.attention_kl if name == "attention_kl" else rk.relation_kl, backend=backend)


def gate(options: argparse.Namespace) -> list[str]:
    """Compares our providers with float64; prints the figures on stderr and returns what is wrong, a line each."""
    failures = []
    most = {"one": 0, "windows": 100, "documents": 7}
    kinds = dict.fromkeys(each._replace(number=min(each.number, most[each.kind])) for each in options.segments)
    for head_dim, segments, name in product(options.head_dims, kinds, OURS):
        if name in options.providers:
            title = f"gate: {name}, head_dim {head_dim}, {options.dtype}, {segments}, {GATE_LENGTH} tokens"
            figures, wrong = compare(name, head_dim, segments, options)
            print(f"{title}: {', '.join(figures)}", file=sys.stderr, flush=True)
            failures += [f"{title}: {each}" for each in wrong]
    return failures


def compare(name: str, head_dim: int, segments: Segments, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Relative errors (norm of the difference over the norm) with their budgets, in words, and what is wrong."""
    dtype, device, is_attention = DTYPES[options.dtype], options.device, name == "attention_kl"
    torch.manual_seed(head_dim)
    # A diagonal logit of about log T: neither the diagonal nor all the rest makes up a row.
    size = (6 * head_dim**-0.5) ** 0.5
    heads = (GATE_HEADS, GATE_KV_HEADS) if is_attention else (GATE_HEADS,)
    students = [(torch.randn(GATE_BATCH, h, GATE_LENGTH, head_dim) * size).to(device, dtype) for h in heads]
    teachers = [student + 0.3 * size * torch.randn_like(student) for student in students]
    row_grad = torch.randn(GATE_BATCH, GATE_HEADS, GATE_LENGTH, device=device)
    segment_ids = segments.ids(GATE_BATCH, GATE_LENGTH, device)

    def evaluate(function: Callable[..., Tensor], targets: Sequence[Tensor], precision: torch.dtype) -> list[Tensor]:
        leaves = [student.to(precision).detach().requires_grad_() for student in students]
        rows = function(*leaves, *(target.to(precision) for target in targets), segment_ids=segment_ids)
        return [rows.detach(), *torch.autograd.grad(rows, leaves, row_grad.to(rows.dtype))]

    ours = kernel(name, options.backend)
    dense = rk.reference.attention_kl if is_attention else rk.reference.relation_kl
    columns = (
        evaluate(ours, teachers, dtype),
        evaluate(dense, teachers, dtype),
        evaluate(dense, teachers, torch.float64),
    )
    equal = evaluate(ours, [student.clone() for student in students], dtype)
    figures, wrong = [], []
    for what, got, plain, truth, zero in zip(("rows", "grad_q", "grad_k"), *columns, equal, strict=False):
        error, plain_error = (float((x.double() - truth).norm() / truth.norm()) for x in (got, plain))
        budget = 2 * plain_error + GATE_FLOOR
        figures.append(f"{what} {error:.1e} (at most {budget:.1e})")
        if not error <= budget:  # NaN too
            wrong.append(f"{what}: relative error {error:.2e}, at most {budget:.2e} allowed")
        if not bool((zero == 0).all()):
            wrong.append(f"{what}: {float(zero.abs().max()):.2e} for equal student and teacher instead of exactly 0")
    return figures, wrong


def sample_in_turns(tasks: Sequence[tuple[Callable[[], object], int]], device: torch.device) -> list[list[float]]:
    """Milliseconds of each function's samples, as many as asked; fewer are spread evenly over the rounds."""
    readers: list[list[Callable[[], float]]] = [[] for _ in tasks]
    rounds = max((samples for _, samples in tasks), default=0)
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    for i in range(rounds):
        for (function, samples), mine in zip(tasks, readers, strict=True):
            if i * samples // rounds != (i + 1) * samples // rounds:
                mine.append(timed(function, device))
    synchronize()
    return [[reader() for reader in mine] for mine in readers]


def timed(function: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Runs function; returns a reader of its milliseconds, to be asked after the device is done."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        return lambda: start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    milliseconds = (time.perf_counter() - begin) * 1e3
    return lambda: milliseconds


def warm_up(function: Callable[[], object], device: torch.device) -> float:
    """One call, which may compile; then 25 ms of calls, and 3 unless they take a second. Returns the fastest, in ms."""
    function()
    taken: list[float] = []
    while sum(taken) < 25 or (len(taken) < 3 and sum(taken) < 1000):
        taken += sample_in_turns([(function, 1)], device)[0]
    return min(taken)


def peak_bytes(call: Call) -> int:
    """Largest CUDA memory of a forward and backward beyond inputs and returned gradients."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.forward_backward()
    return torch.cuda.max_memory_allocated() - before - sum(leaf.nbytes for leaf in call.leaves)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a large matrix product on random data, the median of 10."""
    size = 8192 if device.type == "cuda" else 256
    multiply = partial(torch.mm, *torch.randn(2, size, size, device=device).to(dtype))
    warm_up(multiply, device)
    return 2 * size**3 / float(np.median(sample_in_turns([(multiply, 10)], device)[0])) * 1e-9


def machine(options: argparse.Namespace) -> dict[str, str]:
    """The conditions that go into every line of the CSV."""
    gate = "skipped" if options.skip_gate else "passed"
    return {**conditions(options.device, options.commit), "gate": gate}


def table_line(forward: dict[str, Any], both: dict[str, Any]) -> str:
    """One aligned line from a provider's two rows."""
    cells = [forward["seq_len"], forward["head_dim"], str(forward["segments"]), forward["provider"]]
    if forward["status"] != "ok":
        return LAYOUT.format(*cells, forward["status"], *[""] * (len(TITLES) - 5)).rstrip()

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"

    for row in (forward, both):
        low, high = number(row["p10_ms"], 4), number(row["p90_ms"], 4)
        cells += [f"{number(row['median_ms'], 4)} ({low}..{high})", number(row["tflops"])]
        cells += [f"{row['floor_share']:.0%}"] if row is both else []
        cells += [number(row.get("over_sdpa"))]
    return LAYOUT.format(*cells, number(both.get("peak_mib")), number(both.get("fp32_per_row_head")))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked. Raises UserError, which names the option and the remedy."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--lengths", type=list_of(positive), default="4096,16384,32768", metavar="N,N", help="tokens")
    add("--head-dims", type=list_of(_head_dim), default="128", metavar="N,N", help="multiples of 8 up to 256")
    add("--batch", type=positive, default=1, metavar="N")
    add("--heads", type=positive, default=32, metavar="N")
    add("--kv-heads", type=positive, metavar="N", help="key heads of attention_kl (a quarter of --heads)")
    add("--head-groups", type=list_of(positive), default=[], metavar="N,N", help="over several processes, see there")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--segments", type=list_of(_segments), default="one,windows:4096,documents:64", metavar="KIND,KIND")
    add("--providers", type=list_of(_provider), default=",".join(PROVIDERS), metavar="NAME,NAME")
    add("--backend", choices=("auto", "triton", "torch"), default="auto", help="of relation_kl and attention_kl")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--repeats", type=positive, metavar="N", help="samples (as many as take 0.4 s, 5 to 50)")
    add("--deterministic", action="store_true", help="torch.use_deterministic_algorithms(True), for SDPA too")
    add("--skip-gate", action="store_true", help="time kernels without checking them; the heading says so")
    add("--csv", type=Path, metavar="PATH", help="one line a measurement, with all conditions; overwritten")
    add("--local_rank", type=int, help="what the deepspeed launcher passes; not used")
    add("--commit", metavar="TEXT", help="what to write as commit where git cannot tell")
    options = parser.parse_args(arguments)
    options.kv_heads = options.kv_heads or max(1, options.heads // 4)
    if options.heads % options.kv_heads != 0:
        raise UserError(f"--kv-heads: {options.kv_heads} does not divide --heads {options.heads}; name a divisor")
    for groups in options.head_groups:
        if groups > options.heads:
            raise UserError(f"--head-groups: {groups} are more than --heads {options.heads}; name fewer")
    for each in options.segments:
        if each.kind == "documents" and each.number > min(options.lengths):
            raise UserError(f"--segments: {each} has more documents than {min(options.lengths)} tokens; name fewer")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: torch sees no CUDA GPU; use --device cpu")
    if options.backend == "triton" and importlib.util.find_spec("triton") is None:
        raise UserError("--backend: triton is not installed; use --backend torch")
    if options.backend == "triton" and options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("--backend: triton needs a GPU; use --backend torch, or set TRITON_INTERPRET=1")
    if options.csv is not None and (options.csv.is_dir() or not os.access(options.csv.parent, os.W_OK)):
        raise UserError(f"--csv: {options.csv} cannot be written; name a file in an existing folder")
    options.device = torch.device(options.device)
    return options


def _head_dim(text: str) -> int:
    return int(checked(text, positive(text) % 8 == 0 and int(text) <= 256, "give a multiple of 8 up to 256"))


def _provider(text: str) -> str:
    return checked(text, text in PROVIDERS, f"choose from {', '.join(PROVIDERS)}")


def _segments(text: str) -> Segments:
    kind, _, number = text.partition(":")
    fits = kind in ("windows", "documents") and number.isdecimal() and int(number) > 0
    checked(text, text == "one" or fits, "choose from one, windows:LENGTH and documents:COUNT")
    return Segments(kind, int(number or 0))


if __name__ == "__main__":
    sys.exit(main())
