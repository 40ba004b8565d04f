# SPDX-License-Identifier: Apache-2.0
"""Token heads compared: the same data, backbone, number of parameters and training, from one head step to a hundred.

    OMP_NUM_THREADS=1 python examples/compare_heads.py --output_dir out/heads

Trains on emoji of people with the tokenizer inside the package, measures samples against pictures held out, then the
time of each setting, and writes `heads.json`, of which `draw_heads.py` makes tables, plot and samples. Each finished
part is a file in `results/`: started again, it does what is missing and goes on with what was cut off.
docs/heads.md says what is compared.
"""

import json
import math
import pathlib
import statistics
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from mar_hf_settings import answer_early, check_counts, check_paths, run_program


EXAMPLES = pathlib.Path(__file__).parent
CONFIG = EXAMPLES / "configs" / "compare_heads.json"
# The first 120 emoji of three classes: couples, faces and professions, in many combinations of skin, hair and gender.
# That much can be learned in minutes, and what is held out looks alike.
CLASSES = ("family", "person", "working person")
DATA_WORDS = ("--skin-tones", "--max-per-class", "120", "--test-fraction", "0.3", "--classes", *CLASSES)

# What the models do not share; the rest stands in `CONFIG`. How wide a head is, `find_width` says.
BACKBONES = {
    "masked": {"num_encoder_layers": 2, "num_decoder_layers": 2, "mask_ratio_min": 0.3, "mask_ratio_std": 0.35},
    "raster": {"model_type": "mar_hf_ar", "num_layers": 4, "order": "raster"},
}
INFERENCE_STEPS = {"masked": 8, "raster": 16}
HEADS = {
    "diffusion": {"head_type": "diffusion", "head_config": {"num_layers": 3}},
    "flow": {"head_type": "flow_matching", "head_config": {"num_layers": 3}},
    "flow_sample": {"head_type": "flow_matching", "head_config": {"num_layers": 3, "prediction_type": "sample"}},
    "shortcut": {"head_type": "shortcut", "head_config": {"num_layers": 3}},
    "energy": {"head_type": "energy", "head_config": {"num_layers": 3}},
    "mixture": {"head_type": "mixture", "head_config": {"num_layers": 3}},
    "mixture_groups": {"head_type": "mixture", "head_config": {"num_layers": 1, "feature_group": 4}},
}
# What is changed of the tokenizer in the package.
TOKENIZERS = {"plain": {"patch_size": 2}, "sphere": {"patch_size": 2, "normalizer": "sphere"}}
# model: (backbone, head, tokenizer)
MODELS = {
    **{f"masked_{head}": ("masked", head, "plain") for head in HEADS},
    **{f"raster_{head}": ("raster", head, "plain") for head in ("diffusion", "flow", "energy")},
    "raster_flow_sphere": ("raster", "flow", "sphere"),
}
# row: (model, scheduler of diffusers in place of the model's own)
ROWS = {model: (model, None) for model in MODELS} | {
    "masked_diffusion_dpm": ("masked_diffusion", "DPMSolverMultistepScheduler"),
    "masked_flow_euler": ("masked_flow", "FlowMatchEulerDiscreteScheduler"),
}
# The model that the others are as large as, and the width of its head.
STANDARD, STANDARD_WIDTH = "masked_diffusion", 256
WIDTHS = range(16, 513, 16)

SCALES = (1.0, 1.5, 2.0, 3.0)
SCALE_STEPS = 25  # head steps, for the choice of the scale
STEPS = (1, 2, 4, 8, 16, 25, 100)  # head steps with the first seed
FEW_STEPS = (1, 4, 25, 100)  # and with the others
BATCH_SIZE = 48
SHOWN = 2  # samples of each class that are kept
FRECHET, RECOGNISED = "fd", "classifier_accuracy"
METRICS = (FRECHET, "kid", "precision", "recall", RECOGNISED)
SPEEDS = ("alone", "batch", "head_share", "calls_a_token")
QUICK_WORDS = ("--max_train_steps", "2", "--lr_warmup_steps", "1", "--train_batch_size", "4")
QUICK_DEFAULTS = {"num_diffusion_steps": 1}
QUICK_SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_class_tokens": 1}


