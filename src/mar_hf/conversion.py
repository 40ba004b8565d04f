# SPDX-License-Identifier: Apache-2.0
"""Original MAR checkpoints and LDM-format KL autoencoders to `mar_hf` folders, and back.

A conversion uses every tensor exactly once, or it stops and names the ones that do not fit. The names are in
`conversion_names`; here are the configurations and the files.
"""

import argparse
import json
import logging
import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .conversion_names import (
    StateDict,
    convert_kl_state_dict,
    convert_mar_state_dict,
    count_numbered,
    export_kl_state_dict,
    export_mar_state_dict,
    find_tensor,
    listed,
)
from .models import MARConfig, MARForImageGeneration
from .pipelines import MARPipeline
from .schedulers import TokenDDPMScheduler
from .tokenizers import ImageTokenizer, ImageTokenizerConfig
from .utils import atomic_folder


__all__ = [
    "convert_checkpoint",
    "convert_kl_state_dict",
    "convert_mar_state_dict",
    "export_checkpoint",
    "export_kl_state_dict",
    "export_mar_state_dict",
    "infer_kl_config",
    "infer_mar_config",
]

logger = logging.getLogger(__name__)

ORIGINAL_SCALING_FACTOR = 0.2325
# What an exported pipeline consists of; the first is the file that the original code resumes from.
MAR_FILE, KL_FILE, ARGUMENTS_FILE = "checkpoint-last.pth", "kl.ckpt", "original_args.json"

# The original constructor's arguments and the fields of `MARConfig` that they set; two belong to its `head_config`.
_ARGUMENTS = (
    ("encoder_embed_dim", "hidden_size"),
    ("encoder_depth", "num_encoder_layers"),
    ("encoder_num_heads", "num_attention_heads"),
    ("decoder_embed_dim", "decoder_hidden_size"),
    ("decoder_depth", "num_decoder_layers"),
    ("decoder_num_heads", "decoder_num_attention_heads"),
    ("mlp_ratio", "mlp_ratio"),
    ("class_num", "num_classes"),
    ("buffer_size", "num_class_tokens"),
    ("label_drop_prob", "class_dropout_prob"),
    ("attn_dropout", "attention_dropout"),
    ("proj_dropout", "hidden_dropout"),
    ("mask_ratio_min", "mask_ratio_min"),
    ("diffusion_batch_mul", "head_batch_multiplier"),
)
_HEAD_ARGUMENTS = (("diffloss_d", "num_layers"), ("diffloss_w", "hidden_size"))
_OTHER_ARGUMENTS = (
    "img_size",
    "vae_stride",
    "patch_size",
    "vae_embed_dim",
    "num_sampling_steps",
    "grad_checkpointing",
)

_ENDINGS = (".safetensors", ".pth", ".ckpt")
_MAR_MARK, _KL_MARK = "z_proj.weight", "encoder.conv_in.weight"  # which model a state dict belongs to

_RELEASED_HEADS = {768: 12, 1024: 16, 1280: 16}  # width: attention heads
_RELEASED_GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}  # width: recommended guidance scale


def _shape(state_dict: Mapping[str, torch.Tensor], name: str, ndim: int) -> torch.Size:
    shape = find_tensor(state_dict, name).shape
    if len(shape) != ndim:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {ndim} dimensions")
    return shape


