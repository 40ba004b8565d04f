# SPDX-License-Identifier: Apache-2.0
"""What modulated heads share: the layers before the blocks, and projections that several blocks share."""

import pytest
import torch

from common import randomise, seeded
from mar_hf import DiffusionHead, TokenDDPMScheduler
from mar_hf.heads.modulation import Float32Linear, TimeEmbedding


SIZES = {"token_dim": 3, "condition_dim": 6, "hidden_size": 8, "num_layers": 5}


def test_each_block_has_a_projection_of_its_own_unless_told():
    names = dict(DiffusionHead(**SIZES).named_parameters())
    assert sum(name.endswith("modulation.weight") and "blocks" in name for name in names) == 5
    assert names.keys() == dict(DiffusionHead(**SIZES, modulation_groups=5).named_parameters()).keys()


@pytest.mark.parametrize("groups, first", [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (4, [0, 2, 3, 4])])
def test_groups_of_blocks_share_one(groups, first):
    head = DiffusionHead(**SIZES, modulation_groups=groups)
    assert [number for number, block in enumerate(head.blocks) if block.modulation is not None] == first


@torch.no_grad()
def test_a_shared_projection_is_the_same_one_copied():
    shared, apart = (randomise(DiffusionHead(**SIZES, modulation_groups=groups)) for groups in (2, None))
    state = shared.state_dict()
    for number in range(5):
        for kind in ("weight", "bias"):
            state[f"blocks.{number}.modulation.{kind}"] = state[f"blocks.{0 if number < 3 else 3}.modulation.{kind}"]
    apart.load_state_dict(state)
    inputs = (torch.randn(4, 3, generator=seeded(1)), torch.arange(4), torch.randn(4, 6, generator=seeded(2)))
    assert torch.equal(shared(*inputs), apart(*inputs))
    call = {"condition": inputs[2][None], "scheduler": TokenDDPMScheduler(max_timestep=900), "num_steps": 3}
    assert torch.equal(shared.sample(**call, generator=seeded(3)), apart.sample(**call, generator=seeded(3)))


@pytest.mark.parametrize("groups", [0, 6, True, 1.0, "2"])
def test_groups_that_can_t_be(groups):
    with pytest.raises(ValueError, match="`modulation_groups`"):
        DiffusionHead(**SIZES, modulation_groups=groups)


def test_times_are_embedded_in_float32():
    embedding = TimeEmbedding(8).to(torch.bfloat16)
    assert isinstance(embedding.linear_1, Float32Linear) and embedding.linear_1.weight.dtype == torch.bfloat16
    assert embedding(torch.arange(3)).dtype == torch.float32
