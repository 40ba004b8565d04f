# SPDX-License-Identifier: Apache-2.0
"""Linear layers by oneDNN, which torch's `nn.Linear` uses for float32 on no CPU."""

import platform
import sys
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn


# For which weights are laid out. The layout serves other numbers of rows as well.
TYPICAL_ROWS = 64
# In bfloat16, torch's own layers are oneDNN's, too, and lay out the weight anew in each call: only tiny products lose.
FEW_PRODUCTS_BF16 = 2**19
# Just below the largest block by which glibc still adjusts itself, see `_keep_freed_memory`.
LARGEST_BLOCK = 2**25 - 2**14
# What oneDNN applies to what it has just computed, by its own name.
ACTIVATIONS = {nn.GELU: "gelu", nn.SiLU: "swish"}


class Rule(NamedTuple):
    """For which float32 layers oneDNN is faster than MKL on some processors."""

    large: int  # so many weights or more, MKL reads slowly for a few rows
    rows: range  # for which it does; for more of them, where the range ends, it is as fast
    products: int  # so many multiplications by fewer weights are worth oneDNN's call


# By whether MKL leaves half of each vector idle, as it does on AMD's processors with AVX-512.
RULES = {
    True: Rule(2**19, range(2, sys.maxsize), 2**22),
    False: Rule(2**20, range(4, 65), sys.maxsize),
}


def cpu_maker() -> str:
    """Who made the processor, as it says itself, such as "GenuineIntel"; empty where nothing tells.

    Returns:
        `str`: twelve characters or none.
    """
    info = Path("/proc/cpuinfo")
    if not info.exists():  # Windows names the maker last
        return (platform.processor().split() or [""])[-1]
    with info.open(encoding="utf-8") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), "")


MKL_IS_NARROW = torch.backends.cpu.get_cpu_capability() == "AVX512" and cpu_maker() in ("AuthenticAMD", "HygonGenuine")


def winning_rows(in_features: int, out_features: int, dtype: torch.dtype, mkl_is_narrow: bool) -> range:
    """For how many rows a linear layer takes oneDNN less time than torch.

    A rule, and no measurement on the spot: the two sum in another order, so a choice that hangs on a clock would not
    give the same images again. docs/speed.md says where it was measured, and `benchmarks/layers.py` measures it anew.

    Args:
        in_features (`int`): numbers in a row of the input.
        out_features (`int`): numbers in a row of the output.
        dtype (`torch.dtype`): of the weight, float32 or bfloat16.
        mkl_is_narrow (`bool`): key of `RULES`: what the processor is.

    Returns:
        `range`: of numbers of rows; empty where torch is never slower.
    """
    weights = max(1, in_features * out_features)
    if dtype == torch.bfloat16:
        return range(ceil(FEW_PRODUCTS_BF16 / weights), sys.maxsize)
    rule = RULES[mkl_is_narrow]
    return rule.rows if weights >= rule.large else range(ceil(rule.products / weights), rule.rows.stop)


