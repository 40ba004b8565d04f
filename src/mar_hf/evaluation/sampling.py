# SPDX-License-Identifier: Apache-2.0
"""Many pictures, reproducibly: the same by any number of processes, and after any stop."""

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

import mar_hf_settings

from ..generation import plan_steps
from ..models import load_text_encoder
from ..pipelines import MARPipeline
from ..training import make_accelerator
from ..utils import atomic_file, look_up
from .classes import choose_folders, is_conditional
from .folders import claim_folder, is_whole


DTYPES = {name: getattr(torch, name) for name in mar_hf_settings.DTYPES}
# The arguments of the pipeline that have a default in the checkpoint.
SAMPLING = (
    *("num_inference_steps", "num_diffusion_steps", "guidance_scale", "temperature"),
    *("guidance_schedule", "token_schedule", "head_step_schedule", "generation_order"),
    *("decoding", "detail_share", "guidance_interval", "guidance_refresh"),
)


def load_pipeline(model: str, accelerator: Accelerator | None = None, dtype: str = "float32") -> MARPipeline:
    """A quiet pipeline on this process's device.

    Args:
        model (`str`): folder or hub id.
        accelerator (`Accelerator`, *optional*): knows the device; None makes one.
        dtype (`str`, *optional*, defaults to `"float32"`): of the weights, a name in `DTYPES`.

    Returns:
        [`MARPipeline`].
    """
    accelerator = accelerator or make_accelerator()
    with accelerator.main_process_first():  # one process downloads
        pipeline = MARPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(accelerator.device, look_up(DTYPES, dtype, "dtype"))


def use_scheduler(pipeline: MARPipeline, name: str) -> None:
    """Let a scheduler of diffusers run the head, with the configuration of the pipeline's own.

    Args:
        pipeline ([`MARPipeline`]): gets it.
        name (`str`): of the class.

    Raises:
        ValueError: if diffusers has no such scheduler, or the model's head needs none.
    """
    scheduler = getattr(diffusers, name, None) if str(name).endswith("Scheduler") else None
    if scheduler is None:
        raise ValueError(f"`scheduler` has to be one of diffusers, such as DPMSolverMultistepScheduler, got {name!r}.")
    if pipeline.transformer.head.scheduler_class is None:
        raise ValueError(f"`scheduler` has to be left out, got {name!r}: the head of this model needs none.")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)


def use_text_encoder(pipeline: MARPipeline, pretrained: str | None) -> None:
    """A text encoder for a pipeline that came without.

    Args:
        pipeline ([`MARPipeline`]): of a model of texts.
        pretrained (`str`, *optional*): folder or hub id; None: the pipeline has one.

    Raises:
        ValueError: if it has none.
    """
    if pretrained is not None:
        text_encoder, tokenizer = load_text_encoder(pretrained)
        pipeline.register_modules(text_encoder=text_encoder.to(pipeline.device), tokenizer=tokenizer)
    elif pipeline.text_encoder is None:
        raise ValueError("The pipeline has no text encoder: give one with `pretrained_text_encoder`.")


def picture_size(pipeline: MARPipeline) -> int:
    """The shorter side of a pipeline's pictures.

    Args:
        pipeline ([`MARPipeline`]): of any kind.

    Returns:
        `int`: in pixels.
    """
    config = pipeline.transformer.config
    return min(config.grid_height, config.grid_width) * pipeline.vae.stride


