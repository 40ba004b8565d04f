# SPDX-License-Identifier: Apache-2.0
"""Many pictures of every class, by any number of processes, into an image folder.

    accelerate launch examples/generate.py --pretrained_model_name_or_path out/mar/pipeline --output_dir out/samples \
        --num_images_per_class 50

Picture k of a class depends on the seed, the class and k: the number of processes does not matter, and neither does
stopping. Started again, it makes what is missing; with other settings it refuses the folder.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm
from training_utils import make_accelerator, parse_arguments

from mar_hf import MARPipeline
from mar_hf.cli import choose_classes, class_name, image_generator


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The arguments of the pipeline that have a default in the checkpoint.
SAMPLING = (
    *("num_inference_steps", "num_diffusion_steps", "guidance_scale", "temperature"),
    *("guidance_schedule", "token_schedule", "head_step_schedule", "generation_order"),
    *("guidance_interval", "guidance_refresh"),
)
SETTINGS_FILE = "settings.json"


@dataclass
class Arguments:
    """Settings of a generation; None means the checkpoint's own."""

    pretrained_model_name_or_path: str = field(metadata={"help": "folder or hub id of a pipeline"})
    output_dir: str = field(metadata={"help": "gets a folder of PNG files for each class"})
    num_images_per_class: int = field(default=10, metadata={"help": "pictures of each class"})
    class_labels: list[str] | None = field(default=None, metadata={"help": "names or numbers; default: all"})
    batch_size: int = field(default=32, metadata={"help": "pictures at once in each process"})
    seed: int = field(default=0, metadata={"help": "of all pictures"})
    num_inference_steps: int | None = field(default=None, metadata={"help": "autoregressive steps"})
    num_diffusion_steps: int | None = field(default=None, metadata={"help": "steps of the token head"})
    guidance_scale: float | None = field(default=None, metadata={"help": "1 means none"})
    temperature: float | None = field(default=None, metadata={"help": "of the noise that the head injects"})
    guidance_schedule: str | None = field(default=None, metadata={"help": "linear or constant"})
    token_schedule: str | None = field(default=None, metadata={"help": "cosine or constant"})
    head_step_schedule: str | None = field(default=None, metadata={"help": "constant or linear"})
    generation_order: str | None = field(default=None, metadata={"help": "random, raster, spiral, ..."})
    guidance_interval: list[float] | None = field(
        default=None, metadata={"help": "start and end, shares of the steps"}
    )
    guidance_refresh: int | None = field(default=None, metadata={"help": "guided steps for one unconditional pass"})
    scheduler: str | None = field(default=None, metadata={"help": "one of diffusers, such as DDIMScheduler"})
    dtype: str = field(default="float32", metadata={"help": "of the weights", "choices": list(DTYPES)})
    npz: bool = field(default=False, metadata={"help": "also write samples.npz: arr_0 (uint8, NHWC) and labels arr_1"})


def load_pipeline(model: str, accelerator: Accelerator, dtype: str = "float32") -> MARPipeline:
    """A quiet pipeline on this process's device.

    Args:
        model (`str`): folder or hub id.
        accelerator (`Accelerator`): knows the device.
        dtype (`str`, *optional*, defaults to `"float32"`): of the weights, a name in `DTYPES`.

    Returns:
        [`MARPipeline`].
    """
    with accelerator.main_process_first():  # one process downloads
        pipeline = MARPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device, DTYPES[dtype])


def use_scheduler(pipeline: MARPipeline, name: str) -> None:
    """Let a scheduler of diffusers run the head, with the configuration of the pipeline's own.

    Args:
        pipeline ([`MARPipeline`]): gets it.
        name (`str`): of the class.

    Raises:
        ValueError: if diffusers has no such scheduler.
    """
    scheduler = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler is None:
        raise ValueError(f"`scheduler` has to be one of diffusers, such as DPMSolverMultistepScheduler, got {name!r}.")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)


def class_folders(pipeline: MARPipeline, wanted: Sequence[str] | None = None) -> dict[int, str]:
    """The folder of each class: its name, with its number where several classes share the name.

    Args:
        pipeline ([`MARPipeline`]): it knows the names.
        wanted (`Sequence[str]`, *optional*): names or numbers; None means all classes.

    Returns:
        `dict[int, str]`: class number -> name of the folder.

    Raises:
        ValueError: if a name is unknown or a number out of range, or the model knows texts only.
    """
    limit = pipeline.transformer.config.num_classes
    if limit == 0:
        raise ValueError(
            "This model knows no classes, only texts: see evaluate_texts.py, and `--captions` of measure_speed.py."
        )
    names = [re.sub(r"[/\\]", "-", class_name(pipeline, label)) for label in range(limit)]
    labels = range(limit) if wanted is None else choose_classes(pipeline, wanted)
    if beyond := [label for label in labels if label >= limit]:
        raise ValueError(f"`class_labels` has to lie in 0..{limit - 1}, got {beyond}.")
    return {label: names[label] if names.count(names[label]) == 1 else f"{names[label]} {label}" for label in labels}


def is_conditional(pipeline: MARPipeline) -> bool:
    """Whether the model knows classes: one trained without them has a single class, which has no name.

    Args:
        pipeline ([`MARPipeline`]): of any kind.

    Returns:
        `bool`.
    """
    return bool(pipeline.config.id2label) or pipeline.transformer.config.num_classes > 1


