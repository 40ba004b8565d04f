# SPDX-License-Identifier: Apache-2.0
"""Original MAR checkpoints and LDM-format KL autoencoders to `mar_hf` folders, and back.

A conversion uses every tensor exactly once, or it stops and names the ones that do not fit. Here are the files; the
names of the tensors are in `names`, the configurations in `configs`.
"""

import argparse
import json
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from ..models import MARConfig, MARForImageGeneration
from ..pipelines import MARPipeline
from ..schedulers import TokenDDPMScheduler
from ..tokenizers import ImageTokenizer, ImageTokenizerConfig
from ..utils import atomic_file, atomic_folder
from .configs import (
    ORIGINAL_SCALING_FACTOR,
    check_arguments,
    fit_patch_size,
    generation_defaults,
    infer_kl_config,
    infer_mar_config,
    original_arguments,
)
from .names import (
    StateDict,
    convert_kl_state_dict,
    convert_mar_state_dict,
    export_kl_state_dict,
    export_mar_state_dict,
    listed,
    mar_names,
    unwrapped,
)


logger = logging.getLogger(__name__)

_Config = TypeVar("_Config", bound=PreTrainedConfig)

# What an exported pipeline consists of; the first is the file that the original code resumes from.
MAR_FILE, KL_FILE, ARGUMENTS_FILE = "checkpoint-last.pth", "kl.ckpt", "original_args.json"

_ENDINGS = (".safetensors", ".pth", ".ckpt")
_MAR_MARK, _KL_MARK = "z_proj.weight", "encoder.conv_in.weight"  # which model a state dict belongs to


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of a `ValueError` about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a `ValueError` naming the file if it holds anything else."""
    with _naming(path):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except RecursionError as error:
            raise ValueError("is nested too deeply") from error
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, expected a JSON object")
    return content


def read_config(folder: Path, config_class: type[_Config]) -> _Config:
    """The configuration in a saved model's folder; a `ValueError` naming its file if it is wrong."""
    path = folder / "config.json"
    content = read_json(path)
    with _naming(path):
        try:
            return config_class.from_dict(content)
        except Exception as error:  # wrong values set off all kinds before they are found to be wrong
            raise ValueError(str(error)) from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than the file: what torch writes is not compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if size > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"refused: a compressed archive, which unpacks to {size} bytes")


def _read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, memory-mapped; of a pickle tensors and an argparse namespace, nothing else."""
    if path.exists() and not path.is_file():
        raise ValueError("is no file")
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"truncated or no safetensors file ({error})") from error
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # torch's older format cannot be mapped
    try:
        if zipped:
            _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}, and " if found else ""
        raise ValueError(f"refused: {reason}only tensors and an argparse.Namespace may be in the pickle") from error
    except ValueError:
        raise
    except Exception as error:  # an unpickler fails on broken bytes in any way there is
        raise ValueError("truncated or no PyTorch checkpoint") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _read_state_dict(path: Path, weights: str) -> StateDict:
    """The tensors of one model: a bare state dict, or one under `model_ema`, `model` or `state_dict`."""
    content = _read(path)
    sought = ("model_ema", "model", "state_dict") if weights == "ema" else ("model", "state_dict")
    key = next((name for name in sought if isinstance(content.get(name), dict)), None)
    tensors = content[key] if key else content
    if wrong := [str(name) for name, value in tensors.items() if not (isinstance(name, str) and _is_plain(value))]:
        raise ValueError(f"no state dict, neither bare nor under {sought}; not tensors: {listed(wrong)}")
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > path.stat().st_size:  # views of a few numbers can claim any shape
        raise ValueError(f"the tensors claim {size} bytes, but the file has {path.stat().st_size}")
    tensors = unwrapped(tensors)
    if weights == "ema" and key == "model" and _MAR_MARK in tensors:
        found = sorted(map(str, content))
        raise ValueError(f"no averaged weights under `model_ema`, only {found}: choose weights='model'")
    return tensors


def _is_plain(value: Any) -> bool:
    """Whether something is an ordinary tensor with its numbers in memory."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _check_weights(original: Mapping[str, torch.Tensor]) -> None:
    """Stop with a `ValueError` if something can't be a weight."""
    if wrong := [name for name, tensor in original.items() if not tensor.is_floating_point() or not tensor.numel()]:
        raise ValueError(f"weights are floating-point numbers, and at least one; no weights: {listed(wrong)}")


