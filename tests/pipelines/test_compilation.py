# SPDX-License-Identifier: Apache-2.0
"""Compiled pipelines: the same pictures, no graph breaks, nothing compiled again as the number of tokens changes."""

import copy
import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from common import relative_error, seeded
from mar_hf import TokenFlowScheduler
from mar_hf.pipelines.compilation import has_compiler
from tiny_pipelines import tiny_pipeline, tiny_text_pipeline, tiny_transformer


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def latents(pipe, steps, **call):
    subjects = {"prompt": ["a cat", "heart"]} if pipe.tokenizer is not None else {"class_labels": [0, 2]}
    call = {"num_inference_steps": steps, "num_diffusion_steps": 5, "guidance_scale": 2.0, **subjects, **call}
    return pipe(generator=seeded(3), output_type="latent", token_schedule="cosine", **call).images


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone, make", [("mar", tiny_pipeline), ("mar", tiny_text_pipeline), ("ar", tiny_pipeline)]
)
def test_the_same_pictures_without_compiling_again(backbone, make):
    pipe = make(backbone=backbone)
    expected = {steps: latents(pipe, steps) for steps in (3, 7)}
    counter = CompileCounter()  # runs the graphs as they are
    assert pipe.compile(backend=counter, fullgraph=True) is pipe  # graph breaks would raise
    for steps, before in expected.items():
        assert relative_error(latents(pipe, steps), before) < 1e-5
    # Steps of 3 to 11 tokens, then also of 1 and, by chance, of as many as there are rows.
    assert 2 <= counter.frame_count <= 8
    compiled = counter.frame_count
    for steps in (2, 4, 5, 6):
        latents(pipe, steps)
    assert counter.frame_count == compiled


@torch.no_grad()
def test_copies_compute_with_their_own_weights():
    head = tiny_pipeline().compile(backend="eager").transformer.head
    copied = copy.deepcopy(head)
    for parameter in copied.parameters():
        parameter.zero_()
    inputs = (torch.ones(3, head.token_dim), torch.zeros(3), torch.ones(3, head.condition_proj.in_features))
    assert head(*inputs).abs().max() > 0.1
    assert not copied(*inputs).any()


def test_compiled_again_it_is_compiled_by_the_last_only():
    pipe, counters = tiny_pipeline(), (CompileCounter(), CompileCounter())
    expected = latents(pipe, 3)
    for counter in counters:
        pipe.compile(backend=counter)
    assert relative_error(latents(pipe, 3), expected) < 1e-5
    assert [counter.frame_count > 0 for counter in counters] == [False, True]


@pytest.mark.slow
def test_cuda_graphs_are_left_to_the_head():
    seen = set()

    def backend(graph, inputs, mode="default"):
        attends = "scaled_dot_product_attention" in graph.code
        seen.add(("block" if attends else "head", mode))
        return graph.forward

    for mode in ("reduce-overhead", "max-autotune", "default"):
        torch._dynamo.reset()
        pipe = tiny_pipeline().compile(backend=backend, mode=mode)
        latents(pipe, 3)
        expected = {"max-autotune": "max-autotune-no-cudagraphs"}.get(mode, "default")
        assert seen == {("head", mode), ("block", expected)}
        seen.clear()


def test_without_a_compiler_nothing_changes(monkeypatch, caplog):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    get_compiler = torch._inductor.cpp_builder.cpp_compiler_search
    get_compiler.cache_clear()
    caplog.set_level(logging.WARNING, logger="mar_hf.pipelines.compilation")
    pipe = tiny_pipeline()
    assert not has_compiler(torch.device("cpu"))
    pipe.compile()
    get_compiler.cache_clear()
    assert "torch finds no compiler for cpu" in caplog.text
    assert all(module._compiled_call_impl is None for module in pipe.transformer.modules())
    assert latents(pipe, 2).isfinite().all()


@pytest.mark.parametrize("head_type, scheduler", [("flow_matching", TokenFlowScheduler())])
def test_other_heads_compile_too(head_type, scheduler):
    pipe, counter = (
        tiny_pipeline(transformer=tiny_transformer(head_type=head_type), scheduler=scheduler),
        CompileCounter(),
    )
    expected = latents(pipe, 3)
    pipe.transformer.head.compile_sampling(backend=counter, fullgraph=True)
    assert relative_error(latents(pipe, 3), expected) < 1e-5 and counter.frame_count > 0


def test_the_categorical_head_has_nothing_to_compile():
    pipe = tiny_pipeline(transformer=tiny_transformer(head_type="categorical", head_config={"num_codes": 8}))
    assert pipe.compile(backend="eager") is pipe
