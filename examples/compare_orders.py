# SPDX-License-Identifier: Apache-2.0
"""The comparison of arXiv:2406.11838 on handwritten digits: orders, attention, tokens a step, losses, tokenizers.

    OMP_NUM_THREADS=1 python examples/compare_orders.py --output_dir out/comparison --jobs 2

Trains tokenizers and models with `train_tokenizer.py` and `train.py`, measures them with `evaluate.py`, and writes
`comparison.json`, of which `draw_comparison.py` makes tables and plots. Each finished part is a file in `results/`:
started again, it does what is missing and goes on with what was cut off. docs/comparison.md says what is compared.
"""

import json
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mar_hf_settings import answer_early, check_counts, run_program


EXAMPLES = pathlib.Path(__file__).parent
CONFIG = EXAMPLES / "configs" / "compare_orders.json"
TOKENIZER_CONFIGS = {name: EXAMPLES / "configs" / f"digits_{name}_tokenizer.json" for name in ("kl", "vq")}
# The tokens of models: of a trained tokenizer, or squares of pixels.
AUTOENCODERS = {"kl": "kl", "vq": "vq", "vq_continuous": "vq", "pixels_2": "pixels", "pixels_4": "pixels"}
PATCH_SIZES = {"pixels_2": 2, "pixels_4": 4}

# What the models do not share; the rest stands in `CONFIG`. The heads are of the same size.
BACKBONES = {
    "raster_causal": {"model_type": "mar_hf_ar", "num_layers": 4, "order": "raster"},
    "random_causal": {"model_type": "mar_hf_ar", "num_layers": 4, "order": "random"},
    "masked": {"num_encoder_layers": 2, "num_decoder_layers": 2, "mask_ratio_min": 0.3, "mask_ratio_std": 0.35},
}
HEADS = {
    "categorical": {
        "head_type": "categorical",
        "head_config": {"num_codes": 256, "num_layers": 3, "hidden_size": 160},
    },
    "diffusion": {"head_type": "diffusion", "head_config": {"num_layers": 3, "hidden_size": 96}},
}
PIXELS_AND_MORE = ("vq_continuous", "pixels_2", "pixels_4")
# name: (backbone, tokens, head)
MODELS = {
    f"{backbone}_{head}": (backbone, tokens, head)
    for backbone in BACKBONES
    for head, tokens in (("categorical", "vq"), ("diffusion", "kl"))
} | {f"masked_{tokens}": ("masked", tokens, "diffusion") for tokens in PIXELS_AND_MORE}
# row: (model, autoregressive steps). A masked model samples in many steps as well as in few.
ROWS = {
    f"{row}_{head}": (f"{backbone}_{head}", steps)
    for head in HEADS
    for row, backbone, steps in (
        ("raster_causal", "raster_causal", 64),
        ("random_causal", "random_causal", 64),
        ("masked_one", "masked", 64),
        ("mar", "masked", 16),
    )
} | {f"mar_{tokens}": (f"masked_{tokens}", 16) for tokens in PIXELS_AND_MORE}

BATCH_SIZE = 100  # of the evaluation
SCALES = (1.0, 1.5, 2.0, 3.0)
QUICK_SCALES = (1.0, 2.0)
QUICK_WORDS = ("--max_train_steps", "2", "--lr_warmup_steps", "1", "--train_batch_size", "4")
QUICK_SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_class_tokens": 1}
QUICK_DEFAULTS = {"num_diffusion_steps": 2, "guidance_scale": 2.0}
FRECHET, RECOGNISED = "fd_pixels", "classifier_accuracy"


@dataclass
class Arguments:
    """Settings of the comparison."""

    output_dir: str = field(metadata={"help": "where everything goes"})
    only: list[str] = field(
        default_factory=lambda: list(ROWS), metadata={"help": f"rows to work on; default: all, {' '.join(ROWS)}"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "each model is trained with each"})
    jobs: int = field(default=1, metadata={"help": "trainings side by side; OMP_NUM_THREADS are the threads of each"})
    quick: bool = field(default=False, metadata={"help": "tiny models, two steps, few pictures: to see it run"})

    def __post_init__(self) -> None:
        if not self.only or not set(self.only) <= set(ROWS):
            raise ValueError(f"`only` has to name some of {list(ROWS)}, got {self.only}.")
        check_counts(self, jobs=1)
        if not self.seeds:
            raise ValueError("`seeds` is empty.")
        self.only = [row for row in ROWS if row in self.only]

    @property
    def folder(self) -> pathlib.Path:
        """`output_dir` as a path."""
        return pathlib.Path(self.output_dir)

    @property
    def num_images_per_class(self) -> int:
        """Samples of each digit, with each guidance scale."""
        return 1 if self.quick else 50


if __name__ == "__main__":  # what is refused is refused before the imports below, which take seconds
    answer_early(Arguments)

import torch

