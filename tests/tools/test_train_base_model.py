"""The base-model trainer on a CPU: a tiny model on a few files of the standard library."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from linearard.config import DataConfig, SourceConfig
from linearard.data import is_held_out, prepare, tokenizer_fingerprint

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--vocab-size", "384", "--hidden-size", "32", "--num-hidden-layers", "2", "--num-attention-heads", "4"),
    *("--num-key-value-heads", "2", "--intermediate-size", "64", "--seq-len", "32", "--batch-size", "16"),
    *("--warmup-steps", "5", "--lr", "2e-2", "--device", "cpu", "--seed", "3"),
]
AWKWARD = "def f(x):\n\n    if x:\n\t  return 123  # \u00e9\u4e2d\U0001f600\r\n \n   x_y = ' '\n    \n\x00 end  "


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_base_model", ROOT / "tools" / "train_base_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def trees(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A small standard library, a package tree with copies of its held-out file, and that file's name."""
    library, packages = tmp_path_factory.mktemp("lib"), tmp_path_factory.mktemp("site-packages")
    names = sorted(path.name for path in LIBRARY.glob("*.py") if 4000 < path.stat().st_size < 40_000)
    held_out = next(name for name in names if is_held_out(name, tool.HELD_OUT_FRACTION))
    kept = [name for name in names if not is_held_out(name, tool.HELD_OUT_FRACTION)][:8]
    for name in [held_out, *kept]:
        shutil.copy(LIBRARY / name, library / name)
    (library / "test").mkdir()
    (library / "test" / "marker.py").write_text("marker_of_a_skipped_folder = True\n" * 9)
    text = (LIBRARY / held_out).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    (packages / "exact.py").write_text(text, encoding="utf-8")
    (packages / "renamed.py").write_text("".join(lines[: int(0.9 * len(lines))]), encoding="utf-8")
    (packages / "sub").mkdir()
    (packages / "sub" / held_out).write_text("".join(lines[: len(lines) // 3]), encoding="utf-8")
    shutil.copy(library / kept[0], packages / "again.py")
    (packages / "own.md").write_text("A page of prose that only the package tree has.\n")
    (packages / "digits.txt").write_text("0123456789 " * 50)
    (packages / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (packages / "binary.so").write_bytes(b"ignored")
    return library, packages, held_out


def test_trains_saves_and_reports(
    tool: ModuleType, trees: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library, packages, _ = trees
    folder = tmp_path / "base"
    arguments = ["--output", str(folder), "--stdlib", str(library), "--site-packages", str(packages), *TINY]
    facts = tool.run([*arguments, "--tokens", "50000"])
    assert facts["first_loss"] > 5.5 and facts["last_loss"] < facts["first_loss"] - 0.8
    assert facts["steps"] == 98 and facts["tokens"] == 98 * 512
    assert facts["loss"] < 5.0 < facts["first_loss"] and 0 < facts["accuracy"] < 1
    assert facts["scaled_loss"] != facts["loss"]

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 1, 2)
    assert model.config.max_position_embeddings == 32 and model.config.rope_parameters["rope_theta"] == 10000

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token_id == 0 and len(tokenizer) == model.config.vocab_size == 384
    for text in [AWKWARD, (LIBRARY / "ast.py").read_text(encoding="utf-8")]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("2048", add_special_tokens=False)["input_ids"]) == 4

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| {facts['loss']:.4f} | {facts['accuracy']:.4f} |" in card
    assert "3 copy of a held-out file" in card and "1 exact duplicate" in card and "1 not UTF-8" in card
    assert str(tmp_path) not in card and "--output base" in card
    assert "tokens" in capsys.readouterr().out


def test_held_out_files_and_their_copies_are_not_trained_on(tool: ModuleType, trees: tuple[Path, Path, str]) -> None:
    library, packages, held_out = trees
    corpus = tool.read_corpus(library, [packages])
    assert corpus.held_out == [(library / held_out).read_bytes().decode()]
    assert corpus.library_files == 8 and len(corpus.train) == 9
    longest = max(corpus.held_out[0].splitlines(), key=len)
    assert all(longest not in text and "marker_of_a_skipped_folder" not in text for text in corpus.train)
    assert corpus.skipped == {
        "copy of a held-out file": 3, "exact duplicate": 1, "looks generated": 1, "not UTF-8": 1
    }  # fmt: skip


def test_what_the_product_holds_out_the_base_has_not_seen(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    for number in range(300):
        (tmp_path / "package" / f"m{number}.py").write_text(f"package/m{number}.py")
    names = [f"package/m{number}.py" for number in range(300)]
    data = DataConfig((SourceConfig(path=str(tmp_path)),), seq_len=8, cache_dir=str(tmp_path / "cache"),
                      held_out_fraction=tool.HELD_OUT_FRACTION)  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tool.train_tokenizer(names, 300, 10_000, 0), bos_token="<s>")
    corpus = prepare(data, tokenizer, tokenizer_fingerprint(tokenizer), progress=False)
    texts = {tokenizer.decode(corpus.held_out.tokens(i), skip_special_tokens=True) for i in range(len(corpus.held_out))}
    assert texts == {name for name in names if is_held_out(name, tool.HELD_OUT_FRACTION)} != set()


def test_time_budget_completes_the_schedule(tool: ModuleType, trees: tuple[Path, Path, str], tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path / "base"), "--stdlib", str(trees[0]), *TINY, "--time-budget", "1"]
    facts = tool.run(arguments)
    assert 1.0 <= facts["seconds"] < 4.0 and facts["steps"] > 1
    options = tool.parse([*arguments[:1], str(tmp_path / "other"), *arguments[2:]])
    rates = [tool.learning_rate(progress, 100, options) for progress in (0.0, 0.5, 1.0)]
    assert rates == pytest.approx([2e-2, 1e-2, 0.0])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--output"),
        (["--output", "x"], "--time-budget"),
        (["--output", "x", "--tokens", "0"], "--tokens"),
        (["--output", "x", "--tokens", "9", "--lr", "nan"], "--lr"),
        (["--output", "x", "--tokens", "9", "--num-attention-heads", "7"], "--num-attention-heads"),
        (["--output", "x", "--tokens", "9", "--vocab-size", "100"], "--vocab-size"),
        (["--output", "x", "--tokens", "9", "--stdlib", "no/such"], "no/such"),
        (["--output", "x", "--tokens", "9", "--unknown"], "--unknown"),
        (["--output", ".", "--tokens", "9"], "--output"),
    ],
)
def test_bad_arguments_are_one_line_and_status_two(
    tool: ModuleType, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
