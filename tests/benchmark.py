"""Times the project against plain code that does the same, in turn, and prints the ratios.

python tests/benchmark.py          about fifteen minutes; close other programs first
"""

import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from model import Vocabulary, WaveNet, contexts_and_targets, load, windows  # noqa: E402
from plumbing.lists import read_names  # noqa: E402
from plumbing.processes import process_group, rank  # noqa: E402
from sampling import BATCH, generate  # noqa: E402

ROUNDS = 5


class PlainNet:
    """The lecture's network: each operation left to autograd; with running statistics or not."""

    def __init__(self, vocab_size, block_size, n_embd, n_hidden, tracks=True):
        self.tracks = tracks
        self.embedding = torch.randn(vocab_size, n_embd)
        self.levels, n_in = [], n_embd
        while block_size > 1:
            weight = torch.randn(2 * n_in, n_hidden) / (2 * n_in) ** 0.5
            self.levels.append([weight, torch.ones(n_hidden), torch.zeros(n_hidden)])
            block_size, n_in = block_size // 2, n_hidden
        self.running = [[torch.zeros(n_hidden), torch.ones(n_hidden)] for _ in self.levels]
        self.head, self.bias = (
            torch.randn(n_in, vocab_size) * 0.1 / n_in**0.5,
            torch.zeros(vocab_size),
        )
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
            if self.tracks:
                with torch.no_grad():
                    running[0] = 0.9 * running[0] + 0.1 * mean
                    running[1] = 0.9 * running[1] + 0.1 * var
        return x @ self.head + self.bias


def plain_name(net, vocab, block_size):
    """One name, the whole window at every character."""
    context, name = [0] * block_size, ""
    while True:
        chances = net(torch.tensor([context])).softmax(1)
        code = torch.multinomial(chances, 1).item()
        if code == 0:
            return name
        name += vocab.chars[code]
        context = context[1:] + [code]


def in_turn(ours, plain):
    """Time both in turn, ROUNDS times after a warm-up -> the ratio plain / ours of each round.

    Each returns how many units of work its call did.
    """
    ratios = []
    for _ in range(ROUNDS + 1):
        cost = []
        for run in (ours, plain):
            start = time.perf_counter()
            units = run()
            cost.append((time.perf_counter() - start) / units)
        ratios.append(cost[1] / cost[0])
    return ratios[1:]


def ours_and_names(block_size, n_embd, n_hidden, dropout, batch_size):
    """(A function that takes train.py's first `steps` steps, training windows, vocabulary)."""
    names = read_names(ROOT / "names.txt")
    vocab = Vocabulary(names)
    window = windows(train.split(names)["train"], vocab, block_size)
    torch.manual_seed(1)
    flags = "--batch-size", batch_size, "--dropout", dropout, "--block-size", block_size
    flags += "--steps", 10**9, "--truncate", 0
    args = train.build_parser().parse_args(list(map(str, flags)))
    net = WaveNet(len(vocab), block_size, n_embd, n_hidden, args.dropout)
    parameters = list(net.parameters())
    for norm in train.batch_norms(net):
        norm.momentum = 0.0  # as in train.train()

    def ours(steps):
        for rows, targets in islice(train.minibatches(net, window, 0, args), steps):
            train.train_step(net, rows, targets, 0.01, parameters)
        return steps

    return ours, window, vocab


def training_step(block_size, n_embd, n_hidden, dropout, batch_size, compiled=False, steps=100):
    """How many times as fast ours is as plain code.

    Where that is compiled, it has one call for all updates, and no running statistics.
    """
    torch.set_num_threads(1)
    ours, window, vocab = ours_and_names(block_size, n_embd, n_hidden, dropout, batch_size)
    contexts, targets = contexts_and_targets(window)
    net = PlainNet(len(vocab), block_size, n_embd, n_hidden, tracks=not compiled)

    def loss_of(contexts, targets):
        return F.cross_entropy(net(contexts), targets)

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def plain():
        for _ in range(steps):
            drawn = torch.randint(len(contexts), (batch_size,))
            loss = loss_of(contexts[drawn], targets[drawn])
            for parameter in net.parameters:
                parameter.grad = None
            loss.backward()
            if compiled:
                with torch.no_grad():
                    grads = [parameter.grad for parameter in net.parameters]
                    torch._foreach_add_(net.parameters, grads, alpha=-0.01)
            else:
                for parameter in net.parameters:
                    parameter.data += -0.01 * parameter.grad
            loss.item()
        return steps

    return in_turn(lambda: ours(steps), plain)


