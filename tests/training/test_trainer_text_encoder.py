# SPDX-License-Identifier: Apache-2.0
"""The training of text encoders: a tokenizer that does what sentencepiece does, an encoder that goes with it."""

import csv
import io
import itertools
import json
import math
import random
import subprocess
import sys

import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import AutoTokenizer, T5EncoderModel

from common import assert_same_tensors
from example_runs import forget_accelerate
from mar_hf.models import load_text_encoder
from mar_hf.training import TextEncoderTrainer, TextEncoderTrainingArguments, parse_arguments
from mar_hf.training.text_data import read_captions
from mar_hf.training.text_tokenizer import check_tokenizer, make_tokenizer, train_sentencepiece
from mar_hf.training.trainer_text_encoder import CaptionCollator


NAMES = ["red heart", "grinning cat", "cook", "crêpe", "man's shoe", "Mrs. Claus", "5–0"]
CAPTIONS = [
    [f"{start}{name}{end}", f"{name}{end}, food, colour"]
    for name in NAMES
    for start in ("", "woman ", "man ")
    for end in ("", ": light skin tone", ": medium-dark skin tone")
]
TEXTS = list(dict.fromkeys(text for texts in CAPTIONS for text in texts))
# What Unicode, spaces and characters never seen may do; sentencepiece says what is right.
ODD = [
    *("", " ", "  two  spaces ", "tab\tnew\nline\r\n", "nb\u00a0sp", "\u2028line", "\u3000wide\u3000", "\ufeffmark"),
    *("ﬁne ﬂat", "Ｆｕｌｌ", "cafe\u0301", "café", "²½…", "Å\u212b", "İstanbul", "ẞtraße"),
    *("soft\u00adhyphen", "a\u0301\u0301", "zero\u200bwidth", "zw\u200dj", "👩🏽\u200d🍳", "🧧🧧 🧧", "红包 heart"),
    *("ﷺ", "한글", "▁lit", "a▁b", "a\x01b", "A" * 300),
]
SETTINGS = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "train_batch_size": 4,
    "max_train_steps": 2,
    "logging_steps": 1,
}


def arguments(data, folder, **settings):
    return TextEncoderTrainingArguments(str(folder), str(data), **{**SETTINGS, **settings})


def run(data, folder, **settings):
    trainer = TextEncoderTrainer(arguments(data, folder, **settings))
    trainer.train()
    assert trainer.summary.endswith(f"parameters in {folder}")
    return folder


