"""LinearARD: linear-memory attention-relation distillation of RoPE-scaled language models on DeepSpeed."""

__version__ = "0.1.0"
