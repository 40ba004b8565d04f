# SPDX-License-Identifier: Apache-2.0
"""What the training script adds to the bare step (forward, backward, optimizer), from cached latents.

    python benchmarks/benchmark_training.py --config examples/configs/digits.json --output results.jsonl
    python benchmarks/benchmark_training.py --config examples/configs/imagenet_mar_base.json --latents kl16

Options that are not listed here are those of `examples/train.py`. `benchmarks/README.md` says what exactly is timed.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from benchmark_generation import KL16, append_record, machine
from safetensors.torch import save_file

import mar_hf
from mar_hf import ImageTokenizerConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import latent_data  # noqa: E402
import train  # noqa: E402
from training_utils import example_generators, make_batches, parse_arguments  # noqa: E402


WARM_UP = 3


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each kind (default: %(default)s)")
    parser.add_argument(
        "--latents",
        choices=("pixels", "kl16"),
        default="pixels",
        help="random ones like pixels, or like the released autoencoder's (16 channels, a 16th of the sides), where "
        "--train_data_dir names no others (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a line of JSON is appended to this file")
    return parser


def random_cache(folder: Path, args: train.Arguments, kind: str) -> str:
    """Latents of nothing, with a tokenizer that has no weights: training from a cache needs none.

    Args:
        folder (`Path`): where to write.
        args (`train.Arguments`): for the resolution, the patch size and the batch size.
        kind (`str`): `"pixels"` or `"kl16"`.

    Returns:
        `str`: the folder.
    """
    if kind == "pixels":
        config, shape, names = ImageTokenizerConfig(patch_size=args.patch_size), [3, *[args.resolution] * 2], ["mean"]
    else:
        config = ImageTokenizerConfig(autoencoder={"_class_name": "AutoencoderKL", **KL16})
        shape, names = [16, *[args.resolution // 16] * 2], ["mean", "std"]
    names += [f"{name}_flipped" for name in names] * args.random_flip
    count, classes = 4 * args.train_batch_size, [str(number) for number in range(10)]
    config.save_pretrained(folder / "tokenizer")
    tensors = {name: torch.rand(count, *shape) for name in names}
    save_file({**tensors, "label": torch.arange(count) % len(classes)}, folder / latent_data.shard_name(0))
    index = {"num_examples": count, "shard_size": count, "class_names": classes, "resolution": args.resolution}
    index |= {"latent_shape": shape, "tensors": names, "dtype": "float32"}
    (folder / latent_data.INDEX).write_text(json.dumps(index), encoding="utf-8")
    return str(folder)


def bare_step(trainer: train.Trainer, batch: dict[str, torch.Tensor]) -> Callable[[list[dict[str, Any]]], None]:
    """A second model with its optimizer: nothing but forward, backward and optimizer, always on the same tokens.

    Args:
        trainer (`train.Trainer`): whose model, settings and precision are copied.
        batch (`dict[str, torch.Tensor]`): the pictures.

    Returns:
        `Callable`: one step, given what the model leaves open for each of its batches.
    """
    args, accelerator = trainer.args, trainer.accelerator
    device = accelerator.device
    model = train.build_model(args, trainer.tokenizer, trainer.names)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model = train.add_lora(args, model).to(device).train()
    groups = train.parameter_groups(model, args.adam_weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=device.type in ("cpu", "cuda"))
    generators = example_generators(args.seed, batch["position"], device)
    tokens, labels = train.encode(batch, trainer.tokenizer, generators, device)

    def step(drawn: list[dict[str, Any]]) -> None:
        for inputs in drawn:
            with accelerator.autocast():
                loss = model(
                    tokens,
                    class_labels=labels if trainer.names else None,
                    noise_scheduler=trainer.noise_scheduler,
                    **inputs,
                ).loss
            (loss / len(drawn)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(trainer: train.Trainer, repeats: int) -> dict[str, list[float]]:
    """Steps of both kinds in turns, each pair with as many masked tokens.

    Args:
        trainer (`train.Trainer`): a new run.
        repeats (`int`): steps of each kind.

    Returns:
        `dict[str, list[float]]`: seconds of `"bare step"` and `"training step"`, and of the latter's wait for
        `"data"`.
    """
    args, device = trainer.args, trainer.accelerator.device
    batches = iter(make_batches(trainer))
    bare = bare_step(trainer, next(batches))

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds: dict[str, list[float]] = {"bare step": [], "training step": [], "data": []}
    for repeat in range(WARM_UP + repeats):
        numbers = range(args.gradient_accumulation_steps)
        first = trainer.progress.step * len(numbers)
        generators = example_generators(args.seed, range(args.train_batch_size), device)
        drawn = [train.draw_inputs(args, trainer.bare_model, generators, first + n, device) for n in numbers]
        for kind in ("bare step", "training step")[:: 1 if repeat % 2 else -1]:
            start = now()
            if kind == "bare step":
                bare(drawn)
            else:
                pieces = [next(batches) for _ in numbers]
                seconds["data"].append(time.perf_counter() - start)
                trainer.step(pieces)
            seconds[kind].append(now() - start)
    return {kind: values[WARM_UP:] for kind, values in seconds.items()}


def run(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Set up, warm up, measure.

    Args:
        options (`argparse.Namespace`): this script's own options.
        words (`list[str]`): those of the training script.

    Returns:
        `dict[str, Any]`: settings and results, ready for JSON; `overhead` is the median over pairs of steps.

    Raises:
        ValueError: if the number of repeats is below 2, or the training script refuses a setting.
    """
    if options.repeats < 2:
        raise ValueError(f"`--repeats` has to be at least 2, got {options.repeats}.")
    with tempfile.TemporaryDirectory() as folder:
        args = parse_arguments(train.Arguments, ["--output_dir", folder, "--report_to", "none", *words])
        data = args.train_data_dir or f"random latents like {options.latents}"
        args.train_data_dir = args.train_data_dir or random_cache(Path(folder), args, options.latents)
        trainer = train.Trainer(args)
        seconds = time_steps(trainer, options.repeats)
    pictures = args.train_batch_size * args.gradient_accumulation_steps
    pairs = zip(seconds["training step"], seconds["bare step"], strict=True)
    accelerator = trainer.accelerator
    return {
        "words": words,
        "data": data,
        "parameters": trainer.num_params,
        "num_tokens": trainer.config.num_tokens,
        "batch_size": pictures,
        "mixed_precision": accelerator.mixed_precision,
        "device": str(accelerator.device),
        "overhead": median(step / bare - 1 for step, bare in pairs),
        "pictures_per_second": {kind: pictures / median(seconds[kind]) for kind in ("bare step", "training step")},
        "seconds": seconds,
        "machine": machine(str(accelerator.device)),
        "versions": {
            "python": platform.python_version(),
            **{lib.__name__: lib.__version__ for lib in (torch, accelerate, diffusers, transformers, mar_hf)},
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result for the eye: a Markdown table under one line of settings."""
    hardware = result["machine"].get("gpu") or f"{result['machine']['cpu']}, {result['machine']['threads']} threads"
    rows = [
        f"{' '.join(result['words'])}: {result['parameters'] / 1e6:.1f} million parameters, {result['num_tokens']} "
        f"tokens, {result['batch_size']} pictures a step, {result['data']}, mixed precision "
        f"{result['mixed_precision']}, {hardware}, "
        + ", ".join(f"{library} {version}" for library, version in result["versions"].items()),
        "",
        "| step | median ms | quartiles | pictures per second |",
        "|---|---|---|---|",
    ]
    for kind, values in result["seconds"].items():
        low, middle, high = (1000 * value for value in quantiles(values, n=4, method="inclusive"))
        rate = result["pictures_per_second"].get(kind)
        rows.append(f"| {kind} | {middle:.2f} | {low:.2f} to {high:.2f} | {f'{rate:,.0f}' if rate else ''} |")
    return "\n".join([*rows, "", f"overhead {result['overhead']:.1%} (median of {len(values)} pairs)"])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, append the record."""
    options, words = build_parser().parse_known_args(argv)
    result = run(options, words)
    print(table(result))
    append_record(options.output, result)


if __name__ == "__main__":
    main()
