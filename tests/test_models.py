"""One optimizer step of each kind of model against a dense fp64 step written here, and the RoPE of every type.

The reference is plain transformers in float64 with a dense attention function of this file: it shares with the trainer
the weights, the batch and Hugging Face's RoPE configuration, nothing else.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import NATIVE, SEQ_LEN, VOCAB, batch, ds_json, raw_config, run, tiny_model
from torch import nn

Case = dict[str, Any]
Stepped = dict[str, tuple[Case, Path, dict[str, Any]]]
LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0, 1.5, 2.0, 4.0]}
LONGROPE |= {"long_factor": [1.0, 2.0, 5.0, 8.0]}
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


# ------------------------------------------------------------------------------------------ the reference


def _pieces(segment_ids: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the pieces that documents and windows share (-1: padding), and positions in them; token by token."""
    ids, positions = torch.full_like(segment_ids, -1), torch.zeros_like(segment_ids)
    for row in range(len(segment_ids)):
        piece = position = -1
        for i in range(segment_ids.shape[1]):
            if i == 0 or segment_ids[row, i] != segment_ids[row, i - 1] or i % window == 0:
                piece, position = piece + 1, -1
            position += 1
            positions[row, i] = position
            if segment_ids[row, i] >= 0:
                ids[row, i] = piece
    return ids, positions


def _visible(ids: torch.Tensor) -> torch.Tensor:
    """[B, T, T]: a row sees keys of its own id at or before it; padding sees itself."""
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    return causal & same | torch.eye(ids.shape[1], dtype=torch.bool)


