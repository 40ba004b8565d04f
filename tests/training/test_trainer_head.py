# SPDX-License-Identifier: Apache-2.0
"""Distilling the head of a trained pipeline: what is drawn, what is learned from it, what stays."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import write_pictures

from example_runs import forget_accelerate
from mar_hf import TOKEN_HEADS, MARPipeline
from mar_hf.training import HeadTrainer, Trainer, TrainingArguments
from mar_hf.training.trainer_head import noted_draws
from tiny_pipelines import seeds, tiny_pipeline, tiny_text_pipeline


STUDENT = {"head_type": "diffusion", "head_config": {"num_layers": 2, "hidden_size": 24}}
SETTINGS = {
    "resolution": 8,
    "model_config": json.dumps(STUDENT),
    "distill_head": True,
    "distill_images": 6,
    "train_batch_size": 4,
    "max_train_steps": 4,
    "learning_rate": 1e-2,
    "lr_warmup_steps": 1,
    "logging_steps": 1,
    "validation_images": 1,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline, and pictures of its classes."""
    root = tmp_path_factory.mktemp("distillation")
    names = ["cat", "clock", "heart"]
    tiny_pipeline(id2label=dict(enumerate(names))).save_pretrained(root / "teacher")
    write_pictures(root / "pictures", names, 3)
    return {"train_data_dir": str(root / "pictures"), "pretrained_model_name_or_path": str(root / "teacher")}


def run(folders, output, **settings):
    trainer = HeadTrainer(TrainingArguments(**folders, output_dir=str(output), **{**SETTINGS, **settings}))
    trainer.train()
    forget_accelerate()
    return trainer


def states(path):
    return load_file(path / "pipeline" / "transformer" / "model.safetensors")


def test_the_backbone_stays_and_the_head_is_another(folders, tmp_path):
    trainer = run(folders, tmp_path)
    before = MARPipeline.from_pretrained(folders["pretrained_model_name_or_path"]).transformer
    pipe = MARPipeline.from_pretrained(tmp_path / "pipeline")
    after = pipe.transformer.state_dict()
    assert all(torch.equal(value, after[f"model.{name}"]) for name, value in before.model.state_dict().items())
    assert pipe.transformer.config.head_config == STUDENT["head_config"]
    assert len(trainer.drawn) == 6 and trainer.progress.step == 4
    assert len(pipe(class_labels=[0], generator=seeds(0)).images) == 1


def test_classes_are_told_by_their_names(folders, tmp_path):
    pipe = MARPipeline.from_pretrained(folders["pretrained_model_name_or_path"])
    turned = tmp_path / "turned"
    table = pipe.transformer.model.class_embedding.weight
    with torch.no_grad():
        table.copy_(table[[2, 1, 0, 3]])
    tiny_pipeline(transformer=pipe.transformer, id2label={0: "heart", 1: "clock", 2: "cat"}).save_pretrained(turned)
    drawn = [
        run({**folders, "pretrained_model_name_or_path": str(teacher)}, tmp_path / name, max_train_steps=1).drawn.drawn
        for name, teacher in (("same", folders["pretrained_model_name_or_path"]), ("other", turned))
    ]
    assert torch.equal(drawn[0]["target"], drawn[1]["target"])


def test_a_run_that_was_cut_off_ends_the_same(folders, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"checkpointing_steps": 2, "lr_scheduler": "constant_with_warmup"}
    run(folders, whole, **settings)
    run(folders, parts, **settings, max_train_steps=2)
    drawn = (parts / "drawn.safetensors").stat().st_mtime_ns
    run(folders, parts, **settings, resume_from_checkpoint="latest")
    assert (parts / "drawn.safetensors").stat().st_mtime_ns == drawn
    expected, found = states(whole), states(parts)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_text_pipeline])
def test_what_is_noted_is_what_was_drawn(pipeline):
    pipe, call = pipeline(), {"class_labels": [1, 2], "output_type": "latent", "guidance_scale": 3.0}
    head = pipe.transformer.head
    expected = pipe(**call, generator=seeds(0, 1)).images
    with noted_draws(head, guides_condition=True) as guided:
        assert torch.equal(pipe(**call, generator=seeds(0, 1)).images, expected)
    with noted_draws(head, guides_condition=False) as apart:
        assert torch.equal(pipe(**call, generator=seeds(0, 1)).images, expected)
    assert "draw" not in vars(head)
    counts = [tokens.shape[1] for _, tokens in guided]
    assert sum(counts) == 16 and all(len(tokens) == 2 for _, tokens in guided)
    # Both branches of the same steps; the last has the whole scale of the linear schedule.
    assert [tokens.shape[1] for _, tokens in apart] == [2 * count for count in counts]
    condition, negative = apart[-1][0].chunk(2, 1)
    torch.testing.assert_close(guided[-1][0], negative + 3 * (condition - negative))
    every = torch.cat([tokens for _, tokens in guided], 1)
    places = pipe.vae.patchify(expected)
    for image in range(2):
        assert {tuple(row) for row in every[image].tolist()} == {tuple(row) for row in places[image].tolist()}


def test_a_head_learns_what_the_teacher_draws(folders, tmp_path):
    trainer = run(folders, tmp_path, max_train_steps=30, logging_steps=30, distill_images=24)
    first, last = (trainer.progress.history[place]["loss"] for place in (0, -1))
    fresh = TOKEN_HEADS["diffusion"](token_dim=12, condition_dim=32, **STUDENT["head_config"])
    assert last == first and last < 0.95 * fresh_loss(fresh, trainer)


@torch.no_grad()
def fresh_loss(head, trainer):
    for module in head.modules():
        head.init_weights(module)
    drawn = trainer.drawn.drawn
    mask = torch.ones(drawn["target"].shape[:2], dtype=torch.bool)
    settings = {"scheduler": trainer.noise_scheduler, "generator": torch.Generator().manual_seed(0)}
    return head.loss(condition=drawn["condition"], target=drawn["target"], mask=mask, **settings).item()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pretrained_model_name_or_path": None}, "`distill_head` needs `pretrained_model_name_or_path`"),
        ({"model_config": "{}"}, "`model_config` has to name `head_type`"),
        ({"model_config": '{"head_type": "diffusion", "order": "raster"}'}, "`model_config` has to name `head_type`"),
        ({"lora_rank": 2}, "`lora_rank` has to be left out"),
        ({"distill_images": 0}, "`distill_images` has to be at least 1"),
    ],
)
def test_settings_that_do_not_go_with_it(settings, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**{**folders, "output_dir": str(tmp_path), **SETTINGS, **settings})


@pytest.mark.parametrize("trainer, distils", [(Trainer, True), (HeadTrainer, False)])
def test_each_trainer_does_its_own_work(trainer, distils, folders, tmp_path):
    with pytest.raises(ValueError, match="`distill_head` has to be"):
        trainer(TrainingArguments(**folders, output_dir=str(tmp_path), **{**SETTINGS, "distill_head": distils}))


def test_other_pictures_than_those_asked_for(folders, tmp_path):
    run(folders, tmp_path, max_train_steps=1, checkpointing_steps=None)
    with pytest.raises(ValueError, match="`distill_images` has to be 6"):
        run(folders, tmp_path, distill_images=7)
