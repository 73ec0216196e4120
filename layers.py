"""The arithmetic: each layer forward and backward, and the distinct rows of a minibatch.

Layers are named, called and parametrised as in torch.nn. backward(grad_out) is the gradient by
hand: from grad_out = dL/dy of the last forward(), in training mode and without autograd, it sets
.grad of the layer's parameters and returns dL/dx.
"""

from typing import NamedTuple

import torch
from torch import nn


def save_for_backward(layer, *tensors):
    """Keep in `layer` what its backward() needs: nothing under autograd or in eval mode."""
    needed = layer.training and not torch.is_grad_enabled()
    layer.__dict__["saved"] = tensors if needed else None  # nn.Module's own setattr is slower


def index_select_backward(grad_out, index, n):
    """From grad_out = dL/dx[index], (R, C), dL/dx (n, C): the sum over the uses of each row."""
    return grad_out.new_zeros(n, grad_out.shape[1]).index_add_(0, index, grad_out)


class Embedding(nn.Module):
    """A learned vector per token: (...) int64 -> (..., embedding_dim); Bengio et al., 2003."""

    def __init__(self, num_embeddings, embedding_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_embeddings, embedding_dim))

    def forward(self, tokens):
        save_for_backward(self, tokens)
        return self.weight.index_select(0, tokens.reshape(-1)).view(*tokens.shape, -1)

    def backward(self, grad_out):  # a token picks its row of the weight, wherever it stands
        rows, tokens = grad_out.reshape(-1, self.weight.shape[1]), self.saved[0].reshape(-1)
        self.weight.grad = index_select_backward(rows, tokens, len(self.weight))


class FlattenConsecutive(nn.Module):
    """Join n neighbours, as WaveNet does, arXiv:1609.03499: (B, T, C) -> (B, T/n, n*C), and to
    (B, n*C) when T is n. Raises ValueError when T is not a multiple of n.
    """

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        save_for_backward(self, x.shape)
        B, T, C = x.shape
        if T == 0 or T % self.n:
            raise ValueError(f"{T} positions cannot be joined in groups of {self.n}")
        return x.reshape(B, T * C) if T == self.n else x.reshape(B, T // self.n, self.n * C)

    def backward(self, grad_out):  # the same numbers in another shape
        return grad_out.view(self.saved[0])


class Linear(nn.Module):
    """x @ weight.T + bias: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # Dividing by sqrt(in_features) keeps the variance of the input: Kaiming, arXiv:1502.01852.
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        save_for_backward(self, x)
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def backward(self, grad_out):
        # y[r, o] = sum_i weight[o, i] x[r, i] + bias[o]: the gradient of each factor is grad_out
        # times the other factor, summed over the index that it lacks.
        rows = grad_out.reshape(-1, self.out_features)
        self.weight.grad = rows.T @ self.saved[0].reshape(-1, self.in_features)
        if self.bias is not None:
            self.bias.grad = rows.sum(0)
        return grad_out @ self.weight


class BatchNorm1d(nn.Module):
    """Each channel to mean 0 and variance 1, scaled and shifted: (B, ..., C) -> the same shape;
    arXiv:1502.03167. Running statistics move by `momentum` (None: to the mean of all batches).

    Of (B, C), `weights` (B,) are the shares of n rows that each row stands for, so that equal ones
    are computed once. Raises ValueError for another C, and in training for n < 2.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x, weights=None, n=None):
        if x.shape[-1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got {tuple(x.shape)}")
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return torch.addcmul(self.bias - self.running_mean * scale, x, scale)
        rows = x.reshape(-1, self.num_features)
        if weights is None:
            n, weights = len(rows), x.new_full((len(rows),), 1 / len(rows))
        if n < 2:
            raise ValueError("one value per channel has no variance: train on at least two")
        mean = weights @ rows
        centred = rows - mean
        var = weights @ centred.square()
        rstd = (var + self.eps).rsqrt()
        x_hat = centred * rstd
        save_for_backward(self, x_hat, rstd, weights)
        self.num_batches_tracked.add_(1)
        m = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.detach(), m)
        # The biased variance normalises; the unbiased one estimates that of unseen data.
        self.running_var.lerp_(var.detach() * (n / (n - 1)), m)
        return torch.addcmul(self.bias, x_hat, self.weight).view(x.shape)

    def backward(self, grad_out):
        # x[r] moves y[r] directly, and every y through mean and var, in which row r has weight
        # w[r]: dL/dx[r] = weight * rstd * (g[r] - w[r] * (sum g + x_hat[r] * sum(g * x_hat))).
        # Where no row stands for others w[r] is 1/n, and this is the formula of the paper.
        x_hat, rstd, weights = self.saved
        rows = grad_out.reshape(x_hat.shape)
        self.bias.grad, self.weight.grad = rows.sum(0), (rows * x_hat).sum(0)
        through_all = torch.addcmul(self.bias.grad, x_hat, self.weight.grad)
        direct = torch.addcmul(rows, through_all, weights.unsqueeze(1), value=-1)
        return (direct * (self.weight * rstd)).view(grad_out.shape)