class _Dense:
    """Attention over explicit matrices; keeps the q, k, v of each layer and the scale of the logits."""

    def __init__(self) -> None:
        self.visible = torch.ones(0)
        self.layers: dict[int, tuple[torch.Tensor, ...]] = {}
        self.scales: set[float] = set()

    def __call__(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        self.layers[module.layer_idx] = (q, k, v)
        self.scales.add(scaling)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~self.visible[:, None], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    def run(self, model: nn.Module, weights: dict[str, torch.Tensor], visible: torch.Tensor, **inputs: Any) -> Any:
        """Logits and the tensors of each layer."""
        self.visible, self.layers = visible, {}
        output = torch.func.functional_call(model, weights, kwargs={**inputs, "use_cache": False})
        return output.logits, self.layers


def _kl_rows(student: tuple[Any, Any], teacher: tuple[Any, Any], scale: float, visible: torch.Tensor) -> torch.Tensor:
    """KL of each row, [B, H, T]; each side (x, y) gives the logits scale * x y^T."""

    def log_p(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y.repeat_interleave(x.shape[1] // y.shape[1], 1)
        return (scale * x @ y.transpose(-1, -2)).masked_fill(~visible[:, None], float("-inf")).log_softmax(-1)

    ours, theirs = log_p(*student), log_p(*teacher)
    terms = theirs.exp() * (theirs - ours)
    return torch.where(visible[:, None], terms, 0.0).sum(-1)


def _reference(case: Case, model: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Loss, terms and gradients of the second step, in float64 by autograd over dense matrices."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    dense = _Dense()
    AttentionInterface.register("dense_of_the_test", dense)
    AttentionMaskInterface.register("dense_of_the_test", lambda *args, **kwargs: None)
    raw = _raw(case, model, model.parent / "reference")
    settings, objective = raw["model"], case["objective"]
    native = AutoConfig.from_pretrained(model)
    stretched = AutoConfig.from_pretrained(model)
    stretched.rope_parameters = {"rope_theta": 100.0, **settings["rope_parameters"]}
    if settings["rope_parameters"]["rope_type"] in ("yarn", "llama3"):
        stretched.rope_parameters["original_max_position_embeddings"] = NATIVE
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=torch.float64, attn_implementation="dense_of_the_test"
        ).requires_grad_(False)
        for config in (stretched, native)
    )
    leaves = {name: value.double().requires_grad_() for name, value in saved["weights"].items()}
    weights = dict(leaves)
    if settings["trainable"] == "lora":
        factor = settings["lora"]["alpha"] / settings["lora"]["r"]
        base, weights = dict(student.named_parameters()), {}
        for name, a in leaves.items():
            if ".lora_A." in name:
                b = leaves[name.replace(".lora_A.", ".lora_B.")]
                plain = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
                weights[plain] = base[plain] + factor * (b @ a)
        assert 2 * len(weights) == len(leaves)

    data = _batches()[1]
    documents, labels = data["segment_ids"], data["labels"]
    window = case.get("teacher", {}).get("window", NATIVE)
    pieces, positions = _pieces(documents, SEQ_LEN if window == "full" else window)
    rows = pieces >= 0
    count = {"relations": int(rows.sum()), "labels": int((labels >= 0).sum())}
    ids = data["input_ids"]
    logits, ours = dense.run(student, weights, _visible(documents), input_ids=ids, position_ids=data["position_ids"])
    with torch.no_grad():
        of_teacher, theirs = dense.run(teacher, {}, _visible(pieces), input_ids=ids, position_ids=positions)
    (scale,) = dense.scales
    chosen = objective.get("layers", "all")
    chosen = {"all": sorted(ours), "last": [max(ours)]}[chosen] if isinstance(chosen, str) else chosen
    per_layer: dict[str, list[torch.Tensor]] = {}
    for name, weight in objective["relations"].items():
        if not weight:
            continue
        x, y = ("qkv".index(letter) for letter in name)
        for layer in chosen:
            student_side, teacher_side = (side[layer] for side in (ours, theirs))
            value = _kl_rows(
                (student_side[x], student_side[y]), (teacher_side[x], teacher_side[y]), scale, _visible(pieces)
            )
            heads = value.shape[1]
            mean = torch.where(rows[:, None], value, 0.0).sum() / (heads * count["relations"])
            per_layer.setdefault(name, []).append(mean)
    loss = sum(
        (objective["relations"][name] * sum(values) / len(values) for name, values in per_layer.items()),
        torch.zeros((), dtype=torch.float64),
    )
    log_p = logits.log_softmax(-1)
    next_token = F.nll_loss(log_p.flatten(0, 1), labels.flatten(), ignore_index=-100)
    theirs_log = of_teacher.log_softmax(-1)
    kl = ((theirs_log.exp() * (theirs_log - log_p)).sum(-1) * (labels >= 0)).sum() / count["labels"]
    loss = loss + objective["next_token"] * next_token + objective["logits_kl"] * kl
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    return {
        "loss": loss.item(),
        "per_layer": {name: [value.item() for value in values] for name, values in per_layer.items()},
        "next_token": next_token.item(),
        "logits_kl": kl.item(),
        "gradients": {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in gradients.items()},
        "tokens": count["relations"],
    }


# ------------------------------------------------------------------------------------------- one step


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
    expected, found = _reference(case, model, saved), saved["result"]
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
    expected, found = _reference(case, model, saved), saved["result"]
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


# -------------------------------------------------------------------------------------------------- RoPE

TYPES: dict[str, tuple[dict[str, Any], int]] = {  # rope_parameters, max_position_embeddings of the student
    "linear": (LINEAR, 128),
    "yarn": (YARN, 64),
    "yarn with its own attention factor": ({**YARN, "attention_factor": 1.5}, 64),
    "llama3": (LLAMA3, 128),
    "longrope": (LONGROPE, 128),
    "dynamic": ({"rope_type": "dynamic", "factor": 8.0}, NATIVE),  # reads it as the native length: it must stay
    "linear with another base": ({**LINEAR, "rope_theta": 1000.0}, 128),
}


def _native(**changes: Any) -> Any:
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 100.0}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": VOCAB, "max_position_embeddings": NATIVE, "rope_parameters": rope}
    return LlamaConfig(**{**shape, **changes})


def _rotary(config: Any) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config=config)


