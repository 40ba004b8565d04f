# SPDX-License-Identifier: Apache-2.0
"""Sweeps: an argument of the pipeline, several values, the metrics of each."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from .plots import draw_lines
from .sampling import SAMPLING


NUMBERS = {
    "num_inference_steps": int,
    "num_diffusion_steps": int,
    "guidance_scale": float,
    "guidance_refresh": int,
    "temperature": float,
    "detail_share": float,
}
# An interval is two values, where a sweep has one.
SWEEPS = [name for name in SAMPLING if name != "guidance_interval"]


def parse_sweeps(words: Sequence[str]) -> list[tuple[str, Any]]:
    """(argument, value) of each setting.

    Args:
        words (`Sequence[str]`): an argument's name and its values, then maybe the next name.

    Returns:
        `list[tuple[str, Any]]`: in the order given, each once.

    Raises:
        ValueError: if the first word is no name, a value no number, or a name has no values.
    """
    values: dict[str, list] = {}
    for word in words:
        if word in SWEEPS:
            name = word
            values.setdefault(name, [])
            continue
        if not values:
            raise ValueError(f"`sweep` has to begin with one of {', '.join(SWEEPS)}, got {word!r}.")
        try:
            values[name].append(NUMBERS.get(name, str)(word))
        except ValueError:
            raise ValueError(f"`sweep` of {name} has the value {word!r}, no {NUMBERS[name].__name__}.") from None
    if empty := [name for name, found in values.items() if not found]:
        raise ValueError(f"`sweep` has no values for {', '.join(empty)}.")
    return list(dict.fromkeys((name, value) for name, found in values.items() for value in found))


def draw_sweep(
    name: str, results: Sequence[dict[str, Any]], reference: dict[str, float], path: str | PathLike
) -> None:
    """Every metric against the swept argument; dashed is what real pictures give.

    Args:
        name (`str`): of the argument.
        results (`Sequence[dict]`): with `sweep`, `value` and `metrics` each; those of other sweeps are left out.
        reference (`dict[str, float]`): the metrics of real pictures.
        path (`str` or `os.PathLike`): of the PNG file.
    """
    own = sorted((result for result in results if result["sweep"] == name), key=lambda result: result["value"])
    metrics = list(own[0]["metrics"])
    panels = {metric: {name: [result["metrics"].get(metric) for result in own]} for metric in metrics}
    levels = {metric: {"real pictures": reference[metric]} for metric in metrics if metric in reference}
    draw_lines(panels, [result["value"] for result in own], name, path, levels)