@dataclass
class Arguments:
    """Settings of the comparison."""

    output_dir: str = field(metadata={"help": "where everything goes"})
    npz: str | None = field(default=None, metadata={"help": "the emoji, see prepare_emoji.py; default: npm packages"})
    only: list[str] = field(
        default_factory=lambda: list(ROWS), metadata={"help": f"rows to work on; default: all, {' '.join(ROWS)}"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "each row is trained with each"})
    jobs: int = field(default=1, metadata={"help": "rows side by side; OMP_NUM_THREADS are the threads of each"})
    features: str = field(default="lite0", metadata={"help": "of pictures", "choices": ["lite0", "pixels"]})
    quick: bool = field(default=False, metadata={"help": "tiny models, two steps, few samples: to see it run"})

    def __post_init__(self) -> None:
        if not self.only or not set(self.only) <= set(ROWS):
            raise ValueError(f"`only` has to name some of {list(ROWS)}, got {self.only}.")
        check_counts(self, jobs=1)
        check_paths(self, "npz")
        if not self.seeds:
            raise ValueError("`seeds` is empty.")
        self.only = [row for row in ROWS if row in self.only]

    @property
    def folder(self) -> pathlib.Path:
        """`output_dir` as a path."""
        return pathlib.Path(self.output_dir)

    @property
    def num_images_per_class(self) -> int:
        """Samples of each class, with each setting."""
        return 2 if self.quick else 48

    def steps(self, row: str, seed: int) -> tuple[int, ...]:
        """The numbers of head steps that are measured: 1 for a head that has none."""
        head = head_class(row)
        if not head.has_steps:
            return (1,)
        if self.quick:
            return (1, 2)
        most = head.most_steps if head.scheduler_class is None else max(STEPS)
        return tuple(steps for steps in (STEPS if seed == self.seeds[0] else FEW_STEPS) if steps <= most)


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_early(Arguments)

import torch

from mar_hf import ImageTokenizer, MARForImageGeneration, MARPipeline, demo_checkpoint
from mar_hf.evaluation import (
    Judge,
    Pictures,
    claim_folder,
    describe_machine,
    describe_versions,
    load_pipeline,
    median_seconds,
    psnr,
    use_scheduler,
)
from mar_hf.evaluation.classes import choose_labels
from mar_hf.evaluation.experiments import once, read_result, run_all, run_script
from mar_hf.evaluation.folders import read_json, write_json
from mar_hf.evaluation.pictures import save_pictures
from mar_hf.evaluation.speed import make_pictures
from mar_hf.evaluation.tables import mean_and_deviation
from mar_hf.heads import TOKEN_HEADS, TokenHead
from mar_hf.models import BACKBONES as MODEL_TYPES
from mar_hf.training import make_accelerator
from mar_hf.utils import atomic_folder


def head_class(row: str) -> type[TokenHead]:
    """The class of a row's head."""
    _, head, _ = MODELS[ROWS[row][0]]
    return TOKEN_HEADS[HEADS[head]["head_type"]]


def with_width(settings: dict[str, Any], width: int) -> dict[str, Any]:
    """Settings of a model with a head of this width."""
    return settings | {"head_config": settings["head_config"] | {"hidden_size": width}}


def count_parameters(settings: dict[str, Any]) -> int:
    """Parameters of a model on 4 x 4 tokens of 32 numbers."""
    settings = dict(settings)
    config_class, _, model_class = MODEL_TYPES[settings.pop("model_type", "mar_hf_mar")]
    sizes = {"grid_height": 4, "grid_width": 4, "token_dim": 32, "num_classes": len(CLASSES)}
    with torch.device("meta"):
        return model_class(config_class.preset("base", **sizes, **settings)).num_parameters()


def find_width(settings: dict[str, Any], parameters: int) -> int:
    """The width of the head, out of `WIDTHS`, that brings a model nearest to a number of parameters."""

    def count(width: int) -> int:
        return count_parameters(with_width(settings, width))

    place = bisect_left(WIDTHS, parameters, key=count)  # the first that is at least as large
    return min(WIDTHS[max(place - 1, 0) : place + 1], key=lambda width: abs(count(width) - parameters))


@cache
def model_config(model: str, quick: bool = False) -> dict[str, Any]:
    """Settings of a model."""
    backbone, head, _ = MODELS[model]
    settings = read_json(CONFIG)["model_config"] | BACKBONES[backbone] | HEADS[head]
    if quick:
        return settings | QUICK_SIZES | {"head_config": settings["head_config"] | {"num_layers": 1, "hidden_size": 16}}
    if model == STANDARD:
        return with_width(settings, STANDARD_WIDTH)
    return with_width(settings, find_width(settings, count_parameters(model_config(STANDARD))))


