"""The fast way through a network: equal rows of a minibatch once, gradients by hand.

It gives the numbers of net(contexts) and autograd. A network that it does not know goes that plain
way, so that nobody else has to ask which one it is.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

import layers
from layers import BatchNorm1d, Embedding, FlattenConsecutive

# LAYERS are what the page knows, FAST the classes that have the fast way. A layer of your own with
# backward(), that treats each row by itself, joins FAST. With FAST = () all goes the plain way.
LAYERS = Embedding, FlattenConsecutive, layers.Linear, BatchNorm1d, layers.Tanh, layers.Dropout
FAST = LAYERS
cross_entropy = layers.CrossEntropyLoss()


def is_stack_of(net, classes):
    """Whether `net` is a plain nn.Sequential of layers of these very classes."""
    in_order = type(net).forward is nn.Sequential.forward
    return in_order and all(type(layer) in classes for layer in net)


def has_fast_way(net):
    """Whether `net` is a stack of FAST, in which only pairs are joined, first after the embedding,
    until one row is left of each context. Only there each level is made of the distinct pairs of
    the one below.
    """
    if not is_stack_of(net, FAST):
        return False
    joined = [layer.n for layer in net if isinstance(layer, FlattenConsecutive)]
    pairs = {*joined} == {2} and type(net[1]) is FlattenConsecutive
    return pairs and 2 ** len(joined) == net.config["block_size"]


class Level(NamedTuple):
    """The R distinct pairs of a level: pair r joins the rows children[2r : 2r + 2] below."""

    children: torch.Tensor  # (2R,) int64
    weights: torch.Tensor  # (R,): the share of the level's n pairs that each stands for
    n: int


class Rows(NamedTuple):
    """A minibatch: its contexts (B, T); its levels, () for the plain way; where each context stands
    among the rows of the last level, (B,)."""

    contexts: torch.Tensor
    levels: tuple = ()
    row_ids: torch.Tensor | None = None


def distinct_rows(net, contexts):
    r"""K minibatches (K, B, T) int64 -> the Rows of each.

    Most of a window is padding, and many names begin alike, so few pairs are distinct. "..an" and
    "..en", with the tokens . a e n as rows 0 1 2 3:

        pairs    ..   an   en     children 0 0  1 3  2 3    weights 2/4 1/4 1/4    n 4
        fours    ..an   ..en      children 0 1  0 2         weights 1/2 1/2        n 2
    """
    if not has_fast_way(net):
        return [Rows(each) for each in contexts]
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
    return [Rows(*each) for each in zip(contexts, zip(*levels), row_ids.squeeze(2))]


def forward(net, rows):
    """The logits (B, V) of Rows: those of net(contexts)."""
    if not rows.levels:
        return net(rows.contexts)
    x = torch.arange(len(net[0].weight), device=rows.row_ids.device)  # each token once
    levels = iter(rows.levels)
    for layer in net:
        if isinstance(layer, FlattenConsecutive):
            level = next(levels)
            x = layer(x.index_select(0, level.children).view(-1, 2, x.shape[1]))
        elif isinstance(layer, BatchNorm1d):
            x = layer(x, level.weights, level.n)
        else:
            x = layer(x)
    return x.index_select(0, rows.row_ids)


def sum_uses(grad_out, index, n):
    """From grad_out = dL/dx[index], (R, C), dL/dx (n, C): the sum over the uses of each row."""
    return grad_out.new_zeros(n, grad_out.shape[1]).index_add_(0, index, grad_out)


def backward(net, rows, grad_out):
    """From grad_out = dL/dlogits (B, V) of the last forward(), set .grad of every parameter."""
    levels = list(rows.levels)
    grad_out = sum_uses(grad_out, rows.row_ids, len(levels[-1].weights))
    for layer in reversed(list(net)):  # net[i] takes longer: it counts from the first
        grad_out = layer.backward(grad_out)
        if isinstance(layer, FlattenConsecutive):
            children = levels.pop().children
            n_below = len(levels[-1].weights) if levels else len(net[0].weight)
            grad_out = sum_uses(grad_out.flatten(0, 1), children, n_below)


def part_size(net):
    """How many windows to measure at once: with at most 128 MB of logits. In the plain way, the
    more are looked at together, the fewer contexts are computed."""
    most = 8192 if has_fast_way(net) else 2**22 // net.config["block_size"]
    return min(most, 2**25 // net.config["vocab_size"])


def logits(net, contexts):
    """net(contexts): (B, T) int64 -> (B, V).

    In eval mode, where a context's logits depend on nothing else, the plain way computes each
    distinct context once, 2^15 positions at a time.
    """
    if has_fast_way(net) or any(module.training for module in net.modules()):
        return forward(net, distinct_rows(net, contexts[None])[0])
    distinct, ids = contexts.unique(dim=0, return_inverse=True)
    parts = distinct.split(max(1, 2**15 // contexts.shape[1]))
    return torch.cat([net(part) for part in parts]).index_select(0, ids)


def gradients(net, rows, targets):
    """Set .grad of every parameter -> the mean loss, (), in nats per token.

    `targets` are tokens (B,) or probabilities (B, V).
    """
    if not rows.levels:
        net.zero_grad()
        with torch.enable_grad():
            loss = cross_entropy(net(rows.contexts), targets)
            loss.backward()
        for parameter in net.parameters():
            if parameter.grad is None:  # a layer that this network does not use
                parameter.grad = torch.zeros_like(parameter)
        return loss.detach()
    with torch.inference_mode():  # each operation takes less time than under no_grad
        loss = cross_entropy(forward(net, rows), targets)
        backward(net, rows, cross_entropy.backward())
        return loss


@contextmanager
def evaluating(net):
    """Inside, the network is in eval mode and has no gradients; afterwards as it was before."""
    training = net.training
    try:
        with torch.no_grad():
            yield net.eval()
    finally:
        net.train(training)


def finite(x):
    """The same tensor. Raises ValueError where a network gives what is not finite."""
    if not x.isfinite().all():
        raise ValueError("the network gives numbers that are not finite: train it again")
    return x
