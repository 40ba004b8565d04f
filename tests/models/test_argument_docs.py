# SPDX-License-Identifier: Apache-2.0
"""What several models take is documented in one place and shown by all of them."""

import inspect

import pytest

from mar_hf import ARForImageGeneration, ARModel, MARForImageGeneration, MARModel
from mar_hf.models.argument_docs import ARGUMENTS, WIDTH, fill_arguments


@pytest.mark.parametrize("model_class", [ARForImageGeneration, ARModel, MARForImageGeneration, MARModel])
def test_help_shows_what_is_shared(model_class):
    doc = inspect.getdoc(model_class.forward)
    for name in ("class_labels", "generator", "prompt_embeds", "prompt_attention_mask", "text_context", "return_dict"):
        (line,) = [line for line in doc.splitlines() if line.startswith(f"    {name} (")]
        assert line.removeprefix(f"    {name} ")[:40] == ARGUMENTS[name][:40]
    assert "{" not in doc and max(map(len, doc.splitlines())) < WIDTH


def test_arguments_are_filled_in_where_they_stand():
    @fill_arguments
    class Model:
        def forward(self, tokens, generator=None):
            """Run.

            Args:
                tokens (`int`): of its own.
                {generator, return_dict}
                last (`set`): such as {1}.
            """

        def bare(self):
            pass

    lines = Model.forward.__doc__.splitlines()
    starts = [line.split()[0] for line in lines if line.startswith(" " * 16) and line[16] != " "]
    assert starts == ["tokens", "generator", "return_dict", "last"] and "such as {1}." in lines[-2]
    assert Model.bare.__doc__ is None


def test_an_argument_of_which_nothing_is_known():
    with pytest.raises(KeyError, match="magic"):

        @fill_arguments
        class Model:
            def forward(self, magic):
                """{magic}"""


@pytest.mark.parametrize(
    "model_class, by_position",
    [
        (MARModel, ["tokens", "mask", "class_labels", "num_masked"]),
        (
            MARForImageGeneration,
            ["tokens", "mask", "class_labels", "noise_scheduler", "timesteps", "noise", "num_masked"],
        ),
        (ARModel, ["tokens", "orders", "tokens_per_step", "class_labels", "past_key_values"]),
        (
            ARForImageGeneration,
            [
                *("tokens", "mask", "class_labels", "noise_scheduler", "timesteps", "noise"),
                *("orders", "tokens_per_step", "past_key_values"),
            ],
        ),
    ],
)
def test_what_may_be_given_by_position_keeps_its_place(model_class, by_position):
    parameters = list(inspect.signature(model_class.forward).parameters.values())[1:]
    positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert positional == by_position
    # The rest has a name, whatever its place is.
    assert {one.kind for one in parameters[len(by_position) :]} == {
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    }
