# SPDX-License-Identifier: Apache-2.0
"""The doors that `fuzz_doors.py` tries: for each a function that makes one case from random numbers."""

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, VQModel
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save, save_file


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from common import MODELS, tiny_config  # noqa: E402
from mar_hf import (  # noqa: E402
    ARConfig,
    ImageTokenizer,
    ImageTokenizerConfig,
    MARConfig,
    MARPipeline,
    TokenDDPMScheduler,
    TokenHead,
)
from mar_hf.cli import main as command  # noqa: E402
from mar_hf.generation import GenerationSettings, build_settings  # noqa: E402
from mar_hf.models import BackboneConfig  # noqa: E402
from mar_hf.models.modeling_backbone import BackboneInputs  # noqa: E402
from mar_hf.tokenizers import NORMALIZERS  # noqa: E402
from mar_hf.training import (  # noqa: E402
    ImageTransform,
    TextEncoderTrainingArguments,
    TokenizerTrainingArguments,
    TrainingArguments,
    load_image_dataset,
    parse_arguments,
)
from tiny_pipelines import FEW_STEPS, NAMES, tiny_kl, tiny_pipeline, tiny_text_pipeline, tiny_transformer  # noqa: E402


GOLDEN = ROOT / "tests" / "parity" / "data" / "mar-tiny"
# A message of the command that tells of an error which nobody expected: `main` puts the kind before these only.
UNEXPECTED = re.compile(r"error: [A-Za-z_.]*(Error|Exception): ")
NAN, INF = math.nan, math.inf
# Configurations of transformers tell of wrong types by an error of their own.
REFUSALS = (ValueError, StrictDataclassError)


class Unclear(Exception):
    """An answer that a door gives without an exception, and that is not clear."""


@dataclasses.dataclass
class Case:
    """One call.

    Args:
        call (`str`): what is done, for people.
        run (`Callable`): does it, and gives the result.
        names (`Sequence[str]`): a clear message has one of them.
        refusals (`tuple[type, ...]`): errors that the door documents.
    """

    call: str
    run: Callable[[], Any]
    names: Sequence[str]
    refusals: tuple[type, ...] = (ValueError,)


class World:
    """What cases are made of: pipelines that are built once, their folders, a new folder for each case.

    Args:
        folder (`Path`): for all files.
        verbose (`bool`, *optional*, defaults to `False`): whether tracebacks are wanted.
    """

    def __init__(self, folder: Path, verbose: bool = False):
        self.folder, self.verbose = folder, verbose
        self._pipelines: dict[str, MARPipeline] = {}
        self.start_case()

    def start_case(self) -> None:
        """An empty folder `self.case`."""
        self.case = self.folder / "case"
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir(parents=True)

    def pipeline(self, kind: str) -> MARPipeline:
        """A tiny pipeline of one of `KINDS`; cases leave it as it is."""
        if kind not in self._pipelines:
            self._pipelines[kind] = KINDS[kind]()
        return self._pipelines[kind]

    def saved(self, kind: str) -> Path:
        """A copy, for the case to spoil, of the folder of such a pipeline."""
        original = self.folder / kind
        if not original.exists():
            self.pipeline(kind).save_pretrained(original)
        return Path(shutil.copytree(original, self.case / kind))


KINDS: dict[str, Callable[[], MARPipeline]] = {
    "mar": tiny_pipeline,
    "ar": lambda: tiny_pipeline(backbone="ar"),
    "kl": lambda: tiny_pipeline(vae=tiny_kl()),
    "categorical": lambda: tiny_pipeline(
        transformer=tiny_transformer(head_type="categorical", head_config={"num_codes": 8}, head_batch_multiplier=1)
    ),
    "text": tiny_text_pipeline,
}


# --- values


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def absurd(rng: Random) -> Any:
    """Anything that has no place here, or happens to have one."""
    numbers = [0, 1, -1, 2, 7, 2**31, 2**63, 10**400, 0.5, 1.5, -0.0, 1e30, 1e-30, NAN, INF, -INF, 1j, True, False]
    others = [Fraction(1, 2), Decimal("0.5"), np.float32(2), np.int64(1), np.array(NAN), np.zeros((2, 2))]
    texts = ["", " ", "x", "1", "\ud800", "a\0b", "x" * 5000, b"x", Path("x")]
    groups = [[], [1], [None], [[0], [1, 2]], (), (0, 1), {}, {"x": 1}, {1, 2}, range(3)]
    things = [None, object(), len, int, seeded(), torch.float32, Image.new("RGB", (8, 8)), torch.nn.Linear(2, 2)]
    shapes = [(), (1,), (0,), (2, 3), (2, 16), (1, 16), (2, 16, 12), (0, 16, 12), (2, 16, 32), (1, 3, 8, 8), (2, 2, 2)]
    return rng.choice(
        [rng.choice(numbers + others), rng.choice(texts), rng.choice(groups + things), some(rng, shapes)]
    )


