# SPDX-License-Identifier: Apache-2.0
"""Settings of the image tokenizer: that they come back, and what is refused."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from mar_hf import ImageTokenizerConfig


TINY = {"_class_name": "AutoencoderTiny", "latent_channels": 4}
VQ = {"_class_name": "VQModel", "latent_channels": 4}


def test_defaults_are_pixels():
    config = ImageTokenizerConfig()
    assert (config.autoencoder, config.latent_channels, config.patch_size) == (None, 3, 1)
    assert config.in_channels == 3
    assert (config.normalizer, config.shift_factor, config.scaling_factor) == ("affine", 0.0, 1.0)
    assert config.quantize is False


def test_every_field_comes_back(tmp_path):
    changed = {
        "autoencoder": VQ,
        "quantize": True,
        "patch_size": 2,
        "normalizer": "token_layer_norm",
        "shift_factor": [0.1, 0.2, 0.3, 4],
        "scaling_factor": [1.5, 2, -2.5, 3.0],
    }
    config = ImageTokenizerConfig(**changed)
    config.save_pretrained(tmp_path)
    for loaded in (ImageTokenizerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is ImageTokenizerConfig
        assert {name: getattr(loaded, name) for name in changed} == changed
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert loaded.latent_channels == 4


@pytest.mark.parametrize("width, channels", [(None, 4), (7, 7)])
def test_vectors_of_a_codebook_have_a_width_of_their_own(width, channels):
    config = ImageTokenizerConfig(autoencoder={**VQ, "vq_embed_dim": width}, shift_factor=[0.0] * channels)
    assert config.latent_channels == channels


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"patch_size": 0}, "`patch_size` has to be at least 1, got 0"),
        ({"normalizer": "batch"}, r"`normalizer` has to be one of \('affine', .* 'sphere'\), got 'batch'"),
        (
            {"scaling_factor": [1.0, 2.0]},
            r"`scaling_factor` needs one value per latent channel \(3\), got \[1.0, 2.0\]",
        ),
        ({"autoencoder": TINY, "shift_factor": [0.0] * 3}, r"`shift_factor` needs one value per latent channel \(4\)"),
        ({"scaling_factor": 0}, "`scaling_factor` has to be different from 0, got 0"),
        ({"scaling_factor": [1.0, 0.0, 1.0]}, r"`scaling_factor` has to be different from 0, got \[1.0, 0.0, 1.0\]"),
        ({"scaling_factor": float("nan")}, "`scaling_factor` has to be a finite number, or a list of them, got nan"),
        ({"scaling_factor": [1.0, float("inf"), 1.0]}, "`scaling_factor` has to be a finite number"),
        ({"shift_factor": float("-inf")}, "`shift_factor` has to be a finite number, or a list of them, got -inf"),
        ({"in_channels": 0}, "`in_channels` has to be at least 1, got 0"),
        ({"autoencoder": {**TINY, "in_channels": 1}, "in_channels": 3}, "has to be the autoencoder's 1, got 3"),
        ({"autoencoder": TINY, "in_channels": 4}, "`in_channels` has to be the autoencoder's 3, got 4"),
        ({"autoencoder": {**TINY, "out_channels": 1}}, "`in_channels` 3 and `out_channels` 1"),
        ({"autoencoder": {**TINY, "latent_channels": 0}}, "`latent_channels` has to be at least 1, got 0"),
        ({"autoencoder": {**TINY, "latent_channels": "4"}}, "`latent_channels` has to be at least 1, got '4'"),
        ({"autoencoder": TINY, "quantize": True}, "`quantize` has to be False without a `VQModel`, got .*Tiny"),
        ({"quantize": True}, "`quantize` has to be False without a `VQModel`, got `autoencoder` None"),
        ({"autoencoder": {}}, r"`autoencoder` has to hold `_class_name` and `latent_channels`, got \{\}"),
        ({"autoencoder": {"latent_channels": 4}}, "`autoencoder` has to hold `_class_name`"),
        ({"autoencoder": {**TINY, "sample_size": 1j}}, "`autoencoder` has to hold plain data that JSON takes"),
        (
            {"autoencoder": {**TINY, "in_channels": None}},
            "`in_channels` of `autoencoder` has to be at least 1, got None",
        ),
    ],
)
def test_values_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageTokenizerConfig(**settings)


@pytest.mark.parametrize("field, value", [("patch_size", 2.0), ("autoencoder", "kl"), ("scaling_factor", "1")])
def test_fields_have_types(field, value):
    with pytest.raises(StrictDataclassError, match=f"'{field}'"):
        ImageTokenizerConfig(**{field: value})


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_the_autoencoders_or_those_of_the_pixels(channels):
    assert ImageTokenizerConfig(in_channels=channels).latent_channels == channels
    settings = {**TINY, "in_channels": channels, "out_channels": channels}
    for given in (None, channels):
        assert ImageTokenizerConfig(autoencoder=settings, in_channels=given).in_channels == channels


def test_configurations_without_channels_are_of_colours(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mar_hf_image_tokenizer", "patch_size": 2}')
    assert ImageTokenizerConfig.from_pretrained(tmp_path).in_channels == 3
