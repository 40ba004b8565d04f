# SPDX-License-Identifier: Apache-2.0
"""Linear layers by oneDNN: the same numbers, and only where nothing is out of the ordinary."""

import copy
import os
import pickle
import platform
import subprocess
import sys

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from common import randomise, relative_error, seeded
from mar_hf.onednn import TYPICAL_ROWS, apply_activated, onednn_linears
from tiny_pipelines import tiny_pipeline


WIDTH = 512  # of matrices that are large enough to be replaced


ACTIVATIONS = [nn.functional.gelu, nn.functional.silu, nn.functional.relu]


def model():
    return randomise(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH, bias=False)))


def replaced(module):
    return [name for name, part in module.named_modules() if "forward" in vars(part)]


@torch.no_grad()
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1,), (3, 4), (TYPICAL_ROWS,), (2, TYPICAL_ROWS), (0,)])
def test_the_numbers_are_the_same(shape, dtype, limit):
    module, states = model().to(dtype), torch.randn(*shape, WIDTH, generator=seeded(1)).to(dtype)
    expected = module(states)
    with onednn_linears(module):
        found = module(states), module(states)
    assert expected.numel() == 0 or all(relative_error(again.float(), expected.float()) < limit for again in found)
    assert found[0].shape == expected.shape and found[0].dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 2 * TYPICAL_ROWS])
def test_activations_are_the_same(rows, activation):
    module, states = model()[0], torch.randn(rows, WIDTH, generator=seeded(1))
    expected = activation(module(states))
    assert torch.equal(apply_activated(module, states, activation), expected)
    with onednn_linears(module):
        assert relative_error(apply_activated(module, states, activation), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_hooks_see_has_no_activation(activation):
    module, states, seen = model()[0], torch.randn(3, WIDTH, generator=seeded(1)), []
    expected = module(states)
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with onednn_linears(module):
        apply_activated(module, states, activation)
    assert len(seen) == 1 and relative_error(seen[0], expected) < 1e-5


@torch.no_grad()
def test_layers_are_replaced_inside_only_and_read_their_weights_again():
    module, states = model(), torch.randn(3, WIDTH, generator=seeded(1))
    with onednn_linears(module):
        assert replaced(module) == ["0", "2"]
        before = module(states)
    assert replaced(module) == []
    for parameter in module.parameters():
        parameter.data.mul_(2)  # as averaged weights are set, past torch's count of changes
    expected = module(states)
    with onednn_linears(module):
        assert relative_error(module(states), expected) < 1e-5
    assert relative_error(expected, before) > 0.1


def test_an_error_inside_leaves_nothing_behind():
    module = model()
    with pytest.raises(RuntimeError, match="stop"), onednn_linears(module):
        raise RuntimeError("stop")
    assert replaced(module) == []


@torch.no_grad()
def test_two_calls_at_once_do_not_disturb_each_other():
    module, states = model(), torch.randn(3, WIDTH, generator=seeded(1))
    expected = module(states)
    outer, inner = onednn_linears(module), onednn_linears(module)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert torch.equal(module(states), expected)
    inner.__exit__(None, None, None)
    assert replaced(module) == []


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_made_inside_are_models_of_their_own(copied):
    module, states = model(), torch.randn(3, WIDTH, generator=seeded(1))
    with onednn_linears(module):
        expected = module(states)
        another = copied(module)
        assert relative_error(another(states), expected) < 1e-5
    for parameter in another.parameters():
        parameter.data.zero_()
    assert not another(states).any()
    assert relative_error(module(states), expected) < 1e-5
    with onednn_linears(another):
        assert len(replaced(another)) == 2 and not another(states).any()


@torch.no_grad()
def test_weights_that_are_swapped_for_a_call_are_used():
    module, states = model(), torch.randn(3, WIDTH, generator=seeded(1))
    doubled = {name: 2 * parameter for name, parameter in module.named_parameters()}
    expected = torch.func.functional_call(module, doubled, states)
    with onednn_linears(module):
        module(states)
        assert torch.equal(torch.func.functional_call(module, doubled, states), expected)


def hooked():
    module = model()
    accelerate.hooks.add_hook_to_module(module[0], accelerate.hooks.ModelHook())
    return module


def unhooked():
    module = hooked()
    accelerate.hooks.remove_hook_from_module(module[0])
    assert "forward" in vars(module[0])
    return module


def compiled():
    module = model()
    module[1].compile()
    return module


class Quantised(nn.Linear):
    def forward(self, hidden_states):
        return super().forward(hidden_states.round())


class OddTensor(torch.Tensor):
    """As quantised weights are."""


def odd_weights():
    module = model()
    for part in (module[0], module[2]):
        part.weight = nn.Parameter(part.weight.detach().as_subclass(OddTensor))
    return module


def pruned():
    module = model()
    prune.l1_unstructured(module[0], "weight", 0.5)
    return module


@pytest.mark.parametrize(
    "make, expected",
    [
        (pruned, ["2"]),
        (hooked, ["0"]),
        (unhooked, ["0", "2"]),
        (odd_weights, []),
        (compiled, []),
        (lambda: nn.Sequential(Quantised(WIDTH, WIDTH)), []),
        (lambda: model().half(), []),
        (lambda: model().to("meta"), []),
    ],
)
def test_models_out_of_the_ordinary_stay_as_they_are(make, expected):
    module = make()
    with onednn_linears(module):
        assert replaced(module) == expected


def test_autocast_keeps_its_own_dtypes():
    module = model()
    with torch.autocast("cpu", torch.bfloat16), onednn_linears(module):
        assert replaced(module) == []


def test_gradients_inside_are_those_outside():
    module, states = model(), torch.randn(3, WIDTH, generator=seeded(1))

    def backward():
        module.zero_grad()
        (module(states).sum() + apply_activated(module[0], states, nn.functional.silu).sum()).backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    expected = backward()
    with onednn_linears(module):
        backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert relative_error(parameter.grad, gradient) < 1e-5


def test_it_stays_out_where_torch_is_told_to_do_without_onednn():
    module = model()
    with torch.backends.mkldnn.flags(enabled=False), onednn_linears(module):
        assert replaced(module) == []


def test_pipelines_use_it_while_they_generate():
    pipe, seen = tiny_pipeline(), []

    def look(pipe, step, done, tensors):
        seen.append(len(replaced(pipe.transformer)))
        return {}

    pipe(class_labels=[0], callback_on_step_end=look, num_inference_steps=2, num_diffusion_steps=2)
    linears = [part for part in pipe.transformer.modules() if type(part) is nn.Linear]
    assert seen == [len(linears)] * 2
    assert replaced(pipe.transformer) == []


# Page faults of 16 MB that are taken and given back ten times, before and after a model ran by oneDNN.
FAULTS = """
import resource
import torch
from mar_hf.onednn import onednn_linears

def faults():
    for number in range(11):
        if number == 1:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffers = [torch.ones(600_000) for _ in range(7)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
with onednn_linears(torch.nn.Linear(512, 512)):
    print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is used on x86 only")
def test_buffers_of_one_step_serve_the_next():
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_P"))}
    command = [sys.executable, "-c", FAULTS]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=ours).stdout
    before, after = map(int, output.split())
    assert after < before / 3
