# SPDX-License-Identifier: Apache-2.0
"""The two branches of guidance: in some of the steps, and one pass without the class for several."""

import pytest
import torch
from test_pipeline_mar import COSINE, by_hand, draw, latents, rows_of_forwards

from tiny_pipelines import seeds, tiny_pipeline, tiny_text_pipeline


EIGHT = [1, 1, 1, 2, 3, 2, 3, 3]  # cosine
EIGHT_STEPS = {"num_inference_steps": 8, "guidance_scale": 3.0, "guidance_schedule": "constant"}


@pytest.mark.parametrize(
    "interval, guided",
    [((0, 0.5), [0, 1, 2, 3]), ([0.5, 1.0], [4, 5, 6, 7]), ((0.25, 0.7), [2, 3, 4, 5]), ((0.3, 0.35), [])],
    ids=["early", "late", "middle", "never"],
)
def test_guidance_within_an_interval_is_the_loop_by_hand(pipe, interval, guided):
    # A causal model makes its cache anew for both branches where guidance begins, and for one where it ends.
    orders, noise = draw(torch.Generator().manual_seed(0), batch=2)
    scales = [3.0 if step in guided else 1.0 for step in range(8)]
    expected = by_hand(pipe, torch.tensor([2, 0]), orders, noise, EIGHT, scales)
    rows = rows_of_forwards(pipe)
    settings = {"generation_order": orders, "noise": noise, **EIGHT_STEPS}
    found = latents(pipe, [2, 0], guidance_interval=interval, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert rows == [4 if step in guided else 2 for step in range(8)]


def test_before_the_interval_nothing_is_changed_by_guidance(pipe):
    orders, noise = draw(torch.Generator().manual_seed(0))
    settings = {**EIGHT_STEPS, "generation_order": orders, "noise": noise}
    found, plain, full = (
        pipe.vae.patchify(latents(pipe, 1, **{**settings, **changes}))[0, orders[0]]
        for changes in ({"guidance_interval": (0.5, 1.0)}, {"guidance_scale": 1.0}, {})
    )
    first = sum(EIGHT[:4])
    assert torch.equal(found[:first], plain[:first])
    assert (found[first:] - plain[first:]).abs().max() > 0.1
    whole = latents(pipe, 1, guidance_interval=(0.0, 1.0), **settings)
    assert torch.equal(pipe.vae.patchify(whole)[0, orders[0]], full)


def test_an_interval_of_a_linear_schedule_leaves_the_scales_inside_alone(pipe):
    orders, noise = draw(torch.Generator().manual_seed(0))
    scales = [1 + 2 * 3 / 16, 1 + 2 * 8 / 16, 1.0]
    expected = by_hand(pipe, torch.tensor([1]), orders, noise, COSINE, scales)
    settings = {"generation_order": orders, "noise": noise, "guidance_scale": 3.0, "guidance_schedule": "linear"}
    found = latents(pipe, 1, guidance_interval=(0.0, 2 / 3), **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "refresh, interval, refreshes",
    [(2, (0, 1), [0, 2, 4, 6]), (3, (0, 1), [0, 3, 6]), (99, (0, 1), [0]), (3, (0.25, 0.9), [2, 5])],
)
@pytest.mark.parametrize("text", [False, True], ids=["classes", "null text"])
def test_refreshed_guidance_is_the_loop_by_hand(refresh, interval, refreshes, text):
    pipe = tiny_text_pipeline() if text else tiny_pipeline()
    orders, noise = draw(torch.Generator().manual_seed(0), batch=2)
    scales = [3.0 if interval[0] <= step / 8 < interval[1] else 1.0 for step in range(8)]
    # Before the interval the loop by hand has the other branch too, at the scale 1.
    passes = [*range(refreshes[0]), *refreshes]
    expected = by_hand(pipe, torch.tensor([2, 0]), orders, noise, EIGHT, scales, refreshes=passes)
    rows = rows_of_forwards(pipe)
    settings = {"generation_order": orders, "noise": noise, **EIGHT_STEPS}
    found = latents(pipe, [2, 0], guidance_refresh=refresh, guidance_interval=interval, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert rows == [4 if step in refreshes else 2 for step in range(8)]
    assert (found - latents(pipe, [2, 0], guidance_interval=interval, **settings)).abs().max() > 1e-3


def test_refreshed_guidance_of_texts_reads_both_texts():
    pipe = tiny_text_pipeline()
    settings = {"prompt": ["a red heart", "cat"], "output_type": "latent", **EIGHT_STEPS, "guidance_refresh": 4}
    found = pipe(**settings, generator=seeds(0, 1)).images
    for row, prompt in enumerate(settings["prompt"]):
        alone = pipe(**{**settings, "prompt": prompt}, generator=seeds(row)).images
        torch.testing.assert_close(alone[0], found[row], rtol=1e-4, atol=1e-4)
    other = pipe(**settings, negative_prompt="two big blue clock", generator=seeds(0, 1)).images
    assert (found - other).abs().max() > 1e-3


def test_replaced_latents_refresh_guidance():
    def callback(pipe, step, done, tensors):
        return {"latents": tensors["latents"] * (step != 2)}

    pipe, (orders, noise) = tiny_pipeline(), draw(torch.Generator().manual_seed(0))
    expected = by_hand(
        *(pipe, torch.tensor([1]), orders, noise, EIGHT, [3.0] * 8),
        after=lambda step, tokens: tokens * (step != 2),
        refreshes=[0, 3, 7],
    )
    settings = {"generation_order": orders, "noise": noise, "callback_on_step_end": callback, **EIGHT_STEPS}
    found = latents(pipe, 1, guidance_refresh=4, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_refreshed_guidance_stops_where_a_callback_turns_it_off():
    def callback(pipe, step, done, tensors):
        pipe._guidance_scale = 1.0 if step == 1 else 3.0

    pipe, (orders, noise) = tiny_pipeline(), draw(torch.Generator().manual_seed(0))
    scales = [3.0, 3.0, 1.0, *[3.0] * 5]
    expected = by_hand(pipe, torch.tensor([1]), orders, noise, EIGHT, scales, refreshes=[0, 3, 7])
    settings = {"generation_order": orders, "noise": noise, "callback_on_step_end": callback, **EIGHT_STEPS}
    rows = rows_of_forwards(pipe)
    found = latents(pipe, 1, guidance_refresh=4, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert rows == [2, 1, 1, 2, 1, 1, 1, 2]