def prepare_data(args: Arguments) -> None:
    """Write the emoji, a share of each class held out."""
    if not (args.folder / "data").exists():
        with atomic_folder(args.folder / "data") as folder:
            words = [folder, *DATA_WORDS, *(["--npz", args.npz] if args.npz else [])]
            run_script(EXAMPLES / "prepare_emoji.py", words)


@cache
def make_judge(reference: str, features: str) -> Judge:
    """What compares pictures with those held out."""
    return Judge(reference, 32, CLASSES, features=features, classifier=True)


def judge(args: Arguments, pictures: Sequence[torch.Tensor], labels: Sequence[str]) -> dict[str, float]:
    """`METRICS` of pictures, uint8, (3, 32, 32) each."""
    measured = make_judge(str(args.folder / "data" / "test"), args.features).measure(pictures, labels)
    return {name: measured[name if name == RECOGNISED else f"{name}_{args.features}"] for name in METRICS}


def make_tokenizer(args: Arguments, name: str) -> dict:
    """Cache the latents of a tokenizer; measure as many training pictures as there will be samples, and what it
    makes of them."""
    folder, data = args.folder / "tokenizers" / name, args.folder / "data" / "train"
    tokenizer = ImageTokenizer.from_pretrained(demo_checkpoint(), subfolder="vae", **TOKENIZERS[name]).eval()
    tokenizer.save_pretrained(folder)
    words = ["--train_data_dir", data, "--pretrained_tokenizer", folder, "--resolution", 32]
    command = run_script(EXAMPLES / "cache_latents.py", ["--output_dir", args.folder / "latents" / name, *words])
    pictures = Pictures(data)
    chosen = []
    for label in CLASSES:
        chosen += [row for row, own in enumerate(pictures.labels) if own == label][: args.num_images_per_class]
    labels = [pictures.labels[row] for row in chosen]
    real = torch.stack([pictures[row] for row in chosen])
    with torch.no_grad():
        restored = tokenizer(real / 127.5 - 1).clamp(-1, 1)
    found = {"command": command, "psnr": psnr(real / 127.5 - 1, restored), "real": judge(args, real, labels)}
    return found | {"reconstructions": judge(args, ((restored + 1) * 127.5).round().byte(), labels)}


def train_and_measure(args: Arguments, model: str, seed: int) -> None:
    """A training, and the metrics of the samples of the rows that need it."""
    once(args.folder, f"training-{model}-{seed}", train, args, model, seed)
    found, now = read_result(args.folder, f"training-{model}-{seed}")["model_config"], model_config(model, args.quick)
    if found != now:
        raise ValueError(f"`output_dir` has a training of {model} with {found}, now {now}: remove its results.")
    for row in (row for row in args.only if ROWS[row][0] == model):
        if seed == args.seeds[0]:
            once(args.folder, f"scales-{row}", measure_scales, args, row)
        once(args.folder, f"steps-{row}-{seed}", measure_steps, args, row, seed)


def train(args: Arguments, model: str, seed: int) -> dict:
    """One training of a model."""
    backbone, _, tokenizer = MODELS[model]
    config, folder = model_config(model, args.quick), args.folder / "models" / f"{model}-{seed}"
    words = ["--output_dir", folder, "--config", CONFIG, "--train_data_dir", args.folder / "latents" / tokenizer]
    words += ["--model_config", json.dumps(config), "--seed", seed, "--resume_from_checkpoint", "latest"]
    defaults = read_json(CONFIG)["generation_defaults"] | {"num_inference_steps": INFERENCE_STEPS[backbone]}
    words += ["--generation_defaults", json.dumps(defaults | (QUICK_DEFAULTS if args.quick else {}))]
    command = run_script(EXAMPLES / "train.py", [*words, *(QUICK_WORDS if args.quick else ())])
    transformer = load_pipeline(str(folder / "pipeline")).transformer
    head_parameters = sum(parameter.numel() for parameter in transformer.head.parameters())
    sizes = {"parameters": transformer.num_parameters(), "head_parameters": head_parameters}
    return {"command": command, "model_config": config, **sizes}


def load(args: Arguments, row: str, seed: int) -> MARPipeline:
    """The pipeline of a row."""
    model, scheduler = ROWS[row]
    pipeline = load_pipeline(str(args.folder / "models" / f"{model}-{seed}" / "pipeline"))
    if scheduler is not None:
        use_scheduler(pipeline, scheduler)
    return pipeline


