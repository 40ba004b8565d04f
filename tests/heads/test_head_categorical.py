# SPDX-License-Identifier: Apache-2.0
"""The categorical head against torch's cross-entropy and against distributions that are known."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, VQModel
from torch import nn

from common import assert_same_tensors, randomise, seeded, tiny_model
from mar_hf import ImageTokenizer, ImageTokenizerConfig, MARForImageGeneration, TokenDDPMScheduler
from mar_hf.heads import CategoricalHead


TOKEN_DIM, CONDITION_DIM, NUM_CODES = 3, 6, 11
SCHEDULER = TokenDDPMScheduler()


def tiny_head(num_layers=2, **settings):
    head = CategoricalHead(TOKEN_DIM, CONDITION_DIM, NUM_CODES, num_layers, 16, **settings)
    head.codebook.copy_(torch.randn(NUM_CODES, TOKEN_DIM, generator=seeded(9)))
    return randomise(head, gain=2.0)


def known_head(logits):
    """A head whose condition is the logits; the codebook's vectors are (code, 0, 0)."""
    head = CategoricalHead(TOKEN_DIM, len(logits), len(logits))
    with torch.no_grad():
        head.out_proj.weight.copy_(torch.eye(len(logits)))
        head.out_proj.bias.zero_()
    head.codebook[:, 0] = torch.arange(len(logits))
    return head


def conditions(batch=2, num_tokens=5, seed=5):
    return torch.randn(2, batch, num_tokens, CONDITION_DIM, generator=seeded(seed)).unbind(0)


def sample(head, condition, **arguments):
    with torch.no_grad():
        return head.sample(condition=condition, scheduler=SCHEDULER, num_steps=1, **arguments)


def counts(logits, draws=20000, seed=0, **arguments):
    """How often each code of a known distribution is drawn."""
    condition = torch.tensor(logits).expand(1, draws, -1)
    codes = sample(known_head(logits), condition, generator=seeded(seed), **arguments)[0, :, 0]
    return codes.long().bincount(minlength=len(logits))


def assert_frequencies(found, probabilities):
    """Counts within four deviations of what probabilities say; nothing where they say 0."""
    draws, probabilities = found.sum(), torch.as_tensor(probabilities)
    deviation = (draws * probabilities * (1 - probabilities)).sqrt()
    assert ((found - draws * probabilities).abs() <= 4 * deviation).all(), found


# The loss


@pytest.mark.parametrize("num_layers", [0, 2])
@pytest.mark.parametrize("num_masked", [None, 3])
def test_loss_is_torch_s_cross_entropy_of_the_masked_codes(num_layers, num_masked):
    head, condition = tiny_head(num_layers, batch_multiplier=4), conditions()[0].requires_grad_()
    codes = torch.randint(0, NUM_CODES, (2, 5), generator=seeded(1))
    # Nearer to their vectors than vectors are to each other.
    target = head.codebook[codes] + 0.01 * torch.randn(2, 5, TOKEN_DIM, generator=seeded(2))
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    loss = head.loss(condition=condition, target=target, mask=mask, scheduler=SCHEDULER, num_masked=num_masked)
    expected = nn.functional.cross_entropy(head(condition)[mask], codes[mask])
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert (condition.grad.abs().sum(-1) > 0).equal(mask)
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_tokens_that_are_not_masked_do_not_count():
    head, (condition, target) = tiny_head(), (conditions()[0], torch.randn(2, 5, TOKEN_DIM, generator=seeded(2)))
    mask, losses = torch.arange(10).reshape(2, 5) % 3 == 0, []
    for filler in (0.0, float("nan")):
        condition[~mask], target[~mask] = filler, filler
        losses.append(head.loss(condition=condition, target=target, mask=mask, scheduler=SCHEDULER))
    assert torch.equal(*losses) and losses[0].isfinite()


