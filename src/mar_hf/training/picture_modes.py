# SPDX-License-Identifier: Apache-2.0
"""Pictures of every mode that Pillow opens, in 8 bits a channel: each with its own range, or refused."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from ..utils import look_up, on_white


# Channels of pictures -> what they are: grey or colours, without or with transparency.
CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# Tags of TIFF files.
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2
# Floats up to here, but beyond 1, may be bright ones of a range to 1 or dark ones of a range to 255.
UNCERTAIN = 16


def _tag(picture: Image.Image, number: int, default: int) -> int:
    value = getattr(picture, "tag_v2", {}).get(number, default)
    return value[0] if isinstance(value, tuple) else value


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("LA" if picture.has_transparency_data else "L")


def _colours(picture: Image.Image) -> Image.Image:
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _scaled(picture: Image.Image, values: np.ndarray, white: float) -> Image.Image:
    grey = values * (255 / white)
    if _tag(picture, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        grey = 255 - grey
    result = Image.fromarray(np.round(grey).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        result.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return result


def _integers(picture: Image.Image) -> Image.Image:
    values, bits = np.asarray(picture).astype(np.int64), _tag(picture, BITS, 16)
    if bits == 16 and _tag(picture, SAMPLE_FORMAT, 1) == SIGNED:
        raise ValueError(f"signed numbers (mode {picture.mode!r} of 16 bits) have no black and white: convert it")
    # Pillow widens other depths to 16 bits itself, or hands on 16 bits in 32.
    white = 4095 if bits == 12 else 65535
    if values.min() < 0 or values.max() > white:
        raise ValueError(f"mode {picture.mode!r} has to hold 0..{white}, got {values.min()}..{values.max()}")
    return _scaled(picture, values, white)


def _floats(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.float64)
    least, most = values.min(), values.max()
    allowed = "mode 'F' has to hold numbers in 0..1 or in 0..255"
    if not (least >= 0 and most <= 255):  # NaN is in no range
        raise ValueError(f"{allowed}, got {least}..{most}")
    if 1 < most <= UNCERTAIN and (values % 1).any():
        raise ValueError(f"{allowed}, and {least}..{most} may be either")
    return _scaled(picture, values, 255 if most > 1 else 1)


READERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    **dict.fromkeys(("1", "L", "LA", "La"), _grey),
    **dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBa"), _colours),
    **dict.fromkeys(("RGBX", "CMYK", "YCbCr", "LAB", "HSV"), _colours),
    **dict.fromkeys(("I", "I;16", "I;16B", "I;16L", "I;16N"), _integers),
    "F": _floats,
}


def to_channels(picture: Image.Image, channels: int = 3) -> Image.Image:
    """A picture in 8 bits a channel.

    16 bits and 32 (mode `I`) range from 0 to 65535, 12 bits to 4095; floats to 1, or to 255 where one is above 1.

    Args:
        picture (`PIL.Image.Image`): of a mode in `READERS`.
        channels (`int`, *optional*, defaults to 3): what it shall have: 1 (grey), 2 (grey and transparency), 3
            (colours) or 4 (colours and transparency). Without transparency, clear parts become white.

    Returns:
        `PIL.Image.Image`: of mode L, LA, RGB or RGBA.

    Raises:
        ValueError: if the mode is another one, or its numbers are out of its range; names the mode.
    """
    check_channels(channels)
    picture = look_up(READERS, picture.mode, "mode")(picture)
    if not CHANNELS[channels].endswith("A") and picture.has_transparency_data:
        picture = on_white(picture)
    return picture.convert(CHANNELS[channels])


def check_channels(channels: int) -> None:
    """Refuse a number of channels that no picture has.

    Args:
        channels (`int`): of a tokenizer.

    Raises:
        ValueError: if it is not in `CHANNELS`.
    """
    if channels not in CHANNELS:
        raise ValueError(f"Pictures are read with 1, 2, 3 or 4 channels, not with {channels!r} (`image_channels`).")


def center_crop(picture: Image.Image, size: int, channels: int = 3) -> Image.Image:
    """The central square of a picture, resized as ADM does: halve with a box filter, then bicubic.

    Args:
        picture (`PIL.Image.Image`): any mode.
        size (`int`): side of the result in pixels.
        channels (`int`, *optional*, defaults to 3): see `to_channels`; by default transparent parts become white.

    Returns:
        `PIL.Image.Image`: `size` x `size`; RGB by default.

    Raises:
        ValueError: if the mode is unknown, or its numbers are out of its range.
    """
    picture = to_channels(picture, channels)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.Resampling.BOX)
    scale = size / min(picture.size)
    if scale != 1:
        sides = tuple(max(size, round(side * scale)) for side in picture.size)
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    return picture.crop((left, top, left + size, top + size))
