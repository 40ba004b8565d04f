# SPDX-License-Identifier: Apache-2.0
"""What the `mar-hf` command does. Its arguments, and what is refused before this is imported: `mar_hf_command`."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from mar_hf_command import SETTINGS, check_configs, main

from .conversion import ORIGINAL_SCALING_FACTOR, convert_checkpoint, export_checkpoint
from .conversion.checkpoints import read_config, read_json, weight_files
from .evaluation import choose_classes, class_name, image_generator
from .evaluation.classes import is_conditional
from .models import BACKBONES, ARConfig, load_text_encoder
from .pipelines import MARPipeline
from .tokenizers import ImageTokenizer, ImageTokenizerConfig
from .utils import atomic_file, draw_grid


FEW_CLASSES = 40
GRID_LIMIT = 10_000  # pictures, which are all held until the grid is drawn
SILENCE = 10.0  # seconds between two lines about a long generation that no terminal shows
BAR = "{percentage:3.0f}%|{bar}| {n:.0f}/{total} pictures [{elapsed}<{remaining}]"


def run(args: argparse.Namespace) -> None:
    """Do what the arguments say.

    Args:
        args (`argparse.Namespace`): checked, as `mar_hf_command.main` hands them over.
    """
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    {"convert": convert, "export": export, "generate": generate, "info": info}[args.command](args)


def convert(args: argparse.Namespace) -> None:
    """Turn an original checkpoint into a folder of this package."""
    start = time.perf_counter()
    factor = ORIGINAL_SCALING_FACTOR if args.scaling_factor is None else args.scaling_factor
    convert_checkpoint(args.src, args.dst, args.vae, args.weights, args.config, factor)
    print(f"{args.dst}: written in {time.perf_counter() - start:.1f} s")


def export(args: argparse.Namespace) -> None:
    """Write a saved model or pipeline back under the original's names."""
    start = time.perf_counter()
    export_checkpoint(args.src, args.dst)
    print(f"{args.dst}: written in {time.perf_counter() - start:.1f} s")


def generate(args: argparse.Namespace) -> None:
    """Draw pictures of some classes or texts, as a labelled grid or as single files."""
    start = time.perf_counter()
    pipeline = MARPipeline.from_pretrained(args.model, **_text_encoder(args)).to(_device(args.device))
    pipeline.set_progress_bar_config(disable=True)  # there is one bar for all
    kind, wanted, names = choose_subjects(pipeline, args.class_labels, args.prompt)
    count = len(wanted) * args.num_images_per_class
    if args.output is not None and count > GRID_LIMIT:
        raise ValueError(f"`--output` would hold {count} pictures, at most {GRID_LIMIT} fit: `--output-dir` takes all")
    images = []
    for index, number, image in _pictures(pipeline, kind, wanted, args):
        if args.output is not None:
            images.append(image)
        if args.output_dir is not None:
            place = wanted[index] if kind == "class_labels" else index
            with atomic_file(args.output_dir / _file_name(place, names[index], number)) as path:
                image.save(path)
    if args.output is not None:
        with atomic_file(args.output) as path:
            draw_grid(images, names).save(path)
    written = [str(args.output)] * (args.output is not None) + [f"{args.output_dir}/"] * (args.output_dir is not None)
    print(f"{count} pictures in {time.perf_counter() - start:.1f} s: {', '.join(written)}")


def _pictures(
    pipeline: MARPipeline, kind: str, wanted: list[int] | list[str], args: argparse.Namespace
) -> Iterator[tuple[int, int, Image.Image]]:
    """Place of the subject, number and picture, as they are done, batch after batch."""
    total = len(wanted) * args.num_images_per_class
    settings = {name: getattr(args, name) for name in (*SETTINGS, "decoding")}
    with _progress(total) as tell:
        for first in range(0, total, args.batch_size):
            last = min(first + args.batch_size, total)
            batch = [divmod(job, args.num_images_per_class) for job in range(first, last)]

            def count(pipeline: MARPipeline, step: int, *_: Any, first: int = first, last: int = last) -> dict:
                tell(first + (last - first) * (step + 1) / pipeline.num_timesteps)
                return {}

            images = pipeline(
                **{kind: len(batch) if kind == "num_images_per_prompt" else [wanted[index] for index, _ in batch]},
                generator=[image_generator(args.seed, wanted[index], number) for index, number in batch],
                callback_on_step_end=count,
                callback_on_step_end_tensor_inputs=[],
                **settings,
            ).images
            for (index, number), image in zip(batch, images, strict=True):
                yield index, number, image


