# SPDX-License-Identifier: Apache-2.0
"""Seconds per picture, split into backbone, head and decoding, and peak memory, with all settings that decide them.

    python benchmarks/benchmark_generation.py --model base --batch-size 4 --output results.jsonl

`benchmarks/README.md` says what exactly is timed.
"""

import argparse
import json
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL

import mar_hf
from mar_hf import ImageTokenizer, MARConfig, MARForImageGeneration, MARPipeline, TokenDDPMScheduler


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("backbone", "head", "decoding")
# The autoencoder of the released models: 16 channels at a 16th of the sides.
KL16 = {
    "block_out_channels": (128, 128, 256, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 256,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="demo",
        help=f"{', '.join(MARConfig.presets)} (random weights, 256 x 256), a pipeline's folder, or demo (default)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="pictures in one call (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, help="autoregressive steps (default: the model's own)")
    parser.add_argument("--num-diffusion-steps", type=int, help="head steps (default: the model's own)")
    parser.add_argument("--guidance-scale", type=float, help="1.0 switches guidance off (default: the model's own)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed calls after a short one (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a line of JSON is appended to this file")
    return parser


@torch.no_grad()
def random_pipeline(preset: str, device: str, **settings: Any) -> MARPipeline:
    """A released size with random weights: the arithmetic of the real model, pictures of nothing.

    Args:
        preset (`str`): a name in `MARConfig.presets`.
        device (`str`): where to make it.
        settings (`Any`): of the configuration, where they are not the preset's.

    Returns:
        [`MARPipeline`]: with an autoencoder shaped like the released one.
    """
    with torch.device(device):
        transformer = MARForImageGeneration(MARConfig.preset(preset, **settings)).eval()
        vae = ImageTokenizer.from_autoencoder(AutoencoderKL(**KL16).eval(), scaling_factor=0.2325)
    # A new head is zero where it would act: multiplying zeros takes less power than real weights do, hence less time.
    for parameter in transformer.head.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return MARPipeline(transformer=transformer, vae=vae, scheduler=TokenDDPMScheduler(max_timestep=999))


def load_pipeline(model: str, device: str, dtype: torch.dtype) -> MARPipeline:
    """The pipeline that `--model` names, quiet, on the device."""
    if model in MARConfig.presets:
        # Random weights make the sampler run away, and the pipeline warn.
        logging.getLogger("mar_hf").setLevel(logging.ERROR)
        pipe = random_pipeline(model, device)
    else:
        pipe = MARPipeline.from_pretrained(mar_hf.demo_checkpoint() if model == "demo" else model)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


class Stopwatch:
    """Seconds spent inside chosen methods of chosen objects.

    Args:
        device (`str`): where they compute; a CUDA device is waited for before the clock is read.
        parts (`Sequence[str]`, *optional*, defaults to `PARTS`): names to count under.
    """

    def __init__(self, device: str, parts: Sequence[str] = PARTS):
        self.device = torch.device(device)
        self.seconds = dict.fromkeys(parts, 0.0)

    def now(self) -> float:
        """The time when everything asked for so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def on(self, owner: Any, method: str, part: str) -> Iterator[None]:
        """Count the calls of a method as one of the parts.

        Args:
            owner (`Any`): the object; its class stays as it is.
            method (`str`): the method's name.
            part (`str`): where its time goes.
        """
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = call(*args, **kwargs)
            self.seconds[part] += self.now() - start
            return result

        setattr(owner, method, timed)
        try:
            yield
        finally:
            delattr(owner, method)


def time_call(pipe: MARPipeline, device: str, call: dict[str, Any]) -> dict[str, float]:
    """One call of the pipeline: seconds for each part, for everything else and in all."""
    watch = Stopwatch(device)
    with ExitStack() as stack:
        stack.enter_context(watch.on(pipe.transformer, "forward", "backbone"))
        stack.enter_context(watch.on(pipe.transformer.head, "sample", "head"))
        stack.enter_context(watch.on(pipe.vae, "decode", "decoding"))
        start = watch.now()
        pipe(**call, output_type="pt")
        total = watch.now() - start
    return {**watch.seconds, "other": total - sum(watch.seconds.values()), "total": total}


def peak_memory(device: str) -> dict[str, float]:
    """Most megabytes (10^6 bytes) held in RAM since the process started, and on the device since the last reset."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    if torch.device(device).type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device) / 1e6
    return peak


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    described = {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()}
    described |= {"threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}"}
    if torch.device(device).type == "cuda":
        described |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return described


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, warm up, measure.

    Args:
        args (`argparse.Namespace`): the command line.

    Returns:
        `dict[str, Any]`: settings and results, ready for JSON; `seconds_per_image` is that of the median call.

    Raises:
        ValueError: if the batch or the number of repeats is below 1.
    """
    for name in ("batch_size", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` has to be at least 1, got {getattr(args, name)}.")
    pipe = load_pipeline(args.model, args.device, DTYPES[args.dtype])
    config = pipe.transformer.config
    asked = {name: getattr(args, name) for name in ("num_inference_steps", "num_diffusion_steps", "guidance_scale")}
    settings = pipe.generation_defaults | {name: value for name, value in asked.items() if value is not None}
    call = {
        "class_labels": [number % config.num_classes for number in range(args.batch_size)],
        "generator": [torch.Generator().manual_seed(number) for number in range(args.batch_size)],
        **settings,
    }
    time_call(pipe, args.device, call | {"num_inference_steps": 1, "num_diffusion_steps": 2})
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    runs = [time_call(pipe, args.device, call) for _ in range(args.repeats)]
    median = sorted(runs, key=lambda seconds: seconds["total"])[len(runs) // 2]
    stride = pipe.vae.stride
    parts = {"backbone": pipe.transformer.model, "head": pipe.transformer.head, "tokenizer": pipe.vae}
    return {
        "model": args.model,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "image_size": [config.grid_height * stride, config.grid_width * stride],
        "num_tokens": config.num_tokens,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device,
        "scheduler": type(pipe.scheduler).__name__,
        "settings": settings,
        "repeats": args.repeats,
        "seconds_per_image": {part: seconds / args.batch_size for part, seconds in median.items()},
        "seconds_per_call": [seconds["total"] for seconds in runs],
        "peak_memory_mb": peak_memory(args.device),
        "machine": machine(args.device),
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (torch, diffusers, transformers, mar_hf)},
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result for the eye: a Markdown table under one line of settings."""
    steps = "{num_inference_steps} x {num_diffusion_steps} steps, guidance {guidance_scale}".format(
        **result["settings"]
    )
    hardware = result["machine"].get("gpu") or f"{result['machine']['cpu']}, {result['machine']['threads']} threads"
    calls, seconds = result["seconds_per_call"], result["seconds_per_image"]
    rows = [
        f"{result['model']}, batch {result['batch_size']}, {steps}, {result['dtype']}, {hardware}",
        "",
        "| part | seconds per image | share |",
        "|---|---|---|",
        *(f"| {part} | {value:.4f} | {value / seconds['total']:.1%} |" for part, value in seconds.items()),
        "",
        f"{len(calls)} calls of {min(calls):.3f} to {max(calls):.3f} s; peak memory "
        + ", ".join(f"{name} {value:,.0f} MB" for name, value in result["peak_memory_mb"].items()),
    ]
    return "\n".join(rows)


def append_record(path: Path | None, result: dict[str, Any]) -> None:
    """Append a result to a file as a line of JSON; None: no file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, append the record."""
    args = build_parser().parse_args(argv)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    result = run(args)
    print(table(result))
    append_record(args.output, result)


if __name__ == "__main__":
    main()
