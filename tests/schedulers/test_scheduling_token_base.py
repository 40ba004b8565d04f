# SPDX-License-Identifier: Apache-2.0
"""What the schedulers of token heads share."""

import pytest
import torch

from mar_hf import TokenDDPMScheduler, TokenFlowScheduler
from mar_hf.schedulers.scheduling_token_base import as_device


SCHEDULERS = [TokenDDPMScheduler, TokenFlowScheduler]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    "content", ["null", "[1]", "{", "[" * 100_000, '"x"'], ids=["null", "list", "cut", "deep", "text"]
)
def test_broken_configurations_are_named(scheduler, content, tmp_path):
    scheduler(num_train_timesteps=900).save_pretrained(tmp_path)
    assert len(scheduler.from_pretrained(tmp_path)) == 900
    (tmp_path / "scheduler_config.json").write_text(content)
    with pytest.raises(ValueError, match="scheduler_config.json"):
        scheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_inputs_are_not_scaled(scheduler):
    sample = torch.randn(2, 4)
    assert scheduler().scale_model_input(sample, 999) is sample
    assert scheduler().init_noise_sigma == 1.0 and scheduler().order == 1


def test_devices():
    assert as_device(None) == as_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="`device` has to be a device of torch, got 'nowhere'"):
        as_device("nowhere")
