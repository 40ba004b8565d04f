# SPDX-License-Identifier: Apache-2.0
"""Linear layers by oneDNN, which torch's `nn.Linear` uses for float32 on no CPU."""

import platform
from collections.abc import Collection

import torch
from torch import nn


# For which weights are laid out. The layout serves other numbers of rows as well.
TYPICAL_ROWS = 64
# Below so many multiplications the call itself takes longer than it saves.
FEW_PRODUCTS = 2**19
# Just below the largest block by which glibc still adjusts itself, see `_keep_freed_memory`.
LARGEST_BLOCK = 2**25 - 2**14
# What oneDNN applies to what it has just computed, by its own name.
ACTIVATIONS = {nn.GELU: "gelu", nn.SiLU: "swish"}


def by_onednn(module: nn.Module) -> nn.Module:
    """A view of a model whose linear layers compute by oneDNN: the same sums in another order, sooner.

    MKL, which torch takes otherwise, reaches half of that on some AMD CPUs and nine tenths on others, and streams
    weights slowly for a few rows. Each weight is copied into oneDNN's layout when it is first used, and the copy
    dropped with the view: that takes as much memory as the weights. The model itself stays as it is, so that other
    threads, callbacks and hooks see nothing of this, and a view of each call is never out of date.

    A block that says which of its layers its `activation` follows (`activated_linear`) gets both in one pass.

    The model itself is returned on other devices and processors than x86, in other dtypes than float32 and bfloat16,
    under autocast, where it is compiled or has a `forward` of its own (accelerate's hooks), and where torch has no
    oneDNN or was told not to use it (`torch.backends.mkldnn.flags(enabled=False)`). Layers whose weight is computed
    (pruning, quantisation) stay as they are. Where gradients are computed, as callbacks may, layers compute as ever.

    One thing outlasts the view: glibc's allocator keeps up to 64 MiB of freed memory for the process.

    Args:
        module (`torch.nn.Module`): the model; its weights must not change while the view is used.

    Returns:
        `torch.nn.Module`: the view, or the model.
    """
    dtypes = _dtypes(module)
    layers = [part for part in module.modules() if is_plain_linear(part) and part.weight.dtype in dtypes]
    layers = {layer for layer in layers if layer.weight.device.type == "cpu"}
    if not layers:
        return module
    _keep_freed_memory()
    view = _view(module, layers, {})
    for block in view.modules():
        layer = getattr(block, getattr(block, "activated_linear", ""), None)
        if isinstance(layer, OneDNNLinear) and _activation_name(block.activation) is not None:
            if not any(part._forward_hooks or part._forward_pre_hooks for part in (layer, block.activation)):
                layer.activation, block.activation = block.activation, nn.Identity()
    return view


def _view(module: nn.Module, layers: Collection[nn.Module], views: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same tree of modules once more, on the same tensors, with other modules for some linear layers."""
    if module not in views:
        views[module] = view = nn.Module.__new__(OneDNNLinear if module in layers else type(module))
        vars(view).update(vars(module))
        vars(view).pop("forward", None)  # the class's own, left by a hook that was removed
        for name in ("_parameters", "_buffers", "_modules"):
            vars(view)[name] = vars(module)[name].copy()
        for name, child in module._modules.items():
            view._modules[name] = None if child is None else _view(child, layers, views)
        if isinstance(view, OneDNNLinear):
            vars(view).update(activation=None, packed=None, packed_weight=module.weight)
    return views[module]


def _activation_name(activation: nn.Module) -> str | None:
    """What oneDNN calls it; None where it has no such."""
    is_exact = getattr(activation, "approximate", "none") == "none"
    return ACTIVATIONS.get(type(activation)) if is_exact else None


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
        few = hidden_states.numel() * self.out_features < FEW_PRODUCTS
        # `functional_call` swaps weights.
        other = weight is not self.packed_weight or hidden_states.dtype != weight.dtype
        # oneDNN's operator would cut the graph of gradients.
        if few or other or torch.is_grad_enabled():
            output = nn.functional.linear(hidden_states, weight, bias)
            return output if activation is None else activation(output)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        name = "none" if activation is None else _activation_name(activation)
        variant = "none" if name == "gelu" else ""
        return torch.ops.mkldnn._linear_pointwise.default(hidden_states, self.packed, bias, name, [], variant)
