# SPDX-License-Identifier: Apache-2.0
"""Modulated heads computed another way, and heads whose answer is known."""

import math

import torch
from torch import nn

from mar_hf.heads import ModulatedHead


def published_mlp(head: ModulatedHead, x: torch.Tensor, c: torch.Tensor, **times: torch.Tensor) -> torch.Tensor:
    """What MAR's MLP gives for noisy tokens and conditions (rows, ...), from its weights in float64.

    `times` are the inputs (rows,) of its embeddings of times, by their names.
    """
    weights = {name: parameter.double() for name, parameter in head.named_parameters()}

    def linear(name, value):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(value):
        return value / (1 + torch.exp(-value))

    def normalised(value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    embedding = linear("condition_proj", c.double())
    for name, t in times.items():
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        embedding = embedding + linear(f"{name}.linear_2", silu(linear(f"{name}.linear_1", waves)))
    embedding = silu(embedding)
    h = linear("token_proj", x.double())
    for i in range(len(head.blocks)):
        if f"blocks.{i}.modulation.weight" in weights:
            shift, scale, gate = linear(f"blocks.{i}.modulation", embedding).chunk(3, -1)
        update = normalised(h) * weights[f"blocks.{i}.norm.weight"] + weights[f"blocks.{i}.norm.bias"]
        update = silu(linear(f"blocks.{i}.linear_1", update * (1 + scale) + shift))
        h = h + gate * linear(f"blocks.{i}.linear_2", update)
    shift, scale = linear("out_modulation", embedding).chunk(2, -1)
    return linear("out_proj", normalised(h) * (1 + scale) + shift)


@torch.no_grad()
def make_linear(head: ModulatedHead, factors: torch.Tensor) -> ModulatedHead:
    """Give a head of width 256 weights with which its output is factors[t] x, and 0 beyond a token's numbers.

    The layer norm is linear in x as long as two large entries decide its scale, SiLU is linear far from 0, and the
    factors are a sum of the time embedding's waves.
    """
    n, width, large, far, length = head.token_dim, 256, 1000.0, 30.0, len(factors)
    for parameter in head.parameters():
        parameter.zero_()
    head.time_embedding.linear_1.weight.fill_diagonal_(1)
    head.time_embedding.linear_1.bias.fill_(far)
    head.time_embedding.linear_2.weight.fill_diagonal_(1)
    # Entries x, -x, large, -large: after the norm, x is there times sqrt(width / 2) / large.
    head.token_proj.weight[:n], head.token_proj.weight[n : 2 * n] = torch.eye(n), -torch.eye(n)
    head.token_proj.bias[2 * n], head.token_proj.bias[2 * n + 1] = large, -large
    head.out_proj.weight[:n, :n] = torch.eye(n) * large / (width / 2) ** 0.5
    waves = nn.functional.silu(head.time_embedding(torch.arange(length))).double() - far
    waves = torch.cat([waves, torch.ones(length, 1)], 1)
    solution = torch.linalg.lstsq(waves, (factors - 1)[:, None], rcond=1e-5, driver="gelsd").solution[:, 0]
    head.out_modulation.weight[width : width + n] = solution[:-1]
    head.out_modulation.bias[width : width + n] = solution[-1] - far * solution[:-1].sum()
    return head
