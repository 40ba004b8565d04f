# SPDX-License-Identifier: Apache-2.0
"""From words to what blocks attend to: states of text encoders, the aligner, what is kept of a call's texts."""

import pytest
import torch
from transformers import T5Config, T5Model

from common import LAYERS, MODELS, randomise, relative_error, seeded, tiny_config, tiny_model
from mar_hf.models import TextAligner, TextContext, check_text_encoder, encode_texts, load_text_encoder
from tiny_pipelines import tiny_text_pipeline
from tiny_texts import TEXT, TEXT_DIM, TEXT_ENCODERS, tiny_text_encoder, tiny_text_tokenizer


LIMIT = TEXT["num_text_tokens"]
# A text of full length, one of two tokens, one of one, and none.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
PROMPTS = ["a red heart", "cat", "", "two big clock on the green kitten"]


def make(**changes):
    """An aligner with random weights, in eval mode."""
    settings = {"attention_dropout": 0.0, "hidden_dropout": 0.0, **TEXT, **changes}
    config = tiny_config(**settings)
    config._attn_implementation = "sdpa"
    return randomise(TextAligner(config), gain=1.0)


def states(batch=4, length=5):
    return torch.randn(batch, length, TEXT_DIM, generator=seeded(1))


def aligned(aligner, prompt_embeds, mask):
    """The context, with zeros where nobody may look; that mask; and whether it is what is added to scores."""
    context, added = aligner(prompt_embeds, mask)
    seen = added[:, 0, 0] == 0
    assert added.shape == (len(context), 1, 1, context.shape[1]) and added.dtype == context.dtype
    assert (added[~seen[:, None, None]] == torch.finfo(added.dtype).min).all()
    return context.where(seen[..., None], 0), seen


# The aligner


@torch.no_grad()
def test_shapes_and_what_may_be_seen():
    context, seen = aligned(make(), states(), MASK)
    assert context.shape == (4, 5, 32) and context.isfinite().all()
    expected = MASK.clone()
    expected[3, 0] = True  # the null text is one token
    assert torch.equal(seen, expected)


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_it_is_a_projection_positions_blocks_and_a_norm(layers):
    aligner, embeds = make(text_aligner_layers=layers), states()
    assert len(aligner.layers) == layers
    found, _ = aligned(aligner, embeds, MASK)
    for row, length in enumerate([5, 2, 1]):
        hidden_states = aligner.proj_norm(aligner.proj(embeds[row : row + 1, :length]))
        hidden_states = hidden_states + aligner.position_embedding[:, :length]
        for layer in aligner.layers:
            hidden_states = layer(hidden_states)
        assert relative_error(found[row : row + 1, :length], aligner.norm(hidden_states)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("filling", [1e4, float("inf"), float("nan")])
def test_padding_is_not_read(filling):
    aligner, embeds = make(), states()
    expected, _ = aligned(aligner, embeds, MASK)
    found, _ = aligned(aligner, embeds.where(MASK[..., None], filling), MASK)
    assert torch.equal(found, expected)


def test_padding_that_is_no_number_gives_gradients_that_are():
    aligner, embeds = make(), states()
    expected, _ = aligned(aligner, embeds, MASK)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in aligner.parameters()]
    aligner.zero_grad()
    aligned(aligner, embeds.where(MASK[..., None], float("nan")), MASK)[0].square().sum().backward()
    assert all(torch.equal(a, parameter.grad) for a, parameter in zip(gradients, aligner.parameters(), strict=True))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@torch.no_grad()
def test_it_does_not_matter_where_the_padding_is():
    aligner, text = make(), states(1, 3)
    expected, _ = aligner(text, torch.ones(1, 3).bool())
    for before, after in ((0, 4), (4, 0), (2, 3)):
        embeds = torch.nn.functional.pad(text, (0, 0, before, after), value=7.0)
        mask = torch.nn.functional.pad(torch.ones(1, 3), (before, after)).bool()
        context, added = aligner(embeds, mask)
        assert relative_error(context[:, before : before + 3], expected) < 1e-5
        assert torch.equal(added[:, 0, 0] == 0, mask)