def some(rng: Random, shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Finite numbers of one of the shapes, mostly floats, seldom without memory."""
    dtype = rng.choice([torch.float32] * 5 + [torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64])
    shape = rng.choice(list(shapes))
    if rng.random() < 0.03:
        return torch.empty(shape, dtype=dtype, device="meta")
    values = torch.randn(shape, generator=seeded(rng.randrange(9)))
    return (values.abs() if dtype == torch.int64 else values).to(dtype)


def show(value: Any) -> str:
    """A value as a person would say it."""
    if isinstance(value, torch.Tensor):
        few = f" {value.tolist()}" if value.numel() < 5 and not value.is_meta else ""
        return f"tensor{tuple(value.shape)} {str(value.dtype)[6:]} {value.device}{few}"
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key!r}: {show(part)}" for key, part in value.items()) + "}"
    elif isinstance(value, (list, tuple)) and len(value) < 5:
        text = f"{type(value).__name__}({', '.join(show(part) for part in value)})"
    elif type(value).__module__.startswith(("diffusers", "transformers", "mar_hf", "torch", "PIL")):
        text = type(value).__name__
    else:
        text = " ".join(repr(value).split())
    return text if len(text) < 120 else f"{text[:100]}... ({len(text)} characters)"


def arguments(rng: Random, good: dict[str, list], base: dict[str, Any] | None = None, most: int = 3) -> dict[str, Any]:
    """Some of the arguments, over those of `base`: half of them of values that may be right, half of any."""
    names = rng.sample(sorted(good), rng.randint(1, min(most, len(good))))
    return {
        **(base or {}),
        **{name: rng.choice(good[name] or [None]) if rng.random() < 0.5 else absurd(rng) for name in names},
    }


def said(function: str, given: dict[str, Any]) -> str:
    """A call in words."""
    return f"{function}({', '.join(f'{name}={show(value)}' for name, value in given.items())})"


def parameters(function: Callable) -> list[str]:
    """Names that a message about a call may name."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "kwargs")]


# --- pipelines


def call(rng: Random, world: World) -> Case:
    """A call of a pipeline."""
    kind = rng.choice(sorted(KINDS))
    pipe = world.pipeline(kind)
    width = pipe.vae.token_dim
    states = [torch.randn(1, 5, 16), torch.full((1, 5, 16), NAN), torch.zeros(2, 1, 16), torch.zeros(1, 17, 16)]
    masks = [torch.ones(1, 5), torch.zeros(1, 5, dtype=torch.bool), torch.ones(2, 1), torch.full((1, 5), NAN)]
    texts = ["a cat", ["a cat", ""], "", " ", "\ud800", ["a", 5], [[]], "x " * 40]
    good = {
        "class_labels": [0, 2, 3, -1, "cat", "kitten", "cat, kitten", "dog", [0, "cat"], [[0], [1]], [None], [0.5]],
        "num_inference_steps": [1, 3, 16, 17, 2.0, "3"],
        "guidance_scale": [1, 1.0, 0, -2.5, 1000, 1001, -1e30, "3"],
        "num_diffusion_steps": [1, 5, 1001, 2.0],
        "guidance_schedule": ["linear", "constant", "cosine"],
        "token_schedule": ["cosine", "constant", "gtr", "linear"],
        "head_step_schedule": ["constant", "linear", "gtr"],
        "decoding": ["gtr", "fast"],
        "detail_share": [0, 0.1, 1, 1.5],
        "temperature": [0, 0.5, 1, 999, 1001, -1],
        "generation_order": ["raster", "random", "spiral", torch.arange(16)[None], torch.zeros(1, 16), [*range(16)]],
        "num_images_per_prompt": [1, 2, 10_001, "2", 1.0],
        "generator": [seeded(), [seeded()], [seeded(), seeded(1)], [seeded(), None], 5],
        "noise": [
            torch.randn(1, 16, 5, width),
            torch.full((1, 16, 5, width), NAN),
            torch.zeros(1, 16, 5, width).long(),
        ],
        "context_noise": [0, 0.5, 1, 1.5],
        "head_kwargs": [{}, {"top_k": 2}, {"top_p": NAN}, {"guidance_refresh": True}, {"guidance_refresh": 2}, {1: 2}],
        "guidance_interval": [(0, 1), (0.5, 0.5), [0.2, 0.8], (NAN, 1), (True, 1), ("0", "1"), torch.tensor([0.0, 1])],
        "guidance_refresh": [1, 2, 100],
        "output_type": ["pil", "np", "pt", "latent", "jpg"],
        "return_dict": [True, False],
        "callback_on_step_end": [
            lambda *_: None,
            lambda *_: {},
            lambda *_: 5,
            lambda *_: {"latents": NAN},
            lambda pipe, step, done, inputs: {name: value * 2 for name, value in inputs.items()},
            lambda pipe, *_: setattr(pipe, "_guidance_scale", NAN),
            lambda pipe, *_: setattr(pipe, "_guidance_scale", "3") or {},
            lambda pipe, *_: setattr(pipe, "_interrupt", True) or {},
        ],
        "callback_on_step_end_tensor_inputs": [["latents"], ["mask"], [], ["x"], "latents", ("latents", "mask"), [[]]],
    }
    base = {"class_labels": 0, "generator": seeded()}
    if kind == "text" or rng.random() < 0.1:
        good |= {"prompt": texts, "negative_prompt": texts, "prompt_embeds": states, "negative_prompt_embeds": states}
        good |= {"prompt_attention_mask": masks, "negative_prompt_attention_mask": masks}
        good |= {"max_sequence_length": [1, 2, 5, 16, 17]}
        base = {"generator": seeded(), "prompt": "a cat"} if rng.random() < 0.7 else {"generator": seeded()}
    if kind == "text" and rng.random() < 0.3:
        names = set(parameters(MARPipeline.encode_prompt)) & good.keys()
        given = arguments(rng, {name: good[name] for name in names}, {"prompt": "a cat"})
        call = said("encode_prompt", given)
        return Case(call, lambda: pipe.encode_prompt(**given), parameters(MARPipeline.encode_prompt))
    given = arguments(rng, good, base)
    return Case(said(f"pipe[{kind}]", given), lambda: pipe(**given), parameters(MARPipeline.__call__))


def constructor(rng: Random, world: World) -> Case:
    """The constructor of a pipeline; what it takes is called."""
    pipe, other = world.pipeline(rng.choice(["mar", "kl"])), world.pipeline("text")
    settings = {
        "num_inference_steps": [1, 17, "3"],
        "num_diffusion_steps": [2, 1001],
        "guidance_scale": [NAN, 2],
        "temperature": ["x", 0.5],
        "generation_order": ["raster", torch.arange(16)[None]],
        "guidance_interval": [[0, 1], [1, 0]],
        "head_kwargs": [{"x": 1}, {"guidance_refresh": 2}],
        "context_noise": [0.5],
        "x": [1],
    }
    good = {
        "transformer": [other.transformer, pipe.transformer.model, None],
        "vae": [other.vae, world.pipeline("kl").vae.autoencoder, None],
        "scheduler": [DDIMScheduler.from_config(pipe.scheduler.config), FlowMatchEulerDiscreteScheduler(), None],
        "text_encoder": [other.text_encoder],
        "tokenizer": [other.tokenizer],
        "id2label": [NAMES, {0: "a", "0": "b"}, {3: "x"}, {-1: "x"}, {1.5: "x"}, {0: None}, {"a": "x"}, {True: "y"}],
        "generation_defaults": [FEW_STEPS, *(arguments(rng, settings, FEW_STEPS, 1) for _ in range(6))],
    }
    base = {"transformer": pipe.transformer, "vae": pipe.vae, "scheduler": pipe.scheduler}
    given = arguments(rng, good, {**base, "generation_defaults": FEW_STEPS}, 2)

    def run() -> Any:
        made = MARPipeline(**given)
        made.set_progress_bar_config(disable=True)
        return made(class_labels=0, generator=seeded(), output_type="pt").images

    shown = {name: value for name, value in given.items() if value is not base.get(name)}
    return Case(said("MARPipeline", shown), run, [*parameters(MARPipeline.__init__), "Scheduler"])


def settings(rng: Random, world: World) -> Case:
    """Settings of generation, given or as a checkpoint's defaults."""
    good = {field.name: [field.default] for field in dataclasses.fields(GenerationSettings)}
    good["generation_order"] += ["raster", torch.arange(4)[None]]
    given = arguments(rng, good)
    if rng.random() < 0.5:
        return Case(said("GenerationSettings", given), lambda: bool(GenerationSettings(**given)), list(good))
    source = given if rng.random() < 0.8 else absurd(rng)
    return Case(f"build_settings({show(source)})", lambda: build_settings(source), ["generation_defaults"])


# --- configurations and their models


def configuration(rng: Random, world: World) -> Case:
    """A configuration; a small model of it computes a condition or a picture."""
    kind = rng.choice(["mar", "ar", "tokenizer"])
    if kind == "tokenizer":
        autoencoder = dict(world.pipeline("kl").vae.config.autoencoder)
        good: dict[str, list] = {
            "autoencoder": [autoencoder, arguments(rng, {name: [] for name in autoencoder}, autoencoder, 2), {}],
            **{"patch_size": [1, 2, 10**6], "normalizer": [*NORMALIZERS], "quantize": [True, False]},
            **{"shift_factor": [0, [0.0] * 3, [0.0] * 4], "scaling_factor": [0.5, 0, NAN, [1.0] * 3, [0, 1, 1]]},
        }
        given = arguments(rng, good)
        cls, base = ImageTokenizerConfig, {}
    else:
        cls = MARConfig if kind == "mar" else ARConfig
        default = tiny_config(kind).to_dict()
        own = BackboneConfig.__annotations__.keys() | cls.__annotations__.keys()
        good = {name: [default[name]] for name in sorted(own & default.keys())}
        good |= {"head_config": [{}, {"num_layers": 1}, {"hidden_size": 0}, {"x": 1}, {"layer_norm_eps": NAN}]}
        good |= {"text_dim": [None, 16], "order": ["raster", "x"], "head_type": ["diffusion", "categorical"]}
        given = arguments(rng, good)
        base = {name: value for name, value in default.items() if name in own}

    def run() -> Any:
        made = cls(**{**base, **given})
        again = cls.from_dict(json.loads(made.to_json_string()))
        numbers = [value for value in vars(again).values() if isinstance(value, int)]
        if max(numbers, default=0) > 1000 or kind == "tokenizer" and again.patch_size > 4:
            return None  # a large model is no fault
        if kind == "tokenizer":
            pixels = torch.zeros(1, getattr(again, "in_channels", 3), 16, 16)
            return ImageTokenizer(again).eval()(pixels)
        model = MODELS[kind](again).eval()
        tokens = torch.ones(1, again.num_tokens, again.token_dim)
        inputs = {"mask": torch.ones(1, again.num_tokens, dtype=torch.bool)} if kind == "mar" else {}
        inputs |= {"orders": torch.arange(again.num_tokens)[None]} if kind == "ar" else {}
        return model(tokens, **inputs)

    return Case(said(cls.__name__, given), run, [*good, "pixel_values"], REFUSALS)


def scheduler(rng: Random, world: World) -> Case:
    """The scheduler: its constructor, and a step."""
    good = {
        "num_train_timesteps": [1, 2, 50, 1000],
        "trained_betas": [[0.1] * 50, [NAN] * 50, [0.0] * 50, ["x"] * 50, torch.full((50,), 0.1), [0.1, [0.2]]],
        "max_timestep": [1, 49, 999, 10.5],
        **{"beta_schedule": ["linear"], "prediction_type": ["sample"], "variance_type": ["fixed"], "clip_sample": [1]},
    }
    given = arguments(rng, good, {"num_train_timesteps": 50}, 2)
    doors = {
        "set_timesteps": {"num_inference_steps": [1, 5, 51], "device": ["cpu", "nowhere"]},
        "step": {
            "model_output": [torch.zeros(2, 8), torch.zeros(2, 4), torch.full((2, 8), 1e30)],
            "timestep": [0, 1000, -1, torch.tensor(0), "0"],
            "sample": [torch.zeros(2, 4)],
            "temperature": [0, 1, -1, NAN],
            "noise": [torch.zeros(2, 4), torch.zeros(3, 4), 5],
            "generator": [seeded(), [seeded()] * 2, [seeded()], 5],
        },
    }
    door = rng.choice(["", *doors])
    if not door:
        return Case(said("TokenDDPMScheduler", given), lambda: len(TokenDDPMScheduler(**given)), list(good))
    base = {"model_output": torch.zeros(2, 8), "timestep": 0, "sample": torch.zeros(2, 4)} if door == "step" else {}
    inputs = arguments(rng, doors[door], base or {"num_inference_steps": 5})

    def run() -> Any:
        made = TokenDDPMScheduler(num_train_timesteps=50)
        if door == "step":
            made.set_timesteps(5)
        return getattr(made, door)(**inputs)

    return Case(said(f"TokenDDPMScheduler().{door}", inputs), run, list(doors[door]))


def tokenizer(rng: Random, world: World) -> Case:
    """The image tokenizer: encode, decode and what they are made of."""
    if rng.random() < 0.2:
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        wholes = [
            world.pipeline("kl").vae.autoencoder,
            AutoencoderTiny(**{f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}, **blocks),
            VQModel(norm_num_groups=4, block_out_channels=(8,)),
            world.pipeline("mar").vae,
            torch.nn.Linear(1, 1),
            None,
            5,
        ]
        good = {"autoencoder": wholes, "patch_size": [1, 2, 0], "scaling_factor": [0.5, 0, [1.0] * 4, [1.0]]}
        good |= {"shift_factor": [0, [0.0] * 4, [NAN] * 4], "normalizer": ["sphere", "x"], "quantize": [True, False]}
        given = arguments(rng, good, {"autoencoder": rng.choice(wholes)})
        names, errors = list(good), REFUSALS
        return Case(
            said("from_autoencoder", given), lambda: ImageTokenizer.from_autoencoder(**given).stride, names, errors
        )
    kind = rng.choice(["mar", "kl"])
    vae, doors = world.pipeline(kind).vae, {}
    pictures = [(1, 3, 8, 8), (2, 3, 4, 8), (1, 3, 7, 8), (1, 1, 8, 8), (0, 3, 8, 8), (3, 8, 8), (1, 3, 0, 8)]
    grids = [(1, 3, 8, 8), (1, 4, 4, 4), (2, 4, 4, 2), (1, 16, 12), (1, 16, 4), (1, 15, 12), (0, 16, 12), (1, 0, 12)]
    doors["encode"] = {
        "pixel_values": [some(rng, pictures), some(rng, pictures)],
        "generator": [seeded(), [seeded()], [seeded()] * 2, 5],
        "sample_posterior": [True, False],
    }
    doors["decode"] = {"latents": [some(rng, grids)]}
    doors["forward"] = {"pixel_values": [some(rng, pictures)]}
    doors["patchify"] = {"latents": [some(rng, grids)]}
    doors["unpatchify"] = {"tokens": [some(rng, grids)], "grid_height": [1, 2, 4, 3, 0, -1, 2.0]}
    doors["sample_moments"] = {
        "mean": [some(rng, grids)],
        "std": [some(rng, grids), None, torch.ones(1, 4, 4, 4)],
        "generator": [seeded(), [seeded()], 5],
    }
    door = rng.choice(sorted(doors))
    first = next(iter(doors[door]))
    base = {first: rng.choice(doors[door][first])} | ({"std": None} if door == "sample_moments" else {})
    given = arguments(rng, doors[door], base)
    return Case(
        said(f"vae[{kind}].{door}", given), lambda: getattr(vae, door)(**given), [*doors[door], "latents", "tokens"]
    )


def forward(rng: Random, world: World) -> Case:
    """The forward of a model: conditions, or, with a scheduler, a loss."""
    kind = rng.choice(["mar", "ar", "text", "categorical"])
    model, noise_scheduler = world.pipeline(kind).transformer, world.pipeline(kind).scheduler
    training, bare = rng.random() < 0.4, rng.random() < 0.2
    tokens, mask = torch.randn(2, 16, 12, generator=seeded()), torch.arange(16).expand(2, 16) > 5
    orders = torch.arange(16).expand(2, 16)
    good = {
        "tokens": [tokens, tokens[:1], tokens[:, :5], tokens.double(), tokens.half(), tokens[0]],
        "class_labels": [torch.tensor([0, 3]), torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0.5, 1]), 0],
        "generator": [seeded(), [seeded()] * 2, [seeded()], [], [None, None], 5],
        "return_dict": [True, False],
        "prompt_embeds": [torch.zeros(2, 4, 16), torch.zeros(1, 4, 16), torch.zeros(2, 17, 16), torch.zeros(2, 4, 8)],
        "prompt_attention_mask": [torch.ones(2, 4), torch.ones(2, 5), torch.zeros(2, 4, dtype=torch.bool)],
    }
    if kind == "ar":
        wrong = [orders.flip(1), orders * 0, orders - 1, orders[:1], orders.float()]
        good |= {"orders": wrong, "tokens_per_step": [[1] * 16, [16], [1], [0, 16], [17], [-1, 17], [8, 8.0], ["x"]]}
        base = {"tokens": tokens, "orders": orders}
    else:
        masks = [mask, ~mask, mask[:1], mask.float(), mask & False, mask | True, torch.eye(2, 16).bool()]
        good |= {"mask": masks, "num_masked": [10, 9, 0, 17, -1]}
        good |= {"positions": [orders[:, :3], orders[:, :3] + 99, orders[:1], orders.float(), orders[0]]}
        base = {"tokens": tokens, "mask": mask}
    names = [*good, *BackboneInputs.__annotations__, "Scheduler"]
    if not bare:
        rows = 2 * 16 * model.config.head_batch_multiplier
        good |= {"noise_scheduler": [noise_scheduler, None, DDPMScheduler(), 5]}
        good |= {"timesteps": [torch.zeros(rows).long(), torch.full((rows,), 1000), torch.zeros(3).long()]}
        good |= {"noise": [torch.zeros(rows, 12), torch.zeros(3, 12)]}
        names = [*names, *good, "scheduler", "mask"]
        base |= {"noise_scheduler": noise_scheduler} if training else {}
    given = arguments(rng, good, base)
    seen = model.model if bare else model

    def run() -> Any:
        try:
            with torch.random.fork_rng():
                return seen.train(training)(**given)
        finally:
            model.eval()

    return Case(said(f"{kind}{'.model' if bare else ''}{'.train()' if training else ''}", given), run, names)


