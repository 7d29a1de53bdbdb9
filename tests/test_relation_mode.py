"""How relations are spread over ranks: whole windows first, then what the cost model foretells, in run and plan."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import raw_config, run
from relation_kl import cost_model

from linearard import cluster, costs, plan, relation_mode
from linearard import config as configuration
from linearard.cluster import GPUS, Cluster
from linearard.config import ClusterConfig, Config
from linearard.costs import Dimensions
from linearard.relation_mode import HEADS, SEQUENCE, WINDOWS, RelationShape, pick

ROOT = Path(__file__).resolve().parent.parent
LLAMA3_8B = Dimensions(4096, 14336, 32, 32, 8, 128, 128256, False, 8192)
LONG = RelationShape(32768, 16384, 4, 32, 8, 128)
ALL = ("qq", "kk", "vv", "qk")


def on(gpus: int = 8, **changes: Any) -> Cluster:
    return cluster.resolve(ClusterConfig(gpu="H200", gpus=gpus, **changes), gpus)


def shape(**changes: Any) -> RelationShape:
    return dataclasses.replace(LONG, **changes)


def test_whole_windows_in_shards_need_no_communication() -> None:
    for window in (4096, 8192):
        for wanted in ("auto", SEQUENCE):
            assert pick(wanted, shape(window=window), ALL, on(), 500.0).name == WINDOWS
        assert pick(HEADS, shape(window=window), ALL, on(), 500.0).name == HEADS
    assert pick("auto", shape(window=6000), ALL, on(), 500.0).name == HEADS
    alone = shape(sequence_parallel_size=1)
    assert {pick(wanted, alone, ALL, on(), 500.0).name for wanted in ("auto", HEADS, SEQUENCE)} == {WINDOWS}
    assert pick(SEQUENCE, shape(sequence_parallel_size=1, window=5000), ALL, on(), 500.0).name == HEADS


def test_what_is_asked_for_is_done() -> None:
    assert pick(SEQUENCE, LONG, ALL, on(), 500.0).name == SEQUENCE
    assert pick(HEADS, LONG, ALL, on(), 500.0).name == HEADS


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("window", [16384, 32768])
def test_auto_is_heads_inside_ulysses(size: int, window: int) -> None:
    """Nothing more moves in mode heads, whatever the link is: Ulysses has exchanged q, k and v for attention."""
    spread = shape(sequence_parallel_size=size, window=window)
    for link in (on(size), on(size, nvlink_gb_s=1e6, network_gb_s=1e6)):
        found = pick("auto", spread, ALL, link, 500.0)
        if spread.shards_hold_windows:
            assert found.name == WINDOWS
            continue
        assert found.name == HEADS
        waits = [relation_mode.waiting_seconds(mode, spread, "kk", link, 500.0) for mode in (HEADS, SEQUENCE)]
        assert 0 == waits[0] < waits[1]
        assert "0.00 ms in mode heads" in found.why and f"{size} ranks" in found.why


def test_auto_is_heads_on_slow_gpus_and_for_any_shape() -> None:
    """Where everything is hidden, too, mode sequence is not free: what it copies and adds up is not."""
    for name, size, tokens, heads, dim in itertools.product(
        ("A100", "H100", "H200", "B200"), (2, 4, 8), (8192, 16384, 65536), (24, 28, 32), (64, 128)
    ):
        spread = RelationShape(tokens, tokens, size, heads, 4, dim)
        for link in (360.0, 1e6):
            on_it = Cluster(name, dataclasses.replace(GPUS[name], nvlink_gb_s=link), size, 8, "test")
            tflops = GPUS[name].relation_tflops * tokens / (tokens + 975)
            for relation in ("qq", "kk"):
                assert pick("auto", spread, (relation,), on_it, tflops).name == HEADS
                heads_wait, wait = (
                    relation_mode.waiting_seconds(mode, spread, relation, on_it, tflops) for mode in (HEADS, SEQUENCE)
                )
                assert 0 == heads_wait < wait


def test_auto_follows_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were mode heads to cost an exchange of its own, a slow link would turn the choice."""
    heads = cost_model.heads
    monkeypatch.setattr(cost_model, "heads", lambda *args, in_trainer: heads(*args, in_trainer=False))
    names = {gb_s: pick("auto", LONG, ALL, on(nvlink_gb_s=gb_s), 500.0).name for gb_s in (1.0, 360.0)}
    for gb_s, name in names.items():
        waits = {
            mode: sum(relation_mode.waiting_seconds(mode, LONG, each, on(nvlink_gb_s=gb_s), 500.0) for each in ALL)
            for mode in (HEADS, SEQUENCE)
        }
        assert name == min(waits, key=lambda mode: waits[mode])
    monkeypatch.setattr(
        cost_model, "heads", lambda *args, in_trainer: dataclasses.replace(heads(*args, True), seconds=9.0)
    )
    assert pick("auto", LONG, ALL, on(), 500.0).name == SEQUENCE


