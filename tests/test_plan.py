"""The plan of a run: exact where it can be, ordered as it must be, and near what was measured on a 7B model."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import raw_config
from transformers import AutoModelForCausalLM, LlamaConfig

from linearard import cluster, costs, ds_config
from linearard import config as configuration
from linearard.config import ClusterConfig, Config
from linearard.costs import Dimensions
from linearard.errors import UserError
from linearard.models.student import load_model_config
from linearard.parallel import ParallelContext
from linearard.plan import TEACHER_TENSORS, ForDryRun, Plan, of_run, plan_run, table, teacher_tensors

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LLAMA2_7B = Dimensions(4096, 11008, 32, 32, 32, 128, 32000, False, 4096)


def config_of(**sections: dict[str, Any]) -> Config:
    """The recipe for Llama-2-7B with other values in some sections."""
    config = configuration.load_config(ROOT / "launch" / "llama2_7b.yaml", [])
    for name, values in sections.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)})
    return config


def plan_of(
    gpus: int = 2, stage: int = 3, mode: str = "keep", ds: dict[str, Any] | None = None, **sections: Any
) -> Plan:
    sections.setdefault("parallel", {"sequence_parallel_size": gpus})
    config = config_of(**sections)
    if ds is None:
        ds = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    return plan_run(config, LLAMA2_7B, ds, cluster.resolve(ClusterConfig(gpu="H200"), gpus, gpus), mode)


def test_parameters_are_those_of_the_model(llama: Path) -> None:
    for path_or_shape in (llama, {"tie_word_embeddings": True, "num_key_value_heads": 1}):
        if isinstance(path_or_shape, Path):
            native: Any = load_model_config(configuration.ModelConfig(path=str(path_or_shape)))
        else:
            sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
            native = LlamaConfig(**sizes, num_attention_heads=2, **path_or_shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(native)
        assert costs.dimensions_of(native).parameters == sum(p.numel() for p in model.parameters())
    assert LLAMA2_7B.parameters == 6_738_415_616


def test_trainable_parameters_and_flops_are_the_trainers(llama: Path, tmp_path: Path) -> None:
    from linearard.models.student import load_model, make_trainable
    from linearard.trainer import _StepCosts

    relations: Any = {"relations": {"qk": 1.0, "vv": 1.0}}
    for trainable, objective in itertools.product(
        ("lora", "qkv", "full"),
        (
            relations,
            {**relations, "layers": [0]},
            {**relations, "next_token": 1.0},
            {"next_token": 1.0, "logits_kl": 1.0},
        ),
    ):
        raw = raw_config(llama, tmp_path / trainable)
        raw["model"] |= {"trainable": trainable}
        raw["model"]["lora"]["target_modules"] = ["q_proj", "v_proj", "down_proj"]
        raw["objective"] = objective
        config = configuration.from_dict(raw)
        native = load_model_config(config.model)
        student = make_trainable(load_model(config, native), config)
        shape, ds = costs.dimensions_of(native), ds_config.complete(config)
        run = costs.Run(config, shape, ds, cluster.resolve(config.cluster, 1, 1))
        assert run.trainable == sum(p.numel() for p in student.parameters() if p.requires_grad)

        class _Engine:
            module, window, weights = student, run.window, dict.fromkeys(run.relations, 1.0)
            context = ParallelContext(0, 1, 0, CPU, 1, None)

            class relation_loss:
                layers = tuple(objective.get("layers", (0, 1)))

        engine: Any = _Engine
        plan = plan_run(config, shape, ds, cluster.resolve(config.cluster, 1, 1), "keep")
        assert plan.flops == pytest.approx(_StepCosts(config, native, engine)._flops_of_token * plan.tokens)


def test_what_mfu_counts_is_what_a_pass_multiplies(llama: Path) -> None:
    """The products of a forward pass, counted by torch: all of it, and one that ends with q, k, v of a layer."""
    from torch.utils.flop_counter import FlopCounterMode

    from linearard import metrics
    from linearard.capture import AttentionPass, ending_at
    from linearard.layout import whole_sequence
    from linearard.models.decoder import Decoder, replaced_forwards
    from linearard.models.student import load_model

    raw = raw_config(llama, llama.parent / "unused")
    config = configuration.from_dict(raw)
    model: Any = load_model(config, load_model_config(config.model))
    ids, positions, segments = whole_sequence(torch.arange(16)[None], CPU)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for last in (None, 1, 0):
        observer = None if last is None else ending_at(lambda layer, q, k, v, scaling: (q, k, v), last)
        forwards = {} if last is None else Decoder.of(model).nothing_behind(last)
        module = model if last is None else model.model
        with torch.no_grad(), replaced_forwards(forwards), FlopCounterMode(display=False) as counter:
            module(
                input_ids=ids, position_ids=positions, use_cache=False,
                attention_pass=AttentionPass(segments, None, observer),
            )  # fmt: skip
        products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")
        assert products == 2 * 16 * sum(metrics.needed_weights(sizes, last).values())


def test_it_is_near_what_was_measured() -> None:
    """The two 7B runs on two H200 in README.md and in the constants' comment; their documents were shorter than 32K."""
    one_pass = plan_of()
    assert one_pass.peak_gib == pytest.approx(35.9, rel=0.1)
    assert 2.86 < one_pass.step_seconds < 4.58
    lora = configuration.LoraConfig(r=256)
    no_relations = plan_of(model={"lora": lora}, objective={"relations": {}, "next_token": 1.0})
    assert no_relations.peak_gib == pytest.approx(18.3, rel=0.1)
    assert "teacher" not in no_relations.seconds


