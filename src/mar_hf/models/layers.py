# SPDX-License-Identifier: Apache-2.0
"""What backbones and the aligner of texts are built from: attention, MLP and blocks; and what comes in, checked."""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..onednn import is_plain_linear
from ..utils import draw
from .configuration_backbone import BackboneConfig


# Attention to a context absorbs the layers around it up to these limits: tokens of the context, as a share of a head's
# width; and memory for the keys and values of a block, which are as wide as the block for each head.
MOST_ABSORBED = 0.5
ABSORBED_BYTES = 16 * 2**20
# What attention needs of a context: `ContextAttention.read` says more.
ContextStates = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def check_inputs(
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    num_tokens: int,
    token_dim: int,
    positions: torch.Tensor | None = None,
    num_masked: int | None = None,
) -> None:
    """Refuse tokens, masks and positions of wrong shapes.

    Args:
        tokens (`torch.Tensor`): has to be of shape `(batch, num_tokens, token_dim)`.
        mask (`torch.Tensor`, *optional*): has to be bool of shape `(batch, num_tokens)`.
        num_tokens (`int`): of the model.
        token_dim (`int`): of the model.
        positions (`torch.Tensor`, *optional*): has to be int64 of shape `(batch, count)`. The range is checked where
            that needs no waiting: on the CPU.
        num_masked (`int`, *optional*): has to be an integer, at most the tokens.

    Raises:
        ValueError: if one does not fit.
    """
    is_batch = isinstance(tokens, torch.Tensor) and tokens.ndim == 3 and len(tokens) > 0
    if not is_batch or tokens.shape[1:] != (num_tokens, token_dim):
        raise ValueError(f"`tokens` has to be of shape (batch, {num_tokens}, {token_dim}), got {_form(tokens)}.")
    if tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"`tokens` has to hold real numbers, got {tokens.dtype}.")
    if positions is not None:
        fits = isinstance(positions, torch.Tensor) and positions.ndim == 2 and len(positions) == len(tokens)
        if not fits:
            raise ValueError(f"`positions` has to be of shape ({len(tokens)}, count), got {_form(positions)}.")
        if positions.dtype != torch.int64:
            raise ValueError(f"`positions` has to be int64, got {positions.dtype}.")
        if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
            least, most = positions.min().item(), positions.max().item()
            if least < 0 or most >= num_tokens:
                raise ValueError(f"`positions` has to lie in 0..{num_tokens - 1}, got {least}..{most}.")
    if num_masked is not None:
        whole = isinstance(num_masked, int) and not isinstance(num_masked, bool)
        if not whole or not 0 <= num_masked <= num_tokens:
            raise ValueError(f"`num_masked` has to lie in 0..{num_tokens}, got {num_masked!r}.")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
        dtype = f"{mask.dtype} " if isinstance(mask, torch.Tensor) else ""
        raise ValueError(f"`mask` has to be bool of shape {tuple(tokens.shape[:2])}, got {dtype}{_form(mask)}.")


