# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines with heads that need no scheduler."""

import copy

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch._dynamo.testing import CompileCounter

from common import MODELS, seeded
from mar_hf import MARPipeline
from tiny_pipelines import seeds, tiny_pipeline, tiny_transformer


HEADS = {
    "energy": {"head_type": "energy", "head_config": {"hidden_size": 32, "noise_dim": 20}},
    "shortcut": {"head_type": "shortcut", "head_config": {"hidden_size": 32}},
    "mixture": {"head_type": "mixture", "head_config": {"hidden_size": 32, "num_components": 4}},
    "mixture-groups": {"head_type": "mixture", "head_config": {"hidden_size": 32, "feature_group": 4}},
}
CALL = {"class_labels": [0, 2], "guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(params=HEADS)
def head(request):
    return HEADS[request.param]


@pytest.fixture(params=MODELS)
def pipe(request, head):
    transformer = tiny_transformer(backbone=request.param, **head)
    return tiny_pipeline(transformer=transformer, scheduler=None, generation_defaults={"num_inference_steps": 4})


def test_a_picture_is_that_of_its_seed(pipe):
    both = pipe(**CALL, generator=seeds(0, 1)).images
    assert torch.equal(both, pipe(**CALL, generator=seeds(0, 1)).images) and both.isfinite().all()
    alone = pipe(**{**CALL, "class_labels": [2]}, generator=seeds(1)).images
    torch.testing.assert_close(alone[0], both[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[1], pipe(**CALL, generator=seeds(0, 2)).images[1], atol=0.01)


def test_its_noise_decides(pipe):
    entries = pipe.transformer.head.noise_entries(1)
    noise = torch.randn(2, 16, entries, 12, generator=seeded(1))
    call = {**CALL, "generation_order": "raster", "noise": noise}
    found = pipe(**call, generator=seeds(0, 1)).images
    assert torch.equal(found, pipe(**call, generator=seeds(2, 3)).images)
    with pytest.raises(ValueError, match=rf"`noise` has to be a tensor of shape \(2, 16, {entries}, 12\)"):
        pipe(**{**call, "noise": noise[:, :, :1].repeat(1, 1, entries + 1, 1)})


def test_its_settings_matter(pipe):
    found = pipe(**CALL, generator=seeds(0, 1)).images
    for change in ({"guidance_scale": 1.0}, {"temperature": 0.5}):
        assert not torch.allclose(pipe(**{**CALL, **change}, generator=seeds(0, 1)).images, found, atol=0.01)


def test_it_is_saved_without_a_scheduler(pipe, tmp_path):
    expected = pipe(**CALL, generator=seeds(0, 1)).images
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "scheduler").exists()
    loaded = MARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler is None and loaded.generation_defaults == pipe.generation_defaults
    assert torch.equal(loaded(**CALL, generator=seeds(0, 1)).images, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_draws_in_half_precision(pipe, dtype):
    found = pipe.to(dtype)(**CALL, generator=seeds(0, 1)).images
    assert found.isfinite().all() and found.abs().max() < 100


def test_its_weights_are_called_for(pipe):
    expected = pipe(**CALL, generator=seeds(0, 1)).images
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    torch.testing.assert_close(pipe(**CALL, generator=seeds(0, 1)).images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_it_draws_the_same(head):
    torch._dynamo.reset()
    pipe, counter = tiny_pipeline(transformer=tiny_transformer(**head), scheduler=None), CompileCounter()
    expected = pipe(**CALL, generator=seeds(0, 1)).images
    pipe.transformer.head.compile_sampling(backend=counter, fullgraph=True, dynamic=True)
    torch.testing.assert_close(pipe(**CALL, generator=seeds(0, 1)).images, expected, rtol=1e-4, atol=1e-4)
    assert 1 <= counter.frame_count <= 8  # not again for each number of tokens and of groups before the next
    compiled = counter.frame_count
    pipe(**CALL, generator=seeds(2, 3))
    assert counter.frame_count == compiled
    # Copies compute with their own weights.
    copied = copy.deepcopy(pipe.transformer.head)
    assert "_denoise" in vars(pipe.transformer.head) and "_denoise" not in vars(copied)
    torch._dynamo.reset()


@pytest.mark.parametrize("backbone", MODELS)
def test_a_model_trains_with_it(backbone, head):
    model = tiny_transformer(backbone=backbone, **head).train()
    tokens, labels = torch.randn(4, 16, 12, generator=seeded(1)), torch.tensor([0, 1, 2, 0])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(2):
        loss = model(tokens, class_labels=labels, generator=seeded(2), return_loss=True).loss
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.head.parameters()), step
        assert all(parameter.grad.any() for parameter in model.head.parameters()), step
        optimiser.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