def weights_digest(pipeline: MARPipeline) -> str:
    """What tells two trainings into the same folder apart.

    Args:
        pipeline ([`MARPipeline`]): with weights in memory.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (pipeline.transformer, pipeline.vae):
        for name, tensor in part.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def is_whole(path: pathlib.Path) -> bool:
    """Whether a picture is there and undamaged.

    Args:
        path (`pathlib.Path`): of a PNG file.

    Returns:
        `bool`.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError):  # Pillow's word for a broken PNG file
        return False
    return True


def claim_folder(folder: pathlib.Path, settings: dict, accelerator: Accelerator) -> None:
    """Note in a folder what its pictures are made with, or find the same noted there; every process calls this.

    Args:
        folder (`pathlib.Path`): made if need be.
        settings (`dict`): anything that JSON can hold.
        accelerator (`Accelerator`): of the run.

    Raises:
        ValueError: if the folder holds pictures of other settings, or other files.
    """
    note = folder / SETTINGS_FILE
    found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if found is None and folder.exists() and any(path.name != f"{SETTINGS_FILE}.partial" for path in folder.iterdir()):
        raise ValueError(f"`output_dir` {str(folder)!r} holds files, but no {SETTINGS_FILE}: it is not ours.")
    if found is not None and found != settings:
        differ = sorted(name for name in found | settings if found.get(name) != settings.get(name))
        pairs = ", ".join(f"{name} {found.get(name)!r} (now {settings.get(name)!r})" for name in differ)
        raise ValueError(f"`output_dir` {str(folder)!r} holds pictures made with {pairs}; take another folder.")
    accelerator.wait_for_everyone()  # all have looked
    if found is None and accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(settings, indent=2).encode())


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Write a file completely or not at all.

    Args:
        path (`pathlib.Path`): in an existing folder.
        data (`bytes`): all of it.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def generate(pipeline: MARPipeline, args: Arguments, accelerator: Accelerator) -> dict:
    """Make the pictures that are missing in `args.output_dir`; every process calls this.

    Args:
        pipeline ([`MARPipeline`]): of `args.pretrained_model_name_or_path`, see `load_pipeline`.
        args (`Arguments`): what to make.
        accelerator (`Accelerator`): shares the work between its processes.

    Returns:
        `dict`: the settings that stand in the folder, with the checkpoint's defaults filled in.

    Raises:
        ValueError: if a setting is out of its range, or the folder holds something else.
    """
    for name in ("num_images_per_class", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` has to be at least 1, got {getattr(args, name)}.")
    folders = class_folders(pipeline, args.class_labels)
    if args.scheduler is not None:
        use_scheduler(pipeline, args.scheduler)
    sampling = {name: getattr(args, name) for name in SAMPLING}
    sampling = {name: pipeline.generation_defaults[name] if v is None else v for name, v in sampling.items()}
    pipeline.check_inputs(pipeline.generation_defaults | sampling, list(folders), 1, None, None, "pil", [])
    sampling["guidance_interval"] = list(sampling["guidance_interval"])  # as JSON has it
    settings = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "weights": weights_digest(pipeline),
        "scheduler": type(pipeline.scheduler).__name__,
        "classes": list(folders.values()),
        **{name: getattr(args, name) for name in ("num_images_per_class", "batch_size", "seed", "dtype")},
        **sampling,
    }
    output = pathlib.Path(args.output_dir)
    claim_folder(output, settings, accelerator)

    # A batch is the same whoever makes it and whatever is there already: rounding depends on its neighbours, too.
    jobs = [(label, number) for label in folders for number in range(args.num_images_per_class)]
    paths = [output / folders[label] / f"{number:05d}.png" for label, number in jobs]
    firsts = range(0, len(jobs), args.batch_size)
    missing = [first for first in firsts if not all(map(is_whole, paths[first : first + args.batch_size]))]
    accelerator.wait_for_everyone()  # all have looked
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for first in tqdm(mine, desc="batches", disable=not accelerator.is_main_process):
        batch = jobs[first : first + args.batch_size]
        generators = [image_generator(args.seed, label, number) for label, number in batch]
        labels = {"class_labels": [label for label, _ in batch]}
        if not is_conditional(pipeline):
            labels = {"num_images_per_prompt": len(batch)}
        pictures = pipeline(**labels, generator=generators, **sampling).images
        for picture, path in zip(pictures, paths[first : first + args.batch_size], strict=True):
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            picture.save(partial, format="PNG")
            os.replace(partial, path)
    accelerator.wait_for_everyone()
    if args.npz and accelerator.is_main_process:
        pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
        with open(output / "samples.npz.partial", "wb") as file:
            np.savez(file, pictures, np.array([label for label, _ in jobs]))
        os.replace(output / "samples.npz.partial", output / "samples.npz")
    return settings


def main(args: Arguments) -> None:
    """Make the pictures.

    Args:
        args (`Arguments`): of the command line.
    """
    accelerator = make_accelerator()
    generate(load_pipeline(args.pretrained_model_name_or_path, accelerator, args.dtype), args, accelerator)
    accelerator.print(f"{args.num_images_per_class} pictures of each class in {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_arguments(Arguments))
