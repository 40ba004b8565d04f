# SPDX-License-Identifier: Apache-2.0
"""Pipelines come back as they were saved: folders, hub ids, another process, shards, variants and dtypes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel

from mar_hf import (
    ARForImageGeneration,
    ImageTokenizer,
    MARConfig,
    MARForImageGeneration,
    MARModel,
    MARPipeline,
    TokenDDPMScheduler,
)
from tiny_pipelines import FEW_STEPS, NAMES, seeds, tiny_kl, tiny_pipeline, tiny_text_pipeline, tiny_transformer
from tiny_texts import TEXT, TEXT_ENCODERS, tiny_text_encoder, tiny_text_tokenizer


SETTINGS = {
    "num_inference_steps": 4,
    "guidance_scale": 1.5,
    "num_diffusion_steps": 6,
    "guidance_schedule": "constant",
    "token_schedule": "constant",
    "head_step_schedule": "linear",
    "temperature": 0.9,
    "generation_order": "raster",
    "context_noise": 0.1,
}


TEXT_SETTINGS = ("text_dim", "num_text_tokens", "text_aligner_layers", "text_dropout_prob")


@pytest.fixture(params=["pixels", "kl", "causal", "texts", "causal-texts"])
def pipe(request):
    """On pixels, with an autoencoder, with the causal backbone, and of texts with either."""
    if request.param.endswith("texts"):
        backbone = "ar" if request.param.startswith("causal") else "mar"
        return tiny_text_pipeline(backbone=backbone, generation_defaults=SETTINGS)
    vae = tiny_kl() if request.param == "kl" else None
    return tiny_pipeline(vae, backbone="ar" if request.param == "causal" else "mar", generation_defaults=SETTINGS)


@pytest.fixture(scope="module")
def kl():
    return tiny_pipeline(tiny_kl())


@pytest.fixture(scope="module")
def folder(kl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    kl.save_pretrained(folder)
    return folder


def load(source, **kwargs):
    pipe = MARPipeline.from_pretrained(source, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **settings):
    texts = {} if pipe.text_encoder is None else {"prompt": ["a red heart", "cat"], "negative_prompt": "big clock"}
    return pipe([1, 2], generator=seeds(0, 1), output_type="pt", **texts, **settings).images


def files(folder, ending):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{ending}"))


def assert_same_pipeline(found, expected):
    """Weights, settings and pictures, bit for bit."""
    names = ["transformer", "vae"] if expected.text_encoder is None else ["transformer", "vae", "text_encoder"]
    for name in names:
        part, other = getattr(found, name), getattr(expected, name)
        assert type(part) is type(other) and not part.training
        tensors, others = part.state_dict(), other.state_dict()
        assert tensors.keys() == others.keys()
        assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []
        assert [key for key in tensors if tensors[key].dtype != others[key].dtype] == []
    assert isinstance(found.scheduler, TokenDDPMScheduler)
    for name in ("max_timestep", "num_train_timesteps"):
        assert found.scheduler.config[name] == expected.scheduler.config[name]
    assert found.config.id2label == expected.config.id2label
    assert found.generation_defaults == expected.generation_defaults
    assert torch.equal(generate(found), generate(expected))


def test_a_folder_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "MARPipeline"
    causal = isinstance(pipe.transformer, ARForImageGeneration)
    assert index["transformer"] == ["mar_hf", "ARForImageGeneration" if causal else "MARForImageGeneration"]
    assert index["vae"] == ["mar_hf", "ImageTokenizer"]
    assert index["scheduler"] == ["mar_hf", "TokenDDPMScheduler"]
    assert index["text_encoder"] == [None, None] if pipe.text_encoder is None else ["transformers", "T5EncoderModel"]
    assert (index["tokenizer"] == [None, None]) == (pipe.tokenizer is None)
    assert index["generation_defaults"] == SETTINGS
    found = load(tmp_path)
    assert_same_pipeline(found, pipe)
    assert found.config.id2label == NAMES  # numbers again, though JSON knows only strings
    assert found.labels["kitten"] == 1


def test_a_second_round_trip_changes_nothing(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    written = {path: (folder / path).read_bytes() for path in files(folder, ".*")}
    again = {path: (tmp_path / path).read_bytes() for path in files(tmp_path, ".*")}
    index = json.loads(again.pop("model_index.json"))
    del index["_name_or_path"]  # diffusers notes where the pipeline came from
    assert index == json.loads(written.pop("model_index.json"))
    assert len(written) == 5 and again == written


def test_saved_defaults_are_used(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    plain = tiny_pipeline(**{name: part for name, part in pipe.components.items() if name != "scheduler"})
    expected = generate(plain, **SETTINGS)
    assert torch.equal(generate(load(tmp_path)), expected)
    assert not torch.allclose(generate(plain), expected, atol=1e-3)


@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_a_pipeline_without_names_and_defaults(backbone, tmp_path):
    pipe = tiny_pipeline(backbone=backbone, id2label=None, generation_defaults=None)
    pipe.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert found.config.id2label is None and found.labels == {}
    assert found.generation_defaults == pipe.generation_defaults


@pytest.mark.parametrize("backbone", ["mar", "ar"])
def test_a_categorical_head_comes_back_with_its_codebook(backbone, tmp_path):
    head = {"head_type": "categorical", "head_config": {"num_codes": 8}}
    defaults = {"num_inference_steps": 4, "head_kwargs": {"top_k": 3}}
    pipe = tiny_pipeline(transformer=tiny_transformer(backbone=backbone, **head), generation_defaults=defaults)
    pipe.save_pretrained(tmp_path)
    assert_same_pipeline(load(tmp_path), pipe)


def test_by_hub_id(hub, pipe, tmp_path):
    pipe.push_to_hub("org/tiny")
    found = load("org/tiny", cache_dir=tmp_path / "cache")
    assert_same_pipeline(found, pipe)
    assert ("GET", "/org/tiny/resolve/", 200) in {(m, p[:18], status) for m, p, status in hub.log}
    hub.clear()
    assert_same_pipeline(load("org/tiny", cache_dir=tmp_path / "cache", local_files_only=True), pipe)


@pytest.mark.slow
def test_in_a_fresh_process(hub, kl, folder, tmp_path):
    causal, texts = tiny_pipeline(backbone="ar"), tiny_text_pipeline()
    for pipe, name in ((kl, "fresh"), (causal, "causal"), (texts, "texts")):
        pipe.push_to_hub(f"org/{name}")

    def pixels(pipe, **subject):
        return hashlib.sha256(pipe(**subject, generator=seeds(0)).images[0].tobytes()).hexdigest()

    expected = [*(pixels(pipe, class_labels="kitten") for pipe in (kl, causal)), pixels(texts, prompt="kitten")]
    code = """
