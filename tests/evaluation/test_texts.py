# SPDX-License-Identifier: Apache-2.0
"""Pictures of texts: neighbours, shares, confusions, chance and the limit of the tokenizer."""

import pytest
import torch
from PIL import Image

from common import seeded
from mar_hf.evaluation.texts import (
    chance,
    confusion,
    judge_texts,
    limit,
    nearest,
    read_candidates,
    read_pixels,
    read_rows,
    reconstruct,
    shares,
    whatever_the_role,
)
from tiny_pipelines import tiny_kl, tiny_pixels
from tiny_texts import write_people


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("people"))


def test_real_pictures_are_their_own_neighbours(people):
    rows = read_rows(people / "train") + read_rows(people / "test")
    assert len(rows) == 12 and len(read_rows(people / "test")) == 2
    points, candidates = read_pixels([Image.open(row["path"]) for row in rows], 8), read_candidates(rows, 8)
    assert {role: len(own) for role, (own, _) in candidates.items()} == {"cook": 6, "pilot": 6}
    found = nearest(points, rows, candidates)
    assert found == rows and shares(found, rows) == {"both": 1.0, "gender": 1.0, "tone": 1.0}
    # A little noise changes nothing.
    noisy = points + 0.02 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0))
    assert nearest(noisy, rows, candidates) == rows
    # Judged by the other role, only that role's rows are found.
    other = [{**row, "role": "pilot" if row["role"] == "cook" else "cook"} for row in rows]
    assert all(one["role"] == two["role"] for one, two in zip(nearest(points, other, candidates), other, strict=True))


def test_shares_and_confusions_count():
    wanted = [{"gender": "man", "tone": "dark"}] * 3 + [{"gender": "woman", "tone": "light"}]
    found = [
        {"gender": "man", "tone": "dark"},
        {"gender": "man", "tone": "light"},
        {"gender": "woman", "tone": "dark"},
        {"gender": "woman", "tone": "light"},
    ]
    assert shares(found, wanted) == {"both": 0.5, "gender": 0.75, "tone": 0.75}
    assert confusion(found, wanted, "tone") == {"dark": {"dark": 2, "light": 1}, "light": {"dark": 0, "light": 1}}


def test_chance_and_limit(people):
    wanted = read_rows(people / "test")
    candidates = read_candidates([*wanted, *read_rows(people / "train")], 8)
    assert chance(wanted, candidates) == pytest.approx({"both": 1 / 6, "gender": 1 / 2, "tone": 1 / 3})
    # Pixels come back as they are; what an untrained autoencoder decodes says less.
    assert limit(wanted, candidates, tiny_pixels(), 8) == {"both": 1.0, "gender": 1.0, "tone": 1.0}
    points = candidates["cook"][1]
    assert torch.allclose(reconstruct(tiny_pixels(), points, 8), points, atol=1e-6)
    assert reconstruct(tiny_kl(), points, 8).shape == points.shape
    assert limit(wanted, candidates, tiny_kl(), 8)["both"] < 1


def test_the_verdict_on_real_pictures(people):
    wanted = read_rows(people / "test")
    candidates = read_candidates([*wanted, *read_rows(people / "train")], 8)
    points = read_pixels([Image.open(row["path"]) for row in wanted for _ in range(3)], 8)
    verdict = judge_texts(points, wanted, candidates)
    assert verdict["right"] == {"both": 1.0, "gender": 1.0, "tone": 1.0, "among_all_roles": 1.0}
    assert sum(count for row in verdict["confusion"]["tone"].values() for count in row.values()) == 6
    # As pictures of the other caption they are wrong, unless both captions are alike.
    other = nearest(points[:3], [wanted[1]] * 3, candidates) + nearest(points[3:], [wanted[0]] * 3, candidates)
    assert verdict["shuffled"] == shares(other, [wanted[1]] * 3 + [wanted[0]] * 3)
    # A model of something else: noise has the same nearest picture among all as within the role, or another role's.
    noise = torch.rand(points.shape, generator=seeded())
    found = judge_texts(noise, wanted, candidates)["right"]
    assert found["among_all_roles"] <= found["both"]
    everywhere = whatever_the_role(candidates)
    assert {len(rows) for rows, _ in everywhere.values()} == {12}


@pytest.mark.parametrize("text", [None, "{", '{"file_name": "a.png"'])
def test_captions_that_can_not_be_read(tmp_path, text):
    if text is not None:
        (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="`data_dir` has no captions with roles"):
        read_rows(tmp_path)
