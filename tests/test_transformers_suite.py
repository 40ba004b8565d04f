# SPDX-License-Identifier: Apache-2.0
"""What transformers asks of its own models, asked of ours."""

import copy
import json
import unittest

import torch

from common import seeded, tiny_config
from mar_hf import (
    ARConfig,
    ARForImageGeneration,
    ARModel,
    ImageTokenizer,
    ImageTokenizerConfig,
    MARConfig,
    MARForImageGeneration,
    MARModel,
    TokenDDPMScheduler,
)
from tiny_pipelines import tiny_kl
from transformers_source import suite


ConfigTester = suite("test_configuration_common").ConfigTester
ModelTesterMixin = suite("test_modeling_common").ModelTesterMixin
BATCH = 7

# What does not apply, by the start of its name, and why.
STRICT = "a checkpoint that lacks tensors is refused, not filled with random numbers (tests/test_loading.py)"
EXEMPT = {
    "test_bc_torch_dtype": "fourteen loads; each type is loaded in tests/models/test_modeling_backbone.py",
    "test_cannot_load_with_meta_device": "refused as a ValueError, not a RuntimeError, which names the checkpoint",
    "test_correct_missing_keys": STRICT,
    "test_model_get_set_embeddings": "asks for an embedding of words; tokens are projected",
    "test_model_weights_reload_no_missing_tied_weights": STRICT,
}
EXEMPT_TOKENIZER = EXEMPT | {
    name: "a tokenizer gives pictures, not an output with hidden states"
    for name in ("test_hidden_states", "test_model_outputs_equivalence", "test_retain_grad")
}
EXEMPT_WITH_HEAD = EXEMPT | {"test_eager_matches_sdpa": "done on the backbone, which is all that attends"}


def exempt(reasons: dict[str, str]):
    """Mark tests of a suite as skipped."""

    def mark(suite_class: type) -> type:
        for start, reason in reasons.items():
            names = [name for name in dir(suite_class) if name.startswith(start)]
            assert names, start
            for name in names:
                setattr(suite_class, name, unittest.skip(reason)(lambda self: None))
        return suite_class

    return mark


class Backbone:
    """What the suite wants to know of a backbone."""

    batch_size = BATCH
    num_hidden_layers, num_attention_heads, hidden_size = 2, 2, 32

    def __init__(self, kind: str, is_training: bool):
        self.kind, self.is_training = kind, is_training
        # Two tokens of the class and the visible half, or all but the last.
        self.seq_length = 2 + {"mar": 8, "ar": 15}[kind]

    def prepare_config_and_inputs_for_common(self):
        config = tiny_config(self.kind)
        config._attn_implementation = "eager"  # `output_attentions` is refused by all others
        tokens = torch.randn(BATCH, config.num_tokens, config.token_dim, generator=seeded(1))
        orders = torch.rand(BATCH, config.num_tokens, generator=seeded(2)).argsort(1)
        inputs = {"tokens": tokens, "class_labels": torch.arange(BATCH) % 3}
        return config, inputs | ({"mask": orders < 8} if self.kind == "mar" else {"orders": orders})


class BackboneSuite(ModelTesterMixin):
    test_resize_embeddings = False  # the input is no word
    test_mismatched_shapes = False
    additional_model_inputs = ("mask", "orders")

    kind: str
    config_class: type

    def setUp(self):
        with_head = hasattr(self.all_model_classes[0], "sampling_defaults")
        self.model_tester = Backbone(self.kind, is_training=with_head)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and self.model_tester.is_training:
            rows = 4 * inputs["tokens"].shape[0] * inputs["tokens"].shape[1]
            inputs["noise_scheduler"] = TokenDDPMScheduler()
            inputs["timesteps"] = torch.randint(0, 1000, (rows,), generator=seeded(3))
            inputs["noise"] = torch.randn(rows, inputs["tokens"].shape[2], generator=seeded(4))
        return inputs

    def test_config(self):
        sizes = {"hidden_size": 36, "head_config": {"num_layers": 1, "hidden_size": 8}}
        tester = ConfigTester(self, config_class=self.config_class, has_text_modality=False, **sizes)
        tester.run_common_tests()


@exempt(EXEMPT)
class MARModelTest(BackboneSuite, unittest.TestCase):
    kind, config_class, all_model_classes = "mar", MARConfig, (MARModel,)


@exempt(EXEMPT_WITH_HEAD)
class MARForImageGenerationTest(BackboneSuite, unittest.TestCase):
    kind, config_class, all_model_classes = "mar", MARConfig, (MARForImageGeneration,)


@exempt(EXEMPT)
class ARModelTest(BackboneSuite, unittest.TestCase):
    kind, config_class, all_model_classes = "ar", ARConfig, (ARModel,)


@exempt(EXEMPT_WITH_HEAD)
class ARForImageGenerationTest(BackboneSuite, unittest.TestCase):
    kind, config_class, all_model_classes = "ar", ARConfig, (ARForImageGeneration,)


class Tokenizer:
    """What the suite wants to know of an image tokenizer."""

    batch_size, is_training = BATCH, False

    def prepare_config_and_inputs_for_common(self):
        return tiny_kl().config, {"pixel_values": torch.rand(BATCH, 3, 8, 8, generator=seeded(1)) * 2 - 1}


@exempt(EXEMPT_TOKENIZER)
class ImageTokenizerTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ImageTokenizer,)
    has_attentions = False
    test_resize_embeddings = False
    test_mismatched_shapes = False

    def setUp(self):
        self.model_tester = Tokenizer()

    def test_config(self):
        settings = json.loads(json.dumps({"autoencoder": tiny_kl().config.autoencoder, "patch_size": 2}))
        tester = ConfigTester(
            self, ImageTokenizerConfig, has_text_modality=False, common_properties=["latent_channels"], **settings
        )
        tester.run_common_tests()
