# SPDX-License-Identifier: Apache-2.0
"""Settings: what they are, that they come back, and what is refused."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from mar_hf import MARConfig


def test_defaults_are_the_base_preset():
    assert MARConfig().to_dict() == MARConfig.preset("base").to_dict()
    assert MARConfig().num_tokens == 256


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("base", (768, 12, 12, 12, 6, 1024)),
        ("large", (1024, 16, 16, 16, 8, 1280)),
        ("huge", (1280, 20, 20, 16, 12, 1536)),
    ],
)
def test_presets(name, sizes):
    config = MARConfig.preset(name, num_classes=10)
    head = config.head_config
    assert sizes == (
        config.hidden_size,
        config.num_encoder_layers,
        config.num_decoder_layers,
        config.num_attention_heads,
        head["num_layers"],
        head["hidden_size"],
    )
    assert (config.decoder_hidden_size, config.decoder_num_attention_heads) == (sizes[0], sizes[3])
    assert (config.num_classes, config.num_class_tokens, config.token_dim) == (10, 64, 16)


def test_unknown_presets():
    with pytest.raises(ValueError, match=r"`name` has to be one of \['base', 'huge', 'large'\], got 'giant'"):
        MARConfig.preset("giant")


def test_configurations_share_nothing():
    MARConfig().head_config["num_layers"] = 99
    MARConfig.preset("large").hidden_size = 99
    assert MARConfig().head_config == {"num_layers": 6, "hidden_size": 1024}
    assert MARConfig.preset("large").hidden_size == MARConfig.presets["large"]["hidden_size"] == 1024


def test_every_field_comes_back(tmp_path):
    changed = {
        "grid_height": 2,
        "grid_width": 3,
        "token_dim": 5,
        "num_classes": 7,
        "num_class_tokens": 4,
        "hidden_size": 24,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_attention_heads": 3,
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "mlp_ratio": 2,
        "attention_dropout": 0,
        "hidden_dropout": 0.2,
        "class_dropout_prob": 1,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.01,
        "mask_ratio_min": 0.5,
        "mask_ratio_mean": 0.9,
        "mask_ratio_std": 0.1,
        "head_config": {"num_layers": 2, "hidden_size": 8},
        "head_batch_multiplier": 2,
    }
    config = MARConfig(**changed)
    config.save_pretrained(tmp_path)
    for loaded in (MARConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MARConfig
        assert {name: getattr(loaded, name) for name in changed} == changed
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert loaded.num_tokens == 6
    # Nothing above is a default by accident.
    assert [name for name in changed if getattr(MARConfig(), name) == changed[name]] == []


@pytest.mark.parametrize(
    "field, value", [("hidden_size", "768"), ("hidden_size", 768.0), ("head_config", 6), ("head_type", None)]
)
def test_fields_have_types(field, value):
    with pytest.raises(StrictDataclassError, match=f"'{field}' expected"):
        MARConfig(**{field: value})


def test_fields_have_names():
    with pytest.raises(ValueError, match="keyword arguments"):
        MARConfig(16)


@pytest.mark.parametrize(
    "settings, message",
    [
        *(
            ({name: 0}, f"`{name}` has to be at least 1, got 0")
            for name in (
                "grid_height",
                "grid_width",
                "token_dim",
                "num_classes",
                "num_class_tokens",
                "hidden_size",
                "num_encoder_layers",
                "num_decoder_layers",
                "num_attention_heads",
                "head_batch_multiplier",
            )
        ),
        ({"decoder_hidden_size": -8}, "`decoder_hidden_size` has to be at least 1, got -8"),
        ({"hidden_size": 100}, "`hidden_size` 100 has to be a multiple of `num_attention_heads` 12"),
        (
            {"decoder_hidden_size": 100},
            "`decoder_hidden_size` 100 has to be a multiple of `decoder_num_attention_heads` 12",
        ),
        ({"attention_dropout": -0.1}, r"`attention_dropout` has to lie in \[0, 1\], got -0.1"),
        ({"hidden_dropout": 1.5}, r"`hidden_dropout` has to lie in \[0, 1\], got 1.5"),
        ({"class_dropout_prob": 2}, r"`class_dropout_prob` has to lie in \[0, 1\], got 2"),
        ({"mask_ratio_min": 0}, r"`mask_ratio_min` has to lie in \(0, 1\], got 0"),
        ({"mask_ratio_min": 1.1}, r"`mask_ratio_min` has to lie in \(0, 1\], got 1.1"),
        ({"mask_ratio_std": 0}, "`mask_ratio_std` has to be above 0, got 0"),
        ({"head_type": "flow"}, r"`head_type` has to be one of \['categorical', 'diffusion'.*\], got 'flow'"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        MARConfig(**settings)