def head(rng: Random, world: World) -> Case:
    """A head's sample and loss."""
    pipe = world.pipeline(rng.choice(["mar", "categorical"]))
    part, schedule = pipe.transformer.head, pipe.scheduler
    condition = torch.randn(2, 3, 32, generator=seeded())
    schedulers = [
        schedule,
        DDIMScheduler.from_config(schedule.config),
        DDPMScheduler(),
        FlowMatchEulerDiscreteScheduler(),
    ]
    if rng.random() < 0.6:
        door, base = "sample", {"condition": condition, "scheduler": schedule, "num_steps": 4, "generator": seeded()}
        good = {
            "condition": [condition, condition[:0], condition[:, :0], condition.double(), condition[0]],
            "negative_condition": [condition, condition[:1], None],
            "guidance_scale": [1, 2.5, -1, 1e30, True],
            "scheduler": schedulers,
            "num_steps": [1, 4, 0, 1001, 2.0],
            "temperature": [0, 0.5, 1, -1, 1e30],
            "noise": [torch.zeros(2, 3, 5, 12), torch.zeros(2, 3, 1, 12), torch.zeros(2, 3, 5, 11), torch.zeros(3)],
            "generator": [seeded(), [seeded()] * 2, [seeded()], [5, 5], 5],
            **{"top_k": [1, 8, 9, 0, 1.5], "top_p": [0.5, 1, 0, 1.5], "guidance_refresh": [1, 2, 0]},
        }
    else:
        door, mask = "loss", torch.ones(2, 3, dtype=torch.bool)
        base = {"condition": condition, "target": torch.zeros(2, 3, 12), "mask": mask, "scheduler": schedule}
        base |= {"generator": seeded()}
        good = {
            "condition": [condition, condition[:1], condition[0]],
            "target": [torch.zeros(2, 3, 12), torch.zeros(2, 2, 12), torch.zeros(2, 3, 11)],
            "mask": [mask, ~mask, mask.float(), mask[:1], mask[0]],
            "scheduler": schedulers,
            "timesteps": [torch.zeros(24).long(), torch.full((24,), 1000), torch.zeros(3).long(), torch.zeros(24)],
            "noise": [torch.zeros(24, 12), torch.zeros(3, 12)],
            "num_masked": [3, 2, 0, 4, -1],
            "generator": [seeded(), [seeded()] * 2, [seeded()], 5],
        }
    given = arguments(rng, good, base)
    names = [
        *parameters(getattr(TokenHead, door)),
        "top_k",
        "top_p",
        "guidance_refresh",
        "Scheduler",
    ]
    return Case(said(f"{type(part).__name__}.{door}", given), lambda: getattr(part, door)(**given), names)


