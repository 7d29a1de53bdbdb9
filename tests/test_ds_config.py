"""The DeepSpeed JSON: conflicts are refused, the rest is completed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from changed_config import changed, refusal

from linearard import ds_config
from linearard.config import Config, from_dict
from linearard.errors import UserError


def _ds(tmp_path: Path, raw: dict[str, Any], content: Any) -> Config:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return from_dict(changed(raw, {"deepspeed": str(path)}))


ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({**ZERO3, "train_micro_batch_size_per_gpu": 4}, r'^train\.micro_batch_size: 1 contradicts .*: 4 in .*"auto"'),
        ({**ZERO3, "gradient_accumulation_steps": 2}, r"^train\.gradient_accumulation_steps: 1 contradicts .*: 2"),
        ({**ZERO3, "gradient_clipping": 1.0}, r"^train\.gradient_clipping: 0\.5 contradicts gradient_clipping: 1\.0"),
        ({**ZERO3, "sequence_parallel_size": 2}, r"^parallel\.sequence_parallel_size: 1 contradicts"),
        ({**ZERO3, "bf16": {"enabled": True}}, r"^model\.precision: fp32 contradicts bf16\.enabled: True"),
        ({**ZERO3, "bf16": True}, r"^deepspeed: .*bf16 must be an object"),
        ({**ZERO3, "fp16": {"enabled": True}}, r"^deepspeed: .*fp16 is not supported; remove it"),
        ({**ZERO3, "fp16": False}, r"^deepspeed: .*fp16 must be an object"),
        ({**ZERO3, "optimizer": {"type": "AdamW"}}, r"^deepspeed: .*remove optimizer; it is set by train\.learn"),
        ({**ZERO3, "scheduler": {"type": "WarmupLR"}}, r"^deepspeed: .*remove scheduler; it is set by train\.warmup"),
        ({**ZERO3, "train_batch_size": 16}, r"^deepspeed: .*remove train_batch_size; it is set by train\.micro"),
        ({**ZERO3, "prescale_gradients": True}, r"^deepspeed: .*remove prescale_gradients"),
        ({"zero_optimization": {"stage": 0}}, r"^deepspeed: .*stage must be 1, 2 or 3"),
        ({"zero_optimization": True}, r"^deepspeed: .*stage must be 1, 2 or 3"),
        ({}, r"^deepspeed: .*stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "reduce_scatter": False}}, r"^deepspeed: .*reduce_scatter must be true"),
        ("[1, 2]", r"^deepspeed: .*must hold a JSON object"),
        ("{'stage': 3}", r"^deepspeed: .*cannot be read as JSON"),
    ],
)
def test_conflicting_deepspeed_files(tmp_path: Path, raw: dict[str, Any], content: Any, expected: str) -> None:
    config = _ds(tmp_path, raw, content)
    with pytest.raises(UserError, match=expected) as refused:
        ds_config.complete(config)
    assert "\n" not in str(refused.value)


def test_missing_deepspeed_file(raw: dict[str, Any]) -> None:
    message = refusal(changed(raw, {"deepspeed": "nowhere.json"}))
    assert message == "deepspeed: nowhere.json: no such file; name one of ds_configs/*.json"


def test_agreeing_values_are_accepted_and_the_rest_completed(tmp_path: Path, raw: dict[str, Any]) -> None:
    content = {
        **ZERO3,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "optimizer": "auto",
        "steps_per_print": 7,
    }
    done = ds_config.complete(_ds(tmp_path, raw, content))
    assert done["train_micro_batch_size_per_gpu"] == 1 and done["gradient_accumulation_steps"] == 1
    assert done["gradient_clipping"] == 0.5 and done["sequence_parallel_size"] == 1
    assert done["zero_optimization"] == {"stage": 3, "reduce_scatter": True}
    assert done["bf16"] == {"enabled": False} and done["steps_per_print"] == 7
    assert not {"fp16", "optimizer", "scheduler", "train_batch_size"} & set(done)
    assert ds_config.zero_stage(done) == 3
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    teacher = ds_config.inference_only(ds_config.complete(_ds(tmp_path, raw, {"zero_optimization": zero})))
    assert set(teacher["zero_optimization"]) == {"stage", "offload_param", "reduce_scatter"}
