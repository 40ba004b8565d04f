# SPDX-License-Identifier: Apache-2.0
"""Linear layers by oneDNN, which torch's `nn.Linear` uses for float32 on no CPU."""

import platform
import sys
from math import ceil
from pathlib import Path

import torch
from torch import nn


# For which weights are laid out. The layout serves other numbers of rows as well.
TYPICAL_ROWS = 64
# From so many weights on, MKL streams them slowly for two or more rows, whoever made the processor.
LARGE_WEIGHT = 2**19
# A smaller weight needs so many multiplications, or oneDNN's calls take longer than its sums save.
MANY_PRODUCTS = 2**27
# For more rows, MKL is as fast or faster on the processors of its own maker.
FEW_ROWS = 128
# Makers on whose processors it is not. Makers that are not known get what Intel's processors get.
SLOW_MKL = {"AuthenticAMD", "HygonGenuine"}
# In bfloat16, torch's own layers are oneDNN's, too, and lay out the weight anew in each call. MKL has no part in it.
FEW_PRODUCTS_BF16 = 2**19
# Just below the largest block by which glibc still adjusts itself, see `_keep_freed_memory`.
LARGEST_BLOCK = 2**25 - 2**14
# What oneDNN applies to what it has just computed, by its own name.
ACTIVATIONS = {nn.GELU: "gelu", nn.SiLU: "swish"}


def cpu_maker() -> str:
    """Who made the processor: "GenuineIntel", "AuthenticAMD", ..., as it says itself; empty where nothing tells."""
    info = Path("/proc/cpuinfo")
    if not info.exists():  # Windows names the maker last
        return (platform.processor().split() or [""])[-1]
    with info.open(encoding="utf-8") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), "")


CPU_MAKER = cpu_maker()


def winning_rows(in_features: int, out_features: int, dtype: torch.dtype, maker: str) -> range:
    """For how many rows a linear layer is computed sooner by oneDNN, or as soon, than by torch.

    A rule and no measurement on the spot, since both sum in another order: what a noisy clock chooses would not give
    the same images again. `benchmarks/layers.py` measures what it is made of, and docs/speed.md says where it was.

    Args:
        in_features (`int`): numbers in a row of the input.
        out_features (`int`): numbers in a row of the output.
        dtype (`torch.dtype`): of the weight, float32 or bfloat16.
        maker (`str`): of the processor, see `cpu_maker`.

    Returns:
        `range`: of numbers of rows; empty where oneDNN never wins.
    """
    weights = max(1, in_features * out_features)
    if dtype == torch.bfloat16:
        return range(ceil(FEW_PRODUCTS_BF16 / weights), sys.maxsize)
    least = 2 if weights >= LARGE_WEIGHT else ceil(MANY_PRODUCTS / weights)
    return range(least, sys.maxsize if maker in SLOW_MKL else FEW_ROWS + 1)


def by_onednn(module: nn.Module) -> nn.Module:
    """A view of a model whose linear layers compute by oneDNN where that is faster: the same sums in another order.

    MKL, which torch takes otherwise, reaches half of that on some AMD CPUs and nine tenths on others, and streams
    weights slowly for a few rows. `winning_rows` says which layers compute by oneDNN, and for how many rows. Their
    weights are copied into oneDNN's layout when they are first used so, and the copies dropped with the view: they
    take as much memory as the weights. The model itself stays as it is, so that other threads, callbacks and hooks
    see nothing of this, and a view of each call is never out of date.

    A block that says which of its layers its `activation` follows (`activated_linear`) gets both in one pass.

    The model itself is returned on other devices and processors than x86, in other dtypes than float32 and bfloat16,
    under autocast, where it is compiled or has a `forward` of its own (accelerate's hooks), where oneDNN wins for none
    of its layers, and where torch has no oneDNN or was told not to use it
    (`torch.backends.mkldnn.flags(enabled=False)`). Layers whose weight is computed (pruning, quantisation) stay as
    they are. Where gradients are computed, as callbacks may, layers compute as ever.

    One thing outlasts the view: glibc's allocator keeps up to 64 MiB of freed memory for the process.

    Args:
        module (`torch.nn.Module`): the model; its weights must not change while the view is used.

    Returns:
        `torch.nn.Module`: the view, or the model.
    """
    dtypes = _dtypes(module)
    layers = [part for part in module.modules() if is_plain_linear(part) and part.weight.dtype in dtypes]
    layers = [layer for layer in layers if layer.weight.device.type == "cpu"]
    rows = {one: winning_rows(one.in_features, one.out_features, one.weight.dtype, CPU_MAKER) for one in layers}
    rows = {layer: winning for layer, winning in rows.items() if winning}
    if not rows:
        return module
    _keep_freed_memory()
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