def sampling(n=20_000):
    torch.set_num_threads(1)
    net, vocab, _ = load(ROOT / "model_state.pth")

    def ours():
        for drawn in range(0, n, BATCH):
            generate(net, vocab, min(BATCH, n - drawn))
        return n

    @torch.no_grad()
    def plain():
        for _ in range(200):
            plain_name(net, vocab, net.config["block_size"])
        return 200

    return in_turn(ours, plain)


def worker(steps=50):
    """One of several processes, or the only one: prints the seconds of some large steps."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        ours, *_ = ours_and_names(16, 24, 1024, 0.0, 1024)
        ours(2)
        start = time.perf_counter()
        ours(steps)
        if not rank():
            print(time.perf_counter() - start)


def two_processes(rounds=3):
    """How many times as fast two processes of one thread are as one."""
    ratios = []
    for _ in range(rounds):
        seconds = []
        for launcher in (
            [],
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ):
            command = [sys.executable, *launcher, str(ROOT / "tests/benchmark.py"), "--worker"]
            seconds.append(
                float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
        ratios.append(seconds[0] / seconds[1])
    return ratios


def process(*command):
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return 1


def start_up():
    return in_turn(lambda: process("-c", "import torch"), lambda: process(ROOT / "sampling.py"))


# A child's peak counts from that of the process it was forked from: so a small one starts it.
LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(*command):
    """Megabytes that a process has at most, above those of a process that only imports torch."""
    peaks = []
    for arguments in (("-c", "import torch"), command):
        launcher = [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, arguments)]
        peaks.append(int(subprocess.run(launcher, check=True, capture_output=True).stdout) / 1024)
    return peaks[1] - peaks[0]


def training_memory(folder, data):
    out = Path(folder) / "model.pth"
    return [
        peak_memory(ROOT / "train.py", "--data", data, "--out", out, "--steps", 1000)
        for _ in range(3)
    ]


def row(what, against, values, unit):
    values = sorted(values)
    print(
        f"| {what} | {against} | {statistics.median(values):.2f}{unit} "
        f"| {values[0]:.2f} to {values[-1]:.2f} |",
        flush=True,
    )


def main():
    print("| what | against | median | spread |\n| --- | --- | --- | --- |")
    for sizes, batch_size, dropout in (
        ((16, 24, 280), 96, 0.15),
        ((16, 24, 280), 96, 0.0),
        ((8, 24, 128), 32, 0.0),
    ):
        what = "training step, block {}, E {}, H {}, batch {}".format(*sizes, batch_size)
        ratios = training_step(*sizes, dropout, batch_size)
        row(what + ", ours with dropout 0.15" * (dropout > 0), "plain code", ratios, "x")
        if not dropout:
            ratios = training_step(*sizes, dropout, batch_size, compiled=True)
            row("the same", "plain code under `torch.compile`", ratios, "x")
    row("block 16, E 24, H 1024, batch 1024, two processes", "one", two_processes(), "x")
    row("20,000 names, start-up taken off", "one at a time", sampling(), "x")
    row("time of `python sampling.py`", '`python -c "import torch"`', start_up(), "x")
    with tempfile.TemporaryDirectory() as folder:
        memory = training_memory(folder, ROOT / "names.txt")
        row("peak memory of training", "above `import torch`", memory, " MB")
        million = Path(folder) / "million.txt"
        text = (ROOT / "names.txt").read_text()
        million.write_text("".join((text * 32).splitlines(keepends=True)[:1_000_000]))
        row("the same, 1,000,000 rows", "above it", training_memory(folder, million), " MB")


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