def test_the_loss_draws_nothing():
    head, before, generator = tiny_head(), torch.get_rng_state(), seeded(3)
    condition, target = conditions()[0], torch.randn(2, 5, TOKEN_DIM, generator=seeded(2))
    arguments = {"condition": condition, "target": target, "mask": torch.ones(2, 5, dtype=torch.bool)}
    loss = head.loss(**arguments, scheduler=FlowMatchEulerDiscreteScheduler(), generator=generator)
    assert torch.equal(loss, head.loss(**arguments, scheduler=SCHEDULER, timesteps=torch.zeros(10), noise=target))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(generator.get_state(), seeded(3).get_state())


def test_close_vectors_are_told_apart():
    # A matrix product would lose their difference.
    head = known_head([0.0, 0.0, 50.0])
    head.codebook.copy_(100 + torch.tensor([[0.0], [2e-5], [4e-5]]))
    assert len(head.codebook.unique()) == 3
    target, condition = head.codebook[None, 2:].repeat(1, 30, 1), torch.tensor([0.0, 0.0, 50.0]).expand(1, 30, -1)
    mask = torch.ones(1, 30, dtype=torch.bool)
    assert head.loss(condition=condition, target=target, mask=mask, scheduler=SCHEDULER) < 1e-6


@pytest.mark.parametrize("num_layers", [0, 1])
def test_all_codes_start_equally_likely(num_layers):
    head = tiny_head(num_layers)
    for module in [*head.children(), *head.modules()]:
        head.init_weights(module)
    head.codebook.normal_(generator=seeded())
    condition, target = conditions()[0], torch.randn(2, 5, TOKEN_DIM, generator=seeded(2))
    mask = torch.ones(2, 5, dtype=torch.bool)
    loss = head.loss(condition=condition, target=target, mask=mask, scheduler=SCHEDULER)
    assert loss.item() == pytest.approx(math.log(NUM_CODES), rel=1e-6)
    loss.backward()
    assert head.out_proj.weight.grad.abs().sum() > 0


def test_the_head_learns_what_it_is_shown():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = CategoricalHead(TOKEN_DIM, CONDITION_DIM, NUM_CODES, 1, 32)
    for module in head.modules():
        head.init_weights(module)
    generator = seeded(1)
    head.codebook.normal_(generator=generator)
    projection = torch.randn(CONDITION_DIM, NUM_CODES, generator=generator)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        condition = torch.randn(1, 256, CONDITION_DIM, generator=generator)
        target = head.codebook[(condition @ projection).argmax(-1)]
        mask = torch.ones(1, 256, dtype=torch.bool)
        loss = head.loss(condition=condition, target=target, mask=mask, scheduler=SCHEDULER)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3 * math.log(NUM_CODES)
    found = sample(head, condition, temperature=0.0)
    assert (found == target).all(-1).float().mean() > 0.85


# Sampling


LOGITS = [0.3, -1.0, 2.0, 0.0, 1.2]


def test_frequencies_are_the_softmax_s():
    assert_frequencies(counts(LOGITS), torch.tensor(LOGITS).softmax(0))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    assert_frequencies(counts(LOGITS, temperature=temperature), (torch.tensor(LOGITS) / temperature).softmax(0))


