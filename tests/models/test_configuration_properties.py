# SPDX-License-Identifier: Apache-2.0
"""Whatever a configuration or a scheduler is built of, it is refused by name or it works with finite numbers."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from common import MODELS, seeded, tiny_config
from mar_hf import TokenDDPMScheduler
from mar_hf.generation import GENERATION_ORDERS


NAMES = [*GENERATION_ORDERS, "learned", "rotary", "categorical", "diffusion", "", "x"]
NONSENSE = st.sampled_from(
    [math.nan, math.inf, -math.inf, True, False, None, "x", "3", -1, 0, -0.5, 1e-30, 1e30, 2.5, 10**9, 10**30, [], [1]]
)
NUMBERS = st.one_of(st.integers(1, 5), st.floats(0, 1), st.sampled_from([0, 1, 16, 0.5, 1.0, 4.0]))
VALUES = st.one_of(NUMBERS, NONSENSE, st.sampled_from(NAMES), st.binary(max_size=2))
HEAD = st.dictionaries(
    st.sampled_from(
        ["num_layers", "hidden_size", "layer_norm_eps", "initializer_range", "loss_chunk_size", "num_codes", "depth"]
    ),
    st.one_of(NUMBERS, NONSENSE, st.just({"a": 1})),
    max_size=3,
)
PROFILE = {"derandomize": True, "deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}


def own_fields(kind: str) -> list[str]:
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = {field.name for field in dataclasses.fields(MODELS[kind].config_class)} - inherited
    return sorted(fields | {"id2label", "dtype"})


def changes(kind: str) -> st.SearchStrategy:
    value = {"head_config": st.one_of(HEAD, NONSENSE), "order": st.one_of(st.sampled_from(NAMES), NONSENSE)}
    one = st.sampled_from(own_fields(kind)).flatmap(lambda name: st.tuples(st.just(name), value.get(name, VALUES)))
    return st.lists(one, min_size=1, max_size=3).map(dict)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_configuration_works_or_says_what_is_wrong(kind):
    worked, refused = set(), set()

    @settings(max_examples=150, **PROFILE)
    @given(changes(kind))
    def check(changed):
        small = {"grid_height": 2, "grid_width": 2, "head_batch_multiplier": 1, "head_config": {"hidden_size": 8}}
        try:
            config = tiny_config(kind, **{**small, **changed})
            config.dtype = None
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = MODELS[kind](config).train()
        except ValueError as error:
            assert any(name in str(error) for name in changed), (changed, error)
            refused.update(changed)
            return
        worked.update(changed)
        if config.head_type == "categorical":
            model.head.codebook.fill_(1.0)
        tokens = torch.randn(2, config.num_tokens, config.token_dim, generator=seeded(1))
        given = {"noise_scheduler": TokenDDPMScheduler(), "generator": seeded(2)}
        output = model(tokens, class_labels=torch.zeros(2).long(), **given)
        assert output.condition.isfinite().all() and output.loss.isfinite(), changed

    check()
    assert len(worked) > 8 and len(refused) > 8  # neither side is tried for nothing


def test_a_scheduler_works_or_says_what_is_wrong():
    betas = st.one_of(
        st.lists(st.one_of(st.floats(0, 1), NONSENSE), max_size=4),
        st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=4),
        NONSENSE,
    )
    fields = st.fixed_dictionaries(
        {},
        optional={
            "num_train_timesteps": st.one_of(st.integers(1, 4), NONSENSE),
            "max_timestep": st.one_of(st.integers(1, 4), NONSENSE),
            "trained_betas": betas,
            "beta_schedule": NONSENSE,
            "prediction_type": NONSENSE,
            "variance_type": NONSENSE,
            "clip_sample": NONSENSE,
            "timestep_spacing": st.one_of(st.just("leading"), NONSENSE),
        },
    )
    built = []

    @settings(max_examples=300, **PROFILE)
    @given(fields)
    def check(changed):
        try:
            scheduler = TokenDDPMScheduler(**changed)
        except ValueError as error:
            assert any(f"`{name}`" in str(error) for name in changed), (changed, error)
            return
        built.append(changed)
        length = len(scheduler)
        scheduler.set_timesteps(min(length, 3))
        sample = torch.randn(2, 4, generator=seeded(1))
        timesteps = torch.tensor([0, length - 1])
        noisy = scheduler.add_noise(sample, sample, timesteps)
        losses = scheduler.training_losses(torch.zeros(2, 8), sample, noisy, sample, timesteps)
        assert all(loss.isfinite().all() for loss in losses), changed
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.zeros(2, 8), timestep, sample, generator=seeded(2)).prev_sample
        assert sample.isfinite().all(), changed

    check()
    assert {name for changed in built for name in changed} >= {"num_train_timesteps", "trained_betas", "max_timestep"}
