# SPDX-License-Identifier: Apache-2.0
"""What `generation.py` measures, as data: a scenario is a dict, and a new one is a line here.

| key | what it is |
|---|---|
| `model` | a name in `MARConfig.presets` (random weights), `demo`, or a pipeline's folder |
| `model_settings` | of the configuration, where they are not the preset's |
| `batch_size` | pictures in one call |
| `device` | `cpu` or `cuda` |
| `dtype` | of our weights; the plain reference's are float32 |
| `autocast` | the half precision that the plain reference computes in; None: float32 |
| `settings` | arguments of the pipeline's call, for both; what is not there is the model's own default |
| `ours` | arguments of the pipeline's call, for ours only: what gives other pictures sooner |
| `head` | configuration of another head, ours only, with random weights; None: the model's own |
| `scheduler` | `class` of ours only, from mar_hf or diffusers, and its settings; None: the model's own |
| `compile` | arguments of our pipeline's `compile`; None: it is not compiled |
| `part` | the part that `ratio` compares: `total`, `tokens` (all but the autoencoder), or one of `PARTS` |
| `sampled_steps` | autoregressive steps that are measured; the others are interpolated; None: whole calls |
| `repeats` | pairs of calls |
| `parts_apart` | whole calls are timed without a look inside, which would wait for a GPU; parts are of one call more |
"""

from typing import Any


# The released models' sampling (arXiv:2406.11838), with the 64 steps of the released code's example.
PAPER = {"num_inference_steps": 64, "num_diffusion_steps": 100, "guidance_scale": 2.9}
# Head steps that decrease (DiSA, arXiv:2505.20297), from a timestep that few steps can start from.
ANNEALED = {
    "ours": {"num_diffusion_steps": 50, "head_step_schedule": "linear"},
    "scheduler": {"class": "TokenDDPMScheduler", "max_timestep": 950},
}
SOLVER = {"ours": {"num_diffusion_steps": 20}, "scheduler": {"class": "DPMSolverMultistepScheduler"}}
# One call a token by a head of the same size (EAR, arXiv:2505.07812), in GtR's 32 steps (arXiv:2510.17171).
FEWEST = {
    "ours": {"num_inference_steps": 32, "num_diffusion_steps": 1, "decoding": "gtr"},
    "head": {"head_type": "energy", "head_config": {"num_layers": 6, "hidden_size": 1024}},
}
# A backbone that takes no time and gives the head of the real one conditions of its width.
ONE_LAYER = {"num_encoder_layers": 1, "num_decoder_layers": 1}

DEFAULTS: dict[str, Any] = {
    "model": "demo",
    "model_settings": {},
    "batch_size": 1,
    "device": "cpu",
    "dtype": "float32",
    "autocast": None,
    "settings": {},
    "ours": {},
    "head": None,
    "scheduler": None,
    "compile": None,
    "part": "total",
    "sampled_steps": None,
    "repeats": 3,
    "parts_apart": False,
}
_BASE = {"model": "base", "settings": PAPER, "sampled_steps": 5, "repeats": 5}
_FEWER = {"sampled_steps": 3, "repeats": 3}
# On a CPU, ours: torch's fused attention gains nothing from bfloat16 there, plain matrix products do.
_BF16 = {**_BASE, "dtype": "bfloat16", "model_settings": {"attn_implementation": "eager"}}
_HEAD = {**_BASE, "model_settings": ONE_LAYER, "part": "head", "sampled_steps": 8}
_GPU = {"device": "cuda", "dtype": "bfloat16", "autocast": "bfloat16", "settings": PAPER, "parts_apart": True}
# With CUDA graphs for the head's loop.
_COMPILED = {"compile": {"mode": "reduce-overhead"}}

SCENARIOS: dict[str, dict[str, Any]] = {
    "demo-cpu": {},
    "demo-cpu-batch12": {"batch_size": 12},
    "mar-b-cpu": _BASE,
    "mar-b-cpu-batch4": {**_BASE, **_FEWER, "batch_size": 4},
    "mar-b-cpu-bf16": _BF16,
    "mar-b-cpu-annealed": {**_BASE, **ANNEALED},
    "mar-b-cpu-solver": {**_BASE, **SOLVER},
    "mar-b-cpu-fast": {**_BF16, **ANNEALED},
    "mar-b-cpu-fewest": {**_BASE, **FEWEST},
    "mar-l-cpu": {**_BASE, **_FEWER, "model": "large"},
    "mar-h-cpu": {**_BASE, **_FEWER, "model": "huge"},
    "head-cpu": _HEAD,
    "head-cpu-batch4": {**_HEAD, **_FEWER, "batch_size": 4},
    "head-cpu-bf16": {**_HEAD, "dtype": "bfloat16"},
    **{
        f"gpu-{model[0]}-{batch_size}{suffix}": {**_GPU, **compiled, "model": model, "batch_size": batch_size}
        for model in ("base", "large", "huge")
        for batch_size in (1, 16, 128)
        for suffix, compiled in (("", {}), ("-compiled", _COMPILED))
    },
}
# Several scenarios by one name.
GROUPS: dict[str, list[str]] = {
    "gpu": [name for name in SCENARIOS if name.startswith("gpu-")],
    **{f"gpu-{letter}": [name for name in SCENARIOS if name.startswith(f"gpu-{letter}-")] for letter in "blh"},
}
