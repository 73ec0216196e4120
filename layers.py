"""The arithmetic: each layer, forward and backward, and the distinct rows of a minibatch.

Names, arguments, parameter shapes and results of the layers are those of torch.nn, except that
BatchNorm1d has the channels last, and Dropout leaves out whole channels. forward() is plain tensor
arithmetic, so autograd can differentiate it. backward(g) is the same gradient worked out by hand,
which takes less time than autograd's walk through every operation: from g = dL/dy of the last
forward(), in training mode and without autograd, it sets .grad of the layer's own parameters and
returns dL/dx. Where several processes train together, sums over the minibatch are sums over all
of them.
"""

from typing import NamedTuple

import torch
from torch import distributed, nn


def save_for_backward(layer, *tensors):
    """Keep in `layer` what its backward() needs: nothing under autograd, or in eval mode."""
    needed = layer.training and not torch.is_grad_enabled()
    layer.__dict__["saved"] = tensors if needed else None  # setattr() takes longer in nn.Module


def index_select_backward(g, index, n):
    """From g = dL/dx[index], (R, C), the gradient of the n rows x, (n, C).

    A row that was taken several times gathers the gradients of all its uses.
    """
    return g.new_zeros(n, g.shape[1]).index_add_(0, index, g)


class Embedding(nn.Module):
    """One learnt vector for each index: (...) int64 -> (..., embedding_dim).

    The distributed representation of Bengio et al., "A Neural Probabilistic Language Model", 2003.
    Raises IndexError for an index outside 0 ... num_embeddings - 1.
    """

    def __init__(self, num_embeddings, embedding_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_embeddings, embedding_dim))

    def forward(self, index):
        save_for_backward(self, index)
        return self.weight.index_select(0, index.reshape(-1)).view(*index.shape, -1)

    def backward(self, g):
        (index,) = self.saved
        n, C = self.weight.shape
        self.weight.grad = index_select_backward(g.reshape(-1, C), index.reshape(-1), n)


