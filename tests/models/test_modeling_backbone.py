# SPDX-License-Identifier: Apache-2.0
"""What holds for every backbone with its head, for their own tests to inherit; and parts that all are built of."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoModel

from common import LAYERS, MODELS, assert_same_tensors, relative_error, seeded, store, tiny_config, tiny_model
from mar_hf import BackboneOutput, CategoricalHead, DiffusionHead, TokenDDPMScheduler
from mar_hf.models import add_context_noise
from mar_hf.models.layers import BackboneLayer


NULL = 3  # of the tiny model's 3 classes
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "class_dropout_prob": 0.0}


def is_normal(tensor, deviation):
    error = 4 / math.sqrt(tensor.numel())
    return abs(tensor.mean()) < error * deviation and abs(tensor.std() / deviation - 1) < error


def is_xavier(weight):
    bound = math.sqrt(6 / sum(weight.shape))
    filled = 0.95 * bound < weight.abs().max() <= bound
    return filled and abs(weight.std() / (bound / math.sqrt(3)) - 1) < 4 / math.sqrt(weight.numel())


def count_head_parameters(config):
    """The diffusion head's parameters by the paper's architecture (every linear layer has a bias)."""
    d, w, c = config.condition_dim, config.head_config["hidden_size"], config.token_dim
    blocks = config.head_config["num_layers"] * (2 * w + 2 * linear(w, w) + linear(w, 3 * w))
    return linear(256, w) + linear(w, w) + linear(d, w) + linear(c, w) + blocks + linear(w, 2 * w) + linear(w, 2 * c)


def count_layer_parameters(d):
    """Those of a transformer block of width d: two norms, attention, MLP."""
    return 2 * (2 * d) + linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)


def linear(inputs, outputs):
    return inputs * outputs + outputs


class BackboneTests:
    """Tests of a backbone. A subclass says which one in the attributes, and adds what is true of it alone.

    Attributes:
        backbone: its name in `common.MODELS`.
        model_class: the backbone without a head.
        fields: what its output holds beside the loss.
        other_weights: its parameters outside of linear layers, norms and embeddings.
        fresh_settings: more of the model with fresh weights.
        shared_draws: what `forward` has to be given in training with one generator per image.
        deeper: settings of three layers.
    """

    backbone: str
    model_class: type
    fields: list[str]
    other_weights: list[str]
    fresh_settings: dict = {}
    shared_draws: dict = {}
    deeper: dict

    def inputs(self, batch=2, model=None, seed=1):
        """Tokens, labels and what else `forward` needs in eval mode."""
        raise NotImplementedError

    def draw(self, generator, batch):
        """What `forward` draws first in training with `order="random"`, by its documentation, as it takes it."""
        raise NotImplementedError

    def layers(self, model):
        raise NotImplementedError

    def tiny(self, **changes):
        return tiny_model(self.backbone, **changes)

    def basic_inputs(self, batch, model):
        config, generator = model.config, seeded(1)
        tokens = torch.randn(batch, config.num_tokens, config.token_dim, generator=generator)
        return tokens, torch.randint(0, config.num_classes, (batch,), generator=generator), generator

    def counted(self, inputs):
        """Tokens that count in the loss."""
        return inputs.get("mask", torch.ones(inputs["tokens"].shape[:2], dtype=torch.bool))

    @pytest.fixture
    def scheduler(self):
        return TokenDDPMScheduler()

    # First weights

    @pytest.fixture(scope="class")
    @classmethod
    def fresh(cls):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model_class = MODELS[cls.backbone]
            settings = {
                "hidden_size": 96,
                "num_attention_heads": 4,
                "num_classes": 100,
                "head_config": {"num_layers": 2, "hidden_size": 128},
                **LAYERS[cls.backbone],
                **cls.fresh_settings,
            }
            return model_class(model_class.config_class(**settings)).eval()

    def test_first_weights_of_the_backbone(self, fresh):
        seen = set()
        for name, module in fresh.model.named_modules():
            if isinstance(module, nn.Linear):
                # What attends to texts is not there yet.
                is_zero = name.endswith("context_attention.proj")
                assert module.weight.abs().max() == 0 if is_zero else is_xavier(module.weight), name
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
        assert sorted(rest) == self.other_weights
        for name, parameter in rest.items():
            assert is_normal(parameter, 0.02), name

    def test_first_weights_of_the_head(self, fresh):
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

    def test_the_first_loss_is_that_of_guessing_nothing(self, fresh, scheduler):
        # Epsilon starts at 0: its squared error is the noise's variance.
        inputs = self.inputs(2, fresh)
        tokens, condition = inputs["tokens"], fresh(**inputs).condition
        assert fresh.head(tokens[0], torch.arange(256), condition[0]).abs().max() == 0
        timesteps = torch.full((4 * 2 * 256,), 500)
        noise = torch.randn(len(timesteps), 16, generator=seeded(2))
        loss = fresh(**inputs, noise_scheduler=scheduler, timesteps=timesteps, noise=noise).loss
        assert 0.9 < loss.item() < 1.2

    @pytest.mark.parametrize("part", ["model", "whole"])
    def test_every_tensor_is_a_parameter_or_a_buffer(self, part):
        # Anything else stays on the meta device in `from_pretrained`.
        model = self.tiny() if part == "whole" else self.tiny().model
        for name, module in model.named_modules():
            loose = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
            assert loose == [], name
        assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()

    # What depends on what

    @torch.no_grad()
    def test_the_head_adds_nothing_to_the_condition(self):
        model, inputs = self.tiny(), self.inputs(3)
        output = model(**inputs)
        assert isinstance(output, BackboneOutput) and list(output) == self.fields
        assert output.condition.shape == (3, 16, 32)
        backbone = model.model(**inputs)
        assert all(torch.equal(backbone[name], output[name]) for name in self.fields)

    @torch.no_grad()
    def test_images_do_not_see_each_other(self):
        model, inputs = self.tiny(), self.inputs(3)
        together = model(**inputs).condition
        for image in range(3):
            alone = {name: value[image : image + 1] for name, value in inputs.items()}
            assert relative_error(model(**alone).condition, together[image : image + 1]) < 1e-5

    @torch.no_grad()
    def test_the_null_class_is_the_last_row(self):
        model, inputs = self.tiny(), self.inputs()
        del inputs["class_labels"]
        none = model(**inputs).condition
        assert torch.equal(none, model(**inputs, class_labels=torch.tensor([NULL, NULL])).condition)
        labelled = [model(**inputs, class_labels=torch.tensor([label, label])).condition for label in range(NULL)]
        for one in labelled:
            assert relative_error(one, none) > 1e-3
        model.model.class_embedding.weight[NULL].neg_()
        assert relative_error(model(**inputs).condition, none) > 1e-3
        assert torch.equal(model(**inputs, class_labels=torch.tensor([0, 0])).condition, labelled[0])

    @torch.no_grad()
    def test_eager_and_sdpa_attention_agree(self):
        model, inputs = self.tiny(), self.inputs()
        assert model.config._attn_implementation == "sdpa"
        sdpa = model(**inputs).condition
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        eager = model(**inputs).condition
        assert relative_error(eager, sdpa) < 1e-5
        assert not torch.equal(eager, sdpa)

    @torch.no_grad()
    def test_hidden_states_and_attentions(self):
        model, inputs = self.tiny(), self.inputs()
        model.set_attn_implementation("eager")
        plain = model(**inputs)
        assert plain.hidden_states is None and plain.attentions is None
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert torch.equal(output.condition, plain.condition)
        assert list(output) == [*self.fields, "hidden_states", "attentions"]
        layers = [layer for layer in self.layers(model) if isinstance(layer, BackboneLayer)]  # not the aligner's
        assert len(output.hidden_states) == len(layers) + 1 and len(output.attentions) == len(layers)
        for probabilities, after in zip(output.attentions, output.hidden_states[1:], strict=True):
            assert probabilities.shape[:3] == (2, 2, after.shape[1]) and after.shape[2] == 32
            torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:3]))
        # What the first block makes of what goes into it, and what the last one ends in.
        seen = []
        layers[-1].register_forward_hook(lambda _, __, output: seen.append(output))
        model(**inputs)
        assert torch.equal(output.hidden_states[-1], seen[0])
        last = model(**inputs, output_hidden_states=-1).hidden_states
        assert torch.equal(last[-1], seen[0]) and last[:-1] == (None,) * len(layers)
        # By the configuration, and as a tuple.
        model.config.output_hidden_states = True
        assert len(model(**inputs).hidden_states) == len(layers) + 1
        assert len(model(**inputs, return_dict=False)) == len(self.fields) + 1
        model.config.output_attentions = True
        assert len(model(**inputs).attentions) == len(layers)

    def test_attentions_take_an_implementation_that_has_them(self):
        for model in (self.tiny(), self.tiny().model):
            with pytest.raises(ValueError, match="`output_attentions` needs `attn_implementation` 'eager', .* 'sdpa'"):
                model(**self.inputs(), output_attentions=True)

    def test_the_input_s_layer(self):
        model = self.tiny()
        assert model.get_input_embeddings() is model.model.get_input_embeddings() is model.model.token_proj

    def test_no_guidance_away_from_what_was_never_trained(self):
        assert "guidance_scale" not in self.tiny().sampling_defaults
        settings = {"class_dropout_prob": 0.0, "text_dropout_prob": 0.0}
        assert self.tiny(**settings).sampling_defaults["guidance_scale"] == 1.0
        assert self.tiny(class_dropout_prob=0.0, text_dim=None).sampling_defaults["guidance_scale"] == 1.0
        dropped = self.tiny(class_dropout_prob=0.0, text_dim=8, text_dropout_prob=0.1)
        assert "guidance_scale" not in dropped.sampling_defaults

    # Training

    def test_loss_and_condition_as_object_and_as_tuple(self, scheduler):
        model, inputs = self.tiny(), self.inputs()

        def run(**arguments):
            return model(**inputs, generator=seeded(2), **arguments)

        output, values = run(noise_scheduler=scheduler), run(noise_scheduler=scheduler, return_dict=False)
        assert list(output) == ["loss", *self.fields]
        assert all(torch.equal(a, b) for a, b in zip(values, output.to_tuple(), strict=True))
        assert output.loss.shape == () and output.loss.dtype == torch.float32
        plain = run(return_dict=False)
        assert len(plain) == len(self.fields) and torch.equal(plain[0], output.condition)

    def test_the_loss_is_the_head_s(self, scheduler):
        model, inputs = self.tiny(head_batch_multiplier=2), self.inputs()
        timesteps = torch.randint(0, 1000, (2 * 2 * 16,), generator=seeded(2))
        noise = torch.randn(len(timesteps), 12, generator=seeded(3))
        output = model(**inputs, noise_scheduler=scheduler, timesteps=timesteps, noise=noise)
        expected = model.head.loss(
            condition=output.condition,
            target=inputs["tokens"],
            mask=self.counted(inputs),
            scheduler=scheduler,
            timesteps=timesteps,
            noise=noise,
        )
        assert torch.equal(output.loss, expected) and model.head.batch_multiplier == 2

    @pytest.mark.parametrize("context_noise", [0.0, 0.5])
    def test_everything_is_drawn_from_the_generator_in_its_order(self, scheduler, context_noise):
        settings = {**NO_DROPOUT, "class_dropout_prob": 0.5, "order": "random", "context_noise": context_noise}
        model = self.tiny(**settings, head_batch_multiplier=2).train()
        tokens, labels, _ = self.basic_inputs(6, model)
        before = torch.get_rng_state()
        drawn = model(tokens, class_labels=labels, noise_scheduler=scheduler, generator=seeded(4))
        again = model(tokens, class_labels=labels, noise_scheduler=scheduler, generator=seeded(4))
        other = model(tokens, class_labels=labels, noise_scheduler=scheduler, generator=seeded(3))
        assert torch.equal(drawn.loss, again.loss) and not torch.equal(drawn.loss, other.loss)
        assert torch.equal(torch.get_rng_state(), before)

        generator, context = seeded(4), tokens
        inputs = self.draw(generator, 6)
        if context_noise > 0:
            levels = 0.5 * torch.rand(6, 1, 1, generator=generator)
            context = tokens.lerp(torch.randn(tokens.shape, generator=generator), levels)
        dropped = torch.rand(6, generator=generator) < 0.5
        assert 0 < dropped.sum() < 6
        mask = self.counted({"tokens": tokens, **inputs})
        chosen = mask.repeat(2, 1).flatten()
        timesteps, noise = torch.zeros(len(chosen), dtype=torch.int64), torch.zeros(len(chosen), 12)
        timesteps[chosen] = torch.randint(0, 1000, (int(chosen.sum()),), generator=generator)
        noise[chosen] = torch.randn(int(chosen.sum()), 12, generator=generator)
        condition = model.eval()(context, class_labels=labels.where(~dropped, NULL), **inputs).condition
        assert torch.equal(condition, drawn.condition)
        draws = {"timesteps": timesteps, "noise": noise}
        # The backbone sees noise; the head is asked for the tokens themselves.
        loss = model.head.loss(condition=condition, target=tokens, mask=mask, scheduler=scheduler, **draws)
        assert torch.equal(loss, drawn.loss)

    @torch.no_grad()
    def test_an_image_follows_its_own_generator_whatever_its_batch(self, scheduler):
        settings = {**NO_DROPOUT, "class_dropout_prob": 0.5, "order": "random", "context_noise": 0.5}
        model = self.tiny(**settings, head_batch_multiplier=2).train()
        tokens, labels, _ = self.basic_inputs(3, model)

        def run(chosen, generator):
            given = {"class_labels": labels[chosen], "noise_scheduler": scheduler, **self.shared_draws}
            return model(tokens[chosen], **given, generator=generator)

        together = run(slice(None), [seeded(image) for image in range(3)])
        alone = [run(slice(image, image + 1), seeded(image)) for image in range(3)]
        assert relative_error(together.condition, torch.cat([output.condition for output in alone])) < 1e-6
        assert together.loss.item() == pytest.approx(sum(output.loss.item() for output in alone) / 3, rel=1e-6)
        # Seeds 0 to 2 draw different things: an image does depend on its generator.
        assert relative_error(run(slice(0, 1), seeded(1)).condition, alone[0].condition) > 1e-3

    @torch.no_grad()
    def test_dropout_is_for_training_only(self):
        model, inputs = self.tiny(class_dropout_prob=0.0), self.inputs()
        expected = model(**inputs).condition
        assert torch.equal(model(**inputs).condition, expected)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, second = (model.train()(**inputs).condition for _ in range(2))
        assert not torch.equal(first, second) and not torch.equal(first, expected)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["attention_dropout", "hidden_dropout"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_each_dropout_acts(self, name, attention):
        inputs, model = self.inputs(), self.tiny(**{**NO_DROPOUT, name: 0.5})
        model.set_attn_implementation(attention)
        expected = model(**inputs).condition
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert relative_error(model.train()(**inputs).condition, expected) > 1e-3
        calm = self.tiny(**NO_DROPOUT)
        calm.set_attn_implementation(attention)
        assert torch.equal(calm.train()(**inputs).condition, calm.eval()(**inputs).condition)

    @torch.no_grad()
    @pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
    def test_class_dropout_drops_its_share(self, share):
        model = self.tiny(**{**NO_DROPOUT, "class_dropout_prob": share}, grid_height=1, grid_width=2)
        one = {name: value[:1] for name, value in self.inputs(1, model).items()}
        many = {name: value.expand(2000, *value.shape[1:]) for name, value in one.items()}
        with_class = model(**one).condition[0]
        without = model(**{**one, "class_labels": None}).condition[0]
        conditions = model.train()(**many, generator=seeded(2)).condition
        dropped = (conditions - without).abs().amax((1, 2)) < 1e-5
        kept = (conditions - with_class).abs().amax((1, 2)) < 1e-5
        assert (dropped ^ kept).all()
        assert abs(dropped.sum() - 2000 * share) <= 4 * math.sqrt(2000 * share * (1 - share))
        # Labels are only dropped in training.
        assert ((model.eval()(**many).condition - with_class).abs() < 1e-5).all()

    @torch.no_grad()
    def test_the_level_of_context_noise_is_drawn_up_to_its_maximum(self):
        model, tokens = self.tiny(context_noise=0.4), torch.ones(2000, 16, 12)
        seen = model.train().draw_context(tokens, seeded(2))
        # (1 - level) 1 + level noise: both ways to the level, up to what 192 numbers leave open.
        deviations, means = seen.std((1, 2)), 1 - seen.mean((1, 2))
        assert (deviations - means).abs().max() < 0.2
        assert deviations.min() < 0.01 and 0.37 < deviations.max() < 0.4 * 1.25
        assert abs(deviations.mean() - 0.2) < 4 * 0.4 / math.sqrt(12 * 2000)
        assert model.eval().draw_context(tokens, seeded(2)) is tokens

    @torch.no_grad()
    def test_without_context_noise_nothing_is_drawn(self):
        generator, tokens = seeded(2), torch.ones(2, 16, 12)
        assert self.tiny(context_noise=0.0).train().draw_context(tokens, generator) is tokens
        assert torch.equal(generator.get_state(), seeded(2).get_state())
        # Nor does sampling know of it.
        inputs = self.inputs()
        assert torch.equal(self.tiny(context_noise=1.0)(**inputs).condition, self.tiny()(**inputs).condition)

    @pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # the older of two names: all versions have it
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_gradient_checkpointing_changes_no_gradient(self, dropout, scheduler):
        settings = {**NO_DROPOUT, "attention_dropout": dropout, "hidden_dropout": dropout}
        inputs = self.inputs()

        def run(checkpointing):
            model, calls = self.tiny(**settings).train(), []
            for layer in self.layers(model):
                layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
            if checkpointing:
                model.gradient_checkpointing_enable()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                loss = model(**inputs, noise_scheduler=scheduler, generator=seeded(2)).loss
                loss.backward()
            return loss, {name: parameter.grad for name, parameter in model.named_parameters()}, len(calls)

        (loss, gradients, calls), (other_loss, other_gradients, other_calls) = run(False), run(True)
        assert torch.equal(loss, other_loss)
        assert all(gradient is not None for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert relative_error(other_gradients[name], gradient) < 1e-5, name
        number = len(self.layers(self.tiny()))
        assert (calls, other_calls) == (number, 2 * number)

    @pytest.mark.parametrize(
        "head, first, last",
        # Noise of variance 1 is not known; nor is which of 8 codes comes: log 8.
        [({}, 0.95, 0.75), ({"head_type": "categorical", "head_config": {"num_codes": 8}}, 2.0, 1.0)],
        ids=["diffusion", "categorical"],
    )
    def test_training_lowers_the_loss(self, head, first, last, scheduler):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = tiny_config(self.backbone, **NO_DROPOUT, head_batch_multiplier=2, **head)
            model = MODELS[self.backbone](config).train()
        tokens = torch.randn(3, 16, 12, generator=seeded(1))  # one picture a class
        if head:
            model.head.codebook.copy_(torch.randn(8, 12, generator=seeded(3)))
            tokens = model.head.codebook[torch.randint(0, 8, (3, 16), generator=seeded(1))]
        optimiser, generator, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), seeded(2), []
        for _ in range(120):
            loss = model(tokens, class_labels=torch.arange(3), noise_scheduler=scheduler, generator=generator).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert sum(losses[:3]) / 3 > first
        assert sum(losses[-20:]) / 20 < last

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_keeps_the_loss(self, dtype, scheduler):
        model, inputs = self.tiny(), self.inputs()
        expected = model(**inputs, noise_scheduler=scheduler, generator=seeded(2))
        with torch.autocast("cpu", dtype=dtype):
            output = model(**inputs, noise_scheduler=scheduler, generator=seeded(2))
        output.loss.backward()
        assert output.loss.dtype == torch.float32
        assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
        assert relative_error(output.condition.float(), expected.condition) < 0.05

    # Saving and loading

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, tmp_path_factory):
        model = tiny_model(cls.backbone, **cls.deeper)
        folder = tmp_path_factory.mktemp("saved")
        model.save_pretrained(folder)
        return model, folder

    def load(self, folder, **settings):
        return MODELS[self.backbone].from_pretrained(folder, **settings)

    @torch.no_grad()
    def test_save_and_load_is_bit_equal(self, saved):
        model, folder = saved
        loaded = self.load(folder)
        assert not loaded.training
        assert_same_tensors(loaded.state_dict(), model.state_dict())
        differing = {key for key, value in model.config.to_dict().items() if loaded.config.to_dict()[key] != value}
        assert differing <= {"_name_or_path"}
        assert torch.equal(loaded(**self.inputs()).condition, model(**self.inputs()).condition)
        assert all(parameter.requires_grad for parameter in loaded.parameters())

    def test_shards(self, saved, tmp_path):
        model, _ = saved
        model.save_pretrained(tmp_path, max_shard_size="60KB")
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2 and index["weight_map"].keys() == model.state_dict().keys()
        assert_same_tensors(self.load(tmp_path).state_dict(), model.state_dict())

    @pytest.mark.parametrize("shard", [None, "60KB"], ids=["whole", "sharded"])
    def test_variants(self, shard, saved, tmp_path):
        model, _ = saved
        model.save_pretrained(tmp_path, variant="ema", **({} if shard is None else {"max_shard_size": shard}))
        assert list(tmp_path.glob("model.ema*.safetensors"))
        assert_same_tensors(self.load(tmp_path, variant="ema").state_dict(), model.state_dict())
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            self.load(tmp_path)
        with pytest.raises(OSError, match=r"no file named model\.fp16\.safetensors"):
            self.load(tmp_path, variant="fp16")

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"], ids=str)
    def test_half_precision(self, dtype, saved, scheduler):
        model, folder = saved
        loaded = self.load(folder, dtype=dtype)
        expected = torch.bfloat16 if dtype == "bfloat16" else dtype
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
        inputs = self.inputs()
        output = loaded(**inputs, noise_scheduler=scheduler, generator=seeded(2))
        assert output.condition.dtype == expected and output.loss.dtype == torch.float32
        full = model(**inputs, noise_scheduler=scheduler, generator=seeded(2))
        assert relative_error(output.condition.float(), full.condition) < 0.05
        assert output.loss.item() == pytest.approx(full.loss.item(), rel=0.05)

    def test_the_saved_dtype_comes_back(self, saved, tmp_path):
        model = self.load(saved[1], dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        loaded = self.load(tmp_path)
        assert loaded.dtype == torch.bfloat16
        assert_same_tensors(loaded.state_dict(), model.state_dict())

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
    def test_weights_that_are_not_stored_as_they_compute(self, storage, dtype):
        model, inputs = self.tiny().to(dtype), self.inputs()
        expected = model(**inputs).condition
        assert torch.equal(store(model, storage)(**inputs).condition, expected)
        assert not torch.equal(model(**{**inputs, "tokens": 9 * inputs["tokens"]}).condition, expected)

    @torch.no_grad()
    @pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"], ids=str)
    def test_device_maps(self, device_map, saved):
        model, folder = saved
        loaded = self.load(folder, device_map=device_map)
        assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
        assert torch.equal(loaded(**self.inputs()).condition, model(**self.inputs()).condition)

    @torch.no_grad()
    @pytest.mark.filterwarnings("ignore:The following device_map keys")  # accelerate's, about direct parameters
    @pytest.mark.parametrize("memory", [150_000, 250_000])
    def test_what_does_not_fit_goes_to_disk(self, memory, saved, tmp_path):
        model, folder = saved
        loaded = self.load(folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path)
        places = loaded.hf_device_map
        assert set(places.values()) == {"cpu", "disk"} and loaded.head.out_proj.weight.is_meta
        # Layers and head stay in one place: what adds a residual has it where its parts are.
        assert [
            name for name in places if name.startswith("head.") or "layers.0." in name or "layers.1." in name
        ] == []
        assert torch.equal(loaded(**self.inputs()).condition, model(**self.inputs()).condition)

    def test_auto_classes_and_the_backbone_alone(self, saved, tmp_path):
        model, folder = saved
        loaded, report = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert type(loaded) is self.model_class
        assert_same_tensors(loaded.state_dict(), model.model.state_dict())
        assert not report["unexpected_keys"] and not report["missing_keys"]
        with torch.device("meta"):
            assert type(AutoModel.from_config(model.config)) is self.model_class
        model.model.save_pretrained(tmp_path)
        assert_same_tensors(self.model_class.from_pretrained(tmp_path).state_dict(), model.model.state_dict())

    # Errors and settings

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"generator": [torch.Generator()] * 3}, r"`generator` has to hold one generator per image \(2\), got 3"),
            ({"tokens": torch.zeros(2, 15, 12)}, r"`tokens` has to be of shape \(batch, 16, 12\), got \(2, 15, 12\)"),
            ({"tokens": torch.zeros(2, 16, 8)}, r"`tokens` has to be of shape \(batch, 16, 12\), got \(2, 16, 8\)"),
            ({"tokens": torch.zeros(16, 12)}, r"`tokens` has to be of shape \(batch, 16, 12\), got \(16, 12\)"),
            ({"tokens": torch.zeros(0, 16, 12)}, r"`tokens` has to be of shape \(batch, 16, 12\), got \(0, 16, 12\)"),
            ({"tokens": [[0.0]]}, r"`tokens` has to be of shape \(batch, 16, 12\), got list"),
            ({"class_labels": torch.zeros(3).long()}, r"`class_labels` has to be of shape \(2,\), got \(3,\)"),
            ({"class_labels": [0, 1]}, r"`class_labels` has to be of shape \(2,\), got list"),
            ({"class_labels": torch.zeros(2)}, "`class_labels` has to be int64, got torch.float32"),
            ({"class_labels": torch.zeros(2).bool()}, "`class_labels` has to be int64, got torch.bool"),
            ({"class_labels": torch.tensor([0, -1])}, r"`class_labels` has to lie in 0..3, .* got \[0, -1\]"),
            ({"class_labels": torch.tensor([4, 0])}, r"`class_labels` has to lie in 0..3, .* got \[4, 0\]"),
        ],
    )
    def test_wrong_inputs(self, change, message):
        for model in (self.tiny(), self.tiny().model):
            with pytest.raises(ValueError, match=message):
                model(**{**self.inputs(), **change})

    @pytest.mark.parametrize(
        "argument, values",
        [
            ("generator", [5, [5, 5], torch.zeros(2)]),
            ("tokens", [None, torch.zeros(2, 16, 12, dtype=torch.complex64), torch.zeros(2, 16, 12).bool()]),
            ("noise_scheduler", [5, "x"]),
        ],
    )
    def test_wrong_inputs_of_training(self, argument, values):
        model, inputs = self.tiny().train(), self.inputs()
        for value in values:
            with pytest.raises(ValueError, match=f"`{argument}`"):
                model(**{**inputs, argument: value})

    @pytest.mark.parametrize(
        "mask, got", [(torch.zeros(2, 16), "torch.float32 (2, 16)"), (torch.ones(1, 16).bool(), "torch.bool (1, 16)")]
    )
    def test_wrong_masks(self, mask, got):
        with pytest.raises(ValueError) as error:
            self.tiny()(**{**self.inputs(), "mask": mask})
        assert f"`mask` has to be bool of shape (2, 16), got {got}." in str(error.value)

    @pytest.mark.parametrize("head_type", ["diffusion", "categorical"])
    def test_settings_that_the_head_does_not_have(self, head_type):
        config = tiny_config(self.backbone, head_type=head_type, head_config={"depth": 3})
        with pytest.raises(ValueError, match=rf"`head_config` \{{'depth': 3\}} does not fit '{head_type}': .*depth"):
            MODELS[self.backbone](config)

    def test_the_head_gets_the_configuration_s_settings(self):
        model = self.tiny(head_config={"num_layers": 3, "hidden_size": 16, "layer_norm_eps": 1e-5})
        assert isinstance(model.head, DiffusionHead)
        assert len(model.head.blocks) == 3 and model.head.out_norm.eps == 1e-5
        assert model.head.batch_multiplier == model.config.head_batch_multiplier == 4
        head = self.tiny(head_type="categorical", head_config={"num_codes": 8, "num_layers": 1}).head
        assert isinstance(head, CategoricalHead) and head.codebook.shape == (8, 12)


# Parts


@torch.no_grad()
@pytest.mark.parametrize("head", ["diffusion", "categorical"])
def test_layers_that_alone_are_activated_say_so(head):
    settings = {"num_layers": 1, "hidden_size": 32}
    model = tiny_model("ar", head_type=head, head_config=settings)
    given, made = [], []
    parts = [part for part in model.modules() if hasattr(part, "activated_linear")]
    assert len(parts) == 3  # two blocks of the backbone, one of the head
    for part in parts:
        getattr(part, part.activated_linear).register_forward_hook(lambda _, __, output: made.append(output))
        part.activation.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    tokens, labels = torch.randn(2, 16, 12, generator=seeded(1)), torch.tensor([0, 2])
    condition = model(tokens, class_labels=labels, orders=torch.arange(16).expand(2, -1)).condition
    if head == "categorical":
        model.head.codebook.fill_(1)
    model.head.sample(condition=condition, scheduler=TokenDDPMScheduler(), num_steps=2, generator=seeded(2))
    assert len(given) >= 3 and all(one is other for one, other in zip(given, made, strict=True))


@torch.no_grad()
def test_dropout_acts_after_the_attention_in_the_mlp_and_after_it():
    settings = {"attention_dropout": 0.0, "hidden_dropout": 0.5}
    layer, seen = tiny_model("ar", **settings, hidden_size=128).model.layers[0], []
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


def test_context_noise_is_a_mixture():
    tokens, noise = torch.randn(2, 3, 16, 12, generator=seeded(1)).unbind(0)
    levels = torch.tensor([0.0, 0.25, 1.0])[:, None, None]
    found = add_context_noise(tokens, noise, levels)
    assert torch.equal(found[0], tokens[0]) and torch.equal(found[2], noise[2])
    torch.testing.assert_close(found[1], 0.75 * tokens[1] + 0.25 * noise[1])
    assert torch.equal(add_context_noise(tokens, noise, 0.25)[1], found[1])
    assert add_context_noise(tokens.bfloat16(), noise.bfloat16(), levels).dtype == torch.bfloat16