def infer_mar_config(
    state_dict: Mapping[str, torch.Tensor], original_args: Mapping[str, Any] | None = None
) -> MARConfig:
    """The configuration of an original MAR checkpoint.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): the original's tensors; only their names and shapes are read.
        original_args (`Mapping[str, Any]`, *optional*): arguments of the original constructor, for what the shapes
            cannot tell: the number of heads (else known for the released widths 768, 1024, 1280), the dropout rates.

    Returns:
        [`MARConfig`].

    Raises:
        ValueError: if a tensor needed is missing, an argument is unknown or contradicts the tensors, or the number of
            heads stays unknown.
    """
    args = dict(original_args or {})
    known = [name for name, _ in (*_ARGUMENTS, *_HEAD_ARGUMENTS)] + list(_OTHER_ARGUMENTS)
    if unknown := sorted(set(args) - set(known)):
        raise ValueError(f"original arguments {unknown} are unknown, known are {sorted(known)}")

    width, token_dim = _shape(state_dict, "z_proj.weight", 2)
    num_tokens = _shape(state_dict, "diffusion_pos_embed_learned", 3)[1]
    grid = math.isqrt(num_tokens)
    if grid * grid != num_tokens:
        raise ValueError(f"diffusion_pos_embed_learned has {num_tokens} positions, which is no square grid")
    measured = {
        "encoder_embed_dim": width,
        "decoder_embed_dim": _shape(state_dict, "decoder_embed.weight", 2)[0],
        "encoder_depth": count_numbered(state_dict, "encoder_blocks."),
        "decoder_depth": count_numbered(state_dict, "decoder_blocks."),
        "mlp_ratio": _shape(state_dict, "encoder_blocks.0.mlp.fc1.weight", 2)[0] / width,
        "class_num": _shape(state_dict, "class_emb.weight", 2)[0],
        "buffer_size": _shape(state_dict, "encoder_pos_embed_learned", 3)[1] - num_tokens,
        "diffloss_d": count_numbered(state_dict, "diffloss.net.res_blocks."),
        "diffloss_w": _shape(state_dict, "diffloss.net.input_proj.weight", 2)[0],
    }
    patch_size = args.get("patch_size", 1)
    derived = dict(measured)
    if "vae_embed_dim" in args:
        derived["vae_embed_dim"] = token_dim / patch_size**2
    if "img_size" in args:
        derived["img_size"] = grid * patch_size * args.get("vae_stride", 16)
    wrong = [
        f"{name} is {args[name]}, the tensors say {value:g}"
        for name, value in derived.items()
        if args.get(name, value) != value
    ]
    if wrong:
        raise ValueError(f"the original arguments contradict the checkpoint: {'; '.join(wrong)}")

    given = {**args, **measured}
    for side in ("encoder", "decoder"):
        side_width = measured[f"{side}_embed_dim"]
        if f"{side}_num_heads" not in args and side_width not in _RELEASED_HEADS:
            raise ValueError(
                f"the number of attention heads cannot be read off the tensors, and width {side_width} is none of the "
                f"released {list(_RELEASED_HEADS)}: give `{side}_num_heads` in the original arguments (`config`, "
                "--config ORIGINAL_ARGS.json)"
            )
        given.setdefault(f"{side}_num_heads", _RELEASED_HEADS.get(side_width))
    return MARConfig(
        grid_height=grid,
        grid_width=grid,
        token_dim=token_dim,
        head_type="diffusion",
        head_config={ours: given[name] for name, ours in _HEAD_ARGUMENTS},
        **{ours: given[name] for name, ours in _ARGUMENTS if name in given},
    )


