# SPDX-License-Identifier: Apache-2.0
"""The causal backbone with its head: what holds for every backbone, sizes, the sequence, the cache, no future."""

import pytest
import torch
from test_modeling_backbone import NULL, BackboneTests, count_head_parameters, count_layer_parameters, linear
from text_tests import FRESH_TEXT, TEXT_WEIGHTS, TextTests
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common import randomise, relative_error, seeded, tiny_model
from mar_hf import ARConfig, ARForImageGeneration, ARModel, TokenDDPMScheduler
from mar_hf.generation import GENERATION_ORDERS, sample_tokens_per_step
from mar_hf.models.configuration_ar import POSITION_TYPES
from mar_hf.models.modeling_ar import BLANK, CLASS, NOTHING, build_slots
from tiny_texts import TEXT


ONES = [1] * 16
# Steps that grow, shrink, stay, and do all of it.
SEVERAL = [[1, 2, 3, 4, 6], [6, 4, 3, 2, 1], [4, 4, 4, 4], [16], [3, 1, 5, 2, 5]]


class TestAR(BackboneTests):
    backbone = "ar"
    model_class = ARModel
    fields = ["condition"]
    other_weights = [
        "blank_token",
        "class_position_embedding",
        "condition_position_embedding",
        "position_embedding",
        "target_position_embedding",
    ]
    fresh_settings = {"max_tokens_per_step": 2}
    deeper = {"num_layers": 3}

    def inputs(self, batch=2, model=None):
        """Tokens, labels, orders."""
        tokens, labels, generator = self.basic_inputs(batch, model or tiny_model("ar"))
        orders = torch.rand(tokens.shape[:2], generator=generator).argsort(1)
        return {"tokens": tokens, "class_labels": labels, "orders": orders}

    def draw(self, generator, batch):
        return {"orders": torch.rand(batch, 16, generator=generator).argsort(1)}

    def layers(self, model):
        return model.model.layers


class TestARWithRotaryPositions(TestAR):
    """The same once more with the other kind of positions."""

    other_weights = ["class_position_embedding", "condition_position_embedding"]
    fresh_settings = {"position_type": "rotary"}
    deeper = {"num_layers": 3, "position_type": "rotary"}

    def tiny(self, **changes):
        return tiny_model("ar", position_type="rotary", **changes)


def several(count=16, **settings):
    """A model that may predict so many tokens at once."""
    return tiny_model("ar", max_tokens_per_step=count, **settings)


def sharp(**settings):
    """A model whose attention is far from even: then rotary positions, too, matter clearly."""
    return randomise(tiny_model("ar", **settings), gain=2.0)


def inputs(batch=2):
    """Tokens, orders, labels; the null class among them."""
    tokens = torch.randn(batch, 16, 12, generator=seeded(1))
    orders = torch.rand(batch, 16, generator=seeded(2)).argsort(1)
    return tokens, orders, torch.tensor([1, NULL, 0])[:batch]


def in_order(model, tokens, orders, labels=None, counts=None):
    """Conditions of all tokens, the first generated first."""
    condition = model(tokens, class_labels=labels, orders=orders, tokens_per_step=counts).condition
    return condition.gather(1, orders[..., None].expand_as(condition))


def decode(model, tokens, orders, labels, counts, cache=None):
    """The same, step by step; tokens that are not there yet are no numbers."""
    found, done = [], 0
    for step, count in enumerate(counts):
        missing = orders[:, done:, None].expand(-1, -1, tokens.shape[-1])
        known = tokens.scatter(1, missing, float("nan"))
        found.append(model.predict(known, orders, counts[: step + 1], labels, cache))
        assert found[-1].shape[1] == count
        done += count
    return torch.cat(found, 1)


def differing(found, expected):
    """Ranks whose conditions differ at all, and those that differ clearly, in every picture."""
    difference = (found - expected).abs().amax(-1)
    any_difference, clear = (difference > 0).any(0), (difference > 1e-5).all(0)
    return any_difference.nonzero()[:, 0].tolist(), clear.nonzero()[:, 0].tolist()


