"""Each layer against its torch.nn twin: forward, both gradients, running statistics, eval mode."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import layers

sizes = st.integers(1, 7)
seeds = st.integers(0, 2**32 - 1)


def check_against(ours, twin, x):
    """Same output and gradients as the twin's, from autograd and from backward(); x is float64."""
    ours, twin = ours.double(), twin.double()
    ours.zero_grad()
    twin.zero_grad()
    twin.load_state_dict(ours.state_dict())
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = twin(x2)
    g = torch.randn_like(expected)
    expected.backward(g)

    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    y = ours(x1)
    torch.testing.assert_close(y, expected)
    y.backward(g)
    torch.testing.assert_close(x1.grad, x2.grad)
    by_autograd = [parameter.grad for parameter in ours.parameters()]
    torch.testing.assert_close(by_autograd, [parameter.grad for parameter in twin.parameters()])

    ours.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(ours.backward(g), x2.grad)
    torch.testing.assert_close([parameter.grad for parameter in ours.parameters()], by_autograd)
    torch.testing.assert_close(ours.state_dict(), twin.state_dict())


@given(sizes, sizes, st.lists(sizes, max_size=3), seeds)
def test_embedding(n, dim, shape, seed):
    torch.manual_seed(seed)
    ours, twin = layers.Embedding(n, dim), nn.Embedding(n, dim)
    twin.load_state_dict(ours.state_dict())
    index = torch.randint(n, shape)
    y, expected = ours(index), twin(index)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(expected)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(ours.weight.grad, twin.weight.grad)
    with torch.no_grad():
        ours(index), ours.backward(g)
    torch.testing.assert_close(ours.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("index", [-1, 3])
def test_embedding_refuses_an_index_outside(index):
    with pytest.raises(IndexError):
        layers.Embedding(3, 2)(torch.tensor([index]))


@given(sizes, sizes, sizes, sizes, st.booleans(), seeds)
def test_linear(B, T, n_in, n_out, bias, seed):
    torch.manual_seed(seed)
    for shape in (B, n_in), (B, T, n_in):
        check_against(
            layers.Linear(n_in, n_out, bias),
            nn.Linear(n_in, n_out, bias),
            torch.randn(shape).double(),
        )


def test_linear_keeps_the_variance():
    torch.manual_seed(0)
    y = layers.Linear(500, 500, bias=False)(torch.randn(500, 500))
    assert y.var().item() == pytest.approx(1, abs=0.02)


def test_backward_is_that_of_the_last_forward_or_fails():
    layer, x = layers.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad():
        layer(x), layer.backward(torch.ones(4, 2))
    for last in layer, layer.eval():
        last(x)  # under autograd, and in eval mode
        with pytest.raises(TypeError):
            layer.backward(torch.ones(4, 2))


@given(sizes, sizes, sizes, seeds)
def test_tanh(B, T, C, seed):
    torch.manual_seed(seed)
    check_against(layers.Tanh(), nn.Tanh(), torch.randn(B, T, C).double())


@given(sizes, sizes, sizes, st.integers(2, 4), seeds)
def test_flatten_consecutive(B, groups, C, n, seed):
    torch.manual_seed(seed)
    x = torch.randn(B, groups * n, C)
    layer = layers.FlattenConsecutive(n)
    expected = torch.stack(
        [torch.cat([x[:, group * n + i] for i in range(n)], 1) for group in range(groups)], 1
    )
    if groups == 1:
        expected = expected[:, 0]
    with torch.no_grad():
        y = layer(x)
        assert y.shape == ((B, C * n) if groups == 1 else (B, groups, C * n))
        assert torch.equal(y, expected)
        assert torch.equal(layer.backward(y), x)


@pytest.mark.parametrize("T", [1, 3, 5])
def test_flatten_consecutive_refuses_a_rest(T):
    with pytest.raises(ValueError, match=f"{T} positions"):
        layers.FlattenConsecutive(2)(torch.randn(4, T, 3))


def random_norm(C, **kwargs):
    ours = layers.BatchNorm1d(C, **kwargs)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    return ours


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
    kwargs = dict(eps=eps, momentum=momentum)
    check_against(
        random_norm(C, **kwargs), nn.BatchNorm1d(C, **kwargs), torch.randn(B, C).double() * 3 + 1
    )

    # torch.nn has the channels of three dimensions in the middle.
    class Twin(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    ours, twin = random_norm(C, **kwargs), Twin(C, **kwargs)
    for _ in range(2):  # the second time with running statistics that have moved
        check_against(ours, twin, torch.randn(B, T, C).double() * 3 + 1)
    x = torch.randn(B, T, C).double()
    torch.testing.assert_close(ours.eval()(x), twin.eval()(x))
    torch.testing.assert_close(ours(x[:, 0]), twin(x[:, :1])[:, 0])


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), sizes, seeds)
def test_batch_norm_weights_stand_for_equal_rows(counts, C, seed):
    torch.manual_seed(seed)
    counts = torch.tensor(counts)
    short, long = random_norm(C).double(), nn.BatchNorm1d(C).double()
    long.load_state_dict(short.state_dict())
    x = torch.randn(len(counts), C).double()
    repeated = x.repeat_interleave(counts, 0).requires_grad_()
    expected = long(repeated)
    g = torch.randn_like(expected)
    expected.backward(g)

    def gather(rows):  # the sum over the copies of each row
        return torch.stack([part.sum(0) for part in rows.split(counts.tolist())])

    with torch.no_grad():
        y = short(x, counts.double() / counts.sum(), len(repeated))
        torch.testing.assert_close(y.repeat_interleave(counts, 0), expected)
        torch.testing.assert_close(short.backward(gather(g)), gather(repeated.grad))
    torch.testing.assert_close(short.weight.grad, long.weight.grad)
    torch.testing.assert_close(short.bias.grad, long.bias.grad)
    torch.testing.assert_close(short.state_dict(), long.state_dict())


