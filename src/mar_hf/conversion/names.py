# SPDX-License-Identifier: Apache-2.0
"""Names of the tensors in original checkpoints, and the same tensors under ours: pure functions, both ways.

One table for each format serves both directions, so every tensor comes back under its own name with its own bytes.
"""

import re
from collections.abc import Iterable, Mapping

import torch


StateDict = dict[str, torch.Tensor]

# What DistributedDataParallel, torch.compile, activation checkpointing and FSDP put into the names of what they wrap.
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

# (original, ours). A field in braces is the same text on both sides, except `rev`, a level counted from the other end.

_FIELDS = {
    "side": "encoder|decoder",
    "i": "0|[1-9][0-9]*",
    "j": "0|[1-9][0-9]*",
    "rev": "0|[1-9][0-9]*",
    "end": "weight|bias",
}

_MAR_NAMES = (
    ("class_emb.weight", "model.class_embedding.weight"),
    ("z_proj.{end}", "model.token_proj.{end}"),
    ("z_proj_ln.{end}", "model.token_norm.{end}"),
    ("encoder_pos_embed_learned", "model.encoder_position_embedding"),
    ("decoder_pos_embed_learned", "model.decoder_position_embedding"),
    ("diffusion_pos_embed_learned", "model.condition_position_embedding"),
    ("decoder_embed.{end}", "model.decoder_proj.{end}"),
    ("mask_token", "model.mask_token"),
    ("{side}_norm.{end}", "model.{side}_norm.{end}"),
    ("{side}_blocks.{i}.norm1.{end}", "model.{side}_layers.{i}.attention_norm.{end}"),
    ("{side}_blocks.{i}.attn.qkv.{end}", "model.{side}_layers.{i}.attention.qkv.{end}"),
    ("{side}_blocks.{i}.attn.proj.{end}", "model.{side}_layers.{i}.attention.proj.{end}"),
    ("{side}_blocks.{i}.norm2.{end}", "model.{side}_layers.{i}.mlp_norm.{end}"),
    ("{side}_blocks.{i}.mlp.fc1.{end}", "model.{side}_layers.{i}.mlp.fc1.{end}"),
    ("{side}_blocks.{i}.mlp.fc2.{end}", "model.{side}_layers.{i}.mlp.fc2.{end}"),
    ("diffloss.net.time_embed.mlp.0.{end}", "head.time_embedding.linear_1.{end}"),
    ("diffloss.net.time_embed.mlp.2.{end}", "head.time_embedding.linear_2.{end}"),
    ("diffloss.net.cond_embed.{end}", "head.condition_proj.{end}"),
    ("diffloss.net.input_proj.{end}", "head.token_proj.{end}"),
    ("diffloss.net.res_blocks.{i}.in_ln.{end}", "head.blocks.{i}.norm.{end}"),
    ("diffloss.net.res_blocks.{i}.mlp.0.{end}", "head.blocks.{i}.linear_1.{end}"),
    ("diffloss.net.res_blocks.{i}.mlp.2.{end}", "head.blocks.{i}.linear_2.{end}"),
    ("diffloss.net.res_blocks.{i}.adaLN_modulation.1.{end}", "head.blocks.{i}.modulation.{end}"),
    ("diffloss.net.final_layer.adaLN_modulation.1.{end}", "head.out_modulation.{end}"),
    ("diffloss.net.final_layer.linear.{end}", "head.out_proj.{end}"),
)

