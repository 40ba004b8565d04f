# SPDX-License-Identifier: Apache-2.0
"""Offloading of weights: on a GPU where there is one, else from the CPU to the CPU with the same hooks."""

import accelerate
import accelerate.hooks
import pytest
import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled

from mar_hf import MARPipeline
from tiny_pipelines import seeds, tiny_kl, tiny_pipeline, tiny_text_pipeline


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["pixels", "kl", "causal", "texts", "causal-texts"])
def pipe(request):
    """On pixels, with an autoencoder, with the causal backbone, and of texts with either."""
    if request.param.endswith("texts"):
        return tiny_text_pipeline(backbone="ar" if request.param.startswith("causal") else "mar")
    vae = tiny_kl() if request.param == "kl" else None
    return tiny_pipeline(vae, backbone="ar" if request.param == "causal" else "mar")


def generate(pipe):
    """Guided pictures with everything that a call touches."""
    texts = {} if pipe.text_encoder is None else {"prompt": ["a red heart", "cat"]}
    return pipe([0, 1], generator=seeds(0, 1), output_type="pt", guidance_scale=2.0, **texts).images


def modules(pipe):
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def assert_close(found, expected):
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_model_offload(pipe):
    expected = generate(pipe)
    pipe.enable_model_cpu_offload(device=DEVICE)
    assert len(pipe._all_hooks) == len(modules(pipe))  # `model_cpu_offload_seq` names them all
    for _ in range(2):  # the hooks have to be there again after the first call
        assert_close(generate(pipe), expected)
        assert {parameter.device.type for part in modules(pipe) for parameter in part.parameters()} == {"cpu"}


def test_model_offload_order(pipe, monkeypatch):
    """Each component comes to the device for its own part of the call, and leaves at the end."""
    moves = []
    for name in ("pre_forward", "init_hook"):
        original = getattr(accelerate.hooks.CpuOffload, name)

        def recording(hook, module, *args, name=name, original=original, **kwargs):
            moves.append((name, next(key for key, part in pipe.components.items() if part is module)))
            return original(hook, module, *args, **kwargs)

        monkeypatch.setattr(accelerate.hooks.CpuOffload, name, recording)
    pipe.enable_model_cpu_offload(device=DEVICE)
    generate(pipe)
    before = [] if pipe.text_encoder is None else ["text_encoder"]  # once, then it makes room
    to_cpu = [("init_hook", name) for name in (*before, "transformer", "vae")]
    used = [*before, *["transformer"] * 6, "vae"]  # in each of 3 steps: the backbone, then its head
    assert moves == [*to_cpu, *[("pre_forward", name) for name in used], *to_cpu]
    order = [pipe.components[name] for name in (*before, "transformer", "vae")]
    for part, following in zip(order, order[1:]):
        assert following._hf_hook.prev_module_hook.model is part


@pytest.fixture
def plain_cpu(monkeypatch):
    """accelerate compares "cpu:0" with "cpu" and takes them for two devices; nothing else stands in the CPU's way."""
    original = accelerate.hooks.set_module_tensor_to_device

    def set_module_tensor_to_device(module, name, device, *args, **kwargs):
        return original(module, name, "cpu" if str(device) == "cpu:0" else device, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", set_module_tensor_to_device)


def test_sequential_offload(pipe, plain_cpu):
    expected = generate(pipe)
    pipe.enable_sequential_cpu_offload(device=DEVICE)
    for _ in range(2):
        # Weights are only where they are used: whatever reads one outside of a hooked method fails.
        parts = [pipe.transformer, pipe.vae.autoencoder or torch.nn.Module(), pipe.text_encoder or torch.nn.Module()]
        assert {parameter.device.type for part in parts for parameter in part.parameters()} == {"meta"}
        assert_close(generate(pipe), expected)


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_group_offload(pipe, kind):
    expected = generate(pipe)
    if kind["offload_type"] == "block_level":
        kind = {**kind, "num_blocks_per_group": 1}
    pipe.enable_group_offload(onload_device=torch.device(DEVICE), offload_device=torch.device("cpu"), **kind)
    assert all(_is_group_offload_enabled(part) for part in modules(pipe))
    for _ in range(2):
        assert_close(generate(pipe), expected)


def test_offloading_ends(pipe):
    expected = generate(pipe)
    pipe.enable_model_cpu_offload(device=DEVICE)
    generate(pipe)
    pipe.remove_all_hooks()
    pipe.to("cpu")
    assert torch.equal(generate(pipe), expected)


def test_device_map(pipe, tmp_path):
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path)
    placed = MARPipeline.from_pretrained(tmp_path, device_map=DEVICE)
    placed.set_progress_bar_config(disable=True)
    assert placed.hf_device_map is not None
    assert_close(generate(placed), expected)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_text_pipeline])
@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_weights_that_come_when_called_need_no_class(backbone, make):
    pipe = make(backbone=backbone)
    expected = pipe(generator=seeds(0), output_type="pt").images
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu")
    found = pipe(generator=seeds(0), output_type="pt").images
    # Texts are not absorbed into weights that are elsewhere.
    assert_close(found, expected)
    assert make is tiny_text_pipeline or torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_text_pipeline])
@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_a_compiled_transformer_is_the_one_that_runs(backbone, make):
    pipe, graphs = make(backbone=backbone), []
    settings = {"class_labels": [1], "output_type": "pt", **({"prompt": "cat"} if pipe.text_encoder else {})}
    expected = pipe(**settings, generator=seeds(0)).images
    torch.compiler.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend=lambda graph, _: graphs.append(1) or graph)
    assert torch.equal(pipe(**settings, generator=seeds(0)).images, expected) and graphs
    torch.compiler.reset()
