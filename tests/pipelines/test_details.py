# SPDX-License-Identifier: Apache-2.0
"""More head steps for the tokens with most detail, and the decodings that use them."""

import pytest
import torch

from common import seeded
from mar_hf import MARPipeline
from mar_hf.generation import DECODINGS, GenerationStep
from mar_hf.pipelines.details import detail_scores, sample_by_detail
from tiny_pipelines import seeds, tiny_pipeline, tiny_text_pipeline, tiny_transformer


# 16 tokens in sets of 4, 4 and 8; the head takes 10 steps, 4 and 4, and 10 for two tokens of the last set.
GTR = {"decoding": "gtr", "num_inference_steps": 3, "num_diffusion_steps": 10, "detail_share": 0.25}


def latents(pipe, class_labels=1, **kwargs):
    return pipe(class_labels, output_type="latent", **kwargs).images


@pytest.mark.parametrize(
    "condition, score",
    [
        ([1, 1, 1, 1], 4),  # 4 at the frequency 0
        ([1, -1, 1, -1], 8),  # 4 at the highest, which counts twice
        ([1, 0, 0, 0], 1 + 1.5 + 2),  # 1 at each of 0, 1, 2
        ([1, 0, 0], 1 + 1 + 2 / 3),  # 1 at each of 0, 1
        ([0, 0, 0, 0], 0),
    ],
)
def test_scores_are_amplitudes_weighted_by_frequency(condition, score):
    for dtype in (torch.float32, torch.bfloat16):
        found = detail_scores(torch.tensor([[condition, condition]], dtype=dtype))
        assert found.shape == (1, 2) and found.dtype == torch.float32
        torch.testing.assert_close(found, torch.full((1, 2), float(score)))


@pytest.mark.parametrize("details", [1, 3, 7])
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_each_token_is_drawn_as_alone_with_its_own_head_steps(guided, details):
    pipe = tiny_pipeline()
    condition, other = torch.randn(2, 3, 7, 32, generator=seeded())
    noise = torch.randn(3, 7, 7, 12, generator=seeded(1))
    sampling = {
        **{"condition": condition, "negative_condition": other if guided else None, "noise": noise},
        **{"guidance_scale": 3.0 if guided else 1.0, "scheduler": pipe.scheduler, "num_steps": 2},
        **{"temperature": 1.0, "generator": None, "guider": None},
    }
    found = sample_by_detail(pipe.transformer, sampling, GenerationStep(0, 7, 3.0, 2, details, 6))
    scores = detail_scores(condition)
    for row in range(3):
        chosen = set(scores[row].topk(details).indices.tolist())
        for place in range(7):
            part = {name: sampling[name] for name in ("condition", "noise", "negative_condition")}
            part = {name: None if x is None else x[row, place][None, None] for name, x in part.items()}
            steps = {"num_steps": 6 if place in chosen else 2}
            alone = pipe.transformer.head.sample(**{**sampling, **part, **steps})[0, 0]
            torch.testing.assert_close(found[row, place], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_a_picture_with_details_does_not_depend_on_its_batch(backbone):
    pipe = tiny_pipeline(backbone=backbone)
    together = latents(pipe, [0, 1, 2], generator=seeds(0, 1, 2), **GTR)
    for place in range(3):
        alone = latents(pipe, place, generator=seeds(place), **GTR)
        torch.testing.assert_close(alone[0], together[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0, "guidance_refresh": 2}], ids=["each", "refreshed"])