class FlattenConsecutive(nn.Module):
    """Join n neighbours: (B, T, C) -> (B, T/n, C*n), and (B, C*n) when T/n is 1.

    Stacked with n = 2 it makes the tree of dilated convolutions of WaveNet, arXiv:1609.03499.
    Raises ValueError when T is not a multiple of n.
    """

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        B, T, C = x.shape
        save_for_backward(self, B, T, C)
        if T == 0 or T % self.n:
            raise ValueError(f"{T} positions cannot be joined in groups of {self.n}")
        return x.reshape(B, C * T) if T == self.n else x.reshape(B, T // self.n, C * self.n)

    def backward(self, g):
        return g.view(self.saved)


class Linear(nn.Module):
    """x @ weight.T + bias: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # Dividing by sqrt(in_features) keeps the variance of what comes in: Kaiming,
        # arXiv:1502.01852.
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        save_for_backward(self, x)
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def backward(self, g):
        # y[r, o] = sum_i weight[o, i] x[r, i] + bias[o], so each factor's gradient is g times the
        # other.
        (x,) = self.saved
        g_rows = g.reshape(-1, self.out_features)
        self.weight.grad = g_rows.T @ x.reshape(-1, self.in_features)
        if self.bias is not None:
            self.bias.grad = g_rows.sum(0)
        return g @ self.weight


class BatchNorm1d(nn.Module):
    """Each channel to mean 0 and variance 1 over the batch, scaled and shifted; arXiv:1502.03167.

    (B, C) or (B, T, C), shape kept; the latter is normalised over B and T together. In training,
    unless track_running_stats is False, the running statistics move towards the batch's by
    `momentum` (None: they are the mean over all batches). In eval mode they are what normalises.

    A row that stands for several equal ones has a weight: with `weights` (B,), which sum to 1, and
    n, the number of rows that they stand for, mean and variance are the weighted ones. Raises
    ValueError for other shapes, and in training for one value a channel.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.track_running_stats = True
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x, weights=None, n=None):
        if x.dim() == 3 and weights is None:
            return self.forward(x.flatten(0, 1)).view(x.shape)
        if x.dim() != 2 or x.shape[1] != self.num_features:
            expected = f"{self.num_features} channels in (B, C) or (B, T, C)"
            raise ValueError(f"expected {expected}, got {tuple(x.shape)}")
        if not self.training:
            scale, shift = self.scale_and_shift()
            return torch.addcmul(shift, x, scale)
        if weights is None:
            n, weights = len(x), x.new_full((len(x),), 1 / len(x))
        if n < 2:
            raise ValueError("one value a channel has no variance: train on at least two")
        if parallel():
            mean, var, centred = moments_over_processes(x, weights)
        else:
            mean = weights @ x
            centred = x - mean
            var = weights @ centred.square()
        rstd = (var + self.eps).rsqrt()
        x_hat = centred * rstd
        save_for_backward(self, x_hat, rstd, weights)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:
                momentum = 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean.detach(), momentum)
            # The biased variance normalises; the unbiased one is the estimate for data not yet
            # seen.
            self.running_var.lerp_(var.detach() * (n / (n - 1)), momentum)
        return torch.addcmul(self.bias, x_hat, self.weight)

    def scale_and_shift(self):
        """What it is in eval mode, (C,) and (C,): x * scale + shift."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def backward(self, g):
        if g.dim() == 3:
            return self.backward(g.flatten(0, 1)).view(g.shape)
        # x[r] moves y[r] directly, and every y through mean and var. With w[r] the weight of row r
        # in both, dL/dx[r] = weight * rstd * (g[r] - w[r] * (sum g + x_hat[r] * sum(g * x_hat))).
        # Where no row stands for others, w[r] is 1/n, and this is the formula of the paper.
        x_hat, rstd, weights = self.saved
        sum_g, sum_gx = all_reduce(torch.stack((g.sum(0), (g * x_hat).sum(0))))
        self.bias.grad, self.weight.grad = sum_g, sum_gx
        through_all = torch.addcmul(sum_g, x_hat, sum_gx)
        direct = torch.addcmul(g, through_all, weights.unsqueeze(1), value=-1)
        return direct * (self.weight * rstd)


class Tanh(nn.Module):
    """(e^x - e^-x) / (e^x + e^-x), value by value."""

    def forward(self, x):
        y = torch.tanh(x)
        save_for_backward(self, y)
        return y

    def backward(self, g):
        (y,) = self.saved
        return torch.addcmul(g, g * y, y, value=-1)  # tanh' = 1 - tanh^2


class Dropout(nn.Module):
    """In training, each channel of (..., C) is 0 with probability p < 1, else divided by 1 - p.

    One draw of channels serves the whole batch: a thinned network for each step, arXiv:1207.0580.
    It regularises as well here as a draw for each value, and C random numbers cost next to nothing.
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

    def backward(self, g):
        (mask,) = self.saved
        return g * mask


# The distinct rows of a minibatch


class Level(NamedTuple):
    """The R distinct pairs of a level: pair r joins the rows children[2r : 2r + 2] below it."""

    children: torch.Tensor  # (2R,) int64
    weights: torch.Tensor  # (R,): the share of the level's pairs that each stands for
    n: int  # the number of the level's pairs in the whole minibatch


