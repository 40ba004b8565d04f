# SPDX-License-Identifier: Apache-2.0
"""Pictures of every mode, from memory and from files: grey stays grey, black black and white white."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mar_hf.training.picture_modes import CHANNELS, READERS, center_crop, to_channels


BYTE = st.integers(0, 255)
COLOUR = st.tuples(BYTE, BYTE, BYTE)


def pixel(picture, channels=3):
    value = to_channels(picture, channels).getpixel((0, 0))
    return np.array(value, dtype=int)


def close(value, expected, tolerance=1):
    return np.abs(value - np.array(expected)).max() <= tolerance


def filled(mode, value):
    return Image.new(mode, (3, 2), value)


def grey_of_values(value, dtype):
    return Image.fromarray(np.full((2, 3), value, dtype=dtype))


def tiff(picture):
    file = io.BytesIO()
    picture.save(file, "TIFF")
    file.seek(0)
    return Image.open(file)


# Mode -> a picture of an opaque grey, and how far off it may be.
GREYS = {
    "1": lambda v: filled("1", 255 * (v > 127)),
    "L": lambda v: filled("L", v),
    "LA": lambda v: filled("LA", (v, 255)),
    "La": lambda v: filled("LA", (v, 255)).convert("La"),
    "P": lambda v: filled("L", v).convert("P"),
    "PA": lambda v: filled("LA", (v, 255)).convert("PA"),
    "RGB": lambda v: filled("RGB", (v, v, v)),
    "RGBA": lambda v: filled("RGBA", (v, v, v, 255)),
    "RGBa": lambda v: filled("RGBA", (v, v, v, 255)).convert("RGBa"),
    "RGBX": lambda v: filled("RGBX", (v, v, v, 7)),
    "CMYK": lambda v: filled("CMYK", (255 - v, 255 - v, 255 - v, 0)),
    "YCbCr": lambda v: filled("YCbCr", (v, 128, 128)),
    "HSV": lambda v: filled("HSV", (99, 0, v)),
    "I": lambda v: grey_of_values(257 * v, np.int32),
    "I;16": lambda v: grey_of_values(257 * v, np.uint16),
    "I;16B": lambda v: grey_of_values(257 * v, ">u2"),
    "I;16L": lambda v: Image.frombytes("I;16L", (3, 2), np.full((2, 3), 257 * v, "<u2").tobytes()),
    "I;16N": lambda v: Image.frombytes("I;16N", (3, 2), np.full((2, 3), 257 * v, np.uint16).tobytes()),
    "F": lambda v: grey_of_values(v, np.float32),
}


@pytest.mark.parametrize("mode", [mode for mode in READERS if mode != "LAB"])
@given(value=BYTE)
def test_every_mode_has_its_own_range(mode, value):
    picture = GREYS[mode](value)
    assert picture.mode == mode
    if mode == "1":
        value = 255 * (value > 127)
    if mode == "F" and value == 1:
        value = 255  # among floats 1 is white unless another one is above it
    assert close(pixel(picture), [value] * 3)
    assert close(pixel(picture, 4), [value] * 3 + [255])
    assert close(pixel(picture, 1), [value])
    assert close(pixel(picture, 2), [value, 255])


@given(COLOUR)
def test_colours_stay_what_they_are(colour):
    for mode, tolerance in (("RGB", 0), ("RGBA", 0), ("CMYK", 0), ("YCbCr", 3), ("HSV", 8)):
        assert close(pixel(Image.new("RGB", (2, 2), colour).convert(mode)), colour, tolerance), mode


@given(st.tuples(*[st.integers(100, 255)] * 3))
def test_lab_is_converted_by_its_profile(colour):
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    picture = ImageCms.applyTransform(Image.new("RGB", (2, 2), colour), to_lab)
    assert picture.mode == "LAB" and close(pixel(picture), colour, 12)  # in 8 bits it is coarse


@given(COLOUR, BYTE)
def test_clear_parts_become_white_or_stay_clear(colour, alpha):
    picture = filled("RGBA", (*colour, alpha))
    blended = [(alpha * one + (255 - alpha) * 255) / 255 for one in colour]
    assert close(pixel(picture), blended)
    assert close(pixel(picture, 4), [*colour, alpha], 0)
    grey = filled("LA", (colour[0], alpha))
    assert close(pixel(grey, 1), blended[:1]) and close(pixel(grey, 2), [colour[0], alpha], 0)


@given(st.integers(0, 65535))
def test_deep_greys_survive_files(value):
    for dtype in (np.int32, np.uint16, ">u2"):
        picture = tiff(grey_of_values(value, dtype))
        assert close(pixel(picture), [value / 257] * 3)
    file = io.BytesIO()
    grey_of_values(value, np.uint16).save(file, "PNG")
    assert close(pixel(Image.open(file)), [value / 257] * 3)
    file = io.BytesIO(b"P5 1 1 65535\n" + value.to_bytes(2, "big"))
    assert close(pixel(Image.open(file)), [value / 257] * 3)


def test_the_middle_of_each_range_is_mid_grey():
    assert close(pixel(tiff(grey_of_values(32768, np.int32))), [128] * 3)
    assert close(pixel(tiff(grey_of_values(0.5, np.float32))), [128] * 3)
    file = io.BytesIO(b"P5 1 1 1023\n" + (512).to_bytes(2, "big"))
    assert close(pixel(Image.open(file)), [128] * 3)


def raw_tiff(numbers, bits, sample_format=1, photometric=1):
    """A file of one row of two numbers, in so many bits."""
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 16), (277, 3, 1)]
    tags += [(278, 3, 1), (279, 4, len(numbers)), (339, 3, sample_format)]
    data = b"II*\0" + (24).to_bytes(4, "little") + bytes(8) + numbers.ljust(8, b"\0")
    data += len(tags).to_bytes(2, "little")
    for number, kind, value in tags:
        data += b"".join(part.to_bytes(size, "little") for part, size in ((number, 2), (kind, 2), (1, 4), (value, 4)))
    return Image.open(io.BytesIO(data + bytes(4)))


def test_12_bits_have_a_range_of_their_own():
    picture = raw_tiff(b"\x80\x0f\xff", 12)
    assert close(np.asarray(to_channels(picture, 1)).astype(int), [[128, 255]])


@pytest.mark.parametrize(("dtype", "sample_format", "white"), [("<u2", 1, 65535), ("<f4", 3, 1)])
def test_files_may_say_that_zero_is_white(dtype, sample_format, white):
    numbers = np.array([0, 0.25 * white], dtype)
    for photometric, expected in ((1, [0, 64]), (0, [255, 191])):
        picture = raw_tiff(numbers.tobytes(), 8 * numbers.itemsize, sample_format, photometric)
        assert close(np.asarray(to_channels(picture, 1)).astype(int), [expected])


def test_signed_numbers_are_refused():
    picture = raw_tiff(np.array([5, 30000], "<i2").tobytes(), 16, sample_format=2)
    with pytest.raises(ValueError, match=r"signed numbers \(mode 'I' of 16 bits\) have no black and white"):
        to_channels(picture)


@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_floats_to_1_are_shares_of_white(first, second):
    picture = Image.fromarray(np.array([[first, second]], dtype=np.float32))
    assert close(np.asarray(to_channels(picture, 1)).astype(int), [[255 * first, 255 * second]])


@given(st.floats(0, 255, width=32), st.floats(16.5, 255, width=32))
def test_floats_beyond_are_shares_of_255(first, second):
    picture = Image.fromarray(np.array([[first, second]], dtype=np.float32))
    assert close(np.asarray(to_channels(picture, 1)).astype(int), [[first, second]])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (grey_of_values(float("nan"), np.float32), r"mode 'F' has to hold numbers in 0\.\.1 or in 0\.\.255, got nan"),
        (grey_of_values(float("inf"), np.float32), "got inf"),
        (grey_of_values(-0.1, np.float32), "got -0.1"),
        (grey_of_values(256.0, np.float32), r"got 256\.0"),
        (grey_of_values(1.5, np.float32), r"and 1\.5\.\.1\.5 may be either"),
        (grey_of_values(-1, np.int32), r"mode 'I' has to hold 0\.\.65535, got -1\.\.-1"),
        (grey_of_values(65536, np.int32), r"mode 'I' has to hold 0\.\.65535, got 65536\.\.65536"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(picture, message):
    with pytest.raises(ValueError, match=message):
        to_channels(picture)


def test_a_number_can_be_clear():
    picture = grey_of_values(257 * 9, np.uint16)
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=257 * 9)
    read = Image.open(file)
    assert close(pixel(read), [255] * 3) and close(pixel(read, 2), [9, 0])


def test_palettes_may_be_clear():
    picture = filled("P", 1)
    picture.putpalette([1, 2, 3, 255, 9, 8, 7, 0], "RGBA")
    assert close(pixel(picture), [255] * 3, 0) and close(pixel(picture, 4), [9, 8, 7, 0], 0)


def test_other_modes_are_refused_by_name():
    unknown = Image.new("L", (2, 2))
    unknown._mode = "X;9"
    with pytest.raises(ValueError, match=r"`mode` has to be one of .*, got 'X;9'"):
        to_channels(unknown)


@pytest.mark.parametrize("channels", [0, 5, -1, None])
def test_channels_that_no_picture_has(channels):
    with pytest.raises(ValueError, match=f"with 1, 2, 3 or 4 channels, not with {channels}"):
        to_channels(filled("L", 0), channels)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("mode", ["L", "RGBA", "F", "I;16B", "P", "La"])
def test_squares_have_the_channels_that_are_asked_for(mode, channels):
    square = center_crop(GREYS[mode](200).resize((50, 30), Image.Resampling.NEAREST), 8, channels)
    assert square.size == (8, 8) and len(square.getbands()) == channels
    assert close(np.asarray(square).reshape(8, 8, channels)[..., 0].astype(int), 200)