@torch.no_grad()
def test_a_text_does_not_depend_on_the_others():
    aligner, embeds = make(), states()
    together, _ = aligned(aligner, embeds, MASK)
    for row, length in enumerate([5, 2, 1]):
        alone, _ = aligner(embeds[row : row + 1, :length], torch.ones(1, length).bool())
        assert relative_error(together[row : row + 1, :length], alone) < 1e-5
    null, _ = aligner(embeds[3:, :1], MASK[3:, :1])
    assert relative_error(together[3:, :1], null) < 1e-5


@torch.no_grad()
def test_a_row_without_tokens_is_the_null_text_whatever_its_states():
    aligner, embeds = make(), states(3)
    embeds[1], embeds[2] = float("nan"), 1e6
    context, seen = aligned(aligner, embeds, torch.zeros(3, 5).bool())
    assert seen.tolist() == [[True, False, False, False, False]] * 3
    assert torch.equal(context[1], context[0]) and torch.equal(context[2], context[0])
    # It is a token like any other, in the first place.
    token, _ = aligned(aligner, aligner.null_text, torch.ones(1, 1).bool())
    assert relative_error(context[:1, :1], token) < 1e-6
    text, _ = aligned(aligner, states(), torch.ones(4, 5).bool())
    aligner.null_text += 1
    assert ((aligned(aligner, embeds, torch.zeros(3, 5).bool())[0] - context)[:, 0].abs().amax(-1) > 1e-3).all()
    assert torch.equal(aligned(aligner, states(), torch.ones(4, 5).bool())[0], text)


@torch.no_grad()
def test_every_place_has_a_position_of_its_own_up_to_the_longest_text():
    aligner, same = make(text_aligner_layers=0), states(1, 1).expand(1, LIMIT, -1)
    context, _ = aligner(same, torch.ones(1, LIMIT).bool())
    distances = torch.cdist(context[0], context[0]) + torch.eye(LIMIT)
    assert distances.min() > 0.1
    aligner.position_embedding[:, -1] += torch.randn(32, generator=seeded(2))
    changed, _ = aligner(same, torch.ones(1, LIMIT).bool())
    assert (changed - context).abs().amax((0, 2)).nonzero().tolist() == [[LIMIT - 1]]


@torch.no_grad()
def test_tokens_see_all_others_of_their_text():
    aligner, embeds = make(), states()
    expected, seen = aligned(aligner, embeds, MASK)
    for place in (0, 1, 4):
        changed = embeds.clone()
        changed[:, place] += 1
        difference = (aligned(aligner, changed, MASK)[0] - expected).abs().amax(-1)
        touched = (MASK[:, place, None] & MASK).expand(4, 5)
        assert torch.equal(difference > 1e-4, touched) and (difference[~touched] == 0).all()


@torch.no_grad()
def test_fresh_null_text_and_positions_have_the_backbone_s_deviation():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"text_dim": 4096, "num_text_tokens": 128, "initializer_range": 0.05}
        aligner = MODELS["mar"](tiny_config(**settings)).model.text_aligner
    for parameter in (aligner.null_text, aligner.position_embedding):
        assert abs(parameter.std() / 0.05 - 1) < 0.05 and abs(parameter.mean()) < 0.05 * 4 / 64


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_of_another_dtype(dtype):
    expected, _ = aligned(make(), states(), MASK)
    half, _ = aligned(make().to(dtype), states(), MASK)
    assert half.dtype == dtype and relative_error(half.float(), expected) < 0.05
    full, _ = aligned(make(), states().to(dtype), MASK)
    assert full.dtype == torch.float32 and relative_error(full, expected) < 0.02


@torch.no_grad()
def test_aligner_dropout_is_for_training_only():
    aligner = make(hidden_dropout=0.5)
    expected, _ = aligned(aligner, states(), MASK)
    assert torch.equal(aligned(make(), states(), MASK)[0], expected)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert relative_error(aligned(aligner.train(), states(), MASK)[0], expected) > 1e-2


