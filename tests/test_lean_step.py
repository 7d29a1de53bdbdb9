"""The lean step against a plain one: everything kept, all logits, nothing skipped; what is alive; ZeRO-3's trace.

The plain step is autograd over full logits and all layers' q, k, v at once, in one process and without DeepSpeed's
backward. Whatever a lean step recomputes, offloads, skips or cuts into chunks, and on however many ranks, its loss and
every gradient must be the plain step's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import VOCAB, batch, ds_json, raw_config, run, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

ROWS = 2
Case = dict[str, Any]
ALL = {"qq": 1.0, "kk": 0.7, "vv": 0.5, "qk": 0.3}

# What is trained, on which terms: one plain step each.
RECIPES: dict[str, Case] = {
    "relations": {"objective": {"relations": ALL}},
    "one pass, one key-value head": {
        "model": {"num_key_value_heads": 1}, "window": 24,
        "objective": {"relations": {"qk": 1.0, "vv": 1.0}, "next_token": 0.4},
    },
    "all terms": {"objective": {"relations": ALL, "next_token": 0.4, "logits_kl": 0.2}},
    "tied, everything trained": {
        "kind": "qwen2", "model": {"tie_word_embeddings": True}, "training": {"trainable": "full"}, "window": 24,
        "objective": {"relations": {"qk": 1.0, "kk": 0.5}, "next_token": 0.6, "logits_kl": 0.3, "layers": [0, 2]},
    },
    "q/k/v, one relation of the first layers": {
        "kind": "mistral", "model": {"sliding_window": None}, "training": {"trainable": "qkv"}, "window": "full",
        "objective": {"relations": {"qq": 1.0}, "layers": [0, 1]},
    },
    "q/k norms, everything trained on relations": {
        "kind": "qwen3", "model": {"head_dim": 16}, "training": {"trainable": "full"}, "window": 24,
        "objective": {"relations": ALL, "layers": [1]},
    },
    "next token alone": {"training": {"trainable": "full"}, "objective": {"relations": {}, "next_token": 1.0}},
    "adapters behind and on the head": {
        "training": {"lora": {"r": 3, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj", "o_proj", "lm_head"]}},
        "objective": {"relations": {"vv": 2.0, "qq": 0.5}, "next_token": 0.3, "logits_kl": 0.5},
    },
}  # fmt: skip


def _case(recipe: str, teacher: str, tensors: str, stage: int, checkpointing: bool = True, **more: Any) -> Case:
    case = {"recipe": recipe, "teacher": teacher, "tensors": tensors, "stage": stage, "checkpointing": checkpointing}
    return {**case, "relation_parallel": "auto", **more}


DEPTHS = (3, 6)
for _layers in DEPTHS:  # q, k, v of one size, which nothing else but attention's result has
    RECIPES[f"{_layers} layers"] = {
        "model": {"num_hidden_layers": _layers, "num_key_value_heads": 4, "head_dim": 16},
        "objective": {"relations": ALL},
    }
RELATIONS, ONE_PASS, ALL_TERMS, TIED, QKV, NORMS, NEXT, HEAD = list(RECIPES)[:8]
WORLDS: dict[int, list[Case]] = {  # ranks = P -> lean steps (4 ranks: test_parity)
    1: [
        _case(RELATIONS, "shared", "recompute", 3),
        _case(RELATIONS, "replica", "offload", 1, False),
        _case(ONE_PASS, "shared", "recompute", 3, False),
        _case(ONE_PASS, "replica", "keep", 2),
        _case(ALL_TERMS, "replica", "recompute", 3),
        _case(ALL_TERMS, "shared", "offload", 3),
        _case(TIED, "replica", "recompute", 2, False),
        _case(QKV, "replica", "recompute", 2),
        _case(NORMS, "replica", "recompute", 3),
        _case(NEXT, "replica", "recompute", 3),
        _case(HEAD, "replica", "keep", 3, False),
    ],
    2: [
        _case(RELATIONS, "shared", "recompute", 3, accumulation=2),
        _case(RELATIONS, "replica", "recompute", 1, False, relation_parallel="heads"),
        _case(ONE_PASS, "shared", "recompute", 3),
        _case(ONE_PASS, "replica", "offload", 3, relation_parallel="sequence"),
        _case(HEAD, "shared", "offload", 3),
        _case(TIED, "replica", "recompute", 3),
        _case(QKV, "replica", "recompute", 3),
        _case(NORMS, "replica", "recompute", 2, False),
    ],
}
TRACED = [
    _case(RELATIONS, "shared", "recompute", 3, accumulation=2),
    _case(ALL_TERMS, "replica", "recompute", 3, accumulation=2),
]


def _name(case: Case) -> str:
    return ", ".join(f"{key} {value}" for key, value in case.items())


def _build(case: Case, models: dict[str, str], folder: Path, context: Any) -> Any:
    """An engine whose trained weights have left the base, alike on every number of ranks."""
    import deepspeed

    from linearard import config as configuration
    from linearard.engine import Engine
    from linearard.models.student import load_model_config

    recipe = RECIPES[case["recipe"]]
    raw = raw_config(
        Path(models[case["recipe"]]),
        folder,
        deepspeed=ds_json(folder, case["stage"]),
        teacher={"kind": case["teacher"], "window": recipe.get("window", 16), "tensors": case["tensors"]},
        parallel={"sequence_parallel_size": context.world_size, "relation_parallel": case["relation_parallel"]},
    )
    raw["objective"] = recipe["objective"]
    raw["model"] |= {"gradient_checkpointing": case["checkpointing"], **recipe.get("training", {})}
    accumulation = case.get("accumulation", 1)
    raw["train"] |= {"micro_batch_size": ROWS // accumulation, "gradient_accumulation_steps": accumulation}
    config = configuration.from_dict(raw)
    configuration.check(config)
    engine = Engine(config, load_model_config(config.model), context)
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))))
    return engine


def _batch(seed: int = 1) -> dict[str, torch.Tensor]:
    return batch(torch.Generator().manual_seed(seed), ROWS)


def _plain_step(engine: Any) -> dict[str, Any]:
    """Loss and gradients by autograd over everything at once."""
    from relation_kl import attention_kl, relation_kl

    from linearard.capture import AttentionPass
    from linearard.layout import cut

    objective, context = engine.config.objective, engine.context
    part = cut(_batch(), engine.window, engine.local_windows, False, context)
    sides: list[dict[int, tuple[torch.Tensor, ...]]] = [{}, {}]

    def keep(side: int) -> Any:
        def observe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> Any:
            sides[side][layer] = (q, k, v)
            return q, k, v

        return observe

    teacher = engine._teacher
    with torch.no_grad(), teacher.acting(teacher.decoder.causal), engine.rope.native():
        of_teacher = teacher.decoder.causal(
            input_ids=part.teacher_input_ids,
            position_ids=part.teacher_position_ids,
            use_cache=False,
            attention_pass=AttentionPass(part.teacher_segments, None, keep(0)),
        ).logits.reshape(*part.input_ids.shape, -1)
    student = engine._decoder.causal(
        input_ids=part.input_ids,
        position_ids=part.position_ids,
        use_cache=False,
        attention_pass=AttentionPass(part.segments, None, keep(1)),
    ).logits
    segments, rows, layers = part.relation_segment_ids, part.relation_rows, engine.relation_loss.layers
    loss = torch.zeros(())
    for name, weight in objective.relations.items():
        for layer in layers:
            theirs, ours = (
                [x.reshape(ROWS, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3) for x in side[layer]] for side in sides
            )
            x, y = ("qkv".index(letter) for letter in name)
            if x == y:
                value = relation_kl(ours[x], theirs[x], segment_ids=segments)
            else:
                value = attention_kl(ours[x], ours[y], theirs[x], theirs[y], segment_ids=segments)
            loss = loss + weight * value.sum() / (value.shape[1] * rows * len(layers))
    labels, count = part.labels.flatten(), part.label_count
    log_s, log_t = (logits.flatten(0, 1).log_softmax(-1) for logits in (student, of_teacher))
    loss = loss + objective.next_token * F.nll_loss(log_s, labels, ignore_index=-100, reduction="sum") / count
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    loss = loss + objective.logits_kl * (kl * (labels >= 0)).sum() / count
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(trained.items(), found, strict=True)
    }
    return {"loss": loss.item(), "gradients": gradients}


def _lean_step(engine: Any, accumulation: int) -> dict[str, Any]:
    """Loss, gradients and their norm of one step of the trainer's."""
    from deepspeed.utils import safe_get_full_grad

    whole, size = _batch(), ROWS // accumulation
    micro = [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, ROWS, size)]
    gradients: dict[str, torch.Tensor] = {}
    step = engine.engine.step

    def keep_gradients() -> None:
        if engine.engine.is_gradient_accumulation_boundary():
            for name, p in engine.module.named_parameters():
                if p.requires_grad:
                    found = safe_get_full_grad(p)
                    gradients[name] = torch.zeros(0) if found is None else found.clone()
        step()

    engine.engine.step = keep_gradients
    result = engine.step(micro, 0)
    engine.engine.step = step
    return {"loss": result.loss, "grad_norm": result.grad_norm, "gradients": gradients}


