"""Each layer against its torch.nn twin: outputs, both gradients, statistics, eval mode."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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


def check_against(twin, ours, x):
    """Same output, statistics and gradients as the twin's, from autograd and from backward()."""
    ours, twin = ours.double(), twin.double()
    ours.zero_grad()
    twin.zero_grad()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    twin.load_state_dict(before)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    y, expected = ours(inputs[0]), twin(inputs[1])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours.state_dict(), twin.state_dict())
    grad_out = torch.randn_like(expected)
    y.backward(grad_out)
    expected.backward(grad_out)
    gradients = [parameter.grad for parameter in twin.parameters()]
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close([parameter.grad for parameter in ours.parameters()], gradients)
    ours.load_state_dict(before)
    ours.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(ours.backward(grad_out), inputs[1].grad)
    torch.testing.assert_close([parameter.grad for parameter in ours.parameters()], gradients)
    torch.testing.assert_close(ours.state_dict(), twin.state_dict())
    torch.testing.assert_close(ours.eval()(x), twin.eval()(x))
    ours.train()
    twin.train()


@given(sizes, sizes, st.lists(sizes, max_size=3), seeds)
def test_embedding(n, dim, shape, seed):
    torch.manual_seed(seed)
    check_against(nn.Embedding(n, dim), layers.Embedding(n, dim), torch.randint(n, shape))


@given(sizes, sizes, sizes, sizes, st.booleans(), seeds)
def test_linear(B, T, n_in, n_out, bias, seed):
    torch.manual_seed(seed)
    for shape in (B, n_in), (B, T, n_in):
        ours = layers.Linear(n_in, n_out, bias)
        check_against(nn.Linear(n_in, n_out, bias), ours, torch.randn(shape).double())


@given(sizes, sizes, sizes, seeds)
def test_tanh(B, T, C, seed):
    torch.manual_seed(seed)
    check_against(nn.Tanh(), layers.Tanh(), torch.randn(B, T, C).double())


@given(sizes, sizes, sizes, st.integers(2, 4), seeds)
def test_flatten_consecutive(B, groups, C, n, seed):
    torch.manual_seed(seed)
    x = torch.randn(B, groups * n, C).double()
    check_against(Flatten(n), layers.FlattenConsecutive(n), x)


@given(
    st.integers(2, 7),
    sizes,
    sizes,
    st.sampled_from([0.0, 0.1, 0.5, 1.0, None]),
    st.sampled_from([1e-5, 1e-2]),
    seeds,
)
def test_batch_norm(B, T, C, momentum, eps, seed):
    torch.manual_seed(seed)
    ours, twin = (norm(C, eps, momentum=momentum) for norm in (layers.BatchNorm1d, Norm))
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    for shape in (B, C), (B, T, C), (B, T, C):  # and with statistics that have moved
        check_against(twin, ours, torch.randn(shape).double() * 3 + 1)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), sizes, seeds)
def test_batch_norm_weights_stand_for_equal_rows(counts, C, seed):
    torch.manual_seed(seed)
    short, long, n = layers.BatchNorm1d(C).double(), nn.BatchNorm1d(C).double(), sum(counts)
    for parameter in short.parameters():
        nn.init.normal_(parameter)
    long.load_state_dict(short.state_dict())
    x, counts = torch.randn(len(counts), C).double().requires_grad_(), torch.tensor(counts)
    expected = long(x.repeat_interleave(counts, 0))
    grad_out = torch.randn_like(expected)
    expected.backward(grad_out)
    with torch.no_grad():
        y = short(x, counts.double() / n, n)
        torch.testing.assert_close(y.repeat_interleave(counts, 0), expected)
        sums = torch.stack([part.sum(0) for part in grad_out.split(counts.tolist())])
        torch.testing.assert_close(short.backward(sums), x.grad)
    for mine, other in zip(short.parameters(), long.parameters()):
        torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(short.state_dict(), long.state_dict())


def test_batch_norm_can_leave_its_statistics():
    layer, x = layers.BatchNorm1d(3), torch.randn(5, 3)
    layer.track_running_stats = False
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x))
    torch.testing.assert_close(layer.state_dict(), nn.BatchNorm1d(3).state_dict())


@given(sizes, sizes, seeds)
def test_cross_entropy(B, V, seed):
    torch.manual_seed(seed)
    logits, targets = torch.randn(B, V).double() * 9, torch.randint(V, (B,))
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    layer, twin = layers.CrossEntropyLoss(), nn.CrossEntropyLoss()
    loss, expected = layer(inputs[0], targets), twin(inputs[1], targets)
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
    layer, x = layers.Dropout(p), torch.randn(*batch, 2000) + 9
    with torch.no_grad():
        y = layer(x)
        kept = y[(0,) * len(batch)] != 0
        torch.testing.assert_close(y, x * kept / (1 - p))
        share, deviation = kept.float().mean().item(), (p * (1 - p) / 2000) ** 0.5
        assert share == pytest.approx(1 - p, abs=5 * deviation)
        grad_out = torch.randn_like(x)
        torch.testing.assert_close(layer.backward(grad_out), grad_out * kept / (1 - p))
        assert not torch.equal(layer(x), y)
    assert layer.eval()(x) is x


def test_backward_is_that_of_the_last_forward_or_fails():
    layer, x = layers.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad():
        layer(x)
        layer.backward(torch.ones(4, 2))
    for last in layer, layer.eval():
        last(x)  # under autograd, and in eval mode
        with pytest.raises(TypeError):
            layer.backward(torch.ones(4, 2))


@pytest.mark.parametrize(
    "layer, shape, words",
    [
        (layers.FlattenConsecutive(2), (4, 3, 3), "3 positions"),
        (layers.FlattenConsecutive(2), (4, 0, 3), "0 positions"),
        (layers.BatchNorm1d(3), (1, 3), "one value per channel"),
        (layers.BatchNorm1d(3), (1, 1, 3), "one value per channel"),
        (layers.BatchNorm1d(3), (4, 2), "expected 3 channels"),
        (layers.BatchNorm1d(3), (4,), "expected 3 channels"),
    ],
)
def test_what_a_layer_refuses(layer, shape, words):
    with pytest.raises(ValueError, match=words):
        layer(torch.randn(shape))
