"""Each layer against its torch.nn twin: outputs, both gradients, statistics, eval mode."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, randint, randn

import layers

sizes = st.integers(1, 7)
seeds = st.integers(0, 2**32 - 1)


class Flatten(nn.Module):
    """FlattenConsecutive(n) in torch.nn's own Unflatten and Flatten."""

    def __init__(self, n=2):
        super().__init__()
        self.n = n

    def forward(self, x):
        x = nn.Flatten(2)(nn.Unflatten(1, (-1, self.n))(x))
        return x.squeeze(1) if x.shape[1] == 1 else x


class Norm(nn.BatchNorm1d):
    """torch.nn has the channels of three dimensions in the middle."""

    def forward(self, x):
        if x.dim() == 2:
            return super().forward(x)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def same_gradients(ours, twin):
    for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
        mine.grad = None


LAYERS = {  # for sizes B, T, C, n: our layer, its twin, and an input
    "Embed": lambda B, T, C, n: (layers.Embedding(n, C), nn.Embedding(n, C), randint(n, (B, T))),
    "Linear": lambda B, T, C, n: (layers.Linear(C, n), nn.Linear(C, n), randn(B, T, C)),
    "no bias": lambda B, T, C, n: (layers.Linear(C, n, False), nn.Linear(C, n, False), randn(B, C)),
    "Flatten": lambda B, T, C, n: (layers.FlattenConsecutive(n), Flatten(n), randn(B, T * n, C)),
    "Tanh": lambda B, T, C, n: (layers.Tanh(), nn.Tanh(), randn(B, T, C)),
    "Norm": lambda B, T, C, n: (layers.BatchNorm1d(C), Norm(C), randn(B + 1, C) * 3 + 1),
    "of three": lambda B, T, C, n: (layers.BatchNorm1d(C), Norm(C), randn(B, T + 1, C) * 3 + 1),
    "mean": lambda B, T, C, n: (layers.BatchNorm1d(C, 0.1, None), Norm(C, 0.1, None), randn(9, C)),
}


@pytest.mark.parametrize("kind", LAYERS)
@given(sizes, sizes, sizes, sizes, seeds)
def test_a_layer_is_its_twin(kind, B, T, C, n, seed):
    """From autograd and from backward(), also with statistics that have moved."""
    torch.manual_seed(seed)
    ours, twin, x = LAYERS[kind](B, T, C, n)
    for parameter in ours.double().parameters():
        nn.init.normal_(parameter)
    twin.double().load_state_dict(ours.state_dict())
    x = x.double() if x.is_floating_point() else x
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        twin.zero_grad()
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
        y, expected = ours(inputs[0]), twin(inputs[1])
        torch.testing.assert_close(y, expected)
        grad_out = torch.randn_like(expected)
        y.backward(grad_out)
        expected.backward(grad_out)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(ours.state_dict(), twin.state_dict())
        same_gradients(ours, twin)
        ours.load_state_dict(before)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), expected)
            torch.testing.assert_close(ours.backward(grad_out), inputs[1].grad)
        torch.testing.assert_close(ours.state_dict(), twin.state_dict())
        same_gradients(ours, twin)
    torch.testing.assert_close(ours.eval()(x), twin.eval()(x))


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), sizes, seeds)
def test_batch_norm_weights_stand_for_equal_rows(counts, C, seed):
    torch.manual_seed(seed)
    short, long, n = layers.BatchNorm1d(C).double(), nn.BatchNorm1d(C).double(), sum(counts)
    nn.init.normal_(short.weight)
    long.load_state_dict(short.state_dict())
    x, repeats = randn(len(counts), C).double().requires_grad_(), torch.tensor(counts)
    expected = long(x.repeat_interleave(repeats, 0))
    grad_out = torch.randn_like(expected)
    expected.backward(grad_out)
    with torch.no_grad():
        y = short(x, repeats.double() / n, n)
        torch.testing.assert_close(y.repeat_interleave(repeats, 0), expected)
        sums = torch.stack([part.sum(0) for part in grad_out.split(counts)])
        torch.testing.assert_close(short.backward(sums), x.grad)
    same_gradients(short, long)
    torch.testing.assert_close(short.state_dict(), long.state_dict())


def test_batch_norm_can_leave_its_statistics():
    layer, x = layers.BatchNorm1d(3), randn(5, 3)
    layer.track_running_stats = False
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x))
    torch.testing.assert_close(layer.state_dict(), nn.BatchNorm1d(3).state_dict())


@given(sizes, sizes, seeds)
def test_cross_entropy_is_its_twin(B, V, seed):
    torch.manual_seed(seed)
    logits, targets, layer = randn(B, V).double() * 9, randint(V, (B,)), layers.CrossEntropyLoss()
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    loss, expected = layer(inputs[0], targets), nn.CrossEntropyLoss()(inputs[1], targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(logits, targets), expected)
        torch.testing.assert_close(layer.backward(), inputs[1].grad)


@given(st.sampled_from([0.05, 0.3, 0.5, 0.9]), st.sampled_from([(3,), (2, 3)]), seeds)
def test_dropout(p, batch, seed):
    """Whole channels are 0, as many as p says, the others divided by 1 - p; not in eval mode."""
    torch.manual_seed(seed)
    layer, x = layers.Dropout(p), randn(*batch, 2000) + 9
    with torch.no_grad():
        y = layer(x)
        kept = y[(0,) * len(batch)] != 0
        torch.testing.assert_close(y, x * kept / (1 - p))
        share, deviation = kept.float().mean().item(), (p * (1 - p) / 2000) ** 0.5
        assert share == pytest.approx(1 - p, abs=5 * deviation)
        torch.testing.assert_close(layer.backward(x), x * kept / (1 - p))
        assert not torch.equal(layer(x), y)
    assert layer.eval()(x) is x


def test_backward_is_that_of_the_last_forward_or_fails():
    layer, x = layers.Linear(3, 2), randn(4, 3)
    with torch.no_grad():
        layer(x)
    for last in layer, layer.eval():
        last(x)  # under autograd, and in eval mode
        with pytest.raises(TypeError):
            layer.backward(torch.ones(4, 2))


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
