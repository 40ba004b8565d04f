# SPDX-License-Identifier: Apache-2.0
"""Settings of the masked backbone: what they are, that they come back, and what is refused."""

import pytest
from test_configuration_backbone import ConfigurationTests

from mar_hf import MARConfig


class TestMARConfig(ConfigurationTests):
    config_class = MARConfig
    changed = {
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "mask_ratio_min": 0.5,
        "mask_ratio_mean": 0.9,
        "mask_ratio_std": 0.1,
    }
    layers = {
        "base": {"num_encoder_layers": 12, "num_decoder_layers": 12},
        "large": {"num_encoder_layers": 16, "num_decoder_layers": 16},
        "huge": {"num_encoder_layers": 20, "num_decoder_layers": 20},
    }

    def test_the_decoder_is_as_wide_as_the_encoder_where_nothing_else_is_said(self):
        config = MARConfig.preset("large")
        assert (config.decoder_hidden_size, config.decoder_num_attention_heads) == (1024, 16)
        config = MARConfig(decoder_hidden_size=96, decoder_num_attention_heads=4)
        assert (config.hidden_size, config.condition_dim) == (768, 96)

    def test_the_order_is_random(self):
        assert MARConfig().order == "random"

    @pytest.mark.parametrize(
        "settings, message",
        [
            (
                {"decoder_hidden_size": 100},
                "`decoder_hidden_size` 100 has to be a multiple of `decoder_num_attention_heads` 12",
            ),
            ({"mask_ratio_min": 0}, r"`mask_ratio_min` has to lie in \(0, 1\], got 0"),
            ({"mask_ratio_min": 1.1}, r"`mask_ratio_min` has to lie in \(0, 1\], got 1.1"),
            ({"mask_ratio_std": 0}, "`mask_ratio_std` has to be above 0, got 0"),
            ({"mask_ratio_std": float("inf")}, "`mask_ratio_std` has to lie in .*, got inf"),
            ({"mask_ratio_mean": float("nan")}, "`mask_ratio_mean` has to lie in .*, got nan"),
            ({"num_encoder_layers": 10**6}, "`num_encoder_layers` has to be at most 1024, got 1000000"),
            ({"decoder_hidden_size": True}, "'decoder_hidden_size' with value True"),
        ],
    )
    def test_own_values_out_of_range(self, settings, message):
        self.refuse(settings, message)
