# SPDX-License-Identifier: Apache-2.0
"""Configurations inferred from original tensors and arguments."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from mar_hf import MARConfig, MARForImageGeneration
from mar_hf.conversion.configs import generation_defaults, infer_kl_config, infer_mar_config
from mar_hf.conversion.names import export_kl_state_dict, export_mar_state_dict


DATA = Path(__file__).parents[1] / "parity" / "data" / "mar-tiny"


@pytest.fixture(scope="module")
def args():
    return json.loads((DATA / "original_args.json").read_text())


@pytest.fixture(scope="module")
def mar():
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(DATA / "checkpoint-last.pth", weights_only=True)


@pytest.mark.parametrize("preset, heads, guidance", [("base", 12, 2.9), ("large", 16, 3.0), ("huge", 16, 3.2)])
def test_released_sizes_need_no_arguments(preset, heads, guidance):
    config = MARConfig.preset(preset)
    with torch.device("meta"):
        original = export_mar_state_dict(MARForImageGeneration(config).state_dict())
    found = infer_mar_config(original)
    assert found.num_attention_heads == found.decoder_num_attention_heads == heads
    assert found.to_dict() == config.to_dict()
    assert generation_defaults(found, {})["guidance_scale"] == guidance
    assert generation_defaults(found, {})["num_inference_steps"] == 64
    assert generation_defaults(found, {})["num_diffusion_steps"] == 100


def test_the_configuration_of_the_small_checkpoint(mar, args):
    config = infer_mar_config(mar["model"], {**args, "attn_dropout": 0.0, "label_drop_prob": 0.2})
    expected = {
        "grid_height": 4,
        "grid_width": 4,
        "token_dim": 8,
        "num_classes": 10,
        "num_class_tokens": 3,
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 4.0,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.1,
        "class_dropout_prob": 0.2,
        "head_config": {"num_layers": 2, "hidden_size": 24},
        "head_batch_multiplier": 2,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_configuration_of_the_released_autoencoder():
    released = {
        "block_out_channels": [128, 128, 256, 256, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"] * 5,
    }
    with torch.device("meta"):
        original = export_kl_state_dict(AutoencoderKL(**released).state_dict())
    found = infer_kl_config(original)
    assert {name: found[name] for name in released} == released
    assert (found["norm_num_groups"], found["scaling_factor"], found["use_quant_conv"]) == (32, 0.2325, True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder_depth": 3}, "contradict the checkpoint: encoder_depth is 3, the tensors say 2"),
        ({"class_num": 9, "diffloss_w": 25}, "class_num is 9, the tensors say 10; diffloss_w is 25, the tensors say"),
        ({"img_size": 128}, "img_size is 128, the tensors say 64"),
        ({"vae_embed_dim": 4}, "vae_embed_dim is 4, the tensors say 8"),
        ({"encoder_heads": 4}, r"original arguments \['encoder_heads'\] are unknown, known are \['attn_dropout'"),
        ({"encoder_num_heads": 5}, "32"),
    ],
)
def test_arguments_that_do_not_fit(change, message, mar, args):
    with pytest.raises(ValueError, match=message):
        infer_mar_config(mar["model"], {**args, **change})


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_unknown_number_of_heads_asks_for_the_arguments(side, mar, args):
    rest = {name: value for name, value in args.items() if name != f"{side}_num_heads"}
    with pytest.raises(ValueError, match=rf"width 32 is none of .*768, 1024, 1280.* `{side}_num_heads` .*--config"):
        infer_mar_config(mar["model"], rest)