def test_details_change_a_share_of_the_tokens_of_the_last_set(settings):
    pipe = tiny_text_pipeline()
    settings = {"class_labels": [0, 1], "output_type": "latent", **GTR, **settings}
    some, none = (pipe(**settings | {"detail_share": n}, generator=seeds(0, 1)).images for n in (0.25, 0.0))
    changed = (pipe.vae.patchify(some) - pipe.vae.patchify(none)).abs().amax(-1) > 1e-3
    assert changed.sum(1).tolist() == [2, 2]
    odd = (torch.arange(16) // 4 + torch.arange(16) % 4) % 2 == 1
    assert not changed[:, ~odd].any()


def test_all_tokens_with_details_are_those_of_a_constant_schedule():
    pipe = tiny_pipeline()
    settings = {"generator": seeds(0), **GTR, "generation_order": "random"}
    found = latents(pipe, **settings | {"detail_share": 1, "head_step_schedule": "gtr", "num_inference_steps": 1})
    settings["generator"] = seeds(0)
    assert torch.equal(found, latents(pipe, **settings | {"head_step_schedule": "constant", "num_inference_steps": 1}))


def test_a_decoding_is_its_parts():
    pipe = tiny_pipeline()
    steps = {"num_inference_steps": 5, "num_diffusion_steps": 10}
    found = latents(pipe, generator=seeds(0), decoding="gtr", **steps)
    assert torch.equal(found, latents(pipe, generator=seeds(0), **DECODINGS["gtr"], **steps))
    assert not torch.allclose(found, latents(pipe, generator=seeds(0), **steps), atol=1e-3)
    # What is said beside it goes before it, wherever that is said.
    settings = pipe.settings_for(decoding="gtr", generation_order="halton", num_inference_steps=5)
    assert (settings.generation_order, settings.token_schedule, settings.detail_share) == ("halton", "gtr", 0.1)


def test_a_decoding_may_be_the_checkpoints_default(tmp_path):
    defaults = {"decoding": "gtr", "generation_order": "halton", "num_inference_steps": 5, "num_diffusion_steps": 10}
    tiny_pipeline(generation_defaults=defaults).save_pretrained(tmp_path)
    pipe, plain = MARPipeline.from_pretrained(tmp_path), tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    assert pipe.generation_defaults["token_schedule"] == "gtr" and "decoding" not in pipe.generation_defaults
    assert torch.equal(latents(pipe, generator=seeds(0)), latents(plain, generator=seeds(0), **defaults))
    # A decoding of the call goes before all of the defaults, a part of the call before the default's part.
    assert pipe.settings_for(decoding="gtr").generation_order == "gtr"
    assert pipe.settings_for(token_schedule="cosine").generation_order == "halton"


def test_a_callback_sees_the_sets_and_may_change_guidance():
    done, missing = [], []

    def callback(pipe, step, tokens_done, tensors):
        done.append(tokens_done)
        missing.append(tensors["mask"][0])
        pipe._guidance_scale = 1.0 + step

    pipe, inputs = tiny_pipeline(), {"callback_on_step_end_tensor_inputs": ["mask"]}
    latents(pipe, callback_on_step_end=callback, **GTR, **inputs, generator=seeds(0))
    assert done == [4, 8, 16]
    sums = torch.arange(16) // 4 + torch.arange(16) % 4
    assert torch.equal(missing[0], sums % 4 != 0) and torch.equal(missing[1], sums % 2 != 0)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("setting", ["decoding", "token_schedule"])
def test_a_causal_model_with_one_token_a_step_has_no_gtr(setting, saved):
    transformer = tiny_transformer(backbone="ar", max_tokens_per_step=1)
    pipe = tiny_pipeline(transformer=transformer, generation_defaults={setting: "gtr"} if saved else None)
    with pytest.raises(ValueError, match="`decoding` and `token_schedule` 'gtr' .*`max_tokens_per_step`.* is 1"):
        latents(pipe, **({} if saved else {setting: "gtr"}))


@pytest.mark.parametrize("value", ["fast", 5, ["gtr"]])
def test_decodings_that_do_not_exist(value):
    with pytest.raises(ValueError, match=r"^`decoding` has to be one of \['gtr'\], got "):
        latents(tiny_pipeline(), decoding=value)
    with pytest.raises(ValueError, match=r"^`generation_defaults` of the pipeline: `decoding` has to be one of"):
        tiny_pipeline(generation_defaults={"decoding": value})
