# SPDX-License-Identifier: Apache-2.0
"""Pictures of texts: what a prompt may be, the null text, guidance away from another text, long and odd texts."""

import inspect
import logging
import math

import pytest
import torch
from test_pipeline_mar import COSINE, by_hand, draw, rows_of_forwards
from test_pipeline_mar_errors import refuse
from transformers import T5Config, T5Model

from mar_hf import MARPipeline
from mar_hf.models import encode_texts
from tiny_pipelines import NAMES, seeds, tiny_pipeline, tiny_text_pipeline, tiny_transformer
from tiny_texts import TEXT, TEXT_DIM, TEXT_ENCODERS, tiny_text_encoder, tiny_text_tokenizer


LIMIT = TEXT["num_text_tokens"]
MIXED = ["a red heart", "cat", "", "two big blue clock with a kitten on the small green heart"]
# What is left of the tokenizer's own.
WORDS = {"t5": LIMIT - 1, "clip": TEXT_ENCODERS["clip"] - 2, "bert": TEXT_ENCODERS["bert"] - 2}


@pytest.fixture(params=["mar", "ar"])
def pipe(request):
    """A pipeline of texts and classes with either backbone."""
    return tiny_text_pipeline(backbone=request.param)


@pytest.fixture(params=TEXT_ENCODERS)
def each(request):
    """A pipeline with each of the text encoders, which is its attribute `kind`."""
    pipe = tiny_text_pipeline(request.param)
    pipe.kind = request.param
    return pipe


@pytest.fixture
def refused(request):
    """`refuse`, with a pipeline of texts and no class."""
    pipe = tiny_text_pipeline()

    def refused(fragments, **kwargs):
        refuse(pipe, fragments, **{"class_labels": None, **kwargs})

    refused.pipe = pipe
    return refused


@pytest.fixture
def warned(caplog):
    """The warnings of prompts so far."""
    caplog.set_level(logging.WARNING, logger="mar_hf.pipelines.prompts")
    return lambda: [record.message for record in caplog.records]


def latents(pipe, prompt=None, **kwargs):
    return pipe(prompt=prompt, output_type="latent", **kwargs).images


def differ(one, other):
    """Whether each picture is clearly another."""
    return bool(((one - other).abs().flatten(1).amax(1) > 0.1).all())


def states(pipe, texts):
    """What the pipeline's text encoder says of them, as the transformer takes it."""
    names = ("prompt_embeds", "prompt_attention_mask")
    return dict(zip(names, encode_texts(texts, pipe.text_encoder, pipe.tokenizer, LIMIT)))


def calls_of(module):
    """A list that will hold the batch size of every call of a module."""
    calls = []

    def count(module, args, kwargs):
        calls.append(len(next(iter([*args, *kwargs.values()]))))

    module.register_forward_pre_hook(count, with_kwargs=True)
    return calls


# What a prompt may be


def test_ways_to_give_a_text(each):
    expected = latents(each, "a red heart", generator=seeds(0))
    assert expected.shape == (1, 3, 8, 8)
    for prompt in (["a red heart"], ("a red heart",)):
        assert torch.equal(latents(each, prompt, generator=seeds(0)), expected)
    assert torch.equal(latents(each, **states(each, ["a red heart"]), generator=seeds(0)), expected)
    assert torch.equal(each(None, "a red heart", output_type="latent", generator=seeds(0)).images, expected)
    for other in ("a red cat", "red a heart", "a", ""):
        assert differ(latents(each, other, generator=seeds(0)), expected)
    assert list(inspect.signature(MARPipeline.__call__).parameters)[1:3] == ["class_labels", "prompt"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_texts_of_all_lengths_in_a_batch(each, guidance_scale):
    together = latents(each, MIXED, generator=seeds(0, 1, 2, 3), guidance_scale=guidance_scale)
    for row, text in enumerate(MIXED):
        alone = latents(each, text, generator=seeds(row), guidance_scale=guidance_scale)
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=2e-5)


