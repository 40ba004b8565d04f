# SPDX-License-Identifier: Apache-2.0
"""Settings of the causal backbone: what they are, that they come back, and what is refused."""

import pytest
from test_configuration_backbone import ConfigurationTests

from mar_hf import ARConfig


class TestARConfig(ConfigurationTests):
    config_class = ARConfig
    changed = {"num_layers": 3, "position_type": "rotary", "rotary_base": 10, "max_tokens_per_step": 6}
    layers = {"base": {"num_layers": 24}, "large": {"num_layers": 32}, "huge": {"num_layers": 40}}

    def test_one_token_a_step_row_by_row(self):
        assert (ARConfig().order, ARConfig().max_tokens_per_step) == ("raster", 1)

    def test_the_caches_of_transformers_find_the_number_of_layers(self):
        assert ARConfig(num_layers=3).num_hidden_layers == 3

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"position_type": "sine"}, r"`position_type` has to be one of \('learned', 'rotary'\), got 'sine'"),
            (
                {"position_type": "rotary", "hidden_size": 72},
                "`hidden_size` 72 over `num_attention_heads` 12 has to be a multiple of 4 with rotary positions",
            ),
            ({"rotary_base": 1}, "`rotary_base` has to be above 1, got 1"),
            ({"rotary_base": float("nan")}, "`rotary_base` has to be above 1, got nan"),
            ({"rotary_base": float("inf")}, "`rotary_base` has to lie in .*, got inf"),
            (
                {"max_tokens_per_step": 7, "grid_height": 2, "grid_width": 3},
                r"`max_tokens_per_step` has to lie in 1..6 \(the tokens\), got 7",
            ),
        ],
    )
    def test_own_values_out_of_range(self, settings, message):
        self.refuse(settings, message)

    def test_learned_positions_need_no_multiple_of_4(self):
        assert ARConfig(hidden_size=72).position_type == "learned"
