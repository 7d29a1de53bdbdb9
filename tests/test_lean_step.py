"""The lean step against a plain one: everything kept, all logits, nothing skipped.

The plain step is autograd over full logits and all layers' q, k, v at once, in one process and without DeepSpeed's
backward. Whatever a lean step recomputes, offloads, skips or cuts into chunks, and on however many ranks, its loss and
every gradient must be the plain step's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import VOCAB, run
from lean_recipes import (
    ALL_TERMS,
    HEAD,
    NEXT,
    NORMS,
    ONE_PASS,
    QKV,
    RECIPES,
    RELATIONS,
    ROWS,
    TIED,
    Case,
    build,
    case_of,
    name_of,
    one_batch,
    write_models,
)

WORLDS: dict[int, list[Case]] = {  # ranks = P -> lean steps (4 ranks: test_parity)
    1: [
        case_of(RELATIONS, "shared", "recompute", 3),
        case_of(RELATIONS, "replica", "offload", 1, False),
        case_of(ONE_PASS, "shared", "recompute", 3, False),
        case_of(ONE_PASS, "replica", "keep", 2),
        case_of(ALL_TERMS, "replica", "recompute", 3),
        case_of(ALL_TERMS, "shared", "offload", 3),
        case_of(TIED, "replica", "recompute", 2, False),
        case_of(QKV, "replica", "recompute", 2),
        case_of(NORMS, "replica", "recompute", 3),
        case_of(NEXT, "replica", "recompute", 3),
        case_of(HEAD, "replica", "keep", 3, False),
    ],
    2: [
        case_of(RELATIONS, "shared", "recompute", 3, accumulation=2),
        case_of(RELATIONS, "replica", "recompute", 1, False, relation_parallel="heads"),
        case_of(ONE_PASS, "shared", "recompute", 3),
        case_of(ONE_PASS, "replica", "offload", 3, relation_parallel="sequence"),
        case_of(HEAD, "shared", "offload", 3),
        case_of(TIED, "replica", "recompute", 3),
        case_of(QKV, "replica", "recompute", 3),
        case_of(NORMS, "replica", "recompute", 2, False),
    ],
}


def _plain_step(engine: Any) -> dict[str, Any]:
    """Loss and gradients by autograd over everything at once."""
    from relation_kl import attention_kl, relation_kl

    from linearard.capture import AttentionPass
    from linearard.layout import cut

    objective, context = engine.config.objective, engine.context
    part = cut(one_batch(), engine.window, engine.local_windows, False, context)
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

    whole, size = one_batch(), ROWS // accumulation
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


def _steps(cases: list[Case], models: dict[str, str], out: str, size: int) -> None:
    """Worker: the lean steps and, in one process, the plain ones."""
    from linearard import head_loss, parallel

    head_loss.CHUNK_LOGITS = 20 * VOCAB  # several chunks a step
    context = parallel.initialize(size)
    folder = Path(out)
    saved: dict[str, Any] = {}
    for number, case in enumerate(cases):
        engine = build(case, models, folder / str(number), context)
        if case["recipe"] == NEXT:
            assert engine._teacher.decoder is engine._decoder, "a replica is there that nothing needs"
        saved[name_of(case)] = _lean_step(engine, case.get("accumulation", 1))
    if size == 1:
        for recipe in sorted({case["recipe"] for cases in WORLDS.values() for case in cases}):
            settings = RECIPES[recipe]
            kind = "shared" if settings.get("training", {}).get("trainable", "lora") == "lora" else "replica"
            case = case_of(recipe, kind, "keep", 1, False)
            saved[recipe] = _plain_step(build(case, models, folder / recipe.replace("/", " "), context))
    if context.is_main:
        torch.save(saved, folder / "saved.pt")
    context.barrier()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the workers found, by number of ranks."""
    found, models = {}, write_models(tmp_path_factory.mktemp("models"))
    for size, cases in WORLDS.items():
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        run(size, _steps, folder, cases, models, str(folder), size)
        found[size] = torch.load(folder / "saved.pt", weights_only=False)
    return found


@pytest.mark.parametrize("size", list(WORLDS), ids=lambda size: f"P{size}")
def test_the_lean_step_is_the_plain_step(size: int, saved: dict[int, dict[str, Any]]) -> None:
    for case in WORLDS[size]:
        plain, lean, name = saved[1][case["recipe"]], saved[size][name_of(case)], name_of(case)
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