def test_a_picture_of_a_text_follows_its_own_generator_whatever_its_batch(pipe):
    together = latents(pipe, MIXED, generator=seeds(0, 1, 2, 3))
    for chosen in ([3, 1], [0], [2, 3, 0]):
        some = latents(pipe, [MIXED[row] for row in chosen], generator=seeds(*chosen))
        torch.testing.assert_close(some, together[chosen], rtol=1e-5, atol=2e-5)
    assert differ(latents(pipe, MIXED[:1], generator=seeds(1)), together[:1])


def test_several_pictures_of_a_text(pipe):
    found = latents(pipe, ["cat", "clock"], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    assert torch.equal(found, latents(pipe, ["cat", "cat", "clock", "clock"], generator=seeds(0, 1, 2, 3)))
    given = {**states(pipe, ["cat", "clock"]), "num_images_per_prompt": 2}
    assert torch.equal(latents(pipe, **given, generator=seeds(0, 1, 2, 3)), found)
    assert differ(found[:1], found[1:2])


def test_states_without_a_mask_are_all_tokens(pipe):
    embeds = torch.randn(2, 3, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    found = latents(pipe, prompt_embeds=embeds, generator=seeds(0, 1))
    for mask in (torch.ones(2, 3), torch.ones(2, 3).long(), torch.ones(2, 3).bool()):
        given = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        assert torch.equal(latents(pipe, **given, generator=seeds(0, 1)), found)
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 2), value=math.nan)
    given = {"prompt_embeds": padded, "prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 2)}
    torch.testing.assert_close(latents(pipe, **given, generator=seeds(0, 1)), found, rtol=1e-5, atol=2e-5)


def test_only_the_generator_decides(pipe):
    before = torch.get_rng_state()
    first, again = (latents(pipe, MIXED, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    latents(pipe, "cat")
    assert torch.equal(torch.get_rng_state(), before)


# The null text


@pytest.mark.parametrize("nothing", ["", " ", "\n\t ", [""]], ids=repr)
def test_an_empty_prompt_is_no_prompt_is_the_null_text(pipe, nothing):
    settings = {"guidance_scale": 1.0}
    expected = latents(pipe, None, generator=seeds(0), **settings)
    assert torch.equal(latents(pipe, nothing, generator=seeds(0), **settings), expected)
    for length in (1, 4):
        nan = torch.full((1, length, TEXT_DIM), math.nan)
        null = {"prompt_embeds": nan, "prompt_attention_mask": torch.zeros(1, length)}
        found = latents(pipe, **null, generator=seeds(0), **settings)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    # Guided away from itself it stays what it is.
    found = latents(pipe, nothing, generator=seeds(0), guidance_scale=5.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert differ(latents(pipe, "a", generator=seeds(0), **settings), expected)


def test_the_null_text_of_sampling_is_the_one_of_training(pipe):
    orders, noise = draw(torch.Generator().manual_seed(0))
    found = latents(pipe, "", generation_order=orders, noise=noise, guidance_scale=1.0)
    # The loop by hand tells the backbone of no text, as training does.
    torch.testing.assert_close(found, by_hand(pipe, None, orders, noise, COSINE), rtol=1e-5, atol=2e-5)
    # In a row of its own batch in training mode: dropped with probability 1.
    embeds, mask, null_embeds, null_mask = pipe.encode_prompt("a red heart")
    assert mask.any() and not null_mask.any() and null_embeds.shape[1] == 1
    aligner = pipe.transformer.model.text_aligner
    with torch.no_grad():
        dropped, _ = aligner(embeds, torch.zeros_like(mask))
        null, _ = aligner(null_embeds, null_mask)
        aligner.null_text += 1
    torch.testing.assert_close(dropped[:, 0], null[:, 0], rtol=1e-6, atol=1e-6)
    # And it is a weight.
    assert differ(latents(pipe, "", generation_order=orders, noise=noise, guidance_scale=1.0), found)


def test_classes_alone_come_with_the_null_text(pipe):
    found = pipe(["heart", "clock"], generator=seeds(0, 1), output_type="latent").images
    given = {"class_labels": [0, 2], "prompt": ["", ""]}
    assert torch.equal(latents(pipe, **given, generator=seeds(0, 1)), found)
    assert differ(latents(pipe, "cat", class_labels="heart", generator=seeds(0)), found[:1])


# Guidance


def test_without_guidance_it_is_the_loop_by_hand(pipe):
    orders, noise = draw(torch.Generator().manual_seed(0), batch=2)
    expected = by_hand(pipe, None, orders, noise, COSINE, texts=states(pipe, MIXED[:2]))
    rows = rows_of_forwards(pipe)
    found = latents(pipe, MIXED[:2], generation_order=orders, noise=noise, guidance_scale=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert rows == [2, 2, 2]


@pytest.mark.parametrize("labels", [None, [2, 0]], ids=["texts", "texts and classes"])
@pytest.mark.parametrize("negative", [None, "", "big blue cat", ["a", "cat and kitten on a clock"]], ids=str)
def test_guidance_leads_away_from_the_negative_prompt(pipe, negative, labels):
    orders, noise = draw(torch.Generator().manual_seed(0), batch=2)
    settings = {"generation_order": orders, "noise": noise, "guidance_scale": 3.0}
    texts = [negative] * 2 if isinstance(negative, str) else negative
    others = None if negative in (None, "") else states(pipe, texts)
    numbers = None if labels is None else torch.tensor(labels)
    # Away from no class, and from the null text where nothing else is said.
    given = {"texts": states(pipe, MIXED[:2]), "negative": others}
    expected = by_hand(pipe, numbers, orders, noise, COSINE, [3.0] * 3, **given)
    rows = rows_of_forwards(pipe)
    found = latents(pipe, MIXED[:2], negative_prompt=negative, class_labels=labels, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    assert rows == [4, 4, 4]
    if others is not None:
        renamed = {f"negative_{name}": value for name, value in others.items()}
        assert torch.equal(latents(pipe, MIXED[:2], class_labels=labels, **renamed, **settings), found)
        assert differ(found, latents(pipe, MIXED[:2], class_labels=labels, **settings))
    # Without guidance nothing leads anywhere.
    settings["guidance_scale"] = 1.0
    plain = latents(pipe, MIXED[:2], class_labels=labels, **settings)
    assert torch.equal(latents(pipe, MIXED[:2], negative_prompt=negative, class_labels=labels, **settings), plain)


def test_each_picture_of_a_text_is_led_away_from_its_own_negative_prompt(pipe):
    prompts, negatives = ["cat", "clock"], ["a red heart", "big kitten"]
    settings = {"num_images_per_prompt": 2, "generator": seeds(0, 1, 2, 3)}
    found = latents(pipe, prompts, negative_prompt=negatives, **settings)
    for row, (text, other) in enumerate(((p, n) for p, n in zip(prompts, negatives) for _ in range(2))):
        alone = latents(pipe, text, negative_prompt=other, generator=seeds(row))
        torch.testing.assert_close(alone[0], found[row], rtol=1e-5, atol=5e-5)


def test_guidance_is_constant_by_default_and_linear_on_demand(pipe):
    assert pipe.generation_defaults["guidance_schedule"] == "constant"
    orders, noise = draw(torch.Generator().manual_seed(0))
    settings = {"generation_order": orders, "noise": noise, "guidance_scale": 3.0}
    scales = [1 + 2 * done / 16 for done in (3, 8, 15)]
    texts = states(pipe, ["cat"])
    for schedule, expected_scales in ((None, [3.0] * 3), ("linear", scales)):
        expected = by_hand(pipe, None, orders, noise, COSINE, expected_scales, texts=texts)
        found = latents(pipe, "cat", guidance_schedule=schedule, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    saved = {**pipe.config.generation_defaults, "guidance_schedule": "linear"}
    linear = tiny_pipeline(transformer=pipe.transformer, generation_defaults=saved)
    assert linear.generation_defaults["guidance_schedule"] == "linear"
    assert tiny_pipeline().generation_defaults["guidance_schedule"] == "linear"  # of classes


@pytest.mark.parametrize("before, after", [(2.0, 5.0), (2.0, 1.0), (1.0, 5.0)], ids=["up", "off", "on"])
def test_a_callback_changes_guidance_on_the_way(pipe, before, after):
    def callback(pipe, step, done, tensors):
        pipe._guidance_scale = after

    orders, noise = draw(torch.Generator().manual_seed(0), batch=2)
    texts, negative = states(pipe, ["a red heart", "cat"]), states(pipe, ["big clock", "big clock"])
    scales = [before, after, after]
    expected = by_hand(pipe, None, orders, noise, COSINE, scales, texts=texts, negative=negative)
    settings = {"generation_order": orders, "noise": noise, "negative_prompt": "big clock"}
    rows = rows_of_forwards(pipe)
    prompts = ["a red heart", "cat"]
    found = latents(pipe, prompts, guidance_scale=before, callback_on_step_end=callback, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    assert rows == [2 if scale == 1.0 else 4 for scale in scales]


def test_a_callback_replaces_the_latents_of_a_text(pipe):
    orders, noise = draw(torch.Generator().manual_seed(0))
    expected = by_hand(
        *(pipe, None, orders, noise, COSINE, [3.0] * 3),
        after=lambda step, tokens: tokens * (step != 0),
        texts=states(pipe, ["cat"]),
    )

    def blank(pipe, step, done, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 0 else {}

    settings = {"generation_order": orders, "noise": noise, "guidance_scale": 3.0}
    found = latents(pipe, "cat", callback_on_step_end=blank, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


# Classes and texts


def test_a_class_and_a_text_together(pipe):
    settings = {"generator": seeds(0, 1)}
    found = latents(pipe, ["a red heart", "cat"], class_labels=1, **settings)
    for labels in ([1], [1, 1], "cat", ["kitten", 1], torch.tensor([1, 1])):
        settings["generator"] = seeds(0, 1)
        assert torch.equal(latents(pipe, ["a red heart", "cat"], class_labels=labels, **settings), found)
    for other in ({"class_labels": 0}, {"class_labels": None}, {"prompt": ["cat", "a red heart"], "class_labels": 1}):
        given = {"prompt": ["a red heart", "cat"], **other}
        assert differ(latents(pipe, **given, generator=seeds(0, 1)), found)
    many = latents(pipe, ["cat", "a"], class_labels=[0, 2], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3))
    for row, (text, label) in enumerate([("cat", 0), ("cat", 0), ("a", 2), ("a", 2)]):
        alone = latents(pipe, text, class_labels=label, generator=seeds(row))
        torch.testing.assert_close(alone[0], many[row], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_a_model_of_texts_alone(backbone):
    pipe = tiny_text_pipeline(backbone=backbone, config={"num_classes": 0}, id2label=None)
    orders, noise = draw(torch.Generator().manual_seed(0), batch=2)
    texts = states(pipe, MIXED[:2])
    expected = by_hand(pipe, None, orders, noise, COSINE, [3.0] * 3, texts=texts)
    found = latents(pipe, MIXED[:2], generation_order=orders, noise=noise, guidance_scale=3.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    assert pipe.labels == {}
    for label in (0, "heart", [0]):
        got = "'heart'" if label == "heart" else "0"
        refuse(pipe, ["`class_labels` has to be None", "knows no classes", f"got {got}"], class_labels=label)
        refuse(pipe, ["`class_labels` has to be None"], class_labels=label, prompt="cat")


# How often texts are read


@pytest.mark.parametrize("steps", [1, 6])
def test_the_text_encoder_runs_once_whatever_the_number_of_steps(pipe, steps):
    encoder, aligner = calls_of(pipe.text_encoder), calls_of(pipe.transformer.model.text_aligner)
    for scale, rows in ((1.0, 8), (3.0, 16)):
        settings = {"num_inference_steps": steps, "guidance_scale": scale, "num_images_per_prompt": 2}
        latents(pipe, MIXED, **settings)
        assert (encoder, aligner) == ([4], [rows])
        encoder.clear(), aligner.clear()
    latents(pipe, MIXED, negative_prompt="a big cat", num_inference_steps=steps, guidance_scale=3.0)
    assert len(encoder) == 2 and aligner == [8]


def test_where_there_are_no_words_the_text_encoder_does_not_run(pipe):
    calls = calls_of(pipe.text_encoder)
    for nothing in ({"prompt": ""}, {"prompt": ["", " "]}, {"prompt": None}, {"class_labels": [1, 2]}):
        pipe(**nothing)
    pipe(**{name: value.clone() for name, value in states(pipe, ["cat"]).items()})
    assert calls == [1]  # the states'


# Long and odd texts


def long_text(kind, words):
    """A text of so many tokens besides the special ones."""
    if kind == "clip":
        return "z" * words
    return " ".join(["cat", "red", "clock", "a", "big"][number % 5] for number in range(words))


def test_a_text_of_one_token(each):
    text = {"t5": "cat", "clip": "c", "bert": "cat"}[each.kind]
    assert len(each.tokenizer(text, add_special_tokens=False).input_ids) == 1
    found = latents(each, text, generator=seeds(0))
    assert found.isfinite().all() and differ(found, latents(each, "", generator=seeds(0)))


def test_long_texts_are_cut_with_a_warning_that_names_what_is_lost(each, warned):
    room = WORDS[each.kind]
    fits = long_text(each.kind, room)
    expected = latents(each, fits, generator=seeds(0))
    assert warned() == []
    limit = min(LIMIT, TEXT_ENCODERS[each.kind])
    for lost in ("y", "yyy") if each.kind == "clip" else ("green", "green heart on"):
        given = fits + ("" if each.kind == "clip" else " ") + lost
        found = latents(each, ["cat", given], generator=seeds(1, 0))[1:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        message = f"`prompt` {given[:40]!r} has more than {limit} tokens; this was cut off: {lost!r}."
        assert warned()[-1] == message  # of this text alone
        assert torch.equal(latents(each, given, generator=seeds(0)), expected)
    assert len(warned()) == 4


def test_negative_prompts_are_cut_with_a_warning_too(each, warned):
    given = long_text(each.kind, 40)
    found = latents(each, "cat", negative_prompt=given, generator=seeds(0))
    assert found.isfinite().all()
    (message,) = warned()
    assert message.startswith("`negative_prompt` ")


def test_a_call_may_cut_texts_earlier(each, warned):
    special = {"t5": 1, "clip": 2, "bert": 2}[each.kind]
    text, kept = ("catalog", "cat") if each.kind == "clip" else ("a red heart on a clock", "a red heart")
    found = latents(each, text, max_sequence_length=3 + special, generator=seeds(0))
    (message,) = warned()
    assert f"more than {3 + special} tokens" in message
    assert torch.equal(found, latents(each, kept, generator=seeds(0)))
    assert differ(found, latents(each, text, generator=seeds(0)))
    assert len(warned()) == 1
    refuse(each, ["`max_sequence_length`", f"{special} special tokens"], prompt=text, max_sequence_length=special)


def test_words_that_the_tokenizer_does_not_know_count_when_they_are_cut(warned):
    pipe = tiny_text_pipeline("t5")
    latents(pipe, "☃ " * 20)
    (message,) = warned()
    assert "more than 16 tokens; this was cut off: '<unk> <unk>" in message


def test_the_tokenizer_s_own_warning_is_not_heard(caplog):
    # It says that indexing errors will follow, and none do.
    import transformers

    caplog.set_level(logging.WARNING)
    transformers.logging.enable_propagation()
    try:
        latents(tiny_text_pipeline("bert"), "a big cat " * 9)
    finally:
        transformers.logging.disable_propagation()
    assert [record.name for record in caplog.records] == ["mar_hf.pipelines.prompts"]


UNICODE = [
    "ein süßes Herz",
    "красное сердце",
    "赤いハート",
    "قلب أحمر",
    "👩\u200d❤️\u200d👩🇫🇷",
    "e\u0301",
    "\u200b",
    "a\x00b",
    "\uffff",
]


@pytest.mark.parametrize("text", UNICODE, ids=ascii)
def test_texts_in_any_script(each, text, warned):
    found = latents(each, text, generator=seeds(0))
    assert found.isfinite().all() and torch.equal(latents(each, text, generator=seeds(0)), found)
    assert differ(found, latents(each, "", generator=seeds(0)))
    assert all(repr(text[:40]) in message for message in warned())
    if each.kind == "clip":  # bytes tell all apart
        others = [other for other in UNICODE if other != text]
        assert all(differ(latents(each, other, generator=seeds(0)), found) for other in others)


# What is refused


@pytest.mark.parametrize(
    "prompt, got",
    [
        (5, "got 5"),
        (1.5, "got 1.5"),
        (True, "got True"),
        (b"cat", "got b'cat'"),
        ([], "got []"),
        ((), "got ()"),
        ([1], "got [1]"),
        (["cat", None], "got ['cat', None]"),
        ([["cat"]], "got [['cat']]"),
        ({"prompt": "cat"}, "got {'prompt': 'cat'}"),
        ({"cat"}, "got {'cat'}"),
        (torch.zeros(1, 3, TEXT_DIM), "got tensor("),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_prompts_of_other_types(refused, name, prompt, got):
    kwargs = {"prompt": "cat", name: prompt}
    refused([f"`{name}` has to be a text or a list of texts", got], **kwargs)


@pytest.mark.parametrize(
    "kwargs, fragments",
    [
        (
            {"prompt": "cat", "prompt_embeds": torch.zeros(1, 3, TEXT_DIM)},
            ["`prompt` and `prompt_embeds`", "not both"],
        ),
        (
            {"prompt": "cat", "negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 3, TEXT_DIM)},
            ["Both `negative_prompt` and `negative_prompt_embeds`"],
        ),
        ({"negative_prompt": "a"}, ["`negative_prompt` needs a `prompt`"]),
        ({"negative_prompt": "a", "class_labels": 1}, ["`negative_prompt` needs a `prompt`"]),
        ({"negative_prompt_embeds": torch.zeros(1, 3, TEXT_DIM)}, ["`negative_prompt` needs a `prompt`"]),
        ({"prompt": ["a", "cat"], "negative_prompt": ["a"]}, ["`negative_prompt`", "one for all or 2", "got 1"]),
        ({"prompt": "a", "negative_prompt": ["a", "cat"]}, ["`negative_prompt`", "one for all or 1", "got 2"]),
        (
            {"prompt": ["a", "cat"], "negative_prompt_embeds": torch.zeros(3, 1, TEXT_DIM)},
            ["`negative_prompt`", "got 3"],
        ),
        ({"prompt": "cat", "prompt_attention_mask": torch.ones(1, 3)}, ["`prompt_attention_mask`", "`prompt_embeds`"]),
        ({"prompt_attention_mask": torch.ones(1, 3)}, ["`prompt_attention_mask`", "`prompt_embeds`"]),
        (
            {"prompt": "cat", "negative_prompt_attention_mask": torch.ones(1, 3)},
            ["`negative_prompt_attention_mask`", "`negative_prompt_embeds`"],
        ),
        ({"prompt": "cat", "max_sequence_length": 0}, ["`max_sequence_length`", "1..16", "got 0"]),
        ({"prompt": "cat", "max_sequence_length": 17}, ["`max_sequence_length`", "1..16", "got 17"]),
        ({"prompt": "cat", "max_sequence_length": "8"}, ["`max_sequence_length`", "1..16", "got '8'"]),
        ({"prompt_embeds": torch.zeros(1, 3, 9)}, ["`prompt_embeds`", "(1, 1..16, 16)", "got (1, 3, 9)"]),
        ({"prompt_embeds": torch.zeros(3, TEXT_DIM)}, ["`prompt_embeds`", "(3, 1..16, 16)", "got (3, 16)"]),
        ({"prompt_embeds": torch.zeros(1, 17, TEXT_DIM)}, ["`prompt_embeds`", "got (1, 17, 16)"]),
        ({"prompt_embeds": torch.zeros(0, 3, TEXT_DIM)}, ["`prompt`"]),
        ({"prompt_embeds": [[[0.0] * TEXT_DIM]]}, ["`prompt_embeds` has to be a tensor, got list"]),
        (
            {"prompt_embeds": torch.zeros(1, 1, TEXT_DIM), "prompt_attention_mask": [[1]]},
            ["`prompt_attention_mask` has to be a tensor, got list"],
        ),
        (
            {"prompt": "cat", "negative_prompt_embeds": [[[0.0] * TEXT_DIM]]},
            ["`negative_prompt_embeds` has to be a tensor, got list"],
        ),
        (
            {"prompt_embeds": torch.zeros(1, 3, TEXT_DIM), "prompt_attention_mask": torch.ones(1, 4)},
            ["`prompt_attention_mask`", "(1, 3)", "got (1, 4)"],
        ),
        (
            {"prompt": "cat", "negative_prompt_embeds": torch.zeros(1, 3, 9)},
            ["`negative_prompt_embeds`", "got (1, 3, 9)"],
        ),
        ({"prompt": ["a", "cat", "a"], "class_labels": [0, 1]}, ["`class_labels`", "each of 3 texts", "got 2"]),
        ({"prompt": "cat", "class_labels": [0, 1]}, ["`class_labels`", "each of 1 texts", "got 2"]),
        ({"prompt": "cat", "class_labels": 7}, ["`class_labels`", "0..2", "got 7"]),
        ({"prompt": "cat", "class_labels": []}, ["`class_labels` is empty"]),
        ({"prompt": ["a", "cat"], "num_images_per_prompt": 2, "generator": seeds(0, 1)}, ["(4)", "got 2"]),
        ({"prompt": "cat", "num_images_per_prompt": 0}, ["`num_images_per_prompt`", "got 0"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(refused, kwargs, fragments):
    refused(fragments, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"prompt": "cat"},
        {"prompt": ["cat", "a"], "class_labels": None},
        {"prompt": ""},
        {"prompt_embeds": torch.zeros(1, 3, TEXT_DIM)},
    ],
    ids=str,
)
@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_a_model_of_classes_refuses_texts(backbone, kwargs):
    refuse(tiny_pipeline(backbone=backbone), ["`prompt` needs a model that takes texts"], **kwargs)


@pytest.mark.parametrize("missing", [["text_encoder"], ["tokenizer"], ["text_encoder", "tokenizer"]], ids="-".join)
def test_without_a_text_encoder_texts_are_given_as_states(pipe, missing):
    expected = latents(pipe, ["a red heart", "cat"], generator=seeds(0, 1))
    null = latents(pipe, "", generator=seeds(0))
    texts = states(pipe, ["a red heart", "cat"])
    for name in missing:
        setattr(pipe, name, None)
    assert torch.equal(latents(pipe, **texts, generator=seeds(0, 1)), expected)
    assert torch.equal(latents(pipe, "", generator=seeds(0)), null)
    fragments = ["`prompt` needs", "`text_encoder` and `tokenizer`", "`from_pretrained`", "`prompt_embeds`"]
    refuse(pipe, fragments, class_labels=None, prompt="cat")
    fragments = ["`negative_prompt` needs", "`negative_prompt_embeds`"]
    refuse(pipe, fragments, class_labels=None, negative_prompt="cat", **{k: v[:1] for k, v in texts.items()})


def test_text_encoders_that_do_not_fit():
    with pytest.raises(ValueError, match="`text_encoder` gives states of 24 numbers, but `transformer` takes 16"):
        tiny_text_pipeline(text_encoder=tiny_text_encoder(width=24))
    with pytest.raises(ValueError, match="`text_encoder` gives states of 16 numbers, but `transformer` takes None"):
        tiny_text_pipeline(transformer=tiny_transformer())
    config = T5Config(vocab_size=30, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="`text_encoder` has to be an encoder alone, not T5Model"):
        tiny_text_pipeline(text_encoder=T5Model(config))


# What others may ask for


def test_encode_prompt(each):
    embeds, mask, negative, negative_mask = each.encode_prompt(["a red heart", ""], 2, negative_prompt="cat")
    texts = states(each, ["a red heart", ""])
    assert torch.equal(embeds, texts["prompt_embeds"].repeat_interleave(2, 0)) and mask.dtype == torch.bool
    assert torch.equal(mask, texts["prompt_attention_mask"].repeat_interleave(2, 0)) and not mask[2:].any()
    texts = states(each, ["cat"] * 4)
    torch.testing.assert_close(negative, texts["prompt_embeds"])
    assert torch.equal(negative_mask, texts["prompt_attention_mask"])
    assert not embeds.requires_grad
    again = each.encode_prompt(["a red heart", ""], 2, do_classifier_free_guidance=False)
    assert torch.equal(again[0], embeds) and torch.equal(again[1], mask) and again[2:] == (None, None)
    # What it gives is what a call takes.
    names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
    given = dict(zip(names, (embeds, mask, negative, negative_mask)))
    settings = {"negative_prompt": "cat", "num_images_per_prompt": 2, "generator": seeds(0, 1, 2, 3)}
    expected = latents(each, ["a red heart", ""], **settings)
    assert torch.equal(latents(each, **given, generator=seeds(0, 1, 2, 3)), expected)


def test_texts_are_encoded_apart_from_the_model(each):
    parts = {"text_encoder": each.text_encoder, "tokenizer": each.tokenizer}
    apart = MARPipeline(transformer=None, vae=None, scheduler=None, **parts)
    for found, expected in zip(
        apart.encode_prompt(["a red heart", ""], 2), each.encode_prompt(["a red heart", ""], 2)
    ):
        assert torch.equal(found, expected)
    assert apart.encode_prompt("")[0].shape == (1, 1, each.transformer.config.text_dim)
    with pytest.raises(ValueError, match="`prompt_embeds` needs `transformer`, which is None"):
        apart.encode_prompt(prompt_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="`prompt` needs `text_encoder` and `tokenizer`"):
        MARPipeline(transformer=None, vae=None, scheduler=None).encode_prompt("a cat")


@pytest.mark.parametrize("count", ["2", 0, True, 1.0])
def test_rows_for_each_text_are_a_whole_number(each, count):
    with pytest.raises(ValueError, match=f"`num_images_per_prompt` .* got {count!r}"):
        each.encode_prompt("a cat", count)


@pytest.mark.parametrize("states", [torch.tensor(0.0), torch.zeros(0, 1, 16), 5], ids=["scalar", "empty", "number"])
def test_states_are_counted_only_where_there_are_texts(each, states):
    with pytest.raises(ValueError, match="`prompt` .* or `prompt_embeds` .* got "):
        each(prompt_embeds=states)


def test_components_are_shared_and_exchanged():
    pipe = tiny_text_pipeline()
    again = MARPipeline(**pipe.components, id2label=NAMES, generation_defaults=pipe.config.generation_defaults)
    again.set_progress_bar_config(disable=True)
    expected = latents(pipe, "cat", generator=seeds(0))
    assert torch.equal(latents(again, "cat", generator=seeds(0)), expected)
    assert again.text_encoder is pipe.text_encoder and again.tokenizer is pipe.tokenizer
    again.text_encoder, again.tokenizer = tiny_text_encoder("bert"), tiny_text_tokenizer("bert")
    assert differ(latents(again, "cat", generator=seeds(0)), expected)


# Texts that are encoded apart


def test_texts_are_encoded_without_a_transformer(each):
    apart = MARPipeline(None, None, None, text_encoder=each.text_encoder, tokenizer=each.tokenizer)
    for settings in ({"prompt": ["a red heart", "cat"]}, {"prompt": "", "negative_prompt": "a"}, {"prompt": ""}):
        found = apart.encode_prompt(**settings)
        expected = each.encode_prompt(**settings)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    given = dict(zip(names, apart.encode_prompt("a red heart"), strict=True))
    assert torch.equal(latents(each, **given, generator=seeds(0)), latents(each, "a red heart", generator=seeds(0)))


def test_what_a_pipeline_without_parts_refuses():
    empty = MARPipeline(None, None, None)
    with pytest.raises(ValueError, match="`text_encoder`"):
        empty.encode_prompt("cat")
    with pytest.raises(ValueError, match="`text_encoder`"):
        empty.encode_prompt("")
    with pytest.raises(ValueError, match=r"no \['transformer', 'vae', 'scheduler'\]"):
        empty(1)
    with pytest.raises(ValueError, match="`num_images_per_prompt`"):
        tiny_text_pipeline().encode_prompt("cat", num_images_per_prompt=2.0)
    with pytest.raises(ValueError, match="Unicode"):
        tiny_text_pipeline()(prompt="\ud800")