def captioned(folder, captions, **columns):
    """An image folder with captions, and with other columns beside them."""
    folder.mkdir()
    lines = []
    for number, texts in enumerate(captions):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": texts}
        lines.append(json.dumps(row | {name: values[number] for name, values in columns.items()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pieces():
    return train_sentencepiece(TEXTS, 100)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return captioned(tmp_path_factory.mktemp("data") / "pictures", CAPTIONS)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return run(data, tmp_path_factory.mktemp("trained") / "text")


def load(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return tokenizer, T5EncoderModel.from_pretrained(folder, subfolder="text_encoder")


# The tokenizer


def test_ids_are_those_of_sentencepiece(trained, pieces):
    tokenizer, _ = load(trained)
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    for text in [*TEXTS, *ODD]:
        assert tokenizer(text).input_ids == [*processor.encode(text), 1], text
    # Characters of the captions are known, whatever their form; others are not.
    assert processor.unk_id() not in tokenizer(TEXTS + ["cafe\u0301", "ＲＥＤ"], padding=True).input_ids
    assert processor.unk_id() in tokenizer("红").input_ids
    check_tokenizer(tokenizer, pieces, [*TEXTS, *ODD])


def test_special_pieces_are_where_the_model_has_them(trained, pieces):
    tokenizer, encoder = load(trained)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token is None
    config = encoder.config
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    # No sentinel tokens: every piece has its row, every row its piece.
    size = sentencepiece.SentencePieceProcessor(model_proto=pieces).get_piece_size()
    assert len(tokenizer) == config.vocab_size == encoder.get_input_embeddings().num_embeddings == size
    assert not any("extra_id" in token for token in tokenizer.get_vocab())
    assert tokenizer.decode(tokenizer("Woman  COOK").input_ids, skip_special_tokens=True) == "woman cook"


def test_few_captions_give_few_pieces(tmp_path):
    (tmp_path / "captions.txt").write_text("a cat\n", encoding="utf-8")
    tokenizer, encoder = load(run(tmp_path / "captions.txt", tmp_path / "text", vocab_size=1000))
    assert len(tokenizer) == encoder.config.vocab_size < 20


@pytest.mark.slow
def test_sentencepiece_is_not_needed_for_loading(trained):
    assert sorted(path.name for path in (trained / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    code = (
        "import sys; sys.modules['sentencepiece'] = sys.modules['google.protobuf'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"print(AutoTokenizer.from_pretrained({str(trained)!r}, subfolder='tokenizer')({TEXTS[4]!r}).input_ids)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == load(trained)[0](TEXTS[4]).input_ids


def test_the_model_is_unigram(trained, pieces):
    kind = json.loads((trained / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert (kind["type"], kind["byte_fallback"], kind["unk_id"]) == ("Unigram", False, 2)
    # A model of another kind is read without an error, and refused for what it does.
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=other,
        model_type="bpe",
        vocab_size=100,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
    )
    tokenizer = make_tokenizer(other.getvalue())
    assert len(tokenizer) == 100
    with pytest.raises(ValueError, match=r"The tokenizer makes \[.*\] of '.*', sentencepiece \["):
        check_tokenizer(tokenizer, other.getvalue(), TEXTS)


def test_a_tokenizer_of_another_size_is_refused(pieces):
    tokenizer = make_tokenizer(pieces)
    tokenizer.add_tokens("more")
    with pytest.raises(ValueError, match=r"The tokenizer has (\d+) ids, sentencepiece \d+\."):
        check_tokenizer(tokenizer, pieces, [])


def test_captions_that_name_special_tokens_are_refused(tmp_path):
    data = captioned(tmp_path / "pictures", [["a cat"], ["a </s> dog"], ["<pad>"]])
    with pytest.raises(ValueError, match=r"The tokenizer makes \[.*\] of 'a </s> dog', sentencepiece \["):
        run(data, tmp_path / "text")
    assert not (tmp_path / "text").exists()


# The training


def test_everything_is_written(trained):
    assert sorted(path.name for path in trained.iterdir()) == ["loss.csv", "loss.png", "text_encoder", "tokenizer"]
    assert sorted(path.name for path in (trained / "text_encoder").iterdir()) == ["config.json", "model.safetensors"]
    with open(trained / "loss.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"] and all(math.isfinite(float(row["loss"])) for row in rows)
    assert Image.open(trained / "loss.png").format == "PNG"


def test_other_scripts_load_it(trained):
    encoder, tokenizer = load_text_encoder(str(trained))
    assert type(encoder) is T5EncoderModel and len(tokenizer) == encoder.config.vocab_size
    expected = load(trained)[1].state_dict()
    assert_same_tensors(encoder.state_dict(), expected)


def test_states_do_not_depend_on_the_batch(trained):
    tokenizer, encoder = load(trained)
    batch = tokenizer(TEXTS[:8], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder(**batch).last_hidden_state
        for text, row, mask in zip(TEXTS, states, batch.attention_mask.bool(), strict=False):
            alone = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            assert torch.allclose(row[mask], alone, atol=1e-5)
    assert states.shape[2] == 16


def test_a_run_depends_on_its_seed_only(data, trained, tmp_path):
    torch.manual_seed(5)
    random.seed(5)
    same, other = run(data, tmp_path / "same"), run(data, tmp_path / "other", seed=1)
    for path in (path for path in trained.rglob("*") if path.is_file() and path.suffix != ".png"):
        assert (same / path.relative_to(trained)).read_bytes() == path.read_bytes(), path
    name = "text_encoder/model.safetensors"
    assert (other / name).read_bytes() != (trained / name).read_bytes()
    # Pieces are learned, not drawn.
    name = "tokenizer/tokenizer.json"
    assert (other / name).read_bytes() == (trained / name).read_bytes()


def test_training_learns(tmp_path, data):
    settings = {"max_train_steps": 60, "learning_rate": 1e-2, "lr_warmup_steps": 5, "logging_steps": 20}
    trainer = TextEncoderTrainer(arguments(data, tmp_path / "text", **settings, hidden_size=32))
    before = {name: tensor.clone() for name, tensor in trainer.model.encoder.named_parameters()}
    trainer.train()
    history = trainer.progress.history
    assert [row["step"] for row in history] == [20, 40, 60]
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    assert not any(torch.equal(tensor, before[name]) for name, tensor in trainer.model.encoder.named_parameters())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data):
    trainer = TextEncoderTrainer(arguments(data, tmp_path / "text"))
    torch.nn.init.constant_(trainer.model.shared.weight, math.nan)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 1"):
        trainer.train()
    assert not (tmp_path / "text" / "text_encoder").exists()


def test_a_resumed_run_ends_with_the_same_bytes(data, tmp_path):
    settings = {"max_train_steps": 5, "checkpointing_steps": 2}
    whole = run(data, tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        step = TextEncoderTrainer.step

        def stop(self, batches):
            if self.progress.step == 3:
                raise KeyboardInterrupt
            return step(self, batches)

        patch.setattr(TextEncoderTrainer, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "stopped", **settings)
    forget_accelerate()
    with pytest.raises(ValueError, match="holds checkpoints: go on with"):
        run(data, tmp_path / "stopped", **settings)
    stopped = run(data, tmp_path / "stopped", **settings, resume_from_checkpoint="latest")
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(names) > 10
    assert [name for name in names if (stopped / name).read_bytes() != (whole / name).read_bytes()] == []


def test_batches_lead_from_texts_to_captions(pieces):
    tokenizer = make_tokenizer(pieces)
    pictures = [(["cook", "woman cook", "food cook"], ["cook", "woman cook"]), (["red heart: food"], ["red heart"])]

    def batch_of(pictures, token_dropout, position=0):
        rows = [{"choices": c, "captions": k, "position": position + n} for n, (c, k) in enumerate(pictures)]
        return CaptionCollator(tokenizer, token_dropout, seed=0)(rows)

    seen = set()
    for position in range(60):
        batch = batch_of(pictures, 0.0, position)
        labels = batch["labels"].masked_fill(batch["labels"] == -100, 0)
        assert torch.equal(labels == 0, batch["labels"] == -100)
        assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
        read = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        meant = tokenizer.batch_decode(labels, skip_special_tokens=True)
        assert (read[1], meant[1]) == ("red heart: food", "red heart")
        seen.add((read[0], meant[0]))
        # A row depends on its own position only.
        assert tokenizer.batch_decode(batch_of(pictures[:1], 0.0, position)["input_ids"]) == [
            tokenizer.decode([piece for piece in batch["input_ids"][0] if piece != tokenizer.pad_token_id])
        ]
    assert seen == set(itertools.product(*pictures[0]))
    # Of what is read almost nothing is left but its end; what is asked for stays whole.
    batch = batch_of([(["woman cook"], ["woman cook"])] * 50, 0.99)
    assert batch["attention_mask"].sum() < 60
    last = batch["attention_mask"].sum(1, keepdim=True) - 1
    assert (batch["input_ids"].gather(1, last) == tokenizer.eos_token_id).all()
    assert (batch["labels"] == torch.tensor(tokenizer("woman cook").input_ids)).all()


# What is read


def test_a_text_file_has_one_caption_a_line(tmp_path):
    (tmp_path / "captions.txt").write_text("\n a cat\r\n\ncrêpe\u2028\na dog", encoding="utf-8")
    path = str(tmp_path / "captions.txt")
    assert read_captions(path, "text") == ([["a cat"], ["crêpe"], ["a dog"]], [""] * 3)
    trainer = TextEncoderTrainer(arguments(path, tmp_path / "text", caption_templates=["my {}", "our {}"]))
    trainer.train()
    load(tmp_path / "text")
    # Captions without a template are asked for in training.
    assert "ids of all 9 texts are those of sentencepiece" in trainer.summary


def test_captions_of_a_folder(data, tmp_path):
    assert read_captions(str(data), "text") == (CAPTIONS, [""] * len(CAPTIONS))
    with pytest.raises(ValueError, match="`train_data_dir` '.*pictures' holds no captions: no column 'prompt'"):
        read_captions(str(data), "prompt")
    folder = captioned(tmp_path / "classes", ["ä", "b"], label=["zoo", "ant"])
    assert read_captions(str(folder), "text") == ([["ä"], ["b"]], ["zoo", "ant"])
    words = ["--train_data_dir", str(folder), "--output_dir", "x", "--caption_templates", "{label}: {}", "{}"]
    args = parse_arguments(TextEncoderTrainingArguments, words)
    assert args.caption_templates == ["{label}: {}", "{}"]
    tokenizer, _ = load(run(folder, tmp_path / "text", caption_templates=args.caption_templates))
    assert tokenizer.unk_token_id not in tokenizer("zoo: ä").input_ids


@pytest.mark.parametrize("content, message", [(b" \n", "holds no captions"), (b"caf\xe9", "is no text file in UTF-8")])
def test_files_without_captions(tmp_path, content, message):
    (tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"`train_data_dir` '.*captions.txt' {message}"):
        run(tmp_path / "captions.txt", tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_nothing_is_written_over(data, trained):
    before = (trained / "loss.csv").stat().st_mtime_ns
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        run(data, trained)
    assert (trained / "loss.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_train_steps": 0}, "`max_train_steps` has to be at least 1, got 0"),
        ({"num_layers": 0}, "`num_layers` has to be at least 1, got 0"),
        ({"vocab_size": 3}, "`vocab_size` has to be at least 10, got 3"),
        ({"token_dropout": 1.0}, r"`token_dropout` has to lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"`dropout` has to lie in \[0, 1\), got -0.1"),
        ({"num_attention_heads": 3}, "`hidden_size` 16 has to be a multiple of `num_attention_heads` 3"),
        (
            {"caption_templates": ["{}", "an emoji"]},
            r"`caption_templates` has to hold texts with \{\} for the caption",
        ),
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, tmp_path / "text", **settings)
