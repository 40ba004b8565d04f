# SPDX-License-Identifier: Apache-2.0
"""Model cards, and pushing pipelines: through the real client to the tests' own hub."""

import re

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from mar_hf import MARPipeline, build_model_card
from tiny_pipelines import tiny_pipeline, tiny_text_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def run_snippet(card, folder, monkeypatch):
    """Run the card's Python block as a reader would, in a folder of its own; returns what it leaves behind."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (that the snippet runs is what is tested)
    assert isinstance(names["pipe"], MARPipeline)
    return Image.open(folder / "image.png")


# The card


def test_the_header():
    data = build_model_card("org/name", license="apache-2.0").data
    assert data.library_name == "mar_hf"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.license == "apache-2.0"
    assert {"mar_hf", "diffusers"} <= set(data.tags)
    assert build_model_card("org/name").data.license is None


def test_the_text():
    card = build_model_card("org/some-name", description="Trained on *emoji*.\n")
    assert card.text.count("# some-name\n") == 1
    assert "Trained on *emoji*." in card.text
    assert 'MARPipeline.from_pretrained("org/some-name")' in card.text
    assert "class_labels=[0]" in card.text
    assert "Autoregressive Image Generation without Vector Quantization" in card.text
    assert "## Classes" not in card.text
    assert "arXiv:2406.11838" in build_model_card("org/some-name").text


def test_classes_are_listed_up_to_a_hundred():
    card = build_model_card("org/name", class_names=["heart", "cat, kitten"])
    assert "0: heart, 1: cat, kitten" in card.text
    names = [f"class {number}" for number in range(101)]
    assert "99: class 99" in build_model_card("org/name", class_names=names[:100]).text
    assert "## Classes" not in build_model_card("org/name", class_names=names).text


def test_the_card_survives_its_file(tmp_path):
    card = build_model_card("org/name", license="mit", class_names=["heart"])
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    assert loaded.text == card.text


@pytest.mark.parametrize("example, call", [(2, "[2]"), ("kitten", "['kitten']"), (None, "pipe()")])
def test_the_snippet_runs_on_a_folder(pipe, tmp_path, monkeypatch, example, call):
    pipe.save_pretrained(tmp_path / "model")
    card = build_model_card(str(tmp_path / "model"), example_class=example)
    assert call in card.text
    assert run_snippet(card, tmp_path, monkeypatch).size == (8, 8)


# Pushing


def test_a_pushed_pipeline_has_a_card_whose_snippet_runs(hub, pipe, tmp_path, monkeypatch):
    pipe.push_to_hub("org/tiny")
    card = ModelCard.load("org/tiny")
    assert card.data.library_name == "mar_hf"
    assert "0: heart, 1: cat, kitten, 2: clock" in card.text
    assert run_snippet(card, tmp_path, monkeypatch).size == (8, 8)


def test_a_pushed_pipeline_is_complete(hub, pipe):
    pipe.push_to_hub("org/tiny")
    assert sorted(set(HfApi().list_repo_files("org/tiny")) - {".gitattributes"}) == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/model.safetensors",
        "vae/config.json",
        "vae/model.safetensors",
    ]


def test_a_pushed_pipeline_of_texts_is_complete_and_its_snippet_runs(hub, tmp_path, monkeypatch):
    tiny_text_pipeline().push_to_hub("org/texts")
    card = ModelCard.load("org/texts")
    assert (
        card.data.pipeline_tag == "text-to-image" and "pipe(prompt=" in card.text and "class_labels" not in card.text
    )
    assert run_snippet(card, tmp_path, monkeypatch).size == (8, 8)
    files = set(HfApi().list_repo_files("org/texts"))
    assert {"text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"} < files


def test_the_snippet_of_a_model_that_knows_neither_classes_nor_words_runs(hub, tmp_path, monkeypatch):
    parts = {"config": {"num_classes": 0}, "id2label": None, "text_encoder": None, "tokenizer": None}
    tiny_text_pipeline(**parts).push_to_hub("org/states")
    card = ModelCard.load("org/states")
    assert "pipe()" in card.text
    assert run_snippet(card, tmp_path, monkeypatch).size == (8, 8)


@pytest.mark.parametrize("prompt", ["a cat", 'says "hi"\n\\', "赤いハート"])
def test_the_snippet_may_have_a_prompt(prompt, tmp_path, monkeypatch):
    tiny_text_pipeline().save_pretrained(tmp_path / "model")
    card = build_model_card(str(tmp_path / "model"), example_prompt=prompt)
    assert run_snippet(card, tmp_path, monkeypatch).size == (8, 8)


def test_pushing_again_keeps_the_users_card(hub, pipe):
    tiny_pipeline(id2label=None).push_to_hub("org/tiny")
    mine = "---\nlicense: mit\nlibrary_name: mar_hf\ntags:\n- mine\n---\n\n# My own words\n\nThey stay.\n"
    HfApi().upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="org/tiny")
    pipe.push_to_hub("org/tiny", commit_message="Better weights")
    card = ModelCard.load("org/tiny")
    assert card.text.strip() == "# My own words\n\nThey stay."
    assert card.data.to_dict() == {"license": "mit", "library_name": "mar_hf", "tags": ["mine"]}
    assert HfApi().list_repo_commits("org/tiny")[0].title == "Better weights"
    assert MARPipeline.from_pretrained("org/tiny").labels == pipe.labels


def test_a_card_that_came_first_is_kept(hub, pipe):
    HfApi().create_repo("org/tiny")
    build_model_card("org/tiny", description="Written before.").push_to_hub("org/tiny")
    pipe.push_to_hub("org/tiny")
    assert "Written before." in ModelCard.load("org/tiny").text


def test_a_name_without_an_organisation_goes_to_the_user(hub, pipe, tmp_path, monkeypatch):
    pipe.push_to_hub("tiny")
    card = ModelCard.load("tester/tiny")
    assert 'from_pretrained("tester/tiny")' in card.text
    assert run_snippet(card, tmp_path, monkeypatch).size == (8, 8)


def test_private_repositories_are_private_from_the_start(hub, pipe):
    pipe.push_to_hub("org/secret", private=True)
    assert HfApi().model_info("org/secret").private
    pipe.push_to_hub("org/open")
    assert not HfApi().model_info("org/open").private


def test_names_with_gaps_keep_their_numbers(hub):
    tiny_pipeline(id2label={0: "heart", 2: "clock"}).push_to_hub("org/gaps")
    text = ModelCard.load("org/gaps").text
    assert "0: heart" in text and "2: clock" in text and "1: clock" not in text


def test_a_pipeline_without_names_gets_a_card_without_classes(hub):
    tiny_pipeline(id2label=None).push_to_hub("org/nameless")
    assert "## Classes" not in ModelCard.load("org/nameless").text


def test_pushing_without_a_token_is_refused(hub, pipe):
    with pytest.raises(HfHubHTTPError):
        pipe.push_to_hub("org/tiny", token=False)
    assert not HfApi().repo_exists("org/tiny")
