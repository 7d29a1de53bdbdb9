"""One optimizer step of each kind of model against a dense fp64 step (`dense_step`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_step import dense_step
from distributed import batch, ds_json, raw_config, run, tiny_model
from rope_types import LINEAR, LLAMA3, YARN
from torch import nn

Case = dict[str, Any]
Stepped = dict[str, tuple[Case, Path, dict[str, Any]]]
ALL = {"qq": 1.0, "kk": 0.7, "vv": 0.5, "qk": 0.3}

# model: changes of `tiny_model`; the other keys are sections of the configuration.
CASES: dict[str, Case] = {
    "llama, grouped heads, all terms": {
        "objective": {"relations": ALL, "next_token": 0.4, "logits_kl": 0.2},
    },
    "llama, one key-value head, odd windows, yarn, two micro-batches": {
        "model": {"num_key_value_heads": 1},
        "training": {"trainable": "qkv", "rope_parameters": YARN},
        "teacher": {"window": 11},
        "train": {"gradient_accumulation_steps": 2},
        "objective": {"relations": {"kk": 1.0, "qk": 0.5}, "next_token": 1.0, "logits_kl": 0.0},
        "stage": 2,
    },
    "llama, no groups, full window, one relation of the last layer": {
        "model": {"num_key_value_heads": 4, "num_hidden_layers": 3},
        "teacher": {"window": "full", "kind": "replica"},
        "objective": {"relations": {"qq": 1.0}, "layers": "last", "next_token": 0.0, "logits_kl": 0.0},
    },
    "mistral, sliding window dropped, two layers of three, llama3 rope": {
        "kind": "mistral",
        "model": {"num_hidden_layers": 3, "sliding_window": 8},
        "training": {
            "disable_sliding_window": True,
            "rope_parameters": LLAMA3,
            "lora": {"r": 3, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj", "o_proj"]},
        },
        "objective": {"relations": {"vv": 2.0, "qq": 0.5}, "layers": [0, 2], "next_token": 0.0, "logits_kl": 0.5},
        "stage": 1,
    },
    "qwen2, biases, q/k/v trained, only values": {
        "kind": "qwen2",
        "training": {"trainable": "qkv", "gradient_checkpointing": False},
        "objective": {"relations": {"vv": 1.0}, "next_token": 0.3, "logits_kl": 0.0},
    },
    "qwen2, tied embeddings, everything trained": {
        "kind": "qwen2",
        "model": {"tie_word_embeddings": True},
        "training": {"trainable": "full"},
        "teacher": {"window": 24},
        "objective": {"relations": {"qk": 1.0, "vv": 0.4}, "next_token": 0.6, "logits_kl": 0.3},
    },
    "qwen3, own head size, q/k norms, everything trained": {
        "kind": "qwen3",
        "model": {"head_dim": 16},
        "training": {"trainable": "full"},
        "objective": {"relations": ALL, "next_token": 0.5, "logits_kl": 0.0},
        "stage": 1,
    },
    "qwen3, lora, only the distillation of logits": {
        "kind": "qwen3",
        "model": {"head_dim": 16, "num_key_value_heads": 1},
        "objective": {"relations": {}, "next_token": 0.0, "logits_kl": 1.0},
    },
    "llama, only the next token": {
        "training": {"trainable": "full"},
        "objective": {"relations": {"qq": 0.0}, "next_token": 1.0, "logits_kl": 0.0},
        "stage": 2,
    },
}
BF16 = "bf16"  # the first case again in bf16


def _raw(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    raw = raw_config(
        model,
        folder,
        deepspeed=ds_json(folder, case.get("stage", 3)),
        teacher=case.get("teacher", {}),
        objective=case["objective"],
    )
    raw["objective"] = case["objective"]
    raw["model"] |= case.get("training", {})
    raw["train"] |= {"learning_rate": 3e-2, **case.get("train", {})}
    raw["train"]["micro_batch_size"] = 2 // raw["train"].get("gradient_accumulation_steps", 1)
    return raw


def _batches() -> list[dict[str, torch.Tensor]]:
    """Two steps of two rows: three packed documents a row, shorter and longer than the teacher's window, padding."""
    generator = torch.Generator().manual_seed(5)
    return [batch(generator, 2), batch(generator, 2)]


