"""The shared teacher in lockstep with the student, layer by layer, against its whole pass before the student's.

Both orders are made of the same modules and numbers. What differs is when a layer's weights are needed, so how often
ZeRO-3 gathers them, and what is alive at a time.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import batch, ds_json, raw_config, run, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from linearard import cluster, costs, ds_config
from linearard import config as configuration

LAYERS, ROWS = 3, 2
LAYER = 32 * (32 + 16 + 16 + 32 + 3 * 48)  # weights in a decoder layer's projections
RELATIONS = {"qq": 1.0, "kk": 0.7, "vv": 0.5, "qk": 0.3}
TENSORS = ("keep", "recompute", "offload")
ORDERS = {"before": False, "lockstep": True}


@dataclass(frozen=True)
class Case:
    """One way to train; `zero` goes over the tests' own DeepSpeed settings."""

    tensors: str = "keep"
    checkpointing: bool = True
    window: int | str = 16
    next_token: float = 0.4
    logits_kl: float = 0.0
    layers: str | tuple[int, ...] = "all"
    teacher: str = "shared"
    trainable: str = "lora"
    relation_parallel: str = "auto"
    adapted: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    accumulation: int = 1
    stage: int = 3
    zero: tuple[tuple[str, int], ...] = ()


EQUAL = [
    *(Case("keep", *each) for each in itertools.product((True, False), (16, "full"), (0.0, 0.4))),
    Case(window=24, relation_parallel="sequence"),  # windows that cross the borders of shards
    Case(window=24, layers=(0, 1), next_token=0.0, accumulation=2),
    Case(adapted=("q_proj", "o_proj", "embed_tokens", "down_proj"), layers=(1,)),
    Case(stage=1, checkpointing=False),
]
# Weights are kept over about a layer and a half, and nothing is fetched ahead: so what is gathered can be foretold.
STRICT = (("stage3_max_reuse_distance", 3 * LAYER // 2), ("stage3_prefetch_bucket_size", 0))
AHEAD = (*STRICT[:1], ("stage3_prefetch_bucket_size", 2000), ("stage3_max_live_parameters", 2 * LAYER))
GATHERED = [
    Case(tensors, checkpointing, next_token=next_token, zero=STRICT)
    for tensors, checkpointing, next_token in (("keep", True, 0.4), ("recompute", True, 0.0), ("keep", False, 0.0))
] + [Case(accumulation=2, zero=AHEAD)]
ALIVE = [*(Case(tensors, stage=1) for tensors in TENSORS), Case(checkpointing=False, stage=1)]
SEPARATE = [Case(teacher="replica"), Case(logits_kl=0.2), Case(trainable="qkv", teacher="auto")]


def _config(case: Case, model: str, folder: Path, size: int) -> configuration.Config:
    ds = json.loads(Path(ds_json(folder, case.stage)).read_text())
    ds["zero_optimization"] |= dict(case.zero)
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(ds))
    raw = raw_config(
        Path(model),
        folder,
        deepspeed=str(path),
        teacher={"kind": case.teacher, "window": case.window, "tensors": case.tensors},
        parallel={"sequence_parallel_size": size, "relation_parallel": case.relation_parallel},
    )
    layers = case.layers if isinstance(case.layers, str) else list(case.layers)
    raw["objective"] = {
        "relations": RELATIONS, "next_token": case.next_token, "logits_kl": case.logits_kl, "layers": layers,
    }  # fmt: skip
    raw["model"] |= {"trainable": case.trainable, "gradient_checkpointing": case.checkpointing}
    raw["model"]["lora"] = {"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": list(case.adapted)}
    raw["train"] |= {"micro_batch_size": ROWS // case.accumulation, "gradient_accumulation_steps": case.accumulation}
    raw["train"]["learning_rate"] = 1e-30  # every step starts from the same weights
    config = configuration.from_dict(raw)
    configuration.check(config)
    return config


def _engine(case: Case, model: str, folder: Path, context: Any, order: str = "lockstep") -> Any:
    from linearard.engine import Engine
    from linearard.models.student import load_model_config

    config = _config(case, model, folder / f"rank{context.rank}", context.world_size)
    torch.manual_seed(0)
    engine = Engine(config, load_model_config(config.model), context)
    engine._lockstep = engine._lockstep and ORDERS[order]
    return engine


def _step(engine: Any, step: int = 0) -> Any:
    whole, size = batch(torch.Generator().manual_seed(step), ROWS), engine.config.train.micro_batch_size
    return engine.step([{key: value[i : i + size] for key, value in whole.items()} for i in range(0, ROWS, size)], step)


def _results(model: str, folder: Path, context: Any) -> dict[tuple[Case, str], Any]:
    """Results of a step in the order of before, (case, "before"), and of lockstep, (case, teacher.tensors)."""
    from linearard.models.student import load_model_config

    found = {}
    for case in EQUAL:
        engine = _engine(case, model, folder, context, "before")
        found[case, "before"] = _step(engine)
        engine._lockstep = True
        for tensors in TENSORS:
            teacher = replace(engine.config.teacher, tensors=tensors)
            engine.config = replace(engine.config, teacher=teacher)
            engine._tensors = engine._teacher_tensors(load_model_config(engine.config.model))
            found[case, tensors] = _step(engine)
    return found


def _gathers(case: Case, order: str, model: str, folder: Path, context: Any) -> dict[str, Any]:
    """What ZeRO-3 does in the fourth step of a run, and the modules that are called in it.

    Returns:
        "forward" and "backward": weight -> times that it was gathered; "most": weights there at once, of "all";
        "called": module in a layer -> times; "lost": traces thrown away after the first step; "complete": whether there
        is a whole trace in the fourth step.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as zero

    engine = _engine(case, model, folder, context, order)
    coordinator_class: Any = zero.PartitionedParameterCoordinator
    coordinator = engine.engine.optimizer.parameter_offload.get_param_coordinator()
    absent, everything = zero.ZeroParamStatus.NOT_AVAILABLE, list(engine.module.parameters())
    names = {p.ds_id: name for name, p in engine.module.named_parameters()}
    found: dict[str, Any] = {"most": 0, "lost": 0, "all": sum(p.ds_numel for p in everything)}
    now = "forward"
    gather = coordinator_class._PartitionedParameterCoordinator__all_gather_params_
    invalidate, backward = coordinator._invalidate_trace, engine.engine.backward

    def counted(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        found[now].update(names[p.ds_id] for p in params if p.ds_status == absent)
        gather(self, params, *args, **kwargs)
        found["most"] = max(found["most"], sum(p.ds_numel for p in everything if p.ds_status != absent))

    def lost() -> None:
        found["lost"] += 1
        invalidate()

    def in_backward(*args: Any, **kwargs: Any) -> None:
        nonlocal now
        now = "backward"
        backward(*args, **kwargs)
        now = "forward"

    def call(name: str) -> Any:
        return lambda *_: found["called"].update([name])

    for name, module in engine.module.named_modules():
        if re.search(r"layers\.\d+\.", name):
            module.register_forward_pre_hook(call(name))
    coordinator_class._PartitionedParameterCoordinator__all_gather_params_ = counted
    coordinator._invalidate_trace, engine.engine.backward = lost, in_backward
    try:
        for step in range(4):
            found |= {"forward": collections.Counter(), "backward": collections.Counter(), "most": 0}
            found["called"] = collections.Counter()
            found["lost"] = found["lost"] if step > 1 else 0
            _step(engine, step)
        found["complete"] = coordinator.is_complete_trace()
    finally:
        coordinator_class._PartitionedParameterCoordinator__all_gather_params_ = gather
    return found


class _Alive(TorchDispatchMode):
    """The most bytes alive at once of tensors that came into being within."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._seen = {key: (ref, size) for key, (ref, size) in self._seen.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))
        return result


def _alive(case: Case, order: str, model: str, folder: Path, context: Any) -> dict[str, Any]:
    """Of one step: peak bytes of the forward pass and of the step; layers whose teacher's tensors are held at most."""
    engine = _engine(case, model, folder, context, order)
    _step(engine)
    found, backward = {}, engine.engine.backward
    with _Alive() as alive:

        def after_forward(*args: Any, **kwargs: Any) -> None:
            found.update(forward=alive.peak, held=len(engine._tensors.held))
            backward(*args, **kwargs)

        engine.engine.backward = after_forward
        _step(engine, 1)
    return {**found, "step": alive.peak}


def _work(model: str, out: str, size: int) -> None:
    """Worker: everything that is looked at on this number of ranks."""
    from linearard import parallel

    context, folder = parallel.initialize(size), Path(out)
    saved: dict[str, Any] = {"equal": _results(model, folder, context)}
    if size == 1:
        saved["alive"] = {
            (case, order): _alive(case, order, model, folder, context) for case in ALIVE for order in ORDERS
        }
        engines = [(case, _engine(case, model, folder, context)) for case in (*SEPARATE, EQUAL[0])]
        saved["lockstep"] = {case: engine._lockstep for case, engine in engines}
        assert engines[-1][1]._teacher.decoder is engines[-1][1]._decoder  # one base
    else:
        saved["gathers"] = {
            (case, order): _gathers(case, order, model, folder, context) for case in GATHERED for order in ORDERS
        }
    if context.is_main:
        torch.save(saved, folder / "saved.pt")
    context.barrier()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the workers found, by number of ranks."""
    model = str(tiny_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS))
    found = {}
    for size in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        run(size, _work, folder, model, str(folder), size)
        found[size] = torch.load(folder / "saved.pt", weights_only=False)
    return found


@pytest.mark.parametrize("size", (1, 2), ids=lambda size: f"P{size}")
def test_both_orders_are_one_step(size: int, saved: dict[int, dict[str, Any]]) -> None:
    for case, tensors in itertools.product(EQUAL, TENSORS):
        before, lockstep = (saved[size]["equal"][case, order] for order in ("before", tensors))
        assert before.grad_norm > 0.01, case  # the case says something
        assert lockstep.loss == pytest.approx(before.loss, rel=1e-6), (case, tensors)
        assert lockstep.grad_norm == pytest.approx(before.grad_norm, rel=1e-6), (case, tensors)
        if case.next_token:
            assert lockstep.next_token_loss == pytest.approx(before.next_token_loss, rel=1e-6), (case, tensors)
        for name, means in before.relation_loss_per_layer.items():
            assert lockstep.relation_loss_per_layer[name] == pytest.approx(means, rel=1e-6, abs=1e-9), (case, tensors)


def test_a_layer_is_gathered_once_for_both_passes(saved: dict[int, dict[str, Any]]) -> None:
    """Where nothing is fetched ahead the counts are exact: in forward one gather less of all that the teacher uses."""
    for case in GATHERED[:-1]:
        before, lockstep = (saved[2]["gathers"][case, order] for order in ORDERS)
        base = {name for name in before["forward"] if ".layers." in name and "lora" not in name and "norm" not in name}
        last = f"layers.{LAYERS - 1}."
        behind = {name for name in base if last in name and not re.search(r"\.[qkv]_proj\.", name)}
        assert len(base) == 7 * LAYERS - (0 if case.next_token else 4) and len(behind) == (4 if case.next_token else 0)
        for name in base:
            assert before["forward"][name] == (1 if name in behind else 2), (case, name)
            assert lockstep["forward"][name] == 1, (case, name)
        embeddings = next(name for name in before["forward"] if "embed_tokens" in name)
        assert (before["forward"][embeddings], lockstep["forward"][embeddings]) == (2, 1), case
        # Where forward turns into backward, the distance over which weights are kept counts both passes.
        assert lockstep["backward"].total() <= before["backward"].total() + 1, case


def test_fewer_gathers_where_zero3_fetches_ahead(saved: dict[int, dict[str, Any]]) -> None:
    before, lockstep = (saved[2]["gathers"][GATHERED[-1], order] for order in ORDERS)
    assert lockstep["forward"].total() <= 0.8 * before["forward"].total()
    assert lockstep["backward"].total() <= before["backward"].total()


def test_zero3_keeps_its_trace(saved: dict[int, dict[str, Any]]) -> None:
    for case in GATHERED:
        for order in ORDERS:
            found = saved[2]["gathers"][case, order]
            assert found["complete"] and found["lost"] == 0, (case, order)


def test_the_same_is_computed_as_often(saved: dict[int, dict[str, Any]]) -> None:
    """The teacher's part above all is not run again where checkpointing computes a layer again."""
    for case in GATHERED:
        before, lockstep = (saved[2]["gathers"][case, order]["called"] for order in ORDERS)
        assert lockstep == before, case


def test_no_second_base_and_no_more_tensors_are_alive(saved: dict[int, dict[str, Any]]) -> None:
    for case in GATHERED:
        before, lockstep = (saved[2]["gathers"][case, order] for order in ORDERS)
        # One base and the adapters; of it no more is there at once than before, or one layer with its adapters.
        assert lockstep["all"] == before["all"] < 1.2 * (LAYERS * LAYER + 2 * 96 * 32)
        assert lockstep["most"] <= max(before["most"], 1.2 * LAYER), case
    for case in ALIVE:
        before, lockstep = (saved[1]["alive"][case, order] for order in ORDERS)
        assert lockstep["held"] == before["held"] == LAYERS, case
        assert lockstep["step"] <= before["step"], case


def test_the_teacher_comes_before_where_it_must(saved: dict[int, dict[str, Any]]) -> None:
    assert saved[1]["lockstep"] == {**dict.fromkeys(SEPARATE, False), EQUAL[0]: True}


def test_the_plan_counts_one_gather_for_both_passes(llama: Path, tmp_path: Path) -> None:
    """On links so slow that every pass waits: a replica's pass costs one gather more."""
    on = replace(cluster.resolve(configuration.ClusterConfig(gpu="H200", nvlink_gb_s=1e-3), 2, 2))
    waits = {}
    for case in (Case(), *SEPARATE[:2]):
        config = _config(case, str(llama), tmp_path, 2)
        shape = costs.Dimensions(4096, 11008, 32, 32, 32, 128, 32000, False, 16)
        plan = costs.seconds(costs.Run(config, shape, ds_config.complete(config), on), "keep")
        waits[case] = plan["ZeRO's communication, not hidden"]
    gather = 32 * shape.linear() * 4 / 2 / 1e6
    shared, replica, logits = waits.values()
    assert replica - shared == pytest.approx(gather, rel=1e-3)
    assert logits - shared == pytest.approx(gather, rel=1e-3)