_KL_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
_KL_ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
_KL_PARTS = (
    ("{side}.mid.block_1", "{side}.mid_block.resnets.0", _KL_RESNET),
    ("{side}.mid.attn_1", "{side}.mid_block.attentions.0", _KL_ATTENTION),
    ("{side}.mid.block_2", "{side}.mid_block.resnets.1", _KL_RESNET),
    ("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}", _KL_RESNET),
    ("encoder.down.{i}.attn.{j}", "encoder.down_blocks.{i}.attentions.{j}", _KL_ATTENTION),
    ("decoder.up.{rev}.block.{j}", "decoder.up_blocks.{rev}.resnets.{j}", _KL_RESNET),
    ("decoder.up.{rev}.attn.{j}", "decoder.up_blocks.{rev}.attentions.{j}", _KL_ATTENTION),
)
_KL_NAMES = (
    ("{side}.conv_in.{end}", "{side}.conv_in.{end}"),
    ("{side}.conv_out.{end}", "{side}.conv_out.{end}"),
    ("{side}.norm_out.{end}", "{side}.conv_norm_out.{end}"),
    ("quant_conv.{end}", "quant_conv.{end}"),
    ("post_quant_conv.{end}", "post_quant_conv.{end}"),
    ("encoder.down.{i}.downsample.conv.{end}", "encoder.down_blocks.{i}.downsamplers.0.conv.{end}"),
    ("decoder.up.{rev}.upsample.conv.{end}", "decoder.up_blocks.{rev}.upsamplers.0.conv.{end}"),
    *((f"{a}.{x}.{{end}}", f"{b}.{y}.{{end}}") for a, b, inner in _KL_PARTS for x, y in inner),
)
_KL_PROJECTION = re.compile(r".*attentions\.\d+\.to_(q|k|v|out\.0)\.weight")


def _rename(
    names: Iterable[str], table: Iterable[tuple[str, str]], back: bool = False, levels: int = 0
) -> dict[str, str]:
    """Each name with its name in the other format; names outside the table are a `ValueError` that lists them."""
    rules = []
    for pair in table:
        source, target = reversed(pair) if back else pair
        pattern = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{_FIELDS[m[1]]})", source.replace(".", r"\."))
        rules.append((re.compile(pattern), target))
    renamed, unknown = {}, []
    for name in names:
        for pattern, target in rules:
            if match := pattern.fullmatch(name):
                fields = match.groupdict()
                if "rev" in fields:
                    fields["rev"] = levels - 1 - int(fields["rev"])
                renamed[name] = target.format(**fields)
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"tensors with no place in the model: {listed(unknown)}")
    return renamed