# --- files

JSON_VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**6,
    2**63,
    0.5,
    1e30,
    NAN,
    "",
    "x",
    "../x",
    "\ud800",
    [],
    [1],
    [None],
    {},
    {"x": 1},
]
JSON_FILES = [
    "null",
    "[]",
    "{}",
    "",
    "{",
    "NaN",
    '"x"',
    "1" * 5000,
    "[" * 100_000,
    '{"a": 1, "a": 2}',
    "\0",
    '{"x": Infinity}',
]


def spoil_json(rng: Random, path: Path) -> str:
    """Change one place of a JSON file, or all of it; says how."""
    if rng.random() < 0.15:
        text = rng.choice(JSON_FILES)
        path.write_bytes(b"\xff\xfe\0" if rng.random() < 0.1 else text.encode())
        return f"is {text[:20]!r}"
    whole = node = json.loads(path.read_text(encoding="utf-8"))
    where: list[Any] = []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return "is as it was"
        where.append(key := rng.choice(keys))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.3:
            break
        node = node[key]
    kind = rng.choice(["value", "value", "value", "gone", "renamed", "scaled"])
    if kind == "value":
        node[key] = rng.choice(JSON_VALUES)
    elif kind == "scaled" and isinstance(node[key], (int, float)):
        node[key] *= rng.choice([-1, 2, 1000, 10**9])
    elif kind == "renamed" and isinstance(node, dict):
        node["x"] = node.pop(key)
    else:
        kind = "gone"
        del node[key]
    path.write_text(json.dumps(whole), encoding="utf-8")
    return f"{'.'.join(map(str, where))} {kind} {show(node[key]) if kind in ('value', 'scaled') else ''}"


