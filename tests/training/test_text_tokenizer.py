# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that does what sentencepiece does, or is refused."""

import io

import pytest
import sentencepiece

from mar_hf.training.text_tokenizer import check_tokenizer, make_tokenizer, train_sentencepiece


TEXTS = [f"{start}{name}" for name in ("red heart", "grinning cat", "crêpe", "5–0") for start in ("", "my ", "food, ")]


@pytest.fixture(scope="module")
def pieces():
    return train_sentencepiece(TEXTS, 60)


def test_ids_are_those_of_the_model(pieces):
    tokenizer = make_tokenizer(pieces)
    check_tokenizer(tokenizer, pieces, [*TEXTS, "", "  ｆｕｌｌ  width ", "never seen: 红"])
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert train_sentencepiece(TEXTS, 60) == pieces


def test_a_tokenizer_of_another_size_is_refused(pieces):
    tokenizer = make_tokenizer(pieces)
    tokenizer.add_tokens("more")
    with pytest.raises(ValueError, match=r"The tokenizer has (\d+) ids, sentencepiece \d+\."):
        check_tokenizer(tokenizer, pieces, [])


def test_a_model_of_another_kind_is_refused():
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=other,
        model_type="bpe",
        vocab_size=60,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
    )
    with pytest.raises(ValueError, match=r"The tokenizer makes \[.*\] of '.*', sentencepiece \["):
        check_tokenizer(make_tokenizer(other.getvalue()), other.getvalue(), TEXTS)