def measure(args: Arguments, pipeline: MARPipeline, name: str, seed: int, **setting: Any) -> dict[str, float]:
    """Metrics of the samples of a setting; the first of each class are kept in `samples/<name>`."""
    names = choose_labels(pipeline)
    jobs = [(label, number) for label in names for number in range(args.num_images_per_class)]
    batches = [jobs[first : first + BATCH_SIZE] for first in range(0, len(jobs), BATCH_SIZE)]
    pictures = torch.cat([make_pictures(pipeline, setting, batch, seed) for batch in batches])
    shown = {job: picture for job, picture in zip(jobs, pictures / 127.5 - 1, strict=True) if job[1] < SHOWN}
    files = [args.folder / "samples" / name / f"{label}-{number}.png" for label, number in shown]
    save_pictures(torch.stack(list(shown.values())), files)
    return judge(args, pictures, [names[label] for label, _ in jobs])


def measure_scales(args: Arguments, row: str) -> dict:
    """Metrics of the first seed's model by guidance scale, and the scale that is best for the Frechet distance."""
    seed = args.seeds[0]
    pipeline, steps = load(args, row, seed), min(SCALE_STEPS, max(args.steps(row, seed)))
    found = {}
    for scale in SCALES[::2] if args.quick else SCALES:
        setting = {"guidance_scale": scale, "num_diffusion_steps": steps}
        found[str(scale)] = measure(args, pipeline, f"{row}-{seed}-scale={scale}", seed, **setting)
    best = min(found, key=lambda scale: found[scale][FRECHET])
    return {"metrics": found, "num_diffusion_steps": steps, "guidance_scale": float(best)}


def measure_steps(args: Arguments, row: str, seed: int) -> dict:
    """Metrics by number of head steps, with the row's guidance scale."""
    pipeline, scale = load(args, row, seed), read_result(args.folder, f"scales-{row}")["guidance_scale"]
    found = {}
    for steps in args.steps(row, seed):
        setting = {"guidance_scale": scale, "num_diffusion_steps": steps}
        found[str(steps)] = measure(args, pipeline, f"{row}-{seed}-{steps}", seed, **setting)
    return {"metrics": found, "bits": measure_bits(args, pipeline)}


@torch.no_grad()
def measure_bits(args: Arguments, pipeline: MARPipeline) -> float | None:
    """Bits a number of the tokens held out, one token at a time: the mean over all numbers of tokens that are still
    missing, random ones where the order is (arXiv:2110.02037). None for a head without a density."""
    transformer = pipeline.transformer
    if not hasattr(transformer.head, "log_prob"):
        return None
    pictures = Pictures(args.folder / "data" / "test")
    tokens = pipeline.vae.encode(torch.stack(list(pictures)) / 127.5 - 1, sample_posterior=False).tokens
    labels = torch.tensor([CLASSES.index(label) for label in pictures.labels])
    generator, found = torch.Generator().manual_seed(0), []
    for missing in range(1, tokens.shape[1] + 1) if isinstance(transformer, MARForImageGeneration) else (None,):
        settings = {} if missing is None else {"num_masked": missing}
        inputs = transformer.training_inputs(len(tokens), generator, **settings)
        condition = transformer(tokens, class_labels=labels, **inputs).condition
        mask = inputs.get("mask", torch.ones(tokens.shape[:2], dtype=torch.bool))
        found.append(transformer.head.log_prob(condition[mask], tokens[mask]).mean().item())
    return -statistics.fmean(found) / math.log(2) / tokens.shape[2]


@dataclass
class HeadUse:
    """How often a head sampled, how often its last layer ran for that, and how many seconds it took."""

    samplings: int = 0
    calls: int = 0
    seconds: float = 0.0


@contextmanager
def watched_head(pipeline: MARPipeline) -> Iterator[HeadUse]:
    """Notes what the head of a pipeline does."""
    head, use = pipeline.transformer.head, HeadUse()
    draw = head.draw

    def timed(**settings: Any) -> torch.Tensor:
        start = time.perf_counter()
        tokens = draw(**settings)
        use.seconds += time.perf_counter() - start
        use.samplings += 1
        return tokens

    def count(*_: Any) -> None:
        use.calls += 1

    head.draw, hook = timed, head.out_proj.register_forward_hook(count)
    try:
        yield use
    finally:
        del head.draw
        hook.remove()