class TestARWithTexts(TextTests, TestAR):
    """And with texts."""

    other_weights = sorted([*TestAR.other_weights, *TEXT_WEIGHTS])
    fresh_settings = {**TestAR.fresh_settings, **FRESH_TEXT}
    deeper = {**TestAR.deeper, **TEXT}
    several = {"max_tokens_per_step": 16}


# Sizes


def count_parameters(config):
    """The model's parameters (every linear layer has a bias)."""
    d = config.hidden_size
    # Classes and their positions, tokens; own positions, those to be predicted, those of conditions.
    backbone = (config.num_classes + 1 + config.num_class_tokens) * d + linear(config.token_dim, d)
    backbone += (3 if config.position_type == "learned" else 1) * config.num_tokens * d
    backbone += d if config.max_tokens_per_step > 1 else 0
    return backbone + config.num_layers * count_layer_parameters(d) + 2 * 2 * d, count_head_parameters(config)


@pytest.mark.parametrize(
    "preset, millions, masked", [("base", 207.3, 207.9), ("large", 477.2, 478.3), ("huge", 940.7, 942.4)]
)
def test_presets_are_as_large_as_the_masked_ones(preset, millions, masked):
    with torch.device("meta"):
        model = ARForImageGeneration(ARConfig.preset(preset))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    backbone, head = (sum(p.numel() for p in part.parameters()) for part in (model.model, model.head))
    assert (backbone, head) == count_parameters(model.config)
    assert round((backbone + head) / 1e6, 1) == millions
    assert abs(millions / masked - 1) < 0.005


@pytest.mark.parametrize("position_type", POSITION_TYPES)
@pytest.mark.parametrize("limit", [1, 2])
def test_no_parameter_is_there_without_a_use(position_type, limit):
    model = tiny_model("ar", position_type=position_type, max_tokens_per_step=limit)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == sum(count_parameters(model.config))


# The sequence


@pytest.mark.parametrize(
    "counts, num_class_tokens, contents, targets, steps",
    [
        # One token a step: the class, then each token predicts the next.
        ([1, 1, 1], 2, [CLASS, CLASS, 0, 1], [NOTHING, 0, 1, 2], [-1, 0, 1, 2]),
        ([1], 1, [CLASS], [0], [0]),
        # Growing: one blank slot more in each step.
        ([1, 2, 3], 1, [CLASS, 0, BLANK, 1, 2, BLANK], [0, 1, 2, 3, 4, 5], [0, 1, 1, 2, 2, 2]),
        # Shrinking: all tokens of the step before are held, though fewer are asked for.
        ([3, 1, 1], 1, [CLASS, BLANK, BLANK, 0, 1, 2, 3], [0, 1, 2, 3, NOTHING, NOTHING, 4], [0, 0, 0, 1, 1, 1, 2]),
        ([2, 2], 2, [CLASS, CLASS, BLANK, 0, 1], [NOTHING, 0, 1, 2, 3], [-1, 0, 0, 1, 1]),
    ],
)
def test_slots(counts, num_class_tokens, contents, targets, steps):
    assert build_slots(counts, num_class_tokens) == (contents, targets, steps)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_class_tokens", [1, 3])
def test_every_token_is_predicted_once_from_the_step_before(seed, num_class_tokens):
    counts = sample_tokens_per_step(30, 1 + seed % 7, seeded(seed))
    step_of = [step for step, count in enumerate(counts) for _ in range(count)]
    contents, targets, steps = build_slots(counts, num_class_tokens)
    assert len(contents) == len(targets) == len(steps) and steps == sorted(steps)
    assert contents[:num_class_tokens] == [CLASS] * num_class_tokens and steps[num_class_tokens - 1] == 0
    assert [rank for rank in targets if rank != NOTHING] == list(range(30))
    # The last step's tokens are the only ones that nobody needs to see.
    assert [rank for rank in contents if rank >= 0] == list(range(30 - counts[-1]))
    for held, asked, step in zip(contents, targets, steps, strict=True):
        assert asked == NOTHING or step_of[asked] == step
        assert held < 0 or step_of[held] == step - 1
        assert not (held == BLANK and asked == NOTHING)
    # What is in a cache stays as it is when steps are added.
    for known in range(1, len(counts)):
        assert all(
            whole[: len(part)] == part
            for part, whole in zip(build_slots(counts[:known], num_class_tokens), (contents, targets, steps))
        )