def _switched(rope_parameters: dict[str, Any], length: int) -> tuple[nn.Module, Any, Any]:
    """(a rotary with a switch in it, the switch, the student's configuration)."""
    from linearard.models.rope import RopeSwitch, scaled_config

    native = _native()
    scaled = scaled_config(native, rope_parameters, "refuse")
    holder = nn.Module()
    holder.rotary_emb = _rotary(native)
    return holder.rotary_emb, RopeSwitch(holder, native, scaled, length, torch.device("cpu")), scaled


def _equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", TYPES)
def test_frequencies_are_hugging_face_s_own_at_the_training_length(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    parameters, longest = TYPES[name]
    rotary, switch, scaled = _switched(parameters, SEQ_LEN)
    x, positions = torch.zeros(1), torch.arange(SEQ_LEN)[None]
    assert scaled.max_position_embeddings == longest
    assert parameters.items() <= scaled.rope_parameters.items()
    scaled.save_pretrained(tmp_path)
    for config in (scaled, AutoConfig.from_pretrained(tmp_path)):  # as it is, and as an exported folder gives it
        assert _equal(rotary(x, positions), _rotary(config)(x, positions))
    native = _rotary(_native())(x, positions)
    assert not _equal(rotary(x, positions), native)
    with switch.native():
        assert _equal(rotary(x, positions), native)
    assert not _equal(rotary(x, positions), native)


@pytest.mark.parametrize("name", TYPES)
def test_a_shard_rotates_as_the_whole_sequence_does(name: str) -> None:
    rotary, _, scaled = _switched(TYPES[name][0], SEQ_LEN)
    x, positions = torch.zeros(1), torch.arange(SEQ_LEN)[None]
    whole = rotary(x, positions)
    for start in (48, 0, 16):  # not in order: no state is left behind by an earlier shard
        part = slice(start, start + 16)
        assert _equal(rotary(x, positions[:, part]), tuple(t[:, part] for t in whole))
    if name in ("dynamic", "longrope"):  # what Hugging Face's own would do with the first shard
        first = _rotary(scaled)(x, positions[:, :16])
        assert not _equal(first, tuple(t[:, :16] for t in whole))


@pytest.mark.parametrize("name", ["linear", "yarn", "dynamic", "longrope"])
def test_casting_the_model_does_not_round_the_frequencies(name: str) -> None:
    from transformers import LlamaForCausalLM

    from linearard.models.rope import RopeSwitch, scaled_config

    native = _native()
    scaled = scaled_config(native, TYPES[name][0], "refuse")
    model = LlamaForCausalLM(native)
    switch = RopeSwitch(model, native, scaled, SEQ_LEN, torch.device("cpu"))
    positions = torch.arange(SEQ_LEN)[None]
    before = model.model.rotary_emb(torch.zeros(1), positions)
    model.bfloat16()
    assert _equal(model.model.rotary_emb(torch.zeros(1), positions), before)
    rounded = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    assert rounded[0].dtype == torch.bfloat16 and _equal(rounded, tuple(t.bfloat16() for t in before))
    with switch.native():
        expected = _rotary(_native())(torch.zeros(1), positions)
        assert _equal(model.model.rotary_emb(torch.zeros(1), positions), expected)


def test_a_replica_keeps_the_native_rope() -> None:
    rotary, switch, _ = _switched(LINEAR, SEQ_LEN)
    switch.make_native()
    x, positions = torch.zeros(1), torch.arange(SEQ_LEN)[None]
    expected = _rotary(_native())(x, positions)
    assert _equal(rotary(x, positions), expected)
    with switch.native():
        assert _equal(rotary(x, positions), expected)
    assert _equal(rotary(x, positions), expected)


def test_a_model_with_several_rotary_embeddings_is_refused() -> None:
    from linearard.errors import UserError
    from linearard.models.rope import RopeSwitch, scaled_config

    native = _native()
    holder = nn.ModuleList([nn.Module(), nn.Module()])
    for module in holder:
        module.rotary_emb = _rotary(native)
    with pytest.raises(UserError, match="expected one rotary embedding shared by all layers, found 2"):
        RopeSwitch(holder, native, scaled_config(native, LINEAR, "refuse"), SEQ_LEN, torch.device("cpu"))
