# SPDX-License-Identifier: Apache-2.0
"""The masked backbone with its head: what holds for every backbone, sizes, masks, what the encoder sees."""

import pytest
import torch
from test_modeling_backbone import BackboneTests, count_head_parameters, count_layer_parameters, linear
from text_tests import FRESH_TEXT, TEXT_WEIGHTS, TextTests

from common import relative_error, seeded, tiny_model
from mar_hf import MARConfig, MARForImageGeneration, MARModel, TokenDDPMScheduler
from mar_hf.generation import GENERATION_ORDERS, sample_mask, sample_num_masked
from tiny_texts import TEXT


def inputs(batch=2, model=None, num_masked=10):
    """Tokens, a mask with as many positions in every row, labels."""
    given = TestMAR().inputs(batch, model, num_masked)
    return given["tokens"], given["mask"], given["class_labels"]


class TestMAR(BackboneTests):
    backbone = "mar"
    model_class = MARModel
    fields = ["condition", "encoder_last_hidden_state"]
    other_weights = [
        "condition_position_embedding",
        "decoder_position_embedding",
        "encoder_position_embedding",
        "mask_token",
    ]
    fresh_settings = {"decoder_hidden_size": 64}
    shared_draws = {"num_masked": 13}
    deeper = {"num_encoder_layers": 2}

    def inputs(self, batch=2, model=None, num_masked=None):
        """Tokens, a mask with as many positions in every row, labels."""
        tokens, labels, generator = self.basic_inputs(batch, model or tiny_model())
        num_masked = tokens.shape[1] * 5 // 8 if num_masked is None else num_masked
        mask = torch.rand(tokens.shape[:2], generator=generator).argsort(1).argsort(1) < num_masked
        return {"tokens": tokens, "mask": mask, "class_labels": labels}

    def draw(self, generator, batch):
        return {"mask": sample_mask(batch, 16, sample_num_masked(16, 0.7, 1.0, 0.25, generator), generator)}

    def layers(self, model):
        return [*model.model.encoder_layers, *model.model.decoder_layers]


class TestMARWithTexts(TextTests, TestMAR):
    """The same once more with texts."""

    other_weights = sorted([*TestMAR.other_weights, *TEXT_WEIGHTS])
    fresh_settings = {**TestMAR.fresh_settings, **FRESH_TEXT}
    deeper = {**TestMAR.deeper, **TEXT}


# Sizes


def count_parameters(config):
    """The model's parameters by the paper's architecture (every linear layer has a bias)."""
    d, sequence = config.hidden_size, config.num_class_tokens + config.num_tokens
    # Classes, tokens, decoder, mask token; positions of encoder, decoder, conditions.
    backbone = (config.num_classes + 1) * d + linear(config.token_dim, d) + linear(d, d) + d
    backbone += (2 * sequence + config.num_tokens) * d
    layers = config.num_encoder_layers + config.num_decoder_layers
    return backbone + layers * count_layer_parameters(d) + 3 * 2 * d, count_head_parameters(config)


@pytest.mark.parametrize(
    "preset, millions, paper", [("base", 207.9, 208), ("large", 478.3, 479), ("huge", 942.4, 943)]
)
def test_presets_have_the_published_sizes(preset, millions, paper):
    with torch.device("meta"):
        model = MARForImageGeneration(MARConfig.preset(preset))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    backbone, head = (sum(p.numel() for p in part.parameters()) for part in (model.model, model.head))
    assert (backbone, head) == count_parameters(model.config)
    assert round((backbone + head) / 1e6, 1) == millions
    assert abs((backbone + head) / 1e6 - paper) < 1


# What depends on what


@torch.no_grad()
def test_shapes():
    model = tiny_model()
    tokens, mask, labels = inputs(3)
    output = model(tokens, mask, labels)
    assert output.loss is None
    assert output.condition.shape == (3, 16, 32)
    assert output.encoder_last_hidden_state.shape == (3, 2 + 6, 32)
    backbone = model.model(tokens, mask, labels)
    assert torch.equal(backbone.condition, output.condition)


