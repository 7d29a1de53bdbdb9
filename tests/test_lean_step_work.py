"""What a lean step computes, what it keeps alive, and ZeRO-3's trace of its modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import VOCAB, run
from lean_recipes import (
    ALL_TERMS,
    DEPTHS,
    ONE_PASS,
    QKV,
    RELATIONS,
    ROWS,
    build,
    case_of,
    name_of,
    one_batch,
    write_models,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

TRACED = [
    case_of(RELATIONS, "shared", "recompute", 3, accumulation=2),
    case_of(ALL_TERMS, "replica", "recompute", 3, accumulation=2),
]


def _evaluate(engine: Any) -> None:
    """A forward pass of the student as the trainer's evaluation makes it, between two steps."""
    from linearard.capture import AttentionPass
    from linearard.layout import whole_sequence

    ids, positions, segments = whole_sequence(one_batch()["input_ids"], engine.context.device)
    engine.module.eval()
    with torch.no_grad():
        engine.module(input_ids=ids, position_ids=positions, use_cache=False, attention_pass=AttentionPass(segments))
    engine.module.train()


def _traces(engine: Any) -> dict[str, Any]:
    """Whether ZeRO-3's traces of module order are complete and stay so, over steps of two micro-batches."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    complete: list[list[bool]] = []  # of each step: of each coordinator, at its last module
    lost: list[int] = []  # traces thrown away in each step
    fetch, invalidate = Coordinator.fetch_sub_module, Coordinator._invalidate_trace
    seen: dict[Any, bool] = {}

    def fetching(coordinator: Any, module: Any, forward: bool) -> None:
        seen[coordinator] = coordinator.is_complete_trace()
        fetch(coordinator, module, forward)

    def invalidating(coordinator: Any) -> None:
        lost[-1] += 1
        invalidate(coordinator)

    Coordinator.fetch_sub_module, Coordinator._invalidate_trace = fetching, invalidating
    try:
        for step in range(6):
            lost.append(0)
            if step == 3:
                _evaluate(engine)
            seen.clear()
            engine.step([{key: value[i : i + 1] for key, value in one_batch(step).items()} for i in range(ROWS)], step)
            complete.append(list(seen.values()))
    finally:
        Coordinator.fetch_sub_module, Coordinator._invalidate_trace = fetch, invalidate
    return {"complete": complete, "lost": lost}


class _Results(TorchDispatchMode):
    """Shows every tensor that comes into being to `see`."""

    def __init__(self, see: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self._see(x)
        return result


class _Census:
    """Counts the live tensors of a certain size in bytes; what was alive at most is `peak`."""

    def __init__(self, size: int) -> None:
        self._size, self._seen, self.peak = size, {}, 0

    def see(self, x: torch.Tensor) -> None:
        if x.untyped_storage().nbytes() == self._size:
            self._seen[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())
            self.peak = max(self.peak, self.now())

    def now(self) -> int:
        self._seen = {key: ref for key, ref in self._seen.items() if not ref.expired()}
        return len(self._seen)


def _computed(models: dict[str, str], folder: Path, context: Any) -> dict[str, Any]:
    """Names of the modules that were called by student and teacher, and the most rows of logits."""
    found: dict[str, Any] = {}
    for recipe, side in ((QKV, "_decoder"), (QKV, "_teacher"), (ONE_PASS, "_teacher"), (ALL_TERMS, "_teacher")):
        engine = build(case_of(recipe, "replica", "recompute", 2), models, folder / f"{recipe[0]}{side}", context)
        part, called = getattr(engine, side), set()
        causal = getattr(part, "decoder", part).causal
        for name, module in causal.named_modules():
            module.register_forward_hook(lambda *args, name=name, called=called: called.add(name))
        rows = {0}  # of matrices with a column for each token of the vocabulary
        with _Results(lambda x, rows=rows: rows.add(len(x)) if x.dim() == 2 and x.shape[1] == VOCAB else None):
            engine.step([one_batch()], 0)
        found[recipe, side] = called, max(rows)
    return found


def _alive(models: dict[str, str], folder: Path, context: Any) -> dict[tuple[str, int], tuple[int, list[int]]]:
    """(teacher.tensors, layers) -> live tensors as large as a layer's q, k or v: at most, and when its loss begins.

    The second number leaves out the teacher's tensors that wait for their layer (offload: on the host).
    """
    found = {}
    for layers in DEPTHS:
        for tensors in ("keep", "recompute", "offload"):
            case = case_of(f"{layers} layers", "shared", tensors, 1)
            engine = build(case, models, folder / f"{tensors}{layers}", context)
            census, at_loss = _Census(4 * ROWS * 64 * 4 * 16), []

            plain, waiting = engine.relation_loss._layer, 0 if tensors == "recompute" else 3

            def layer_loss(
                *args: Any, plain: Any = plain, census: Any = census, at: Any = at_loss, of: Any = engine._tensors,
                waiting: int = waiting,
            ) -> Any:  # fmt: skip
                at.append(census.now() - waiting * len(of.held))
                return plain(*args)

            engine.relation_loss._layer = layer_loss
            with _Results(census.see):
                engine.step([one_batch()], 0)
            found[tensors, layers] = (census.peak, at_loss)
    return found


def _watch(models: dict[str, str], out: str, size: int) -> None:
    """Worker: on one rank what is computed and alive, on two the traces."""
    from linearard import head_loss, parallel

    head_loss.CHUNK_LOGITS = 20 * VOCAB  # several chunks a step
    context = parallel.initialize(size)
    folder = Path(out)
    if size == 1:
        saved = {"alive": _alive(models, folder, context), "computed": _computed(models, folder, context)}
    else:
        saved = {name_of(case): _traces(build(case, models, folder / "trace", context)) for case in TRACED}
    if context.is_main:
        torch.save(saved, folder / "saved.pt")
    context.barrier()


def _watched(size: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    models, folder = write_models(tmp_path_factory.mktemp("models")), tmp_path_factory.mktemp(f"ranks{size}")
    run(size, _watch, folder, models, str(folder), size)
    return torch.load(folder / "saved.pt", weights_only=False)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank has computed and kept alive."""
    return _watched(1, tmp_path_factory)


