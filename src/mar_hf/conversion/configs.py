# SPDX-License-Identifier: Apache-2.0
"""Configurations of original checkpoints, read off their tensors and their constructor's arguments: pure functions."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch

from ..models import MARConfig
from ..tokenizers import ImageTokenizerConfig
from .names import count_numbered, find_tensor


ORIGINAL_SCALING_FACTOR = 0.2325  # of the released KL-16, built into the original code

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

# Type and range of the arguments that are no counts; None: not here.
_RATE = (Real, 0, 1)
_RANGES = {
    "mlp_ratio": (Real, 0, 1000),
    "label_drop_prob": _RATE,
    "attn_dropout": _RATE,
    "proj_dropout": _RATE,
    "mask_ratio_min": _RATE,
    "num_sampling_steps": (None, 0, 0),  # a number in a string, or another sampler's name
    "grad_checkpointing": (None, 0, 0),
}
_MOST_HEAD_STEPS = 1000  # as many as the original trains

_RELEASED_HEADS = {768: 12, 1024: 16, 1280: 16}  # width: attention heads
_RELEASED_GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}  # width: recommended guidance scale


def _shape(state_dict: Mapping[str, torch.Tensor], name: str, ndim: int) -> torch.Size:
    shape = find_tensor(state_dict, name).shape
    if len(shape) != ndim:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {ndim} dimensions")
    return shape


def check_arguments(args: dict[str, Any]) -> dict[str, Any]:
    """The original constructor's arguments as they are; a `ValueError` names one that is unknown or no such value."""
    known = [name for name, _ in (*_ARGUMENTS, *_HEAD_ARGUMENTS)] + list(_OTHER_ARGUMENTS)
    if unknown := sorted(map(str, set(args) - set(known))):
        raise ValueError(f"original arguments {unknown} are unknown, known are {sorted(known)}")
    for name, value in args.items():
        kind, low, high = _RANGES.get(name, (int, 1, 1_000_000))
        if kind is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            what = "an integer" if kind is int else "a number"
            raise ValueError(f"the original argument {name} is {value!r}, expected {what} in {low}..{high}")
    return args


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
    args = check_arguments(dict(original_args or {}))
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


def _check_blocks(names: Iterable[str], levels: int, layers: int) -> None:
    """Stop with a `ValueError` unless every level has its blocks: the numbers alone could ask for any number."""
    found = defaultdict(set)
    for name in names:
        if match := re.match(r"(encoder\.down|decoder\.up)\.([0-9]+)\.block\.([0-9]+)\.", name):
            found[match[1], int(match[2])].add(int(match[3]))
    sides = (("encoder.down", layers), ("decoder.up", layers + 1))
    for side, level, count in [(side, level, count) for side, count in sides for level in range(levels)]:
        blocks = found.pop((side, level), set())
        if len(blocks) != count or max(blocks) >= count:
            raise ValueError(f"{side}.{level} has the blocks {sorted(blocks)}, expected {count}, from 0 on")
    if found:
        side, level = min(found)
        raise ValueError(f"there is {side}.{level}, but there are {levels} levels in encoder.down")


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
        ValueError: if a tensor that tells a size is missing, or levels or blocks are not numbered without gaps.
    """
    levels = max(1, count_numbered(state_dict, "encoder.down."))
    channels = [_shape(state_dict, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    layers = count_numbered(state_dict, "encoder.down.0.block.")
    _check_blocks(state_dict, levels, layers)
    down = [f"encoder.down.{i}.attn.0.q.weight" in state_dict for i in range(levels)]
    up = [f"decoder.up.{i}.attn.0.q.weight" in state_dict for i in reversed(range(levels))]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(state_dict, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(state_dict, "decoder.conv_out.weight", 4)[0],
        "down_block_types": ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in up],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": _shape(state_dict, "decoder.conv_in.weight", 4)[1],
        "norm_num_groups": 32,
        "act_fn": "silu",
        "scaling_factor": scaling_factor,
        "use_quant_conv": "quant_conv.weight" in state_dict,
        "use_post_quant_conv": "post_quant_conv.weight" in state_dict,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state_dict,
    }


def original_arguments(config: MARConfig, tokenizer: ImageTokenizerConfig) -> dict[str, Any]:
    """The original constructor's arguments for a pipeline, as `infer_mar_config` reads them."""
    args = {name: getattr(config, ours) for name, ours in _ARGUMENTS}
    args |= {name: config.head_config[ours] for name, ours in _HEAD_ARGUMENTS}
    stride = 2 ** (len(tokenizer.autoencoder["block_out_channels"]) - 1)
    geometry = {
        "img_size": config.grid_height * stride * tokenizer.patch_size,
        "vae_stride": stride,
        "patch_size": tokenizer.patch_size,
        "vae_embed_dim": tokenizer.latent_channels,
    }
    return geometry | args


def fit_patch_size(config: MARConfig, kl_config: Mapping[str, Any], original_args: Mapping[str, Any]) -> int:
    """The patch size that makes the transformer's tokens of the autoencoder's latents; `ValueError` if none does."""
    channels, stride = kl_config["latent_channels"], 2 ** (len(kl_config["block_out_channels"]) - 1)
    patch_size = math.isqrt(config.token_dim // channels)
    if patch_size**2 * channels != config.token_dim:
        raise ValueError(f"no square patch of its {channels} channels makes tokens of width {config.token_dim}")
    actual = {"patch_size": patch_size, "vae_embed_dim": channels, "vae_stride": stride}
    if wrong := [f"{k} is {original_args[k]}, not {v}" for k, v in actual.items() if original_args.get(k, v) != v]:
        raise ValueError(f"the original arguments contradict the autoencoder: {'; '.join(wrong)}")
    return patch_size


def generation_defaults(config: MARConfig, original_args: Mapping[str, Any]) -> dict[str, Any]:
    """The generation that a converted pipeline saves; `ValueError` if the original's head steps are no number."""
    head_steps = str(original_args.get("num_sampling_steps", 100))
    if not re.fullmatch("[0-9]{1,9}", head_steps) or not 1 <= int(head_steps) <= _MOST_HEAD_STEPS:
        limits = f"1..{_MOST_HEAD_STEPS}"
        raise ValueError(f"the original argument num_sampling_steps is {head_steps!r}, expected a number in {limits}")
    return {
        "num_inference_steps": min(64, config.num_tokens),
        "num_diffusion_steps": int(head_steps),
        "guidance_scale": _RELEASED_GUIDANCE.get(config.hidden_size, 3.0),
        "guidance_schedule": "linear",
        "temperature": 1.0,
    }