def spoil_tensors(rng: Random, path: Path) -> str:
    """Change a tensor of a safetensors file, or the file; says how."""
    data, tensors = path.read_bytes(), load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    infinite = tensor.flatten().clone().float()
    infinite[:1] = rng.choice([NAN, INF, 1e30])
    ways: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: data[: rng.randrange(len(data))],
        "empty": lambda: b"",
        "long header": lambda: (2**60).to_bytes(8, "little") + data[8:],
        "broken header": lambda: data[:8] + data[8:].replace(b"shape", b"shapE", 1),
        "no tensors": lambda: save({}),
        "without": lambda: save({key: value for key, value in tensors.items() if key != name}),
        "renamed": lambda: save({f"x.{key}" if key == name else key: value for key, value in tensors.items()}),
        "more": lambda: save(tensors | {rng.choice(["x", "model.x.weight", "layers.1000000000.x"]): torch.zeros(2)}),
        "flat": lambda: save(tensors | {name: tensor.flatten()}),
        "integers": lambda: save(tensors | {name: tensor.to(rng.choice([torch.int64, torch.uint8, torch.bool]))}),
        "empty tensor": lambda: save(tensors | {name: tensor[:0]}),
        "not a number": lambda: save(tensors | {name: infinite.reshape(tensor.shape)}),
        "half": lambda: save({key: value.half() for key, value in tensors.items()}),
        "pickle": lambda: b"\x80\x02}q\x00.",
    }
    way = rng.choice(sorted(ways))
    path.write_bytes(ways[way]())
    return f"{name} {way}"