@torch.no_grad()
def test_masked_tokens_are_not_read():
    model, (tokens, mask, labels) = tiny_model(), inputs()
    expected = model(tokens, mask, labels)
    tokens[mask] = float("nan")
    found = model(tokens, mask, labels)
    assert torch.equal(found.condition, expected.condition)
    assert torch.equal(found.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    visible = (~mask[0]).nonzero()[2, 0]
    tokens[0, visible] += 1
    changed = model(tokens, mask, labels).condition
    # Every position of that image, masked or not, and nothing of the other.
    assert ((changed[0] - expected.condition[0]).abs().amax(-1) > 1e-5).all()
    assert torch.equal(changed[1], expected.condition[1])


@torch.no_grad()
@pytest.mark.parametrize("num_masked", [16, 1, 0])
def test_all_or_nothing_masked(num_masked):
    model = tiny_model()
    tokens, mask, labels = inputs(num_masked=num_masked)
    output = model(tokens, mask, labels)
    assert output.encoder_last_hidden_state.shape[1] == 2 + 16 - num_masked
    assert output.condition.isfinite().all()
    if num_masked == 16:
        assert torch.equal(model(tokens + 1, mask, labels).condition, output.condition)


@torch.no_grad()
def test_visible_tokens_keep_their_places():
    # The same token values at other positions are another picture: swap two visible ones.
    model, (tokens, mask, labels) = tiny_model(), inputs(1)
    first, second = (~mask[0]).nonzero()[:2, 0]
    expected = model(tokens, mask, labels)
    swapped = tokens.clone()
    swapped[0, [first, second]] = tokens[0, [second, first]]
    assert relative_error(model(swapped, mask, labels).condition, expected.condition) > 1e-3


@torch.no_grad()
def test_a_given_count_of_masked_tokens_changes_nothing():
    model, (tokens, mask, labels) = tiny_model(), inputs()
    counted, given = model(tokens, mask, labels), model(tokens, mask, labels, num_masked=10)
    assert torch.equal(counted.condition, given.condition)
    assert torch.equal(counted.encoder_last_hidden_state, given.encoder_last_hidden_state)


@torch.no_grad()
def test_other_grids_and_another_width_of_the_decoder():
    model = tiny_model(
        grid_height=2, grid_width=5, decoder_hidden_size=24, decoder_num_attention_heads=3, num_class_tokens=1
    )
    tokens, mask, labels = inputs(2, model, num_masked=4)
    output = model(tokens, mask, labels, return_dict=True)
    assert output.condition.shape == (2, 10, 24)
    assert output.encoder_last_hidden_state.shape == (2, 1 + 6, 32)
    assert model.head.condition_proj.in_features == 24


@torch.no_grad()
def test_the_backbone_compiles_in_one_piece():
    model, (tokens, mask, labels) = tiny_model().model, inputs()
    expected = model(tokens, mask, labels).condition
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(tokens, mask, labels, num_masked=10).condition, expected) < 1e-5


# Masks


def test_drawn_masks_follow_the_configuration():
    model = tiny_model(mask_ratio_min=0.4, mask_ratio_mean=0.5, mask_ratio_std=0.001).train()
    for seed in range(5):
        encoded = model(inputs()[0], generator=seeded(seed)).encoder_last_hidden_state
        assert encoded.shape[1] in (2 + 16 - 8, 2 + 16 - 9)


@pytest.mark.parametrize("order", sorted(GENERATION_ORDERS.keys() - {"random"}))
def test_other_orders_mask_their_end(order):
    model = tiny_model(order=order)
    drawn = model.training_inputs(3, seeded(1))
    generator = seeded(1)
    num_masked = sample_num_masked(16, 0.7, 1.0, 0.25, generator)
    orders = torch.stack([GENERATION_ORDERS[order](4, 4, generator) for _ in range(3)])
    assert drawn["num_masked"] == num_masked < 16
    assert torch.equal(drawn["mask"].sum(1), torch.tensor([num_masked] * 3))
    assert drawn["mask"].gather(1, orders[:, 16 - num_masked :]).all()


def test_a_mask_follows_the_progress_of_the_training():
    model = tiny_model(order="random_annealed")
    raster = torch.arange(16) >= 6
    early, late = (
        model.training_inputs(20, seeded(1), num_masked=10, progress=progress)["mask"] for progress in (0.5, 0.75)
    )
    assert (late == raster).all() and not (early == raster).all(1).any()