# The cache


@torch.no_grad()
@pytest.mark.parametrize("position_type", POSITION_TYPES)
@pytest.mark.parametrize("order", GENERATION_ORDERS)
def test_decoding_is_the_same_with_and_without_the_cache_and_all_at_once(order, position_type):
    model = tiny_model("ar", order=order, position_type=position_type)
    for batch in (1, 3):
        tokens, _, labels = inputs(batch)
        orders = model.draw_orders(batch, seeded(4))
        expected = in_order(model, tokens, orders, labels)
        for cache in (None, model.make_cache(ONES)):
            assert relative_error(decode(model, tokens, orders, labels, ONES, cache), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("position_type", POSITION_TYPES)
@pytest.mark.parametrize("counts", [ONES, *SEVERAL], ids=lambda counts: "-".join(map(str, counts)))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_steps_and_either_cache_give_the_same(attention, counts, position_type):
    model = several(position_type=position_type)
    model.set_attn_implementation(attention)
    for batch in (1, 3):
        tokens, orders, labels = inputs(batch)
        expected = in_order(model, tokens, orders, labels, counts)
        for cache in (None, model.make_cache(counts), model.make_cache(counts, static=True)):
            assert relative_error(decode(model, tokens, orders, labels, counts, cache), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_step_computes_what_is_not_in_the_cache_and_no_more(static):
    model, counts, lengths = several(), [1, 2, 3, 4, 6], []
    tokens, orders, labels = inputs()
    model.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    cache = model.make_cache(counts, static)
    decode(model, tokens, orders, labels, counts, cache)
    # Two of the class; later steps hold the one before and blanks.
    assert lengths == [2, 2, 3, 4, 6]
    assert cache.get_seq_length() == sum(lengths) == len(build_slots(counts, 2)[0])
    assert type(cache).__name__ == ("StaticCache" if static else "DynamicCache")
    # Several steps at once, after two that are in the cache.
    cache = model.make_cache(counts, static)
    decode(model, tokens, orders, labels, counts[:2], cache)
    rest = model(tokens, class_labels=labels, orders=orders, tokens_per_step=counts, past_key_values=cache).condition
    assert relative_error(rest, in_order(model, tokens, orders, labels, counts)[:, 3:]) < 1e-5
    assert lengths[5:8] == [2, 2, 3 + 4 + 6]


@torch.no_grad()
def test_the_first_steps_do_not_depend_on_those_to_come():
    model, (tokens, orders, labels) = several(), inputs()
    expected = in_order(model, tokens, orders, labels, [3, 1, 5, 2, 5])
    found = model(tokens, class_labels=labels, orders=orders, tokens_per_step=[3, 1, 5]).condition
    assert found.shape == (2, 9, 32)
    assert relative_error(found, expected[:, :9]) < 1e-5


@torch.no_grad()
def test_half_precision_with_a_cache():
    model = several().to(torch.bfloat16)
    tokens, orders, labels = inputs(3)
    expected = in_order(several(), tokens, orders, labels, [3, 1, 5, 2, 5])
    for static in (False, True):
        cache = model.make_cache([3, 1, 5, 2, 5], static)
        found = decode(model, tokens, orders, labels, [3, 1, 5, 2, 5], cache)
        assert found.dtype == torch.bfloat16 and relative_error(found.float(), expected) < 0.05


# No future


@torch.no_grad()
@pytest.mark.parametrize("position_type", POSITION_TYPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_token_changes_later_conditions_only(attention, position_type):
    model, (tokens, orders, labels) = tiny_model("ar", position_type=position_type), inputs()
    model.set_attn_implementation(attention)
    expected = in_order(model, tokens, orders, labels)
    for rank in range(16):
        changed = tokens.clone()
        changed[[0, 1], orders[:, rank]] += 1
        any_difference, clear = differing(in_order(model, changed, orders, labels), expected)
        assert any_difference == clear == list(range(rank + 1, 16))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("counts", SEVERAL, ids=lambda counts: "-".join(map(str, counts)))
def test_with_several_tokens_a_step_a_token_changes_all_of_later_steps(counts, attention):
    # All slots of a step see each other: also the first of the next step sees the last of this one.
    model, (tokens, orders, labels) = several(), inputs()
    model.set_attn_implementation(attention)
    expected = in_order(model, tokens, orders, labels, counts)
    for step, count in enumerate(counts):
        first, end = sum(counts[:step]), sum(counts[: step + 1])
        for rank in {first, end - 1}:
            changed = tokens.clone()
            changed[[0, 1], orders[:, rank]] += 1
            any_difference, clear = differing(in_order(model, changed, orders, labels, counts), expected)
            assert any_difference == clear == list(range(end, 16)), (step, rank, count)


@torch.no_grad()
@pytest.mark.parametrize("position_type", POSITION_TYPES)
def test_the_first_condition_follows_from_the_class_alone(position_type):
    model, (tokens, orders, labels) = tiny_model("ar", position_type=position_type), inputs()
    first = in_order(model, tokens, orders, labels)[:, 0]
    other_order = torch.cat([orders[:, :1], orders[:, 1:].flip(1)], 1)
    for changed in (torch.zeros_like(tokens), 100 * tokens.flip(0, 1)):
        assert torch.equal(in_order(model, changed, orders, labels)[:, 0], first)
        assert torch.equal(in_order(model, changed, other_order, labels)[:, 0], first)
    for label in range(3):
        other = in_order(model, tokens, orders, (labels + 1 + label) % 4)[:, 0]
        assert ((other - first).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("position_type", POSITION_TYPES)
@pytest.mark.parametrize("rank", [0, 7])
def test_a_condition_depends_on_the_position_that_is_predicted(rank, position_type):
    model, (tokens, orders, labels) = sharp(position_type=position_type), inputs()
    other = orders.clone()
    other[:, [rank, rank + 1]] = orders[:, [rank + 1, rank]]
    # Without the embedding that the condition gets at the very end.
    model.model.condition_position_embedding.zero_()
    found, expected = in_order(model, tokens, other, labels), in_order(model, tokens, orders, labels)
    assert torch.equal(found[:, :rank], expected[:, :rank])
    assert ((found - expected)[:, rank].abs().amax(-1) > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("position_type", POSITION_TYPES)
def test_a_condition_depends_on_where_the_tokens_before_stand(position_type):
    model, (tokens, orders, labels) = sharp(position_type=position_type), inputs()
    # The same values one after the other, the same positions predicted from rank 2 on; the first two swapped places.
    other = orders.clone()
    other[:, [0, 1]] = orders[:, [1, 0]]
    rows = torch.arange(2)[:, None]
    values = tokens[rows, orders]
    swapped = torch.empty_like(tokens)
    swapped[rows, other] = values
    found, expected = in_order(model, swapped, other, labels), in_order(model, tokens, orders, labels)
    assert ((found - expected)[:, 2:].abs().amax(-1) > 1e-3).all()


# Positions


@torch.no_grad()
@pytest.mark.parametrize("counts", [ONES, [3, 1, 5, 2, 5]], ids=["one", "several"])
def test_a_slot_is_told_what_it_holds_and_which_position_comes(counts):
    model, (tokens, orders, labels) = several(), inputs()
    seen, part = [], model.model
    part.token_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    part(tokens, orders, counts, labels)
    contents, targets, _ = build_slots(counts, 2)
    for picture, order in enumerate(orders):
        for slot, (held, asked) in enumerate(zip(contents, targets)):
            if held == CLASS:
                expected = part.class_embedding.weight[labels[picture]] + part.class_position_embedding[0, slot]
            elif held == BLANK:
                expected = part.blank_token[0, 0]
            else:
                expected = part.token_proj(tokens[picture, order[held]]) + part.position_embedding[0, order[held]]
            if asked != NOTHING:
                expected = expected + part.target_position_embedding[0, order[asked]]
            torch.testing.assert_close(seen[0][picture, slot], expected)


@pytest.fixture
def attended():
    """What the attention was given in every layer: (module, query, key)."""
    seen = []

    def record(module, query, key, value, attention_mask, **kwargs):
        seen.append((module, query, key))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recording", record)
    yield seen
    del AttentionInterface._global_mapping["recording"]


@torch.no_grad()
@pytest.mark.parametrize("counts", [ONES, [3, 1, 5, 2, 5]], ids=["one", "several"])
def test_queries_turn_with_the_position_predicted_and_keys_with_their_own(attended, counts):
    model = several(position_type="rotary", grid_height=2, grid_width=8, rotary_base=50.0)
    model.set_attn_implementation("recording")
    tokens, orders, labels = inputs()
    normed = []
    model.model.layers[0].attention.register_forward_pre_hook(lambda module, args: normed.append(args[0]))
    model(tokens, class_labels=labels, orders=orders, tokens_per_step=counts)
    module, *found = attended[0]
    contents, targets, _ = build_slots(counts, 2)
    queries = [held if asked == NOTHING else asked for held, asked in zip(contents, targets)]
    keys = [asked if held == BLANK else held for held, asked in zip(contents, targets)]
    plain = module.qkv(normed[0]).unflatten(-1, (3, 2, 16)).unbind(2)[:2]
    for states, turned, ranks in zip(plain, found, (queries, keys)):
        for picture in range(2):
            for slot, rank in enumerate(ranks):
                row, column = (0, 0) if rank < 0 else (x + 1 for x in divmod(orders[picture, rank].item(), 8))
                speeds = 50.0 ** (-torch.arange(4) / 4)
                angles = torch.cat([row * speeds, column * speeds])
                first, second = states[picture, slot].chunk(2, -1)
                expected = torch.complex(first, second) * torch.polar(torch.ones(8), angles)
                assert relative_error(turned[picture, :, slot], torch.cat([expected.real, expected.imag], -1)) < 1e-5


@torch.no_grad()
def test_rotary_positions_tell_rows_from_columns():
    model, (tokens, _, labels) = sharp(position_type="rotary"), inputs()
    model.model.condition_position_embedding.zero_()
    rows = torch.arange(16).expand(2, -1)
    columns = rows.view(2, 4, 4).mT.flatten(1)
    values = torch.empty_like(tokens)
    values[torch.arange(2)[:, None], columns] = tokens
    found, expected = in_order(model, values, columns, labels), in_order(model, tokens, rows, labels)
    # The first token stands in the corner either way.
    assert relative_error(found[:, 0], expected[:, 0]) < 1e-6
    assert ((found - expected)[:, 1:].abs().amax(-1) > 1e-3).all()


# Training


def test_tokens_per_step_and_orders_are_drawn_in_training():
    model, (tokens, _, labels) = several(4, order="random").train(), inputs()
    model.config.attention_dropout = model.config.class_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    drawn = model(tokens, class_labels=labels, generator=seeded(5)).condition
    generator = seeded(5)
    counts = sample_tokens_per_step(16, 4, generator)
    orders = torch.rand(2, 16, generator=generator).argsort(1)
    assert max(counts) > 1
    expected = model.eval()(tokens, class_labels=labels, orders=orders, tokens_per_step=counts).condition
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("limit", [1, 3])
def test_what_a_batch_has_in_common_is_drawn_from_the_shared_generator(limit):
    model, shared = several(limit, order="random"), seeded(3)
    drawn = model.training_inputs(2, [seeded(1), seeded(2)], shared)
    generator = seeded(3)
    assert drawn["tokens_per_step"] == sample_tokens_per_step(16, limit, generator)
    assert torch.equal(shared.get_state(), generator.get_state())
    expected = torch.cat([torch.rand(1, 16, generator=seeded(seed)) for seed in (1, 2)]).argsort(1)
    assert torch.equal(drawn["orders"], expected)


@pytest.mark.parametrize("order", sorted(GENERATION_ORDERS.keys() - {"random"}))
def test_each_image_draws_the_configuration_s_order(order):
    model = tiny_model("ar", order=order)
    generator = seeded(1)
    expected = torch.stack([GENERATION_ORDERS[order](4, 4, generator) for _ in range(3)])
    assert torch.equal(model.training_inputs(3, seeded(1))["orders"], expected)
    own = torch.stack([GENERATION_ORDERS[order](4, 4, seeded(seed)) for seed in range(3)])
    assert torch.equal(model.training_inputs(3, [seeded(seed) for seed in range(3)])["orders"], own)
    # In eval mode too, where nothing else is drawn.
    tokens, _, labels = inputs(3)
    drawn = model(tokens, class_labels=labels, generator=seeded(1)).condition
    assert torch.equal(drawn, model(tokens, class_labels=labels, orders=expected).condition)


def test_orders_follow_the_progress_of_the_training():
    model, raster = tiny_model("ar", order="random_annealed"), torch.arange(16)

    def share_of_raster(progress):
        orders = model.training_inputs(200, seeded(1), progress=progress)["orders"]
        return (orders == raster).all(1).float().mean().item()

    assert [share_of_raster(progress) for progress in (0.0, 0.5, 0.75, 1.0)] == [0, 0, 1, 1]
    assert abs(share_of_raster(0.6875) - 0.75) < 4 * (0.75 * 0.25 / 200) ** 0.5
    assert model.sampling_defaults["generation_order"] == "random_annealed"


@torch.no_grad()
@pytest.mark.parametrize("counts", [None, [3, 1, 5, 2, 5]], ids=["one", "several"])
def test_tokens_that_do_not_count_come_first(counts):
    model, (tokens, orders, labels) = several(), inputs()
    mask = torch.rand(2, 16, generator=seeded(3)) < 0.6
    scheduler, arguments = TokenDDPMScheduler(), {"class_labels": labels, "tokens_per_step": counts}
    found = model(tokens, mask, orders=orders, noise_scheduler=scheduler, generator=seeded(4), **arguments)
    rows = [
        [p for p in row if not mask[i, p]] + [p for p in row if mask[i, p]] for i, row in enumerate(orders.tolist())
    ]
    expected = model(tokens, orders=torch.tensor(rows), **arguments).condition
    assert torch.equal(found.condition, expected)
    loss = model.head.loss(condition=expected, target=tokens, mask=mask, scheduler=scheduler, generator=seeded(4))
    assert torch.equal(found.loss, loss)


def test_gradients_and_autocast_with_several_tokens_a_step():
    model, (tokens, orders, labels) = several(), inputs()
    arguments = {"class_labels": labels, "orders": orders, "tokens_per_step": [3, 1, 5, 2, 5]}
    arguments |= {"noise_scheduler": TokenDDPMScheduler()}
    expected = model(tokens, generator=seeded(2), **arguments).loss
    expected.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            loss = model(tokens, generator=seeded(2), **arguments).loss
        assert loss.item() == pytest.approx(expected.item(), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("counts", [ONES, [3, 1, 5, 2, 5]], ids=["one", "several"])
def test_the_backbone_compiles_in_one_piece(counts):
    model, (tokens, orders, labels) = several().model, inputs()
    expected = model(tokens, orders, counts, labels).condition
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative_error(compiled(tokens, orders, counts, labels).condition, expected) < 1e-5


# Sampling


@pytest.mark.parametrize("limit, steps", [(1, 16), (3, 6), (16, 1)])
def test_a_pipeline_takes_as_many_steps_as_are_needed(limit, steps):
    assert several(limit, order="spiral").sampling_defaults == {
        "generation_order": "spiral",
        "num_inference_steps": steps,
        "token_schedule": "constant",
    }
    categorical = several(limit, head_type="categorical", head_config={"num_codes": 4})
    assert categorical.sampling_defaults["num_diffusion_steps"] == 1


# Errors


@pytest.mark.parametrize(
    "counts, message",
    [
        ([], r"positive numbers with a sum of at most 16, got \[\]"),
        ([1, 0, 2], r"positive numbers with a sum of at most 16, got \[1, 0, 2\]"),
        ([2] * 9, r"positive numbers with a sum of at most 16, got \[2, 2"),
        ([1, 3], r"at most 2 tokens a step \(`max_tokens_per_step`\), not 3: 16 tokens need at least 8 steps"),
    ],
)
def test_steps_that_cannot_be(counts, message):
    model, (tokens, orders, labels) = several(2), inputs()
    for wrong in (model, model.model):
        with pytest.raises(ValueError, match=message):
            wrong(tokens, class_labels=labels, orders=orders, tokens_per_step=counts)
    with pytest.raises(ValueError, match=message):
        model.check_tokens_per_step(counts)
    with pytest.raises(ValueError, match=message):
        model.predict(tokens, orders, counts, labels)


@pytest.mark.parametrize("shape", [(2, 15), (1, 16), (16,)], ids=str)
def test_orders_of_another_shape(shape):
    model, (tokens, _, labels) = tiny_model("ar"), inputs()
    for wrong in (model, model.model):
        with pytest.raises(ValueError, match=r"`orders` has to be of shape \(2, 16\), got \(\d+,"):
            wrong(tokens, class_labels=labels, orders=torch.zeros(shape, dtype=torch.int64))


def test_a_list_of_generators_needs_a_shared_one_for_several_tokens_a_step():
    generators, tokens = [seeded(1), seeded(2)], inputs()[0]
    with pytest.raises(ValueError, match="`tokens_per_step` has to be given with a list of generators"):
        several(2).training_inputs(2, generators)
    with pytest.raises(ValueError, match="`tokens_per_step` has to be given with a list of generators"):
        several(2).train()(tokens, generator=generators)
    several(2).train()(tokens, generator=generators, tokens_per_step=ONES)


def test_a_loss_needs_all_tokens():
    model, (tokens, orders, _) = several(), inputs()
    with pytest.raises(ValueError, match=r"`tokens_per_step` has to cover all tokens for a loss, got \[3, 1\]"):
        model(tokens, orders=orders, tokens_per_step=[3, 1], noise_scheduler=TokenDDPMScheduler())


def test_a_cache_that_holds_all_steps():
    model, (tokens, orders, labels) = tiny_model("ar"), inputs()
    cache = model.make_cache(ONES)
    model.predict(tokens, orders, [1, 1], labels, cache)
    with pytest.raises(ValueError, match=r"`past_key_values` has to leave a step of \[1, 1\] to compute"):
        model.predict(tokens, orders, [1, 1], labels, cache)


def test_flash_attention_takes_no_mask():
    model, (tokens, orders, _) = several(), inputs()
    # Whether the package is installed does not matter here: the mask comes first.
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask.*use \"sdpa\""):
        model(tokens, orders=orders, tokens_per_step=[3, 1])


def test_rotary_settings_reach_the_model():
    tokens, orders, labels = inputs()
    with torch.no_grad():
        small, large = (
            in_order(tiny_model("ar", position_type="rotary", rotary_base=base), tokens, orders, labels)
            for base in (10, 1000.0)
        )
    assert relative_error(small, large) > 1e-3


@pytest.mark.parametrize(
    "argument, values",
    [
        ("orders", [b"x", [[0]], torch.zeros(2, 16), torch.full((2, 16), 16), torch.full((2, 16), -1)]),
        ("tokens_per_step", [[8, 8.0], torch.ones(2, 3), ["x"], [True], 5]),
    ],
)
def test_what_says_the_order_is_checked(argument, values):
    model, tokens = tiny_model("ar", max_tokens_per_step=8), torch.zeros(2, 16, 12)
    for part in (model, model.model):
        for value in values:
            with pytest.raises(ValueError, match=f"`{argument}` has to"):
                part(tokens, **{"orders": torch.arange(16).expand(2, -1), argument: value})