# -------------------------------------------------------------------------------------------- the trainer


def _engine_steps(cases: dict[str, Case], models: dict[str, str], out: str) -> None:
    """Worker: two steps of each case; saves what the second started from and what it gave."""
    from deepspeed.utils import safe_get_full_fp32_param

    from linearard import config as configuration
    from linearard import parallel
    from linearard.engine import Engine
    from linearard.models.student import load_model_config
    from linearard.trainer import check_run

    context = parallel.initialize(1)
    for number, (name, case) in enumerate(cases.items()):
        folder = Path(out) / str(number)
        config = configuration.from_dict(_raw(case, Path(models[name]), folder))
        configuration.check(config)
        native = load_model_config(config.model)
        check_run(config, native)
        engine = Engine(config, native, context)
        trained = {key: p for key, p in engine.module.named_parameters() if p.requires_grad}
        size = config.train.micro_batch_size
        saved: dict[str, Any] = {"trained": list(trained)}
        step_of_deepspeed = engine.engine.step
        for number_of_step, whole in enumerate(_batches()):
            micro = [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, 2, size)]
            if number_of_step == 1:
                saved["weights"] = {key: safe_get_full_fp32_param(p).clone() for key, p in trained.items()}
                engine.engine.step = partial(_keep_gradients, engine.engine, step_of_deepspeed, trained, saved)
            saved["result"] = engine.step(micro, number_of_step)
        if name == BF16:
            saved["rotary"] = engine.rope._forward(torch.zeros(1, dtype=torch.bfloat16), torch.arange(4096)[None])
        if number == 0:
            engine.engine.step = step_of_deepspeed
            saved["not finite"] = _not_finite(engine, trained)
        torch.save(saved, folder / "saved.pt")


def _keep_gradients(deepspeed: Any, step: Any, trained: dict[str, nn.Parameter], saved: dict[str, Any]) -> None:
    """DeepSpeed's step; before the one that moves the weights the gradients are saved."""
    from deepspeed.utils import safe_get_full_grad

    if deepspeed.is_gradient_accumulation_boundary():
        saved["gradients"] = {key: safe_get_full_grad(p).clone() for key, p in trained.items()}
    step()


def _not_finite(engine: Any, trained: dict[str, nn.Parameter]) -> list[str]:
    """Messages of steps whose gradient, then whose loss, is not finite; weights must stay."""
    from deepspeed.utils import safe_get_full_fp32_param

    def weights() -> torch.Tensor:
        return torch.cat([safe_get_full_fp32_param(p).flatten().clone() for p in trained.values()])

    def spoil(loss_too: bool) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:  # the teacher's pass
                return output
            output.register_hook(lambda gradient: gradient * float("inf"))
            return output * float("nan") if loss_too else output

        return hook

    before, messages = weights(), []
    norm = next(module for name, module in engine.module.named_modules() if name.endswith("model.norm"))
    for loss_too in (False, True):
        handle = norm.register_forward_hook(spoil(loss_too))
        try:
            engine.step(_batches()[:1], 2)
        except FloatingPointError as error:
            messages.append(str(error))
        handle.remove()
        assert torch.equal(weights(), before)
    return messages


# ------------------------------------------------------------------------------------------- one step


