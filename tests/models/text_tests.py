# SPDX-License-Identifier: Apache-2.0
"""What holds for every backbone that is given texts, beside all that holds without: put before the tests of it."""

import math

import pytest
import torch

from common import MODELS, relative_error, seeded, tiny_config, tiny_model
from mar_hf.models import TextContext
from mar_hf.models.layers import BackboneLayer
from tiny_texts import TEXT, TEXT_DIM


NULL = 3  # of the tiny model's 3 classes
CALM = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "class_dropout_prob": 0.0}
# Tokens of the texts in a batch, over and over; the second is the null text.
LENGTHS = [5, 0, 2, 1]
LONGEST = 5
# Outside of linear layers, norms and embeddings.
TEXT_WEIGHTS = ["text_aligner.null_text", "text_aligner.position_embedding"]
FRESH_TEXT = {"text_dim": 64, "num_text_tokens": LONGEST, "text_aligner_layers": 1}
COUNTS = [3, 1, 5, 2, 5]  # tokens of steps


class TextTests:
    """To be mixed into a backbone's tests: they all run with texts then, and those here besides.

    Attributes:
        several: what the configuration needs for several tokens a step.
    """

    several: dict = {}

    def tiny(self, **changes):
        return super().tiny(**{**TEXT, "text_dropout_prob": 0.0, **changes})

    def layers(self, model):
        return [*model.model.text_aligner.layers, *super().layers(model)]

    def inputs(self, batch=2, model=None, **settings):
        """With texts of all lengths; what stands at padding is no number."""
        width = TEXT_DIM if model is None else model.config.text_dim
        mask = torch.arange(LONGEST) < torch.tensor([LENGTHS[row % 4] for row in range(batch)])[:, None]
        embeds = torch.randn(batch, LONGEST, width, generator=seeded(7)).where(mask[..., None], math.nan)
        texts = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        return {**super().inputs(batch, model, **settings), **texts}

    def without_texts(self, batch=2):
        inputs = self.inputs(batch)
        return {name: value for name, value in inputs.items() if not name.startswith("prompt")}, inputs

    # First weights

    @torch.no_grad()
    def test_weights_of_a_class_model_give_the_same_at_first(self, tmp_path, scheduler):
        old = tiny_model(self.backbone)
        old.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"context_attention.key_value.bias is missing"):
            self.load(tmp_path, **TEXT)
        model, report = self.load(tmp_path, **TEXT, ignore_mismatched_sizes=True, output_loading_info=True)
        assert model.config.text_dim == TEXT_DIM and not model.training
        assert all(".context_" in name or ".text_aligner." in name for name in report["missing_keys"])
        assert report["missing_keys"] == model.state_dict().keys() - old.state_dict().keys()
        without, texts = self.without_texts(4)
        expected = old(**without, noise_scheduler=scheduler, generator=seeded(2))
        for inputs in (without, texts):
            found = model(**inputs, noise_scheduler=scheduler, generator=seeded(2))
            assert torch.equal(found.condition, expected.condition) and torch.equal(found.loss, expected.loss)

    # What texts are

    @torch.no_grad()
    def test_without_a_text_it_is_the_null_text(self):
        model, (without, texts) = self.tiny(), self.without_texts()
        expected = model(**without).condition
        for length in (1, LONGEST):
            for mask in (torch.zeros(2, length).bool(), torch.zeros(2, length).long()):
                nothing = torch.full((2, length, TEXT_DIM), math.nan)
                found = model(**without, prompt_embeds=nothing, prompt_attention_mask=mask).condition
                assert torch.equal(found, expected) if length == 1 else relative_error(found, expected) < 1e-6
                found = model(**without, text_context=TextContext(nothing, mask)).condition
                assert torch.equal(found, expected) if length == 1 else relative_error(found, expected) < 1e-6
        null = model.model.text_aligner.null_text.expand(2, -1, -1)
        assert torch.equal(model(**without, prompt_embeds=null).condition, expected)
        found = model(**texts).condition
        assert relative_error(found[1:], expected[1:]) < 1e-6  # the second text is empty
        assert ((found - expected)[0].abs().amax(-1) > 1e-4).all()
        # Which is learned.
        model.model.text_aligner.null_text += 1
        assert ((model(**without).condition - expected).abs().amax(-1) > 1e-4).all()
        assert torch.equal(model(**texts).condition[0], found[0])

    @torch.no_grad()
    def test_a_text_in_a_batch_is_the_text_alone(self):
        model, inputs = self.tiny(), self.inputs(4)
        together = model(**inputs).condition
        for row, length in enumerate(LENGTHS):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            embeds, mask = alone.pop("prompt_embeds"), alone.pop("prompt_attention_mask")
            # Without padding, and where there is nothing but a text without a mask.
            if length > 0:
                alone |= {"prompt_embeds": embeds[:, :length]}
                mask = mask[:, :length]
            found = model(**alone).condition
            assert relative_error(found, together[row : row + 1]) < 1e-5
            if length > 0:
                assert torch.equal(model(**alone, prompt_attention_mask=mask).condition, found)
        # Other texts, other conditions.
        inputs["prompt_embeds"] = inputs["prompt_embeds"].roll(1, 0)
        inputs["prompt_attention_mask"] = inputs["prompt_attention_mask"].roll(1, 0)
        assert ((model(**inputs).condition - together).abs().amax((1, 2)) > 1e-3).all()

    @torch.no_grad()
    def test_texts_and_classes_are_two_things(self):
        model, inputs = self.tiny(), self.inputs()
        found = {}
        for label in (0, 1, None):
            inputs["class_labels"] = None if label is None else torch.tensor([label, label])
            found[label] = model(**inputs).condition
        for one, other in ((0, 1), (0, None), (1, None)):
            assert ((found[one] - found[other]).abs().amax((1, 2)) > 1e-3).all()

    @torch.no_grad()
    def test_a_model_may_know_texts_alone(self):
        model, inputs = self.tiny(num_classes=0), self.inputs()
        del inputs["class_labels"]
        assert model.model.class_embedding.weight.shape[0] == 1
        found = model(**inputs).condition
        assert torch.equal(model(**inputs, class_labels=torch.tensor([0, 0])).condition, found)
        assert relative_error(model(**self.without_texts()[0] | {"class_labels": None}).condition, found) > 1e-3

    @torch.no_grad()
    def test_what_is_recorded_is_the_backbone_s_not_the_aligner_s(self):
        model, (without, texts) = self.tiny(), self.without_texts()
        model.set_attn_implementation("eager")
        counts = []
        for inputs in (without, texts):
            output = model(**inputs, output_hidden_states=True, output_attentions=True)
            counts.append((len(output.hidden_states), len(output.attentions)))
        blocks = sum(isinstance(layer, BackboneLayer) for layer in self.layers(model))
        assert 0 < blocks < len(self.layers(model))
        assert counts == [(blocks + 1, blocks)] * 2

    def test_guidance_is_constant_by_default(self):
        assert self.tiny().sampling_defaults["guidance_schedule"] == "constant"
        assert "guidance_schedule" not in tiny_model(self.backbone).sampling_defaults

    # Training

    @torch.no_grad()
    @pytest.mark.parametrize("share", [0.4, 1.0])
    def test_text_dropout_drops_its_share_and_half_of_it_the_class_too(self, share):
        model = self.tiny(**{**CALM, "text_dropout_prob": share}, grid_height=1, grid_width=2)
        one = {name: value[:1] for name, value in self.inputs(1, model).items()}
        many = {name: value.expand(2000, *value.shape[1:]) for name, value in one.items()}
        nothing = {"prompt_embeds": None, "prompt_attention_mask": None}
        cases = {
            "both": one,
            "class": {**one, **nothing},
            "text": {**one, "class_labels": None},
            "none": {**one, **nothing, "class_labels": None},
        }
        expected = torch.cat([model(**inputs).condition for inputs in cases.values()])
        assert torch.pdist(expected.flatten(1)).min() > 1e-2
        conditions = model.train()(**many, generator=seeded(2)).condition
        distance = (conditions[:, None] - expected).abs().amax((2, 3))
        assert ((distance < 1e-5).sum(1) == 1).all()
        shares = dict(zip(cases, (distance < 1e-5).float().mean(0).tolist()))
        assert shares["text"] == 0
        for name, probability in (("both", 1 - share), ("class", share / 2), ("none", share / 2)):
            assert abs(shares[name] - probability) <= 4 * math.sqrt(probability * (1 - probability) / 2000)
        # Only in training.
        assert ((model.eval()(**many).condition - expected[0]).abs() < 1e-5).all()

    @torch.no_grad()
    def test_all_texts_dropped_are_the_null_text(self):
        settings = {**CALM, "text_dropout_prob": 1.0}
        inputs = self.inputs()
        inputs["class_labels"] = None
        nothing = {"prompt_embeds": None, "prompt_attention_mask": None}
        expected = self.tiny()(**{**inputs, **nothing}).condition
        found = self.tiny(**settings).train()(**inputs, generator=seeded(2)).condition
        assert relative_error(found, expected) < 1e-6

    @torch.no_grad()
    def test_texts_are_drawn_once_before_classes(self):
        settings = {**CALM, "class_dropout_prob": 0.5, "text_dropout_prob": 0.5, "order": "random"}
        model, generator, batch = self.tiny(**settings).train(), seeded(4), 12
        tokens, labels, _ = self.basic_inputs(batch, model)
        texts = {name: value for name, value in self.inputs(batch).items() if name.startswith("prompt")}
        drawn = model(tokens, class_labels=labels, **texts, generator=generator).condition

        again = seeded(4)
        inputs = self.draw(again, batch)
        text, label = torch.rand(batch, generator=again), torch.rand(batch, generator=again)
        assert torch.equal(generator.get_state(), again.get_state())
        dropped = (text < 0.25) | (label < 0.5)
        # All that may come together does.
        assert {(a.item(), b.item()) for a, b in zip(text < 0.5, dropped)} == {(a, b) for a in (0, 1) for b in (0, 1)}
        texts["prompt_attention_mask"] = texts["prompt_attention_mask"] & (text >= 0.5)[:, None]
        expected = model.eval()(tokens, class_labels=labels.where(~dropped, NULL), **texts, **inputs).condition
        assert torch.equal(drawn, expected)

    @torch.no_grad()
    def test_an_image_draws_its_text_from_its_own_generator(self, scheduler):
        settings = {**CALM, "class_dropout_prob": 0.5, "text_dropout_prob": 0.5, "order": "random"}
        model, batch = self.tiny(**settings).train(), 6
        tokens, labels, _ = self.basic_inputs(batch, model)
        texts = {name: value for name, value in self.inputs(batch).items() if name.startswith("prompt")}

        def run(chosen, generator):
            given = {name: value[chosen] for name, value in texts.items()} | self.shared_draws
            given |= {"class_labels": labels[chosen], "noise_scheduler": scheduler}
            return model(tokens[chosen], **given, generator=generator)

        together = run(slice(None), [seeded(image) for image in range(batch)])
        alone = [run(slice(image, image + 1), seeded(image)) for image in range(batch)]
        assert relative_error(together.condition, torch.cat([output.condition for output in alone])) < 1e-5
        assert together.loss.item() == pytest.approx(sum(output.loss.item() for output in alone) / batch, rel=1e-5)

    @torch.no_grad()
    def test_where_no_text_can_be_dropped_nothing_is_drawn(self):
        without, texts = self.without_texts()
        context = TextContext(texts["prompt_embeds"], texts["prompt_attention_mask"])
        for share, inputs in ((0.0, texts), (0.5, without), (0.5, {**without, "text_context": context})):
            generator, same = seeded(2), seeded(2)
            model = self.tiny(**{**CALM, "class_dropout_prob": 0.5, "text_dropout_prob": share}).train()
            model(**inputs, generator=generator)
            # What a model without texts draws.
            tiny_model(self.backbone, **{**CALM, "class_dropout_prob": 0.5}).train()(**without, generator=same)
            assert torch.equal(generator.get_state(), same.get_state())
            before = generator.get_state()
            model.eval()(**texts, generator=generator)
            assert torch.equal(generator.get_state(), before)

    def test_training_lowers_the_loss(self, scheduler):
        """By what texts say, and by nothing else: pictures of one token."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            size = {"grid_height": 1, "grid_width": 1, "num_classes": 0, "head_batch_multiplier": 32}
            settings = {**TEXT, **CALM, **size, "text_dropout_prob": 0.2}
            model = MODELS[self.backbone](tiny_config(self.backbone, **settings)).train()
        tokens, texts = torch.randn(3, 1, 12, generator=seeded(1)), torch.randn(3, 4, TEXT_DIM, generator=seeded(3))
        optimiser, generator, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), seeded(2), []
        for _ in range(120):
            loss = model(tokens, prompt_embeds=texts, noise_scheduler=scheduler, generator=generator).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        given = {"tokens": tokens, "mask": torch.ones(3, 1).bool(), "noise_scheduler": scheduler}
        with torch.no_grad():
            right, wrong, none = (
                model.eval()(**given, prompt_embeds=embeds, generator=seeded(4)).loss.item()
                for embeds in (texts, texts.roll(1, 0), None)
            )
        assert sum(losses[:3]) / 3 > 0.9 and sum(losses[-10:]) / 10 < 0.4
        # Most of the loss is at noise through which the token shows.
        assert right < none < wrong and wrong > 1.4 * right

    # Sampling

    @torch.no_grad()
    def test_the_texts_of_all_steps_are_those_of_each(self):
        """One context for all steps, with a cache where the backbone has one, both branches of guidance at once."""
        model, inputs = self.tiny(**self.several), self.inputs(4)
        tokens, labels = inputs["tokens"].repeat(2, 1, 1), inputs["class_labels"]
        orders = torch.rand(4, 16, generator=seeded(5)).argsort(1).repeat(2, 1)
        labels = torch.cat([labels, torch.full_like(labels, NULL)])
        embeds = inputs["prompt_embeds"].repeat(2, 1, 1)
        mask = torch.cat([inputs["prompt_attention_mask"], torch.zeros(4, LONGEST).bool()])
        reads = []
        model.model.text_aligner.register_forward_hook(lambda *_: reads.append(1))

        def steps(context, cache=None):
            return [
                model.predict(tokens, orders, COUNTS[:step], labels, cache, context or TextContext(embeds, mask))
                for step in range(1, len(COUNTS) + 1)
            ]

        expected = steps(None)
        assert len(reads) == len(COUNTS)
        found = steps(TextContext(embeds, mask))
        assert len(reads) == len(COUNTS) + 1
        cached = [steps(TextContext(embeds, mask), model.make_cache(COUNTS, static)) for static in (False, True)]
        for one, other, *others, count in zip(expected, found, *cached, COUNTS, strict=True):
            assert one.shape == (8, count, 32)
            assert torch.equal(one, other) and all(relative_error(last, one) < 1e-5 for last in others)
        # The branch to be guided away from is the one that training knows: neither text nor class.
        for step in range(1, len(COUNTS) + 1):
            null = model.predict(tokens[:4], orders[:4], COUNTS[:step])
            assert relative_error(expected[step - 1][4:], null) < 1e-5

    @torch.no_grad()
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_attention_to_texts_follows_the_implementation(self, attention):
        model, inputs = self.tiny(), self.inputs(4)
        expected = model(**inputs).condition
        model.set_attn_implementation(attention)
        for module in (model.model.text_aligner.layers[0].attention, self.layers(model)[-1].context_attention):
            assert module.config._attn_implementation == attention
        assert relative_error(model(**inputs).condition, expected) < 1e-5

    @pytest.mark.slow
    @torch.no_grad()
    def test_the_backbone_compiles_in_one_piece_with_texts(self):
        model, inputs = self.tiny().model, self.inputs()
        expected = model(**inputs).condition
        settings = {"num_masked": int(inputs["mask"][0].sum())} if "mask" in inputs else {}
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative_error(compiled(**inputs, **settings).condition, expected) < 1e-5
        torch.compiler.reset()

    # Errors

    @pytest.mark.parametrize(
        "shape, mask",
        [
            ((2, 3, TEXT_DIM + 1), None),
            ((1, 3, TEXT_DIM), None),
            ((3, TEXT_DIM), None),
            ((2, 0, TEXT_DIM), None),
            ((2, TEXT["num_text_tokens"] + 1, TEXT_DIM), None),
            ((2, 3, TEXT_DIM), (2, 4)),
            ((2, 3, TEXT_DIM), (1, 3)),
            ((2, 3, TEXT_DIM), (2,)),
            ((2, 3, TEXT_DIM), (2, 3, 1)),
        ],
        ids=str,
    )
    def test_texts_of_wrong_shapes(self, shape, mask):
        texts = {"prompt_embeds": torch.zeros(shape), "prompt_attention_mask": mask and torch.ones(mask)}
        name, expected, got = ("prompt_embeds", f"(2, 1..{TEXT['num_text_tokens']}, {TEXT_DIM})", shape)
        if mask is not None:
            name, expected, got = ("prompt_attention_mask", str(shape[:2]), mask)
        for model in (self.tiny(), self.tiny().model):
            with pytest.raises(ValueError) as error:
                model(**{**self.inputs(), **texts})
            assert f"`{name}` has to be of shape {expected}, got {got}." in str(error.value)

    def test_texts_of_another_number_of_images(self):
        context = TextContext(torch.zeros(3, 1, TEXT_DIM), torch.ones(3, 1))
        with pytest.raises(ValueError, match="`text_context` has to hold 2 texts, got 3"):
            self.tiny()(**self.without_texts()[0], text_context=context)

    def test_a_model_without_texts_refuses_them(self):
        model, (without, texts) = tiny_model(self.backbone), self.without_texts()
        context = TextContext(texts["prompt_embeds"], texts["prompt_attention_mask"])
        for wrong in (texts, {**without, "text_context": context}):
            for part in (model, model.model):
                with pytest.raises(ValueError, match="`prompt_embeds` needs a model that takes texts"):
                    part(**wrong)
