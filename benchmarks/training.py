# SPDX-License-Identifier: Apache-2.0
"""The training step, from cached latents: against the plain reference, or against its own bare form.

    python benchmarks/training.py --preset mar-b-cpu --output results.jsonl
    python benchmarks/training.py --config examples/configs/digits.json

Options that are not listed here are those of `examples/train.py`. `benchmarks/README.md` says what exactly is timed.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import accelerate
import diffusers
import plain_reference
import torch
import transformers
from measuring import (
    DTYPES,
    KL16,
    append_record,
    flop_counter,
    hardware,
    machine,
    matmul_rate,
    measure_alone,
    now,
    peak_memory,
    versions,
)
from safetensors.torch import save_file

from mar_hf import ImageTokenizerConfig
from mar_hf.training import Trainer, TrainingArguments, parse_arguments
from mar_hf.training.batches import example_generators
from mar_hf.training.latent_data import INDEX, shard_name
from mar_hf.training.model_inputs import draw_inputs, encode
from mar_hf.training.model_setup import add_lora, build_model, parameter_groups


ROOT = Path(__file__).resolve().parents[1]
_BASE = ["--config", str(ROOT / "examples" / "configs" / "imagenet_mar_base.json"), "--dataloader_num_workers", "0"]
_BASE += ["--train_batch_size", "8"]
# Options of the training script; those on the command line have the last word.
PRESETS = {
    "mar-b-cpu": [*_BASE, "--mixed_precision", "no"],
    "mar-b-cpu-bf16": [*_BASE, "--mixed_precision", "bf16"],
}
# Untimed pairs; with a reference the first one is long enough, and its operations are counted.
WARM_UP = {"bare step": 3, "plain step": 1}
# Steps after which a process alone has held all that it ever holds.
STEPS_ALONE = 2
KINDS = {"ours": "training step", "plain": "plain step"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help=f"{', '.join(PRESETS)}: settings, with `--reference` and `--latents kl16`"
    )
    parser.add_argument(
        "--reference", action="store_true", help="compare with the plain reference in float32, not with the bare step"
    )
    parser.add_argument("--repeats", type=int, help="timed steps of each kind (default: 30, or 3 with a reference)")
    parser.add_argument(
        "--latents",
        choices=("pixels", "kl16"),
        help="random ones like pixels (default), or like the released autoencoder's (16 channels, a 16th of the "
        "sides), where --train_data_dir names no others",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that show the memory")
    parser.add_argument(
        "--only", choices=KINDS, help="a few steps of one kind, and the memory that they took: such a process"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a line of JSON is appended to this file")
    return parser


def random_cache(folder: Path, args: TrainingArguments, kind: str) -> str:
    """Latents of nothing, with a tokenizer that has no weights: training from a cache needs none.

    Args:
        folder (`Path`): where to write.
        args (`TrainingArguments`): for the resolution, the patch size and the batch size.
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
    save_file({**tensors, "label": torch.arange(count) % len(classes)}, folder / shard_name(0))
    index = {"num_examples": count, "shard_size": count, "class_names": classes, "resolution": args.resolution}
    index |= {"latent_shape": shape, "tensors": names, "dtype": "float32"}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return str(folder)


def bare_step(trainer: Trainer, batch: dict[str, torch.Tensor]) -> Callable[[list[dict[str, Any]]], None]:
    """A second model with its optimizer: nothing but forward, backward and optimizer, always on the same tokens.

    Args:
        trainer (`Trainer`): whose model, settings and precision are copied.
        batch (`dict[str, torch.Tensor]`): the pictures.

    Returns:
        `Callable`: one step, given what the model leaves open for each of its batches.
    """
    args, accelerator = trainer.args, trainer.accelerator
    device = accelerator.device
    model = build_model(args, trainer.tokenizer, trainer.names)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model = add_lora(args, model).to(device).train()
    groups = parameter_groups(model, args.adam_weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=device.type in ("cpu", "cuda"))
    generators = example_generators(args.seed, batch["position"], device)
    tokens, labels = encode(batch, trainer.tokenizer, generators, device)

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


def plain_step(
    trainer: Trainer, model: torch.nn.Module, averages: list[torch.Tensor], batch: dict[str, torch.Tensor]
) -> Callable[[list[dict[str, Any]]], None]:
    """The plain reference's step in float32, with all that the original does in one: posterior, clipping, averages.

    Args:
        trainer (`Trainer`): whose settings are those of the step.
        model (`torch.nn.Module`): is trained.
        averages (`list[torch.Tensor]`): the averaged weights.
        batch (`dict[str, torch.Tensor]`): the pictures.

    Returns:
        `Callable`: one step, given what the model leaves open for each of its batches.
    """
    args, device = trainer.args, trainer.accelerator.device
    plain_reference.check_model(model)
    weights = list(model.parameters())
    groups = parameter_groups(model, args.adam_weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))
    generators = example_generators(args.seed, batch["position"], device)

    def step(drawn: list[dict[str, Any]]) -> None:
        for inputs in drawn:
            tokens, labels = encode(batch, trainer.tokenizer, generators, device)
            labels = labels if trainer.names else None
            loss = plain_reference.training_loss(model, trainer.noise_scheduler, tokens, inputs["mask"], labels)
            (loss / len(drawn)).backward()
        torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(averages, weights, strict=True):
                average.mul_(args.ema_decay).add_(weight, alpha=1 - args.ema_decay)

    return step