def image_generator(seed: int, label: int | str, number: int) -> torch.Generator:
    """The random generator of one picture: it depends on seed, class or text, and number alone.

    Args:
        seed (`int`): of all pictures.
        label (`int` or `str`): class number, or text.
        number (`int`): of the picture among those of its class or text.

    Returns:
        `torch.Generator`: on the CPU.
    """
    digest = hashlib.sha256(f"{seed}/{label}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


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


def check_sampling(pipeline: MARPipeline, sampling: dict[str, Any], class_labels: list[int] | None = None) -> None:
    """Refuse arguments that the pipeline would refuse, without a picture.

    Args:
        pipeline ([`MARPipeline`]): that has to take them.
        sampling (`dict[str, Any]`): its arguments, without which the defaults of the checkpoint count.
        class_labels (`list[int]`, *optional*): the classes.

    Raises:
        ValueError: if it has no such argument, or refuses the value.
    """
    if unknown := sorted(sampling.keys() - {*pipeline.generation_defaults, "decoding"}):
        raise ValueError(f"unknown settings {unknown}")
    settings, config = pipeline.settings_for(**sampling), pipeline.transformer.config
    pipeline.check_inputs(settings, class_labels)
    plan_steps(settings, config.num_tokens, max_tokens_per_step=getattr(config, "max_tokens_per_step", None))


def subjects_of(pipeline: MARPipeline, subjects: Sequence[int | str]) -> dict[str, Any]:
    """The argument of the pipeline that asks for classes or texts.

    Args:
        pipeline ([`MARPipeline`]): of the call.
        subjects (`Sequence[int | str]`): class number, or text, of each picture; the number of a model that knows no
            classes does not count.

    Returns:
        `dict[str, Any]`: for `MARPipeline.__call__`.
    """
    if isinstance(subjects[0], str):
        return {"prompt": list(subjects)}
    return {"class_labels": list(subjects)} if is_conditional(pipeline) else {"num_images_per_prompt": len(subjects)}


def generate_batch(
    pipeline: MARPipeline, jobs: Sequence[tuple[int | str, int]], seed: int, **arguments: Any
) -> Sequence[Any]:
    """Pictures of one batch, each from a generator of its own.

    Args:
        pipeline ([`MARPipeline`]): makes them.
        jobs (`Sequence[tuple[int | str, int]]`): class number or text of each picture, and its number.
        seed (`int`): a picture depends on it and its job.
        arguments (`Any`): of the pipeline's call.

    Returns:
        `list[PIL.Image.Image]`, or what `output_type` asks for.
    """
    generators = [image_generator(seed, *job) for job in jobs]
    subjects = subjects_of(pipeline, [subject for subject, _ in jobs])
    return pipeline(**subjects, generator=generators, **arguments).images


def generate(
    pipeline: MARPipeline,
    output_dir: str | PathLike,
    *,
    num_images_per_class: int = 10,
    class_labels: Sequence[str | int] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    npz: bool = False,
    note: dict[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Make the pictures that are missing in a folder; every process calls this.

    Picture k of a class depends on the seed, the class and k. The folder is an image folder, `cat/00003.png`, with its
    settings in `settings.json`; it is refused to other settings.

    Args:
        pipeline ([`MARPipeline`]): see `load_pipeline`.
        output_dir (`str` or `os.PathLike`): gets a folder of PNG files for each class, see `class_folders`.
        num_images_per_class (`int`, *optional*, defaults to 10): pictures of each class.
        class_labels (`Sequence[str | int]`, *optional*): names or numbers; None means all.
        batch_size (`int`, *optional*, defaults to 32): pictures at once in each process.
        seed (`int`, *optional*, defaults to 0): of all pictures.
        npz (`bool`, *optional*, defaults to `False`): also write `samples.npz`: `arr_0` (uint8, NHWC), labels `arr_1`.
        note (`dict[str, Any]`, *optional*): more for `settings.json`.
        accelerator (`Accelerator`, *optional*): shares the work between its processes; None makes one.
        sampling (`Any`): arguments of the pipeline, names in `SAMPLING`; None means the checkpoint's own.

    Returns:
        `dict[str, Any]`: the settings that stand in the folder, with the checkpoint's defaults filled in.

    Raises:
        ValueError: if a setting is out of its range, or the folder holds something else.
    """
    for name, value in (("num_images_per_class", num_images_per_class), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` has to be at least 1, got {value}.")
    if unknown := sorted(sampling.keys() - set(SAMPLING)):
        raise ValueError(f"unknown settings {unknown}; known are {sorted(SAMPLING)}.")
    accelerator = accelerator or make_accelerator()
    folders = choose_folders(pipeline, class_labels)
    chosen = pipeline.settings_for(**sampling).to_dict()
    chosen = {name: chosen[name] for name in SAMPLING if name in chosen}  # of `decoding` its parts
    check_sampling(pipeline, chosen, list(folders))
    chosen["guidance_interval"] = list(chosen["guidance_interval"])  # as JSON has it
    settings = {
        **(note or {}),
        "weights": weights_digest(pipeline),
        "scheduler": None if pipeline.scheduler is None else type(pipeline.scheduler).__name__,
        "classes": list(folders.values()),
        **{"num_images_per_class": num_images_per_class, "batch_size": batch_size, "seed": seed},
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        **chosen,
    }
    output = Path(output_dir)
    claim_folder(output, settings, accelerator)
    jobs = [(label, number) for label in folders for number in range(num_images_per_class)]
    paths = [output / folders[label] / f"{number:05d}.png" for label, number in jobs]
    # A batch is the same whoever makes it and whatever is there already: rounding depends on its neighbours, too.
    firsts = range(0, len(jobs), batch_size)
    missing = [first for first in firsts if not all(map(is_whole, paths[first : first + batch_size]))]
    accelerator.wait_for_everyone()  # all have looked
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    for first in tqdm(mine, desc="batches", disable=not accelerator.is_main_process):
        part = slice(first, first + batch_size)
        for picture, path in zip(generate_batch(pipeline, jobs[part], seed, **chosen), paths[part], strict=True):
            with atomic_file(path) as partial:
                picture.save(partial)
    accelerator.wait_for_everyone()
    if npz and accelerator.is_main_process:
        _write_npz(output / "samples.npz", paths, [label for label, _ in jobs])
    return settings


def _write_npz(path: Path, pictures: Sequence[Path], labels: Sequence[int]) -> None:
    arrays = np.stack([np.asarray(Image.open(picture)) for picture in pictures])
    with atomic_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, arrays, np.array(labels))