# What is kept of a call


def inputs(backbone, batch=4):
    """What a model needs beside texts."""
    generator = seeded(3)
    given = {"tokens": torch.randn(batch, 16, 12, generator=generator), "class_labels": torch.arange(batch) % 3}
    if backbone == "mar":
        return {**given, "mask": torch.arange(16).expand(batch, -1) >= 6}
    return {**given, "orders": torch.rand(batch, 16, generator=generator).argsort(1)}


@torch.no_grad()
@pytest.mark.parametrize("backbone", MODELS)
def test_texts_are_read_once_for_all_forwards(backbone):
    model, context, calls = tiny_model(backbone, **TEXT), TextContext(states(), MASK), []
    blocks = [module for module in model.modules() if hasattr(module, "context_attention")]
    assert len(blocks) == sum(LAYERS[backbone].values())
    model.model.text_aligner.register_forward_hook(lambda *_: calls.append("aligner"))
    for number, block in enumerate(blocks):
        block.context_attention.key_value.register_forward_hook(lambda *_, number=number: calls.append(number))
    given = inputs(backbone)
    first, second = (model(**given, text_context=context).condition for _ in range(2))
    assert calls == ["aligner", *range(len(blocks))]
    texts = {"prompt_embeds": states(), "prompt_attention_mask": MASK}
    assert torch.equal(first, second) and torch.equal(first, model(**given, **texts).condition)
    assert len(calls) == 2 * (1 + len(blocks))  # without a context they are read anew


@torch.no_grad()
@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("backbone", MODELS)
@pytest.mark.parametrize(
    ("lengths", "left"), [((5, 0, 3), 3), ((5, 0, 1), 1), ((0, 5, 0), 2), ((0, 0, 0), 1), ((1, 1, 2), 3)]
)
def test_null_texts_at_the_end_are_read_and_no_more(backbone, absorb, lengths, left):
    model, given = tiny_model(backbone, **TEXT), inputs(backbone, len(lengths))
    embeds = states(len(lengths))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    context = TextContext(embeds, mask, sampling=True, absorb=absorb)
    found = model(**given, text_context=context).condition
    expected = model(**given, text_context=TextContext(embeds, mask)).condition
    assert relative_error(found, expected) < 1e-5
    blocks = [module for module in model.modules() if hasattr(module, "context_attention")]
    read = context.read_by(model.model.text_aligner, blocks)
    assert [len(key) for key, *_ in read] == [left] * len(blocks)


@torch.no_grad()
def test_masks_of_texts_may_be_numbers():
    model, given = tiny_model(**TEXT), inputs("mar")
    expected = model(**given, text_context=TextContext(states(), MASK)).condition
    for dtype in (torch.int64, torch.float32):
        assert torch.equal(model(**given, text_context=TextContext(states(), MASK.to(dtype))).condition, expected)


@pytest.mark.parametrize("backbone", MODELS)
def test_gradients_reach_everything_that_reads_texts(backbone):
    given = inputs(backbone)

    def gradients(mask):
        model = tiny_model(backbone, **TEXT)
        model(**given, text_context=TextContext(states(), mask)).condition.square().sum().backward()
        return {name: p.grad for name, p in model.model.named_parameters() if "text" in name}  # also con-text

    found = gradients(MASK)
    assert {"text_aligner.null_text", "text_aligner.position_embedding", "text_aligner.layers.0.mlp.fc1.weight"} < {
        *found
    }
    assert sum("context_attention.query" in name for name in found) == 2 * sum(LAYERS[backbone].values())
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    # Where every picture has a text, the null text is not part of it; nor are places beyond the longest.
    found = gradients(torch.ones(4, 5).bool())
    assert found.pop("text_aligner.null_text").abs().max() == 0
    positions = found["text_aligner.position_embedding"].abs().amax((0, 2))
    assert (positions[:5] > 0).all() and (positions[5:] == 0).all()
    assert all(gradient.abs().max() > 0 for gradient in found.values())


