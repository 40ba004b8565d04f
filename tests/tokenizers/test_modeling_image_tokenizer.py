# SPDX-License-Identifier: Apache-2.0
"""Pixels and every kind of autoencoder: round trips, geometry, statistics, randomness, saving."""

import copy
import math

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    VQModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModel

from common import assert_same_tensors, relative_error, seeded
from mar_hf import ImageTokenizer, ImageTokenizerConfig
from mar_hf.tokenizers import AUTOENCODERS, NORMALIZERS
from tiny_pipelines import tiny_pipeline


TWO_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
}
# Latent channels differ, so that no two are confused.
BUILDERS = {
    "AutoencoderKL": lambda: AutoencoderKL(**TWO_LEVELS, latent_channels=2),
    "AutoencoderKL, attention at the lowest level": lambda: AutoencoderKL(
        **{**TWO_LEVELS, "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")}, latent_channels=3
    ),
    "AutoencoderKL, shifted": lambda: AutoencoderKL(
        **TWO_LEVELS, latent_channels=5, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False
    ),
    "AsymmetricAutoencoderKL": lambda: AsymmetricAutoencoderKL(
        down_block_types=TWO_LEVELS["down_block_types"],
        down_block_out_channels=(8, 8),
        up_block_types=TWO_LEVELS["up_block_types"],
        up_block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=6,
    ),
    "AutoencoderDC": lambda: AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.7,
    ),
    "AutoencoderTiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=7,
    ),
    "VQModel": lambda: VQModel(**TWO_LEVELS, latent_channels=3, num_vq_embeddings=16),
    "VQModel, vectors of a width of their own": lambda: VQModel(
        **TWO_LEVELS, latent_channels=3, vq_embed_dim=5, num_vq_embeddings=16
    ),
}
SAMPLED = ("AutoencoderKL", "AsymmetricAutoencoderKL")


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[name]().eval()


def pictures(batch=2, height=16, width=16, channels=3):
    return torch.randn(batch, channels, height, width, generator=seeded(1)).clamp(-1, 1)


def pixels(**settings):
    return ImageTokenizer(ImageTokenizerConfig(**settings))


def channels_of(autoencoder):
    return autoencoder.config.get("vq_embed_dim") or autoencoder.config.latent_channels


def bare_latents(autoencoder, images):
    """What the autoencoder itself makes of pictures, without noise."""
    encoded = autoencoder.encode(images)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latent if hasattr(encoded, "latent") else encoded.latents


