"""Times the project against plain code that does the same, in turn, and prints the ratios.

    python tests/benchmark.py          about five minutes; close other programs first
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from model import Vocabulary, load, read_names, wavenet  # noqa: E402
from sampling import BATCH, generate  # noqa: E402

ROUNDS = 7


class PlainNet:
    """The lecture's network: each operation left to autograd."""

    def __init__(self, vocab_size, block_size, n_embd, n_hidden):
        self.embedding = torch.randn(vocab_size, n_embd)
        self.levels, n_in = [], n_embd
        while block_size > 1:
            weight = torch.randn(2 * n_in, n_hidden) / (2 * n_in) ** 0.5
            self.levels.append([weight, torch.ones(n_hidden), torch.zeros(n_hidden)])
            block_size, n_in = block_size // 2, n_hidden
        self.running = [[torch.zeros(n_hidden), torch.ones(n_hidden)] for _ in self.levels]
        self.head, self.bias = torch.randn(n_in, vocab_size) * 0.1 / n_in**0.5, torch.zeros(vocab_size)
        self.parameters = [self.embedding, self.head, self.bias, *sum(self.levels, [])]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def __call__(self, contexts):
        x = self.embedding[contexts]
        for (weight, gain, shift), running in zip(self.levels, self.running):
            x = x.view(x.shape[0], x.shape[1] // 2, -1)
            if x.shape[1] == 1:
                x = x.squeeze(1)
            x = x @ weight
            dims = tuple(range(x.dim() - 1))
            mean, var = x.mean(dims, keepdim=True), x.var(dims, keepdim=True)
            x = torch.tanh(gain * (x - mean) / torch.sqrt(var + 1e-5) + shift)
            with torch.no_grad():
                running[0] = 0.9 * running[0] + 0.1 * mean
                running[1] = 0.9 * running[1] + 0.1 * var
        return x @ self.head + self.bias


def in_turn(ours, plain, steps):
    """Run both for `steps` in turn -> the ratio plain / ours of each round."""
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for run in (ours, plain):
            run(max(steps // 10, 1))
            start = time.perf_counter()
            run(steps)
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return ratios


def training_step(block_size, n_embd, n_hidden, batch_size=32):
    names = read_names(ROOT / "names.txt")
    vocab = Vocabulary(names)
    window = train.windows(train.split(names)[0], vocab, block_size)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    net = wavenet(len(vocab), block_size, n_embd, n_hidden)
    batches = train.minibatches(window, batch_size, 0.1, len(vocab), "cpu", generator)

    parameters = list(net.parameters())

    def ours(steps):
        for _ in range(steps):
            train.sgd_step(net, parameters, *next(batches), 0.01)

    contexts, targets = train.contexts_and_targets(window)
    plain_net = PlainNet(len(vocab), block_size, n_embd, n_hidden)

    def plain(steps):
        for _ in range(steps):
            drawn = torch.randint(len(contexts), (batch_size,), generator=generator)
            loss = F.cross_entropy(plain_net(contexts[drawn]), targets[drawn])
            for parameter in plain_net.parameters:
                parameter.grad = None
            loss.backward()
            for parameter in plain_net.parameters:
                parameter.data += -0.01 * parameter.grad
            loss.item()

    return in_turn(ours, plain, 200)


def main():
    for threads in (1,):
        torch.set_num_threads(threads)
        for sizes in (16, 24, 280), (8, 24, 128):
            r = training_step(*sizes)
            print(threads, sizes, statistics.median(r), min(r), max(r))

if __name__ == "__main__":
    main()