import hashlib, sys, torch
from mar_hf import MARPipeline
for source in sys.argv[1:]:
    pipe = MARPipeline.from_pretrained(source)
    subject = {"class_labels" if pipe.text_encoder is None else "prompt": "kitten"}
    image = pipe(**subject, generator=torch.Generator().manual_seed(0)).images[0]
    print(hashlib.sha256(image.tobytes()).hexdigest())
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    sources = [str(folder), "org/fresh", "org/causal", "org/texts"]
    run = subprocess.run([sys.executable, "-c", code, *sources], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [expected[0], *expected]


def test_components_by_hub_id(hub, kl, tmp_path):
    kl.push_to_hub("org/parts")

    def part(cls, name):
        return cls.from_pretrained("org/parts", subfolder=name, cache_dir=tmp_path)

    assert_same_pipeline(
        MARPipeline(
            part(MARForImageGeneration, "transformer"),
            part(ImageTokenizer, "vae"),
            part(TokenDDPMScheduler, "scheduler"),
            id2label=NAMES,
            generation_defaults=FEW_STEPS,
        ),
        kl,
    )
    assert isinstance(part(AutoConfig, "transformer"), MARConfig)


def test_auto_model_gives_the_backbone_without_the_head(folder, kl):
    backbone = AutoModel.from_pretrained(folder, subfolder="transformer")
    assert type(backbone) is MARModel
    for name, tensor in kl.transformer.model.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], tensor), name


