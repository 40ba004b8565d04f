# SPDX-License-Identifier: Apache-2.0
"""Guiders of diffusers as a component of the pipeline: what they change, what they keep, how they are saved."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    MagnitudeAwareGuidance,
    SkipLayerGuidance,
)

from mar_hf import MARPipeline, TokenDDPMScheduler
from tiny_pipelines import seeds, tiny_pipeline


def apg():
    settings = {"adaptive_projected_guidance_momentum": -0.5, "adaptive_projected_guidance_rescale": 1.0}
    return AdaptiveProjectedGuidance(**settings, eta=0.25)


def latents(pipe, *labels, **settings):
    """Pictures of labels, each with a generator of the label's number."""
    settings = {"guidance_scale": 3.0, "guidance_schedule": "constant", **settings}
    return pipe(list(labels), generator=seeds(*labels), output_type="latent", **settings).images


@pytest.fixture(params=["mar", "ar"])
def backbone(request):
    return request.param


def test_the_linear_guider_is_the_rule_without_one(backbone):
    plain, pipe = (tiny_pipeline(backbone=backbone, guider=one) for one in (None, ClassifierFreeGuidance()))
    for schedule in ("linear", "power_cosine"):
        expected = latents(plain, 1, 2, guidance_schedule=schedule)
        torch.testing.assert_close(latents(pipe, 1, 2, guidance_schedule=schedule), expected, rtol=1e-4, atol=1e-4)


def test_pictures_do_not_depend_on_their_batch(backbone):
    pipe = tiny_pipeline(backbone=backbone, guider=apg())
    together = latents(pipe, 0, 1, 2)
    assert not torch.allclose(together, latents(tiny_pipeline(backbone=backbone), 0, 1, 2), atol=0.01)
    for label in range(3):
        torch.testing.assert_close(latents(pipe, label)[0], together[label], rtol=1e-4, atol=1e-4)


def test_no_guidance_asks_no_guider():
    pipe = tiny_pipeline(guider=apg())
    assert torch.equal(latents(pipe, 1, guidance_scale=1.0), latents(tiny_pipeline(), 1, guidance_scale=1.0))


def test_calls_keep_their_state_to_themselves():
    pipe = tiny_pipeline(guider=apg())
    before = dict(vars(pipe.guider))
    batches = [(0,), (1, 2), (0, 1, 2), (2, 1, 0, 2)]
    expected = [latents(pipe, *labels) for labels in batches]
    assert vars(pipe.guider) == before
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda labels: latents(pipe, *labels), batches))
    assert all(map(torch.equal, found, expected))


def test_saved_and_loaded(tmp_path):
    pipe = tiny_pipeline(guider=apg())
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["guider"] == [
        "diffusers",
        "AdaptiveProjectedGuidance",
    ]
    assert [path.name for path in (tmp_path / "guider").iterdir()] == ["guider_config.json"]
    found = MARPipeline.from_pretrained(tmp_path)
    assert type(found.guider) is AdaptiveProjectedGuidance and found.guider.eta == 0.25
    assert torch.equal(latents(found, 1), latents(pipe, 1))
    # One of the caller's, or none, in its place.
    other = MARPipeline.from_pretrained(tmp_path, guider=ClassifierFreeZeroStarGuidance(zero_init_steps=0))
    assert not torch.allclose(latents(other, 1), latents(pipe, 1), atol=0.01)
    assert torch.equal(latents(MARPipeline.from_pretrained(tmp_path, guider=None), 1), latents(tiny_pipeline(), 1))


def test_by_hub_id(hub, tmp_path):
    pipe = tiny_pipeline(guider=apg())
    pipe.push_to_hub("org/guided")
    found = MARPipeline.from_pretrained("org/guided", cache_dir=tmp_path)
    assert type(found.guider) is AdaptiveProjectedGuidance
    assert torch.equal(latents(found, 1), latents(pipe, 1))


def test_from_pipe():
    pipe = tiny_pipeline(guider=apg())
    assert MARPipeline.from_pipe(pipe).guider is pipe.guider
    plain = tiny_pipeline()
    again = MARPipeline.from_pipe(plain, guider=pipe.guider)
    assert again.guider is pipe.guider and plain.guider is None
    assert torch.equal(latents(again, 1), latents(pipe, 1))


def test_a_guider_that_was_set_later_is_saved(tmp_path):
    pipe = tiny_pipeline()
    pipe.guider = apg()
    expected = latents(pipe, 1)
    assert not torch.allclose(expected, latents(tiny_pipeline(), 1), atol=0.01)
    pipe.save_pretrained(tmp_path / "with")
    assert torch.equal(latents(MARPipeline.from_pretrained(tmp_path / "with"), 1), expected)
    pipe.guider = None
    pipe.save_pretrained(tmp_path / "without")
    assert MARPipeline.from_pretrained(tmp_path / "without").guider is None


class Undersaid(ClassifierFreeGuidance):
    """A guider of the user's."""

    def forward(self, pred_cond, pred_uncond=None):
        found = super().forward(pred_cond, pred_uncond)
        return type(found)(**{**found, "pred": found.pred / 2})


def test_a_guider_of_the_users(tmp_path, monkeypatch):
    pipe = tiny_pipeline(guider=Undersaid())
    expected = latents(pipe, 1)
    assert not torch.allclose(expected, latents(tiny_pipeline(), 1), atol=0.01)
    with pytest.raises(ValueError, match=r"`guider` Undersaid can't be saved: test_guiders has no \['BaseGuidance'\]"):
        pipe.save_pretrained(tmp_path)
    # As where it is imported.
    monkeypatch.setattr(sys.modules[__name__], "BaseGuidance", diffusers.BaseGuidance, raising=False)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(latents(MARPipeline.from_pretrained(tmp_path), 1), expected)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    pipe = tiny_pipeline(guider=MagnitudeAwareGuidance())
    assert not torch.allclose(latents(pipe, 1), latents(tiny_pipeline(), 1), atol=0.01)
    with pytest.raises(ValueError, match="`guider` MagnitudeAwareGuidance can't be saved: diffusers has no"):
        pipe.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused():
    for guider, message in [
        (SkipLayerGuidance(skip_layer_guidance_layers=[0]), "but SkipLayerGuidance takes"),
        (ClassifierFreeZeroStarGuidance(), "`zero_init_steps` 0 with DiffusionHead, got 1"),
        (TokenDDPMScheduler(), "`guider` has to be of class BaseGuidance, got TokenDDPMScheduler"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny_pipeline(guider=guider)
        pipe = tiny_pipeline()
        pipe.guider = guider
        with pytest.raises(ValueError, match="`guider`"):
            latents(pipe, 1)


def test_broken_folders_are_refused(tmp_path):
    tiny_pipeline(guider=apg()).save_pretrained(tmp_path)
    index, configuration = tmp_path / "model_index.json", tmp_path / "guider" / "guider_config.json"
    saved = json.loads(index.read_text())

    def refused(message, guider=("diffusers", "AdaptiveProjectedGuidance")):
        index.write_text(json.dumps({**saved, "guider": guider}))
        with pytest.raises((ValueError, OSError), match=message):
            MARPipeline.from_pretrained(tmp_path)

    refused("`guider` in .*model_index.json has to be of class BaseGuidance, got DDIM", ["diffusers", "DDIMScheduler"])
    refused("unknown class 'Guider' of 'diffusers' for `guider`", ["diffusers", "Guider"])
    configuration.write_text(json.dumps({"start": 2.0}))
    refused("`start` to be between")
    configuration.write_text("{")
    refused("guider_config.json is not a valid JSON file")
    configuration.unlink()
    refused("guider_config.json")