def planned(relation_parallel: str, size: int = 16, **sections: Any) -> tuple[Config, plan.Plan]:
    config = configuration.load_config(ROOT / "launch" / "llama2_7b.yaml", [])
    sections = {
        "parallel": {"sequence_parallel_size": size, "relation_parallel": relation_parallel},
        "objective": {"relations": {"kk": 1.0, "qq": 1.0}},
        "teacher": {"window": "full"},
        **sections,
    }
    for name, values in sections.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)})
    ds = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    return config, plan.plan_run(config, LLAMA3_8B, ds, on(size), "keep")


def test_the_plan_prices_the_mode_of_the_run() -> None:
    name = "relation kk in windows of 32,768"
    plans = {mode: planned(mode)[1] for mode in ("auto", HEADS, SEQUENCE)}
    assert plans["auto"].relation_mode.name == HEADS and plans["auto"].seconds == plans[HEADS].seconds
    assert plans[SEQUENCE].relation_mode.name == SEQUENCE
    assert plans[HEADS].seconds[name] < plans[SEQUENCE].seconds[name]
    assert f"relations: heads ({plans['auto'].relation_mode.why})" in plan.table(plans["auto"])
    # 16 ranks and 8 key-value heads: two ranks divide the rows of a head, and all work as if there were 16 heads.
    ratio = plans[HEADS].seconds[name] / plans[HEADS].seconds[name.replace("kk", "qq")]
    assert ratio == pytest.approx(LLAMA3_8B.num_key_value_heads / LLAMA3_8B.num_attention_heads)
    assert plans[HEADS].seconds[name] == pytest.approx(planned(HEADS, 8)[1].seconds[name] / 2)
    # The replicas are held all the same.
    kept = "teacher: k, q"
    assert plans[HEADS].memory[kept] == pytest.approx(plans[SEQUENCE].memory[kept] * (32 + 16) / (32 + 8))


def _start_run(model: str, out: str) -> None:
    """Worker: rank 0 finds sequence better and rank 1 heads, as it may be on nodes whose links differ."""
    from linearard import parallel
    from linearard.models.student import load_model_config

    context = parallel.initialize(2)
    raw = raw_config(Path(model), Path(out) / "run", teacher={"window": 24})
    raw["parallel"] = {"sequence_parallel_size": 2}
    config = configuration.from_dict(raw)
    native = load_model_config(config.model)
    found = [plan.relation_mode(config, native, context).name]
    costs.relation_mode_of = lambda *arguments: relation_mode.RelationMode((SEQUENCE, HEADS)[context.rank], "")
    found.append(plan.relation_mode(config, native, context).name)
    costs.relation_mode_of = lambda *arguments: relation_mode.RelationMode(SEQUENCE, "")
    found.append(plan.relation_mode(config, native, context).name)
    torch.save(found, Path(out) / f"modes-{context.rank}")


def test_ranks_agree(llama: Path, tmp_path: Path) -> None:
    run(2, _start_run, tmp_path, str(llama), str(tmp_path))
    for rank in range(2):
        assert torch.load(tmp_path / f"modes-{rank}") == [HEADS, HEADS, SEQUENCE]


def _log_of_a_start(model: str, out: str) -> None:
    from linearard import parallel
    from linearard.engine import Engine
    from linearard.models.student import load_model_config

    context, lines = parallel.initialize(2), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("linearard")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    raw = raw_config(Path(model), Path(out) / "run", teacher={"window": 24})
    raw["parallel"] = {"sequence_parallel_size": 2}
    config = configuration.from_dict(raw)
    Engine(config, load_model_config(config.model), context)
    torch.save(lines, Path(out) / f"log-{context.rank}")


def test_a_run_says_what_it_picked_and_why(llama: Path, tmp_path: Path) -> None:
    run(2, _log_of_a_start, tmp_path, str(llama), str(tmp_path))
    (line,) = [line for line in torch.load(tmp_path / "log-0") if line.startswith("relations: ")]
    assert line.startswith("relations: mode heads: by the cost model a layer's relations wait 0.00 ms in mode heads")
