"""One process against several: loss, every gradient and the gradient norm, over ZeRO x P x trainable x teacher."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import batch, ds_json, raw_config, run, tiny_model

STEPS, ROWS = 2, 2  # ROWS sequences an optimizer step, however they are spread
Case = dict[str, Any]


def _name(case: Case) -> str:
    return "-".join(str(value) for value in case.values())


def _train(cases: list[Case], size: int, models: dict[int, str], out: str) -> None:
    """Worker: trains each case for STEPS steps and saves losses, gradients of the first step and norms.

    Args:
        cases: what to train.
        size: P.
        models: number of key-value heads -> folder.
        out: folder of the results.
    """
    from deepspeed.utils import safe_get_full_grad

    from linearard import config as configuration
    from linearard import parallel
    from linearard.engine import Engine
    from linearard.models.student import load_model_config

    def keep(engine: Engine, gradients: dict[str, torch.Tensor]) -> None:
        trainable = ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)
        gradients.update({name: safe_get_full_grad(p).clone() for name, p in trainable})

    context = parallel.initialize(size)
    for case in cases:
        folder = Path(out) / _name(case)
        per_rank = ROWS // context.data_parallel_size // case.get("accumulation", 1)
        raw = raw_config(
            Path(models[case["key_value_heads"]]),
            folder,
            deepspeed=ds_json(folder, case["stage"]),
            teacher={"kind": case["teacher"], "window": case["window"]},
            parallel={"sequence_parallel_size": size, "relation_parallel": case["relation_parallel"]},
        )
        raw["model"] |= {"trainable": case["trainable"], "gradient_checkpointing": case.get("checkpointing", True)}
        raw["train"] |= {
            "micro_batch_size": per_rank,
            "gradient_accumulation_steps": case.get("accumulation", 1),
        }
        config = configuration.from_dict(raw)
        configuration.check(config)
        engine = Engine(config, load_model_config(config.model), context)
        over_group = case["relation_parallel"] == "sequence" and case["window"] == 24
        assert (engine.relation_group is not None) == (over_group and size > 1)
        replicas = size // case["key_value_heads"]
        inside_ulysses = size > 1 and engine.relation_group is None and not engine.local_windows
        shares = (context.sequence_parallel_rank % replicas, replicas) if inside_ulysses and replicas > 1 else None
        assert engine.relation_loss.key_value_row_share == shares
        generator = torch.Generator().manual_seed(1)
        gradients: dict[str, torch.Tensor] = {}
        results = []
        for step in range(STEPS):
            whole = batch(generator, ROWS)
            first = context.data_parallel_rank * ROWS // context.data_parallel_size
            micro = [
                {key: value[first + i * per_rank : first + (i + 1) * per_rank] for key, value in whole.items()}
                for i in range(case.get("accumulation", 1))
            ]
            if step == 0:
                engine.engine.step = _before_last(engine.engine.step, len(micro), partial(keep, engine, gradients))
            results.append(engine.step(micro, step))
        if context.is_main:
            torch.save({"results": results, "gradients": gradients}, folder / "result.pt")
        context.barrier()


def _before_last(step: Any, calls: int, action: Any) -> Any:
    """`step`, with `action` before its call number `calls`."""
    count = 0

    def wrapped() -> None:
        nonlocal count
        count += 1
        if count == calls:
            action()
        step()

    return wrapped


def _case(stage: int, trainable: str, teacher: str, **more: Any) -> Case:
    return {
        "stage": stage,
        "trainable": trainable,
        "teacher": teacher,
        "window": 16,
        "relation_parallel": "auto",
        "key_value_heads": 2,
        **more,
    }


MODELS = [("lora", "shared"), ("lora", "replica"), ("qkv", "replica"), ("full", "replica")]
REFERENCES = [_case(3, trainable, teacher) for trainable, teacher in MODELS]
# Windows of 24 tokens do not fit into shards: teacher and relations then run inside Ulysses.
REFERENCES += [_case(3, "lora", "shared", window=24), _case(3, "qkv", "replica", window=24)]
REFERENCES += [_case(3, "lora", "shared", window=24, key_value_heads=1)]
MATRIX = [_case(stage, trainable, teacher) for stage in (1, 2, 3) for trainable, teacher in MODELS[:3]]
HEADS = [
    _case(3, "lora", "shared", relation_parallel="heads"),
    _case(3, "lora", "shared", window=24),
    _case(1, "qkv", "replica", relation_parallel="heads"),
]
# Relations on shards, keys exchanged: windows that cross borders, and (full) the whole context.
SEQUENCE = [
    _case(3, "lora", "shared", window=24, relation_parallel="sequence"),
    _case(1, "qkv", "replica", window=24, relation_parallel="sequence"),
    _case(3, "lora", "shared", relation_parallel="sequence"),
]
# One key-value head: in mode heads all ranks hold it, and divide its rows.
MQA = [
    _case(3, "lora", "shared", window=24, relation_parallel="sequence", key_value_heads=1),
    _case(1, "lora", "shared", window=24, relation_parallel="heads", key_value_heads=1),
]
WORLDS: dict[tuple[int, int], list[Case]] = {
    (1, 1): [
        _case(1, "lora", "shared"),
        _case(2, "qkv", "replica"),
        _case(3, "lora", "shared", accumulation=2),
        _case(3, "qkv", "replica", checkpointing=False),
    ],
    (2, 1): [*MATRIX, _case(3, "full", "replica")],
    (2, 2): [*MATRIX, *HEADS, *SEQUENCE, *MQA, _case(3, "lora", "shared", accumulation=2), _case(2, "full", "replica"),
             _case(3, "lora", "shared", checkpointing=False)],
    (4, 2): [*(_case(stage, *MODELS[i]) for i, stage in enumerate((1, 2, 3))), HEADS[0]],
    (4, 4): [*MATRIX, *HEADS, *SEQUENCE, *MQA],
}  # fmt: skip


@pytest.fixture(scope="module")
def models(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    mqa = tiny_model("llama", tmp_path_factory.mktemp("mqa"), num_key_value_heads=1)
    return {2: str(llama), 1: str(mqa)}


@pytest.fixture(scope="module")
def references(models: dict[int, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], Any]:
    folder = tmp_path_factory.mktemp("reference")
    run(1, _train, folder, REFERENCES, 1, models, str(folder))
    return {_key(case): _load(folder, case) for case in REFERENCES}


def _key(case: Case) -> tuple[Any, ...]:
    return case["trainable"], case["teacher"], case["window"], case["key_value_heads"]


def _load(folder: Path, case: Case) -> Any:
    return torch.load(folder / _name(case) / "result.pt", weights_only=False)


@pytest.mark.parametrize("world", list(WORLDS), ids=lambda world: f"{world[0]}ranks-P{world[1]}")
def test_ranks_give_the_one_process_step(
    world: tuple[int, int], references: dict[tuple[Any, ...], Any], models: dict[int, str], tmp_path: Path
) -> None:
    run(world[0], _train, tmp_path, WORLDS[world], world[1], models, str(tmp_path))
    for case in WORLDS[world]:
        expected, found = references[_key(case)], _load(tmp_path, case)
        for step in range(STEPS):
            a, b = expected["results"][step], found["results"][step]
            assert b.loss == pytest.approx(a.loss, rel=1e-5), _name(case)
            assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4), _name(case)
            assert b.relation_loss == pytest.approx(a.relation_loss, rel=1e-4, abs=1e-9), _name(case)
            assert b.tokens == a.tokens
        assert expected["gradients"].keys() == found["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            difference = (found["gradients"][name] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm() + 1e-9, (_name(case), name)


def test_shared_and_replica_teachers_give_equal_losses(references: dict[tuple[Any, ...], Any]) -> None:
    shared, replica = references["lora", "shared", 16, 2], references["lora", "replica", 16, 2]
    for a, b in zip(shared["results"], replica["results"], strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