def spoil_files(rng: Random, path: Path) -> str:
    """Put something else where a file is; says what."""
    way = rng.choice(["gone", "renamed", "folder", "dangling link", "index", "pickle"])
    if way == "index":
        index = path.with_name(f"{path.stem}.safetensors.index.json")
        weight_map = rng.choice([None, {}, [], {"x": "y"}, {"x": "../y.safetensors"}, {"x": str(path)}, {"x": 5}])
        index.write_text(
            json.dumps(rng.choice([{"weight_map": weight_map}, {}, None, {"weight_map": {"x": path.name}}]))
        )
        if rng.random() < 0.8:
            path.unlink()
        return f"{way} {index.read_text()[:50]}"
    path.rename(moved := path.with_name({"pickle": "pytorch_model.bin"}.get(way, f"x-{path.name}")))
    if way in ("gone", "folder", "dangling link"):
        moved.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "dangling link":
        path.symlink_to("nowhere")
    return way


def spoil(rng: Random, folder: Path) -> str:
    """Spoil one file of a folder; says which, and how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    path = rng.choice(files)
    ways = {".json": spoil_json, ".safetensors": spoil_tensors}
    spoiler = spoil_files if rng.random() < 0.25 else ways.get(path.suffix, spoil_files)
    return f"{path.relative_to(folder)}: {spoiler(rng, path)}"


def load(rng: Random, world: World) -> Case:
    """`from_pretrained` of a spoiled folder, of a pipeline or a part; what is loaded draws or computes."""
    kind = rng.choice(sorted(KINDS))
    folder = world.saved(kind)
    slot = rng.choice([None, None, "transformer", "vae", "scheduler"])
    done = spoil(rng, folder if slot is None else folder / slot)
    pipe = world.pipeline(kind)

    def run() -> Any:
        if slot is None:
            loaded = MARPipeline.from_pretrained(folder)
        else:
            # What stays of the pipeline is whole.
            part = type(getattr(pipe, slot)).from_pretrained(folder / slot)
            loaded = MARPipeline(**{**pipe.components, slot: part}, generation_defaults=FEW_STEPS)
        loaded.set_progress_bar_config(disable=True)
        asked = {"prompt": "a cat"} if kind == "text" else {"class_labels": 0}
        few = {} if slot is None else FEW_STEPS
        steps = loaded.generation_settings
        if steps.num_inference_steps * steps.num_diffusion_steps > 200:
            few = {"num_diffusion_steps": 2}
        return loaded(**asked, **few, generator=seeded(), output_type="pt").images

    names = [
        str(world.case),
        *parameters(MARPipeline.__call__),
        *parameters(MARPipeline.__init__),
        *parameters(TokenDDPMScheduler.__init__),
    ]
    return Case(f"load {kind}/{slot or ''}, {done}", run, names, (*REFUSALS, OSError))


def data(rng: Random, world: World) -> Case:
    """A folder of pictures as training data."""
    folder = world.case / "data"
    modes = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I", "F", "I;16", "YCbCr", "HSV"]
    places = ["a/0", "b/0", "c d/0", "a/x/0", "train/a/0", "train/b/0", "test/a/0", "val/0", "0", ".x/0", "__MACOSX/0"]
    done = []
    for place in rng.sample(places, rng.randint(1, 4)):
        for number in range(rng.randint(1, 2)):
            mode = rng.choice(["RGB"] * 4 + modes)
            ending = rng.choice([".png", ".jpg", ".tiff", ".gif", ".PNG", ".txt"])
            path = folder / f"{place}{number}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                Image.new(mode, (rng.choice([1, 8, 9]), 8)).save(path, format="PNG" if ending == ".txt" else None)
            except (OSError, ValueError):
                path.write_bytes(b"no picture")
            if rng.random() < 0.1:
                path.write_bytes(path.read_bytes()[:40])
            done.append(f"{path.relative_to(folder)} {mode}")
    if rng.random() < 0.4:
        rows = [{"file_name": one.split()[0], "text": "x"} for one in done]
        changed = rng.choice(rows)
        changed[rng.choice(["file_name", "text", "label"])] = rng.choice([*JSON_VALUES, ["a", "b"]])
        lines = [json.dumps(row) for row in rows] + ["{"] * (rng.random() < 0.1)
        name = rng.choice(["metadata.jsonl", "train/metadata.jsonl", "metadata.csv"])
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        done.append(f"{name} {changed}")
    if rng.random() < 0.2:
        (folder / "link").symlink_to(rng.choice([".", "a", "nowhere", "/"][:3]))
        done.append("link")

    def run() -> Any:
        dataset = load_image_dataset(str(folder)).with_transform(ImageTransform(8))
        return [dataset[row] for row in range(min(3, len(dataset)))]

    return Case(
        f"load_image_dataset, {', '.join(done)}",
        run,
        [str(folder), "train_data_dir", "The picture"],
        (ValueError, OSError),
    )


# --- commands


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_command(argv: list[str], folder: Path) -> None:
    """The command in this process: how it ends is told by code and by one line."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), inside(folder):
        try:
            code = command(argv)
        except SystemExit as error:
            code = error.code
    line = errors.getvalue()
    if code not in (0, 1, 2):
        raise Unclear(f"code {code!r}")
    if code and (line.count("\n") != 1 or UNEXPECTED.search(line)):
        raise Unclear(line)
    if code and not any(word in line for word in [*(repr(word)[1:-1] for word in argv if word), "`", "argument"]):
        raise Unclear(f"names nothing: {line}")
    if left := [path.name for path in folder.rglob("*") if "partial" in path.name]:
        raise Unclear(f"left behind: {left}")


