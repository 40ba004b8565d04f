# SPDX-License-Identifier: Apache-2.0
"""Reading cached latents: what `cache_latents.py` wrote, or the `.npz` files of the original MAR."""

import json
import pathlib
import zipfile
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from .folders import class_folders, read_tree, training_prefix


INDEX = "index.json"
DTYPES = {"float32": ("F32", torch.float32), "float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16)}


def shard_name(number: int) -> str:
    """File name of a shard.

    Args:
        number (`int`): from 0 on.

    Returns:
        `str`: relative to the cache.
    """
    return f"shard-{number:05d}.safetensors"


def shard_sizes(index: dict[str, Any]) -> list[int]:
    """Pictures in each shard of a cache.

    Args:
        index (`dict`): what `index.json` holds.

    Returns:
        `list[int]`: all the same but the last.
    """
    count, size = index["num_examples"], index["shard_size"]
    return [min(size, count - first) for first in range(0, count, size)]


def check_shard(folder: pathlib.Path, index: dict[str, Any], number: int) -> str | None:
    """What is wrong with a shard, from its size and its header.

    Args:
        folder (`pathlib.Path`): the cache.
        index (`dict`): what `index.json` holds.
        number (`int`): of the shard.

    Returns:
        `str`, *optional*: None where it is whole.
    """
    path = folder / shard_name(number)
    count = shard_sizes(index)[number]
    expected = {name: (DTYPES[index["dtype"]][0], [count, *index["latent_shape"]]) for name in index["tensors"]}
    expected["label"] = ("I64", [count])
    text_dim, ragged = index.get("text_dim"), {}
    if text_dim is not None:
        expected["texts"] = ("I64", [count])
        # How many texts and states there are, only the shard knows.
        ragged = {"text_lengths": ("I64", []), "text_states": (DTYPES[index["dtype"]][0], [text_dim])}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (piece.get_dtype(), piece.get_shape()) for name, piece in slices.items()}
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, SafetensorError) as error:
        return f"{path} is truncated or no safetensors file ({error})"
    kinds = {name: (found[name][0], found[name][1][1:]) for name in ragged.keys() & found.keys()}
    whole = {name: kind for name, kind in found.items() if name not in ragged} == expected and kinds == ragged
    return None if whole else f"{path} holds {found}, not {expected | ragged}"


def _starts(sizes: torch.Tensor) -> torch.Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


