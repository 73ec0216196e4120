"""Each layer against its torch.nn twin: outputs, both gradients, statistics, eval mode."""

import copy

import pytest
import torch
from helpers import Norm, pairs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, randint, randn
from torch.testing import assert_close

import layers

sizes = st.integers(1, 7)
seeds = st.integers(0, 2**32 - 1)


LAYERS = {  # for sizes B, T, C, n: our layer, its twin, and an input
    "Embed": lambda B, T, C, n: (layers.Embedding(n, C), nn.Embedding(n, C), randint(n, (B, T))),
    "Linear": lambda B, T, C, n: (layers.Linear(C, n), nn.Linear(C, n), randn(B, T, C)),
    "no bias": lambda B, T, C, n: (layers.Linear(C, n, False), nn.Linear(C, n, False), randn(B, C)),
    "Flatten": lambda B, T, C, n: (layers.FlattenConsecutive(n), pairs(n), randn(B, 2 * n, C)),
    "to one": lambda B, T, C, n: (layers.FlattenConsecutive(n), nn.Flatten(), randn(B, n, C)),
    "Tanh": lambda B, T, C, n: (layers.Tanh(), nn.Tanh(), randn(B, T, C)),
    "Norm": lambda B, T, C, n: (layers.BatchNorm1d(C), Norm(C), randn(B + 1, C) * 3 + 1),
    "of three": lambda B, T, C, n: (layers.BatchNorm1d(C), Norm(C), randn(B, T + 1, C) * 3 + 1),
    "mean": lambda B, T, C, n: (layers.BatchNorm1d(C, 0.1, None), Norm(C, 0.1, None), randn(9, C)),
}


@pytest.mark.parametrize("kind", LAYERS)
@given(sizes, sizes, sizes, sizes, seeds)
def test_a_layer_is_its_twin(kind, B, T, C, n, seed):
    """From autograd and from backward(), also with statistics that have moved."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    ours, twin, x = LAYERS[kind](B, T, C, n)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    twin.load_state_dict(ours.state_dict())
    leaves = [x.requires_grad_()] if x.is_floating_point() else []
    for _ in range(2):
        by_hand, expected = copy.deepcopy(ours), twin(x)
        grad_out = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, [*twin.parameters(), *leaves], grad_out)
        y = ours(x)
        assert_close(y, expected)
        assert_close(torch.autograd.grad(y, [*ours.parameters(), *leaves], grad_out), gradients)
        with torch.no_grad():
            assert_close(by_hand(x), expected)
            grad_x = by_hand.backward(grad_out)
        found = [*(parameter.grad for parameter in by_hand.parameters()), *[grad_x][: len(leaves)]]
        assert_close(found, list(gradients))
        for state in ours.state_dict(), by_hand.state_dict():
            assert_close(state, twin.state_dict())
    assert_close(ours.eval()(x), twin.eval()(x))


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), sizes, seeds)
def test_batch_norm_weights_stand_for_equal_rows(counts, C, seed):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    short, long, n = layers.BatchNorm1d(C), nn.BatchNorm1d(C), sum(counts)
    nn.init.normal_(short.weight)
    long.load_state_dict(short.state_dict())
    x, repeats = randn(len(counts), C).requires_grad_(), torch.tensor(counts)
    expected = long(x.repeat_interleave(repeats, 0))
    grad_out = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [*long.parameters(), x], grad_out)
    with torch.no_grad():
        assert_close(short(x, repeats / n, n).repeat_interleave(repeats, 0), expected)
        grad_x = short.backward(torch.stack([rows.sum(0) for rows in grad_out.split(counts)]))
    assert_close((short.weight.grad, short.bias.grad, grad_x), gradients)
    assert_close(short.state_dict(), long.state_dict())


@given(sizes, sizes, seeds)
def test_cross_entropy_is_its_twin_for_classes_and_their_probabilities(B, V, seed):
    torch.manual_seed(seed)
    logits, layer = randn(B, V).double() * 9, layers.CrossEntropyLoss()
    targets = randint(V, (B,)) if seed % 2 else randn(B, V).double().softmax(1)
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    losses = layer(inputs[0], targets), nn.CrossEntropyLoss()(inputs[1], targets)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, inputs)]
    with torch.no_grad():
        by_hand = layer(logits, targets)
        for ours in (losses[0], gradients[0]), (by_hand, layer.backward()):
            assert_close(ours, (losses[1], gradients[1]))


@given(st.sampled_from([0.05, 0.3, 0.5, 0.9]), seeds)
def test_dropout(p, seed):
    """Whole channels are 0, as many as p says, the others divided by 1 - p; not in eval mode."""
    torch.manual_seed(seed)
    layer, x = layers.Dropout(p), randn(2, 3, 2000) + 9
    with torch.no_grad():
        y = layer(x)
        kept = y[0, 0] != 0
        assert_close(y, x * kept / (1 - p))
        deviation = (p * (1 - p) / 2000) ** 0.5
        assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * deviation)
        assert_close(layer.backward(x), x * kept / (1 - p))
        assert not torch.equal(layer(x), y)
    assert layer.eval()(x) is x
    assert torch.equal(layers.Dropout(1.0)(x), nn.Dropout(1.0)(x))


@pytest.mark.parametrize(
    "layer, shape, words",
    [
        (layers.FlattenConsecutive(2), (4, 3, 3), "3 positions"),
        (layers.BatchNorm1d(3), (1, 1, 3), "one value per channel"),
        (layers.BatchNorm1d(3), (4, 2), "expected 3 channels"),
    ],
)
def test_a_layer_refuses_other_shapes(layer, shape, words):
    with pytest.raises(ValueError, match=words):
        layer(randn(shape))