def test_nothing_is_computed_that_no_term_needs(one: dict[str, Any]) -> None:
    for (recipe, side), (called, rows) in one["computed"].items():
        behind = {name for name in called if name.startswith("model.layers.2.")}
        if recipe == QKV:  # relations of layers 0 and 1 of three
            assert "lm_head" not in called and rows == 0, side
            assert not behind and not any("layers.1.mlp." in each or "layers.1.self_attn.o" in each for each in called)
            assert {"model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"} <= called
        else:  # all layers, and logits, which the teacher needs only for logits_kl
            projections = {f"model.layers.2.self_attn.{letter}_proj" for letter in "qkv"}
            whole = recipe == ALL_TERMS
            assert projections <= behind and rows == max(20, 32), recipe  # 20 tokens of a chunk; the weight itself
            assert ("lm_head" in called) == ("model.layers.2.mlp.up_proj" in called) == whole, recipe
            assert ("model.layers.2.self_attn.o_proj" in called) == whole, recipe


def test_what_is_alive_does_not_grow_with_the_layers(one: dict[str, Any]) -> None:
    """Beside one layer's q, k, v of student and teacher: the gradients of q, k, v that come from behind."""
    alive = one["alive"]
    for layers in DEPTHS:
        for tensors in ("keep", "recompute", "offload"):
            assert alive[tensors, layers][1] == [6] + [9] * (layers - 1), tensors
    few, many = DEPTHS
    assert alive["recompute", few][0] == alive["recompute", many][0] <= 15
    for tensors in ("keep", "offload"):  # the census sees what waits for its layer; offload: on the host
        assert alive[tensors, many][0] - alive[tensors, few][0] == 3 * (many - few)


def test_zero3_keeps_its_trace_of_the_modules(tmp_path_factory: pytest.TempPathFactory) -> None:
    """From the third step on DeepSpeed prefetches by a complete trace, of the student and of a replica.

    An evaluation comes after the third step: what it calls is no step, the student's trace is made once more.
    """
    for name, trace in _watched(2, tmp_path_factory).items():
        assert sum(trace["lost"][:3]) == sum(trace["lost"][4:]) == 0, (name, trace)
        assert all(trace["complete"][2]) and all(trace["complete"][5]), (name, trace)
        assert len(trace["complete"][2]) == (2 if "teacher replica" in name else 1), name
