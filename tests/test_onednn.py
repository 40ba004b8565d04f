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
from mar_hf import onednn
from mar_hf.onednn import TYPICAL_ROWS, OneDNNLinear, by_onednn, cpu_maker, winning_rows
from tiny_pipelines import tiny_pipeline


WIDTH = 512


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """oneDNN wins for layers of any size, whatever processor the tests run on."""
    monkeypatch.setattr("mar_hf.onednn.winning_rows", lambda *_: range(1, sys.maxsize))


ACTIVATIONS = [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.GELU(approximate="tanh")]


def model():
    return randomise(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH, bias=False)))


class Block(nn.Module):
    """As the blocks of our models say which layer their activation follows."""

    activated_linear = "first"

    def __init__(self, activation):
        super().__init__()
        self.first = randomise(nn.Linear(WIDTH, 2 * WIDTH))
        self.activation = activation

    def forward(self, states):
        return self.activation(self.first(states))


def replaced(module):
    return [name for name, part in by_onednn(module).named_modules() if isinstance(part, OneDNNLinear)]


@torch.no_grad()
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1,), (3, 4), (TYPICAL_ROWS,), (2, TYPICAL_ROWS), (0,)])
def test_the_numbers_are_the_same(shape, dtype, limit):
    module, states = model().to(dtype), torch.randn(*shape, WIDTH, generator=seeded(1)).to(dtype)
    expected, view = module(states), by_onednn(module)
    found = view(states), view(states)
    assert expected.numel() == 0 or all(relative_error(again.float(), expected.float()) < limit for again in found)
    assert found[0].shape == expected.shape and found[0].dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("rows", [1, 2 * TYPICAL_ROWS])
def test_activations_are_the_same(rows, activation):
    block, states = Block(activation), torch.randn(rows, WIDTH, generator=seeded(1))
    expected, view = block(states), by_onednn(block)
    assert isinstance(view.first, OneDNNLinear)
    assert relative_error(view(states), expected) < 1e-5
    fused = isinstance(view.activation, nn.Identity)
    assert fused == (repr(activation) in ("GELU(approximate='none')", "SiLU()"))


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_what_hooks_see_has_no_activation(activation):
    block, states, seen = Block(activation), torch.randn(3, WIDTH, generator=seeded(1)), []
    expected = [block.first(states), block(states)]
    for module in (block.first, block.activation):
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        assert relative_error(by_onednn(block)(states), expected[1]) < 1e-5
        handle.remove()
    assert len(seen) == 2
    assert all(relative_error(one, other) < 1e-5 for one, other in zip(seen, expected, strict=True))


@torch.no_grad()
def test_a_view_shares_the_weights_and_changes_nothing():
    module, states = model(), torch.randn(3, WIDTH, generator=seeded(1))
    before = [set(vars(part)) for part in module.modules()], copy.copy(vars(module[0]))
    view = by_onednn(module)
    first = view(states)
    assert ([set(vars(part)) for part in module.modules()], vars(module[0])) == before
    assert view[0].weight is module[0].weight and type(module[0]) is nn.Linear
    for parameter in module.parameters():
        parameter.data.mul_(2)  # as averaged weights are set, past torch's count of changes
    expected = module(states)
    assert relative_error(by_onednn(module)(states), expected) < 1e-5
    assert relative_error(expected, first) > 0.1


@torch.no_grad()
def test_a_module_that_stands_twice_stands_twice_in_the_view():
    layer = model()[0]
    module = nn.ModuleDict({"one": layer, "other": layer})
    view = by_onednn(module)
    assert view["one"] is view["other"] and isinstance(view["one"], OneDNNLinear)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_view_are_models_of_their_own(copied):
    module, states = model(), torch.randn(3, WIDTH, generator=seeded(1))
    expected = module(states)
    another = copied(by_onednn(module))
    assert relative_error(another(states), expected) < 1e-5
    for parameter in another.parameters():
        parameter.data.zero_()
    assert relative_error(module(states), expected) == 0


@torch.no_grad()
def test_weights_that_are_swapped_for_a_call_are_used():
    module, states = model(), torch.randn(3, WIDTH, generator=seeded(1))
    doubled = {name: 2 * parameter for name, parameter in module.named_parameters()}
    expected, view = torch.func.functional_call(module, doubled, states), by_onednn(module)
    view(states)
    assert torch.equal(torch.func.functional_call(view, doubled, states), expected)
    assert relative_error(view(states), expected) > 0.1


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
        (hooked, []),
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
    assert replaced(module) == expected
    assert expected or by_onednn(module) is module


def test_autocast_keeps_its_own_dtypes():
    with torch.autocast("cpu", torch.bfloat16):
        assert replaced(model()) == []


@torch.no_grad()
def test_layers_that_hooks_have_left_compute_by_onednn():
    module, states = unhooked(), torch.randn(2 * TYPICAL_ROWS, WIDTH, generator=seeded(1))
    view = by_onednn(module)
    assert relative_error(view(states), module(states)) < 1e-5
    assert view[0].packed is not None


