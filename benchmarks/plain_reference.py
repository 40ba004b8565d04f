# SPDX-License-Identifier: Apache-2.0
"""Generation and training of MAR in the plain form: what the package is compared with.

The results are those of the package, the costs those of the original code (arXiv:2406.11838): visible tokens are
picked by boolean masks, the decoder computes all positions, the head carries both halves of guidance through its loop
and embeds time and condition anew at every step and in every block, each step's constants are looked up in tables, and
in training the head sees all tokens. Nothing but the weights is taken from the modules, so whatever the package does
to run them faster does nothing here. Weights are float32; `torch.autocast` around a call gives half precision, as in
the original's evaluation.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from measuring import Recorder
from torch import nn
from torch.nn import functional

from mar_hf import DiffusionHead, MARForImageGeneration, MARPipeline, TokenDDPMScheduler
from mar_hf.models import MARModel
from mar_hf.models.layers import BackboneLayer
from mar_hf.schedulers.scheduling_token_ddpm import respaced_timesteps


TIMESTEP_CHANNELS = 256
# Largest difference over largest magnitude of whole generations in float32 that counts as equal.
TOLERANCE = 1e-4


def check(pipe: MARPipeline) -> None:
    """Refuse pipelines that have no plain form here.

    Args:
        pipe ([`MARPipeline`]): the candidate.

    Raises:
        ValueError: if it is not a masked model of classes with a diffusion head and its own scheduler.
    """
    check_model(pipe.transformer)
    if not isinstance(pipe.scheduler, TokenDDPMScheduler):
        raise ValueError(f"The plain reference needs a TokenDDPMScheduler, got {type(pipe.scheduler).__name__}.")


def check_model(model: nn.Module) -> None:
    """Refuse models that have no plain form here.

    Args:
        model (`torch.nn.Module`): the candidate.

    Raises:
        ValueError: if it is not a masked model of classes with a diffusion head.
    """
    if not isinstance(model, MARForImageGeneration) or not isinstance(model.head, DiffusionHead):
        head = type(getattr(model, "head", None)).__name__
        raise ValueError(
            f"The plain reference is of MAR with a diffusion head, got {type(model).__name__} with {head}."
        )
    if model.config.text_dim is not None:
        raise ValueError("The plain reference is of classes, not of texts.")


def linear(states: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """A linear layer, by torch's own function."""
    return functional.linear(states, layer.weight, layer.bias)


