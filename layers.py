"""The arithmetic: each layer, and the loss, forward and backward.

Layers are named, called and parametrised as in torch.nn. backward(grad_out) is the gradient by
hand: from grad_out = dL/dy of the last forward(), in training mode and without autograd, it sets
.grad of the layer's parameters and returns dL/dx (Embedding's returns None: tokens have no
gradient). What backward() needs, forward() leaves in self.saved: see the end of this file.
"""

import torch
from torch import nn


class Embedding(nn.Module):
    """A learned vector per token: (...) int64 -> (..., embedding_dim); Bengio et al., 2003."""

    def __init__(self, num_embeddings, embedding_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_embeddings, embedding_dim))

    def forward(self, tokens):
        save_for_backward(self, tokens)
        return self.weight.index_select(0, tokens.reshape(-1)).view(*tokens.shape, -1)

    def backward(self, grad_out):  # a token picks its row of the weight, wherever it stands
        (tokens,) = self.saved
        rows = grad_out.reshape(-1, self.weight.shape[1])
        self.weight.grad = torch.zeros_like(self.weight).index_add_(0, tokens.reshape(-1), rows)


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

    plumbing/fast.py gives equal rows once: of x (B, C), row r stands for a share weights[r] of all
    n. "..an" and "..en" have n = 4 pairs: the rows "..", "an", "en" with weights 2/4, 1/4, 1/4.
    Raises ValueError for another C, and in training for n < 2.
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
            scale, shift = self.scale_and_shift()
            return torch.addcmul(shift, x, scale)  # shift + x * scale, in one pass over memory
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
        if m > 0:
            self.running_mean.lerp_(mean.detach(), m)
            # The biased variance normalises; the unbiased one estimates that of unseen data.
            self.running_var.lerp_(var.detach() * (n / (n - 1)), m)
        return torch.addcmul(self.bias, x_hat, self.weight).view(x.shape)  # x_hat * weight + bias

    def backward(self, grad_out):
        # x[r] moves y[r] directly, and every y through mean and var, in which row r has weight
        # w[r]: dL/dx[r] = weight * rstd * (g[r] - w[r] * (sum g + x_hat[r] * sum(g * x_hat))).
        # Where each row stands for itself, w[r] is 1/n, and this is the formula of the paper.
        x_hat, rstd, weights = self.saved
        rows = grad_out.reshape(x_hat.shape)
        sum_g, sum_g_x_hat = rows.sum(0), (rows * x_hat).sum(0)
        self.bias.grad, self.weight.grad = sum_g, sum_g_x_hat
        through_all = torch.addcmul(sum_g, x_hat, sum_g_x_hat)  # sum_g + x_hat * sum_g_x_hat
        # rows - weights * through_all
        every_way = torch.addcmul(rows, through_all, weights.unsqueeze(1), value=-1)
        return (every_way * (self.weight * rstd)).view(grad_out.shape)

    def scale_and_shift(self):
        """(scale, shift), each (C,): in eval mode this layer is x * scale + shift."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class Tanh(nn.Module):
    """(e^x - e^-x) / (e^x + e^-x), elementwise."""

    def forward(self, x):
        y = torch.tanh(x)
        save_for_backward(self, y)
        return y

    def backward(self, grad_out):  # tanh' = 1 - tanh^2, so this is grad_out * (1 - y * y)
        (y,) = self.saved
        return torch.addcmul(grad_out, grad_out * y, y, value=-1)


class Dropout(nn.Module):
    """In training, each channel of a batch is 0 with probability p, else divided by 1 - p: a
    thinner network for each step, arXiv:1207.0580. torch.nn draws for each value; here equal rows
    stay equal, and are computed once.
    """

    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.p
        mask = x.new_empty(x.shape[-1]).bernoulli_(keep).div_(keep or 1)  # Dropout(1) gives 0
        save_for_backward(self, mask)
        return x * mask

    def backward(self, grad_out):  # y = x * mask
        return grad_out * self.saved[0]


class CrossEntropyLoss(nn.Module):
    """Mean of -log softmax(logits)[target], in nats: logits (B, V), targets (B,) -> ().

    Targets may be probabilities (B, V), too: the mean of -sum(p * log softmax). torch.nn's
    also knows weights of classes, ignore_index, label_smoothing, sums and more dimensions.
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


def save_for_backward(layer, *tensors):
    """Keep in `layer` what its backward() needs: nothing under autograd or in eval mode."""
    saved = tensors if layer.training and not torch.is_grad_enabled() else None
    object.__setattr__(layer, "saved", saved)  # nn.Module's own looks for parameters: slower
