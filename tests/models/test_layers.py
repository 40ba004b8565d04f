# SPDX-License-Identifier: Apache-2.0
"""Attention to a context, and the block that has one. What blocks do without one, the backbones' tests say."""

import pytest
import torch
from torch.nn.utils.prune import random_unstructured

from common import MODELS, randomise, relative_error, seeded, tiny_config
from mar_hf.models import layers
from mar_hf.models.layers import BackboneLayer, ContextAttention


LENGTHS = [5, 1, 3]  # tokens of each context; the rest is padding
WIDTHS = [8, 12]  # of contexts: absorbed, and not
ATTENTION = ["sdpa", "eager"]


def config(attention="sdpa", **changes):
    settings = {"attention_dropout": 0.0, "hidden_dropout": 0.0, **changes}
    config = tiny_config(**settings)
    # Not the public name: flash attention would be asked whether it is installed.
    config._attn_implementation_internal = attention
    return config


def make(attention="sdpa", **changes):
    """Attention of a sequence 32 wide to a context 24 wide, random, in eval mode."""
    return randomise(ContextAttention(config(attention, **changes), 32, 2, 24), gain=1.0)


def make_layer(attention="sdpa", **changes):
    """A block with such an attention."""
    return randomise(BackboneLayer(config(attention, **changes), 32, 2, context_dim=24), gain=1.0)


def inputs(dtype=torch.float32, length=12):
    """A sequence, a context, which is short up to 8 tokens, and what is added to the scores of attention to it."""
    generator = seeded(1)
    states = torch.randn(3, 7, 32, generator=generator).to(dtype)
    context = torch.randn(3, length, 24, generator=generator).to(dtype)
    padding = torch.arange(length) >= torch.tensor(LENGTHS)[:, None]
    added = torch.zeros(3, length, dtype=dtype).masked_fill(padding, torch.finfo(dtype).min)
    return states, context, added[:, None, None]


def attend(module, states, context, added):
    return module(states, *module.read(context, added, absorb=context.shape[1] < 12))