def test_without_temperature_the_likeliest_code_is_taken():
    assert counts(LOGITS, 50, temperature=0.0).tolist() == [0, 0, 50, 0, 0]
    condition = conditions()[0]
    head = tiny_head()
    assert torch.equal(sample(head, condition, temperature=0.0), head.codebook[head(condition).argmax(-1)])


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"top_k": 1}, [2]),
        ({"top_k": 3}, [0, 2, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        # 0.556, 0.250, 0.101, 0.075, 0.028: the fewest that reach the share.
        ({"top_p": 0.5}, [2]),
        ({"top_p": 0.6}, [2, 4]),
        ({"top_p": 0.85}, [0, 2, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        # Of the two, the first alone has 0.69.
        ({"top_k": 2, "top_p": 0.65}, [2]),
        ({"top_k": 2, "top_p": 0.75}, [2, 4]),
        ({"top_k": None, "top_p": None}, [0, 1, 2, 3, 4]),
    ],
)
def test_only_the_likeliest_are_kept(settings, kept):
    expected = torch.full((5,), -math.inf)
    expected[kept] = torch.tensor(LOGITS)[kept]
    assert_frequencies(counts(LOGITS, 4000, **settings), expected.softmax(0))


def test_top_p_counts_after_the_temperature():
    # The likeliest has 0.556; at a temperature of 0.5 it has 0.80.
    assert counts(LOGITS, 500, top_p=0.75, temperature=0.5).nonzero()[:, 0].tolist() == [2]
    assert counts(LOGITS, 500, top_p=0.75).nonzero()[:, 0].tolist() == [2, 4]


def test_equal_codes_do_not_exceed_top_k():
    assert_frequencies(counts([1.0] * 6, 4000, top_k=2), [0.5, 0.5, 0, 0, 0, 0])
    # Half of the probability is reached by two of four.
    assert_frequencies(counts([1.0] * 4, 4000, top_p=0.5), [0.5, 0.5, 0, 0])


@pytest.mark.parametrize("start", [-40.0, 40.0])
@pytest.mark.parametrize(
    "logits, settings, codes", [([-1e3, 0.0, 0.0, -1e3], {}, (1, 2)), (LOGITS, {"top_k": 2}, (2, 4))]
)
def test_improbable_noise_draws_no_impossible_code(logits, settings, codes, start):
    noise = torch.full((1, 1, 1, TOKEN_DIM), start)
    code = sample(known_head(logits), torch.tensor([[logits]]), noise=noise, **settings)[0, 0, 0]
    assert code == codes[int(start > 0)]


def test_guidance_is_on_logits():
    head, (condition, negative) = tiny_head(), conditions(2, 500)
    noise = torch.randn(2, 500, 1, TOKEN_DIM, generator=seeded(1))
    with torch.no_grad():
        guided = head(negative) + 2.5 * (head(condition) - head(negative))
    arguments = {"noise": noise, "temperature": 0.8}
    found = sample(head, condition, negative_condition=negative, guidance_scale=2.5, **arguments)
    codes = sample(known_head([0.0] * NUM_CODES), guided, **arguments)[:, :, 0].long()
    # Rounding may move a token across a border.
    assert (found == head.codebook[codes]).all(-1).float().mean() > 0.995
    plain = sample(head, condition, **arguments)
    assert (found != plain).any(-1).float().mean() > 0.1
    assert torch.equal(sample(head, condition, negative_condition=negative * math.nan, **arguments), plain)


# Randomness


def test_a_token_follows_the_first_number_of_its_noise():
    head, condition = tiny_head(), conditions(2, 200)[0]
    noise = torch.randn(2, 200, 4, TOKEN_DIM, generator=seeded(1))
    first, before = sample(head, condition, noise=noise), torch.get_rng_state()
    other = noise.clone()
    other[:, :, 1:], other[:, :, :, 1:] = 7.0, 7.0
    assert torch.equal(sample(head, condition, noise=other), first)
    other[1, 100:, 0, 0] *= -1
    changed = (sample(head, condition, noise=other) != first).any(-1)
    assert not changed[0].any() and not changed[1, :100].any() and changed[1, 100:].float().mean() > 0.5
    assert torch.equal(torch.get_rng_state(), before)


def test_drawn_noise_is_that_of_a_head_s_start():
    head, condition = tiny_head(), conditions(2, 50)[0]
    drawn = sample(head, condition, generator=seeded(1))
    start = torch.randn(2, 50, TOKEN_DIM, generator=seeded(1))[:, :, None]
    assert torch.equal(drawn, sample(head, condition, noise=start))
    assert not torch.equal(drawn, sample(head, condition, generator=seeded(2)))


@pytest.mark.parametrize("settings", [{}, {"top_k": 7, "top_p": 0.9}])
def test_each_image_follows_its_own_generator(settings):
    head, (condition, negative) = tiny_head(), conditions(3, 50)

    def drawn(images, generator):
        return sample(
            head,
            condition[images],
            negative_condition=negative[images],
            guidance_scale=2.0,
            generator=generator,
            **settings,
        )

    together = drawn(slice(None), [seeded(image) for image in range(3)])
    for image in range(3):
        assert torch.equal(together[image : image + 1], drawn(slice(image, image + 1), seeded(image)))


def test_tokens_are_vectors_of_the_codebook():
    head, condition = tiny_head(), conditions(2, 50)[0]
    tokens = sample(head, condition, generator=seeded())
    assert tokens.shape == (2, 50, TOKEN_DIM) and tokens.dtype == torch.float32
    assert (tokens[:, :, None] == head.codebook).all(-1).any(-1).all()
    assert len(tokens.flatten(0, 1).unique(dim=0)) > 5


# Precision


def test_half_precision():
    head, (condition, negative) = tiny_head(), conditions(2, 200)
    arguments = {"guidance_scale": 1.5, "noise": torch.randn(2, 200, 1, TOKEN_DIM, generator=seeded(1))}
    expected = sample(head, condition, negative_condition=negative, **arguments)
    target, mask = head.codebook[torch.arange(400).reshape(2, 200) % NUM_CODES], torch.ones(2, 200, dtype=torch.bool)
    loss = head.loss(condition=condition, target=target, mask=mask, scheduler=SCHEDULER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head.loss(condition=condition, target=target, mask=mask, scheduler=SCHEDULER)
    head.to(torch.bfloat16)
    half = head.loss(condition=condition.bfloat16(), target=target.bfloat16(), mask=mask, scheduler=SCHEDULER)
    for value in (mixed, half):
        assert value.dtype == torch.float32 and value.item() == pytest.approx(loss.item(), rel=0.02)
    found = sample(head, condition.bfloat16(), negative_condition=negative.bfloat16(), **arguments)
    assert found.dtype == head(condition).dtype == torch.float32
    assert ((found - expected).abs().amax(-1) < 0.05).float().mean() > 0.9


# The codebook


def tokenizer(num_codes=NUM_CODES, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = VQModel(latent_channels=TOKEN_DIM, num_vq_embeddings=num_codes, norm_num_groups=4).eval()
    settings = {"quantize": True, "scaling_factor": [7.0, 8.0, 9.0], "shift_factor": 0.01, **settings}
    return ImageTokenizer.from_autoencoder(autoencoder, **settings)


@torch.no_grad()
def test_the_tokenizer_s_codebook_is_taken_over():
    head, vq = CategoricalHead(TOKEN_DIM, CONDITION_DIM, NUM_CODES), tokenizer()
    head.set_tokenizer(vq)
    assert torch.equal(head.codebook, vq.codebook)
    tokens = vq.encode(torch.randn(2, 3, 4, 4, generator=seeded()).clamp(-1, 1)).tokens
    assert (tokens[:, :, None] - head.codebook).abs().amax(-1).amin(-1).max() < 1e-6
    # A copy.
    vq.autoencoder.quantize.embedding.weight.zero_()
    assert head.codebook.abs().max() > 0.1


def test_the_codebook_is_saved():
    head = tiny_head()
    assert "codebook" in head.state_dict() and "codebook" not in dict(head.named_parameters())
    other = CategoricalHead(TOKEN_DIM, CONDITION_DIM, NUM_CODES, 2, 16)
    other.load_state_dict(head.state_dict())
    assert_same_tensors(other.state_dict(), head.state_dict())
    condition = conditions()[0]
    assert torch.equal(sample(other, condition, generator=seeded()), sample(head, condition, generator=seeded()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_s_checkpoint_holds_the_codebook(dtype, tmp_path):
    model = tiny_model(head_type="categorical", head_config={"num_codes": NUM_CODES, "num_layers": 1}).to(dtype)
    model.head.codebook.normal_(generator=seeded())
    model.save_pretrained(tmp_path)
    loaded = MARForImageGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    condition = torch.randn(1, 4, 32, generator=seeded(1))
    assert torch.equal(
        sample(loaded.head, condition, generator=seeded()), sample(model.head, condition, generator=seeded())
    )


def test_a_codebook_that_does_not_fit():
    head = CategoricalHead(TOKEN_DIM, CONDITION_DIM, NUM_CODES)
    with pytest.raises(
        ValueError, match="a codebook of 12 vectors of 3 numbers, the head has `num_codes` 11 and `tok"
    ):
        head.set_tokenizer(tokenizer(12))
    with pytest.raises(ValueError, match="`quantize`"):
        head.set_tokenizer(tokenizer(quantize=False))
    with pytest.raises(ValueError, match="no codebook"):
        head.set_tokenizer(ImageTokenizer(ImageTokenizerConfig()))


def test_a_head_without_codebook_is_of_no_use():
    head = CategoricalHead(TOKEN_DIM, CONDITION_DIM, NUM_CODES)
    condition, mask = conditions()[0], torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="has no codebook yet: call `set_tokenizer` first"):
        sample(head, condition)
    with pytest.raises(ValueError, match="has no codebook yet"):
        head.loss(condition=condition, target=torch.zeros(2, 5, TOKEN_DIM), mask=mask, scheduler=SCHEDULER)
    head.set_tokenizer(tokenizer())
    assert sample(head, condition).shape == (2, 5, TOKEN_DIM)


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_k": 0}, "`top_k` has to be a whole number from 1 to 11, got 0"),
        ({"top_k": 12}, "`top_k` has to be a whole number from 1 to 11, got 12"),
        ({"top_k": 2.0}, "`top_k` has to be a whole number from 1 to 11, got 2.0"),
        ({"top_p": 0.0}, r"`top_p` has to lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"`top_p` has to lie in \(0, 1\], got 1.5"),
        ({"temperature": -1.0}, "`temperature` has to be at least 0, got -1.0"),
        ({"topk": 5, "top_p": 0.5}, r"has the settings top_k and top_p, got \['top_p', 'topk'\]"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    head = tiny_head()
    with pytest.raises(ValueError, match=message):
        head.check_scheduler(SCHEDULER, **settings)
    with pytest.raises(ValueError, match=message):
        sample(head, conditions()[0], **settings)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"guidance_scale": 2.0}, "`guidance_scale` 2.0 needs `negative_condition`"),
        (
            {"guidance_scale": 2.0, "negative_condition": torch.zeros(1, 5, CONDITION_DIM)},
            r"`negative_condition` has to be of shape \(2, 5, 6\) as `condition`, got \(1, 5, 6\)",
        ),
        ({"noise": torch.zeros(2, 5, TOKEN_DIM)}, r"`noise` has to be of shape \(2, 5, 1, 3\), got \(2, 5, 3\)"),
        ({"noise": torch.zeros(2, 5, 0, TOKEN_DIM)}, r"`noise` has to be of shape \(2, 5, 1, 3\)"),
        ({"generator": [seeded()]}, r"`generator` has to hold one generator per image \(2\), got 1"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_head(), conditions()[0], **arguments)


@pytest.mark.parametrize("num_masked", [None, 0])
def test_a_loss_needs_masked_tokens(num_masked):
    mask = torch.zeros(2, 5, dtype=torch.bool)
    arguments = {"condition": conditions()[0], "target": torch.zeros(2, 5, TOKEN_DIM), "num_masked": num_masked}
    with pytest.raises(ValueError, match="`mask` has to mask at least one token"):
        tiny_head().loss(**arguments, mask=mask, scheduler=SCHEDULER)


@torch.no_grad()
def test_what_is_not_a_number_stays_so():
    head, (condition, _) = tiny_head(), conditions()
    noise = torch.zeros(2, 5, 1, TOKEN_DIM)
    noise[0, 1] = math.nan
    found = sample(head, condition, noise=noise)
    assert found[0, 1].isnan().all() and found.isfinite().all(-1).sum() == 9
    condition[1, 2] = math.nan
    found = sample(head, condition, noise=torch.zeros(2, 5, 1, TOKEN_DIM))
    assert found[1, 2].isnan().all() and found.isfinite().all(-1).sum() == 9