def second_plain_step(trainer: Trainer, batch: dict[str, torch.Tensor]) -> Callable[[list[dict[str, Any]]], None]:
    """`plain_step` of a second model of the same settings."""
    model = build_model(trainer.args, trainer.tokenizer, trainer.names)
    model = model.to(trainer.accelerator.device).train()
    return plain_step(trainer, model, [weight.detach().clone() for weight in model.parameters()], batch)


@torch.no_grad()
def loss_difference(trainer: Trainer, batch: dict[str, torch.Tensor]) -> float:
    """The relative difference between our loss and the plain reference's: two pictures, the same weights and draws.

    Args:
        trainer (`Trainer`): a run.
        batch (`dict[str, torch.Tensor]`): pictures.

    Returns:
        `float`: without dropout, in the precision of the run.
    """
    args, model, device = trainer.args, trainer.bare_model, trainer.accelerator.device
    batch = {name: value[:2] for name, value in batch.items()}
    generators = example_generators(args.seed, batch["position"], device)
    tokens, labels = encode(batch, trainer.tokenizer, generators, device)
    labels = labels if trainer.names else None
    mask = draw_inputs(args, model, generators, 0, device)["mask"]
    rows = mask.numel() * model.head.batch_multiplier
    generator = torch.Generator().manual_seed(args.seed)
    timesteps = torch.randint(0, len(trainer.noise_scheduler), (rows,), generator=generator).to(device)
    noise = torch.randn(rows, tokens.shape[-1], generator=generator).to(device)
    # A new head is zero where it would act: then the loss depends on nothing.
    zeros = [parameter for parameter in model.head.parameters() if not parameter.any()]
    for parameter in zeros:
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    with trainer.accelerator.autocast():
        ours = model(
            tokens, mask, labels, noise_scheduler=trainer.noise_scheduler, timesteps=timesteps, noise=noise
        ).loss
    plain = plain_reference.training_loss(model, trainer.noise_scheduler, tokens, mask, labels, timesteps, noise)
    model.train()
    for parameter in zeros:
        parameter.zero_()
    return abs(ours.item() / plain.item() - 1)


def draw_all(trainer: Trainer) -> list[dict[str, Any]]:
    """What the model leaves open for each batch of the trainer's next step: as many masked tokens as there."""
    args, device = trainer.args, trainer.accelerator.device
    numbers = range(args.gradient_accumulation_steps)
    first = trainer.progress.step * len(numbers)
    generators = example_generators(args.seed, range(args.train_batch_size), device)
    return [draw_inputs(args, trainer.bare_model, generators, first + n, device) for n in numbers]


def time_steps(
    trainer: Trainer, other: str, repeats: int
) -> tuple[dict[str, list[float]], dict[str, int], float | None]:
    """Training steps and others in turns, each pair with as many masked tokens.

    Args:
        trainer (`Trainer`): a new run.
        other (`str`): `"bare step"` or `"plain step"`.
        repeats (`int`): steps of each kind.

    Returns:
        `dict[str, list[float]]`: seconds of the other kind and of `"training step"`, and of the latter's wait for
        `"data"`; `dict[str, int]`: floating-point operations of a plain step and of ours; and the difference of their
        losses. The last two are empty and None without a reference.
    """
    device = trainer.accelerator.device
    batches = iter(trainer.make_batches())
    batch, reference = next(batches), other == "plain step"
    difference = loss_difference(trainer, batch) if reference else None
    other_step = (second_plain_step if reference else bare_step)(trainer, batch)
    seconds: dict[str, list[float]] = {other: [], "training step": [], "data": []}
    operations: dict[str, int] = {}
    for repeat in range(WARM_UP[other] + repeats):
        drawn = draw_all(trainer)
        for kind in (other, "training step")[:: 1 if repeat % 2 else -1]:
            with flop_counter() if reference and repeat == 0 else nullcontext() as counter:
                start = now(device)
                if kind == other:
                    other_step(drawn)
                else:
                    pieces = [next(batches) for _ in drawn]
                    seconds["data"].append(now(device) - start)
                    trainer.step(pieces)
                seconds[kind].append(now(device) - start)
            if counter is not None:
                operations[kind] = counter.get_total_flops()
    return {kind: values[WARM_UP[other] :] for kind, values in seconds.items()}, operations, difference


def run_alone(trainer: Trainer, kind: str) -> dict[str, float]:
    """A few steps of one kind, in a process that does nothing else.

    Args:
        trainer (`Trainer`): a new run.
        kind (`str`): `"ours"` or `"plain"`, which trains the trainer's model and its averages.

    Returns:
        `dict[str, float]`: `peak_memory_mb`: of the process, or of the GPU.
    """
    device = trainer.accelerator.device
    batches = iter(trainer.make_batches())
    if kind == "plain":
        step = plain_step(trainer, trainer.bare_model, trainer.ema.shadow_params, next(batches))
    for _ in range(STEPS_ALONE):
        if kind == "plain":
            step(draw_all(trainer))
        else:
            trainer.step([next(batches) for _ in range(trainer.args.gradient_accumulation_steps)])
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_memory()
    return {"peak_memory_mb": peak}