def _reference(case: Case, model: Path, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The second step."""
    return dense_step(_raw(case, model, model.parent / "reference"), model, weights, _batches()[1])


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Stepped:
    """name -> (case, model, what the worker saved); all cases in one process."""
    folder = tmp_path_factory.mktemp("models")
    first = next(iter(CASES.values()))
    cases = {**CASES, BF16: {**first, "training": {"precision": "bf16"}}}
    models = {
        name: tiny_model(case.get("kind", "llama"), folder / f"model{number}", **case.get("model", {}))
        for number, (name, case) in enumerate(cases.items())
    }
    out = folder / "run"
    run(1, _engine_steps, out, cases, {name: str(path) for name, path in models.items()}, str(out))
    return {
        name: (case, models[name], torch.load(out / str(number) / "saved.pt", weights_only=False))
        for number, (name, case) in enumerate(cases.items())
    }


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_dense_fp64_step(name: str, stepped: Stepped) -> None:
    case, model, saved = stepped[name]
    expected, found = _reference(case, model, saved["weights"]), saved["result"]
    objective = case["objective"]
    assert found.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert found.relation_loss_per_layer.keys() == expected["per_layer"].keys()
    for relation, values in expected["per_layer"].items():
        assert found.relation_loss_per_layer[relation] == pytest.approx(values, rel=1e-5)
        assert found.relation_loss[relation] == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert min(values) > 1e-4  # the case says something: the student has left the teacher
    for value, term in ((found.next_token_loss, "next_token"), (found.logits_kl, "logits_kl")):
        if objective[term]:
            assert value == pytest.approx(expected[term], rel=1e-5)
        else:
            assert value is None
    assert found.tokens == expected["tokens"]
    assert saved["gradients"].keys() == expected["gradients"].keys()
    square = 0.0
    for key, gradient in expected["gradients"].items():
        difference = (saved["gradients"][key].double() - gradient).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-7, key
        square += float(gradient.norm() ** 2)
    assert square > 0
    assert found.grad_norm == pytest.approx(square**0.5, rel=1e-4)


def test_which_parameters_are_trained(stepped: Stepped) -> None:
    def modules(name: str) -> set[str]:
        parts = [key.replace(".default.weight", "").split(".") for key in stepped[name][2]["trained"]]
        return {".".join(p for p in part[-2:]) for part in parts}

    lora = modules("mistral, sliding window dropped, two layers of three, llama3 rope")
    assert lora == {f"{p}_proj.lora_{side}" for p in "qvo" for side in "AB"}
    assert modules("qwen2, biases, q/k/v trained, only values") == {
        f"{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")
    }
    everything = stepped["qwen3, own head size, q/k norms, everything trained"]
    assert len(everything[2]["trained"]) == 2 + 2 * 11 + 1  # embeddings and head, layers, last norm


def test_a_step_in_bf16_is_near_the_fp64_step(stepped: Stepped) -> None:
    case, model, saved = stepped[BF16]
    expected, found = _reference(case, model, saved["weights"]), saved["result"]
    assert found.loss == pytest.approx(expected["loss"], rel=2e-2)
    assert found.loss != pytest.approx(expected["loss"], rel=1e-7)  # it really ran in bf16
    square = sum(float(gradient.norm() ** 2) for gradient in expected["gradients"].values())
    assert found.grad_norm == pytest.approx(square**0.5, rel=0.1)


def test_frequencies_of_a_bf16_engine_are_fp32(stepped: Stepped) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    _, model, saved = stepped[BF16]
    config = AutoConfig.from_pretrained(model)
    config.rope_parameters = {"rope_theta": 100.0, **LINEAR}
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(4096)[None])
    assert torch.equal(saved["rotary"][0], cos.bfloat16()) and torch.equal(saved["rotary"][1], sin.bfloat16())


def test_steps_that_are_not_finite_stop_the_run(stepped: Stepped) -> None:
    of_gradient, of_loss = next(iter(stepped.values()))[2]["not finite"]
    assert of_gradient == "gradient norm is inf at step 2; weights are as they were before it"
    assert of_loss == "loss is nan at step 2; weights are as they were before it"