def infer_kl_config(
    state_dict: Mapping[str, torch.Tensor], scaling_factor: float = ORIGINAL_SCALING_FACTOR
) -> dict[str, Any]:
    """The diffusers configuration of an LDM-format KL autoencoder.

    Attention stands wherever the checkpoint has it: in the released one at the encoder's lowest resolution and in both
    middle blocks. Group norms have 32 groups and epsilon 1e-6, strided convolutions pad right and bottom, as there.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): the LDM tensors; only their names and shapes are read.
        scaling_factor (`float`, *optional*, defaults to 0.2325): stored with it; latents = scaling_factor * z.

    Returns:
        `dict[str, Any]` for `AutoencoderKL.from_config`, with its `_class_name`.

    Raises:
        ValueError: if a tensor that tells a size is missing.
    """
    levels = max(1, count_numbered(state_dict, "encoder.down."))
    channels = [_shape(state_dict, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    down = [f"encoder.down.{i}.attn.0.q.weight" in state_dict for i in range(levels)]
    up = [f"decoder.up.{i}.attn.0.q.weight" in state_dict for i in reversed(range(levels))]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(state_dict, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(state_dict, "decoder.conv_out.weight", 4)[0],
        "down_block_types": ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in up],
        "block_out_channels": channels,
        "layers_per_block": count_numbered(state_dict, "encoder.down.0.block."),
        "latent_channels": _shape(state_dict, "decoder.conv_in.weight", 4)[1],
        "norm_num_groups": 32,
        "act_fn": "silu",
        "scaling_factor": scaling_factor,
        "use_quant_conv": "quant_conv.weight" in state_dict,
        "use_post_quant_conv": "post_quant_conv.weight" in state_dict,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state_dict,
    }


def _original_arguments(config: MARConfig, tokenizer: ImageTokenizerConfig) -> dict[str, Any]:
    """The original constructor's arguments for a pipeline, as `infer_mar_config` reads them."""
    args = {name: getattr(config, ours) for name, ours in _ARGUMENTS}
    args["decoder_embed_dim"] = args["decoder_embed_dim"] or config.hidden_size
    args["decoder_num_heads"] = args["decoder_num_heads"] or config.num_attention_heads
    args |= {name: config.head_config[ours] for name, ours in _HEAD_ARGUMENTS}
    stride = 2 ** (len(tokenizer.autoencoder["block_out_channels"]) - 1)
    geometry = {
        "img_size": config.grid_height * stride * tokenizer.patch_size,
        "vae_stride": stride,
        "patch_size": tokenizer.patch_size,
        "vae_embed_dim": tokenizer.latent_channels,
    }
    return geometry | args


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of a `ValueError` about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, memory-mapped; of a pickle tensors and an argparse namespace, nothing else."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"truncated or no safetensors file ({error})") from error
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # torch's older format cannot be mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}, and" if found else ""
        raise ValueError(f"refused: {reason} only tensors and an argparse.Namespace may be in the pickle") from error
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
    if weights == "ema" and key == "model" and _MAR_MARK in tensors:
        raise ValueError(f"no averaged weights under `model_ema`, only {sorted(content)}: choose weights='model'")
    if wrong := [str(name) for name, value in tensors.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"no state dict, neither bare nor under {sought}; not tensors: {listed(wrong)}")
    return tensors


def _compare(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Stop with a `ValueError` unless both hold the same names and shapes."""
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing tensors: {listed(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"tensors with no place in the model: {listed(extra)}")
    wrong = [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(found.keys() & expected.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems := problems + wrong:
        raise ValueError("; ".join(problems))


def _build_transformer(original: StateDict, original_args: Mapping[str, Any] | None) -> MARForImageGeneration:
    config = infer_mar_config(original, original_args)
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
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(infer_kl_config(original, scaling_factor))
    _compare(original, export_kl_state_dict(autoencoder.state_dict()))
    autoencoder.load_state_dict(convert_kl_state_dict(original), assign=True)
    return ImageTokenizer.from_autoencoder(autoencoder.eval(), patch_size=patch_size, scaling_factor=scaling_factor)


def _read_arguments(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    with _naming(Path(config)):
        args = json.loads(Path(config).read_text(encoding="utf-8"))
        if not isinstance(args, dict):
            raise ValueError(f"holds a {type(args).__name__}, expected a JSON object of the original's arguments")
    return args


def _fit_patch_size(config: MARConfig, kl_config: Mapping[str, Any], original_args: Mapping[str, Any]) -> int:
    """The patch size that makes the transformer's tokens of the autoencoder's latents."""
    channels, stride = kl_config["latent_channels"], 2 ** (len(kl_config["block_out_channels"]) - 1)
    patch_size = math.isqrt(config.token_dim // channels)
    if patch_size**2 * channels != config.token_dim:
        raise ValueError(f"no square patch of its {channels} channels makes tokens of width {config.token_dim}")
    actual = {"patch_size": patch_size, "vae_embed_dim": channels, "vae_stride": stride}
    if wrong := [f"{k} is {original_args[k]}, not {v}" for k, v in actual.items() if original_args.get(k, v) != v]:
        raise ValueError(f"the original arguments contradict the autoencoder: {'; '.join(wrong)}")
    return patch_size


def _generation_defaults(config: MARConfig, original_args: Mapping[str, Any]) -> dict[str, Any]:
    head_steps = str(original_args.get("num_sampling_steps", 100))
    if not head_steps.isdecimal():
        raise ValueError(f"the original argument num_sampling_steps is {head_steps!r}, expected a number of steps")
    return {
        "num_inference_steps": min(64, config.num_tokens),
        "num_diffusion_steps": int(head_steps),
        "guidance_scale": _RELEASED_GUIDANCE.get(config.hidden_size, 3.0),
        "guidance_schedule": "linear",
        "temperature": 1.0,
    }


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
    if not scaling_factor > 0:
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
                patch_size = _fit_patch_size(transformer.config, infer_kl_config(original), original_args)
                tokenizer = _build_tokenizer(original, patch_size, scaling_factor)
            model = MARPipeline(
                transformer=transformer,
                vae=tokenizer,
                scheduler=TokenDDPMScheduler(max_timestep=999),
                generation_defaults=_generation_defaults(transformer.config, original_args),
            )
        model.save_pretrained(folder)
    return dst


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, in one piece or in shards; none if it holds no weights."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
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
    config = MARConfig.from_pretrained(folder)
    with _naming(folder):
        if config.head_type != "diffusion" or config.grid_height != config.grid_width:
            raise ValueError(
                f"head {config.head_type!r} on a grid of {config.grid_height} x {config.grid_width}: the original "
                "code knows the diffusion head and square grids only"
            )
        return export_mar_state_dict(_load_component(folder, config, MARForImageGeneration)), config


def _export_tokenizer(folder: Path) -> tuple[StateDict, ImageTokenizerConfig]:
    config = ImageTokenizerConfig.from_pretrained(folder)
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
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as holder:
        partial = Path(holder, path.name)
        if path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, partial)
        else:
            torch.save(dict.fromkeys(keys, state_dict), partial)
        os.replace(partial, path)


def _model_type(folder: Path) -> str:
    known = [MARConfig.model_type, ImageTokenizerConfig.model_type]
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: neither model_index.json nor config.json, no folder that can be exported")
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
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
            args = json.dumps(_original_arguments(config, tokenizer), indent=2)
            (folder / ARGUMENTS_FILE).write_text(args + "\n", encoding="utf-8")
        return dst
    model_type = _model_type(src)
    if dst.suffix not in _ENDINGS:
        raise ValueError(f"`dst` is {str(dst)!r}, expected a file ending in {', '.join(_ENDINGS)}")
    if dst.exists():
        raise ValueError(f"`dst` is {str(dst)!r}, which exists already")
    dst.parent.mkdir(parents=True, exist_ok=True)
    if model_type == MARConfig.model_type:
        _write(dst, _export_transformer(src)[0], ("model", "model_ema"))
    else:
        _write(dst, _export_tokenizer(src)[0], ("model",))
    return dst
