# SPDX-License-Identifier: Apache-2.0
"""The backbones' output as an object, a mapping and a tuple."""

import torch
from transformers.utils import ModelOutput

from mar_hf import BackboneOutput


def test_order_and_names():
    loss, condition, encoded = torch.tensor(1.0), torch.ones(2, 3), torch.zeros(2)
    output = BackboneOutput(loss=loss, condition=condition, encoder_last_hidden_state=encoded)
    assert isinstance(output, ModelOutput)
    assert list(output) == ["loss", "condition", "encoder_last_hidden_state"]
    assert all(a is b for a, b in zip(output.to_tuple(), (loss, condition, encoded), strict=True))
    assert output["condition"] is output.condition is condition


def test_what_is_none_is_not_there():
    output = BackboneOutput(condition=torch.ones(1))
    assert list(output) == ["condition"] and len(output.to_tuple()) == 1
    assert output.loss is None
