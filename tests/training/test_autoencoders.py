# SPDX-License-Identifier: Apache-2.0
"""Autoencoders of the settings, and what is measured of them."""

from functools import partial

import pytest
import torch

from mar_hf import ImageTokenizer
from mar_hf.tokenizers import NORMALIZERS
from mar_hf.training import TokenizerTrainingArguments, latent_statistics
from mar_hf.training.autoencoders import Reconstruction, build_autoencoder, perplexity


KINDS = {
    "kl": {},
    "dc": {"autoencoder": "dc", "layers_per_block": [0, 1]},
    "vq": {"autoencoder": "vq", "num_codes": 16},
}


def test_perplexity_is_the_number_of_codes_used_alike():
    assert perplexity(torch.tensor([5.0, 0.0, 5.0, 5.0])).item() == pytest.approx(3)
    assert perplexity(torch.tensor([0.0, 7.0])).item() == pytest.approx(1)
    # Three quarters and a quarter: 4 / 3 ** 0.75.
    assert perplexity(torch.tensor([3.0, 1.0])).item() == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_come_back_in_their_shape(kind):
    args = TokenizerTrainingArguments("out", block_out_channels=[8, 8], latent_channels=2, **KINDS[kind])
    torch.manual_seed(0)
    vae = build_autoencoder(args)
    model = Reconstruction(vae, args.latent_noise, ImageTokenizer.from_autoencoder(vae).sample_moments)
    pictures = torch.rand(3, 3, 8, 8) * 2 - 1
    restored, term, latents, codes = model(pictures, [torch.Generator().manual_seed(n) for n in range(3)])
    assert restored.shape == pictures.shape and term.shape == () and term > 0
    if kind == "vq":
        assert latents.shape == (3 * 16, 2) and codes.shape == (3 * 16,) and model.usage.shape == (16,)
    else:
        assert latents is None and codes is None
        # A picture's draw is its own.
        alone = model(pictures[1:2], [torch.Generator().manual_seed(1)])[0]
        torch.testing.assert_close(alone, restored[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_training_decodes_what_the_tokenizer_decodes(normalizer):
    # With next to no noise a training step reconstructs as the tokenizer does.
    args = TokenizerTrainingArguments("out", block_out_channels=[8, 8], latent_channels=2, **KINDS["dc"])
    torch.manual_seed(0)
    vae, pictures = build_autoencoder(args), torch.rand(2, 3, 8, 8) * 2 - 1
    wrap = partial(ImageTokenizer.from_autoencoder, vae, patch_size=2, scaling_factor=1.0, shift_factor=0.0)
    tokenizer, plain = wrap(normalizer=normalizer), wrap()
    restored = Reconstruction(vae, 1e-6, tokenizer.sample_moments)(pictures, [torch.Generator()] * 2)[0]
    torch.testing.assert_close(restored, tokenizer(pictures), rtol=1e-3, atol=1e-4)
    assert (normalizer == "affine") == torch.allclose(restored, plain(pictures), rtol=1e-2, atol=1e-3)
    # The encoder learns through the normaliser.
    restored.sum().backward()
    gradient = next(vae.encoder.parameters()).grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_statistics_are_those_of_the_latents():
    args = TokenizerTrainingArguments("out", block_out_channels=[8, 8], latent_channels=2, **KINDS["dc"])
    tokenizer = ImageTokenizer.from_autoencoder(build_autoencoder(args), scaling_factor=1.0, shift_factor=0.0)
    pictures = torch.rand(6, 3, 8, 8) * 2 - 1
    mean, std = latent_statistics(tokenizer, [pictures[:4], pictures[4:]])
    with torch.no_grad():
        latents = tokenizer.encode(pictures).latents.transpose(0, 1).flatten(1)
    assert mean == pytest.approx(latents.mean(1).tolist(), abs=1e-5)
    assert std == pytest.approx(latents.std(1).tolist(), abs=1e-5)