def time_row(args: Arguments, row: str) -> dict:
    """By number of head steps: seconds a picture, alone and in a batch, the head's share of the latter, and how often
    its network is called for a token."""
    seed = args.seeds[0]
    pipeline, scale = load(args, row, seed), read_result(args.folder, f"scales-{row}")["guidance_scale"]
    found: dict[str, Any] = {"threads": torch.get_num_threads(), **{name: {} for name in SPEEDS}}
    batch = [(number % len(CLASSES), number) for number in range(4 if args.quick else BATCH_SIZE)]
    for steps in args.steps(row, seed):
        setting = {"calls": 2 if args.quick else 4, "guidance_scale": scale, "num_diffusion_steps": steps}
        found["alone"][str(steps)] = median_seconds(pipeline, batch[:1], **setting)
        start = time.perf_counter()
        with watched_head(pipeline) as use:
            found["batch"][str(steps)] = median_seconds(pipeline, batch, **setting)
        found["head_share"][str(steps)] = use.seconds / (time.perf_counter() - start)
        found["calls_a_token"][str(steps)] = use.calls / use.samplings
    return found


def collect_row(args: Arguments, row: str) -> dict[str, Any]:
    """What is known of a row: a point for each number of head steps, with means and deviations over the seeds."""
    model, scheduler = ROWS[row]
    backbone, head, tokenizer = MODELS[model]
    trainings = {seed: read_result(args.folder, f"training-{model}-{seed}") for seed in args.seeds}
    scales, speed = (read_result(args.folder, f"{part}-{row}") for part in ("scales", "speed"))
    qualities = [read_result(args.folder, f"steps-{row}-{seed}") for seed in args.seeds]
    points = []
    bits = [quality["bits"] for quality in qualities if quality.get("bits") is not None]
    for steps in qualities[0]["metrics"]:
        runs = [quality["metrics"][steps] for quality in qualities if steps in quality["metrics"]]
        point = {"head_steps": int(steps) if head_class(row).has_steps else None, "num_seeds": len(runs)}
        point |= {kind: speed[kind][steps] for kind in SPEEDS}
        points.append(point | {metric: mean_and_deviation([run[metric] for run in runs]) for metric in METRICS})
    first = trainings[args.seeds[0]]
    return {
        **{"model": model, "backbone": backbone, "head": head, "tokenizer": tokenizer, "scheduler": scheduler},
        **{name: first[name] for name in ("parameters", "head_parameters", "model_config")},
        **{"guidance_scale": scales["guidance_scale"], "scales": scales, "points": points},
        "bits": mean_and_deviation(bits) if bits else None,
        "trainings": {seed: {name: one[name] for name in ("command", "seconds")} for seed, one in trainings.items()},
    }


def main(args: Arguments) -> None:
    """Do what is missing, then report.

    Args:
        args (`Arguments`): of the command line.

    Raises:
        ValueError: if the folder holds another comparison, or a row that was trained with other settings.
    """
    note = {"quick": args.quick, "features": args.features, "data": DATA_WORDS, "training": read_json(CONFIG)}
    claim_folder(args.folder, json.loads(json.dumps(note)), make_accelerator())
    prepare_data(args)
    models = list(dict.fromkeys(ROWS[row][0] for row in args.only))
    tokenizers = list(dict.fromkeys(MODELS[model][2] for model in models))
    for name in tokenizers:
        once(args.folder, f"tokenizer-{name}", make_tokenizer, args, name)
    for seed in args.seeds:  # a whole table is there as soon as the first seed is done
        run_all([partial(train_and_measure, args, model, seed) for model in models], args.jobs)
    for row in args.only:  # nothing beside it: the clock runs
        once(args.folder, f"speed-{row}", time_row, args, row)
    report = {**note, "seeds": args.seeds, "num_images": args.num_images_per_class * len(CLASSES)}
    report["machine"] = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
    report["versions"] = describe_versions("accelerate", "scikit-learn")
    report["tokenizers"] = {name: read_result(args.folder, f"tokenizer-{name}") for name in tokenizers}
    report["rows"] = {row: collect_row(args, row) for row in args.only}
    write_json(args.folder / "heads.json", report)
    run_script(EXAMPLES / "draw_heads.py", ["--output_dir", args.folder])


if __name__ == "__main__":
    run_program(main, Arguments)