def test_what_a_batch_has_in_common_is_drawn_from_the_shared_generator():
    model = tiny_model()
    drawn = model.training_inputs(2, [seeded(1), seeded(2)], seeded(3))
    num_masked = sample_num_masked(16, 0.7, 1.0, 0.25, seeded(3))
    assert drawn["num_masked"] == num_masked
    assert torch.equal(drawn["mask"], sample_mask(2, 16, num_masked, [seeded(1), seeded(2)]))


@torch.no_grad()
def test_an_encoder_sees_what_the_given_number_leaves():
    output = tiny_model().train()(inputs()[0], num_masked=13, generator=[seeded(1), seeded(2)])
    # Two class tokens and the three that 13 of 16 leave.
    assert output.encoder_last_hidden_state.shape[1] == 5


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_predicts_the_next_of_the_order(count):
    model, (tokens, _, labels) = tiny_model(), inputs(3)
    orders = torch.rand(3, 16, generator=seeded(2)).argsort(1)
    found = model.predict(tokens, orders, [2, 4, count], labels)
    mask = torch.ones(3, 16, dtype=torch.bool).scatter(1, orders[:, :6], False)
    expected = model(tokens, mask, labels).condition
    assert relative_error(found, expected[torch.arange(3)[:, None], orders[:, 6 : 6 + count]]) < 1e-5
    assert model.make_cache([2, 4, count]) is None


@torch.no_grad()
def test_the_last_block_computes_only_what_is_wanted():
    model, (tokens, mask, labels) = tiny_model(num_decoder_layers=2), inputs(3)
    positions = torch.tensor([[4, 1], [0, 15], [7, 7]])
    widths = []
    model.model.decoder_layers[0].mlp.register_forward_hook(lambda _, __, output: widths.append(output.shape[1]))
    model.model.decoder_layers[1].mlp.register_forward_hook(lambda _, __, output: widths.append(output.shape[1]))
    found = model(tokens, mask, labels, positions=positions).condition
    expected = model(tokens, mask, labels).condition
    assert widths == [18, 2, 18, 18]
    assert relative_error(found, expected[torch.arange(3)[:, None], positions]) < 1e-5


def test_the_loss_needs_all_positions():
    model, (tokens, mask, labels) = tiny_model(), inputs(3)
    with pytest.raises(ValueError, match="`positions` does not go with `noise_scheduler`"):
        model(tokens, mask, labels, TokenDDPMScheduler(), positions=torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`positions` has to be of shape \(3, count\)"):
        model(tokens, mask, labels, positions=torch.zeros(2, 1, dtype=torch.long))


# Errors


@pytest.mark.parametrize(
    "argument, values",
    [
        ("positions", [5, [[0]], torch.zeros(3, 1), torch.full((3, 1), 16), torch.full((3, 1), -1)]),
        ("num_masked", [len, 17, -1, True, 2.0]),
    ],
)
def test_wrong_places(argument, values):
    model, (tokens, mask, labels) = tiny_model(), inputs(3)
    for part in (model, model.model):
        for value in values:
            with pytest.raises(ValueError, match=f"`{argument}` has to"):
                part(tokens, mask, labels, **{argument: value})


def test_masks_are_needed_outside_training():
    with pytest.raises(ValueError, match="`mask` has to be given in eval mode"):
        tiny_model()(inputs()[0])


def test_a_list_of_generators_needs_the_number_of_masked_tokens():
    with pytest.raises(ValueError, match="`num_masked` has to be given with a list of generators"):
        tiny_model().train()(inputs()[0], generator=[seeded(1), seeded(2)])


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(2, 16), r"`mask` has to be bool of shape \(2, 16\), got torch.float32 \(2, 16\)"),
        (torch.ones(1, 16).bool(), r"`mask` has to be bool of shape \(2, 16\), got torch.bool \(1, 16\)"),
        (torch.arange(32).reshape(2, 16) < 5, r"as many tokens in every row, got \[5, 0\]"),
    ],
)
def test_wrong_masks(mask, message):
    tokens, _, labels = inputs()
    for model in (tiny_model(), tiny_model().model):
        with pytest.raises(ValueError, match=message):
            model(tokens, mask, labels)