from mar_hf import ImageTokenizer, MARPipeline
from mar_hf.evaluation import claim_folder, describe_machine, describe_versions, load_pipeline, median_seconds, psnr
from mar_hf.evaluation.experiments import once, read_result, run_all, run_script
from mar_hf.evaluation.folders import read_json, write_json
from mar_hf.evaluation.pictures import save_pictures
from mar_hf.evaluation.tables import mean_and_deviation
from mar_hf.training import (
    ImageTransform,
    latent_statistics,
    load_image_dataset,
    make_accelerator,
    some_pictures,
)
from mar_hf.utils import atomic_folder


def prepare_data(args: Arguments) -> None:
    """Write the digits, a fifth of each class held out."""
    if not (args.folder / "data").exists():
        with atomic_folder(args.folder / "data") as folder:
            few = ["--max_per_class", "20"] if args.quick else []
            run_script(EXAMPLES / "prepare_digits.py", [str(folder), "--test_fraction", "0.2", *few])


def make_tokenizer(args: Arguments, name: str) -> dict:
    """Train a tokenizer, and measure reconstructions of as many training pictures as there will be samples."""
    folder, data = args.folder / "tokenizers" / name, str(args.folder / "data" / "train")
    pictures = load_image_dataset(data)
    labels, classes = pictures["label"], pictures.features["label"].names
    pictures = pictures.with_transform(ImageTransform(16))
    if name in TOKENIZER_CONFIGS:
        words = ["--config", TOKENIZER_CONFIGS[name], "--train_data_dir", data]
        words += ["--resume_from_checkpoint", "latest", *(QUICK_WORDS if args.quick else ())]
        run_script(EXAMPLES / "train_tokenizer.py", ["--output_dir", folder, *words])
    if name == "vq":
        # The same autoencoder again; what is not quantised has other statistics.
        tokenizer = ImageTokenizer.from_pretrained(folder)
        tokenizer.config.update({"quantize": False, "shift_factor": 0.0, "scaling_factor": 1.0})
        mean, std = latent_statistics(tokenizer, some_pictures(pictures, 64))
        tokenizer.config.update({"shift_factor": mean, "scaling_factor": [1 / value for value in std]})
        tokenizer.save_pretrained(folder.with_name("vq_continuous"))

    chosen = []
    for number in range(len(classes)):
        chosen += [row for row, label in enumerate(labels) if label == number][: args.num_images_per_class]
    real = torch.stack([row["pixel_values"] for row in pictures.__getitems__(chosen)])
    restored = real
    if name != "pixels":
        with torch.no_grad():
            restored = ImageTokenizer.from_pretrained(folder)(real).clamp(-1, 1)
    samples = args.folder / "reconstructions" / name
    save_pictures(restored, [samples / classes[labels[row]] / f"{row:05d}.png" for row in chosen])
    metrics, _ = measure(args, name, ["--samples_dir", samples])
    return {"psnr": psnr(real, restored), "metrics": metrics["None"]}


def measure(args: Arguments, name: str, words: Iterable[object]) -> tuple[dict[str, dict[str, float]], str]:
    """Run `evaluate.py`: metrics by guidance scale, and the command line."""
    folder = args.folder / "evaluations" / name
    words = [*words, "--reference", args.folder / "data" / "test", "--features", "pixels", "--classifier"]
    command = run_script(EXAMPLES / "evaluate.py", ["--output_dir", folder, *words])
    results = read_json(folder / "metrics.json")["results"]
    return {str(result["value"]): result["metrics"] for result in results}, command


def train_and_evaluate(args: Arguments, model: str, seed: int) -> None:
    """A training, and the evaluations of the rows that need it."""
    once(args.folder, f"training-{model}-{seed}", train, args, model, seed)
    for row in args.only:
        if ROWS[row][0] == model:
            once(args.folder, f"evaluation-{row}-{seed}", evaluate, args, row, seed)


def train(args: Arguments, model: str, seed: int) -> dict:
    """One training of a model."""
    backbone, tokens, head = MODELS[model]
    config = read_json(CONFIG)["model_config"] | BACKBONES[backbone] | HEADS[head]
    if args.quick:
        config |= QUICK_SIZES | {"head_config": config["head_config"] | {"num_layers": 1, "hidden_size": 16}}
    data, folder = args.folder / "data", args.folder / "models" / f"{model}-{seed}"
    words = ["--config", CONFIG, "--train_data_dir", data / "train", "--validation_data_dir", data / "test"]
    words += ["--model_config", json.dumps(config), "--seed", seed, "--resume_from_checkpoint", "latest"]
    if tokens in PATCH_SIZES:
        words += ["--patch_size", PATCH_SIZES[tokens]]
    else:
        words += ["--pretrained_tokenizer", args.folder / "tokenizers" / tokens]
    if args.quick:
        words += [*QUICK_WORDS, "--generation_defaults", json.dumps(QUICK_DEFAULTS)]
    command = run_script(EXAMPLES / "train.py", ["--output_dir", folder, *words])
    return {
        "parameters": MARPipeline.from_pretrained(folder / "pipeline").transformer.num_parameters(),
        "command": command,
    }


