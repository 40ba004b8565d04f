# SPDX-License-Identifier: Apache-2.0
"""Grids of samples, drawn with tiny pipelines."""

import numpy as np
import pytest
import torch
from PIL import Image

from mar_hf.training.samples import plain_grid, sample_classes, sample_texts
from tiny_pipelines import tiny_pipeline, tiny_text_pipeline


def test_a_row_is_a_class_and_does_not_depend_on_the_batch():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    names = ["a", "b", "c"]
    grid = sample_classes(pipe, names, num_images=2, batch_size=6, resolution=8)
    assert grid.size == (2 * 64, 3 * 64)
    again = sample_classes(pipe, names, num_images=2, batch_size=4, resolution=8)
    assert np.abs(np.asarray(grid, dtype=int) - np.asarray(again, dtype=int)).max() <= 1
    second = pipe(class_labels=[1], generator=torch.Generator().manual_seed(1000)).images[0]
    cell = np.asarray(grid)[64:128, :64]
    assert np.abs(cell.astype(int) - np.asarray(second.resize((64, 64)), dtype=int)).max() <= 1


@pytest.mark.parametrize(("mode", "colour"), [("L", 0), ("LA", (0, 0)), ("RGBA", (0, 0, 0, 0))])
def test_grids_take_pictures_of_any_channels(mode, colour):
    grid = plain_grid([Image.new(mode, (8, 8), colour)] * 2, 1, 2, 8)
    shade = 0 if mode == "L" else 255  # what is clear is white
    assert grid.mode == "RGB" and grid.size == (128, 64) and set(grid.getdata()) == {(shade,) * 3}


def test_texts_stand_before_their_rows():
    pipe = tiny_text_pipeline()
    pipe.set_progress_bar_config(disable=True)
    embeds, mask = pipe.encode_prompt(["a cat", "a red heart"])[:2]
    inputs = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    plain = sample_texts(pipe, inputs, None, None, num_images=2, resolution=8)
    assert plain.size == (2 * 64, 2 * 64)
    named = sample_texts(pipe, inputs, None, ["a cat", "a red heart"], num_images=2, resolution=8)
    assert named.width > named.height
