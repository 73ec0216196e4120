"""Each layer against its torch.nn twin: outputs, both gradients, statistics, eval mode."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, randint, randn
from torch.testing import assert_close

import layers

sizes = st.integers(1, 7)
seeds = st.integers(0, 2**32 - 1)


class Norm(nn.BatchNorm1d):
    """torch.nn has the channels of three dimensions in the middle."""

    def forward(self, x):
        y = super().forward(x.movedim(-1, 1))
        return y.movedim(1, -1)


def pairs(n=2):
    return nn.Sequential(nn.Unflatten(1, (-1, n)), nn.Flatten(2))


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


def same_gradients(ours, twin):
    for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad)
        mine.grad = None


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
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        twin.zero_grad()
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
        y, expected = ours(inputs[0]), twin(inputs[1])
        assert_close(y, expected)
        grad_out = torch.randn_like(expected)
        y.backward(grad_out)
        expected.backward(grad_out)
        assert_close(inputs[0].grad, inputs[1].grad)
        assert_close(ours.state_dict(), twin.state_dict())
        same_gradients(ours, twin)
        ours.load_state_dict(before)
        with torch.no_grad():
            assert_close(ours(x), expected)
            assert_close(ours.backward(grad_out), inputs[1].grad)
        assert_close(ours.state_dict(), twin.state_dict())
        same_gradients(ours, twin)
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
    expected.backward(grad_out)
    with torch.no_grad():
        assert_close(short(x, repeats / n, n).repeat_interleave(repeats, 0), expected)
        sums = torch.stack([part.sum(0) for part in grad_out.split(counts)])
        assert_close(short.backward(sums), x.grad)
    same_gradients(short, long)
    assert_close(short.state_dict(), long.state_dict())


def test_batch_norm_can_leave_its_statistics():
    layer, x = layers.BatchNorm1d(3), randn(5, 3)
    layer.track_running_stats = False
    assert_close(layer(x), nn.BatchNorm1d(3)(x))
    assert_close(layer.state_dict(), nn.BatchNorm1d(3).state_dict())


@given(sizes, sizes, seeds)
def test_cross_entropy_is_its_twin(B, V, seed):
    torch.manual_seed(seed)
    logits, targets, layer = randn(B, V).double() * 9, randint(V, (B,)), layers.CrossEntropyLoss()
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    losses = layer(inputs[0], targets), nn.CrossEntropyLoss()(inputs[1], targets)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, inputs)]
    with torch.no_grad():
        by_hand = layer(logits, targets)
        for ours in (losses[0], gradients[0]), (by_hand, layer.backward()):
            assert_close(ours, (losses[1], gradients[1]))


@given(st.sampled_from([0.05, 0.3, 0.5, 0.9]), st.sampled_from([(3,), (2, 3)]), seeds)
def test_dropout(p, batch, seed):
    """Whole channels are 0, as many as p says, the others divided by 1 - p; not in eval mode."""
    torch.manual_seed(seed)
    layer, x = layers.Dropout(p), randn(*batch, 2000) + 9
    with torch.no_grad():
        y = layer(x)
        kept = y[(0,) * len(batch)] != 0
        assert_close(y, x * kept / (1 - p))
        share, deviation = kept.float().mean().item(), (p * (1 - p) / 2000) ** 0.5
        assert share == pytest.approx(1 - p, abs=5 * deviation)
        assert_close(layer.backward(x), x * kept / (1 - p))
        assert not torch.equal(layer(x), y)
    assert layer.eval()(x) is x


def test_what_the_layers_refuse():
    flatten, norm = layers.FlattenConsecutive(2), layers.BatchNorm1d(3)
    for layer, shape, words in (
        (flatten, (4, 3, 3), "3 positions"),
        (flatten, (4, 0, 3), "0 positions"),
        (norm, (1, 1, 3), "one value per channel"),
        (norm, (4, 2), "expected 3 channels"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(randn(shape))
    linear = layers.Linear(3, 3)
    with torch.no_grad():
        linear(randn(4, 3))
    for last in linear, linear.eval():
        last(randn(4, 3))  # under autograd, and in eval mode: no backward() of what was before
        with pytest.raises(TypeError):
            linear.backward(randn(4, 3))
