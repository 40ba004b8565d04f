# SPDX-License-Identifier: Apache-2.0
"""The `mar-hf` command: convert and export checkpoints, generate pictures, describe a model."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from .conversion import ORIGINAL_SCALING_FACTOR, convert_checkpoint, export_checkpoint
from .conversion.checkpoints import read_config, read_json, weight_files
from .demo import DEMO_CHECKPOINTS, demo_checkpoint, demo_text_encoder
from .evaluation import choose_classes, class_name, image_generator
from .models import BACKBONES, ARConfig, load_text_encoder
from .pipelines import MARPipeline
from .tokenizers import ImageTokenizer, ImageTokenizerConfig
from .utils import draw_grid


FEW_CLASSES = 40
SETTINGS = ("num_inference_steps", "num_diffusion_steps", "guidance_scale", "temperature")


def build_parser() -> argparse.ArgumentParser:
    """The command line, with one sub-command for each thing it does."""
    parser = argparse.ArgumentParser(prog="mar-hf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(run=function)
        return sub

    sub = command(convert)
    sub.add_argument("src", metavar="SRC", help="checkpoint-last.pth, .safetensors, or a KL autoencoder's .ckpt")
    sub.add_argument("dst", metavar="DST", help="folder to write; must not hold anything yet")
    sub.add_argument("--vae", metavar="KL", help="the KL autoencoder's file: DST becomes a whole pipeline")
    sub.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or raw (default: ema)")
    sub.add_argument("--config", metavar="ORIGINAL_ARGS.json", help="arguments of the original model's constructor")
    sub.add_argument(
        "--scaling-factor",
        type=float,
        default=ORIGINAL_SCALING_FACTOR,
        help="what unit-scales the autoencoder's latents (default: %(default)s)",
    )

    sub = command(export)
    sub.add_argument("src", metavar="SRC", help="folder of a pipeline, a transformer or an image tokenizer")
    sub.add_argument("dst", metavar="DST", help="a folder for a pipeline, else a .safetensors, .pth or .ckpt file")

    sub = command(generate)
    _add_model(sub)
    sub.add_argument(
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help=f"names or numbers (default: all if there are at most {FEW_CLASSES}, else 8 of them)",
    )
    sub.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts, for models that take them")
    sub.add_argument(
        "--text-encoder",
        metavar="FOLDER",
        help="for texts, where the model comes without: folder or hub id (`--demo` finds its own, if installed)",
    )
    sub.add_argument(
        "--num-images-per-class", "--num-images-per-prompt", type=int, default=4, help="(default: %(default)s)"
    )
    sub.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    for name in SETTINGS:
        kind = int if name.endswith("steps") else float
        sub.add_argument(f"--{name.replace('_', '-')}", type=kind, help="(default: the model's own)")
    sub.add_argument("--output", type=Path, metavar="FILE.png", help="the labelled grid (default: samples.png)")
    sub.add_argument("--output-dir", type=Path, metavar="FOLDER", help="one PNG per picture")
    sub.add_argument("--batch-size", type=int, default=32, help="pictures at a time (default: %(default)s)")
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")

    sub = command(info)
    _add_model(sub)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="MODEL", nargs="?", help="a folder or a hub id")
    which.add_argument(
        "--demo",
        nargs="?",
        const=True,
        choices=list(DEMO_CHECKPOINTS),
        help="a small model that comes with the package (default: emoji; with `--prompt`: text)",
    )


def convert(args: argparse.Namespace) -> None:
    """turn an original checkpoint into a folder of this package"""
    start = time.perf_counter()
    convert_checkpoint(args.src, args.dst, args.vae, args.weights, args.config, args.scaling_factor)
    print(f"{args.dst}: written in {time.perf_counter() - start:.1f} s")


def export(args: argparse.Namespace) -> None:
    """write a saved model or pipeline back under the original's names"""
    start = time.perf_counter()
    export_checkpoint(args.src, args.dst)
    print(f"{args.dst}: written in {time.perf_counter() - start:.1f} s")


