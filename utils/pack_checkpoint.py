# SPDX-License-Identifier: Apache-2.0
"""A trained pipeline in half the room, as the package ships it.

    python utils/pack_checkpoint.py out/text/pipeline src/mar_hf/checkpoints/emoji_text --overwrite

Transformer, image tokenizer and scheduler, without text encoder, samples and card. Weights are written in float16, but
their `config.json` says float32, and `from_pretrained` goes by the latter: they load as float32. A README.md at the
destination stays.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mar_hf import MARPipeline
from mar_hf.utils import atomic_folder


def halve(file: Path) -> None:
    """Rewrite a file of weights in float16.

    Args:
        file (`pathlib.Path`): ends in .safetensors; float32 tensors in it are rounded, others stay.

    Raises:
        ValueError: if a number is too large for float16.
    """
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32:
            tensors[name] = tensor.half()
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} has numbers that float16 can't hold, up to {tensor.abs().max():g}.")
    save_file(tensors, file, metadata={"format": "pt"})


def pack(src: str, dst: str, overwrite: bool = False, generation_defaults: dict[str, Any] | None = None) -> None:
    """Write the folder.

    Args:
        src (`str`): folder or hub id of a pipeline.
        dst (`str`): the folder to write.
        overwrite (`bool`, *optional*, defaults to `False`): whether it may hold files; all but its README.md go.
        generation_defaults (`dict[str, Any]`, *optional*): settings over those saved in the pipeline.

    Raises:
        ValueError: if the pipeline is broken, does not fit into float16 or has no such setting, or `dst` holds files.
    """
    pipe = MARPipeline.from_pretrained(src, text_encoder=None, tokenizer=None)
    settings = {**(pipe.config.generation_defaults or {}), **(generation_defaults or {})}
    pipe = MARPipeline(**pipe.components, id2label=pipe.config.id2label, generation_defaults=settings)
    readme = Path(dst, "README.md")
    text = readme.read_text(encoding="utf-8") if readme.exists() else None
    with atomic_folder(dst, overwrite) as folder:
        pipe.save_pretrained(folder)
        for file in folder.rglob("*.safetensors"):
            halve(file)
        if text is not None:
            Path(folder, "README.md").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Pack, and say how large it is.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("src", metavar="SRC", help="folder or hub id of a pipeline")
    parser.add_argument("dst", metavar="DST", help="folder to write; its README.md stays")
    parser.add_argument("--overwrite", action="store_true", help="also where DST holds files, which go")
    parser.add_argument(
        "--generation-defaults", type=json.loads, metavar="JSON", help="settings over those saved in the pipeline"
    )
    args = parser.parse_args(argv)
    try:
        pack(args.src, args.dst, args.overwrite, args.generation_defaults)
    except (ValueError, OSError) as error:
        sys.exit(f"pack_checkpoint.py: {error}")
    size = sum(file.stat().st_size for file in Path(args.dst).rglob("*") if file.is_file())
    print(f"{args.dst}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