def test_batch_norm_can_leave_its_statistics():
    layer = random_norm(3)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(5, 3)
    tracked = layer(x)
    layer.load_state_dict(before)
    layer.track_running_stats = False
    torch.testing.assert_close(layer(x), tracked)
    torch.testing.assert_close(layer.state_dict(), before)


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 3)])
def test_batch_norm_refuses_one_value_a_channel(shape):
    layer = layers.BatchNorm1d(3)
    with pytest.raises(ValueError, match="one value a channel"):
        layer(torch.randn(shape))
    layer.eval()(torch.randn(shape))


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 5, 2), (2, 2, 2, 3)])
def test_batch_norm_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="expected 3 channels"):
        layers.BatchNorm1d(3)(torch.randn(shape))


def test_batch_norm_has_no_weights_for_three_dimensions():
    with pytest.raises(ValueError, match="expected 3 channels"):
        layers.BatchNorm1d(3)(torch.randn(2, 2, 3), torch.ones(2) / 2, 4)


@given(st.sampled_from([0.05, 0.3, 0.5, 0.9]), st.sampled_from([(3,), (2, 3)]), seeds)
def test_dropout(p, batch, seed):
    """Whole channels are 0, as many as p says, the others divided by 1 - p; not in eval mode."""
    torch.manual_seed(seed)
    layer, x = layers.Dropout(p), torch.randn(*batch, 2000) + 9
    with torch.no_grad():
        y = layer(x)
        kept = y[(0,) * len(batch)] != 0
        torch.testing.assert_close(y, x * kept / (1 - p))
        assert kept.float().mean().item() == pytest.approx(
            1 - p, abs=5 * (p * (1 - p) / 2000) ** 0.5
        )
        g = torch.randn_like(x)
        torch.testing.assert_close(layer.backward(g), g * kept / (1 - p))
        assert not torch.equal(layer(x), y)
    assert layer.eval()(x) is x
