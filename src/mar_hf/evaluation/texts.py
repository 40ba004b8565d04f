# SPDX-License-Identifier: Apache-2.0
"""Whether pictures show what a text asked for: the nearest real picture should have the attributes named in it.

A row is a line of `metadata.jsonl` with a `role`, a `gender` and a `tone`, and the `path` of its picture.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..tokenizers import ImageTokenizer
from ..training import center_crop


ATTRIBUTES = ("gender", "tone")
Candidates = dict[str, tuple[list[dict], torch.Tensor]]


def read_rows(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a split that have a role, with the path of their picture.

    Args:
        folder (`str` or `os.PathLike`): of the split.

    Returns:
        `list[dict]`: as in `metadata.jsonl`, with `path`.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    try:
        lines = Path(folder, "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(f"`data_dir` has no captions with roles: {error}") from error
    return [{**row, "path": Path(folder, row["file_name"])} for row in rows if row.get("role")]


def read_pixels(pictures: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Pictures as points.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): of any size.
        size (`int`): side in pixels to compare at.

    Returns:
        `torch.Tensor` of shape `(pictures, 3 * size * size)`: in [0, 1].
    """
    return torch.stack([torch.from_numpy(np.array(center_crop(one, size))).flatten() / 255 for one in pictures])


def read_candidates(rows: Sequence[dict], size: int) -> Candidates:
    """Real pictures by role.

    Args:
        rows (`Sequence[dict]`): from `read_rows`.
        size (`int`): side in pixels to compare at.

    Returns:
        `dict[str, tuple]`: of each role, the rows of all genders and tones, and their points.
    """
    by_role = defaultdict(list)
    for row in rows:
        by_role[row["role"]].append(row)
    return {role: (own, read_pixels([Image.open(row["path"]) for row in own], size)) for role, own in by_role.items()}


def whatever_the_role(candidates: Candidates) -> Candidates:
    """All real pictures for every role.

    Args:
        candidates (`dict`): from `read_candidates`.

    Returns:
        `dict[str, tuple]`: every role has the rows and points of all.
    """
    rows = [row for own, _ in candidates.values() for row in own]
    return dict.fromkeys(candidates, (rows, torch.cat([points for _, points in candidates.values()])))


def nearest(points: torch.Tensor, wanted: Sequence[dict], candidates: Candidates) -> list[dict]:
    """The nearest real picture of the wanted role for each point.

    Args:
        points (`torch.Tensor` of shape `(n, d)`): generated pictures.
        wanted (`Sequence[dict]`): the row that each is judged by.
        candidates (`dict`): from `read_candidates`.

    Returns:
        `list[dict]`: rows.
    """
    found = []
    for point, row in zip(points, wanted, strict=True):
        rows, places = candidates[row["role"]]
        found.append(rows[int((places - point).square().sum(1).argmin())])
    return found


def shares(found: Sequence[dict], wanted: Sequence[dict]) -> dict[str, float]:
    """How often neighbours are right: in both attributes, and in each.

    Args:
        found (`Sequence[dict]`): rows of neighbours.
        wanted (`Sequence[dict]`): rows asked for.

    Returns:
        `dict[str, float]`: `both` and the attributes, in [0, 1].
    """
    right = {name: [a[name] == b[name] for a, b in zip(found, wanted, strict=True)] for name in ATTRIBUTES}
    both = [all(one) for one in zip(*right.values(), strict=True)]
    return {name: sum(values) / len(values) for name, values in {"both": both, **right}.items()}


def chance(wanted: Sequence[dict], candidates: Candidates) -> dict[str, float]:
    """What a picture of the right role gives that knows nothing else.

    Args:
        wanted (`Sequence[dict]`): rows asked for.
        candidates (`dict`): from `read_candidates`.

    Returns:
        `dict[str, float]`: as `shares`.
    """
    rows = [candidates[row["role"]][0] for row in wanted]
    blind = [shares(own, [row] * len(own)) for own, row in zip(rows, wanted, strict=True)]
    return {name: sum(one[name] for one in blind) / len(blind) for name in blind[0]}


def limit(wanted: Sequence[dict], candidates: Candidates, tokenizer: ImageTokenizer, size: int) -> dict[str, float]:
    """What the real pictures give once the image tokenizer has encoded and decoded them.

    Args:
        wanted (`Sequence[dict]`): rows asked for; candidates have them.
        candidates (`dict`): from `read_candidates`.
        tokenizer ([`ImageTokenizer`]): sets the limit.
        size (`int`): side in pixels, as of the candidates.

    Returns:
        `dict[str, float]`: as `shares`.
    """
    places = [(row, *candidates[row["role"]]) for row in wanted]
    points = torch.stack([points[rows.index(row)] for row, rows, points in places])
    return shares(nearest(reconstruct(tokenizer, points, size), wanted, candidates), wanted)


def confusion(found: Sequence[dict], wanted: Sequence[dict], name: str) -> dict[str, dict[str, int]]:
    """How often each value was drawn for each that was asked for.

    Args:
        found (`Sequence[dict]`): rows of neighbours.
        wanted (`Sequence[dict]`): rows asked for.
        name (`str`): an attribute.

    Returns:
        `dict[str, dict[str, int]]`: asked for, then drawn.
    """
    counts = Counter((b[name], a[name]) for a, b in zip(found, wanted, strict=True))
    values = sorted({value for pair in counts for value in pair})
    return {asked: {drawn: counts[asked, drawn] for drawn in values} for asked in values}


@torch.no_grad()
def reconstruct(tokenizer: ImageTokenizer, points: torch.Tensor, size: int) -> torch.Tensor:
    """What the image tokenizer makes of real pictures.

    Args:
        tokenizer ([`ImageTokenizer`]): encodes and decodes.
        points (`torch.Tensor` of shape `(pictures, 3 * size * size)`): see `read_pixels`.
        size (`int`): side in pixels.

    Returns:
        `torch.Tensor`: of the same shape.
    """
    pixels = points.unflatten(1, (size, size, 3)).permute(0, 3, 1, 2).to(tokenizer.device) * 2 - 1
    decoded = tokenizer.decode(tokenizer.encode(pixels, sample_posterior=False).tokens)
    return (decoded.clamp(-1, 1).permute(0, 2, 3, 1).flatten(1).cpu() + 1) / 2


def judge_texts(points: torch.Tensor, wanted: Sequence[dict], candidates: Candidates) -> dict[str, Any]:
    """Shares and confusions of generated pictures, as many for each row, in the order of the rows.

    Args:
        points (`torch.Tensor` of shape `(rows * pictures, d)`): see `read_pixels`.
        wanted (`Sequence[dict]`): the rows whose captions were drawn.
        candidates (`dict`): from `read_candidates`.

    Returns:
        `dict[str, Any]`: `right`, the shares, with `among_all_roles`: how often the row's own picture is the nearest
        of all; `shuffled`, the shares when each picture is judged by another row, half the list further on; and
        `confusion` of each attribute.
    """
    each = len(points) // len(wanted)
    repeated = [row for row in wanted for _ in range(each)]
    shift = each * (len(wanted) // 2)
    others = repeated[shift:] + repeated[:shift]
    found = nearest(points, repeated, candidates)
    anywhere = nearest(points, repeated, whatever_the_role(candidates))
    exact = [a is b for a, b in zip(anywhere, repeated, strict=True)]
    return {
        "right": {**shares(found, repeated), "among_all_roles": sum(exact) / len(exact)},
        "shuffled": shares(nearest(points, others, candidates), others),
        "confusion": {name: confusion(found, repeated, name) for name in ATTRIBUTES},
    }