# Text encoders


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_states_are_the_text_encoder_s(kind):
    encoder, tokenizer = tiny_text_encoder(kind), tiny_text_tokenizer(kind)
    embeds, mask = encode_texts(["a red heart", "cat", " \n", "on"], encoder, tokenizer, LIMIT)
    assert embeds.shape == (*mask.shape, TEXT_DIM) and not embeds.requires_grad and mask.dtype == torch.bool
    for row, text in enumerate(["a red heart", "cat", None, "on"]):
        if text is None:
            assert not mask[row].any()
            continue
        ids = torch.tensor([tokenizer(text).input_ids])
        assert mask[row].sum() == ids.shape[1]
        with torch.no_grad():
            expected = encoder(ids).last_hidden_state[0]
        assert relative_error(embeds[row][mask[row]], expected) < 1e-5
    assert relative_error(embeds[1, 1], embeds[3, 1]) > 1e-3


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_long_texts_are_cut_before_the_text_encoder_s_positions_end(kind):
    encoder, tokenizer, long = tiny_text_encoder(kind), tiny_text_tokenizer(kind), "a big cat and " * 9
    embeds, mask = encode_texts([long], encoder, tokenizer, LIMIT)
    expected = min(LIMIT, TEXT_ENCODERS[kind])
    assert embeds.shape == (1, expected, TEXT_DIM) and mask.all()
    assert encode_texts([long], encoder, tokenizer, 5)[0].shape == (1, 5, TEXT_DIM)


def test_encoding_draws_nothing():
    encoder, tokenizer, before = tiny_text_encoder(), tiny_text_tokenizer(), torch.get_rng_state()
    first, again = (encode_texts(PROMPTS, encoder, tokenizer, LIMIT)[0] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)


def assert_loaded(source, kind):
    encoder, tokenizer = load_text_encoder(source)
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    expected = encode_texts(PROMPTS, tiny_text_encoder(kind), tiny_text_tokenizer(kind), LIMIT)
    assert all(torch.equal(*pair) for pair in zip(encode_texts(PROMPTS, encoder, tokenizer, LIMIT), expected))
    check_text_encoder(encoder, TEXT_DIM)


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_text_encoders_load_from_folders_of_their_own_and_of_pipelines(kind, tmp_path):
    for part in (tiny_text_encoder(kind), tiny_text_tokenizer(kind)):
        part.save_pretrained(tmp_path / "alone")
    assert_loaded(str(tmp_path / "alone"), kind)
    tiny_text_pipeline(kind).save_pretrained(tmp_path / "pipeline")
    assert_loaded(str(tmp_path / "pipeline"), kind)


def test_text_encoders_load_from_the_hub(hub):
    for part in (tiny_text_encoder(), tiny_text_tokenizer()):
        part.push_to_hub("org/encoder")
    assert_loaded("org/encoder", "t5")
    tiny_text_pipeline().push_to_hub("org/pipeline")
    assert_loaded("org/pipeline", "t5")


def whole_t5():
    """An encoder with a decoder, whose encoder is the tiny one."""
    config = T5Config(**{**tiny_text_encoder().config.to_dict(), "is_encoder_decoder": True, "use_cache": True})
    model = T5Model(config)
    model.encoder.load_state_dict(tiny_text_encoder().encoder.state_dict())
    return model.eval()


def test_of_a_model_with_a_decoder_its_encoder_is_loaded(tmp_path):
    for part in (whole_t5(), tiny_text_tokenizer()):
        part.save_pretrained(tmp_path)
    assert_loaded(str(tmp_path), "t5")


def test_text_encoders_that_do_not_fit():
    check_text_encoder(tiny_text_encoder(), TEXT_DIM)
    with pytest.raises(ValueError, match="`text_encoder` gives states of 16 numbers, but `transformer` takes 24"):
        check_text_encoder(tiny_text_encoder(), 24)
    with pytest.raises(ValueError, match="`text_encoder` has to be an encoder alone, not T5Model"):
        check_text_encoder(whole_t5(), TEXT_DIM)