def test_partitions_and_offloading_move_memory_where_they_say() -> None:
    two, four = plan_of(2), plan_of(4)
    assert four.memory["weights of the base"] == pytest.approx(two.memory["weights of the base"] / 2)
    assert four.memory["checkpoints: inputs of the layers"] == two.memory["checkpoints: inputs of the layers"] / 2
    whole = plan_of(2, stage=1)
    assert whole.memory["weights of the base"] == pytest.approx(2 * two.memory["weights of the base"])
    host = plan_of(2, ds=json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text()))
    assert "weights of the base" not in host.memory and host.host_memory["weights of the base"] > 6
    assert host.peak_gib < two.peak_gib and host.step_seconds > two.step_seconds
    replica = plan_of(2, teacher={"kind": "replica"})
    assert replica.memory["weights of student and teacher"] == 2 * two.memory["weights of the base"]


def test_the_ways_to_hold_the_teachers_tensors_trade_memory_for_time() -> None:
    plans = [plan_of(mode=mode) for mode in TEACHER_TENSORS]
    assert plans[0].peak_gib > plans[1].peak_gib > plans[2].peak_gib
    assert plans[0].step_seconds <= plans[2].step_seconds and plans[0].step_seconds < plans[1].step_seconds
    assert plans[2].host_memory and not plans[0].host_memory


def test_time_grows_as_work_does() -> None:
    short, long = plan_of(), plan_of(data={"seq_len": 65536})
    assert 2 * short.step_seconds < long.step_seconds < 4 * short.step_seconds
    windowed, full = plan_of(), plan_of(teacher={"window": "full"})
    assert full.seconds["relation qk in windows of 32,768"] > 5 * windowed.seconds["relation qk in windows of 4,096"]
    assert full.seconds["Ulysses all-to-alls"] > windowed.seconds["Ulysses all-to-alls"]
    twice = plan_of(train={"gradient_accumulation_steps": 2})
    assert twice.tokens == 2 * windowed.tokens and twice.peak_gib == windowed.peak_gib
    behind = plan_of(objective={"next_token": 0.0})
    assert behind.seconds["student forward"] < windowed.seconds["student forward"]
    assert "losses on logits" not in behind.seconds
    group = {"sequence_parallel_size": 2, "relation_parallel": "sequence"}
    over_group = plan_of(teacher={"window": "full"}, parallel=group)
    name = "relation qk in windows of 32,768"
    assert full.seconds[name] < over_group.seconds[name] < 1.5 * full.seconds[name]
    few = plan_of(data={"seq_len": 4096})
    assert few.seconds["host, not hidden"] > 0.3  # ZeRO-3's hooks


