# SPDX-License-Identifier: Apache-2.0
"""Linear layers by oneDNN, which torch's `nn.Linear` uses for float32 on no CPU."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn


# For which weights are laid out. The layout serves other numbers of rows as well.
TYPICAL_ROWS = 64
# Below so many multiplications the call itself takes longer than it saves.
FEW_PRODUCTS = 2**19
# Just below the largest block by which glibc still adjusts itself, see `_keep_freed_memory`.
LARGEST_BLOCK = 2**25 - 2**14
# What oneDNN applies to what it has just computed: its name and variant.
ACTIVATIONS = {nn.functional.gelu: ("gelu", "none"), nn.functional.silu: ("swish", "")}


@contextmanager
def onednn_linears(module: nn.Module) -> Iterator[None]:
    """Let the linear layers of a model compute by oneDNN: the same sums in another order, sooner.

    MKL, which torch takes otherwise, reaches half of that on some AMD CPUs and nine tenths on others, and streams
    weights slowly for a few rows. Each weight is copied into oneDNN's layout when it is first used, and the copy
    dropped at the end: that takes as much memory as the weights, and nothing can be out of date when the model is
    trained in between.

    Nothing happens on other devices and processors than x86, in other dtypes than float32 and bfloat16, under
    autocast, in models that are compiled or whose modules have a `forward` of their own (accelerate's hooks), in
    layers whose weight is computed (pruning), and where torch has no oneDNN or was told not to use it
    (`torch.backends.mkldnn.flags(enabled=False)`).
    Where gradients are computed inside, as callbacks may, layers compute as ever.

    One thing outlasts the block: glibc's allocator keeps up to 64 MiB of freed memory for the process.

    Args:
        module (`torch.nn.Module`): the model; its weights must not change inside.

    Yields:
        nothing.
    """
    layers = _layers(module)
    if layers:
        _keep_freed_memory()
    for layer in layers:
        layer.forward = _ByOneDNN(layer)
    try:
        yield
    finally:
        for layer in layers:
            # Another thread's call may have ended in between.
            vars(layer).pop("forward", None)


def _layers(module: nn.Module) -> list[nn.Linear]:
    """The layers that can be replaced; none if anything about the model is out of the ordinary."""
    backend = torch.backends.mkldnn
    if not (backend.is_available() and backend.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return []
    if platform.machine() not in ("x86_64", "AMD64"):  # never tried on others
        return []
    modules = list(module.modules())
    own = any(has_own_forward(part) or part._compiled_call_impl is not None for part in modules)
    if own or hasattr(module, "_orig_mod") or torch.is_autocast_enabled("cpu"):
        return []
    dtypes = {torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}
    return [
        part
        for part in modules
        if is_plain_linear(part) and part.weight.device.type == "cpu" and part.weight.dtype in dtypes
    ]


def _keep_freed_memory() -> None:
    """Let glibc keep more of what is freed, for the next step's buffers: up to 64 MiB, from now on in this process.

    Otherwise they go back to the system and come again page by page, which takes a twentieth of the head's time. glibc
    keeps twice the size of the largest block, up to 32 MiB, that was ever mapped and freed; this one is not written
    to. Where another allocator serves, or its settings are given (`MALLOC_TRIM_THRESHOLD_`), nothing changes.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module has another `forward` than its class, such as accelerate's hooks.

    Args:
        module (`torch.nn.Module`): the module.

    Returns:
        `bool`. False also where hooks have been removed, which leaves a method behind.
    """
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of which weight and bias say all.

    Args:
        module (`torch.nn.Module`): the module.

    Returns:
        `bool`. False for adapted, quantised, pruned and offloaded layers; True inside of [`onednn_linears`].
    """
    by_onednn = isinstance(vars(module).get("forward"), _ByOneDNN)
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward  # subclasses may compute otherwise
        and (by_onednn or not has_own_forward(module))
        and "weight" in module._parameters  # pruning and parametrizations compute it in each call
        and type(module.weight.data) is torch.Tensor  # torchao's weights are subclasses
        and module.weight.device.type != "meta"  # to be loaded when called
    )


def apply_activated(
    layer: nn.Module, hidden_states: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """A layer and the activation after it; in one go inside of [`onednn_linears`].

    Args:
        layer (`torch.nn.Module`): a linear layer, or what has been put in its place.
        hidden_states (`torch.Tensor` of shape `(..., in_features)`): input.
        activation (`Callable`): one of `torch.nn.functional`.

    Returns:
        `torch.Tensor` of shape `(..., out_features)`.
    """
    forward = layer.forward  # looked up once: another thread's call may end at any time and put the old one back
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if activation in ACTIVATIONS and isinstance(forward, _ByOneDNN) and not hooked:
        return forward(hidden_states, activation)
    return activation(layer(hidden_states))


class _ByOneDNN:
    """`nn.Linear.forward`, by oneDNN where that is faster, with an activation after it if one is given."""

    def __init__(self, layer: nn.Linear):
        self.layer, self.weight, self.packed = layer, layer.weight, None
        self.compute = torch.ops.mkldnn._linear_pointwise.default

    def __call__(
        self, hidden_states: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        few = hidden_states.numel() * self.layer.out_features < FEW_PRODUCTS
        other = weight is not self.weight or hidden_states.dtype != weight.dtype  # `functional_call` swaps weights
        # oneDNN's operator would cut the graph of gradients.
        if few or other or torch.is_grad_enabled():
            output = nn.functional.linear(hidden_states, weight, bias)
            return output if activation is None else activation(output)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        name, variant = ("none", "") if activation is None else ACTIVATIONS[activation]
        return self.compute(hidden_states, self.packed, bias, name, [], variant)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of the layer compute with their own weights, as ever.
        return _plain_forward, (self.layer,)


def _plain_forward(layer: nn.Linear) -> MethodType:
    """The forward of the layer's class."""
    return MethodType(type(layer).forward, layer)
