# SPDX-License-Identifier: Apache-2.0
"""Encoding a folder of pictures once, to train from it without the autoencoder."""

import hashlib
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..models import load_text_encoder
from ..tokenizers import ImageTokenizer
from ..utils import atomic_file, atomic_folder, import_extra
from .accelerator import make_accelerator
from .arguments import LatentCacheArguments
from .image_data import ImageTransform, load_image_dataset
from .latent_data import DTYPES, INDEX, check_shard, shard_name, shard_sizes
from .text_data import caption_choices, encode_choices


if TYPE_CHECKING:
    from datasets import Dataset


def source_digest(dataset: "Dataset", root: str) -> str:
    """Digest of names, sizes, labels and captions of all pictures, in order: pictures themselves are not read."""
    compute = import_extra("pyarrow.compute", "train")
    root = os.path.realpath(root)
    digest = hashlib.blake2b(digest_size=16)
    for table in dataset.with_format("arrow").iter(1000):
        images = table["image"].combine_chunks()
        paths = images.field("path").to_pylist()
        sizes = compute.binary_length(images.field("bytes")).to_pylist()
        labels = table["label"].to_pylist() if "label" in table.column_names else [None] * len(paths)
        for path, size, label in zip(paths, sizes, labels, strict=True):
            size = os.path.getsize(path) if size is None else size
            name = os.path.relpath(path, root) if path and os.path.isabs(path) else path
            digest.update(f"{name}\t{size}\t{label}\n".encode())
        if "text" in table.column_names:
            digest.update(json.dumps(table["text"].to_pylist()).encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: ImageTokenizer) -> str:
    """Digest of settings and weights."""
    names = ("autoencoder", "patch_size", "normalizer", "shift_factor", "scaling_factor", "quantize")
    return weights_digest(tokenizer, [getattr(tokenizer.config, name) for name in names])


def weights_digest(model: torch.nn.Module, settings: list) -> str:
    """Digest of weights, and of settings that JSON can hold."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def build_index(
    args: LatentCacheArguments,
    dataset: "Dataset",
    tokenizer: ImageTokenizer,
    text_encoder: PreTrainedModel | None,
    mixed_precision: str,
) -> dict[str, Any]:
    """All that decides what the shards hold."""
    if args.resolution % tokenizer.stride:
        raise ValueError(f"`resolution` has to be a multiple of {tokenizer.stride}, got {args.resolution}.")
    side = args.resolution // tokenizer.stride * tokenizer.config.patch_size
    label = dataset.features.get("label")
    moments = ["mean", "std"] if tokenizer.is_variational else ["mean"]
    texts = {}
    if text_encoder is not None:
        if "text" not in dataset.column_names:
            raise ValueError(f"`train_data_dir` {args.train_data_dir!r} has no captions: no {args.caption_column!r}.")
        texts = {
            "text_dim": text_encoder.config.hidden_size,
            "text_encoder": weights_digest(text_encoder, []),
            "caption_templates": args.caption_templates,
            "max_sequence_length": args.max_sequence_length,
        }
    return {
        "num_examples": len(dataset),
        "shard_size": args.shard_size,
        "class_names": label.names if label is not None else None,
        "resolution": args.resolution,
        "latent_shape": [tokenizer.latent_channels, side, side],
        "tensors": moments + [f"{name}_flipped" for name in moments] * args.random_flip,
        "dtype": args.dtype,
        "mixed_precision": mixed_precision,
        "scaling_factor": tokenizer.config.scaling_factor,
        "shift_factor": tokenizer.config.shift_factor,
        "tokenizer": tokenizer_digest(tokenizer),
        "source": source_digest(dataset, args.train_data_dir),
        **texts,
    }


def check_index(path: pathlib.Path, index: dict[str, Any]) -> None:
    """Refuse to go on with a cache that was made of something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    names = [*index, *(name for name in found if name not in index)]
    other = [f"{n} was {found.get(n)}, is {index.get(n)}" for n in names if found.get(n) != index.get(n)]
    if other:
        raise ValueError(
            f"`output_dir` {str(path.parent)!r} holds latents of another data set, tokenizer or setting "
            f"({'; '.join(other)}). Choose another folder, or delete this one."
        )