def commands(rng: Random, world: World) -> Case:
    """The command line."""
    words = [
        "",
        "x",
        "0",
        "-1",
        "1",
        "2",
        "nan",
        "inf",
        "1e39",
        "10**9",
        "\ud800",
        "99999999999999999999",
        "cpu",
        "meta",
    ]
    # No place outside of the case's folder: something may be written there.
    words += [".", "..", "nowhere", "a\tb", "--", "cat", "emoji", "out.png", "nowhere/x.png", "a/b/c", "None"]
    done = ""
    name = rng.choice(["generate", "generate", "convert", "export", "info"])
    if name == "convert":
        source, args = world.case / "source.safetensors", Path(shutil.copy(GOLDEN / "original_args.json", world.case))
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = torch.load(GOLDEN / "checkpoint-last.pth", weights_only=True)["model_ema"]
        save_file({key: value.contiguous() for key, value in weights.items()}, source)
        done = spoil_tensors(rng, source) if rng.random() < 0.6 else spoil_json(rng, args)
        argv = ["convert", str(source), "out", "--config", str(args)]
        options = ["--vae", "--weights", "--config", "--scaling-factor"]
    else:
        folder = world.saved(rng.choice(sorted(KINDS)))
        done = spoil(rng, folder) if rng.random() < 0.5 else ""
        argv = [name, str(folder), *(["out"] if name == "export" else [])]
        options = []
        if name == "generate":
            argv += ["--num-images-per-class", "1", "--num-diffusion-steps", "2", "--num-inference-steps", "2"]
            options = ["--class-labels", "--prompt", "--text-encoder", "--num-images-per-class", "--seed", "--output"]
            options += ["--output-dir", "--batch-size", "--device", "--num-diffusion-steps", "--num-inference-steps"]
            options += ["--guidance-scale", "--temperature"]
    for _ in range(rng.randint(0, 2)):
        if options and rng.random() < 0.8:
            argv += [rng.choice(options), rng.choice(words)]
        else:
            argv[rng.randrange(len(argv))] = rng.choice(words)
    return Case(f"mar-hf {argv}, {done}", lambda: run_command(argv, world.case), [])


