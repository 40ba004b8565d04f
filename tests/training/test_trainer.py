# SPDX-License-Identifier: Apache-2.0
"""The training of models: exact resume, any number of processes, fine-tuning, low-rank updates, publishing."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (the default tracker has to be installed)

from example_runs import SIZES, forget_accelerate, in_processes
from mar_hf import TOKEN_HEADS, ARForImageGeneration, ImageTokenizer, MARConfig, MARPipeline
from mar_hf.models import BACKBONES
from mar_hf.training import (
    LatentCacheArguments,
    TokenizerTrainer,
    TokenizerTrainingArguments,
    Trainer,
    TrainingArguments,
    cache_latents,
    parse_arguments,
)
from snippets import ROOT


# A causal model as small as the masked one.
CAUSAL = {name: value for name, value in SIZES.items() if not name.endswith("coder_layers")}
CAUSAL |= {"model_type": "mar_hf_ar", "num_layers": 2}
NO_DROPOUT = {**SIZES, "attention_dropout": 0.0, "hidden_dropout": 0.0}
SETTINGS = {
    "resolution": 8,
    "patch_size": 2,
    "model_config": json.dumps(SIZES),
    "train_batch_size": 4,
    "max_train_steps": 4,
    "learning_rate": 1e-2,
    "lr_warmup_steps": 2,
    "logging_steps": 1,
    "validation_images": 1,
    "generation_defaults": '{"num_inference_steps": 2, "num_diffusion_steps": 2}',
    "report_to": "none",
}


def write_pictures(folder, names, per_class, size=8, seed=0):
    generator = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            picture = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of five pictures."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), ["cat", "dog", "owl"], 5)


def run(data, folder, **settings):
    Trainer(TrainingArguments(train_data_dir=str(data), output_dir=str(folder), **{**SETTINGS, **settings})).train()
    forget_accelerate()
    return folder


def rows(folder):
    with open(folder / "loss.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(folder):
    return [float(row["loss"]) for row in rows(folder)]


def weights(folder):
    return load_file(folder / "pipeline" / "transformer" / "model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run of four steps."""
    return run(pictures, tmp_path_factory.mktemp("trained"), checkpointing_steps=2, validation_steps=2)