@torch.inference_mode()
def encode(batch: dict[str, Any], tokenizer: ImageTokenizer, index: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a shard keeps of a batch."""
    pixel_values = batch["pixel_values"].to(tokenizer.device, non_blocking=True)
    result = {"label": batch["label"].long()}
    for suffix in ("", "_flipped") if "mean_flipped" in index["tensors"] else ("",):
        moments = tokenizer.encode_moments(pixel_values.flip(3) if suffix else pixel_values)
        for name, tensor in zip((f"mean{suffix}", f"std{suffix}"), moments, strict=True):
            if name in index["tensors"]:
                result[name] = tensor.to("cpu", DTYPES[index["dtype"]][1]).contiguous()
                if not result[name].isfinite().all():
                    raise ValueError(f"{name} is not finite in `dtype` {index['dtype']!r}: choose a wider one.")
    return result


@torch.inference_mode()
def encode_captions(
    args: LatentCacheArguments, rows: dict[str, list], class_names: list[str] | None, parts: tuple, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What a shard keeps of the captions of rows: the states of all texts, and how they belong together."""
    labels = [class_names[label] for label in rows["label"]] if class_names else [""] * len(rows["text"])
    pairs = zip(rows["text"], labels, strict=True)
    choices = [caption_choices(captions, args.caption_templates, label) for captions, label in pairs]
    states = encode_choices(choices, *parts, args.max_sequence_length)
    stored = torch.cat([text for own in states for text in own]).to(dtype)
    if not stored.isfinite().all():
        raise ValueError(f"States of texts are not finite in `dtype` {args.dtype!r}: choose a wider one.")
    return {
        "texts": torch.tensor([len(own) for own in choices]),
        "text_lengths": torch.tensor([len(text) for own in states for text in own]),
        "text_states": stored,
    }


def write_shard(path: pathlib.Path, batches: list[dict[str, torch.Tensor]]) -> None:
    """Write a shard, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch; captions stay lists."""
    texts = {"text": [row.pop("text") for row in rows]} if "text" in rows[0] else {}
    return {**default_collate(rows), **texts}


def cache_latents(args: LatentCacheArguments) -> str:
    """Encode what is not encoded yet.

    `output_dir` holds `shard-<number>.safetensors` with the moments of the posterior of every picture (and of its
    mirror image, with `random_flip`) and its label, `index.json` with what they were made of, and a copy of the
    tokenizer. With `pretrained_text_encoder` the shards also hold the states of all captions, for training on texts
    without the text encoder. The shards do not depend on the number of processes. A run that was stopped goes on with
    those that are missing.

    Args:
        args (`LatentCacheArguments`): settings.

    Returns:
        `str`: what there is to say of it; nothing but on the main process.

    Raises:
        ValueError: if data, tokenizer and settings do not fit each other, or `output_dir` holds another cache.

    Example:
        >>> cache_latents(LatentCacheArguments("data/emoji", "out/tokenizer", "data/emoji_latents", resolution=32))
    """
    accelerator = make_accelerator(mixed_precision=args.mixed_precision)
    folder = pathlib.Path(args.output_dir)
    with accelerator.main_process_first():
        with_texts = args.pretrained_text_encoder is not None
        dataset = load_image_dataset(args.train_data_dir, args.caption_column if with_texts else None)
    texts = load_text_encoder(args.pretrained_text_encoder) if with_texts else (None, None)
    tokenizer = ImageTokenizer.from_pretrained(args.pretrained_tokenizer)
    index = build_index(args, dataset, tokenizer, texts[0], accelerator.mixed_precision)
    write_index(folder, index, tokenizer, accelerator)
    sizes = shard_sizes(index)
    missing = [number for number in range(len(sizes)) if check_shard(folder, index, number)]
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    tokenizer.to(accelerator.device)
    if with_texts:
        texts[0].to(accelerator.device)
    encode_shards(args, mine, index, dataset, (tokenizer, *texts), accelerator)
    accelerator.wait_for_everyone()
    is_main = accelerator.is_main_process
    accelerator.end_training()
    return f"{len(dataset)} pictures in {len(sizes)} shards in {folder}, {len(missing)} of them new" if is_main else ""


def write_index(
    folder: pathlib.Path, index: dict[str, Any], tokenizer: ImageTokenizer, accelerator: Accelerator
) -> None:
    """Write `index.json` and the tokenizer, or check that they are those of this cache; every process calls this."""
    if (folder / INDEX).exists():
        check_index(folder / INDEX, index)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not (folder / INDEX).exists():
        with atomic_folder(folder / "tokenizer", overwrite=True) as target:
            tokenizer.save_pretrained(target)
        with atomic_file(folder / INDEX) as path:
            path.write_text(json.dumps(index, indent=2), encoding="utf-8")
    accelerator.wait_for_everyone()


def encode_shards(
    args: LatentCacheArguments,
    numbers: list[int],
    index: dict[str, Any],
    dataset: "Dataset",
    parts: tuple,
    accelerator: Accelerator,
) -> None:
    """Write the shards of these numbers, encoding with (image tokenizer, text encoder or None, its tokenizer)."""
    sizes, folder = shard_sizes(index), pathlib.Path(args.output_dir)
    batches = []
    for number in numbers:
        first = number * args.shard_size
        rows = list(range(first, first + sizes[number]))
        batches += [(number, rows[start : start + args.batch_size]) for start in range(0, len(rows), args.batch_size)]
    loader = DataLoader(
        dataset.with_transform(ImageTransform(args.resolution, parts[0].image_channels)),
        batch_sampler=[rows for _, rows in batches],
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
    )
    done: list[dict[str, torch.Tensor]] = []
    progress = tqdm(
        zip(batches, loader, strict=True), total=len(batches), disable=not accelerator.is_local_main_process
    )
    for (number, rows), batch in progress:
        with accelerator.autocast():
            done.append(encode(batch, parts[0], index))
            if parts[1] is not None:
                captions = {"text": batch["text"], "label": batch["label"].tolist()}
                dtype = DTYPES[index["dtype"]][1]
                done[-1] |= encode_captions(args, captions, index["class_names"], parts[1:], dtype)
        if rows[-1] == number * args.shard_size + sizes[number] - 1:
            write_shard(folder / shard_name(number), done)
            done = []
