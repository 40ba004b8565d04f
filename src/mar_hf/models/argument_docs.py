# SPDX-License-Identifier: Apache-2.0
"""What is said of the arguments that several models take, once."""

import inspect
import textwrap


WIDTH = 119
GENERATOR = "(`torch.Generator` or `list[torch.Generator]`, *optional*)"
ARGUMENTS = {
    "class_labels": "(`torch.Tensor` of shape `(batch,)`, *optional*): int64; `num_classes`, as None, means the null "
    "class. The range is checked where that needs no waiting for a device: of labels on the CPU.",
    "condition": "(`torch.Tensor` of shape `(batch, rows, condition_dim)`, *optional*): in place of the backbone's, "
    "which is not run: of any number of tokens, for the loss of the head alone, with the `mask` of these.",
    "generator": f"{GENERATOR}: for what is drawn in training: one, or one per image; None means torch's global one.",
    "noise": "(`torch.Tensor` of shape `(head_batch_multiplier * batch * num_tokens, token_dim)`, *optional*): of the "
    "loss.",
    "noise_scheduler": "(`SchedulerMixin`, *optional*): the noise schedule of the loss, of the head's "
    "`scheduler_class`.",
    "orders": "(`torch.Tensor` of shape `(batch, num_tokens)`): int64, positions in the order of generation.",
    "output_attentions": "(`bool`, *optional*): also gives `attentions`; takes the attention implementation "
    '`"eager"`. None means what the configuration says.',
    "output_hidden_states": "(`bool`, `int` or `list[int]`, *optional*): also gives `hidden_states`, all or those of "
    "these numbers. None means what the configuration says.",
    "prompt_attention_mask": "(`torch.Tensor` of shape `(batch, length)`, *optional*): True or 1 for tokens, False or "
    "0 for padding; a row without tokens is the null text. None: all are tokens.",
    "prompt_embeds": "(`torch.Tensor` of shape `(batch, length, text_dim)`, *optional*): the text encoder's states, "
    "for models with a `text_dim`; None means the null text.",
    "return_dict": "(`bool`, *optional*): False gives a tuple. None means what the configuration says.",
    "return_loss": "(`bool`, *optional*): also gives `loss`, which most heads need a `noise_scheduler` for. None: if "
    "there is one.",
    "sampling": "(`dict`, *optional*): arguments of the head's `draw`: its tokens are returned, nothing else is read. "
    "What needs weights comes by `forward`: offloading and sharding hang on it and see nothing else.",
    "static": "(`bool`, *optional*, defaults to `False`): of a fixed size from the start.",
    "text_context": "([`TextContext`], *optional*): in place of `prompt_embeds` and its mask: keeps what is computed "
    "from the texts, for all steps that it is given to.",
    "timesteps": "(`torch.Tensor` of shape `(head_batch_multiplier * batch * num_tokens,)`, *optional*): of the loss.",
    "tokens": "(`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the tokens; only those of earlier steps "
    "are read.",
    "tokens_per_step": "(`list[int]`): tokens of the steps so far, this one included.",
}


def fill_arguments(model_class: type) -> type:
    """Replace lines `{name, name}` in the docstrings of a class's methods by what is said of these arguments here.

    Args:
        model_class (`type`): the class.

    Returns:
        `type`: the class itself.
    """
    for member in vars(model_class).values():
        if inspect.isfunction(member) and member.__doc__:
            # Decorators copy the docstring of what they wrap.
            inspect.unwrap(member).__doc__ = member.__doc__ = _filled(member.__doc__)
    return model_class


def _filled(doc: str) -> str:
    lines = []
    for line in doc.splitlines():
        indent, names = line[: len(line) - len(line.lstrip())], line.strip()
        if not names.startswith("{"):
            lines.append(line)
            continue
        for name in names.strip("{}").split(", "):
            form = {"initial_indent": indent, "subsequent_indent": f"{indent}    ", "break_long_words": False}
            lines += textwrap.wrap(f"{name} {ARGUMENTS[name]}", WIDTH, **form)
    return "\n".join(lines)