def by_hand(module, states, context):
    """Head by head, picture by picture, without the padding."""
    rows = []
    for row, tokens, length in zip(states, context, LENGTHS):
        query = module.query(row)
        key, value = module.key_value(tokens[:length]).chunk(2, dim=-1)
        heads = [slice(0, 16), slice(16, 32)]
        parts = [(query[:, h] @ key[:, h].T / 4).softmax(-1) @ value[:, h] for h in heads]
        rows.append(module.proj(torch.cat(parts, -1)))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("length", WIDTHS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_it_is_attention_to_what_is_no_padding(attention, length):
    module, (states, context, added) = make(attention), inputs(length=length)
    assert relative_error(attend(module, states, context, added), by_hand(module, states, context)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("length", WIDTHS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_is_not_seen_at_all(attention, length):
    module, (states, context, added) = make(attention), inputs(length=length)
    expected = attend(module, states, context, added)
    changed = context.clone()
    changed[1, 1:], changed[2, 3:] = 1e4, -1e4
    assert torch.equal(attend(module, states, changed, added), expected)
    # What is no padding is seen, by the picture that it belongs to and by every token of it.
    changed[2, 2] += 1
    difference = (attend(module, states, changed, added) - expected).abs().amax(-1)
    assert (difference[:2] == 0).all() and (difference[2] > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("length", WIDTHS)
def test_a_context_is_read_once_for_sequences_of_any_length(length):
    module, (states, context, added) = make(), inputs(length=length)
    read = module.read(context, added)
    calls = []
    module.key_value.register_forward_hook(lambda *_: calls.append(1))
    for count in (7, 1, 3):
        # The context has no order of its own, and tokens of the sequence do not see each other.
        found = module(states[:, :count], *read)
        assert relative_error(found, by_hand(module, states, context)[:, :count]) < 1e-5
    assert len(calls) == 3 * 3  # by hand alone: three pictures, three times


@torch.no_grad()
def test_a_short_context_absorbs_the_layers_around_it():
    module, (states, context, added) = make(), inputs(length=8)
    read = module.read(context, added, absorb=True)
    assert [part.shape for part in read[:3]] == [(3, 16, 32), (3, 16, 32), (3, 1, 16)] and read[3] is None
    calls = []
    for layer in (module.query, module.proj):
        layer.register_forward_hook(lambda *_: calls.append(1))
    absorbed = module(states, *read)
    assert not calls
    # One token more is too long; and not where nobody asked for it.
    for length, absorb in ((9, True), (8, False)):
        _, context, added = inputs(length=length)
        read = module.read(context, added, absorb)
        assert [part.shape for part in read[:3]] == [(3, 2, length, 16), (3, 2, length, 16), (3, 1, 1, length)]
    found = module(states, *read)
    assert relative_error(found, absorbed) < 1e-5 and not torch.equal(found, absorbed) and calls == [1, 1]


@torch.no_grad()
def test_what_is_absorbed_has_a_memory_bound(monkeypatch):
    module, (_, context, added) = make(), inputs(length=8)
    absorbed = module.read(context, added, absorb=True)
    size = sum(part.nbytes for part in absorbed[:2])
    for bound, dims in ((size, 3), (size - 1, 4)):
        monkeypatch.setattr(layers, "ABSORBED_BYTES", bound)
        assert module.read(context, added, absorb=True)[0].ndim == dims


@torch.no_grad()
@pytest.mark.parametrize("length", WIDTHS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_rows_that_see_one_token_are_no_work(attention, length):
    module, (states, context, added) = make(attention), inputs(length=length)
    order = [0, 2, 1]  # the row of one token comes last
    states, context, added = states[order], context[order], added[order]
    expected = module(states, *module.read(context, added))
    key, value, mask, constant = module.read(context, added, length < 12, num_single=1)
    assert len(key) == len(value) == len(mask) == 2 and constant.shape == (1, 1, 32)
    assert relative_error(module(states, key, value, mask, constant), expected) < 1e-5
    assert relative_error(constant[0].expand(7, -1), expected[2]) < 1e-5
    # Wherever the one token is.
    constant = module.read(context.flip(1), added.flip(-1), num_single=1)[3]
    assert relative_error(constant[0].expand(7, -1), expected[2]) < 1e-5
    # Two rows of one token each.
    context, added = context[[0, 2, 2]].clone(), added[[0, 2, 2]]
    context[1] += 1
    expected = module(states, *module.read(context, added))
    assert relative_error(module(states, *module.read(context, added, num_single=2)), expected) < 1e-5


@torch.no_grad()
def test_layers_that_are_more_than_their_weights_are_not_absorbed():
    class Scaled(torch.nn.Linear):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class Adapted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

        def forward(self, hidden_states):
            return 2 * self.layer(hidden_states)

    states, context, added = inputs(length=8)
    for change in ("subclass", "wrapper", "forward", "hook", "pruned"):
        module = make()
        if change == "subclass":
            module.query.__class__ = Scaled
        if change == "wrapper":
            module.query = Adapted(module.query)
        if change == "forward":
            forward = module.query.forward
            module.query.forward = lambda states, forward=forward: 2 * forward(states)
        if change == "hook":
            module.query.register_forward_hook(lambda *call: 2 * call[-1])
        if change == "pruned":
            random_unstructured(module.query, "weight", 0.5)
        assert relative_error(attend(module, states, context, added), by_hand(module, states, context)) < 1e-5, change


def test_gradients_pass_through_an_absorbed_context():
    module, (states, context, added) = make(), inputs(length=8)
    for part in (states, context):
        part.requires_grad_()
    gradients = []
    for expected in (False, True):
        output = by_hand(module, states, context) if expected else attend(module, states, context, added)
        gradients.append(torch.autograd.grad(output.square().sum(), [states, context, *module.parameters()]))
    for found, expected in zip(*gradients):
        assert relative_error(found, expected) < 1e-4


@torch.no_grad()
def test_eager_and_sdpa_agree_and_are_two_things():
    (states, context, added), (one, other) = inputs(), (make(attention) for attention in ATTENTION)
    found, expected = attend(one, states, context, added), attend(other, states, context, added)
    assert relative_error(found, expected) < 1e-5 and not torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_attention_sums_in_float32(dtype):
    # Equal scores and values of 1: summed in bfloat16, 4096 weights of 1 would stop at 256.
    states = torch.zeros(1, 1, 4096, 8, dtype=dtype)
    output, probabilities = layers.eager_attention_forward(
        torch.nn.Identity(), states[:, :, :3], states, states + 1, attention_mask=None, scaling=0.5
    )
    assert output.dtype == dtype and output.shape == (1, 3, 1, 8)
    assert (probabilities == 1 / 4096).all() and (output == 1).all()


def test_flash_attention_leaves_masks_to_sdpa():
    states, context, added = inputs()
    found = attend(make("flash_attention_2"), states, context, added)
    assert torch.equal(found, attend(make("sdpa"), states, context, added))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_given_a_mask_without_broadcasting():
    states, context, added = inputs()
    with torch.compiler.set_stance("force_eager"):  # not its kernel, but what it computes
        found = attend(make("flex_attention"), states, context, added)
    assert relative_error(found, by_hand(make(), states, context)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", WIDTHS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_half_precision_sees_no_padding_either(attention, length, dtype):
    module, (states, context, added) = make(attention).to(dtype), inputs(dtype, length)
    found = attend(module, states, context, added)
    assert found.dtype == dtype
    assert relative_error(found.float(), by_hand(make(), *inputs(length=length)[:2])) < 0.03
    context[1, 1:] = 100
    assert torch.equal(attend(module, states, context, added), found)


@pytest.mark.parametrize("attention", ATTENTION)
def test_dropout_of_the_probabilities_is_for_training_only(attention):
    module, (states, context, added) = make(attention, attention_dropout=0.5), inputs()
    expected = attend(module, states, context, added)
    assert torch.equal(expected, attend(make(attention), states, context, added))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = attend(module.train(), states, context, added)
    # One token, whose probability is 1, is dropped or counts twice: for each head and query.
    heads = module.proj.weight.T.unflatten(0, (2, 16))
    value = module.read(context, added)[1]
    parts = torch.einsum("hd,hdo->ho", value[1, :, 0], heads)
    sums = torch.stack([a * parts[0] + b * parts[1] for a in (0, 2) for b in (0, 2)]) + module.proj.bias
    distance = (found[1][:, None] - sums).abs().amax(-1)
    assert (distance.amin(-1) < 1e-5).all() and len(set(distance.argmin(-1).tolist())) > 1


# Blocks


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_block_attends_to_itself_then_to_the_context_then_applies_its_mlp(attention):
    layer, (states, context, added) = make_layer(attention), inputs()
    found = layer(states, context=layer.context_attention.read(context, added))
    expected = states + layer.attention(layer.attention_norm(states))[0]
    without = expected + layer.mlp(layer.mlp_norm(expected))
    assert torch.equal(layer(states), without)
    expected = expected + by_hand(layer.context_attention, layer.context_norm(expected), context)
    expected = expected + layer.mlp(layer.mlp_norm(expected))
    assert relative_error(found, expected) < 1e-5
    assert ((found - without).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("backbone", MODELS)
def test_fresh_blocks_of_a_model_add_exactly_nothing(backbone):
    model = MODELS[backbone](tiny_config(backbone, text_dim=8, text_aligner_layers=1)).eval()
    blocks = [module for module in model.modules() if hasattr(module, "context_attention")]
    assert len(blocks) == 2  # not those of the aligner
    for layer in blocks:
        states, (_, _, added) = inputs()[0], inputs()
        context = 100 * torch.randn(*added.shape[::3], 32, generator=seeded(2))
        key, value, *rest = layer.context_attention.read(context, added)
        assert key.abs().max() > 1 and value.abs().max() > 1
        assert torch.equal(layer(states, context=(key, value, *rest)), layer(states))


def test_a_fresh_block_learns_to_attend():
    # Only the last projection starts at zero: it has a gradient, and after one step so have the others.
    model = MODELS["mar"](tiny_config(text_dim=8, attention_dropout=0.0, hidden_dropout=0.0))
    layer, (states, _, added) = model.model.encoder_layers[0], inputs()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)

    def gradients():
        context = layer.context_attention.read(torch.randn(3, 12, 32, generator=seeded(2)), added)
        optimiser.zero_grad()
        layer(states, context=context).square().mean().backward()
        named = layer.context_attention.named_parameters()
        return {name for name, parameter in named if parameter.grad.abs().max() > 0}

    assert gradients() == {"proj.weight", "proj.bias"}
    optimiser.step()
    assert gradients() == {f"{name}.{kind}" for name in ("query", "key_value", "proj") for kind in ("weight", "bias")}


@torch.no_grad()
def test_dropout_acts_after_the_attention_to_the_context():
    layer, (states, context, added) = make_layer(hidden_dropout=0.5), inputs()
    for linear in (layer.attention.proj, layer.mlp.fc2, layer.context_attention.proj):
        linear.weight.zero_()
        linear.bias.zero_()
    layer.context_attention.proj.bias.fill_(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        context = layer.context_attention.read(context, added)
        found = layer.train()(torch.zeros_like(states), context=context)
    assert found.unique().tolist() == [0, 2] and 0.4 < (found == 0).float().mean() < 0.6


@torch.no_grad()
@pytest.mark.parametrize("length", WIDTHS)
def test_autocast(length):
    module, (states, context, added) = make(), inputs(length=length)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(module, states, context, added)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), by_hand(module, states, context)) < 0.03
