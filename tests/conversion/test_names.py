# SPDX-License-Identifier: Apache-2.0
"""The names of original tensors and ours, both ways, on the small original checkpoints."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st

from mar_hf.conversion.names import (
    WRAPPERS,
    convert_kl_state_dict,
    convert_mar_state_dict,
    export_kl_state_dict,
    export_mar_state_dict,
    mar_names,
    unwrapped,
)


DATA = Path(__file__).parents[1] / "parity" / "data" / "mar-tiny"
RELEASED_KL = {
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",) * 5,
}


def meta_autoencoder(**changes):
    with torch.device("meta"):
        return AutoencoderKL(**{**RELEASED_KL, **changes}).state_dict()


def shapes(state_dict):
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


@pytest.fixture(scope="module")
def mar():

    with torch.serialization.safe_globals([Namespace]):
        return torch.load(DATA / "checkpoint-last.pth", weights_only=True)["model_ema"]


@pytest.fixture(scope="module")
def kl():
    return torch.load(DATA / "kl.ckpt", weights_only=True)["model"]


@pytest.mark.parametrize(
    "fixture, convert, export",
    [("mar", convert_mar_state_dict, export_mar_state_dict), ("kl", convert_kl_state_dict, export_kl_state_dict)],
)
def test_there_and_back_is_the_same(fixture, convert, export, request):
    original = request.getfixturevalue(fixture)
    back = export(convert(original))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


def test_the_null_class_is_the_last_row_of_the_class_embedding(mar):
    embedding = convert_mar_state_dict(mar)["model.class_embedding.weight"]
    assert torch.equal(embedding[:-1], mar["class_emb.weight"])
    assert torch.equal(embedding[-1:], mar["fake_latent"])


def test_nothing_but_the_class_embedding_is_copied(mar):
    converted = convert_mar_state_dict(mar)
    assert converted["model.token_proj.weight"].data_ptr() == mar["z_proj.weight"].data_ptr()


def test_mar_names():
    names = {
        "encoder_blocks.11.attn.qkv.weight": "model.encoder_layers.11.attention.qkv.weight",
        "decoder_blocks.3.norm2.bias": "model.decoder_layers.3.mlp_norm.bias",
        "decoder_norm.bias": "model.decoder_norm.bias",
        "diffloss.net.res_blocks.2.adaLN_modulation.1.weight": "head.blocks.2.modulation.weight",
        "diffloss.net.final_layer.adaLN_modulation.1.bias": "head.out_modulation.bias",
        "class_emb.weight": "model.class_embedding.weight",
    }
    original = {name: torch.zeros(1, 1) for name in names}
    assert list(convert_mar_state_dict({**original, "fake_latent": torch.zeros(1, 1)})) == list(names.values())


def test_the_names_of_all_tensors(mar):
    assert mar_names(2, 2, 2) == set(mar)
    assert len(mar_names(3, 2, 2)) == len(mar) + 12


def test_kl_of_the_released_geometry():
    ours = meta_autoencoder()
    original = shapes(export_kl_state_dict(ours))
    assert original["encoder.down.4.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert original["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    # Levels count from the finest in the original: the decoder starts at level 4 and ends at level 0.
    assert original["decoder.up.4.block.0.conv1.weight"] == (512, 512, 3, 3)
    assert original["decoder.up.3.block.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    assert original["decoder.up.0.block.2.conv2.weight"] == (128, 128, 3, 3)
    assert "decoder.up.4.upsample.conv.weight" in original and "decoder.up.0.upsample.conv.weight" not in original
    assert "encoder.down.4.downsample.conv.weight" not in original
    assert not [name for name in original if name.startswith("decoder.up") and "attn" in name]
    assert shapes(convert_kl_state_dict(export_kl_state_dict(ours))) == shapes(ours)


def test_kl_with_attention_elsewhere():
    ours = meta_autoencoder(up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 4))
    original = export_kl_state_dict(ours)
    assert tuple(original["decoder.up.4.attn.2.q.weight"].shape) == (512, 512, 1, 1)
    assert shapes(convert_kl_state_dict(original)) == shapes(ours)


def test_kl_without_quantisation_convolutions_and_middle_attention():
    ours = meta_autoencoder(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
    assert shapes(convert_kl_state_dict(export_kl_state_dict(ours))) == shapes(ours)


@pytest.mark.parametrize("convert, names", [(convert_mar_state_dict, "mar"), (convert_kl_state_dict, "kl")])
def test_names_left_over_are_listed(convert, names, request):
    original = {**request.getfixturevalue(names), "encoder_blocks.0.attn.scale": torch.zeros(1), "w": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no place in the model: encoder_blocks\.0\.attn\.scale, w$"):
        convert(original)


@pytest.mark.parametrize("name", ["class_emb.weight", "fake_latent"])
def test_missing_class_tensors_are_named(mar, name):
    with pytest.raises(ValueError, match=f"missing tensors: {name}"):
        convert_mar_state_dict({key: value for key, value in mar.items() if key != name})


def test_names_that_the_original_lacks_are_listed(mar):
    ours = {**convert_mar_state_dict(mar), "head.blocks.0.gate": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no place in the model: head\.blocks\.0\.gate$"):
        export_mar_state_dict(ours)


def test_attention_that_is_no_1x1_convolution_is_refused(kl):
    name = "encoder.mid.attn_1.q.weight"
    with pytest.raises(ValueError, match=rf"{name} has shape \(32, 32, 3, 3\), expected a 1x1 convolution"):
        convert_kl_state_dict({**kl, name: torch.zeros(32, 32, 3, 3)})


@given(data=st.data())
def test_whatever_wraps_a_model_leaves_its_names(data, mar):
    """At any depth: blocks are compiled one by one."""
    parts = st.lists(st.sampled_from(WRAPPERS), max_size=2)
    before, behind_the_name, behind_the_number = (data.draw(parts) for _ in range(3))

    def wrap(name):
        first, *rest = name.split(".")
        return ".".join([*before, first, *behind_the_name, *rest[:1], *behind_the_number, *rest[1:]])

    assert list(unwrapped({wrap(name): tensor for name, tensor in mar.items()})) == list(mar)


@pytest.mark.slow
def test_names_of_compiled_and_distributed_models_by_torch_itself():
    model = torch.nn.ModuleDict({"z_proj": torch.nn.Linear(1, 1), "encoder_blocks": torch.nn.Sequential()})
    block = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model["encoder_blocks"].append(block)
    names = list(model.state_dict())
    model["encoder_blocks"][0] = torch.compile(block)
    wrapped = torch.compile(torch.nn.DataParallel(model)).state_dict()
    assert list(wrapped) != names and list(unwrapped(wrapped)) == names
