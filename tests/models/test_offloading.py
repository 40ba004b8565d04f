# SPDX-License-Identifier: Apache-2.0
"""Weights that are there only while `forward` runs, and blocks that are compiled one by one."""

import pytest
import torch
from accelerate.utils import compile_regions
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup

from common import MODELS, seeded, tiny_model
from mar_hf import TokenDDPMScheduler
from tiny_pipelines import seeds, tiny_kl, tiny_pipeline, tiny_text_pipeline, tiny_transformer


@pytest.fixture
def nowhere(monkeypatch):
    """A machine whose offloaded weights are not numbers: what is used without being called for shows."""
    kept = {}

    def tensors(group):
        for module in group.modules:
            yield from (*module.parameters(), *module.buffers())
        yield from (*group.parameters, *group.buffers)

    def offload(group):
        for tensor in tensors(group):
            if tensor not in kept:
                kept[tensor] = tensor.data
                tensor.data = torch.full_like(tensor, torch.nan)

    def onload(group):
        for tensor in tensors(group):
            tensor.data = kept.pop(tensor, tensor.data)

    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)


def offload(module, kind):
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(module, onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    assert all(parameter.isnan().all() for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("backbone", MODELS)
def test_a_pipeline_calls_for_its_weights(backbone, kind, nowhere):
    call = {"class_labels": [0, 2], "guidance_scale": 2.0, "output_type": "np"}
    pipe = tiny_pipeline(tiny_kl(), backbone)
    expected = pipe(**call, generator=seeds(0, 1)).images
    offload(pipe.transformer, kind)
    if kind == "block_level":
        offload(pipe.vae, kind)
    found = pipe(**call, generator=seeds(0, 1)).images
    assert abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("backbone", MODELS)
def test_so_does_one_of_texts(backbone, nowhere):
    call = {"prompt": ["red heart", "clock"], "guidance_scale": 2.0, "output_type": "np"}
    pipe = tiny_text_pipeline(backbone=backbone)
    expected = pipe(**call, generator=seeds(0, 1)).images
    offload(pipe.transformer, "block_level")
    found = pipe(**call, generator=seeds(0, 1)).images
    assert abs(found - expected).max() < 1e-5


def test_so_does_a_categorical_head(nowhere):
    call = {"class_labels": [0, 2], "guidance_scale": 2.0, "output_type": "np"}
    head = {"head_type": "categorical", "head_config": {"num_codes": 8, "num_layers": 1, "hidden_size": 16}}
    pipe = tiny_pipeline(transformer=tiny_transformer(**head))
    expected = pipe(**call, generator=seeds(0, 1)).images
    offload(pipe.transformer, "block_level")
    assert abs(pipe(**call, generator=seeds(0, 1)).images - expected).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backbone", MODELS)
def test_repeated_blocks_are_compiled_one_by_one(backbone):
    model = tiny_model(backbone, head_batch_multiplier=1)
    tokens, generator = torch.randn(2, 16, 12, generator=seeded(1)), {"generator": seeded(2)}
    inputs = {"mask": torch.arange(16).expand(2, -1) < 8} if backbone == "mar" else {}
    inputs |= {"class_labels": torch.tensor([0, 1]), "noise_scheduler": TokenDDPMScheduler()}
    expected = model(tokens, **inputs, **generator).loss
    torch.compiler.reset()
    compiled = compile_regions(model, backend="eager")
    kinds = {type(part).__name__ for part in compiled.modules() if type(part).__name__.endswith(("Layer", "Block"))}
    wrapped = [part for part in compiled.modules() if hasattr(part, "_orig_mod")]
    assert kinds == {"BackboneLayer", "ModulatedBlock"}
    assert {"BackboneLayer", "ModulatedBlock"} <= {type(part._orig_mod).__name__ for part in wrapped}
    loss = compiled(tokens, **inputs, generator=seeded(2)).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.compiler.reset()