def generate(args: argparse.Namespace) -> None:
    """draw pictures of some classes or texts, as a labelled grid or as single files"""
    start = time.perf_counter()
    if args.output is None and args.output_dir is None:
        args.output = Path("samples.png")
    if args.output is not None and args.output.suffix.lower() != ".png":
        raise ValueError(f"`--output` is {str(args.output)!r}, expected a file ending in .png")
    for name in ("num_images_per_class", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` is {getattr(args, name)}, it has to be at least 1")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch says it with either
        raise ValueError(f"`--device` is {args.device!r}, which cannot be used here: {error}") from error
    pipeline = MARPipeline.from_pretrained(_model(args), **_text_encoder(args)).to(args.device)
    pipeline.set_progress_bar_config(disable=None)  # shown on a terminal only

    kind, wanted, names = choose_subjects(pipeline, args.class_labels, args.prompt)
    settings = {name: getattr(args, name) for name in SETTINGS}
    jobs = [(index, number) for index in range(len(wanted)) for number in range(args.num_images_per_class)]
    images = []
    for first in range(0, len(jobs), args.batch_size):
        batch = jobs[first : first + args.batch_size]
        generators = [image_generator(args.seed, wanted[index], number) for index, number in batch]
        subjects = {kind: [wanted[index] for index, _ in batch]}
        images += pipeline(**subjects, generator=generators, **settings).images

    written = []
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(images, names).save(args.output)
        written.append(str(args.output))
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for (index, number), image in zip(jobs, images, strict=True):
            slug = re.sub(r"\W+", "-", names[index]).strip("-")[:80]
            place = wanted[index] if kind == "class_labels" else index
            image.save(args.output_dir / f"{place:04d}-{slug}-{number:03d}.png")
        written.append(f"{args.output_dir}/")
    print(f"{len(images)} pictures in {time.perf_counter() - start:.1f} s: {', '.join(written)}")


def info(args: argparse.Namespace) -> None:
    """describe a model: components, sizes, geometry, scheduler, saved defaults, classes"""
    model = _model(args)
    folder = Path(model if Path(model).is_dir() else MARPipeline.download(model))
    print("\n".join(f"{key:<13}{value}".rstrip() for key, value in describe(folder)))


def _demo(args: argparse.Namespace) -> str | None:
    """Name of the demo; where only `--demo` is said, the one that takes what is asked for."""
    if args.demo is True:
        return "emoji" if vars(args).get("prompt") is None else "text"
    return args.demo


def _model(args: argparse.Namespace) -> str:
    demo = _demo(args)
    return args.model if demo is None else demo_checkpoint(demo)


def _text_encoder(args: argparse.Namespace) -> dict[str, Any]:
    if args.prompt is None:
        if args.text_encoder is not None:
            raise ValueError("`--text-encoder` goes with `--prompt`")
        return {}
    source = args.text_encoder
    if source is None and _demo(args) == "text":
        try:
            source = demo_text_encoder()
        except ImportError as error:
            raise ValueError(error) from error
    return {} if source is None else dict(zip(("text_encoder", "tokenizer"), load_text_encoder(source), strict=True))


def choose_subjects(
    pipeline: MARPipeline, class_labels: Sequence[str] | None, prompts: Sequence[str] | None
) -> tuple[str, list[int] | list[str], list[str]]:
    """What is drawn: classes, or texts.

    Args:
        pipeline ([`MARPipeline`]): it knows its classes.
        class_labels (`Sequence[str]`, *optional*): names or numbers; None: see `choose_classes`.
        prompts (`Sequence[str]`, *optional*): texts instead.

    Returns:
        the pipeline's argument, its values, and what to call each of them.

    Raises:
        ValueError: if both or, for a model that knows no classes, none are given.
    """
    if prompts is not None:
        if class_labels is not None:
            raise ValueError("`--prompt` and `--class-labels` do not go together here")
        return "prompt", list(prompts), list(prompts)
    if pipeline.transformer.config.num_classes == 0:
        raise ValueError("this model knows no classes: give it a `--prompt`")
    labels = choose_classes(pipeline, class_labels, "--class-labels")
    return "class_labels", labels, [class_name(pipeline, label) for label in labels]


def describe(folder: Path) -> list[tuple[str, str]]:
    """What `mar-hf info` says of a pipeline's, a transformer's or an image tokenizer's folder, as (key, value) rows.

    Args:
        folder (`pathlib.Path`): only its configurations and the headers of its weight files are read.

    Returns:
        `list[tuple[str, str]]`: rows of one component each, then geometry, scheduler, defaults, classes where known.

    Raises:
        ValueError: if the folder is none of these or a file in it is broken.
    """
    index = _json(folder / "model_index.json")
    parts = {"": folder}
    if index:
        parts = {
            key: folder / key for key, value in index.items() if isinstance(value, list) and (folder / key).is_dir()
        }
    configs = {key: _json(part / "config.json") for key, part in parts.items()}
    if not any(configs.values()):
        raise ValueError(f"{folder}: neither model_index.json nor config.json, no model that can be described")
    rows = [("model", f"{index.get('_class_name', 'one component')} in {folder}")]
    for key, part in parts.items():
        config = configs[key] or _json(part / "scheduler_config.json")
        name = config.get("_class_name") or " ".join(config.get("architectures") or ["?"])
        rows.append((key or "component", f"{name:<24}{_size(part) if configs[key] else ''}"))
    by_type = {config.get("model_type"): parts[key] for key, config in configs.items()}
    transformer = next((part for name, part in by_type.items() if name in BACKBONES), None)
    rows += _geometry(transformer, by_type.get(ImageTokenizerConfig.model_type))
    if scheduler := _json(folder / "scheduler" / "scheduler_config.json"):
        rows.append(("timesteps", _settings(scheduler)))
    if defaults := index.get("generation_defaults"):
        rows.append(("defaults", _settings(defaults)))
    if names := index.get("id2label"):
        few = f": {', '.join(names.values())}" if len(names) <= FEW_CLASSES else ""
        rows.append(("classes", f"{len(names)}{few}"))
    return rows


def _geometry(transformer: Path | None, tokenizer: Path | None) -> list[tuple[str, str]]:
    rows = []
    stride = None
    if tokenizer:
        config = read_config(tokenizer, ImageTokenizerConfig)
        with torch.device("meta"):
            stride = ImageTokenizer(config).stride
        kind = config.autoencoder["_class_name"] if config.autoencoder else "pixels, no autoencoder"
        width = config.latent_channels * config.patch_size**2
        rows.append(("tokens", f"{kind}; stride {stride}, patch {config.patch_size}, token width {width}"))
    if transformer:
        config = read_config(transformer, BACKBONES[_json(transformer / "config.json")["model_type"]][0])
        grid = f"{config.grid_height} x {config.grid_width} tokens of width {config.token_dim}"
        pixels = f"{config.grid_width * stride} x {config.grid_height * stride} pixels = " if stride else ""
        rows.append(("picture", pixels + grid))
        if isinstance(config, ARConfig):
            kind = f"causal, {config.order} order, width {config.hidden_size}, {config.num_layers} layers"
        else:
            layers = f"{config.num_encoder_layers} + {config.num_decoder_layers} layers"
            kind = f"masked, {config.order} order, width {config.hidden_size}, {layers}"
        rows.append(("backbone", f"{kind}, {config.num_attention_heads} heads, {config.num_classes} classes"))
        if config.text_dim is not None:
            texts = f"up to {config.num_text_tokens} tokens of width {config.text_dim}"
            rows.append(("texts", f"{texts}, {config.text_aligner_layers} aligner layers"))
        rows.append(("head", f"{config.head_type}, {_settings(config.head_config)}"))
    return rows


def _size(folder: Path) -> str:
    """Parameters and bytes of the weights in a folder, from the files' headers."""
    parameters = size = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file}: truncated or no safetensors file ({error})") from error
        parameters += sum(torch.Size(shape).numel() for shape in shapes)
        size += file.stat().st_size
    return f"{parameters:>13,} parameters {size / 1e6:>10.1f} MB" if size else "no weights in its folder"


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if not key.startswith("_"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `mar-hf` command.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; None takes those of the process.

    Returns:
        `int`: 0, or 2 after an error, which is told in one line on the standard error output.
    """
    args = build_parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    try:
        args.run(args)
    except (ValueError, OSError, StrictDataclassError) as error:
        print("mar-hf:", *str(error).split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