def listed(names: Iterable[str], limit: int = 12) -> str:
    """The first names in order, for a message; very long ones cut."""
    names = sorted(name if len(name) <= 120 else f"{name[:117]}..." for name in names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def find_tensor(state_dict: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor by its name; its absence is a `ValueError` that says so."""
    if name not in state_dict:
        raise ValueError(f"missing tensors: {name}")
    return state_dict[name]


def count_numbered(names: Iterable[str], prefix: str) -> int:
    """How many numbered entries follow `prefix`; a gap in the numbers is a `ValueError` that names it."""
    pattern = re.compile(re.escape(prefix) + "([0-9]+)[.]")
    numbers = {int(match[1]) for name in names if (match := pattern.match(name))}
    if numbers and max(numbers) >= len(numbers):
        gap = next(number for number in range(len(numbers)) if number not in numbers)
        raise ValueError(f"missing tensors: {prefix}{gap}, while there is {prefix}{max(numbers)}")
    return len(numbers)


def unwrapped(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The same tensors under the names they have in the model itself.

    Distributed training and compilation wrap a model, or blocks in it, and put a part of their own into the names.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): tensors by name, wrapped at any depth or not at all.

    Returns:
        `dict[str, torch.Tensor]`: the same tensors (not copied).

    Raises:
        `ValueError`: if two tensors get the same name.
    """
    plain: StateDict = {}
    for name, tensor in state_dict.items():
        inner = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if inner in plain:
            raise ValueError(f"{inner} is there twice, the second time as {name}")
        plain[inner] = tensor
    return plain


def mar_names(encoder_layers: int, decoder_layers: int, head_layers: int) -> set[str]:
    """The names of all tensors of an original MAR, from the table alone."""
    layers = {"encoder_blocks": encoder_layers, "decoder_blocks": decoder_layers, "res_blocks": head_layers}
    names = {"fake_latent"}
    for source, _ in _MAR_NAMES:
        for side in ("encoder", "decoder"):
            for end in ("weight", "bias"):
                name = source.replace("{side}", side).replace("{end}", end)
                numbered = next((layers[part] for part in layers if f"{part}.{{i}}" in name), 1)
                names |= {name.replace("{i}", str(number)) for number in range(numbered)}
    return names


def convert_mar_state_dict(original: Mapping[str, torch.Tensor]) -> StateDict:
    """Rename an original MAR state dict for [`MARForImageGeneration`].

    The original's separate null-class vector becomes the last row of the class embedding; nothing else changes shape.

    Args:
        original (`Mapping[str, torch.Tensor]`): the original's tensors, any dtype or device.

    Returns:
        `dict[str, torch.Tensor]`, the same tensors (not copied, but for the class embedding).

    Raises:
        `ValueError`: if a name has no place in the model, or `class_emb.weight` or `fake_latent` is missing.

    Source:
        names of `MAR` and `DiffLoss` in LTH14/mar@fe470ac.
    """
    original = dict(original)
    original["class_emb.weight"] = torch.cat(
        [find_tensor(original, "class_emb.weight"), find_tensor(original, "fake_latent")]
    )
    del original["fake_latent"]
    names = _rename(original, _MAR_NAMES)
    return {names[name]: tensor for name, tensor in original.items()}


def export_mar_state_dict(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The inverse of [`convert_mar_state_dict`], bit for bit.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): of a [`MARForImageGeneration`] with the diffusion head.

    Returns:
        `dict[str, torch.Tensor]` under the original's names (not copied, but for the class embedding).

    Raises:
        `ValueError`: if a name has no original, or the class embedding is missing.
    """
    find_tensor(state_dict, "model.class_embedding.weight")
    names = _rename(state_dict, _MAR_NAMES, back=True)
    original = {names[name]: tensor for name, tensor in state_dict.items()}
    embedding = original["class_emb.weight"]
    # Clones, because safetensors refuses to write two tensors that share their memory.
    original |= {"class_emb.weight": embedding[:-1].clone(), "fake_latent": embedding[-1:].clone()}
    return original


def convert_kl_state_dict(original: Mapping[str, torch.Tensor]) -> StateDict:
    """Rename an LDM-format KL autoencoder's state dict for diffusers' `AutoencoderKL`.

    The decoder's levels are counted from the other end there, and the attention's 1x1 convolutions are linear layers.

    Args:
        original (`Mapping[str, torch.Tensor]`): the autoencoder's tensors, without the `loss.` ones
            that belong to its training.

    Returns:
        `dict[str, torch.Tensor]`: the same tensors (not copied).

    Raises:
        `ValueError`: if a name has no place in the model, or an attention projection is no 1x1 convolution.

    Source:
        names of `AutoencoderKL` in LTH14/mar@fe470ac and in diffusers 0.42.
    """
    names = _rename(original, _KL_NAMES, levels=count_numbered(original, "decoder.up."))
    converted = {}
    for name, tensor in original.items():
        if _KL_PROJECTION.fullmatch(names[name]):
            if tensor.ndim != 4 or tensor.shape[2:] != (1, 1):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected a 1x1 convolution (C, C, 1, 1)")
            tensor = tensor[:, :, 0, 0]
        converted[names[name]] = tensor
    return converted


def export_kl_state_dict(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The inverse of [`convert_kl_state_dict`], bit for bit.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): of a diffusers `AutoencoderKL`.

    Returns:
        `dict[str, torch.Tensor]` under the LDM names (not copied).

    Raises:
        `ValueError`: if a name has no original.
    """
    names = _rename(state_dict, _KL_NAMES, back=True, levels=count_numbered(state_dict, "decoder.up_blocks."))
    return {
        names[name]: tensor[:, :, None, None] if _KL_PROJECTION.fullmatch(name) else tensor
        for name, tensor in state_dict.items()
    }