def test_auto_takes_the_fastest_that_fits() -> None:
    for memory, expected in ((139.8, "keep"), (35.0, "recompute"), (30.0, "offload"), (5.0, "offload")):
        config = config_of(cluster={"gpu": "H200", "memory_gib": memory})
        ds = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
        on = cluster.resolve(config.cluster, 2)
        found = plan_run(config, LLAMA2_7B, ds, on)
        assert found.teacher_tensors == expected, memory
        keep = plan_run(config, LLAMA2_7B, ds, on, "keep")
        assert (keep.needed_gib <= 0.9 * memory) == (expected == "keep")
    context = ParallelContext(0, 1, 0, CPU, 1, None)
    assert teacher_tensors(config_of(teacher={"tensors": "offload"}), None, {}, context) == "offload"


def dry_run(**sections: Any) -> ForDryRun:
    config = config_of(**sections)
    ds = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    on = cluster.resolve(config.cluster, config.parallel.sequence_parallel_size)
    return ForDryRun(config, LLAMA2_7B, ds, plan_run(config, LLAMA2_7B, ds, on))


def test_what_cannot_fit_is_refused_with_remedies_that_help() -> None:
    dry_run().refuse_what_cannot_fit()
    card = {"gpu": "H200", "memory_gib": 40.0}
    too_long = dry_run(cluster=card, data={"seq_len": 65536}, teacher={"tensors": "keep"})
    with pytest.raises(UserError) as caught:
        too_long.refuse_what_cannot_fit()
    message = str(caught.value)
    assert message.startswith("data.seq_len: 65,536 tokens on 2 H200 need ") and "which has 40.0" in message
    assert "teacher.tensors=offload" in message and "parallel.sequence_parallel_size=4 on 4 GPUs" in message
    longest = too_long.longest_context()
    assert f"data.seq_len={longest}" in message and 32768 <= longest < 65536
    dry_run(cluster=card, data={"seq_len": longest}, teacher={"tensors": "keep"}).refuse_what_cannot_fit()
    for remedy in ({"teacher": {"tensors": "offload"}}, {"parallel": {"sequence_parallel_size": 4}}):
        dry_run(
            **{"cluster": card, "data": {"seq_len": 65536}, "teacher": {"tensors": "keep"}, **remedy}
        ).refuse_what_cannot_fit()
    hopeless = dry_run(cluster={"gpu": "H200", "memory_gib": 1.0})
    with pytest.raises(UserError, match="use more GPUs"):
        hopeless.refuse_what_cannot_fit()


def test_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = cluster.resolve(ClusterConfig(), 2)
    assert (found.name, found.gpus, found.gpus_per_node) == ("H200", 2, 2) and "assumed" in found.source
    wide = cluster.resolve(ClusterConfig(gpus=16, gpu="H100", nvlink_gb_s=100.0), 4)
    assert (wide.link_gb_s(8), wide.link_gb_s(16)) == (100.0, wide.gpu.network_gb_s)
    for section, expected in (
        (ClusterConfig(gpu="V100"), "cluster.gpu: 'V100'"),
        (ClusterConfig(gpus=3), "cluster.gpus: 3"),
    ):
        with pytest.raises(UserError, match=expected):
            cluster.resolve(section, 2)
    with pytest.raises(UserError, match=r"cluster.memory_gib: -1.0 must be above 0"):
        configuration.check(config_of(cluster={"memory_gib": -1.0}))


def test_gpus_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for name, known in (("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA Unheard-of", None)):
        properties = type("Properties", (), {"name": name, "total_memory": 2**36})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        found = cluster.resolve(ClusterConfig(), 2)
        assert (found.name, found.gpus, found.gpu.memory_gib) == (known or "H200", 2, 64.0)
        assert ("figures are not known" in found.source) == (known is None) and name in found.source
        # A run counts its processes, whatever the configuration plans for.
        started = of_run(config_of(cluster={"gpu": "B200", "gpus": 16}), ParallelContext(0, 4, 0, CPU, 2, None))
        assert (started.name, started.gpus) == (known or "H200", 4)


def test_the_table_adds_up() -> None:
    plan = plan_of(mode="offload")
    text = table(plan)
    assert f"{plan.peak_gib:.2f}" in text and f"{plan.step_seconds:.3f}" in text and "GiB of the host" in text
    assert sum(plan.memory.values()) == plan.peak_gib and sum(plan.seconds.values()) == plan.step_seconds
    assert plan.mfu == pytest.approx(plan.flops / plan.step_seconds / 2 / 989e12)