def test_a_run_leaves_a_pipeline_checkpoints_samples_and_curves(trained):
    names = {"checkpoint-2", "checkpoint-4", "pipeline", "samples", "loss.csv", "loss.png"}
    assert names == {path.name for path in trained.iterdir()}
    assert sorted(path.name for path in (trained / "samples").iterdir()) == ["step_000002.png", "step_000004.png"]
    assert [row["step"] for row in rows(trained)] == ["1", "2", "3", "4"]
    assert [bool(row["validation_loss"]) for row in rows(trained)] == [False, True, False, True]
    assert [float(row["learning_rate"]) for row in rows(trained)] == [5e-3, 1e-2, 1e-2, 1e-2]
    pipe = MARPipeline.from_pretrained(trained / "pipeline")
    assert pipe.labels == {"cat": 0, "dog": 1, "owl": 2}
    assert pipe.scheduler.config.max_timestep == 950
    card = (trained / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "15 examples for 4 steps of 4 pictures" in card and "| learning_rate | `0.01` |" in card


def test_a_run_can_be_repeated_and_its_seed_matters(trained, pictures, tmp_path):
    again = run(pictures, tmp_path / "again", checkpointing_steps=3, validation_steps=4)
    assert equal(weights(again), weights(trained)) and losses(again) == losses(trained)
    other = run(pictures, tmp_path / "other", seed=1)
    assert losses(other) != losses(trained)


@pytest.mark.parametrize("checkpoint", ["latest", "checkpoint-2"])
def test_a_resumed_run_ends_with_the_same_bytes(trained, pictures, tmp_path, checkpoint):
    # With dropout, which draws from the global state; from a checkpoint in the middle of an epoch.
    folder = tmp_path / "run"
    run(pictures, folder, max_train_steps=2, checkpointing_steps=2, validation_steps=2)
    run(pictures, folder, checkpointing_steps=2, validation_steps=2, resume_from_checkpoint=checkpoint)
    files = [path.relative_to(trained) for path in sorted(trained.rglob("*")) if path.is_file()]
    files = [path for path in files if path.name != "README.md"]
    assert len(files) > 12
    different = [str(path) for path in files if (folder / path).read_bytes() != (trained / path).read_bytes()]
    assert different == []


def test_a_folder_with_checkpoints_is_not_overwritten(trained, pictures):
    with pytest.raises(ValueError, match="holds checkpoints: go on with `--resume_from_checkpoint latest`"):
        run(pictures, trained)


def test_other_data_is_not_resumed_on(trained, pictures, tmp_path):
    data = write_pictures(tmp_path / "data", ["cat", "dog", "owl"], 6)
    with pytest.raises(ValueError, match="was trained on 15 examples, the data now has 18"):
        run(data, trained, resume_from_checkpoint="latest", max_train_steps=6)
    with pytest.raises(ValueError, match="was trained with `seed` 0, got 1"):
        run(pictures, trained, resume_from_checkpoint="latest", max_train_steps=6, seed=1)


@pytest.mark.slow
def test_two_processes_with_half_the_batch_follow_one(pictures, tmp_path):
    settings = {"max_train_steps": 50, "random_flip": True, "random_shift": 1}
    settings["model_config"] = json.dumps(NO_DROPOUT)
    run(pictures, tmp_path / "one", **settings)
    in_processes(2, run, pictures, tmp_path / "two", **settings, train_batch_size=SETTINGS["train_batch_size"] // 2)
    first, second = (torch.tensor(losses(tmp_path / name)) for name in ("one", "two"))
    assert len(first) == 50 and (first - second).abs().max() < 1e-4
    assert first[-10:].mean() < first[:10].mean()
    first, second = (float(rows(tmp_path / name)[-1]["validation_loss"]) for name in ("one", "two"))
    assert abs(first - second) < 1e-4


def test_accumulated_batches_equal_a_large_one(pictures, tmp_path):
    # The masking ratio is drawn for each batch, so it is fixed here.
    config = json.dumps({**NO_DROPOUT, "mask_ratio_min": 1.0})
    whole = run(pictures, tmp_path / "whole", model_config=config)
    parts = run(pictures, tmp_path / "parts", model_config=config, train_batch_size=2, gradient_accumulation_steps=2)
    assert np.allclose(losses(whole), losses(parts), atol=1e-5)


def test_training_from_cached_latents_equals_training_from_pictures(trained, pictures, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    MARPipeline.from_pretrained(trained / "pipeline").vae.save_pretrained(tokenizer)
    cache_latents(
        LatentCacheArguments(
            train_data_dir=pictures,
            pretrained_tokenizer=str(tokenizer),
            resolution=8,
            output_dir=str(tmp_path / "cache"),
            random_flip=True,
        )
    )
    settings = {"random_flip": True, "max_train_steps": 3}
    first = run(pictures, tmp_path / "pictures", pretrained_tokenizer=str(tokenizer), **settings)
    second = run(tmp_path / "cache", tmp_path / "latents", **settings)
    # The mirrored ones are drawn from the same generators in both ways.
    assert np.allclose(losses(first), losses(second), atol=1e-5)
    pipes = [MARPipeline.from_pretrained(folder / "pipeline") for folder in (first, second)]
    assert equal(pipes[0].vae.state_dict(), pipes[1].vae.state_dict())
    with pytest.raises(ValueError, match="`resolution` 16 has to be that of the latents: 8"):
        run(tmp_path / "cache", tmp_path / "wrong", resolution=16)
    other = MARPipeline.from_pretrained(trained / "pipeline").vae
    other.config.scaling_factor = 1.0
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds latents of another tokenizer"):
        run(tmp_path / "cache", tmp_path / "wrong", pretrained_tokenizer=str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "cache" / "tokenizer")
    with pytest.raises(ValueError, match="give `pretrained_tokenizer`"):
        run(tmp_path / "cache", tmp_path / "wrong")
    with pytest.raises(ValueError, match="`random_shift` 1 does not go with cached latents"):
        run(tmp_path / "cache", tmp_path / "wrong", random_shift=1)


def test_a_categorical_head_gets_its_codebook_from_cached_latents_too(pictures, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            num_vq_embeddings=16,
        )
    tokenizer = ImageTokenizer.from_autoencoder(autoencoder, quantize=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = {"train_data_dir": pictures, "pretrained_tokenizer": str(tmp_path / "tokenizer"), "resolution": 8}
    cache_latents(LatentCacheArguments(output_dir=str(tmp_path / "cache"), **words))
    head = {"head_type": "categorical", "head_config": {"num_codes": 16}}
    folder = run(tmp_path / "cache", tmp_path / "run", model_config=json.dumps({**SIZES, **head}))
    pipe = MARPipeline.from_pretrained(folder / "pipeline")
    assert torch.equal(pipe.transformer.head.codebook, tokenizer.codebook)
    tokens = pipe.vae.patchify(pipe(class_labels=["cat"], output_type="latent").images)[0]
    assert torch.cdist(tokens, tokenizer.codebook).min(1).values.max() < 1e-4


@pytest.mark.parametrize("head_type", ["flow_matching", "shortcut"], ids=["a scheduler", "none"])
def test_other_heads_train_by_configuration_alone(head_type, pictures, tmp_path):
    settings = {"model_config": json.dumps({**SIZES, "head_type": head_type}), "max_train_steps": 2}
    folder = run(pictures, tmp_path, **settings, validation_steps=2)
    assert all(0 < loss < 100 for loss in losses(folder))
    pipe = MARPipeline.from_pretrained(folder / "pipeline")
    kind = TOKEN_HEADS[head_type].scheduler_class
    assert pipe.scheduler is None if kind is None else type(pipe.scheduler) is kind
    assert pipe(class_labels=["cat"], output_type="latent").images.isfinite().all()


def test_fine_tuning_keeps_the_model_and_the_classes_of_the_same_name(trained, tmp_path):
    data = write_pictures(tmp_path / "data", ["bee", "owl"], 4, seed=1)
    folder = run(
        data,
        tmp_path / "run",
        pretrained_model_name_or_path=str(trained / "pipeline"),
        max_train_steps=1,
        learning_rate=0.0,
        model_config="{}",
    )
    old, new = weights(trained), weights(folder)
    table = "model.class_embedding.weight"
    before, after = old.pop(table), new.pop(table)
    assert equal(old, new)
    # bee is new; owl was class 2; the last row is no class.
    assert torch.equal(after[1:], before[2:])
    assert torch.allclose(after[0], before[:3].mean(0))
    pipe = MARPipeline.from_pretrained(folder / "pipeline")
    assert pipe.labels == {"bee": 0, "owl": 1} and pipe.transformer.config.num_classes == 2
    assert (
        pipe.vae.config.scaling_factor == MARPipeline.from_pretrained(trained / "pipeline").vae.config.scaling_factor
    )


def test_fine_tuning_on_as_many_other_classes_does_not_keep_the_old_ones(trained, tmp_path):
    data = write_pictures(tmp_path / "data", ["car", "dog", "van"], 2, seed=1)
    settings = {"pretrained_model_name_or_path": str(trained / "pipeline"), "model_config": "{}"}
    settings |= {"max_train_steps": 1, "learning_rate": 0.0, "generation_defaults": None}
    folder = run(data, tmp_path / "run", **settings)
    before, after = (weights(path)["model.class_embedding.weight"] for path in (trained, folder))
    mean = before[:3].mean(0)
    assert torch.allclose(after, torch.stack([mean, before[1], mean, before[3]]))
    pipes = [MARPipeline.from_pretrained(path / "pipeline") for path in (trained, folder)]
    assert pipes[0].config.generation_defaults == pipes[1].config.generation_defaults


def test_low_rank_updates_train_little_and_merge(trained, pictures, tmp_path):
    settings = {"pretrained_model_name_or_path": str(trained / "pipeline"), "model_config": "{}", "lora_rank": 2}
    folder = run(pictures, tmp_path / "run", **settings, checkpointing_steps=2)
    old, new = weights(trained), weights(folder)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    # Matrices of linear layers and the class table; no bias, norm or position.
    assert "model.encoder_layers.0.attention.qkv.weight" in changed and "model.class_embedding.weight" in changed
    assert all(old[name].ndim == 2 for name in changed)
    assert (folder / "lora" / "adapter_model.safetensors").exists()
    assert MARPipeline.from_pretrained(folder / "pipeline")(class_labels=["owl"]).images
    resumed = tmp_path / "resumed"
    run(pictures, resumed, **settings, max_train_steps=2, checkpointing_steps=2)
    run(pictures, resumed, **settings, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert equal(weights(resumed), new)


def test_averaged_weights_are_saved_and_the_trained_ones_go_on(trained):
    raw = load_file(trained / "checkpoint-4" / "model.safetensors")
    averaged = weights(trained)
    assert raw.keys() == averaged.keys() and not equal(raw, averaged)


def test_the_result_is_published_with_its_card(hub, pictures, tmp_path):
    run(pictures, tmp_path / "my-mar", push_to_hub=True, hub_model_id="me/my-mar", max_train_steps=1)
    pipe = MARPipeline.from_pretrained("me/my-mar")
    assert equal(pipe.transformer.state_dict(), weights(tmp_path / "my-mar"))
    card = (tmp_path / "my-mar" / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert 'MARPipeline.from_pretrained("me/my-mar")' in card and "library_name: mar_hf" in card


def test_the_tracker_gets_losses_and_pictures(pictures, tmp_path):
    run(pictures, tmp_path, report_to="tensorboard", max_train_steps=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = max((path for path in (tmp_path / "logs").rglob("events.*")), key=lambda path: path.stat().st_size)
    events = EventAccumulator(str(file))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path))
    assert len(events.Images("samples")) == 1


def test_the_validation_loss_is_that_of_the_examples_given(trained, pictures, tmp_path):
    def validation_loss(folder):
        return float(rows(folder)[-1]["validation_loss"])

    same = run(pictures, tmp_path / "same", validation_data_dir=pictures)
    assert validation_loss(same) == validation_loss(trained)
    other = write_pictures(tmp_path / "data", ["cat", "dog", "owl"], 5, seed=1)
    other = run(pictures, tmp_path / "other", validation_data_dir=other)
    assert validation_loss(other) != validation_loss(trained) and equal(weights(other), weights(trained))
    wrong = write_pictures(tmp_path / "wrong", ["cat", "dog"], 1)
    with pytest.raises(ValueError, match=r"has the classes \['cat', 'dog'\], not \['cat', 'dog', 'owl'\]"):
        run(pictures, tmp_path / "refused", validation_data_dir=wrong)


def test_the_learning_rate_is_scaled_by_the_batch(pictures, tmp_path):
    run(pictures, tmp_path, scale_lr=True, gradient_accumulation_steps=2, max_train_steps=2)
    assert float(rows(tmp_path)[-1]["learning_rate"]) == pytest.approx(1e-2 * 8 / 256)


# The causal model


@pytest.fixture(scope="module")
def causal(pictures, tmp_path_factory):
    """Four steps of a causal model that learns random orders first, and up to two tokens a step."""
    config = {**CAUSAL, "order": "random_annealed", "max_tokens_per_step": 2, "context_noise": 0.2}
    settings = {"model_config": json.dumps(config), "checkpointing_steps": 2, "validation_steps": 4}
    settings["generation_defaults"] = '{"num_inference_steps": 8, "num_diffusion_steps": 2}'
    return run(pictures, tmp_path_factory.mktemp("causal"), **settings), settings


def test_a_causal_model_trains_by_configuration(pictures, tmp_path, monkeypatch):
    model = {**CAUSAL, "order": "raster", "position_type": "rotary"}
    settings = {**SETTINGS, "model_config": model, "train_data_dir": pictures, "max_train_steps": 2}
    del settings["generation_defaults"]
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    words = ["--config", str(tmp_path / "config.json"), "--output_dir", str(tmp_path / "run")]
    drawn, original = [], ARForImageGeneration.training_inputs

    def recording(model, *args, progress, **kwargs):
        inputs = original(model, *args, progress=progress, **kwargs)
        drawn.append((progress, inputs["orders"].tolist(), inputs["tokens_per_step"]))
        return inputs

    monkeypatch.setattr(ARForImageGeneration, "training_inputs", recording)
    Trainer(parse_arguments(TrainingArguments, words)).train()
    # The last is the validation loss, of all 15 pictures.
    assert [(progress, len(orders)) for progress, orders, _ in drawn] == [(0.0, 4), (0.5, 4), (1.0, 15)]
    assert all(order == list(range(16)) for _, orders, _ in drawn for order in orders)
    assert all(counts == [1] * 16 for _, _, counts in drawn)
    pipe = MARPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipe.transformer) is ARForImageGeneration
    assert pipe.transformer.config.position_type == "rotary"
    found = pipe.generation_defaults
    assert (found["num_inference_steps"], found["token_schedule"]) == (16, "constant")
    assert (found["generation_order"], found["num_diffusion_steps"]) == ("raster", 50)
    assert pipe("owl", num_diffusion_steps=2).images[0].size == (8, 8)


def test_a_causal_model_is_resumed_to_the_same_bytes(causal, pictures, tmp_path):
    trained, settings = causal
    folder = shutil.copytree(trained, tmp_path / "run")
    run(pictures, folder, **settings, resume_from_checkpoint="checkpoint-2")
    assert equal(weights(folder), weights(trained)) and losses(folder) == losses(trained)
    # The third step and the fourth were really done again.
    assert (folder / "checkpoint-4" / "model.safetensors").stat().st_mtime_ns > (
        (trained / "checkpoint-4" / "model.safetensors").stat().st_mtime_ns
    )


def test_a_causal_pipeline_samples_and_is_fine_tuned(causal, tmp_path):
    trained, settings = causal
    pipe = MARPipeline.from_pretrained(trained / "pipeline")
    assert pipe.transformer.config.context_noise == 0.2
    assert pipe.generation_defaults["generation_order"] == "random_annealed"
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pictures = pipe(["cat", "owl"], generator=generators, output_type="pt").images
    assert pictures.shape == (2, 3, 8, 8) and not torch.equal(*pictures)
    data = write_pictures(tmp_path / "data", ["bee", "owl"], 4, seed=1)
    settings = {"pretrained_model_name_or_path": str(trained / "pipeline"), "model_config": "{}"}
    settings |= {"learning_rate": 0.0, "max_train_steps": 1, "generation_defaults": None}
    folder = run(data, tmp_path / "run", **settings)
    old, new = weights(trained), weights(folder)
    table = "model.class_embedding.weight"
    assert torch.equal(new.pop(table)[1:], old.pop(table)[2:]) and equal(old, new)
    tuned = MARPipeline.from_pretrained(folder / "pipeline")
    assert type(tuned.transformer) is ARForImageGeneration and tuned.labels == {"bee": 0, "owl": 1}
    assert tuned.config.generation_defaults == pipe.config.generation_defaults


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_config": json.dumps(CAUSAL)}, "at most 1 tokens a step .* at least 16 steps"),
        ({"model_config": '{"model_type": "gpt"}'}, "`model_type` has to be one of"),
        ({"model_config": "[1]"}, r"`model_config` has to be a JSON object, got \[1\]"),
        ({"model_config": "{"}, "`model_config` has to be a JSON object"),
        ({"resolution": 9}, "`resolution` has to be a multiple of 2, got 9"),
        ({"train_batch_size": 0}, "`train_batch_size` has to be at least 1, got 0"),
        ({"validation_images": 0}, "`validation_images` has to be at least 1, got 0"),
        ({"train_batch_size": 16}, "15 examples are fewer than a batch of all processes: 16"),
        ({"pretrained_model_name_or_path": "x", "model_config": '{"preset": "base"}'}, "can't change `preset`"),
        ({"generation_defaults": '{"speed": 1}'}, "`generation_defaults` has to be one of"),
    ],
)
def test_wrong_settings_are_refused(pictures, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(pictures, tmp_path, **{**settings, "max_train_steps": 1})


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_configuration_file_is_one(path):
    settings = json.loads(path.read_text(encoding="utf-8"))
    if "model_config" not in settings:
        pytest.skip("another script's")
    args = parse_arguments(TrainingArguments, ["--config", str(path), "--output_dir", "out"])
    config = json.loads(args.model_config)
    config_class = BACKBONES[config.pop("model_type", MARConfig.model_type)][0]
    config = config_class.preset(config.pop("preset", "base"), **config)
    sizes = {"imagenet_mar_base": 768, "imagenet_mar_large": 1024, "imagenet_mar_huge": 1280}
    assert config.hidden_size == sizes.get(path.stem, config.hidden_size)
    assert args.learning_rate == settings["learning_rate"]


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_other_channels_are_trained_on_from_end_to_end(tmp_path, channels):
    (tmp_path / "data").mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        picture = Image.fromarray(generator.integers(0, 256, (8, 8, 4), dtype=np.uint8))
        picture.convert({1: "L", 4: "RGBA"}[channels]).save(tmp_path / "data" / f"{number}.png")
    sizes = {"train_batch_size": 2, "resolution": 8, "max_train_steps": 1}
    tokenizer = TokenizerTrainingArguments(
        str(tmp_path / "tokenizer"),
        str(tmp_path / "data"),
        image_channels=channels,
        block_out_channels=[8],
        discriminator_start=0,
        **sizes,
    )
    TokenizerTrainer(tokenizer).train()
    forget_accelerate()
    assert Image.open(tmp_path / "tokenizer" / "grid.png").mode == "RGB"
    source = {"pretrained_tokenizer": str(tmp_path / "tokenizer")}
    cache = LatentCacheArguments(str(tmp_path / "data"), output_dir=str(tmp_path / "cache"), resolution=8, **source)
    cache_latents(cache)
    for name, data, settings in (
        ("pixels", "data", {"image_channels": channels}),
        ("latents", "cache", {"model_config": json.dumps({**SIZES, "head_type": "diffusion"})}),
    ):
        folder = run(tmp_path / data, tmp_path / name, **{**sizes, **settings})
        pipe = MARPipeline.from_pretrained(folder / "pipeline")
        assert pipe.vae.image_channels == channels
        assert len(pipe().images[0].getbands()) == channels
        card = (folder / "pipeline" / "README.md").read_text(encoding="utf-8")
        # Nothing was trained for a class, or to be guided to one.
        assert "image = pipe().images[0]" in card and "class_labels" not in card


def test_blocks_that_are_compiled_one_by_one_are_saved_under_their_own_names(trained, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    settings = {"max_train_steps": 2, "checkpointing_steps": 2, "validation_steps": 2}
    folder = run(pictures, tmp_path / "run", **settings)
    assert np.allclose(losses(folder), losses(trained)[:2], atol=1e-4)
    assert weights(folder).keys() == weights(trained).keys()
    run(pictures, folder, resume_from_checkpoint="latest", **{**settings, "max_train_steps": 3})
    assert np.allclose(losses(folder), losses(trained)[:3], atol=1e-4)
    assert MARPipeline.from_pretrained(folder / "pipeline").labels == {"cat": 0, "dog": 1, "owl": 2}
