# SPDX-License-Identifier: Apache-2.0
"""Training on captions: from pictures and from a cache, warm starts, resuming; the captions that are drawn."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import NO_DROPOUT, equal, losses, run, weights, write_pictures

from example_runs import SIZES, forget_accelerate
from mar_hf import MARPipeline
from mar_hf.models import load_text_encoder
from mar_hf.training import LatentCacheArguments, cache_latents
from tiny_texts import TEXT_DIM, tiny_text_encoder, tiny_text_tokenizer


CAPTIONS = {"cat": ["a cat", "a small cat"], "clock": ["the clock on the heart"], "heart": ["a red heart", "heart"]}
TEMPLATES = ["{}", "{label}: {}"]
TEXT_SIZES = {**SIZES, "text_aligner_layers": 1, "num_text_tokens": 8}
CAUSAL = {name: value for name, value in TEXT_SIZES.items() if not name.endswith("coder_layers")}
CAUSAL |= {"model_type": "mar_hf_ar", "num_layers": 2}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Three classes of five pictures with captions of different numbers and lengths."""
    folder = tmp_path_factory.mktemp("captioned")
    write_pictures(folder, list(CAPTIONS), 5)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for name, captions in CAPTIONS.items():
            for number in range(5):
                row = {"file_name": f"{name}/{number}.png", "label": name, "text": captions}
                file.write(json.dumps(row) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a text encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny_text_encoder().save_pretrained(folder / "text_encoder")
    tiny_text_tokenizer().save_pretrained(folder / "tokenizer")
    return str(folder)


def text_settings(encoder, **settings):
    sizes = {"model_config": json.dumps(TEXT_SIZES), "caption_templates": TEMPLATES}
    return {"pretrained_text_encoder": encoder, **sizes, **settings}


@pytest.fixture(scope="module")
def trained(captioned, encoder, tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("trained_on_texts")
    return run(captioned, folder, **text_settings(encoder, checkpointing_steps=2))


def test_the_pipeline_understands_prompts(trained):
    pipe = MARPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.text_dim == TEXT_DIM and pipe.labels.keys() == CAPTIONS.keys()
    assert pipe.generation_defaults["guidance_schedule"] == "constant"
    images = [
        pipe(prompt=text, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for text in ("a red heart", "a cat", "")
    ]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
    card = (trained / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "text-to-image" in card and 'pipe(prompt="a cat")' in card


def test_the_text_encoder_is_not_trained(trained, encoder):
    saved = load_file(trained / "pipeline" / "text_encoder" / "model.safetensors")
    assert equal(saved, load_file(f"{encoder}/text_encoder/model.safetensors"))


def test_what_attends_to_texts_is_trained(trained):
    names = [name for name in weights(trained) if "context_attention.proj.weight" in name]
    assert len(names) == SIZES["num_encoder_layers"] + SIZES["num_decoder_layers"]
    assert all(weights(trained)[name].abs().max() > 0 for name in names)


def test_a_run_on_texts_is_resumed_to_the_same_bytes(trained, captioned, encoder, tmp_path):
    run(
        captioned,
        tmp_path,
        **text_settings(encoder, checkpointing_steps=2, max_train_steps=2, lr_scheduler="constant"),
    )
    whole = run(captioned, tmp_path / "whole", **text_settings(encoder, lr_scheduler="constant"))
    settings = text_settings(encoder, lr_scheduler="constant", resume_from_checkpoint="latest")
    assert equal(weights(run(captioned, tmp_path, **settings)), weights(whole))


def test_cached_texts_train_the_same_without_the_text_encoder(captioned, encoder, tmp_path):
    sizes = json.dumps({**NO_DROPOUT, **TEXT_SIZES, "attention_dropout": 0.0, "hidden_dropout": 0.0})
    from_pictures = run(captioned, tmp_path / "pictures", **text_settings(encoder, model_config=sizes))

    def cache(max_sequence_length):
        arguments = LatentCacheArguments(
            train_data_dir=captioned,
            pretrained_tokenizer=str(from_pictures / "pipeline" / "vae"),
            pretrained_text_encoder=encoder,
            caption_templates=TEMPLATES,
            max_sequence_length=max_sequence_length,
            output_dir=str(tmp_path / "cache"),
            resolution=8,
            shard_size=4,
        )
        try:
            cache_latents(arguments)
        finally:
            forget_accelerate()

    cache(8)
    from_cache = run(tmp_path / "cache", tmp_path / "cached", model_config=sizes)
    assert losses(from_cache) == pytest.approx(losses(from_pictures), rel=1e-4)
    pipe = MARPipeline.from_pretrained(from_cache / "pipeline")
    assert pipe.text_encoder is None and pipe.transformer.config.text_dim == TEXT_DIM
    with pytest.raises(ValueError, match="needs the pipeline's `text_encoder`"):
        pipe(prompt="a cat")
    short = json.dumps({**json.loads(sizes), "num_text_tokens": 2})
    with pytest.raises(ValueError, match=r"have up to [3-8] tokens, and the model takes 2: cache them with"):
        run(tmp_path / "cache", tmp_path / "short", model_config=short)
    # The same texts cut shorter are other texts.
    with pytest.raises(ValueError, match="max_sequence_length was 8, is 3"):
        cache(3)


def test_a_model_of_classes_learns_texts(captioned, encoder, tmp_path):
    classes = run(captioned, tmp_path / "classes", max_train_steps=2)
    assert MARPipeline.from_pretrained(classes / "pipeline").transformer.config.text_dim is None
    added = json.dumps({"text_aligner_layers": 1, "num_text_tokens": 8})
    settings = text_settings(encoder, model_config=added, max_train_steps=1, learning_rate=0.0, patch_size=4)
    source = str(classes / "pipeline")
    texts = run(captioned, tmp_path / "texts", pretrained_model_name_or_path=source, **settings)
    old, new = weights(classes), weights(texts)
    assert old.keys() < new.keys() and equal(old, {name: new[name] for name in old})
    # Nothing is added to it yet.
    pipes = [MARPipeline.from_pretrained(folder / "pipeline") for folder in (classes, texts)]
    made = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        made.append(
            pipe(
                class_labels=["cat"],
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
                guidance_schedule="linear",
            ).images
        )
    assert torch.equal(*made)


def test_fine_tuning_takes_the_text_encoder_of_the_pipeline(trained, captioned, tmp_path):
    source = str(trained / "pipeline")
    again = run(captioned, tmp_path, pretrained_model_name_or_path=source, model_config="{}", max_train_steps=1)
    assert MARPipeline.from_pretrained(again / "pipeline").text_encoder is not None


@pytest.mark.parametrize("sizes", [TEXT_SIZES, CAUSAL], ids=["mar", "ar"])
def test_a_model_may_know_texts_alone(captioned, encoder, tmp_path, sizes):
    settings = text_settings(encoder, model_config=json.dumps(sizes), ignore_classes=True, generation_defaults="{}")
    folder = run(captioned, tmp_path, max_train_steps=1, **settings)
    pipe = MARPipeline.from_pretrained(folder / "pipeline")
    assert pipe.transformer.config.num_classes == 0 and pipe.labels == {}
    with pytest.raises(ValueError, match="knows no classes"):
        pipe(class_labels=[0])


@pytest.mark.parametrize("sizes", [TEXT_SIZES, CAUSAL], ids=["mar", "ar"])
def test_a_model_of_texts_becomes_one_of_classes(captioned, encoder, tmp_path, sizes):
    settings = text_settings(encoder, model_config=json.dumps(sizes), ignore_classes=True, generation_defaults="{}")
    source = run(captioned, tmp_path / "texts", max_train_steps=1, **settings) / "pipeline"
    forget_accelerate()
    settings = {"pretrained_model_name_or_path": str(source), "model_config": json.dumps({"text_dim": None})}
    settings |= {"generation_defaults": "{}", "learning_rate": 0.0}
    folder = run(captioned, tmp_path / "classes", max_train_steps=1, **settings)
    pipe = MARPipeline.from_pretrained(folder / "pipeline")
    assert pipe.text_encoder is None and pipe.transformer.config.text_dim is None
    assert pipe.labels.keys() == CAPTIONS.keys()
    old, new = (load_file(path / "transformer" / "model.safetensors") for path in (source, folder / "pipeline"))
    table = "model.class_embedding.weight"
    # What is not about texts is kept, and classes start as no class, the only row that there was.
    assert {name for name in old if "text_aligner" not in name and "context_" not in name} == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in new if name != table)
    assert torch.equal(new[table], old[table].expand(4, -1))


@pytest.mark.parametrize("text_dim", [None, TEXT_DIM + 1])
def test_texts_need_their_own_text_dim(captioned, encoder, tmp_path, text_dim):
    sizes = json.dumps({**TEXT_SIZES, "text_dim": text_dim})
    with pytest.raises(ValueError, match=f"has the `text_dim` {text_dim}, .* states of {TEXT_DIM} numbers"):
        run(captioned, tmp_path, **text_settings(encoder, model_config=sizes))
    forget_accelerate()


def test_other_sizes_than_those_of_the_model_that_is_fine_tuned_are_refused(trained, captioned, tmp_path):
    settings = {"pretrained_model_name_or_path": str(trained / "pipeline")}
    settings["model_config"] = json.dumps({"text_dim": None, "mlp_ratio": 2.0})
    with pytest.raises(ValueError, match=r"do not fit its configuration: .*mlp\.fc1"):
        run(captioned, tmp_path, **settings)
    forget_accelerate()


def test_data_without_captions_is_refused(trained, tmp_path, encoder):
    pictures = write_pictures(tmp_path / "plain", ["cat", "dog"], 4)
    with pytest.raises(ValueError, match="has no captions: no column 'text'"):
        run(pictures, tmp_path / "out", **text_settings(encoder))
    forget_accelerate()
    tokenizer, cache = str(trained / "pipeline" / "vae"), str(tmp_path / "cache")
    cache_latents(LatentCacheArguments(pictures, tokenizer, cache, resolution=8))
    forget_accelerate()
    with pytest.raises(ValueError, match="The cached latents hold no texts"):
        run(cache, tmp_path / "out", **text_settings(encoder))
    forget_accelerate()


def test_a_plain_folder_of_a_model_is_a_text_encoder_too(tmp_path):
    tiny_text_encoder("bert").save_pretrained(tmp_path)
    tiny_text_tokenizer("bert").save_pretrained(tmp_path)
    text_encoder, tokenizer = load_text_encoder(str(tmp_path))
    assert text_encoder.config.hidden_size == TEXT_DIM and not any(p.requires_grad for p in text_encoder.parameters())
    assert len(tokenizer) == text_encoder.config.vocab_size
