"""`rope_parameters` for the tiny models, with Hugging Face's own keys; heads of 8 channels, native window of 16."""

from __future__ import annotations

LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0, 1.5, 2.0, 4.0]}
LONGROPE |= {"long_factor": [1.0, 2.0, 5.0, 8.0]}