def test_gradients_of_a_view_are_those_of_the_model():
    block, states = Block(nn.SiLU()), torch.randn(3, WIDTH, generator=seeded(1))

    def backward(module):
        block.zero_grad()
        module(states).square().sum().backward()
        return [parameter.grad.clone() for parameter in block.parameters()]

    for found, expected in zip(backward(by_onednn(block)), backward(block), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_it_stays_out_where_torch_is_told_to_do_without_onednn():
    with torch.backends.mkldnn.flags(enabled=False):
        assert replaced(model()) == []


@pytest.mark.parametrize(
    "layer, mkl_is_narrow, won, lost",
    [
        # Large ones, such as the head's of MAR-B: many rows are torch's only where MKL uses whole vectors.
        ((1024, 1024), True, [2, 8, 128, 129, 2560, 10**6], [0, 1]),
        ((1024, 1024), False, [4, 8, 64], [0, 1, 2, 3, 65, 2560, 10**6]),
        ((768, 768), True, [2, 129], [0, 1]),
        ((768, 768), False, [], [0, 1, 2, 8, 64, 10**6]),
        # The demo's.
        ((192, 768), True, [29, 6912], [0, 1, 2, 28]),
        ((192, 768), False, [], [0, 1, 2, 64, 72, 10**6]),
        ((0, 5), True, [], [0, 1, 10**6]),
        ((0, 5), False, [], [0, 1, 10**6]),
    ],
)
def test_rows_that_win_depend_on_the_layer_and_the_processor(layer, mkl_is_narrow, won, lost):
    rows = winning_rows(*layer, torch.float32, mkl_is_narrow)
    assert [number for number in won + lost if number in rows] == won
    assert bool(rows) == bool(won) or layer[0] == 0


@pytest.mark.parametrize("mkl_is_narrow", [True, False])
def test_in_half_precision_only_tiny_products_lose_on_any_processor(mkl_is_narrow):
    rows = winning_rows(192, 192, torch.bfloat16, mkl_is_narrow)
    assert [number for number in (0, 1, 14, 15, 16, 10**6) if number in rows] == [15, 16, 10**6]
    assert 1 in winning_rows(1024, 1024, torch.bfloat16, mkl_is_narrow)


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="others tell otherwise")
def test_the_processor_says_who_made_it():
    assert len(cpu_maker()) == 12 and cpu_maker().isascii()


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=repr)
def test_rows_that_lose_are_computed_by_torch(monkeypatch, activation):
    monkeypatch.setattr("mar_hf.onednn.winning_rows", lambda *_: range(2, 4))
    block = Block(activation)
    view = by_onednn(block)
    for rows in (0, 1, 4, 64):
        states = torch.randn(rows, WIDTH, generator=seeded(1))
        assert torch.equal(view(states), block(states))
        assert torch.equal(view(states[None]), block(states[None]))
    assert view.first.packed is None  # no memory is taken for a layer that never wins
    states = torch.randn(3, WIDTH, generator=seeded(1))
    assert relative_error(view(states), block(states)) < 1e-5
    assert view.first.packed is not None


def test_layers_that_never_win_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("mar_hf.onednn.winning_rows", lambda inputs, *_: range(2 if inputs == WIDTH else 0))
    assert replaced(model()) == ["0"]
    module = nn.Linear(WIDTH + 1, WIDTH)
    assert by_onednn(module) is module


def test_pipelines_use_it_while_they_generate():
    pipe, views = tiny_pipeline(), []
    # Hooks are shared with the view, and are given the module that runs.
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: views.append(module))
    pipe(class_labels=[0], num_inference_steps=2, num_diffusion_steps=2)
    linears = [name for name, part in pipe.transformer.named_modules() if type(part) is nn.Linear]
    for view in views:
        fast = {name: part for name, part in view.named_modules() if isinstance(part, OneDNNLinear)}
        assert list(fast) == linears
        assert any(part.packed is not None for part in fast.values())
    fused = {type(part) for part in view.modules() if isinstance(getattr(part, "activation", None), nn.Identity)}
    assert {part.__name__ for part in fused} == {"BackboneMLP", "ModulatedBlock"}


# Page faults of 16 MB that are taken and given back ten times, before and after a model ran by oneDNN.
FAULTS = """
import resource, runpy, sys
import torch
by_onednn = runpy.run_path(sys.argv[1])["by_onednn"]

def faults():
    for number in range(11):
        if number == 1:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffers = [torch.ones(600_000) for _ in range(7)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
view = by_onednn(torch.nn.Linear(512, 512))
print(first, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is used on x86 only")
def test_buffers_of_one_step_serve_the_next():
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_P"))}
    command = [sys.executable, "-c", FAULTS, onednn.__file__]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=ours).stdout
    before, after = map(int, output.split())
    assert after < before / 3