def fill_labels(
    class_labels: torch.Tensor | None,
    tokens: torch.Tensor,
    null_class: int,
    dropout: float = 0.0,
    dropped: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Rows of the class embedding: the labels, with the null class for None and for a share of them.

    Args:
        class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): int64; None means the null class. The range is
            checked where that needs no waiting: of labels on the CPU.
        tokens (`torch.Tensor` of shape `(batch, ...)`): for the number of images and the device.
        null_class (`int`): number of the null class, the last row.
        dropout (`float`, *optional*, defaults to 0.0): share of labels to be replaced by the null class.
        dropped (`torch.Tensor` of shape `(batch,)`, *optional*): bool, True where the label does not count anyway.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): draws which are replaced.

    Returns:
        `torch.Tensor` of shape `(batch,)`: int64, on the device of `tokens`.

    Raises:
        ValueError: if the labels are of another shape, no integers or out of range.
    """
    # Not the embedding's device: weights that are loaded when they are called for wait on "meta".
    batch_size, device = len(tokens), tokens.device
    if class_labels is None:
        return torch.full((batch_size,), null_class, device=device)
    if not isinstance(class_labels, torch.Tensor) or class_labels.shape != (batch_size,):
        raise ValueError(f"`class_labels` has to be of shape {(batch_size,)}, got {_form(class_labels)}.")
    if class_labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`class_labels` has to be int64, got {class_labels.dtype}.")
    if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = class_labels.min().item(), class_labels.max().item()
        if least < 0 or most > null_class:
            raise ValueError(
                f"`class_labels` has to lie in 0..{null_class}, the last being the null class, got "
                f"{class_labels.tolist()}."
            )
    if dropped is not None:
        class_labels = torch.where(dropped, null_class, class_labels)
    if dropout > 0:
        dropped = draw(torch.rand, (batch_size,), generator, device) < dropout
        class_labels = torch.where(dropped, null_class, class_labels)
    return class_labels


def _form(value: object) -> str:
    """What a message says of a value that is not the tensor that it should be."""
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `attn_implementation="eager"`.

    Args:
        module (`torch.nn.Module`): the attention module, for its training mode.
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): queries.
        key (`torch.Tensor` of shape `(batch, heads, key_length, head_dim)`): keys.
        value (`torch.Tensor` of the keys' shape): values.
        attention_mask (`torch.Tensor`, *optional*): added to the scores.
        scaling (`float`): multiplies the scores.
        dropout (`float`, *optional*, defaults to 0.0): of the probabilities.
        kwargs (`object`): of other implementations; not needed here.

    Returns:
        two `torch.Tensor`: output of shape `(batch, length, heads, head_dim)`, probabilities `(batch, heads, length,
        key_length)`.
    """
    scores = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores + attention_mask
    # It sums in float32 in half precision too; autocast gives float32.
    probabilities = nn.functional.softmax(scores, dim=-1).to(query.dtype)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), probabilities


class SelfAttention(nn.Module):
    """Multi-head self-attention, with rotary positions and a cache where they are given.

    Args:
        config ([`BackboneConfig`]): for dropout and implementation.
        hidden_size (`int`): width.
        num_heads (`int`): attention heads.
        layer_index (`int`, *optional*, defaults to 0): place in the cache.
    """

    def __init__(self, config: BackboneConfig, hidden_size: int, num_heads: int, layer_index: int = 0):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.layer_index = layer_index
        self.scaling = (hidden_size // num_heads) ** -0.5
        self.is_causal = False
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): input.
            attention_mask (`torch.Tensor` of shape `(1, 1, length, key_length)`, *optional*): added to the scores.
            is_causal (`bool`, *optional*, defaults to `False`): nothing sees what comes after it; without a mask.
            rotary (two `torch.Tensor`, *optional*): how to `rotate` queries and keys.
            past_key_values (`Cache`, *optional*): takes keys and values in and gives all that it holds.
            wanted (`torch.Tensor` of shape `(batch, wanted)`, *optional*): int64, places in the sequence whose output
                is needed, where it is not that of all.

        Returns:
            two `torch.Tensor`: output of shape `(batch, length, hidden_size)`, or `(batch, wanted, hidden_size)`; and
            probabilities of shape `(batch, heads, length or wanted, key_length)`, None but for eager attention.
        """
        batch, length, width = hidden_states.shape
        # (B, N, 3D) -> 3 x (B, heads, N, head_dim)
        qkv = self.qkv(hidden_states).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if rotary is not None:
            query, key = (rotate(states, turn) for states, turn in zip((query, key), rotary, strict=True))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)
        if wanted is not None:
            query = query.gather(2, wanted[:, None, :, None].expand(-1, self.num_heads, -1, query.shape[-1]))
        output, probabilities = attend(self, query, key, value, attention_mask, is_causal)
        return self.proj(output.reshape(batch, -1, width)), probabilities


class BackboneAttention(SelfAttention):
    """That of a backbone's block: its probabilities are what `output_attentions` asks for."""


class ZeroLinear(nn.Linear):
    """A linear layer whose first weights are zero: what it belongs to adds nothing until it is trained."""