def norm(states: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    """A layer norm, by torch's own function."""
    return functional.layer_norm(states, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def block(states: torch.Tensor, layer: BackboneLayer) -> torch.Tensor:
    """A transformer block on (batch, length, width), with dropout where the layer is in training."""
    config, training = layer.attention.config, layer.training
    attention_dropout = config.attention_dropout if training else 0.0

    def drop(states: torch.Tensor) -> torch.Tensor:
        return functional.dropout(states, config.hidden_dropout, training)

    batch, length, width = states.shape
    heads = layer.attention.num_heads
    qkv = linear(norm(states, layer.attention_norm), layer.attention.qkv)
    query, key, value = qkv.reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=attention_dropout)
    attended = attended.transpose(1, 2).reshape(batch, length, width)
    states = states + drop(linear(attended, layer.attention.proj))
    hidden = functional.gelu(linear(norm(states, layer.mlp_norm), layer.mlp.fc1))
    return states + drop(linear(drop(hidden), layer.mlp.fc2))


def encode(model: MARModel, tokens: torch.Tensor, mask: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """The encoder: class tokens and visible tokens.

    Args:
        model ([`MARModel`]): whose weights.
        tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): all tokens.
        mask (`torch.Tensor` of shape `(batch, num_tokens)`): bool, True where there is none; as many in every row.
        embedding (`torch.Tensor` of shape `(batch, width)`): of the classes.

    Returns:
        `torch.Tensor` of shape `(batch, num_class_tokens + visible, width)`.
    """
    states = linear(tokens, model.token_proj)
    batch, _, width = states.shape
    prefix = model.config.num_class_tokens
    states = torch.cat([torch.zeros(batch, prefix, width, device=states.device), states], dim=1)
    masked = torch.cat([torch.zeros(batch, prefix, dtype=torch.bool, device=mask.device), mask], dim=1)
    states[:, :prefix] = embedding[:, None]
    states = norm(states + model.encoder_position_embedding, model.token_norm)
    states = states[(~masked).nonzero(as_tuple=True)].reshape(batch, -1, width)
    for layer in model.encoder_layers:
        states = block(states, layer)
    return norm(states, model.encoder_norm)


def decode(model: MARModel, encoded: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The decoder: conditions of all positions.

    Args:
        model ([`MARModel`]): whose weights.
        encoded (`torch.Tensor`): what `encode` returned.
        mask (`torch.Tensor` of shape `(batch, num_tokens)`): as for `encode`.

    Returns:
        `torch.Tensor` of shape `(batch, num_tokens, decoder_width)`.
    """
    states = linear(encoded, model.decoder_proj)
    batch, _, width = states.shape
    prefix = model.config.num_class_tokens
    masked = torch.cat([torch.zeros(batch, prefix, dtype=torch.bool, device=mask.device), mask], dim=1)
    canvas = model.mask_token.repeat(batch, masked.shape[1], 1).to(states.dtype)
    filled = canvas.clone()
    filled[(~masked).nonzero(as_tuple=True)] = states.reshape(-1, width)
    states = filled + model.decoder_position_embedding
    for layer in model.decoder_layers:
        states = block(states, layer)
    return norm(states, model.decoder_norm)[:, prefix:] + model.condition_position_embedding


def denoise(
    head: DiffusionHead, noisy_tokens: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor
) -> torch.Tensor:
    """The head's network, everything embedded anew.

    Args:
        head ([`DiffusionHead`]): whose weights.
        noisy_tokens (`torch.Tensor` of shape `(rows, token_dim)`): x_t.
        timesteps (`torch.Tensor` of shape `(rows,)`): original timesteps.
        condition (`torch.Tensor` of shape `(rows, condition_dim)`): the decoder's output.

    Returns:
        `torch.Tensor` of shape `(rows, 2 * token_dim)`: epsilon, then the variance logits.
    """
    states = linear(noisy_tokens, head.token_proj)
    half = TIMESTEP_CHANNELS // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(timesteps.device)
    angles = timesteps[:, None].float() * frequencies[None]
    sinusoids = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    time = linear(functional.silu(linear(sinusoids, head.time_embedding.linear_1)), head.time_embedding.linear_2)
    embedding = time + linear(condition, head.condition_proj)
    for layer in head.blocks:
        shift, scale, gate = linear(functional.silu(embedding), layer.modulation).chunk(3, dim=-1)
        update = norm(states, layer.norm) * (1 + scale) + shift
        update = linear(functional.silu(linear(update, layer.linear_1)), layer.linear_2)
        states = states + gate * update
    shift, scale = linear(functional.silu(embedding), head.out_modulation).chunk(2, dim=-1)
    return linear(norm(states, head.out_norm) * (1 + scale) + shift, head.out_proj)


class Diffusion:
    """A respaced diffusion: float64 tables, looked up for every row at every step.

    Args:
        scheduler ([`TokenDDPMScheduler`]): for its noise and its last timestep.
        num_steps (`int`, *optional*): of sampling; None: all of training.
    """

    def __init__(self, scheduler: TokenDDPMScheduler, num_steps: int | None = None):
        length = scheduler.config.num_train_timesteps
        last = length - 1 if scheduler.config.max_timestep is None else scheduler.config.max_timestep
        self.timesteps = list(range(length)) if num_steps is None else respaced_timesteps(length, num_steps, last)
        product = scheduler.alphas_cumprod.numpy()[self.timesteps]
        previous = np.append(1.0, product[:-1])
        betas = 1 - product / previous
        variance = betas * (1 - previous) / (1 - product)
        # The first is 0, whose logarithm is that of the second; a lone step adds no noise.
        clipped = np.append(variance[1], variance[1:]) if len(variance) > 1 else betas
        self.signal, self.noise = np.sqrt(product), np.sqrt(1 - product)
        self.original_sample, self.original_epsilon = np.sqrt(1 / product), np.sqrt(1 / product - 1)
        self.mean_original = betas * np.sqrt(previous) / (1 - product)
        self.mean_sample = (1 - previous) * np.sqrt(1 - betas) / (1 - product)
        self.log_least, self.log_most = np.log(clipped), np.log(betas)

    def look_up(self, table: np.ndarray, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A table's entries for each row, float32, of the shape of `like`."""
        return torch.from_numpy(table).to(indices.device)[indices].float()[:, None].expand(like.shape)

    def posterior(self, original: torch.Tensor, sample: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Mean of q(x_(t-1) | x_t, x_0), of the shape of `sample`."""
        weight = self.look_up(self.mean_original, indices, sample)
        return weight * original + self.look_up(self.mean_sample, indices, sample) * sample

    def moments(
        self, output: torch.Tensor, sample: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of p(x_(t-1) | x_t), each of the shape of `sample`, given the network's output."""
        epsilon, logits = output.chunk(2, dim=-1)
        share = (logits + 1) / 2
        most, least = (self.look_up(table, indices, sample) for table in (self.log_most, self.log_least))
        original = self.look_up(self.original_sample, indices, sample) * sample
        original = original - self.look_up(self.original_epsilon, indices, sample) * epsilon
        return self.posterior(original, sample, indices), share * most + (1 - share) * least


def sample_tokens(
    head: DiffusionHead,
    condition: torch.Tensor,
    guidance_scale: float,
    diffusion: Diffusion,
    temperature: float,
    noise: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """The head's sampling loop, with both halves of guidance in every part of every step.

    Args:
        head ([`DiffusionHead`]): whose weights.
        condition (`torch.Tensor` of shape `(rows, condition_dim)`): a row a token, or two where there is guidance:
            first the conditional half, then the other.
        guidance_scale (`float`): of the guidance.
        diffusion ([`Diffusion`]): the steps.
        temperature (`float`): multiplies the injected noise.
        noise (`torch.Tensor` of shape `(tokens, steps + 1, token_dim)`): for the conditional half, as the package
            takes it; what the original draws is drawn too, and takes its place.
        generator (`torch.Generator`): for what is drawn, on the device.

    Returns:
        `torch.Tensor` of shape `(tokens, token_dim)`.
    """
    guided, tokens, device = len(condition) != len(noise), len(noise), condition.device

    def drawn(rows: int, step: int) -> torch.Tensor:
        values = torch.randn(rows, noise.shape[-1], generator=generator, device=device)
        values[:tokens] = noise[:, step]
        return values

    sample = drawn(tokens, 0)
    if guided:
        sample = torch.cat([sample, sample])
    for step, index in enumerate(reversed(range(len(diffusion.timesteps)))):
        indices = torch.tensor([index] * len(sample), device=device)
        timesteps = torch.tensor(diffusion.timesteps, device=device)[indices]
        inputs = torch.cat([sample[:tokens]] * 2) if guided else sample
        output = denoise(head, inputs, timesteps, condition)
        if guided:
            epsilon, logits = output.chunk(2, dim=-1)
            conditional, unconditional = epsilon.chunk(2)
            epsilon = unconditional + guidance_scale * (conditional - unconditional)
            output = torch.cat([torch.cat([epsilon, epsilon]), logits], dim=-1)
        mean, log_variance = diffusion.moments(output, sample, indices)
        injected = drawn(len(sample), step + 1)
        not_last = (indices != 0).float()[:, None]
        sample = mean + not_last * torch.exp(0.5 * log_variance) * injected * temperature
    return sample[:tokens]


@torch.no_grad()
def generate(
    transformer: MARForImageGeneration,
    scheduler: TokenDDPMScheduler,
    class_labels: torch.Tensor | None,
    orders: torch.Tensor,
    noise: torch.Tensor,
    tokens_per_step: Sequence[int],
    head_steps: Sequence[int],
    guidance: Sequence[float],
    temperature: float = 1.0,
    recorder: Recorder | None = None,
) -> torch.Tensor:
    """All tokens of some pictures, as `MARPipeline` makes them given the same orders and noise.

    Args:
        transformer ([`MARForImageGeneration`]): whose weights, in float32.
        scheduler ([`TokenDDPMScheduler`]): the noise schedule.
        class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): int64; None: no class, and no guidance.
        orders (`torch.Tensor` of shape `(batch, num_tokens)`): the positions as they are generated.
        noise (`torch.Tensor` of shape `(batch, num_tokens, steps + 1, token_dim)`): of the head, for each position.
        tokens_per_step (`Sequence[int]`): of each autoregressive step.
        head_steps (`Sequence[int]`): of each autoregressive step.
        guidance (`Sequence[float]`): scale of each autoregressive step; 1.0 in all of them means none.
        temperature (`float`, *optional*, defaults to 1.0): multiplies the injected noise.
        recorder ([`Recorder`], *optional*): is told what takes how long.

    Returns:
        `torch.Tensor` of shape `(batch, num_tokens, token_dim)`, float32.
    """
    model, config, device = transformer.model, transformer.config, orders.device
    recorder = Recorder("cpu").__enter__() if recorder is None else recorder
    batch, num_tokens = orders.shape
    guided = class_labels is not None and any(scale != 1.0 for scale in guidance)
    diffusions = {steps: Diffusion(scheduler, steps) for steps in set(head_steps)}
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.zeros(batch, num_tokens, config.token_dim, device=device)
    mask = torch.ones(batch, num_tokens, dtype=torch.bool, device=device)
    null_class = torch.full((batch,), config.num_classes, device=device)
    done = 0
    for count, steps, scale in zip(tokens_per_step, head_steps, guidance, strict=True):
        recorder.step()
        current = tokens.clone()
        embedding = model.class_embedding.weight[null_class if class_labels is None else class_labels]
        inputs, masked = tokens, mask
        if guided:
            inputs, masked = torch.cat([tokens] * 2), torch.cat([mask] * 2)
            embedding = torch.cat([embedding, model.class_embedding.weight[null_class]])
        recorder.lap("other")
        encoded = encode(model, inputs, masked, embedding)
        recorder.lap("encoder")
        condition = decode(model, encoded, masked)
        recorder.lap("decoder")
        done += count
        still_masked = torch.zeros_like(mask).scatter(1, orders[:, done:], True)
        wanted = mask ^ still_masked
        condition = condition[(torch.cat([wanted] * 2) if guided else wanted).nonzero(as_tuple=True)]
        given = noise[wanted]
        recorder.lap("other")
        sampled = sample_tokens(transformer.head, condition, scale, diffusions[steps], temperature, given, generator)
        recorder.lap("head")
        current[wanted.nonzero(as_tuple=True)] = sampled.float()
        tokens, mask = current.clone(), still_masked
    recorder.end_steps()
    return tokens


def training_loss(
    transformer: MARForImageGeneration,
    scheduler: TokenDDPMScheduler,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    timesteps: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """The training loss, with the head on all tokens and all their copies.

    Args:
        transformer ([`MARForImageGeneration`]): whose weights; its mode decides on dropout.
        scheduler ([`TokenDDPMScheduler`]): the noise schedule.
        tokens (`torch.Tensor` of shape `(batch, num_tokens, token_dim)`): the true tokens.
        mask (`torch.Tensor` of shape `(batch, num_tokens)`): bool, True = to be generated; as many in every row.
        class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): int64; None means the null class.
        timesteps (`torch.Tensor` of shape `(batch_multiplier * batch * num_tokens,)`, *optional*): drawn where not
            given.
        noise (`torch.Tensor` of shape `(batch_multiplier * batch * num_tokens, token_dim)`, *optional*): likewise.

    Returns:
        `torch.Tensor`: a scalar.
    """
    model, head, config = transformer.model, transformer.head, transformer.config
    diffusion = Diffusion(scheduler)
    null_class = torch.full((len(tokens),), config.num_classes, device=tokens.device)
    labels = null_class if class_labels is None else class_labels
    if transformer.training:
        dropped = torch.rand(len(tokens), device=tokens.device) < config.class_dropout_prob
        labels = torch.where(dropped, null_class, labels)
    embedding = model.class_embedding.weight[labels]
    condition = decode(model, encode(model, tokens, mask, embedding), mask)
    copies = head.batch_multiplier
    target = tokens.flatten(0, 1).repeat(copies, 1)
    condition = condition.flatten(0, 1).repeat(copies, 1)
    counted = mask.flatten().repeat(copies).float()
    if timesteps is None:
        timesteps = torch.randint(0, len(diffusion.timesteps), (len(target),), device=target.device)
    noise = torch.randn_like(target) if noise is None else noise
    noisy = diffusion.look_up(diffusion.signal, timesteps, target) * target
    noisy = noisy + diffusion.look_up(diffusion.noise, timesteps, target) * noise
    output = denoise(head, noisy, timesteps, condition)
    losses = (noise - output[:, : config.token_dim]).square().mean(-1) + bound(
        diffusion, output, target, noisy, timesteps
    )
    return (losses * counted).sum() / counted.sum()


def bound(
    diffusion: Diffusion, output: torch.Tensor, target: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The variational bound in bits, the mean over a row: it trains the variance only.

    Args:
        diffusion ([`Diffusion`]): the tables of training.
        output (`torch.Tensor` of shape `(rows, 2 * token_dim)`): of the network.
        target (`torch.Tensor` of shape `(rows, token_dim)`): clean tokens.
        noisy (`torch.Tensor` of the same shape): the network's input.
        timesteps (`torch.Tensor` of shape `(rows,)`): int64.

    Returns:
        `torch.Tensor` of shape `(rows,)`.
    """
    epsilon, logits = output.chunk(2, dim=-1)
    true_mean = diffusion.posterior(target, noisy, timesteps)
    true_log_variance = diffusion.look_up(diffusion.log_least, timesteps, noisy)
    mean, log_variance = diffusion.moments(torch.cat([epsilon.detach(), logits], dim=-1), noisy, timesteps)
    divergence = log_variance - true_log_variance - 1 + torch.exp(true_log_variance - log_variance)
    divergence = 0.5 * (divergence + (true_mean - mean).square() * torch.exp(-log_variance))
    # At t = 0: the likelihood of a Gaussian in bins 2/255 wide, whose ends are open.
    scale = torch.exp(-0.5 * log_variance)
    upper, lower = (_distribution(scale * (target - mean + side / 255)) for side in (1, -1))
    inside = torch.where(target > 0.999, (1 - lower).clamp(min=1e-12), (upper - lower).clamp(min=1e-12))
    likelihood = torch.where(target < -0.999, upper.clamp(min=1e-12), inside).log()
    return torch.where(timesteps[:, None] == 0, -likelihood, divergence).mean(-1) / math.log(2)


def _distribution(values: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of the standard normal's distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))
