# SPDX-License-Identifier: Apache-2.0
"""What a model is given at a step depends on the examples alone."""

import torch

from mar_hf import ImageTokenizer, ImageTokenizerConfig
from mar_hf.training import TrainingArguments
from mar_hf.training.batches import example_generators
from mar_hf.training.model_inputs import draw_inputs, encode, text_inputs
from tiny_pipelines import tiny_pipeline


def test_masks_are_each_examples_own_with_one_ratio_for_all():
    model, args, device = tiny_pipeline().transformer, TrainingArguments("out"), torch.device("cpu")

    def masks(positions, args, rank=0):
        return draw_inputs(args, model, example_generators(0, positions), 7, device, rank)["mask"]

    together = masks([0, 1, 2], args)
    assert torch.equal(masks([1], args)[0], together[1])
    assert torch.equal(masks([0, 1, 2], args, rank=1), together)
    counts = together.sum(1)
    assert (counts == counts[0]).all() and not torch.equal(together[0], together[1])
    own = TrainingArguments("out", mask_ratio_per_process=True)
    ratios = {int(masks([0], own, rank).sum()) for rank in range(8)}
    assert len(ratios) > 1


def test_pictures_and_their_moments_give_the_same_tokens():
    tokenizer = ImageTokenizer(ImageTokenizerConfig(patch_size=2, scaling_factor=2.0))
    pictures, labels = torch.rand(2, 3, 4, 4) * 2 - 1, torch.tensor([1, 0])
    device = torch.device("cpu")
    tokens, found = encode(
        {"pixel_values": pictures, "label": labels}, tokenizer, example_generators(0, [0, 1]), device
    )
    mean, std = tokenizer.encode_moments(pictures)
    moments = {"mean": mean, "std": torch.zeros_like(mean) if std is None else std, "label": labels}
    cached, _ = encode(moments, tokenizer, example_generators(0, [0, 1]), device)
    assert torch.equal(found, labels) and tokens.shape == (2, 4, 12)
    torch.testing.assert_close(cached, tokens)


def test_states_that_were_cached_need_no_text_encoder():
    batch = {"prompt_embeds": torch.ones(1, 2, 3), "prompt_attention_mask": torch.ones(1, 2).bool(), "label": None}
    found = text_inputs(batch, None, None, 8, torch.device("cpu"))
    assert found.keys() == {"prompt_embeds", "prompt_attention_mask"}
    assert text_inputs({"label": None}, None, None, 8, torch.device("cpu")) == {}
