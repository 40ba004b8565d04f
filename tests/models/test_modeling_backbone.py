# SPDX-License-Identifier: Apache-2.0
"""Parts that all backbones are built of."""

import torch

from common import seeded, tiny_model
from mar_hf.models import add_context_noise


@torch.no_grad()
def test_dropout_acts_after_the_attention_in_the_mlp_and_after_it():
    settings = {"attention_dropout": 0.0, "hidden_dropout": 0.5}
    layer, seen = tiny_model("ar", **settings, hidden_size=128).model.layers[0], []
    layer.train()
    layer.mlp.fc2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    hidden_states = torch.randn(4, 10, 128, generator=seeded(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer(hidden_states)
        assert 0.4 < (seen[0] == 0).float().mean() < 0.6
        # With weights of 0 a half of the block adds its bias alone, kept and doubled, or dropped.
        halves = (layer.attention.proj, layer.mlp.fc2)
        for linear in halves:
            linear.weight.zero_()
        for ours, other in (halves, halves[::-1]):
            ours.bias.fill_(1)
            other.bias.zero_()
            added = layer(torch.zeros_like(hidden_states))
            assert added.unique().tolist() == [0, 2] and 0.4 < (added == 0).float().mean() < 0.6


def test_context_noise_is_a_mixture():
    tokens, noise = torch.randn(2, 3, 16, 12, generator=seeded(1)).unbind(0)
    levels = torch.tensor([0.0, 0.25, 1.0])[:, None, None]
    found = add_context_noise(tokens, noise, levels)
    assert torch.equal(found[0], tokens[0]) and torch.equal(found[2], noise[2])
    torch.testing.assert_close(found[1], 0.75 * tokens[1] + 0.25 * noise[1])
    assert torch.equal(add_context_noise(tokens, noise, 0.25)[1], found[1])
    assert add_context_noise(tokens.bfloat16(), noise.bfloat16(), levels).dtype == torch.bfloat16