class CachedLatents(Dataset):
    """The shards of `cache_latents.py`, mapped into memory: only what is asked for is read.

    Rows are dictionaries of `mean` and `std` (c, h, w) in float32, as `ImageTokenizer.encode_moments` returned them,
    `mean_flipped` and `std_flipped` of the mirrored picture where `has_flipped`, `label`, and `prompt_embeds` where
    there is a `text_dim`: for each text the states (length, text_dim) of the text encoder.

    Args:
        path (`str`): the cache.

    Raises:
        ValueError: if a shard is missing or broken, or `index.json` can't be read.
    """

    def __init__(self, path: str):
        self.folder = pathlib.Path(path)
        try:
            self.index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            problems = (check_shard(self.folder, self.index, n) for n in range(len(shard_sizes(self.index))))
            problem = next(filter(None, problems), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / INDEX} is not the index of cached latents: {error!r}.") from error
        if problem is not None:
            raise ValueError(f"The cached latents are not whole: {problem}. Run cache_latents.py again.")
        self.class_names: list[str] | None = self.index["class_names"]
        self.resolution: int | None = self.index["resolution"]
        self.latent_shape = tuple(self.index["latent_shape"])
        self.has_flipped = "mean_flipped" in self.index["tensors"]
        self.text_dim: int | None = self.index.get("text_dim")
        self._shards: dict[int, dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return self.index["num_examples"]

    def __getstate__(self) -> dict[str, Any]:
        # Every process maps the files itself.
        return {**vars(self), "_shards": {}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = divmod(range(len(self))[index], self.index["shard_size"])
        if number not in self._shards:
            # Tensors that are read whole are views of the mapped file; they outlive the handle.
            with safe_open(self.folder / shard_name(number), framework="pt") as file:
                self._shards[number] = {name: file.get_tensor(name) for name in file.keys()}
            if self.text_dim is not None:
                shard = self._shards[number]
                # Where each picture's texts and each text's states begin.
                shard["first_text"] = _starts(shard["texts"])
                shard["first_state"] = _starts(shard["text_lengths"])
        shard = self._shards[number]
        moments = {name: shard[name][row].float() for name in self.index["tensors"]}
        for name in ("mean", "mean_flipped"):
            # Autoencoders without a posterior have no deviation to store.
            if name in moments and name.replace("mean", "std") not in moments:
                moments[name.replace("mean", "std")] = torch.zeros(()).expand(self.latent_shape)
        return {**moments, **self._texts(shard, row), "label": int(shard["label"][row])}

    def least_label(self) -> int:
        """The first class that has latents.

        Returns:
            `int`: its number; -1 without classes.
        """
        least = []
        for number in range(len(shard_sizes(self.index))):
            with safe_open(self.folder / shard_name(number), framework="pt") as file:
                least.append(int(file.get_tensor("label").min()))
        return min(least)

    def longest_text(self) -> int:
        """Tokens of the longest text.

        Returns:
            `int`: 0 without texts.
        """
        longest = 0
        for number in range(len(shard_sizes(self.index))) if self.text_dim is not None else []:
            with safe_open(self.folder / shard_name(number), framework="pt") as file:
                longest = max(longest, int(file.get_tensor("text_lengths").max()))
        return longest

    def _texts(self, shard: dict[str, torch.Tensor], row: int) -> dict[str, list[torch.Tensor]]:
        if self.text_dim is None:
            return {}
        first, last = shard["first_text"][row : row + 2].tolist()
        bounds = shard["first_state"][first : last + 1].tolist()
        pieces = zip(bounds, bounds[1:], strict=False)
        return {"prompt_embeds": [shard["text_states"][start:end].float() for start, end in pieces]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


class OriginalLatents(Dataset):
    """The original MAR's cache: `<class>/<picture>.npz` with the moments (mean, log variance) of picture and mirror.

    Folders are read as those of pictures are: of splits only what is trained on, links followed.

    Rows are those of [`CachedLatents`].

    Args:
        path (`str`): folder of the classes' folders, or of files without classes.

    Raises:
        ValueError: if there are no such files, it is not clear which are trained on, or, when it is read, one is
            broken.
    """

    def __init__(self, path: str):
        try:
            tree = read_tree(path)
            found = [name for name in tree.files if name.lower().endswith(".npz")]
            prefix = training_prefix(found, tree.folders)
        except ValueError as error:
            raise ValueError(f"`train_data_dir` {path!r} holds no cached latents to train on: {error}") from error
        if not found:
            raise ValueError(f"`train_data_dir` {path!r} holds no cached latents: neither {INDEX} nor .npz files.")
        self.files = sorted(tree.root / name for name in found if name.startswith(prefix))
        classes = class_folders([str(file.relative_to(tree.root / prefix)) for file in self.files])
        self.class_names: list[str] | None = None if classes is None else sorted(set(classes))
        self.labels = {name: number for number, name in enumerate(self.class_names or [])}
        self.resolution: int | None = None
        self.text_dim: int | None = None
        first = self[0]
        self.latent_shape = tuple(first["mean"].shape)
        self.has_flipped = "mean_flipped" in first

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.files[index]
        row = {"label": self.labels.get(path.parent.name, -1)}
        try:
            with np.load(path) as file:
                for key, suffix in (("moments", ""), ("moments_flip", "_flipped")):
                    if key == "moments" or key in file:
                        mean, logvar = torch.from_numpy(file[key]).float().chunk(2)
                        row[f"mean{suffix}"] = mean
                        row[f"std{suffix}"] = logvar.clamp(-30.0, 20.0).mul(0.5).exp()
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold cached latents, or is truncated: {error}") from error
        return row

    def least_label(self) -> int:
        """The first class that has latents.

        Returns:
            `int`: 0, since classes are folders of such; -1 without classes.
        """
        return min(self.labels.values(), default=-1)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


def load_latents(path: str) -> CachedLatents | OriginalLatents:
    """Cached latents as a data set.

    Args:
        path (`str`): what `cache_latents.py` wrote, or a cache of the original MAR's.

    Returns:
        `torch.utils.data.Dataset`: rows are dictionaries; `class_names` (`list[str]`, or None), `resolution` (`int`,
            or None where the cache does not say), `latent_shape` (c, h, w), `has_flipped` and `text_dim` (None where
            there are no texts) describe them.

    Raises:
        ValueError: if there is no cache, or it is not whole.
    """
    return CachedLatents(path) if pathlib.Path(path, INDEX).exists() else OriginalLatents(path)
