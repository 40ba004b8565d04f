# SPDX-License-Identifier: Apache-2.0
"""`examples/evaluate_texts.py`: whole runs with a tiny model, and what it refuses."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from example_runs import forget_accelerate
from snippets import ROOT
from tiny_pipelines import tiny_pipeline, tiny_text_pipeline, tiny_transformer
from tiny_texts import TEXT, tiny_text_encoder, tiny_text_tokenizer, write_people


sys.path.insert(0, str(ROOT / "examples"))

import evaluate_texts  # noqa: E402


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("people"))


def test_a_whole_run(people, tmp_path):
    pipe = tiny_pipeline(transformer=tiny_transformer(**TEXT, num_classes=0), id2label=None)
    pipe.save_pretrained(tmp_path / "pipeline")
    tiny_text_encoder().save_pretrained(tmp_path / "encoder")
    tiny_text_tokenizer().save_pretrained(tmp_path / "encoder")
    settings = {"pretrained_text_encoder": str(tmp_path / "encoder"), "guidance_scales": [1.0, 2.0]}
    out = tmp_path / "out"
    evaluate_texts.main(
        evaluate_texts.Arguments(
            str(tmp_path / "pipeline"), str(people), str(out), num_images_per_prompt=3, **settings
        )
    )
    forget_accelerate()
    report = json.loads((out / "metrics.json").read_text())
    assert report["split"] == "test" and report["num_prompts"] == 2
    assert report["chance"] == pytest.approx({"both": 1 / 6, "gender": 1 / 2, "tone": 1 / 3})
    assert report["limit"] == {"both": 1.0, "gender": 1.0, "tone": 1.0}  # pixels come back as they are
    assert [result["guidance_scale"] for result in report["results"]] == [1.0, 2.0]
    for result in report["results"]:
        assert sum(count for row in result["confusion"]["tone"].values() for count in row.values()) == 6
        assert result["right"]["among_all_roles"] <= result["right"]["both"]
        assert all(0 <= value <= 1 for kind in ("right", "shuffled") for value in result[kind].values())
    for name in ("guidance.png", "samples.png"):
        assert np.asarray(Image.open(out / name)).size > 0


def test_combinations_that_were_seen_and_fewer_prompts(people, tmp_path):
    tiny_text_pipeline(config={"num_classes": 0}, id2label=None).save_pretrained(tmp_path / "pipeline")
    settings = {"split": "train", "num_prompts": 4, "guidance_scales": [1.0], "num_inference_steps": 2}
    evaluate_texts.main(
        evaluate_texts.Arguments(str(tmp_path / "pipeline"), str(people), str(tmp_path / "out"), **settings)
    )
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["split"] == "train" and report["num_prompts"] == 4
    assert report["settings"]["num_inference_steps"] == 2
    asked = report["results"][0]["confusion"]["tone"]
    assert sum(count for row in asked.values() for count in row.values()) == 4 * 2


def test_data_without_roles_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(ValueError, match="has no captions with roles"):
        evaluate_texts.main(evaluate_texts.Arguments("none", str(tmp_path), str(tmp_path / "out")))
    for split in ("train", "test"):
        (tmp_path / split / "metadata.jsonl").write_text('{"file_name": "a.png", "role": ""}', encoding="utf-8")
    with pytest.raises(ValueError, match="has no role, gender and tone in 'test'"):
        evaluate_texts.main(evaluate_texts.Arguments("none", str(tmp_path), str(tmp_path / "out")))


def test_a_pipeline_without_a_text_encoder_needs_one(people, tmp_path):
    pipe = tiny_pipeline(transformer=tiny_transformer(**TEXT, num_classes=0), id2label=None)
    pipe.save_pretrained(tmp_path / "pipeline")
    arguments = evaluate_texts.Arguments(str(tmp_path / "pipeline"), str(people), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no text encoder: give one with `pretrained_text_encoder`"):
        evaluate_texts.main(arguments)
