# SPDX-License-Identifier: Apache-2.0
"""What several test files build and measure with."""

import copy

import torch
from torch import nn

from mar_hf import ARForImageGeneration, MARForImageGeneration
from mar_hf.models import BackboneConfig, BackbonePreTrainedModel


MODELS = {"mar": MARForImageGeneration, "ar": ARForImageGeneration}
LAYERS = {"mar": {"num_encoder_layers": 1, "num_decoder_layers": 1}, "ar": {"num_layers": 2}}


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest magnitude expected; shapes have to agree."""
    assert found.shape == expected.shape
    return ((found.detach() - expected).abs().max() / expected.abs().max()).item()


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes and numbers, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def randomise(module: torch.nn.Module, seed: int = 0, gain: float = 0.5) -> torch.nn.Module:
    """Random values for every parameter: a fresh head starts at zero, where nothing depends on anything."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
    return module.eval()


def tiny_config(backbone: str = "mar", **changes) -> BackboneConfig:
    """4 x 4 tokens of 12 numbers, 3 classes, 32 wide, two layers."""
    settings = {
        "grid_height": 4,
        "grid_width": 4,
        "token_dim": 12,
        "num_classes": 3,
        "num_class_tokens": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "head_config": {"num_layers": 2, "hidden_size": 32},
        **LAYERS[backbone],
    }
    return MODELS[backbone].config_class(**{**settings, **changes})


def tiny_model(backbone: str = "mar", **changes) -> BackbonePreTrainedModel:
    """The same model every time, in eval mode, none of its weights at zero."""
    return randomise(MODELS[backbone](tiny_config(backbone, **changes)))


class Stored(nn.Linear):
    """A layer whose weights are stored in another type than it computes in, as quantised ones are."""

    def __init__(self, layer: nn.Linear, storage: torch.dtype):
        super().__init__(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
        self.kept = layer.weight.detach()
        self.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=storage), requires_grad=False)
        # 4 and 8 bits leave the bias alone, casting layer by layer does not.
        bias = layer.bias.detach()
        self.bias = nn.Parameter(bias.to(storage) if storage.is_floating_point else bias, requires_grad=False)
        self.kept_bias = bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        assert states.dtype == self.kept.dtype
        return nn.functional.linear(states, self.kept, self.kept_bias)


def store(module: nn.Module, storage: torch.dtype) -> nn.Module:
    """The same with every linear layer stored otherwise, but for those that say themselves what they compute in."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Stored(child, storage))
    return module