def test_variants(hub, kl, tmp_path):
    half = load_copy(kl).to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    names = ["transformer/model.fp16.safetensors", "vae/model.fp16.safetensors"]
    assert files(tmp_path, ".safetensors") == names
    found = load(tmp_path, variant="fp16", dtype=torch.float16)
    assert_same_pipeline(found, half)
    half.push_to_hub("org/variant", variant="fp16")
    assert_same_pipeline(load("org/variant", variant="fp16", dtype=torch.float16, cache_dir=tmp_path / "cache"), half)


def load_copy(pipe):
    """The same pipeline on weights of its own."""
    parts = {name: type(part).from_config(part.config) for name, part in (("scheduler", pipe.scheduler),)}
    for name in ("transformer", "vae"):
        part = getattr(pipe, name)
        parts[name] = type(part)(part.config).eval()
        parts[name].load_state_dict(part.state_dict())
    copy = MARPipeline(**parts, id2label=pipe.config.id2label, generation_defaults=pipe.config.generation_defaults)
    copy.set_progress_bar_config(disable=True)
    return copy


def test_a_variant_beside_the_default(kl, tmp_path):
    kl.save_pretrained(tmp_path)
    load_copy(kl).to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    assert len(files(tmp_path, ".safetensors")) == 4
    # Without `dtype`, transformers takes that of the configuration, which both variants share.
    assert_same_pipeline(load(tmp_path, dtype=torch.float32), kl)
    assert load(tmp_path, variant="bf16").transformer.dtype == torch.bfloat16


def test_wrong_variants_raise(hub, kl, folder):
    with pytest.raises((ValueError, OSError), match="fp16"):
        load(folder, variant="fp16")
    kl.push_to_hub("org/no-variant")
    with pytest.raises((ValueError, OSError), match="fp16"):
        load("org/no-variant", variant="fp16")


def test_dtypes(folder):
    assert {part.dtype for part in (load(folder).transformer, load(folder).vae)} == {torch.float32}
    half = load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for part in (half.transformer, half.vae) for parameter in part.parameters()} == {
        torch.bfloat16
    }
    assert generate(half).isfinite().all()
    mixed = load(folder, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float32)
    assert generate(mixed).isfinite().all()


def test_tables_stay_exact_in_half_precision(folder, kl):
    half = load(folder, dtype=torch.bfloat16)
    for name in ("betas", "alphas_cumprod"):
        found = getattr(half.scheduler, name)
        assert found.dtype == torch.float64 and torch.equal(found, getattr(kl.scheduler, name))


def test_shards(hub, kl, tmp_path):
    kl.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = files(tmp_path / "transformer", ".safetensors")
    assert len(shards) > 2 and "model.safetensors" not in shards
    assert (tmp_path / "transformer" / "model.safetensors.index.json").exists()
    assert_same_pipeline(load(tmp_path), kl)
    HfApi().create_repo("org/shards")
    HfApi().upload_folder(repo_id="org/shards", folder_path=tmp_path)
    assert_same_pipeline(load("org/shards", cache_dir=tmp_path / "cache"), kl)


def test_a_truncated_component_is_refused(kl, tmp_path):
    kl.save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"transformer/model\.safetensors is truncated"):
        load(tmp_path)


def test_from_pipe(kl):
    found = MARPipeline.from_pipe(kl)
    found.set_progress_bar_config(disable=True)
    assert found.transformer is kl.transformer and found.vae is kl.vae
    assert_same_pipeline(found, kl)
    other = MARPipeline.from_pipe(kl, generation_defaults={**FEW_STEPS, "temperature": 0.5})
    assert other.generation_defaults["temperature"] == 0.5 and other.config.id2label == NAMES
    assert kl.generation_defaults["temperature"] == 1.0


def test_a_component_can_be_replaced_while_loading(folder, kl):
    scheduler = DDIMScheduler.from_config(kl.scheduler.config)
    found = load(folder, scheduler=scheduler)
    assert found.scheduler is scheduler
    assert not torch.equal(generate(found), generate(kl))


