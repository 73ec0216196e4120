"""The networks of the lectures: WaveNet.__init__ is all that changes, and everything works."""

import os
import signal
import sys

import pytest
import torch
from helpers import NAMES, SIZES, at, fill, signals
from torch import nn

import sampling
import train
from layers import BatchNorm1d, Embedding, FlattenConsecutive, Linear, Tanh
from model import WaveNet, contexts_and_targets, load, windows
from plumbing import fast


class Last(nn.Module):
    """(B, T, ...) -> (B, ...): the last position."""

    def forward(self, x):
        return x[:, -1]


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class GRU(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0]


class Attention(nn.Module):
    """One head of causal self-attention, which knows positions."""

    def __init__(self, block_size, n):
        super().__init__()
        self.position = nn.Parameter(torch.randn(block_size, n))
        self.qkv = nn.Linear(n, 3 * n, bias=False)
        self.register_buffer("mask", torch.ones(block_size, block_size).tril() == 0)

    def forward(self, x):
        q, k, v = self.qkv(x + self.position).chunk(3, -1)
        scores = (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(self.mask, float("-inf"))
        return scores.softmax(-1) @ v


class LectureNorm(nn.Module):
    """BatchNorm1d as part 3 has it: it counts no batches, and momentum is a number."""

    def __init__(self, n):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))
        self.momentum = 0.1

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0)
            with torch.no_grad():
                self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
                self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var
        return self.gamma * (x - mean) / torch.sqrt(var + 1e-5) + self.beta


def levels(T, E, H, tanh, last):
    layers, n = [], E
    for _ in range(T.bit_length() - 1):
        linear = Linear(2 * n, H, bias=False)
        layers, n = [*layers, FlattenConsecutive(2), linear, BatchNorm1d(H), tanh()], H
    return [*layers, last]


NETWORKS = {  # of V, T, E, H: the layers; the block size
    "bigram": (lambda V, T, E, H: [Embedding(V, E), Last(), Linear(E, V)], 16),
    "bigram, a table": (lambda V, T, E, H: [Embedding(V, V), Last()], 4),
    "bigram, one token": (lambda V, T, E, H: [Last(), Embedding(V, V)], 1),
    "MLP, part 2": (
        lambda V, T, E, H: [Embedding(V, E), nn.Flatten(), Linear(T * E, H), Tanh(), Linear(H, V)],
        3,
    ),
    "MLP, part 3": (
        lambda V, T, E, H: [
            *(nn.Embedding(V, E), nn.Flatten(), nn.Linear(T * E, H, bias=False)),
            *(nn.BatchNorm1d(H), nn.Tanh(), nn.Linear(H, V), nn.BatchNorm1d(V)),
        ],
        3,
    ),
    "MLP, its own BatchNorm1d": (
        lambda V, T, E, H: [
            *(Embedding(V, E), nn.Flatten(), Linear(T * E, H, bias=False), LectureNorm(H)),
            *(Tanh(), Linear(H, V)),
        ],
        3,
    ),
    "GELU": (lambda V, T, E, H: [Embedding(V, E), *levels(T, E, H, nn.GELU, Linear(H, V))], 8),
    "residual": (
        lambda V, T, E, H: [
            *(Embedding(V, E), FlattenConsecutive(T), Linear(T * E, H)),
            *(Residual(Linear(H, H), nn.ReLU()), Residual(Linear(H, H), Tanh()), Linear(H, V)),
        ],
        5,
    ),
    "GRU": (
        lambda V, T, E, H: [Embedding(V, E), GRU(E, H, batch_first=True), Last(), nn.Linear(H, V)],
        8,
    ),
    "attention": (
        lambda V, T, E, H: [
            *(Embedding(V, E), Residual(Attention(T, E)), Residual(nn.LayerNorm(E), Linear(E, E))),
            *(Last(), nn.Linear(E, V)),
        ],
        8,
    ),
    "head of several layers": (
        lambda V, T, E, H: [
            Embedding(V, E),
            *levels(T, E, H, Tanh, nn.Sequential(Linear(H, H), nn.GELU(), Linear(H, V))),
        ],
        4,
    ),
}