def distinct_rows(contexts, vocab_size, batch_size=None):
    r"""K minibatches of contexts (K, B, T) int64 -> K trees that hold each distinct row once.

    Most of a window is padding, and most names begin like others, so few of the B * T/2 pairs of a
    level are distinct, and a row needs to be computed only once. A tree is (levels, ids): a Level
    for each level of the network, and ids (B,), each context's row in the last one. Below the first
    level are the V characters. The two contexts "..an" and "..en", with the characters ". a e n",
    make this tree:

        characters   .    a    e    n        rows 0 1 2 3
                     | \    \  /|  / |
        level 1      ..     an   en          children 0 0  1 3  2 3   weights 2/4 1/4 1/4   n 4
                       \  \/    /
        level 2       ..an  ..en             children 0 1  0 2        weights 1/2 1/2       n 2
                                             ids 0 1

    With batch_size, contexts are this process's part of minibatches of so many.
    """
    K, B, _ = contexts.shape
    minibatch = torch.arange(K, device=contexts.device).view(K, 1, 1)
    ids, rows_below, levels = contexts, vocab_size, []
    while ids.shape[2] > 1:
        # Each (minibatch, left, right) is one number in base rows_below, which no row reaches; so
        # they are sorted by minibatch first. Further down the number is taken apart again.
        pairs = (minibatch * rows_below + ids[..., 0::2]) * rows_below + ids[..., 1::2]
        pairs, ids, counts = torch.unique(pairs, return_inverse=True, return_counts=True)
        sizes = torch.bincount(pairs // rows_below**2, minlength=K)
        ids = ids - (sizes.cumsum(0) - sizes).view(K, 1, 1)  # from 0 on in each minibatch
        children = torch.stack((pairs // rows_below % rows_below, pairs % rows_below), 1).view(-1)
        sizes, n = sizes.tolist(), (batch_size or B) * ids.shape[2]
        children = children.split([2 * size for size in sizes])
        weights = (counts / n).split(sizes)
        levels.append([Level(*level, n) for level in zip(children, weights)])
        rows_below = max(sizes)
    return list(zip(zip(*levels), ids.squeeze(2)))


def forward_distinct(net, tree):
    """The logits (B, vocab_size) of net(contexts), from a tree of distinct_rows()."""
    levels, ids = tree
    embedding, *layers = net
    x, coming = embedding.weight, iter(levels)
    for layer in layers:
        if isinstance(layer, FlattenConsecutive):
            level = next(coming)
            x = layer(x.index_select(0, level.children).view(len(level.weights), 2, -1))
        elif isinstance(layer, BatchNorm1d):
            x = layer(x, level.weights, level.n)
        else:
            x = layer(x)
    return x.index_select(0, ids)


def backward_distinct(net, tree, g):
    """Set .grad of every parameter, from g (B, vocab_size) = dL/dlogits of forward_distinct()."""
    levels, ids = tree
    embedding, *layers = net
    sizes = [len(embedding.weight)] + [len(level.weights) for level in levels]
    g = index_select_backward(g, ids, sizes.pop())
    coming, grads, sums = reversed(levels), [], []
    for layer in reversed(layers):
        if isinstance(layer, Linear):
            # While this Linear computes, the gradients of the one above are summed. Begun before,
            # they would have held up the small sums of the BatchNorm1d between the two.
            sums += begin_all_reduce(grads)
        g = layer.backward(g)
        if isinstance(layer, Linear) and parallel():
            grads = [parameter.grad for parameter in layer.parameters()]
        if isinstance(layer, FlattenConsecutive):
            g = index_select_backward(g.flatten(0, 1), next(coming).children, sizes.pop())
    embedding.weight.grad = g
    for work in sums + begin_all_reduce([*grads, g]):
        work.wait()


# Several processes


def parallel():
    """Whether this is one of several processes that train together."""
    return distributed.is_available() and distributed.is_initialized()


def all_gather(tensor):
    """The tensors (N, ...) of the N processes that train together."""
    tensors = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(tensors, tensor)
    return torch.stack(tensors)


def all_reduce(tensor):
    """Sum a small tensor over the processes, in place. That of a single process stays as it is."""
    return tensor.copy_(all_gather(tensor).sum(0)) if parallel() else tensor


def begin_all_reduce(tensors):
    """Begin to sum large tensors over the processes, in place -> what to wait for."""
    return [distributed.all_reduce(tensor, async_op=True) for tensor in tensors if parallel()]


def moments_over_processes(x, weights):
    """Weighted mean and variance (C,) of the rows x (R, C) of all processes, and x - mean.

    Each tells the others the weight, mean and variance of its own rows: as in SyncBatchNorm, one
    exchange takes less time than two sums, each of which waits for the slowest process.
    """
    weight = weights.sum()
    mean = weights @ x / weight
    own = torch.stack((weight.expand_as(mean), mean, weights @ (x - mean).square()))
    weight, means, parts = all_gather(own).unbind(1)
    mean = (weight * means).sum(0)
    return mean, (parts + weight * (means - mean).square()).sum(0), x - mean