def training(rng: Random, world: World) -> Case:
    """Settings of trainings, from Python and from the command line."""
    cls = rng.choice([TrainingArguments, TokenizerTrainingArguments, TextEncoderTrainingArguments])
    good = {
        field.name: [field.default] for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING
    }
    good |= {"output_dir": ["out"], "caption_templates": [["{}"], ["x"], "{}", ["{label}: {}"], [5]]}
    if rng.random() < 0.6:
        given = arguments(rng, good, {"output_dir": "out", "train_data_dir": "data"})
        return Case(said(cls.__name__, given), lambda: cls(**given), list(good))
    path = world.case / "settings.json"
    rows = {name: rng.choice(JSON_VALUES) for name in rng.sample(sorted(good), 2)}
    path.write_text(json.dumps({"output_dir": "out", **rows}), encoding="utf-8")
    done = spoil_json(rng, path) if rng.random() < 0.3 else ""
    words = ["", "x", "-1", "nan", "inf", "1e39", "true", "{}", "[1]", "{", "0.5", "\ud800", "none"]
    argv = ["--output_dir", "out", f"--{rng.choice(sorted(good))}", rng.choice(words)]
    argv += ["--config", str(path)] if rng.random() < 0.5 else []

    def run() -> None:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                parse_arguments(cls, argv)
        except SystemExit as error:
            if error.code != 2 or "Traceback" in errors.getvalue():
                raise Unclear(f"code {error.code}: {errors.getvalue()}") from error

    return Case(f"parse_arguments({cls.__name__}, {argv}), {rows} {done}", run, [*good, "config"], (ValueError,))


DOORS: dict[str, Callable[[Random, World], Case]] = {
    "call": call,
    "constructor": constructor,
    "settings": settings,
    "config": configuration,
    "scheduler": scheduler,
    "tokenizer": tokenizer,
    "forward": forward,
    "head": head,
    "load": load,
    "data": data,
    "command": commands,
    "training": training,
}