def use(monkeypatch, layers):
    """Nothing but WaveNet.__init__ changes."""

    def init(self, vocab_size, block_size, n_embd, n_hidden, dropout=0.0):
        sizes = vocab_size, block_size, n_embd, n_hidden
        nn.Sequential.__init__(self, *layers(*sizes))
        names = "vocab_size", "block_size", "n_embd", "n_hidden"
        self.config = dict(zip(names, sizes))

    monkeypatch.setattr(WaveNet, "__init__", init)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_of_the_lectures_does_all_that_the_shipped_one_does(
    kind, tmp_path, monkeypatch, capsys
):
    """It is trained, stopped, resumed, loaded, sampled, scored, explained, started from."""
    layers, block_size = NETWORKS[kind]
    use(monkeypatch, layers)
    monkeypatch.chdir(fill(tmp_path))
    n_hidden = 4096 if kind == "bigram" else 8  # which it does not use
    lr = 10 if "a table" in kind or "one token" in kind else 0.3
    more = f"--steps 90 --lr {lr} --block-size {block_size} --n-hidden {n_hidden}".split()
    start = ["--data", "names.txt", "--out", "own.pth", *SIZES, *more]
    try:
        at("train.train_step", 25, signals(signal.SIGTERM))()
        with pytest.raises(SystemExit):
            train.main(start)
    finally:
        sys.setprofile(None)
    assert os.path.exists("own.pth.unfinished")
    train.main(["--resume", "--out", "own.pth"])
    said = capsys.readouterr().err
    net, vocab, metadata = load("own.pth")
    assert ("not be scaled" in said) == (not hasattr(net[-1], "weight"))
    tokens = windows(NAMES, vocab, block_size)
    contexts, targets = contexts_and_targets(tokens)
    with torch.no_grad():  # all windows at once, by the plain way
        expected = nn.functional.cross_entropy(net(contexts), targets).item()
    assert train.evaluate(net, tokens, vocab) == pytest.approx([expected], abs=1e-5)
    sampling.main("--model own.pth -n 5 --max-length 30".split())
    assert len(capsys.readouterr().out.splitlines()) == 5
    sampling.main("--model own.pth --score names.txt".split())
    losses = [float(line.split("\t")[0]) for line in capsys.readouterr().out.splitlines()]
    sampling.main(["--model", "own.pth", "--explain", NAMES[0]])
    assert f"{losses[0]:.4f} nats per character" in capsys.readouterr().out
    others = ["--out", "b.pth", "--batch-size", "8", "--steps", "20", "--lr", "1e-6"]
    train.main(["--data", "names.txt", "--init-from", "own.pth", *others])
    again = load("b.pth")[2]["losses"]
    assert again["val"] < metadata["losses"]["val"] + 0.05
    assert not [name for name in os.listdir() if "unfinished" in name]


REFUSED = {  # of V, T, E, H: layers, and what is said of them
    "other layers each time": (
        lambda V, T, E, H: [
            *(Embedding(V, E), nn.Flatten(), *[Tanh()] * torch.randint(1000, ()).item()),
            Linear(T * E, V),
        ],
        "cannot be run, written and loaded",
    ),
    "no sizes known": (
        lambda V, T, E, H: [Embedding(V, E), nn.Flatten(), nn.LazyLinear(V)],
        "cannot be run, written and loaded",
    ),
    "levels are missing": (
        lambda V, T, E, H: [Embedding(V, E), FlattenConsecutive(2), Linear(2 * E, V)],
        "cannot be run, written and loaded",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_network_that_could_not_be_loaded_is_refused_before_the_first_step(
    kind, tmp_path, monkeypatch, refused
):
    layers, words = REFUSED[kind]
    use(monkeypatch, layers)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("\n".join(NAMES))
    refused(train.main, ["--data", "list.txt", "--out", "own.pth", *SIZES, "--steps", 9], words)
    assert os.listdir() == ["list.txt"]


def test_levels_that_do_not_make_the_block_size_go_the_plain_way(monkeypatch):
    use(monkeypatch, lambda V, T, E, H: [Embedding(V, E), *levels(4, E, H, Tanh, Last())])
    assert fast.has_fast_way(WaveNet(9, 4, 3, 5)) is False  # Last is not in FAST
    use(monkeypatch, lambda V, T, E, H: [Embedding(V, E), *levels(4, E, H, Tanh, Linear(H, V))])
    assert fast.has_fast_way(WaveNet(9, 4, 3, 5))
    assert not any(fast.has_fast_way(WaveNet(9, T, 3, 5)) for T in (1, 2, 3, 8, 16))


def test_the_plain_way_computes_each_distinct_context_once(monkeypatch):
    net, seen = WaveNet(5, 4, 3, 6), []
    contexts = torch.randint(5, (3000, 4)) * (torch.rand(3000, 4) < 0.5)
    net.eval()
    expected = net(contexts)
    monkeypatch.setattr(fast, "FAST", ())
    net[0].register_forward_hook(lambda layer, args, out: seen.append(args[0]))
    torch.testing.assert_close(fast.logits(net, contexts), expected)
    assert sum(map(len, seen)) == len({*map(tuple, contexts.tolist())})
    net[3].train()  # its statistics are those of all rows
    fast.logits(net, contexts)
    assert len(seen[-1]) == 3000