class ContextAttention(nn.Module):
    """Multi-head attention of a sequence to a context, such as a text. It adds nothing until it is trained.

    Args:
        config ([`BackboneConfig`]): for dropout and implementation.
        hidden_size (`int`): width of the sequence.
        num_heads (`int`): attention heads.
        context_dim (`int`): width of the context.
    """

    def __init__(self, config: BackboneConfig, hidden_size: int, num_heads: int, context_dim: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = (hidden_size // num_heads) ** -0.5
        self.is_causal = False
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(context_dim, 2 * hidden_size)
        self.proj = ZeroLinear(hidden_size, hidden_size)

    def read(
        self, context: torch.Tensor, attention_mask: torch.Tensor, absorb: bool = False, num_single: int = 0
    ) -> ContextStates:
        """All that `forward` needs of a context, however often it is attended to.

        The layers of queries and output can be absorbed into keys and values (as in DeepSeek-V2, arXiv:2405.04434,
        section 2.1): (x W_q) k^T = x (W_q k^T), (p v) W_o = p (v W_o). For a context of few tokens that is fewer
        products: they then have a column for each head and token instead of one for each number of the width.

        Args:
            context (`torch.Tensor` of shape `(batch, context_length, context_dim)`): the context.
            attention_mask (`torch.Tensor` of shape `(batch, 1, 1, context_length)`): added to the scores.
            absorb (`bool`, *optional*, defaults to `False`): absorb if the context is short, the batch small and the
                layers plain ones: not adapted, quantised or offloaded. Quicker for many steps of long sequences,
                which then have no dropout.
            num_single (`int`, *optional*, defaults to 0): rows at the end in which one token alone is seen. It has all
                of the attention whatever the queries are, so what these rows get is computed here. Without dropout.

        Returns:
            four `torch.Tensor`: keys, values and what is added to the scores, of the rows before; what the rows at the
            end get, of shape `(num_single, 1, hidden_size)`, None where there are none. The first three are of shapes
            `(rows, heads, context_length, head_dim)` twice and the mask's; absorbed, of shapes `(rows, heads *
            context_length, hidden_size)` twice and `(rows, 1, heads * context_length)`.
        """
        states = self.key_value(context).unflatten(-1, (2, self.num_heads, -1))
        key, value = states.permute(2, 0, 3, 1, 4).unbind(0)
        constant = None
        if num_single:
            rows = torch.arange(len(context) - num_single, len(context), device=context.device)
            seen = attention_mask[rows, 0, 0].argmax(-1)  # 0 is added where something is seen
            constant = self.proj(value[rows, :, seen].flatten(1)[:, None])
            key, value, attention_mask = (part[:-num_single] for part in (key, value, attention_mask))
        layers = (self.query, self.proj)
        heads, length, head_dim = key.shape[1:]
        short = length <= MOST_ABSORBED * head_dim and 2 * heads * key.nbytes <= ABSORBED_BYTES
        plain = all(is_plain_linear(one) and not (one._forward_hooks or one._forward_pre_hooks) for one in layers)
        if not (absorb and short and plain):
            return key, value, attention_mask, constant
        # (heads, head_dim, D + 1): weight and bias of the queries; (heads, head_dim, D): weight of the output.
        query = torch.cat([self.query.weight, self.query.bias[:, None]], 1).unflatten(0, (heads, head_dim))
        proj = self.proj.weight.T.unflatten(0, (heads, head_dim))
        key = (key * self.scaling) @ query
        added = key[..., -1] + attention_mask[:, 0]
        # A copy: rows of D + 1 numbers, read as rows of D, take twice as long in bfloat16.
        return (
            key[..., :-1].flatten(1, 2).contiguous(),
            (value @ proj).flatten(1, 2),
            added.flatten(1)[:, None],
            constant,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        constant: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): input.
            key (`torch.Tensor`): from `read`.
            value (`torch.Tensor`): from `read`.
            attention_mask (`torch.Tensor`): from `read`.
            constant (`torch.Tensor`, *optional*): from `read`.

        Returns:
            `torch.Tensor` of shape `(batch, length, hidden_size)`.
        """
        inputs = hidden_states[: len(key)]
        if key.ndim == 3:
            scores = torch.baddbmm(attention_mask, inputs, key.transpose(1, 2)).unflatten(-1, (self.num_heads, -1))
            probabilities = nn.functional.softmax(scores, dim=-1).to(value.dtype)
            output = torch.baddbmm(self.proj.bias, probabilities.flatten(-2), value)
        else:
            query = self.query(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            output = self.proj(attend(self, query, key, value, attention_mask)[0].flatten(-2))
        return output if constant is None else torch.cat([output, constant.expand(-1, output.shape[1], -1)])


def attend(
    module: SelfAttention | ContextAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the implementation of the configuration.

    Args:
        module ([`SelfAttention`] or [`ContextAttention`]): whose attention it is.
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): queries.
        key (`torch.Tensor` of shape `(batch, heads, key_length, head_dim)`): keys.
        value (`torch.Tensor` of the keys' shape): values.
        attention_mask (`torch.Tensor`, *optional*): added to the scores. Flash attention takes none, so then it is
            `"sdpa"` that attends.
        is_causal (`bool`, *optional*, defaults to `False`): nothing sees what comes after it; without a mask.

    Returns:
        two `torch.Tensor`: output of shape `(batch, length, heads, head_dim)`, and what the implementation gives
        beside it: eager attention its probabilities, of shape `(batch, heads, length, key_length)`.
    """
    config, implementation = module.config, module.config._attn_implementation
    if attention_mask is not None and "flash" in implementation:
        implementation = "sdpa"
    if attention_mask is not None and "flex" in implementation:
        # It looks each score up in the mask, where nothing may be left to broadcasting.
        attention_mask = attention_mask.expand(len(query), -1, query.shape[2], -1)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = config.attention_dropout if module.training else 0.0
    inputs = {"scaling": module.scaling, "dropout": dropout, "is_causal": is_causal}
    return function(module, query, key, value, attention_mask, **inputs)


def rotate(states: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn pairs of channels, the first half being their first members; in float32.

    Args:
        states (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): queries or keys.
        turn (`torch.Tensor` of shape `(2, batch, 1, length, head_dim / 2)`): cosines and sines.

    Returns:
        `torch.Tensor` of the shape and dtype of `states`.
    """
    (first, second), (cosine, sine) = states.float().chunk(2, dim=-1), turn
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(states.dtype)


class BackboneMLP(nn.Module):
    """Two linear layers with the exact GELU between them.

    Args:
        hidden_size (`int`): width.
        intermediate_size (`int`): width between the layers.
        dropout (`float`): after the GELU.
    """

    # Whose output alone goes through `activation`: a backend may compute both at once.
    activated_linear = "fc1"

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the layers.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`): input.

        Returns:
            `torch.Tensor` of the same shape.
        """
        return self.fc2(self.dropout(self.activation(self.fc1(hidden_states))))


class TransformerLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block: attention to itself, to a context where it has one, an MLP.

    Args:
        config ([`BackboneConfig`]): for dropout and norms.
        hidden_size (`int`): width.
        num_heads (`int`): attention heads.
        layer_index (`int`, *optional*, defaults to 0): place in the cache.
        context_dim (`int`, *optional*): width of the context; None: the block has none.
    """

    attention_class: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(
        self,
        config: BackboneConfig,
        hidden_size: int,
        num_heads: int,
        layer_index: int = 0,
        context_dim: int | None = None,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = self.attention_class(config, hidden_size, num_heads, layer_index)
        if context_dim is not None:
            self.context_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
            self.context_attention = ContextAttention(config, hidden_size, num_heads, context_dim)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = BackboneMLP(hidden_size, int(hidden_size * config.mlp_ratio), config.hidden_dropout)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: ContextStates | None = None,
        wanted: torch.Tensor | None = None,
        **attention_inputs: Any,
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): input.
            context (four `torch.Tensor`, *optional*): from `read` of [`ContextAttention`]; None for blocks without a
                context.
            wanted (`torch.Tensor` of shape `(batch, wanted)`, *optional*): int64, places in the sequence whose output
                is needed, where it is not that of all: the others are only attended to.
            attention_inputs (`Any`): for [`SelfAttention`].

        Returns:
            `torch.Tensor` of the same shape, or of shape `(batch, wanted, hidden_size)`.
        """
        attended, _ = self.attention(self.attention_norm(hidden_states), wanted=wanted, **attention_inputs)
        if wanted is not None:
            hidden_states = hidden_states.take_along_dim(wanted[..., None], 1)
        hidden_states = hidden_states + self.dropout(attended)
        if context is not None:
            attended = self.context_attention(self.context_norm(hidden_states), *context)
            hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class BackboneLayer(TransformerLayer):
    """A block of a backbone: what it gives is what `output_hidden_states` asks for."""

    attention_class = BackboneAttention
