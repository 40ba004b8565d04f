# SPDX-License-Identifier: Apache-2.0
"""What holds for every backbone's configuration, for their own tests to inherit; and the table of backbones."""

import dataclasses
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from mar_hf import TOKEN_HEADS
from mar_hf.models import BACKBONES, BackboneConfig


CHANGED = {
    "grid_height": 2,
    "grid_width": 3,
    "token_dim": 5,
    "num_classes": 7,
    "num_class_tokens": 4,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "attention_dropout": 0,
    "hidden_dropout": 0.2,
    "class_dropout_prob": 1,
    "text_dim": 11,
    "num_text_tokens": 12,
    "text_aligner_layers": 0,
    "text_dropout_prob": 0.4,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.01,
    "order": "spiral",
    "context_noise": 0.3,
    "head_type": "categorical",
    "head_config": {"num_layers": 2, "hidden_size": 8},
    "head_batch_multiplier": 2,
}
# Width, attention heads, layers and width of the head.
PRESETS = {"base": (768, 12, 6, 1024), "large": (1024, 16, 8, 1280), "huge": (1280, 16, 12, 1536)}


def names(config_class):
    return {field.name for field in dataclasses.fields(config_class)}


class ConfigurationTests:
    """Tests of a configuration. A subclass says which one in the attributes, and adds what is true of it alone.

    Attributes:
        config_class: the configuration.
        changed: its own fields, each with another value than its default.
        layers: its numbers of layers in the presets.
    """

    config_class: type
    changed: dict
    layers: dict[str, dict[str, int]]

    def test_defaults_are_the_base_preset(self):
        assert self.config_class().to_dict() == self.config_class.preset("base").to_dict()
        assert self.config_class().num_tokens == 256

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets(self, name):
        config = self.config_class.preset(name, num_classes=10)
        head = config.head_config
        sizes = (config.hidden_size, config.num_attention_heads, head["num_layers"], head["hidden_size"])
        assert sizes == PRESETS[name] and config.condition_dim == sizes[0]
        assert {field: getattr(config, field) for field in self.layers[name]} == self.layers[name]
        assert (config.num_classes, config.num_class_tokens, config.token_dim) == (10, 64, 16)

    def test_unknown_presets(self):
        with pytest.raises(ValueError, match=r"`name` has to be one of \['base', 'huge', 'large'\], got 'giant'"):
            self.config_class.preset("giant")

    def test_configurations_share_nothing(self):
        make = self.config_class
        make().head_config["num_layers"] = 99
        large = make.preset("large")
        large.hidden_size, large.head_config["num_layers"] = 99, 99
        assert make().head_config == {"num_layers": 6, "hidden_size": 1024}
        assert make.preset("large").hidden_size == make.presets["large"]["hidden_size"] == 1024
        assert make.preset("large").head_config["num_layers"] == 8

    def test_every_field_comes_back(self, tmp_path):
        make, changed = self.config_class, {**CHANGED, **self.changed}
        config = make(**changed)
        config.save_pretrained(tmp_path)
        for loaded in (make.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
            assert type(loaded) is make
            assert {name: getattr(loaded, name) for name in changed} == changed
            assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
            assert loaded.num_tokens == 6
        # Nothing above is a default by accident, and no field is left out.
        assert [name for name in changed if getattr(make(), name) == changed[name]] == []
        assert changed.keys() == names(make) - names(PreTrainedConfig)

    @pytest.mark.parametrize(
        "field, value",
        [("hidden_size", "768"), ("hidden_size", 768.0), ("head_config", 6), ("head_type", None), ("order", 1)],
    )
    def test_fields_have_types(self, field, value):
        with pytest.raises(StrictDataclassError, match=f"'{field}' expected"):
            self.config_class(**{field: value})

    def test_fields_have_names(self):
        with pytest.raises(ValueError, match="keyword arguments"):
            self.config_class(16)

    def refuse(self, settings, message):
        with pytest.raises(ValueError, match=message):
            self.config_class(**settings)

    def test_sizes_are_positive(self):
        assert {"grid_height", "token_dim", "num_text_tokens", "num_class_tokens"} < set(self.config_class.positive)
        for name in self.config_class.positive:
            for value in (0, -8):
                # 0 of what may be left open means that it is.
                if value < 0 or getattr(self.config_class, name) is not None:
                    self.refuse({name: value}, f"`{name}` has to be at least 1, got {value}")

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"hidden_size": 100}, "`hidden_size` 100 has to be a multiple of `num_attention_heads` 12"),
            ({"attention_dropout": -0.1}, r"`attention_dropout` has to lie in \[0, 1\], got -0.1"),
            ({"hidden_dropout": 1.5}, r"`hidden_dropout` has to lie in \[0, 1\], got 1.5"),
            ({"class_dropout_prob": 2}, r"`class_dropout_prob` has to lie in \[0, 1\], got 2"),
            ({"text_dropout_prob": 1.1}, r"`text_dropout_prob` has to lie in \[0, 1\], got 1.1"),
            ({"text_dim": 0}, "`text_dim` has to be at least 1 or None, got 0"),
            ({"text_aligner_layers": -1}, "`text_aligner_layers` has to be at least 0, got -1"),
            ({"num_classes": -1}, "`num_classes` has to be at least 0, got -1"),
            ({"context_noise": 1.1}, r"`context_noise` has to lie in \[0, 1\], got 1.1"),
            ({"order": "diagonal"}, r"`order` has to be one of \['checkerboard', .*'zigzag'\], got 'diagonal'"),
            ({"head_type": "flow"}, r"`head_type` has to be one of \['categorical', 'diffusion'.*\], got 'flow'"),
        ],
    )
    def test_values_out_of_range(self, settings, message):
        self.refuse(settings, message)

    @pytest.mark.parametrize(
        "settings, message",
        [
            *(({"layer_norm_eps": eps}, "`layer_norm_eps` has to lie in") for eps in (math.nan, math.inf, 0.0, -1e-6)),
            *(({"initializer_range": value}, "`initializer_range` has to") for value in (-0.1, math.nan, math.inf)),
            *(({"mlp_ratio": ratio}, "`mlp_ratio` has to lie in") for ratio in (0, -1, math.nan, math.inf, 1e-9)),
            *(({name: math.nan}, f"`{name}` has to lie in") for name in ("attention_dropout", "context_noise")),
            *(({name: True}, f"'{name}' expected") for name in ("hidden_size", "grid_width", "mlp_ratio")),
            (
                {"hidden_size": 10**9, "num_attention_heads": 10},
                "`hidden_size` has to be at most 65536, got 1000000000",
            ),
            ({"num_classes": 10**12}, "`num_classes` has to be at most"),
            ({"text_aligner_layers": 10**9}, "`text_aligner_layers` has to be at most 1024"),
            ({"id2label": 1}, r"can't be made of .*'id2label': 1"),
            ({"dtype": "float31"}, r"can't be made of .*'dtype': 'float31'"),
        ],
    )
    def test_what_is_no_number_or_an_absurd_one(self, settings, message):
        self.refuse(settings, message)

    @pytest.mark.parametrize(
        "head_config, message",
        [
            ({"hidden_size": 0}, "`hidden_size` has to be at least 1"),
            ({"hidden_size": True}, "`hidden_size` has to be at least 1, got True, which is no integer"),
            ({"hidden_size": [8]}, r"`hidden_size` has to be at least 1, got \[8\], which is no integer"),
            ({"num_layers": 2.0}, "`num_layers` has to be at least 0, got 2.0, which is no integer"),
            ({"num_layers": 10**9}, "`num_layers` has to be at most 1024"),
            ({"layer_norm_eps": math.nan}, "`layer_norm_eps` has to lie in .*, got nan"),
            ({"layer_norm_eps": "x"}, "`layer_norm_eps` has to lie in .*, got 'x'"),
        ],
    )
    @pytest.mark.parametrize("head_type", TOKEN_HEADS)
    def test_settings_of_the_head(self, head_type, head_config, message):
        model_class = BACKBONES[self.config_class.model_type][2]
        with torch.device("meta"), pytest.raises(ValueError, match=f"`head_config` .* does not fit .*{message}"):
            model_class(self.config_class(head_type=head_type, head_config=head_config, hidden_size=12))


def test_the_table_of_backbones_is_what_the_auto_classes_know():
    assert BACKBONES.keys() == {"mar_hf_mar", "mar_hf_ar"}
    for name, (config_class, model_class, whole_class) in BACKBONES.items():
        assert issubclass(config_class, BackboneConfig) and config_class.model_type == name
        assert type(AutoConfig.for_model(name)) is config_class
        assert model_class.config_class is whole_class.config_class is config_class