def _compare_names(found: Iterable[str], expected: Iterable[str]) -> list[str]:
    """What is missing and what is left over, for a message."""
    found, expected = set(found), set(expected)
    problems = []
    if missing := expected - found:
        problems.append(f"missing tensors: {listed(missing)}")
    if extra := found - expected:
        problems.append(f"tensors with no place in the model: {listed(extra)}")
    return problems


def _compare(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Stop with a `ValueError` unless both hold the same names and shapes."""
    problems = _compare_names(found, expected)
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(found.keys() & expected.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _build_transformer(original: StateDict, original_args: Mapping[str, Any] | None) -> MARForImageGeneration:
    _check_weights(original)
    config = infer_mar_config(original, original_args)
    # Before the model is built: it is as large as the names say, and there may be few tensors behind them.
    layers = (config.num_encoder_layers, config.num_decoder_layers, config.head_config["num_layers"])
    if problems := _compare_names(original, mar_names(*layers)):
        raise ValueError("; ".join(problems))
    with torch.device("meta"):
        model = MARForImageGeneration(config)
    _compare(original, export_mar_state_dict(model.state_dict()))
    model.load_state_dict(convert_mar_state_dict(original), assign=True)
    return model.eval()


def _build_tokenizer(original: StateDict, patch_size: int, scaling_factor: float) -> ImageTokenizer:
    if training := [name for name in original if name.startswith("loss.")]:
        logger.warning(
            "left out %d tensors under `loss.`: perceptual loss and discriminator of the autoencoder's training.",
            len(training),
        )
    original = {name: tensor for name, tensor in original.items() if not name.startswith("loss.")}
    _check_weights(original)
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(infer_kl_config(original, scaling_factor))
    _compare(original, export_kl_state_dict(autoencoder.state_dict()))
    autoencoder.load_state_dict(convert_kl_state_dict(original), assign=True)
    return ImageTokenizer.from_autoencoder(autoencoder.eval(), patch_size=patch_size, scaling_factor=scaling_factor)


def _read_arguments(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return check_arguments(dict(config or {}))
    with _naming(Path(config)):
        return check_arguments(read_json(Path(config)))


@contextmanager
def _writing(dst: Path) -> Iterator[None]:
    """Tell with one kind of error, and with the name, that a file can't be written: the disk is full, for instance."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(f"{dst}: could not be written: {error}") from error


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    vae: str | Path | None = None,
    weights: str = "ema",
    config: str | Path | Mapping[str, Any] | None = None,
    scaling_factor: float = ORIGINAL_SCALING_FACTOR,
) -> Path:
    """Convert an original checkpoint file to a folder that `from_pretrained` loads.

    Files are memory-mapped, and the tensors keep their dtype and their bytes. `dst` becomes a [`MARPipeline`] for a
    MAR checkpoint with `vae`, a [`MARForImageGeneration`] without, an [`ImageTokenizer`] for a KL autoencoder alone.

    A pipeline keeps all of the original's timesteps (`max_timestep=999`) and saves the recommended generation: 64
    steps (at most one per token), 100 head steps (or the original arguments' `num_sampling_steps`), linear guidance of
    scale 2.9, 3.0, 3.2 for the released widths 768, 1024, 1280 and 3.0 for others, temperature 1.0.

    Args:
        src (`str` or `Path`): `checkpoint-last.pth`, a `.safetensors` file with the same names, or a KL `.ckpt`.
        dst (`str` or `Path`): the folder to write; appears whole or not at all, must not hold anything yet.
        vae (`str` or `Path`, *optional*): the KL autoencoder's file, if `src` is a MAR checkpoint.
        weights (`str`, *optional*, defaults to `"ema"`): `"ema"` (key `model_ema`) or `"model"`; a file with one
            bare state dict leaves no choice.
        config (`str`, `Path` or `Mapping`, *optional*): arguments of the original constructor, or their JSON file.
        scaling_factor (`float`, *optional*, defaults to 0.2325): latents = scaling_factor * z; the original's.

    Returns:
        `Path`: `dst`.

    Raises:
        ValueError: naming file and tensor, if a file is truncated, holds more than tensors and an argparse namespace,
            lacks a tensor, has one of the wrong shape or one left over, or does not fit `config` or the other file.
        OSError: if a file cannot be read or `dst` cannot be written.

    Source:
        checkpoint layout of LTH14/mar@fe470ac (`main_mar.py`, `AutoencoderKL.init_from_ckpt`).
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"`weights` is {weights!r}, allowed are 'ema' and 'model'")
    if not 0 < scaling_factor < math.inf:
        raise ValueError(f"`scaling_factor` is {scaling_factor}, it has to be above 0")
    src, dst = Path(src), Path(dst)
    original_args = _read_arguments(config)
    with atomic_folder(dst) as folder:
        with _naming(src):
            original = _read_state_dict(src, weights)
            if _MAR_MARK in original:
                model = transformer = _build_transformer(original, original_args)
            elif _KL_MARK in original and vae is None:
                model = _build_tokenizer(original, original_args.get("patch_size", 1), scaling_factor)
            else:
                raise ValueError(f"no MAR checkpoint: {_MAR_MARK} is missing, it holds {listed(original, 4)}")
        if vae is not None:
            with _naming(Path(vae)):
                original = _read_state_dict(Path(vae), weights)
                patch_size = fit_patch_size(transformer.config, infer_kl_config(original), original_args)
                tokenizer = _build_tokenizer(original, patch_size, scaling_factor)
            model = MARPipeline(
                transformer=transformer,
                vae=tokenizer,
                scheduler=TokenDDPMScheduler(max_timestep=999),
                generation_defaults=generation_defaults(transformer.config, original_args),
            )
        with _writing(dst):
            model.save_pretrained(folder)
    return dst


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, in one piece or in shards; none if it holds no weights."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with _naming(index):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"`weight_map` has to be an object, got {weight_map!r:.100}")
            shards = [str(name) for name in weight_map.values()]
            if wrong := [name for name in shards if not re.fullmatch(r"[^/\\]+\.safetensors", name)]:
                raise ValueError(f"weights are .safetensors files beside the index, not {wrong[0]!r}")
        return [folder / name for name in sorted(set(shards))]
    return [path for path in [folder / "model.safetensors"] if path.exists()]


def _load_component(folder: Path, config: MARConfig | ImageTokenizerConfig, model_class: type) -> StateDict:
    """All tensors of a saved model, memory-mapped, compared with what its configuration asks for."""
    state_dict = {}
    for file in weight_files(folder):
        with _naming(Path(file.name)):
            state_dict |= _read(file)
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    _compare(state_dict, expected)
    return state_dict


def _export_transformer(folder: Path) -> tuple[StateDict, MARConfig]:
    config = read_config(folder, MARConfig)
    _model_type(folder)  # another backbone's settings can be read as these
    with _naming(folder):
        if config.head_type != "diffusion" or config.grid_height != config.grid_width:
            raise ValueError(
                f"head {config.head_type!r} on a grid of {config.grid_height} x {config.grid_width}: the original "
                "code knows the diffusion head and square grids only"
            )
        return export_mar_state_dict(_load_component(folder, config, MARForImageGeneration)), config


def _export_tokenizer(folder: Path) -> tuple[StateDict, ImageTokenizerConfig]:
    config = read_config(folder, ImageTokenizerConfig)
    with _naming(folder):
        name = (config.autoencoder or {}).get("_class_name")
        if name != "AutoencoderKL" or config.normalizer != "affine" or config.shift_factor != 0:
            raise ValueError(
                f"autoencoder {name}, normalizer {config.normalizer!r}, shift_factor {config.shift_factor}: the "
                "original code knows AutoencoderKL with a scaling factor only"
            )
        if config.scaling_factor != ORIGINAL_SCALING_FACTOR:
            logger.warning(
                "%s: scaling_factor is %s and is not part of the exported file; the original code has %s built in.",
                folder,
                config.scaling_factor,
                ORIGINAL_SCALING_FACTOR,
            )
        state_dict = _load_component(folder, config, ImageTokenizer)
        prefix = "autoencoder."
        return export_kl_state_dict({name.removeprefix(prefix): value for name, value in state_dict.items()}), config


def _write(path: Path, state_dict: StateDict, keys: tuple[str, ...]) -> None:
    """Write a file whole or not at all: bare as `.safetensors`, else under `keys`, all of them the same tensors."""
    with _writing(path), atomic_file(path) as partial:
        if path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, partial)
        else:
            torch.save(dict.fromkeys(keys, state_dict), partial)


def _model_type(folder: Path) -> str:
    known = [MARConfig.model_type, ImageTokenizerConfig.model_type]
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: neither model_index.json nor config.json, no folder that can be exported")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in known:
        raise ValueError(f"{folder}: model_type is {model_type!r}, those that can be exported are {known}")
    return model_type


def export_checkpoint(src: str | Path, dst: str | Path) -> Path:
    """Write a saved model or pipeline back under the original's names, with identical bytes in every tensor.

    A transformer becomes a file for the original MAR code, an image tokenizer one in the LDM layout. `.safetensors`
    holds the tensors bare; `.pth` and `.ckpt` hold them under `model`, a transformer's under `model_ema` as well (the
    same tensors). A pipeline becomes a folder with `checkpoint-last.pth`, `kl.ckpt` and `original_args.json`.

    Args:
        src (`str` or `Path`): folder of a [`MARPipeline`], [`MARForImageGeneration`] or [`ImageTokenizer`].
        dst (`str` or `Path`): the file, or for a pipeline the folder, to write; must not exist yet.

    Returns:
        `Path`: `dst`.

    Raises:
        ValueError: if `src` holds none of these, lacks a tensor, or is something that the original code does not know
            (another head, a grid that is not square, pixels as tokens); if `dst` exists or has another ending.
        OSError: if a file cannot be read or written.

    Source:
        checkpoint layout of LTH14/mar@fe470ac.
    """
    src, dst = Path(src), Path(dst)
    if (src / "model_index.json").exists():
        if dst.suffix in _ENDINGS:
            raise ValueError(f"`dst` is {str(dst)!r}, but a pipeline becomes a folder of {MAR_FILE} and {KL_FILE}")
        with atomic_folder(dst) as folder:
            transformer, config = _export_transformer(src / "transformer")
            kl, tokenizer = _export_tokenizer(src / "vae")
            _write(folder / MAR_FILE, transformer, ("model", "model_ema"))
            _write(folder / KL_FILE, kl, ("model",))
            args = json.dumps(original_arguments(config, tokenizer), indent=2)
            (folder / ARGUMENTS_FILE).write_text(args + "\n", encoding="utf-8")
        return dst
    model_type = _model_type(src)
    if dst.suffix not in _ENDINGS:
        raise ValueError(f"`dst` is {str(dst)!r}, expected a file ending in {', '.join(_ENDINGS)}")
    if dst.exists():
        raise ValueError(f"`dst` is {str(dst)!r}, which exists already")
    if model_type == MARConfig.model_type:
        _write(dst, _export_transformer(src)[0], ("model", "model_ema"))
    else:
        _write(dst, _export_tokenizer(src)[0], ("model",))
    return dst