def run(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Set up, warm up, measure.

    Args:
        options (`argparse.Namespace`): this script's own options.
        words (`list[str]`): those of the training script, beside the preset's.

    Returns:
        `dict[str, Any]`: settings and results, ready for JSON. `overhead` (training step / bare step - 1) or `ratio`
        (plain step / training step) is the median over pairs of steps. With `--only`: what `run_alone` returns.

    Raises:
        ValueError: if the number of repeats is below 2, or the training script refuses a setting.
    """
    if options.repeats < 2:
        raise ValueError(f"`--repeats` has to be at least 2, got {options.repeats}.")
    other = "plain step" if options.reference else "bare step"
    shown, words = words, [*PRESETS.get(options.preset, []), *words]
    with tempfile.TemporaryDirectory() as folder:
        args = parse_arguments(TrainingArguments, ["--output_dir", folder, "--report_to", "none", *words])
        data = args.train_data_dir or f"random latents like {options.latents}"
        args.train_data_dir = args.train_data_dir or random_cache(Path(folder), args, options.latents)
        trainer = Trainer(args)
        if options.only is not None:
            return run_alone(trainer, options.only)
        seconds, operations, difference = time_steps(trainer, other, options.repeats)
    pictures = args.train_batch_size * args.gradient_accumulation_steps
    accelerator = trainer.accelerator
    device = str(accelerator.device)
    ratios = [one / ours for one, ours in zip(seconds[other], seconds["training step"], strict=True)]
    result = {
        "preset": options.preset,
        "words": shown,
        "data": data,
        "parameters": trainer.num_params,
        "num_tokens": trainer.config.num_tokens,
        "batch_size": pictures,
        "mixed_precision": accelerator.mixed_precision,
        "device": device,
        "pictures_per_second": {kind: pictures / median(seconds[kind]) for kind in (other, "training step")},
        "seconds": seconds,
    }
    if options.reference:
        result |= {"ratio": median(ratios), "ratios": ratios, "difference": difference, "operations": operations}
        result["matmul"] = {name: matmul_rate(device, DTYPES[name]) for name in ("float32", "bfloat16")}
        if not options.no_memory:
            del trainer
            alone = {kind: ["--only", kind, "--latents", options.latents, *words] for kind in KINDS}
            measured = {KINDS[kind]: measure_alone(__file__, words) for kind, words in alone.items()}
            result["peak_memory_mb"] = {kind: found["peak_memory_mb"] for kind, found in measured.items()}
    else:
        result["overhead"] = median(1 / ratio for ratio in ratios) - 1
    return result | {
        "machine": machine(device),
        "versions": versions(accelerate, diffusers, transformers),
    }


def table(result: dict[str, Any]) -> str:
    """The result for the eye: a Markdown table under one line of settings."""
    words = [*([f"preset {result['preset']}"] if result["preset"] else []), *result["words"]]
    rows = [
        f"{' '.join(words)}: {result['parameters'] / 1e6:.1f} million parameters, {result['num_tokens']} tokens, "
        f"{result['batch_size']} pictures a step, {result['data']}, mixed precision "
        f"{result['mixed_precision']}, {hardware(result['machine'])}, load {result['machine'].get('load')}, "
        + ", ".join(f"{library} {version}" for library, version in result["versions"].items()),
        "",
        "| step | median ms | quartiles | pictures per second | TFLOP | most memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for kind, values in result["seconds"].items():
        low, middle, high = (1000 * value for value in quantiles(values, n=4, method="inclusive"))
        cells = [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        for found, form in (
            (result["pictures_per_second"].get(kind), ",.3g"),
            (result.get("operations", {}).get(kind, 0) / 1e12, ".2f"),
            (result.get("peak_memory_mb", {}).get(kind), ",.0f"),
        ):
            cells.append(f"{found:{form}}" if found else "")
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    pairs = f"(median of {len(values)} pairs)"
    if "overhead" in result:
        return "\n".join([*rows, "", f"overhead {result['overhead']:.1%} {pairs}"])
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in result["matmul"].items())
    low, high = min(result["ratios"]), max(result["ratios"])
    return "\n".join(
        [
            *rows,
            "",
            f"plain step: float32; losses on the same draws differ by {result['difference']:.1e}; matmul {rates}",
            f"plain step / training step {pairs}, {low:.2f} to {high:.2f}",
            f"ratio {result['ratio']:.2f}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, append the record."""
    options, words = build_parser().parse_known_args(argv)
    if options.preset is not None:
        options.reference, options.latents = True, options.latents or "kl16"
    options.latents = options.latents or "pixels"
    if options.repeats is None:
        options.repeats = 3 if options.reference else 30
    result = run(options, words)
    if options.only is not None:
        print(json.dumps(result))
        return
    print(table(result))
    append_record(options.output, result)


if __name__ == "__main__":
    main()