def evaluate(args: Arguments, row: str, seed: int) -> dict:
    """Measure samples of a row's model with every guidance scale; their seed is that of the training."""
    model, steps = ROWS[row]
    words = ["--pretrained_model_name_or_path", args.folder / "models" / f"{model}-{seed}" / "pipeline"]
    words += ["--num_inference_steps", steps, "--seed", seed, "--num_images_per_class", args.num_images_per_class]
    words += ["--batch_size", BATCH_SIZE, "--sweep", "guidance_scale", *(QUICK_SCALES if args.quick else SCALES)]
    metrics, command = measure(args, f"{row}-{seed}", words)
    return {"metrics": metrics, "command": command}


def time_row(args: Arguments, row: str) -> dict:
    """Seconds a picture with guidance, alone and in a batch."""
    model, steps = ROWS[row]
    pipeline = load_pipeline(str(args.folder / "models" / f"{model}-{args.seeds[0]}" / "pipeline"))
    found = {"threads": torch.get_num_threads()}
    settings = {"calls": 2 if args.quick else 4, "num_inference_steps": steps, "guidance_scale": 2.0}
    for name, count in (("alone", 1), ("batch", 2 if args.quick else BATCH_SIZE)):
        found[name] = median_seconds(pipeline, [(number % 10, number) for number in range(count)], **settings)
    return found


def summarise(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """A row without guidance, and with the scale that is best for the mean of its seeds."""
    scales = [scale for scale in runs[0] if float(scale) > 1]
    best = min(scales, key=lambda scale: statistics.fmean(run[scale][FRECHET] for run in runs))
    summary: dict[str, Any] = {"guidance_scale": float(best)}
    for name, scale in (("without", "1.0"), ("with", best)):
        summary[name] = {metric: mean_and_deviation([run[scale][metric] for run in runs]) for metric in runs[0][scale]}
    return summary


def collect(args: Arguments) -> dict[str, Any]:
    """What is known of the rows asked for, as `comparison.json` holds it."""
    rows, tokenizers = {}, {"pixels"}
    for row in args.only:
        model, steps = ROWS[row]
        trainings = {seed: read_result(args.folder, f"training-{model}-{seed}") for seed in args.seeds}
        evaluations = {seed: read_result(args.folder, f"evaluation-{row}-{seed}") for seed in args.seeds}
        tokenizers.add(tokenizer := AUTOENCODERS[MODELS[model][1]])
        rows[row] = {
            **{"model": model, "tokenizer": tokenizer, "num_inference_steps": steps},
            "parameters": trainings[args.seeds[0]]["parameters"],
            **summarise([evaluation["metrics"] for evaluation in evaluations.values()]),
            "seconds_a_picture": read_result(args.folder, f"speed-{row}"),
            **{"trainings": trainings, "evaluations": evaluations},
        }
    return {
        **{"quick": args.quick, "seeds": args.seeds},
        "machine": describe_machine("cuda" if torch.cuda.is_available() else "cpu"),
        "versions": describe_versions("accelerate", "scikit-learn"),
        "training": read_json(CONFIG),
        "tokenizers": {name: read_result(args.folder, f"tokenizer-{name}") for name in sorted(tokenizers)},
        "rows": rows,
    }


def main(args: Arguments) -> None:
    """Do what is missing, then report."""
    note = {"quick": args.quick, "training": read_json(CONFIG)}
    note |= {name: read_json(path) for name, path in TOKENIZER_CONFIGS.items()}
    note |= {"backbones": BACKBONES, "heads": HEADS, "scales": SCALES, "batch_size": BATCH_SIZE}
    claim_folder(args.folder, json.loads(json.dumps(note)), make_accelerator())
    prepare_data(args)
    models = list(dict.fromkeys(ROWS[row][0] for row in args.only))
    tokenizers = sorted({"pixels"} | {AUTOENCODERS[MODELS[model][1]] for model in models})
    run_all(
        [partial(once, args.folder, f"tokenizer-{name}", make_tokenizer, args, name) for name in tokenizers], args.jobs
    )
    # A whole table is there as soon as the first seed is done.
    run_all([partial(train_and_evaluate, args, model, seed) for seed in args.seeds for model in models], args.jobs)
    for row in args.only:  # nothing beside it: the clock runs
        once(args.folder, f"speed-{row}", time_row, args, row)
    write_json(args.folder / "comparison.json", collect(args))
    run_script(EXAMPLES / "draw_comparison.py", ["--output_dir", str(args.folder)])


if __name__ == "__main__":
    run_program(main, Arguments)
