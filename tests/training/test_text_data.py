# SPDX-License-Identifier: Apache-2.0
"""Captions: what is read, in which texts they stand, and the states of these."""

import json

import torch
from PIL import Image

from mar_hf.training.text_data import caption_choices, encode_choices, read_captions
from tiny_texts import tiny_text_encoder, tiny_text_tokenizer


TEMPLATES = ["{}", "{label}: {}"]


def test_every_caption_in_every_template():
    assert caption_choices(["a", "b"], TEMPLATES, "x") == ["a", "x: a", "b", "x: b"]


def test_choices_are_encoded_without_their_padding():
    parts = tiny_text_encoder().eval(), tiny_text_tokenizer()
    states = encode_choices([["a cat", "heart"], ["the clock on the heart"]], *parts, 8)
    assert [[len(text) for text in own] for own in states] == [[3, 2], [6]]
    alone = encode_choices([["heart"]], *parts, 8)[0][0]
    torch.testing.assert_close(states[0][1], alone)


def test_a_text_file_has_one_caption_a_line(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\n a cat\r\n\ncrêpe\u2028\na dog", encoding="utf-8")
    assert read_captions(str(path), "text") == ([["a cat"], ["crêpe"], ["a dog"]], [""] * 3)


def test_a_folder_has_captions_and_classes(tmp_path):
    rows = []
    for number, name in enumerate(["zoo", "ant"]):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"a {name}", "label": name}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert read_captions(str(tmp_path), "text") == ([["a zoo"], ["a ant"]], ["zoo", "ant"])