def _evaluate(engine: Any) -> None:
    """A forward pass of the student as the trainer's evaluation makes it, between two steps."""
    from linearard.capture import AttentionPass
    from linearard.layout import whole_sequence

    ids, positions, segments = whole_sequence(_batch()["input_ids"], engine.context.device)
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
            engine.step([{key: value[i : i + 1] for key, value in _batch(step).items()} for i in range(ROWS)], step)
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
        engine = _build(_case(recipe, "replica", "recompute", 2), models, folder / f"{recipe[0]}{side}", context)
        part, called = getattr(engine, side), set()
        causal = getattr(part, "decoder", part).causal
        for name, module in causal.named_modules():
            module.register_forward_hook(lambda *args, name=name, called=called: called.add(name))
        rows = {0}  # of matrices with a column for each token of the vocabulary
        with _Results(lambda x, rows=rows: rows.add(len(x)) if x.dim() == 2 and x.shape[1] == VOCAB else None):
            engine.step([_batch()], 0)
        found[recipe, side] = called, max(rows)
    return found


def _alive(models: dict[str, str], folder: Path, context: Any) -> dict[tuple[str, int], tuple[int, list[int]]]:
    """(teacher.tensors, layers) -> live tensors as large as a layer's q, k or v: at most, and when its loss begins.

    The second number leaves out the teacher's tensors that wait for their layer (offload: on the host).
    """
    found = {}
    for layers in DEPTHS:
        for tensors in ("keep", "recompute", "offload"):
            case = _case(f"{layers} layers", "shared", tensors, 1)
            engine = _build(case, models, folder / f"{tensors}{layers}", context)
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
                engine.step([_batch()], 0)
            found[tensors, layers] = (census.peak, at_loss)
    return found