class Tanh(nn.Module):
    """(e^x - e^-x) / (e^x + e^-x), elementwise."""

    def forward(self, x):
        y = torch.tanh(x)
        save_for_backward(self, y)
        return y

    def backward(self, grad_out):  # tanh' = 1 - tanh^2
        (y,) = self.saved
        return torch.addcmul(grad_out, grad_out * y, y, value=-1)


class Dropout(nn.Module):
    """In training, each channel of a batch is 0 with probability p, else / (1 - p): a thinner
    network for each step, arXiv:1207.0580. torch.nn draws for each value.
    """

    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        mask = x.new_empty(x.shape[-1]).bernoulli_(1 - self.p).div_(1 - self.p)
        save_for_backward(self, mask)
        return x * mask

    def backward(self, grad_out):  # y = x * mask
        return grad_out * self.saved[0]


class CrossEntropyLoss(nn.Module):
    """Mean of -log softmax(logits)[target], in nats: logits (B, V), targets (B,) -> ().

    If targets are probabilities (B, V), they weight a sum of this over the classes.
    """

    def forward(self, logits, targets):
        if targets.dim() == 1:
            targets = torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), 1.0)
        log_probs = logits.log_softmax(1)
        save_for_backward(self, log_probs, targets)
        return -(targets * log_probs).sum(1).mean()

    def backward(self):  # dL/dlogits = (softmax - targets) / B, as each row of targets sums to 1
        log_probs, targets = self.saved
        return (log_probs.exp() - targets).div_(len(targets))


# The classes that have the fast way: equal rows computed once, gradients by hand. A layer of your
# own with backward(), that treats each row alone, joins here. Other networks run as net(contexts).
FAST = Embedding, FlattenConsecutive, Linear, BatchNorm1d, Tanh, Dropout


def has_fast_way(net):
    """Whether `net` is a plain stack of such layers, in which pairs follow the embedding."""
    stack = type(net).forward is nn.Sequential.forward and type(net[1]) is FlattenConsecutive
    return stack and all(type(layer) in FAST and getattr(layer, "n", 2) == 2 for layer in net)


class Level(NamedTuple):
    """The R distinct pairs of a level: pair r joins the rows children[2r : 2r + 2] below."""

    children: torch.Tensor  # (2R,) int64
    weights: torch.Tensor  # (R,): the share of the level's n pairs that each stands for
    n: int


def distinct_rows(net, contexts):
    r"""K minibatches (K, B, T) int64 -> for each its Levels, and row_ids (B,) into the last level.

    Without the fast way, for each its contexts. Most of a window is padding, and many names begin
    alike, so few pairs are distinct. "..an" and "..en", with the tokens . a e n as rows 0 1 2 3:

        pairs    ..   an   en     children 0 0  1 3  2 3    weights 2/4 1/4 1/4    n 4
        fours    ..an   ..en      children 0 1  0 2         weights 1/2 1/2        n 2
    """
    if not has_fast_way(net):
        return list(contexts)
    K = len(contexts)
    minibatch = torch.arange(K, device=contexts.device).view(K, 1, 1)
    row_ids, levels, m = contexts, [], len(net[0].weight)  # row_ids are below m
    while row_ids.shape[2] > 1:
        # (minibatch, left, right) as one number in base m, so that unique() sorts by minibatch.
        pairs = (minibatch * m + row_ids[..., 0::2]) * m + row_ids[..., 1::2]
        n = pairs[0].numel()
        pairs, row_ids, counts = torch.unique(pairs, return_inverse=True, return_counts=True)
        sizes = torch.bincount(pairs // m**2, minlength=K)
        row_ids = row_ids - (sizes.cumsum(0) - sizes).view(K, 1, 1)  # from 0 in each minibatch
        children, sizes = torch.stack((pairs // m % m, pairs % m), 1), sizes.tolist()
        parts = zip(children.split(sizes), (counts / n).split(sizes))
        levels.append([Level(rows.flatten(), weights, n) for rows, weights in parts])
        m = max(sizes)
    return list(zip(zip(*levels), row_ids.squeeze(2)))


def forward(net, rows):
    """The logits (B, V) of a minibatch of distinct_rows(): those of net(contexts)."""
    if torch.is_tensor(rows):
        return net(rows)
    levels, row_ids = rows
    x, coming = torch.arange(len(net[0].weight), device=row_ids.device), iter(levels)
    for layer in net:
        if isinstance(layer, FlattenConsecutive):
            level = next(coming)
            x = layer(x.index_select(0, level.children).view(-1, 2, x.shape[1]))
        else:
            x = layer(x, level.weights, level.n) if isinstance(layer, BatchNorm1d) else layer(x)
    return x.index_select(0, row_ids)


def backward(net, rows, logits, grad_out):
    """From grad_out = dL/dlogits (B, V) of the last forward(), set .grad of every parameter."""
    if torch.is_tensor(rows):
        net.zero_grad()
        return logits.backward(grad_out)
    levels, row_ids = rows
    grad_out = index_select_backward(grad_out, row_ids, len(levels[-1].weights))
    for layer in reversed(net):
        grad_out = layer.backward(grad_out)
        if isinstance(layer, FlattenConsecutive):
            *levels, level = levels
            n_below = len(levels[-1].weights) if levels else len(net[0].weight)
            grad_out = index_select_backward(grad_out.flatten(0, 1), level.children, n_below)