# Pixels


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("statistics", [{}, {"shift_factor": [0.1, -0.2, 0.5], "scaling_factor": [2.0, 0.5, 3.3]}])
def test_pixels_come_back(patch_size, statistics):
    tokenizer, images = pixels(patch_size=patch_size, **statistics), pictures()
    encoded = tokenizer.encode(images)
    assert (tokenizer.stride, tokenizer.token_dim) == (patch_size, 3 * patch_size**2)
    assert encoded.latents.shape == images.shape
    assert encoded.tokens.shape == (2, (16 // patch_size) ** 2, tokenizer.token_dim)
    assert (tokenizer.decode(encoded.tokens) - images).abs().max() < 1e-6
    assert (tokenizer.decode(encoded.latents) - images).abs().max() < 1e-6
    assert (tokenizer(images) - images).abs().max() < 1e-6


def test_channel_statistics_make_units():
    images = pictures(8) * torch.tensor([0.2, 0.5, 0.1]).reshape(3, 1, 1) + torch.tensor([0.3, 0.0, -0.4]).reshape(
        3, 1, 1
    )
    mean, deviation = images.mean((0, 2, 3)), images.std((0, 2, 3))
    latents = pixels(shift_factor=mean.tolist(), scaling_factor=(1 / deviation).tolist()).encode(images).latents
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-5


# Patches


def test_tokens_are_channel_major_and_row_by_row():
    tokenizer = pixels(patch_size=2)
    latents = torch.arange(3 * 4 * 6).reshape(1, 3, 4, 6).float()
    tokens = tokenizer.patchify(latents)
    assert tokens.shape == (1, 6, 12)
    # Channel c, row y, column x holds 24 c + 6 y + x. The first token is the top left square, the next its neighbour.
    assert tokens[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31, 48, 49, 54, 55]
    assert tokens[0, 1, :4].tolist() == [2, 3, 8, 9]
    assert tokens[0, 3, :4].tolist() == [12, 13, 18, 19]
    assert torch.equal(tokenizer.unpatchify(tokens, grid_height=2), latents)


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_go_back_together(name, patch_size):
    tokenizer = ImageTokenizer.from_autoencoder(build(name), patch_size=patch_size)
    latents = torch.randn(2, tokenizer.latent_channels, 8, 8, generator=seeded())
    assert torch.equal(tokenizer.unpatchify(tokenizer.patchify(latents)), latents)
    latents = torch.randn(2, tokenizer.latent_channels, 4, 12, generator=seeded())
    assert torch.equal(tokenizer.unpatchify(tokenizer.patchify(latents), 4 // patch_size), latents)


# Autoencoders


def test_every_kind_is_tried():
    assert {name.split(",")[0] for name in BUILDERS} == AUTOENCODERS.keys()


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("name", BUILDERS)
def test_autoencoders_are_wrapped_not_changed(name, patch_size):
    autoencoder, images = build(name), pictures(2, 16, 24)
    tokenizer = ImageTokenizer.from_autoencoder(autoencoder, patch_size=patch_size)
    channels = channels_of(autoencoder)
    assert (tokenizer.latent_channels, tokenizer.token_dim) == (channels, channels * patch_size**2)
    assert tokenizer.stride == 2 * patch_size

    shift, scale = (
        autoencoder.config.get(key) or other for key, other in (("shift_factor", 0), ("scaling_factor", 1))
    )
    bare = bare_latents(autoencoder, images)
    encoded = tokenizer.encode(images, sample_posterior=False)
    assert encoded.latents.shape == (2, channels, 8, 12)
    assert encoded.tokens.shape == (2, 96 // patch_size**2, tokenizer.token_dim)
    assert relative_error(encoded.latents, (bare - shift) * scale) < 1e-6
    assert torch.equal(encoded.tokens, tokenizer.patchify(encoded.latents))

    expected = autoencoder.decode(bare).sample
    assert expected.shape == images.shape
    assert relative_error(tokenizer.decode(encoded.latents), expected) < 1e-4
    assert torch.equal(tokenizer(images), tokenizer.decode(encoded.latents))


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2])
def test_tokens_of_a_square_grid_decode_as_its_latents(patch_size):
    tokenizer, images = ImageTokenizer.from_autoencoder(build("AutoencoderKL"), patch_size=patch_size), pictures()
    encoded = tokenizer.encode(images, sample_posterior=False)
    assert relative_error(tokenizer.decode(encoded.tokens), tokenizer.decode(encoded.latents)) < 1e-5


@torch.no_grad()
def test_scales_of_one_s_own():
    autoencoder, images = build("AutoencoderKL, shifted"), pictures()
    channels = [0.5, 1.0, 1.5, 2.0, 2.5]
    tokenizer = ImageTokenizer.from_autoencoder(autoencoder, scaling_factor=channels, shift_factor=0.3)
    expected = (bare_latents(autoencoder, images) - 0.3) * torch.tensor(channels).reshape(1, -1, 1, 1)
    assert relative_error(tokenizer.encode(images, sample_posterior=False).latents, expected) < 1e-6
    assert (tokenizer.config.scaling_factor, tokenizer.config.shift_factor) == (channels, 0.3)
    own = ImageTokenizer.from_autoencoder(autoencoder).config
    assert (own.scaling_factor, own.shift_factor) == (0.4, 0.1)


def test_the_autoencoder_is_shared():
    autoencoder = build("AutoencoderKL")
    tokenizer = ImageTokenizer.from_autoencoder(autoencoder)
    assert tokenizer.autoencoder is autoencoder and not tokenizer.training
    assert_same_tensors(
        {name.removeprefix("autoencoder."): tensor for name, tensor in tokenizer.state_dict().items()},
        build("AutoencoderKL").state_dict(),
    )
    assert ImageTokenizer.from_autoencoder(autoencoder.train()).training
    assert ImageTokenizer.from_autoencoder(autoencoder.to(torch.bfloat16)).dtype == torch.bfloat16


def test_new_autoencoders_start_as_diffusers_starts_them():
    config = ImageTokenizer.from_autoencoder(build("AutoencoderKL")).config
    convolutions = [m for m in ImageTokenizer(config).modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 100]
    assert len(convolutions) > 10
    for convolution in convolutions:
        bound = 1 / math.sqrt(convolution.weight[0].numel())
        assert 0.8 * bound < convolution.weight.abs().max() <= bound


# Pictures of other channels

CHANNELS = [1, 2, 4, 5]
WITH_CHANNELS = {
    "AutoencoderKL": lambda n: AutoencoderKL(**TWO_LEVELS, latent_channels=2, in_channels=n, out_channels=n),
    "VQModel": lambda n: VQModel(**TWO_LEVELS, num_vq_embeddings=16, in_channels=n, out_channels=n),
    "pixels": None,
}


def with_channels(name, channels, **settings):
    if name == "pixels":
        return pixels(in_channels=channels, **settings)
    return ImageTokenizer.from_autoencoder(WITH_CHANNELS[name](channels).eval(), **settings)


@torch.no_grad()
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", WITH_CHANNELS)
def test_pictures_have_as_many_channels_as_the_tokenizer(name, channels, tmp_path):
    tokenizer, images = with_channels(name, channels, patch_size=2), pictures(channels=channels)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, ImageTokenizer.from_pretrained(tmp_path)):
        assert each.image_channels == each.config.in_channels == channels
        encoded = each.encode(images)
        assert each.decode(encoded.tokens).shape == each(images).shape == images.shape
        assert name != "pixels" or relative_error(each.decode(encoded.tokens), images) < 1e-6
    with pytest.raises(ValueError, match=rf"`pixel_values` has to be of shape \(batch, {channels}, height, width\)"):
        tokenizer.encode(pictures())


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("name", WITH_CHANNELS)
def test_pipelines_draw_pictures_of_any_channels(name, channels, mode):
    pipe = tiny_pipeline(with_channels(name, channels).eval())
    image = pipe([0], generator=seeded()).images[0]
    assert image.mode == mode and image.size == ((4, 4) if name == "pixels" else (8, 8))
    assert pipe([0], generator=seeded(), output_type="np").images.shape == (1, *image.size, channels)


def test_pictures_come_back_as_they_went():
    with pytest.raises(ValueError, match="`in_channels` 1 and `out_channels` 3"):
        ImageTokenizer.from_autoencoder(AutoencoderKL(**TWO_LEVELS, in_channels=1))
    other_size = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    with pytest.raises(ValueError, match=r"of the size that it takes.*'encoder_block_out_channels': 2.*: 4"):
        ImageTokenizer.from_autoencoder(AutoencoderTiny(**other_size))
    with pytest.raises(ValueError, match="of the size that it takes.*`upsampling_scaling_factor` 3"):
        ImageTokenizer.from_autoencoder(AutoencoderTiny(upsampling_scaling_factor=3))


# What an autoencoder says of itself


@torch.no_grad()
@given(
    mean=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2),
    std=st.lists(st.floats(0.125, 8, width=32), min_size=2, max_size=2),
    scale=st.floats(0.125, 8, width=32),
)
@settings(max_examples=20, deadline=None)
def test_statistics_of_an_autoencoder_are_applied_as_diffusers_does(mean, std, scale):
    statistics = {"latents_mean": mean, "latents_std": std, "scaling_factor": scale}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(**TWO_LEVELS, latent_channels=2, shift_factor=9.0, **statistics).eval()
    tokenizer, images = ImageTokenizer.from_autoencoder(autoencoder), pictures(1)
    bare = bare_latents(autoencoder, images)
    # As in StableDiffusionXLImg2ImgPipeline.prepare_latents and StableDiffusionXLPipeline.__call__.
    mean, std = (torch.tensor(values).reshape(1, 2, 1, 1) for values in (mean, std))
    latents = tokenizer.encode(images, sample_posterior=False).latents
    assert relative_error(latents, (bare - mean) * scale / std) < 1e-5
    expected = autoencoder.decode(latents * std / scale + mean).sample
    assert relative_error(tokenizer.decode(latents), expected) < 1e-5


def test_given_statistics_come_before_those_of_the_autoencoder():
    statistics = {"latents_mean": [1.0, 2.0], "latents_std": [0.5, 4.0], "scaling_factor": 3.0}
    autoencoder = AutoencoderKL(**TWO_LEVELS, latent_channels=2, **statistics)
    own = ImageTokenizer.from_autoencoder(autoencoder).config
    assert (own.shift_factor, own.scaling_factor) == ([1.0, 2.0], [6.0, 0.75])
    given = ImageTokenizer.from_autoencoder(autoencoder, scaling_factor=1.0, shift_factor=0.0).config
    assert (given.shift_factor, given.scaling_factor) == (0.0, 1.0)


@pytest.mark.parametrize(
    "statistics, message",
    [
        ({"latents_std": [1.0, 0.0]}, "`latents_std` of the autoencoder has to be different from 0"),
        ({"latents_std": [1.0, math.nan]}, "`scaling_factor` has to be a finite number"),
        ({"latents_mean": [0.0, math.inf]}, "`shift_factor` has to be a finite number"),
        ({"latents_mean": [0.0]}, "`shift_factor` needs one value per latent channel"),
        ({"scaling_factor": 0.0}, "`scaling_factor` has to be different from 0"),
        ({"scaling_factor": math.nan}, "`scaling_factor` has to be a finite number"),
    ],
)
def test_statistics_of_an_autoencoder_that_cannot_be(statistics, message):
    with pytest.raises(ValueError, match=message):
        ImageTokenizer.from_autoencoder(AutoencoderKL(**TWO_LEVELS, latent_channels=2, **statistics))


def overflowing(force_upcast):
    """Activations pass 65504, where float16 ends, and the weights do not; the norms bring them back."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(**TWO_LEVELS, latent_channels=2, force_upcast=force_upcast).eval()
        for convolution in (autoencoder.decoder.conv_in, autoencoder.encoder.conv_in):
            convolution.weight.mul_(2e5)
    return autoencoder


@torch.no_grad()
@pytest.mark.parametrize("bring", ["to", "half", "load", "wrap", "meta"])
def test_what_would_overflow_in_half_precision_is_upcast(bring, tmp_path):
    full, images = ImageTokenizer.from_autoencoder(overflowing(True)), pictures()
    latents = full.encode(images, sample_posterior=False).latents
    if bring == "load":
        full.save_pretrained(tmp_path)
        half = ImageTokenizer.from_pretrained(tmp_path, dtype=torch.float16)
    elif bring == "wrap":
        half = ImageTokenizer.from_autoencoder(overflowing(True).half())
    elif bring == "meta":
        half = ImageTokenizer.from_autoencoder(overflowing(True)).to("meta").half()
        assert {p.dtype for p in half.parameters()} == {torch.float32} and half.device.type == "meta"
        return
    else:
        half = ImageTokenizer.from_autoencoder(overflowing(True))
        half = half.half() if bring == "half" else half.to("cpu", torch.float16)
    encoded = half.encode(images.half(), sample_posterior=False)
    assert encoded.latents.dtype == encoded.tokens.dtype == torch.float16
    assert relative_error(encoded.latents.float(), latents) < 0.01
    decoded = half.decode(latents.half())
    assert decoded.dtype == torch.float16 and relative_error(decoded.float(), full.decode(latents)) < 0.01


@torch.no_grad()
def test_half_precision_is_kept_where_it_does(tmp_path):
    half = ImageTokenizer.from_autoencoder(overflowing(False)).half()
    assert half.dtype == torch.float16 and not half.decode(torch.randn(1, 2, 4, 4)).isfinite().all()
    other = ImageTokenizer.from_autoencoder(overflowing(True)).to(torch.bfloat16)
    assert other.dtype == torch.bfloat16 and other.decode(torch.randn(1, 2, 4, 4)).isfinite().all()
    assert pixels().half().dtype == torch.float16


# Codebooks

QUANTISED = [name for name in BUILDERS if name.startswith("VQModel")]
STATISTICS = {"scaling_factor": 40.0, "shift_factor": -0.01}


def quantised(name="VQModel", **settings):
    """With a codebook of which the pictures use much."""
    autoencoder = build(name)
    latents = bare_latents(autoencoder, pictures()).transpose(0, 1).flatten(1)
    with torch.no_grad():
        autoencoder.quantize.embedding.weight.copy_(latents.T[torch.randperm(128, generator=seeded())[:16]])
    return ImageTokenizer.from_autoencoder(autoencoder, quantize=True, **{**STATISTICS, **settings})


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("statistics", [{"scaling_factor": 1.0, "shift_factor": 0.0}, STATISTICS])
def test_tokens_are_vectors_of_the_codebook(name, statistics):
    tokenizer, images = quantised(name, **statistics), pictures(2, 16, 24)
    codebook, encoded = tokenizer.codebook, tokenizer.encode(images)
    assert codebook.shape == (16, tokenizer.token_dim) and codebook.dtype == torch.float32
    assert encoded.latents.shape == (2, tokenizer.latent_channels, 8, 12)
    distances, codes = torch.cdist(encoded.tokens, codebook, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
    assert distances.max() < 1e-6 and len(codes.unique()) > 8
    # The nearest ones, and what the autoencoder itself makes of them.
    plain = ImageTokenizer.from_autoencoder(tokenizer.autoencoder, **statistics).encode(images).tokens
    assert torch.equal(torch.cdist(plain, codebook).argmin(-1), codes)
    assert relative_error(tokenizer.decode(encoded.latents), tokenizer.autoencoder(images).sample) < 1e-5
    square = pictures()
    expected = tokenizer.autoencoder(square).sample
    assert relative_error(tokenizer.decode(tokenizer.encode(square).tokens), expected) < 1e-5
    # Vectors before quantisation are quantised on their way back.
    assert relative_error(tokenizer.decode(tokenizer.unpatchify(plain, 8)), tokenizer.decode(encoded.latents)) < 1e-5


@torch.no_grad()
def test_statistics_of_single_channels_scale_the_codebook():
    plain, scale, shift = quantised(scaling_factor=1.0, shift_factor=0.0), [2.0, 3.0, 4.0], [0.1, 0.2, 0.3]
    assert torch.equal(plain.codebook, plain.autoencoder.quantize.embedding.weight)
    expected = (plain.codebook - torch.tensor(shift)) * torch.tensor(scale)
    assert relative_error(quantised(scaling_factor=scale, shift_factor=shift).codebook, expected) < 1e-6


@torch.no_grad()
def test_moments_hold_vectors_of_the_codebook(tmp_path):
    tokenizer, images, generator = quantised(), pictures(), seeded()
    mean, std = tokenizer.encode_moments(images)
    assert not tokenizer.is_variational and std.count_nonzero() == 0
    rows = tokenizer.autoencoder.quantize.embedding.weight
    assert (mean.permute(0, 2, 3, 1).reshape(-1, 1, 3) == rows).all(-1).any(-1).all()
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    with torch.device("meta"):
        bare = ImageTokenizer(loaded.config)
    tokens = bare.sample_moments(mean, std, generator).tokens
    assert torch.equal(tokens, loaded.encode(images).tokens) and torch.equal(loaded.codebook, tokenizer.codebook)
    assert torch.equal(generator.get_state(), seeded().get_state())


@torch.no_grad()
def test_codebooks_in_half_precision():
    tokenizer, images = quantised(), pictures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = tokenizer.encode(images).tokens
    tokenizer.to(torch.bfloat16)
    for tokens, codebook in ((mixed, quantised().codebook), (tokenizer.encode(images).tokens, tokenizer.codebook)):
        assert tokens.dtype == codebook.dtype == torch.float32
        assert (tokens[:, :, None] - codebook).abs().amax(-1).amin(-1).max() < 1e-6


@pytest.mark.parametrize(
    "settings, found",
    [
        ({"quantize": False}, "got False, 1 and 'affine'"),
        ({"patch_size": 2}, "got True, 2 and 'affine'"),
        ({"normalizer": "token_layer_norm"}, "got True, 1 and 'token_layer_norm'"),
    ],
)
def test_tokens_that_have_no_codebook(settings, found):
    tokenizer = ImageTokenizer.from_autoencoder(build("VQModel"), **{"quantize": True, **settings})
    with pytest.raises(ValueError, match=f"The tokenizer has no codebook of tokens: .* {found}"):
        tokenizer.codebook  # noqa: B018
    # Quantised all the same.
    assert tokenizer.encode(pictures()).latents.shape == (2, 3, 8, 8)


def test_only_a_vqmodel_is_quantised():
    with pytest.raises(ValueError, match="`quantize` has to be False without a `VQModel`"):
        ImageTokenizer.from_autoencoder(build("AutoencoderTiny"), quantize=True)
    with pytest.raises(ValueError, match="has no codebook"):
        pixels().codebook  # noqa: B018


# Normalisation of tokens


@torch.no_grad()
def test_layer_norm_gives_every_token_unit_variance():
    tokenizer = pixels(patch_size=4, normalizer="token_layer_norm", shift_factor=0.2, scaling_factor=3.0)
    images = pictures()
    encoded = tokenizer.encode(images)
    assert encoded.tokens.mean(-1).abs().max() < 1e-5
    assert (encoded.tokens.var(-1, unbiased=False) - 1).abs().max() < 1e-3
    assert torch.equal(tokenizer.patchify(encoded.latents), encoded.tokens)
    # Each token is an affine picture of its pixels.
    plain = pixels(patch_size=4).encode(images).tokens
    centred = plain - plain.mean(-1, keepdim=True)
    assert relative_error(encoded.tokens, centred / plain.std(-1, unbiased=False, keepdim=True)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 4])
def test_every_token_is_put_on_the_sphere_and_decoded_from_there(patch_size):
    statistics = {"patch_size": patch_size, "shift_factor": [0.2, -0.1, 0.0], "scaling_factor": [3.0, 1.0, 0.5]}
    tokenizer, images = pixels(normalizer="sphere", **statistics), pictures()
    encoded, radius = tokenizer.encode(images), math.sqrt(3 * patch_size**2)
    assert (encoded.tokens.norm(dim=-1) - radius).abs().max() < 1e-5
    assert encoded.tokens.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(tokenizer.patchify(encoded.latents), encoded.tokens)
    # Shift and scale come before.
    plain = pixels(**statistics).encode(images).tokens
    assert relative_error(encoded.tokens, radius * plain / plain.norm(dim=-1, keepdim=True)) < 1e-6
    # Decoding undoes these two and goes on from the sphere, where another round leaves everything.
    assert torch.equal(tokenizer.decode(encoded.tokens), pixels(**statistics).decode(encoded.tokens))
    assert relative_error(tokenizer(tokenizer(images)), tokenizer(images)) < 1e-5


@torch.no_grad()
def test_a_token_without_a_direction_stays_zero():
    tokenizer, images = pixels(patch_size=8, normalizer="sphere", shift_factor=[0.25, 0.5, 0.0]), pictures()
    images[:, :, :8, :8] = torch.tensor([0.25, 0.5, 0.0]).view(3, 1, 1)
    tokens = tokenizer.encode(images).tokens
    assert tokens[:, 0].abs().max() == 0 and tokens.isfinite().all()
    assert torch.equal(tokenizer(images)[:, :, :8, :8], images[:, :, :8, :8])


@torch.no_grad()
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_normaliser_comes_back(normalizer, tmp_path):
    tokenizer, images = ImageTokenizer.from_autoencoder(build("AutoencoderTiny"), normalizer=normalizer), pictures()
    tokenizer.save_pretrained(tmp_path)
    for again in (ImageTokenizer.from_pretrained(tmp_path), copy.deepcopy(tokenizer)):
        assert again.projection is NORMALIZERS[normalizer]
        assert torch.equal(again.encode(images).tokens, tokenizer.encode(images).tokens)


@torch.no_grad()
def test_layer_norm_on_grids_that_are_not_square():
    tokenizer = pixels(patch_size=4, normalizer="token_layer_norm")
    encoded = tokenizer.encode(pictures(1, 8, 24))
    assert encoded.latents.shape == (1, 3, 8, 24)
    assert torch.equal(tokenizer.patchify(encoded.latents), encoded.tokens)


# Randomness


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLED)
def test_the_posterior_is_sampled_from_the_generator(name):
    autoencoder, images, before = build(name), pictures(), torch.get_rng_state()
    tokenizer = ImageTokenizer.from_autoencoder(autoencoder, scaling_factor=2.0)
    first, second, other = (tokenizer.encode(images, generator=seeded(seed)).latents for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    posterior = autoencoder.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=seeded(1))
    assert relative_error(first, 2 * (posterior.mean + posterior.std * noise)) < 1e-6
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_each_picture_follows_its_own_generator():
    tokenizer, images = ImageTokenizer.from_autoencoder(build("AutoencoderKL")), pictures(3)
    together = tokenizer.encode(images, generator=[seeded(i) for i in range(3)]).latents
    for i in range(3):
        alone = tokenizer.encode(images[i : i + 1], generator=seeded(i)).latents
        assert relative_error(together[i : i + 1], alone) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in BUILDERS if name.split(",")[0] not in SAMPLED])
def test_others_have_nothing_to_sample(name):
    tokenizer, images = ImageTokenizer.from_autoencoder(build(name)), pictures()
    expected = tokenizer.encode(images, sample_posterior=False).latents
    generator = seeded()
    assert torch.equal(tokenizer.encode(images, generator=generator).latents, expected)
    assert torch.equal(generator.get_state(), seeded().get_state())


# Moments


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_moments_are_the_autoencoder_s_own(name):
    autoencoder, images = build(name), pictures()
    tokenizer = ImageTokenizer.from_autoencoder(autoencoder, scaling_factor=3.0, shift_factor=0.5)
    mean, std = tokenizer.encode_moments(images)
    assert torch.equal(mean, bare_latents(autoencoder, images)) and std.shape == mean.shape
    if tokenizer.is_variational:
        posterior = autoencoder.encode(images).latent_dist
        assert torch.equal(std, posterior.std) and std.min() > 0
        expected = (posterior.sample(seeded(3)) - 0.5) * 3.0
        assert torch.equal(tokenizer.encode(images, generator=seeded(3)).latents, expected)
    else:
        assert name.split(",")[0] not in SAMPLED and std.count_nonzero() == 0


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLED)
def test_deviations_are_clamped_as_diffusers_does(name):
    tokenizer = ImageTokenizer.from_autoencoder(build(name))
    tokenizer.autoencoder.quant_conv.bias.view(2, -1)[1] = torch.linspace(-1e3, 1e3, tokenizer.latent_channels)
    std = tokenizer.encode_moments(pictures())[1]
    assert std[:, 0].unique().item() == pytest.approx(math.exp(-15))
    assert std[:, -1].unique().item() == pytest.approx(math.exp(10))


def test_moments_of_pixels():
    tokenizer, images = pixels(patch_size=2, shift_factor=0.1, scaling_factor=2.0), pictures()
    mean, std = tokenizer.encode_moments(images)
    assert torch.equal(mean, images) and std.shape == images.shape and std.count_nonzero() == 0
    assert torch.equal(tokenizer.sample_moments(mean, std).tokens, tokenizer.encode(images).tokens)


@torch.no_grad()
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", BUILDERS)
def test_moments_are_sampled_without_weights(name, normalizer):
    channels = channels_of(build(name))
    tokenizer = ImageTokenizer.from_autoencoder(
        build(name), patch_size=2, scaling_factor=[0.5 + n for n in range(channels)], normalizer=normalizer
    )
    with torch.device("meta"):
        bare = ImageTokenizer(tokenizer.config)
    assert bare.device.type == "meta"
    for key in ("stride", "token_dim", "latent_channels", "is_variational"):
        assert getattr(bare, key) == getattr(tokenizer, key)
    images = pictures()
    mean, std = tokenizer.encode_moments(images)
    for generators in ((seeded(5), seeded(5)), ([seeded(1), seeded(2)], [seeded(1), seeded(2)])):
        drawn = bare.sample_moments(mean, std, generators[0])
        expected = tokenizer.encode(images, generator=generators[1])
        assert torch.equal(drawn.latents, expected.latents) and torch.equal(drawn.tokens, expected.tokens)
    mode = tokenizer.encode(images, sample_posterior=False)
    assert torch.equal(bare.sample_moments(mean, None).tokens, mode.tokens)
    assert torch.equal(bare.unpatchify(mode.tokens), mode.latents)


@pytest.mark.parametrize(
    "mean, std", [((2, 4, 4, 4), (2, 4, 4, 4)), ((2, 3, 4), None), ((2, 3, 4, 4), (1, 3, 4, 4)), ((2, 3, 3, 4), None)]
)
def test_moments_that_do_not_fit(mean, std):
    with pytest.raises(ValueError, match=r"of shape \(batch, 3, height, width\)"):
        pixels(patch_size=2).sample_moments(torch.zeros(mean), None if std is None else torch.zeros(std))


# Saving and loading


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_save_and_load_is_bit_equal(name, tmp_path):
    tokenizer = ImageTokenizer.from_autoencoder(build(name), patch_size=2, scaling_factor=0.3)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (ImageTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is ImageTokenizer and not loaded.training
        assert type(loaded.autoencoder) is type(tokenizer.autoencoder)
        assert_same_tensors(loaded.state_dict(), tokenizer.state_dict())
        assert loaded.config.scaling_factor == 0.3 and loaded.stride == 4
        encoded = tokenizer.encode(pictures(), generator=seeded())
        assert torch.equal(loaded.encode(pictures(), generator=seeded()).tokens, encoded.tokens)
        assert torch.equal(loaded.decode(encoded.tokens), tokenizer.decode(encoded.tokens))


def test_pixels_are_saved_too(tmp_path):
    tokenizer = pixels(patch_size=4, shift_factor=[0.1, 0.2, 0.3], scaling_factor=[2.0, 3.0, 4.0])
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(pictures()).tokens, tokenizer.encode(pictures()).tokens)
    assert loaded.autoencoder is None and loaded.dtype == torch.float32


@torch.no_grad()
def test_half_precision(tmp_path):
    full = ImageTokenizer.from_autoencoder(build("AutoencoderKL"))
    full.save_pretrained(tmp_path)
    half, images = ImageTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16), pictures()
    encoded = half.encode(images.bfloat16(), sample_posterior=False)
    assert encoded.latents.dtype == encoded.tokens.dtype == torch.bfloat16
    # The autoencoder works in its dtype, what goes in decides what comes out.
    assert half.encode(images, sample_posterior=False).latents.dtype == torch.float32
    assert half.decode(encoded.latents.float()).dtype == torch.float32
    assert half.decode(encoded.latents).dtype == torch.bfloat16
    expected = full.encode(images, sample_posterior=False).latents
    assert relative_error(encoded.latents.float(), expected) < 0.05


@torch.no_grad()
def test_encode_and_decode_bring_weights_to_the_device():
    # Offloading hooks hang on `forward`; these two are called instead.
    class Recorder(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    hook, tokenizer = Recorder(), ImageTokenizer.from_autoencoder(build("AutoencoderTiny"))
    add_hook_to_module(tokenizer, hook)
    latents = tokenizer.encode(pictures()).latents
    assert hook.calls == 1
    tokenizer.decode(latents)
    assert hook.calls == 2


@torch.no_grad()
@pytest.mark.parametrize("name", [*BUILDERS, "pixels", "quantised"])
def test_weights_are_used_where_hooks_see_it(name):
    """Group offload by blocks and one component at a time, emulated: off the device, weights are on meta."""
    tokenizer = pixels(patch_size=2) if name == "pixels" else None
    tokenizer = tokenizer or (quantised() if name == "quantised" else ImageTokenizer.from_autoencoder(build(name)))
    images = pictures()
    expected = tokenizer.encode(images, sample_posterior=False).latents
    decoded = tokenizer.decode(expected)
    codebook = tokenizer.codebook if name == "quantised" else None
    tensors = dict(tokenizer.state_dict())

    class Offload(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            module.load_state_dict(tensors, assign=True)
            return args, kwargs

        def post_forward(self, module, output):
            module.to("meta")
            return output

    add_hook_to_module(tokenizer, Offload())
    tokenizer.to("meta")
    assert torch.equal(tokenizer.encode(images, sample_posterior=False).latents, expected)
    assert tokenizer.device.type == "meta"
    assert torch.equal(tokenizer.decode(expected), decoded)
    assert torch.equal(tokenizer(images), decoded)
    assert codebook is None or torch.equal(tokenizer.codebook, codebook)


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_group_offload_by_blocks(name, monkeypatch):
    tokenizer, images = ImageTokenizer.from_autoencoder(build(name)), pictures()
    latents = tokenizer.encode(images, sample_posterior=False).latents
    expected, away = tokenizer.decode(latents), []
    # On a CPU, weights off the device: ones that make everything nan.
    for side in ("onload_", "offload_"):
        original = getattr(ModuleGroup, side)

        def move(group, side=side, original=original):
            original(group)
            for module in group.modules:
                for parameter in module.parameters():
                    kept.setdefault(parameter, parameter.detach().clone())
                    parameter.copy_(kept[parameter] if side == "onload_" else torch.full_like(parameter, torch.nan))
            away.append(side)

        monkeypatch.setattr(ModuleGroup, side, move)
    kept = {parameter: parameter.detach().clone() for parameter in tokenizer.parameters()}
    cpu = torch.device("cpu")
    apply_group_offloading(tokenizer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    assert "offload_" in away and all(parameter.isnan().all() for parameter in tokenizer.parameters())
    assert torch.equal(tokenizer.encode(images, sample_posterior=False).latents, latents)
    assert torch.equal(tokenizer.decode(latents), expected)


# Errors


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, 16, 16), r"`pixel_values` has to be of shape \(batch, 3, height, width\)"),
        ((2, 1, 16, 16), r"`pixel_values` has to be of shape \(batch, 3, height, width\)"),
        ((2, 3, 18, 16), r"`pixel_values` has size \(18, 16\); both sides have to be multiples of 4"),
        ((2, 3, 16, 18), r"`pixel_values` has size \(16, 18\); both sides have to be multiples of 4"),
    ],
)
@pytest.mark.parametrize("kind", ["pixels", "autoencoder"])
def test_pictures_that_do_not_fit(shape, message, kind):
    tokenizer = ImageTokenizer.from_autoencoder(build("AutoencoderTiny"), patch_size=2)
    tokenizer = pixels(patch_size=4) if kind == "pixels" else tokenizer
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 5, 4, 4), r"`latents` has to be of shape \(batch, 3, height, width\) or \(batch, num_tokens, 12\)"),
        ((4, 12), r"`latents` has to be of shape .* got \(4, 12\)"),
        ((1, 4, 11), r"`tokens` has to be of shape \(batch, num_tokens, 12\), got \(1, 4, 11\)"),
        ((1, 5, 12), "5 tokens do not fill a grid of 2 rows; give `grid_height`"),
    ],
)
def test_latents_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        pixels(patch_size=2).decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 15, 16), (1, 3, 16, 15), (1, 2, 16, 16), (3, 16, 16)])
def test_grids_that_cannot_be_cut(shape):
    message = r"`latents` has to be of shape \(batch, 3, height, width\) with sides that are multiples of 2"
    with pytest.raises(ValueError, match=message):
        pixels(patch_size=2).patchify(torch.zeros(shape))


@pytest.mark.parametrize("rows", [0, 3, 5])
def test_grids_that_cannot_be_filled(rows):
    with pytest.raises(ValueError, match=f"16 tokens do not fill a grid of {rows} rows"):
        pixels(patch_size=2).unpatchify(torch.zeros(1, 16, 12), rows)


@pytest.mark.parametrize("autoencoder", [ConsistencyDecoderVAE, nn.Linear])
def test_autoencoders_that_are_not_known(autoencoder):
    with torch.device("meta"):
        other = autoencoder(1, 1) if autoencoder is nn.Linear else autoencoder()
    message = rf"`autoencoder` has to be one of \['AsymmetricAutoencoderKL', .*\], got '{autoencoder.__name__}'"
    with pytest.raises(ValueError, match=message):
        ImageTokenizer.from_autoencoder(other)
    settings = {"_class_name": autoencoder.__name__, "latent_channels": 4}
    with pytest.raises(ValueError, match=message):
        pixels(autoencoder=settings)


@pytest.mark.parametrize("wrong", [None, 5, "x", [[1.0]], torch.zeros(0, 3, 8, 8), torch.zeros(1, 3, 0, 8)], ids=str)
@pytest.mark.parametrize(
    "door, name",
    [
        ("encode", "pixel_values"),
        ("encode_moments", "pixel_values"),
        ("decode", "latents"),
        ("patchify", "latents"),
        ("unpatchify", "tokens"),
    ],
)
def test_what_is_no_tensor_or_holds_nothing_is_refused(door, name, wrong):
    tokenizer = ImageTokenizer(ImageTokenizerConfig(patch_size=2))
    with pytest.raises(ValueError, match=f"`{name}` has to be of shape .* got "):
        getattr(tokenizer, door)(wrong)


def test_moments_and_rows_of_other_types_are_refused():
    tokenizer, mean = ImageTokenizer(ImageTokenizerConfig()), torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="`mean` and `std` .* got 'x' and None"):
        tokenizer.sample_moments("x", None)
    with pytest.raises(ValueError, match="`mean` and `std` .* and 0.5"):
        tokenizer.sample_moments(mean, 0.5)
    with pytest.raises(ValueError, match="`generator` has to be a torch.Generator .* got 5"):
        tokenizer.sample_moments(mean, mean, 5)
    with pytest.raises(ValueError, match="`grid_height`"):
        tokenizer.unpatchify(torch.zeros(1, 4, 3), 2.0)