def _steps(cases: list[Case], models: dict[str, str], out: str, size: int) -> None:
    """Worker: the lean steps and, in one process, the plain ones; then what else is seen on this number of ranks."""
    from linearard import head_loss, parallel

    head_loss.CHUNK_LOGITS = 20 * VOCAB  # several chunks a step
    context = parallel.initialize(size)
    folder = Path(out)
    saved: dict[str, Any] = {}
    if size == 1:
        saved |= {"alive": _alive(models, folder, context), "computed": _computed(models, folder, context)}
    if size == 2:
        saved["traces"] = {_name(case): _traces(_build(case, models, folder / "trace", context)) for case in TRACED}
    for number, case in enumerate(cases):
        engine = _build(case, models, folder / str(number), context)
        if case["recipe"] == NEXT:
            assert engine._teacher.decoder is engine._decoder, "a replica is there that nothing needs"
        saved[_name(case)] = _lean_step(engine, case.get("accumulation", 1))
    if size == 1:
        for recipe in sorted({case["recipe"] for cases in WORLDS.values() for case in cases}):
            settings = RECIPES[recipe]
            kind = "shared" if settings.get("training", {}).get("trainable", "lora") == "lora" else "replica"
            case = _case(recipe, kind, "keep", 1, False)
            saved[recipe] = _plain_step(_build(case, models, folder / recipe.replace("/", " "), context))
    if context.is_main:
        torch.save(saved, folder / "saved.pt")
    context.barrier()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for number, (name, recipe) in enumerate(RECIPES.items()):
        shape = {"num_hidden_layers": 3, **recipe.get("model", {})}
        found[name] = str(tiny_model(recipe.get("kind", "llama"), folder / str(number), **shape))
    return found