@contextmanager
def _progress(total: int) -> Iterator[Callable[[float], None]]:
    """What takes the number of pictures done and tells of it: a bar on a terminal, elsewhere a line now and then."""
    if sys.stderr.isatty():
        with tqdm(total=total, bar_format=BAR, file=sys.stderr) as bar:
            yield lambda done: bar.update(done - bar.n)
        return
    start = told = time.perf_counter()

    def tell(done: float) -> None:
        nonlocal told
        now = time.perf_counter()
        if now - told >= SILENCE:
            told = now
            left = (now - start) * (total - done) / done
            print(f"{int(done)} of {total} pictures in {now - start:.0f} s, {left:.0f} s to go", file=sys.stderr)

    yield tell


def _file_name(place: int, name: str, number: int) -> str:
    """The numbers make it unique; of the name, which may be anything, there are letters and digits only."""
    slug = re.sub(r"\W+", "-", name).strip("-")[:80].encode()[:160].decode(errors="ignore")
    return "-".join(part for part in (f"{place:04d}", slug, f"{number:03d}.png") if part)


def _device(name: str | None) -> str:
    """The device asked for, which has to work, or the one to be taken."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch says it with either
        reason = str(error).split("\n")[0]
        raise ValueError(f"`--device` is {name!r}, which cannot be used here: {reason}") from error
    return name


def info(args: argparse.Namespace) -> None:
    """Describe a model: components, sizes, geometry, scheduler, saved defaults, classes."""
    folder = Path(args.model)
    if not folder.is_dir():
        folder = Path(MARPipeline.download(args.model))
        check_configs(folder)
    print("\n".join(f"{key:<13}{value}".rstrip() for key, value in describe(folder)))


def _text_encoder(args: argparse.Namespace) -> dict[str, Any]:
    if args.text_encoder is None:
        return {}
    return dict(zip(("text_encoder", "tokenizer"), load_text_encoder(args.text_encoder), strict=True))


def choose_subjects(
    pipeline: MARPipeline, class_labels: Sequence[str] | None, prompts: Sequence[str] | None
) -> tuple[str, list[int] | list[str], list[str]]:
    """What is drawn: classes, or texts.

    Args:
        pipeline ([`MARPipeline`]): it knows its classes.
        class_labels (`Sequence[str]`, *optional*): names or numbers; None: see `choose_classes`.
        prompts (`Sequence[str]`, *optional*): texts instead.

    Returns:
        the pipeline's argument, its values, and what to call each of them. A model that was trained without classes
            and texts is asked for a number of pictures; that of its one class was never trained.

    Raises:
        ValueError: if the model knows texts only and none are given, or a class is unknown.
    """
    if prompts is not None:
        return "prompt", list(prompts), list(prompts)
    if pipeline.transformer.config.num_classes == 0:
        raise ValueError("this model knows no classes: give it a `--prompt`")
    if not is_conditional(pipeline):
        if class_labels is None:
            return "num_images_per_prompt", [0], ["pictures"]
        print("mar-hf: `--class-labels`: this model was trained without classes, it seems", file=sys.stderr)
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
            key: folder / key
            for key, value in index.items()
            if isinstance(value, list) and key.isidentifier() and (folder / key).is_dir()
        }
    configs = {key: _json(part / "config.json") for key, part in parts.items()}
    if not any(configs.values()):
        raise ValueError(f"{folder}: neither model_index.json nor config.json, no model that can be described")
    rows = [("model", f"{index.get('_class_name', 'one component')} in {folder}")]
    for key, part in parts.items():
        config = configs[key] or _json(part / "scheduler_config.json")
        name = config.get("_class_name") or " ".join(map(str, config.get("architectures") or "?"))
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


if __name__ == "__main__":
    sys.exit(main())
