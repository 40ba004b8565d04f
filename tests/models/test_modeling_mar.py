# SPDX-License-Identifier: Apache-2.0
"""The masked backbone with its head: sizes, first weights, what depends on what, training, saving."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoModel

from common import assert_same_tensors, relative_error, seeded, tiny_config, tiny_model
from mar_hf import BackboneOutput, DiffusionHead, MARConfig, MARForImageGeneration, MARModel, TokenDDPMScheduler
from mar_hf.generation import sample_mask, sample_num_masked


NULL = 3  # of the tiny transformer's 3 classes
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "class_dropout_prob": 0.0}


def inputs(batch=2, model=None, seed=1, num_masked=10):
    """Tokens, a mask with as many positions in every row, labels."""
    config = (model or tiny_model()).config
    generator = seeded(seed)
    tokens = torch.randn(batch, config.num_tokens, config.token_dim, generator=generator)
    mask = torch.rand(batch, config.num_tokens, generator=generator).argsort(1).argsort(1) < num_masked
    return tokens, mask, torch.randint(0, config.num_classes, (batch,), generator=generator)


@pytest.fixture
def scheduler():
    return TokenDDPMScheduler()


# Sizes


def count_parameters(config):
    """The model's parameters by the paper's architecture (every linear layer has a bias)."""
    d, w, c = config.hidden_size, config.head_config["hidden_size"], config.token_dim
    sequence = config.num_class_tokens + config.num_tokens

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    block = 2 * (2 * d) + linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)
    backbone = (config.num_classes + 1) * d + linear(c, d) + linear(d, d) + d  # classes, tokens, decoder, mask token
    backbone += (2 * sequence + config.num_tokens) * d  # positions of encoder, decoder, conditions
    backbone += (config.num_encoder_layers + config.num_decoder_layers) * block + 3 * 2 * d
    head = linear(256, w) + linear(w, w) + linear(d, w) + linear(c, w)
    head += config.head_config["num_layers"] * (2 * w + 2 * linear(w, w) + linear(w, 3 * w))
    return backbone, head + linear(w, 2 * w) + linear(w, 2 * c)


@pytest.mark.parametrize(
    "preset, millions, paper", [("base", 207.9, 208), ("large", 478.3, 479), ("huge", 942.4, 943)]
)
def test_presets_have_the_published_sizes(preset, millions, paper):
    with torch.device("meta"):
        model = MARForImageGeneration(MARConfig.preset(preset))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    backbone, head = (sum(p.numel() for p in part.parameters()) for part in (model.model, model.head))
    assert (backbone, head) == count_parameters(model.config)
    assert round((backbone + head) / 1e6, 1) == millions
    assert abs((backbone + head) / 1e6 - paper) < 1


# First weights


@pytest.fixture(scope="module")
def fresh():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MARForImageGeneration(
            MARConfig(
                hidden_size=96,
                decoder_hidden_size=64,
                num_encoder_layers=1,
                num_decoder_layers=1,
                num_attention_heads=4,
                num_classes=100,
                head_config={"num_layers": 2, "hidden_size": 128},
            )
        )


def is_normal(tensor, deviation):
    error = 4 / math.sqrt(tensor.numel())
    return abs(tensor.mean()) < error * deviation and abs(tensor.std() / deviation - 1) < error


def is_xavier(weight):
    bound = math.sqrt(6 / sum(weight.shape))
    filled = 0.95 * bound < weight.abs().max() <= bound
    return filled and abs(weight.std() / (bound / math.sqrt(3)) - 1) < 4 / math.sqrt(weight.numel())


def test_first_weights_of_the_backbone(fresh):
    seen = set()
    for name, module in fresh.model.named_modules():
        if isinstance(module, nn.Linear):
            assert is_xavier(module.weight), name
            assert module.bias.abs().max() == 0, name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
            assert module.eps == 1e-6
        elif isinstance(module, nn.Embedding):
            assert is_normal(module.weight, 0.02), name
        else:
            continue
        seen |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
    rest = {name: p for name, p in fresh.model.named_parameters() if name not in seen}
    assert sorted(rest) == [
        "condition_position_embedding",
        "decoder_position_embedding",
        "encoder_position_embedding",
        "mask_token",
    ]
    for name, parameter in rest.items():
        assert is_normal(parameter, 0.02), name


def test_first_weights_of_the_head(fresh):
    head = fresh.head
    zeros = [head.out_modulation, head.out_proj, *(block.modulation for block in head.blocks)]
    normal = [head.time_embedding.linear_1, head.time_embedding.linear_2]
    for name, module in head.named_modules():
        if isinstance(module, nn.Linear):
            assert module.bias.abs().max() == 0, name
            if any(module is other for other in zeros):
                assert module.weight.abs().max() == 0, name
            elif any(module is other for other in normal):
                assert is_normal(module.weight, 0.02), name
            else:
                assert is_xavier(module.weight), name
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
    assert not head.out_norm.elementwise_affine


def test_the_first_loss_is_that_of_guessing_nothing(fresh, scheduler):
    # Epsilon starts at 0: its squared error is the noise's variance.
    tokens, mask, labels = inputs(2, fresh, num_masked=200)
    condition = fresh.eval()(tokens, mask, labels).condition
    assert fresh.head(tokens[0], torch.arange(256), condition[0]).abs().max() == 0
    timesteps = torch.full((4 * mask.numel(),), 500)
    noise = torch.randn(len(timesteps), 16, generator=seeded(2))
    loss = fresh(tokens, mask, labels, noise_scheduler=scheduler, timesteps=timesteps, noise=noise).loss
    assert 0.9 < loss.item() < 1.2


@pytest.mark.parametrize("part", ["model", "whole"])
def test_every_tensor_is_a_parameter_or_a_buffer(part):
    # Anything else stays on the meta device in `from_pretrained`.
    model = tiny_model() if part == "whole" else tiny_model().model
    for name, module in model.named_modules():
        loose = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert loose == [], name
    assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()


# What depends on what


@torch.no_grad()
def test_shapes():
    model = tiny_model()
    tokens, mask, labels = inputs(3)
    output = model(tokens, mask, labels)
    assert isinstance(output, BackboneOutput) and output.loss is None
    assert output.condition.shape == (3, 16, 32)
    assert output.encoder_last_hidden_state.shape == (3, 2 + 6, 32)
    backbone = model.model(tokens, mask, labels)
    assert torch.equal(backbone.condition, output.condition)


@torch.no_grad()
def test_masked_tokens_are_not_read():
    model, (tokens, mask, labels) = tiny_model(), inputs()
    expected = model(tokens, mask, labels)
    tokens[mask] = float("nan")
    found = model(tokens, mask, labels)
    assert torch.equal(found.condition, expected.condition)
    assert torch.equal(found.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    visible = (~mask[0]).nonzero()[2, 0]
    tokens[0, visible] += 1
    changed = model(tokens, mask, labels).condition
    # Every position of that image, masked or not, and nothing of the other.
    assert ((changed[0] - expected.condition[0]).abs().amax(-1) > 1e-5).all()
    assert torch.equal(changed[1], expected.condition[1])


@torch.no_grad()
@pytest.mark.parametrize("num_masked", [16, 1, 0])
def test_all_or_nothing_masked(num_masked):
    model = tiny_model()
    tokens, mask, labels = inputs(num_masked=num_masked)
    output = model(tokens, mask, labels)
    assert output.encoder_last_hidden_state.shape[1] == 2 + 16 - num_masked
    assert output.condition.isfinite().all()
    if num_masked == 16:
        assert torch.equal(model(tokens + 1, mask, labels).condition, output.condition)


@torch.no_grad()
def test_visible_tokens_keep_their_places():
    # The same token values at other positions are another picture: swap two visible ones.
    model, (tokens, mask, labels) = tiny_model(), inputs(1)
    first, second = (~mask[0]).nonzero()[:2, 0]
    expected = model(tokens, mask, labels)
    swapped = tokens.clone()
    swapped[0, [first, second]] = tokens[0, [second, first]]
    assert relative_error(model(swapped, mask, labels).condition, expected.condition) > 1e-3


@torch.no_grad()
def test_images_do_not_see_each_other():
    model, (tokens, mask, labels) = tiny_model(), inputs(3)
    together = model(tokens, mask, labels).condition
    for image in range(3):
        one = slice(image, image + 1)
        assert relative_error(model(tokens[one], mask[one], labels[one]).condition, together[one]) < 1e-5


@torch.no_grad()
def test_a_given_count_of_masked_tokens_changes_nothing():
    model, (tokens, mask, labels) = tiny_model(), inputs()
    counted, given = model(tokens, mask, labels), model(tokens, mask, labels, num_masked=10)
    assert torch.equal(counted.condition, given.condition)
    assert torch.equal(counted.encoder_last_hidden_state, given.encoder_last_hidden_state)


@torch.no_grad()
def test_the_null_class_is_the_last_row():
    model, (tokens, mask, _) = tiny_model(), inputs()
    none = model(tokens, mask).condition
    assert torch.equal(none, model(tokens, mask, torch.tensor([NULL, NULL])).condition)
    labelled = [model(tokens, mask, torch.tensor([label, label])).condition for label in range(NULL)]
    for one in labelled:
        assert relative_error(one, none) > 1e-3
    model.model.class_embedding.weight[NULL].neg_()
    assert relative_error(model(tokens, mask).condition, none) > 1e-3
    assert torch.equal(model(tokens, mask, torch.tensor([0, 0])).condition, labelled[0])


@torch.no_grad()
def test_other_grids_and_another_width_of_the_decoder():
    model = tiny_model(
        grid_height=2, grid_width=5, decoder_hidden_size=24, decoder_num_attention_heads=3, num_class_tokens=1
    )
    tokens, mask, labels = inputs(2, model, num_masked=4)
    output = model(tokens, mask, labels, return_dict=True)
    assert output.condition.shape == (2, 10, 24)
    assert output.encoder_last_hidden_state.shape == (2, 1 + 6, 32)
    assert model.head.condition_proj.in_features == 24


@torch.no_grad()
def test_eager_and_sdpa_attention_agree():
    model, (tokens, mask, labels) = tiny_model(), inputs()
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(tokens, mask, labels).condition
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    eager = model(tokens, mask, labels).condition
    assert relative_error(eager, sdpa) < 1e-5
    assert not torch.equal(eager, sdpa)


@torch.no_grad()
def test_the_backbone_compiles_in_one_piece():
    model, (tokens, mask, labels) = tiny_model().model, inputs()
    expected = model(tokens, mask, labels).condition
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(tokens, mask, labels, num_masked=10).condition, expected) < 1e-5


# Training


def test_loss_and_condition_as_object_and_as_tuple(scheduler):
    model, (tokens, mask, labels) = tiny_model(), inputs()

    def run(**arguments):
        return model(tokens, mask, labels, generator=seeded(2), **arguments)

    output, values = run(noise_scheduler=scheduler), run(noise_scheduler=scheduler, return_dict=False)
    assert list(output) == ["loss", "condition", "encoder_last_hidden_state"]
    assert all(torch.equal(a, b) for a, b in zip(values, output.to_tuple(), strict=True))
    assert output.loss.shape == () and output.loss.dtype == torch.float32
    plain = run(return_dict=False)
    assert len(plain) == 2 and torch.equal(plain[0], output.condition)


def test_the_loss_is_the_head_s(scheduler):
    model, (tokens, mask, labels) = tiny_model(head_batch_multiplier=2), inputs()
    timesteps = torch.randint(0, 1000, (2 * mask.numel(),), generator=seeded(2))
    noise = torch.randn(2 * mask.numel(), 12, generator=seeded(3))
    output = model(tokens, mask, labels, noise_scheduler=scheduler, timesteps=timesteps, noise=noise)
    expected = model.head.loss(
        condition=output.condition,
        target=tokens,
        mask=mask,
        scheduler=scheduler,
        timesteps=timesteps,
        noise=noise,
    )
    assert torch.equal(output.loss, expected) and model.head.batch_multiplier == 2


def test_everything_is_drawn_from_the_generator_in_its_order(scheduler):
    model = tiny_model(**{**NO_DROPOUT, "class_dropout_prob": 0.5}, head_batch_multiplier=2).train()
    tokens, _, labels = inputs(6)
    before = torch.get_rng_state()
    drawn = model(tokens, class_labels=labels, noise_scheduler=scheduler, generator=seeded(2))
    again = model(tokens, class_labels=labels, noise_scheduler=scheduler, generator=seeded(2))
    other = model(tokens, class_labels=labels, noise_scheduler=scheduler, generator=seeded(3))
    assert torch.equal(drawn.loss, again.loss) and not torch.equal(drawn.loss, other.loss)
    assert torch.equal(torch.get_rng_state(), before)

    generator = seeded(2)
    mask = sample_mask(6, 16, sample_num_masked(16, 0.7, 1.0, 0.25, generator), generator)
    dropped = torch.rand(6, generator=generator) < 0.5
    assert 0 < dropped.sum() < 6
    chosen = mask.repeat(2, 1).flatten()
    timesteps, noise = torch.zeros(len(chosen), dtype=torch.int64), torch.zeros(len(chosen), 12)
    timesteps[chosen] = torch.randint(0, 1000, (int(chosen.sum()),), generator=generator)
    noise[chosen] = torch.randn(int(chosen.sum()), 12, generator=generator)
    given = model.eval()(
        tokens, mask, labels.where(~dropped, NULL), noise_scheduler=scheduler, timesteps=timesteps, noise=noise
    )
    assert torch.equal(given.condition, drawn.condition)
    assert torch.equal(given.loss, drawn.loss)


@torch.no_grad()
def test_an_image_follows_its_own_generator_whatever_its_batch(scheduler):
    model = tiny_model(**{**NO_DROPOUT, "class_dropout_prob": 0.5}, head_batch_multiplier=2).train()
    tokens, _, labels = inputs(3)

    def run(chosen, generator):
        return model(
            tokens[chosen], class_labels=labels[chosen], noise_scheduler=scheduler, num_masked=13, generator=generator
        )

    together = run(slice(None), [seeded(image) for image in range(3)])
    alone = [run(slice(image, image + 1), seeded(image)) for image in range(3)]
    assert relative_error(together.condition, torch.cat([output.condition for output in alone])) < 1e-6
    assert together.loss.item() == pytest.approx(sum(output.loss.item() for output in alone) / 3, rel=1e-6)
    # Five visible: two class tokens and the three that 13 of 16 leave.
    assert together.encoder_last_hidden_state.shape[1] == 5
    # Seeds 0 to 2 draw different things: an image does depend on its generator.
    assert relative_error(run(slice(0, 1), seeded(1)).condition, alone[0].condition) > 1e-3


def test_drawn_masks_follow_the_configuration(scheduler):
    model = tiny_model(mask_ratio_min=0.4, mask_ratio_mean=0.5, mask_ratio_std=0.001).train()
    for seed in range(5):
        encoded = model(inputs()[0], generator=seeded(seed)).encoder_last_hidden_state
        assert encoded.shape[1] in (2 + 16 - 8, 2 + 16 - 9)


@torch.no_grad()
def test_dropout_is_for_training_only():
    model, (tokens, mask, labels) = tiny_model(class_dropout_prob=0.0), inputs()
    expected = model(tokens, mask, labels).condition
    assert torch.equal(model(tokens, mask, labels).condition, expected)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (model.train()(tokens, mask, labels).condition for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention_dropout", "hidden_dropout"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_dropout_acts(name, attention):
    tokens, mask, labels = inputs()
    model = tiny_model(**{**NO_DROPOUT, name: 0.5})
    model.set_attn_implementation(attention)
    expected = model(tokens, mask, labels).condition
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert relative_error(model.train()(tokens, mask, labels).condition, expected) > 1e-3
    calm = tiny_model(**NO_DROPOUT)
    calm.set_attn_implementation(attention)
    assert torch.equal(calm.train()(tokens, mask, labels).condition, calm.eval()(tokens, mask, labels).condition)


@torch.no_grad()
def test_dropout_acts_after_the_attention_in_the_mlp_and_after_it():
    layer, seen = tiny_model(**{**NO_DROPOUT, "hidden_dropout": 0.5}, hidden_size=128).model.decoder_layers[0], []
    layer.train()
    layer.mlp.fc2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    hidden_states = torch.randn(4, 10, 128, generator=seeded(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer(hidden_states)
        assert 0.4 < (seen[0] == 0).float().mean() < 0.6
        # With weights of 0 a half of the block adds its bias alone, kept and doubled, or dropped.
        halves = (layer.attention.proj, layer.mlp.fc2)
        for linear in halves:
            linear.weight.zero_()
        for ours, other in (halves, halves[::-1]):
            ours.bias.fill_(1)
            other.bias.zero_()
            added = layer(torch.zeros_like(hidden_states))
            assert added.unique().tolist() == [0, 2] and 0.4 < (added == 0).float().mean() < 0.6


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_class_dropout_drops_its_share(share):
    model = tiny_model(**{**NO_DROPOUT, "class_dropout_prob": share}, grid_height=1, grid_width=2)
    tokens, mask = torch.zeros(2000, 2, 12), torch.ones(2000, 2, dtype=torch.bool)
    labels = torch.ones(2000, dtype=torch.int64)
    with_class, without = (model(tokens[:1], mask[:1], label).condition[0] for label in (labels[:1], None))
    conditions = model.train()(tokens, mask, labels, generator=seeded(2)).condition
    dropped = (conditions - without).abs().amax((1, 2)) < 1e-5
    kept = (conditions - with_class).abs().amax((1, 2)) < 1e-5
    assert (dropped ^ kept).all()
    assert abs(dropped.sum() - 2000 * share) <= 4 * math.sqrt(2000 * share * (1 - share))
    # Labels are only dropped in training.
    assert ((model.eval()(tokens, mask, labels).condition - with_class).abs() < 1e-5).all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout, scheduler):
    settings = {**NO_DROPOUT, "attention_dropout": dropout, "hidden_dropout": dropout}
    tokens, mask, labels = inputs()

    def run(checkpointing):
        model, calls = tiny_model(**settings).train(), []
        for layer in (model.model.encoder_layers[0], model.model.decoder_layers[0]):
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        if checkpointing:
            model.activation_checkpointing_enable()
        assert model.is_activation_checkpointing == checkpointing
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = model(tokens, mask, labels, noise_scheduler=scheduler, generator=seeded(2)).loss
            loss.backward()
        return loss, {name: parameter.grad for name, parameter in model.named_parameters()}, len(calls)

    (loss, gradients, calls), (other_loss, other_gradients, other_calls) = run(False), run(True)
    assert torch.equal(loss, other_loss)
    assert all(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert relative_error(other_gradients[name], gradient) < 1e-5, name
    assert (calls, other_calls) == (2, 4)


def test_training_lowers_the_loss(scheduler):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MARForImageGeneration(tiny_config(**NO_DROPOUT)).train()
    tokens = torch.randn(3, 16, 12, generator=seeded(1))  # one picture a class
    optimiser, generator, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), seeded(2), []
    for _ in range(120):
        loss = model(tokens, class_labels=torch.arange(3), noise_scheduler=scheduler, generator=generator).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[:3]) / 3 > 0.95
    assert sum(losses[-20:]) / 20 < 0.75


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_loss(dtype, scheduler):
    model, (tokens, mask, labels) = tiny_model(), inputs()
    expected = model(tokens, mask, labels, noise_scheduler=scheduler, generator=seeded(2))
    with torch.autocast("cpu", dtype=dtype):
        output = model(tokens, mask, labels, noise_scheduler=scheduler, generator=seeded(2))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    assert relative_error(output.condition.float(), expected.condition) < 0.05


# Saving and loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = tiny_model(num_encoder_layers=2)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_save_and_load_is_bit_equal(saved):
    model, folder = saved
    loaded = MARForImageGeneration.from_pretrained(folder)
    assert not loaded.training
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    differing = {key for key, value in model.config.to_dict().items() if loaded.config.to_dict()[key] != value}
    assert differing <= {"_name_or_path"}
    assert torch.equal(loaded(*inputs()).condition, model(*inputs()).condition)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_shards(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and index["weight_map"].keys() == model.state_dict().keys()
    assert_same_tensors(MARForImageGeneration.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("shard", [None, "60KB"], ids=["whole", "sharded"])
def test_variants(shard, saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, variant="ema", **({} if shard is None else {"max_shard_size": shard}))
    assert list(tmp_path.glob("model.ema*.safetensors"))
    loaded = MARForImageGeneration.from_pretrained(tmp_path, variant="ema")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        MARForImageGeneration.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.fp16\.safetensors"):
        MARForImageGeneration.from_pretrained(tmp_path, variant="fp16")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"], ids=str)
def test_half_precision(dtype, saved, scheduler):
    model, folder = saved
    loaded = MARForImageGeneration.from_pretrained(folder, dtype=dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    tokens, mask, labels = inputs()
    output = loaded(tokens, mask, labels, noise_scheduler=scheduler, generator=seeded(2))
    assert output.condition.dtype == expected and output.loss.dtype == torch.float32
    full = model(tokens, mask, labels, noise_scheduler=scheduler, generator=seeded(2))
    assert relative_error(output.condition.float(), full.condition) < 0.05
    assert output.loss.item() == pytest.approx(full.loss.item(), rel=0.05)


def test_the_saved_dtype_comes_back(saved, tmp_path):
    model = MARForImageGeneration.from_pretrained(saved[1], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = MARForImageGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert_same_tensors(loaded.state_dict(), model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"], ids=str)
def test_device_maps(device_map, saved):
    model, folder = saved
    loaded = MARForImageGeneration.from_pretrained(folder, device_map=device_map)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert torch.equal(loaded(*inputs()).condition, model(*inputs()).condition)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The following device_map keys")  # accelerate's, about direct parameters
@pytest.mark.parametrize("memory", [150_000, 260_000])
def test_what_does_not_fit_goes_to_disk(memory, saved, tmp_path):
    model, folder = saved
    loaded = MARForImageGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path
    )
    places = loaded.hf_device_map
    assert set(places.values()) == {"cpu", "disk"} and loaded.head.out_proj.weight.is_meta
    # Layers and head stay in one place: what adds a residual has it where its parts are.
    assert [name for name in places if name.startswith("head.") or "layers.0." in name or "layers.1." in name] == []
    assert torch.equal(loaded(*inputs()).condition, model(*inputs()).condition)


def test_auto_classes_and_the_backbone_alone(saved, tmp_path):
    model, folder = saved
    loaded, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is MARModel
    assert_same_tensors(loaded.state_dict(), model.model.state_dict())
    assert not report["unexpected_keys"] and not report["missing_keys"]
    with torch.device("meta"):
        assert type(AutoModel.from_config(model.config)) is MARModel
    model.model.save_pretrained(tmp_path)
    assert_same_tensors(MARModel.from_pretrained(tmp_path).state_dict(), model.model.state_dict())


# Errors


def test_masks_are_needed_outside_training():
    with pytest.raises(ValueError, match="`mask` has to be given in eval mode"):
        tiny_model()(inputs()[0])


def test_a_list_of_generators_needs_the_number_of_masked_tokens():
    with pytest.raises(ValueError, match="`num_masked` has to be given with a list of generators"):
        tiny_model().train()(inputs()[0], generator=[seeded(1), seeded(2)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"generator": [torch.Generator()] * 3}, r"`generator` has to hold one generator per image \(2\), got 3"),
        ({"tokens": torch.zeros(2, 15, 12)}, r"`tokens` has to be of shape \(batch, 16, 12\), got \(2, 15, 12\)"),
        ({"tokens": torch.zeros(2, 16, 8)}, r"`tokens` has to be of shape \(batch, 16, 12\), got \(2, 16, 8\)"),
        ({"tokens": torch.zeros(16, 12)}, r"`tokens` has to be of shape \(batch, 16, 12\), got \(16, 12\)"),
        ({"mask": torch.zeros(2, 16)}, r"`mask` has to be bool of shape \(2, 16\), got torch.float32 \(2, 16\)"),
        (
            {"mask": torch.zeros(1, 16, dtype=torch.bool)},
            r"`mask` has to be bool of shape \(2, 16\), got torch.bool \(1, 16\)",
        ),
        ({"mask": torch.arange(32).reshape(2, 16) < 5}, r"as many tokens in every row, got \[5, 0\]"),
        ({"class_labels": torch.zeros(3, dtype=torch.int64)}, r"`class_labels` has to be of shape \(2,\), got \(3,\)"),
    ],
)
def test_wrong_inputs(change, message):
    tokens, mask, labels = inputs()
    arguments = {"tokens": tokens, "mask": mask, "class_labels": labels, **change}
    for model in (tiny_model(), tiny_model().model):
        with pytest.raises(ValueError, match=message):
            model(**arguments)


def test_settings_that_the_head_does_not_have():
    config = tiny_config(head_config={"depth": 3})
    with pytest.raises(ValueError, match=r"`head_config` \{'depth': 3\} does not fit 'diffusion': .*depth"):
        MARForImageGeneration(config)


def test_the_head_gets_the_configuration_s_settings():
    model = tiny_model(head_config={"num_layers": 3, "hidden_size": 16, "layer_norm_eps": 1e-5})
    assert isinstance(model.head, DiffusionHead)
    assert len(model.head.blocks) == 3 and model.head.out_norm.eps == 1e-5
    assert model.head.batch_multiplier == model.config.head_batch_multiplier == 4