def test_a_swapped_scheduler_is_saved(folder, tmp_path):
    pipe = load(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    found = load(tmp_path)
    assert torch.equal(generate(found), generate(pipe))
    # And back: nothing of our configuration was lost on the way.
    found.scheduler = TokenDDPMScheduler.from_config(found.scheduler.config)
    assert found.scheduler.config.max_timestep == 400
    assert torch.equal(generate(found), generate(load(folder)))


@pytest.mark.parametrize("name", ["transformer", "vae", "scheduler"])
def test_components_can_be_left_out(folder, name, tmp_path):
    pipe = MARPipeline.from_pretrained(folder, **{name: None})
    missing = {part for part, value in pipe.components.items() if value is None}
    assert missing == {name, "text_encoder", "tokenizer", "guider"}  # the last three were never there
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())[name] == [None, None]
    again = MARPipeline.from_pretrained(tmp_path, **{name: getattr(load(folder), name)})
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again), generate(load(folder)))


# Texts


@pytest.fixture(params=TEXT_ENCODERS)
def texts(request):
    """A pipeline of texts with each of the text encoders."""
    return tiny_text_pipeline(request.param)


def test_text_encoders_and_tokenizers_come_back(texts, tmp_path):
    texts.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert_same_pipeline(found, texts)
    for text in ("a red heart", "☃ süß", "big " * 30):
        assert found.tokenizer(text).input_ids == texts.tokenizer(text).input_ids
    assert found.tokenizer.model_max_length == texts.tokenizer.model_max_length
    found.save_pretrained(tmp_path / "again")
    assert_same_pipeline(load(tmp_path / "again"), texts)


def test_text_encoders_may_stay_behind(texts, tmp_path):
    texts.save_pretrained(tmp_path / "whole")
    found = load(tmp_path / "whole", text_encoder=None, tokenizer=None)
    assert found.text_encoder is None and found.tokenizer is None
    embeds, mask, *_ = texts.encode_prompt(["a red heart"])
    settings = {"generator": seeds(0), "output_type": "pt"}
    expected = texts(prompt="a red heart", **settings).images
    states = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    assert torch.equal(found(**states, **{**settings, "generator": seeds(0)}).images, expected)
    with pytest.raises(ValueError, match="`prompt` needs the pipeline's `text_encoder` and `tokenizer`"):
        found(prompt="a red heart")
    found.save_pretrained(tmp_path / "light")
    index = json.loads((tmp_path / "light" / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert not (tmp_path / "light" / "text_encoder").exists()
    light = load(tmp_path / "light")
    assert torch.equal(light(**states, **{**settings, "generator": seeds(0)}).images, expected)
    # And be given again.
    parts = {"text_encoder": texts.text_encoder, "tokenizer": texts.tokenizer}
    assert_same_pipeline(load(tmp_path / "light", **parts), texts)


def test_text_encoders_in_half_precision(texts, tmp_path):
    texts.save_pretrained(tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half.text_encoder.dtype == half.transformer.dtype == torch.bfloat16
    assert generate(half).isfinite().all()
    mixed = load(tmp_path, dtype={"text_encoder": torch.bfloat16, "default": torch.float32})
    assert (mixed.text_encoder.dtype, mixed.transformer.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(generate(mixed), generate(texts), rtol=0, atol=0.2)


def test_folders_from_before_there_were_texts_load(kl, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name, keys in (
        ("model_index.json", ("text_encoder", "tokenizer")),
        ("transformer/config.json", TEXT_SETTINGS),
    ):
        settings = json.loads((tmp_path / name).read_text())
        for key in keys:
            del settings[key]
        (tmp_path / name).write_text(json.dumps(settings))
    found = load(tmp_path)
    assert found.text_encoder is None and found.tokenizer is None and found.transformer.config.text_dim is None
    assert_same_pipeline(found, kl)


def test_a_pipeline_of_classes_becomes_one_of_texts(folder, kl, tmp_path):
    transformer = MARForImageGeneration.from_pretrained(
        folder, subfolder="transformer", **TEXT, ignore_mismatched_sizes=True
    )
    parts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_text_tokenizer()}
    grown = tiny_pipeline(kl.vae, transformer=transformer, **parts)
    settings = {"guidance_schedule": "linear", "generator": seeds(0, 1), "output_type": "pt"}
    # Until it is trained, texts add nothing.
    expected = generate(kl)
    assert torch.equal(grown([1, 2], **settings).images, expected)
    found = grown([1, 2], prompt=["cat", "a"], **{**settings, "generator": seeds(0, 1)}).images
    assert torch.equal(found, expected)
    grown.save_pretrained(tmp_path)
    assert_same_pipeline(load(tmp_path), grown)