@pytest.fixture(scope="module")
def saved(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the workers found, by number of ranks."""
    found = {}
    for size, cases in WORLDS.items():
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        run(size, _steps, folder, cases, models, str(folder), size)
        found[size] = torch.load(folder / "saved.pt", weights_only=False)
    return found


@pytest.mark.parametrize("size", list(WORLDS), ids=lambda size: f"P{size}")
def test_the_lean_step_is_the_plain_step(size: int, saved: dict[int, dict[str, Any]]) -> None:
    for case in WORLDS[size]:
        plain, lean, name = saved[1][case["recipe"]], saved[size][_name(case)], _name(case)
        gradients = plain["gradients"]
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
        assert norm > 0.01, name  # the case says something
        assert lean["loss"] == pytest.approx(plain["loss"], rel=1e-6), name
        assert lean["grad_norm"] == pytest.approx(norm, rel=1e-6), name
        assert lean["gradients"].keys() == gradients.keys(), name
        for key, gradient in gradients.items():
            difference = (lean["gradients"][key] - gradient).norm().item()
            # In single tensors fp32's rounding shows: sums of another order differ by up to 8e-7.
            assert difference <= 2e-6 * max(gradient.norm().item(), 1e-2 * norm), (name, key)
        whole = torch.stack([(lean["gradients"][key] - g).double().norm() for key, g in gradients.items()]).norm()
        assert whole <= 1e-6 * norm, name


def test_nothing_is_computed_that_no_term_needs(saved: dict[int, dict[str, Any]]) -> None:
    for (recipe, side), (called, rows) in saved[1]["computed"].items():
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


def test_what_is_alive_does_not_grow_with_the_layers(saved: dict[int, dict[str, Any]]) -> None:
    """Beside one layer's q, k, v of student and teacher: the gradients of q, k, v that come from behind."""
    alive = saved[1]["alive"]
    for layers in DEPTHS:
        for tensors in ("keep", "recompute", "offload"):
            assert alive[tensors, layers][1] == [6] + [9] * (layers - 1), tensors
    few, many = DEPTHS
    assert alive["recompute", few][0] == alive["recompute", many][0] <= 15
    for tensors in ("keep", "offload"):  # the census sees what waits for its layer; offload: on the host
        assert alive[tensors, many][0] - alive[tensors, few][0] == 3 * (many - few)


def test_zero3_keeps_its_trace_of_the_modules(saved: dict[int, dict[str, Any]]) -> None:
    """From the third step on DeepSpeed prefetches by a complete trace, of the student and of a replica.

    An evaluation comes after the third step: what it calls is no step, the student's trace is made once more.
    """
    for name, trace in saved[2]["traces"].items():
        assert sum(trace["lost"][:3]) == sum(trace["lost"][4:]) == 0, (name, trace)
        assert all(trace["complete"][2]) and all(trace["complete"][5]), (name, trace)
        assert len(trace["complete"][2]) == (2 if "teacher replica" in name else 1), name