def by_onednn(module: nn.Module) -> nn.Module:
    """A view of a model whose linear layers compute by oneDNN where that is faster: the same sums in another order.

    MKL, which torch takes otherwise, reaches half of that on some AMD CPUs and nine tenths on others, and streams
    large weights slowly for a few rows. `winning_rows` says which layers compute by oneDNN, and for how many rows.
    Their weights are copied into oneDNN's layout when they are first used so, and the copies dropped with the view:
    they take as much memory as the weights. The model itself stays as it is, so that other threads, callbacks and
    hooks see nothing of this, and a view of each call is never out of date.

    A block that says which of its layers its `activation` follows (`activated_linear`) gets both in one pass.

    The model itself is returned on other devices and processors than x86, in other dtypes than float32 and bfloat16,
    under autocast, where it is compiled or has a `forward` of its own (accelerate's hooks), where oneDNN wins for none
    of its layers, and where torch has no oneDNN or was told not to use it
    (`torch.backends.mkldnn.flags(enabled=False)`). Layers whose weight is computed (pruning, quantisation) stay as
    they are. Where gradients are computed, as callbacks may, layers compute as ever.

    One thing outlasts the call, view or not: glibc's allocator keeps up to 64 MiB of freed memory for the process.

    Args:
        module (`torch.nn.Module`): the model; its weights must not change while the view is used.

    Returns:
        `torch.nn.Module`: the view, or the model.
    """
    dtypes = _dtypes(module)
    layers = [part for part in module.modules() if is_plain_linear(part) and part.weight.dtype in dtypes]
    layers = [layer for layer in layers if layer.weight.device.type == "cpu"]
    rows = {one: winning_rows(one.in_features, one.out_features, one.weight.dtype, MKL_IS_NARROW) for one in layers}
    rows = {layer: winning for layer, winning in rows.items() if winning}
    if layers:
        _keep_freed_memory()
    if not rows:
        return module
    view = _view(module, rows, {})
    for block in view.modules():
        layer = getattr(block, getattr(block, "activated_linear", ""), None)
        if isinstance(layer, OneDNNLinear):
            name = ACTIVATIONS.get(type(block.activation))
            is_exact = getattr(block.activation, "approximate", "none") == "none"
            hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (layer, block.activation))
            if name is not None and is_exact and not hooked:
                layer.activation, layer.activation_name = block.activation, name
                block.activation = nn.Identity()
    return view


def _view(module: nn.Module, rows: dict[nn.Module, range], views: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same tree of modules once more, on the same tensors, with other modules for linear layers that win."""
    if module not in views:
        views[module] = view = nn.Module.__new__(OneDNNLinear if module in rows else type(module))
        vars(view).update(vars(module))
        vars(view).pop("forward", None)  # the class's own, left by a hook that was removed
        for name in ("_parameters", "_buffers", "_modules"):
            vars(view)[name] = vars(module)[name].copy()
        for name, child in module._modules.items():
            view._modules[name] = None if child is None else _view(child, rows, views)
        if module in rows:
            vars(view).update(activation=None, activation_name="none", rows=rows[module])
            vars(view).update(packed=None, packed_weight=module.weight)
    return views[module]


def _dtypes(module: nn.Module) -> set[torch.dtype]:
    """What oneDNN can compute here; nothing if anything about the model is out of the ordinary."""
    backend = torch.backends.mkldnn
    if not (backend.is_available() and backend.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return set()
    if platform.machine() not in ("x86_64", "AMD64"):  # never tried on others
        return set()
    own = any(has_own_forward(part) or part._compiled_call_impl is not None for part in module.modules())
    if own or hasattr(module, "_orig_mod") or torch.is_autocast_enabled("cpu"):
        return set()
    return {torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}


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
        `bool`. False for adapted, quantised, pruned and offloaded layers; True for those of [`by_onednn`].
    """
    return (
        isinstance(module, nn.Linear)
        # Subclasses may compute otherwise.
        and (isinstance(module, OneDNNLinear) or type(module).forward is nn.Linear.forward)
        and not has_own_forward(module)
        and "weight" in module._parameters  # pruning and parametrizations compute it in each call
        and type(module.weight.data) is torch.Tensor  # torchao's weights are subclasses
        and module.weight.device.type != "meta"  # to be loaded when called
    )


class OneDNNLinear(nn.Linear):
    """A layer in a view of [`by_onednn`]: by oneDNN where that is faster, with an activation after it or none."""

    activation: nn.Module | None
    activation_name: str  # oneDNN's
    rows: range  # for how many it is faster
    packed: torch.Tensor | None  # the weight in oneDNN's layout, from the first use on
    packed_weight: nn.Parameter

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., in_features)`): input.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`.
        """
        weight, bias, activation = self.weight, self.bias, self.activation
        loses = hidden_states.shape[:-1].numel() not in self.rows
        # `functional_call` swaps weights.
        if loses or weight is not self.packed_weight or hidden_states.dtype != weight.dtype or torch.is_grad_enabled():
            output = nn.functional.linear(hidden_states, weight, bias)
            return output if activation is None else activation(output)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        name, variant = self.activation_name, "none" if self.activation_name == "gelu" else ""
        return torch.ops.mkldnn._linear_pointwise.default(hidden_states, self.packed, bias, name, [], variant)
