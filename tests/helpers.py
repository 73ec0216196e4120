"""What the tests share: a script or a command run aside, a list that is quickly learned, a training
and any moment of it, slow windows, and the network in layers of torch.nn.
"""

import io
import os
import subprocess
import sys
import tempfile
import traceback
from itertools import product
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from model import CASE_MARK, WaveNet

# Running


def run(script, *args, **kwargs):
    """Run a script of the project as its own process -> the finished process, with its output."""
    kwargs = dict(capture_output=True, text=True, timeout=600) | kwargs
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], **kwargs)


def forked(main, *args, before=lambda: None):
    """Like run(), in a fork of this process, which need not import torch anew."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
                sys.argv[0] = f"{main.__module__}.py"
                before()
                main(list(map(str, args)))
                status = 0
            except SystemExit as exit:
                status = exit.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(args, status, out.read().decode(), err.read().decode())


# A training

NAMES = ["".join(name) for name in product("kmrst", "aeio", "ln", ["", "a", "is", "ta", "o", "u"])]
SIZES = "--batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8".split()
SMALL = [*SIZES, *"--steps 120 --checkpoint-every 35 --lr 0.3 --dropout 0.1".split()]
LEFT = ["names.txt", "own.png", "own.pth"]  # after a training there is no other file
buffer = io.BytesIO()
torch.save({"config": {}, "vocab": ".ab", "made": {}, "state_dict": {}}, buffer)
OLD = buffer.getvalue()  # as earlier versions wrote them: what a training may replace


def fill(folder):
    """A list, and an older network."""
    (folder / "names.txt").write_text("\n".join(NAMES))
    (folder / "own.pth").write_bytes(OLD)
    return folder


def command(folder, *more):
    return ["--data", str(folder / "names.txt"), "--out", str(folder / "own.pth"), *SMALL, *more]


def training(folder, *more, before=lambda: None):
    return forked(train.main, *command(folder, *more), before=before)


def resume(folder, *more):
    return forked(train.main, "--resume", "--out", folder / "own.pth", *more)


def last_line(process):
    """What is said last by a training that was refused or failed."""
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr.splitlines()[-1]


def result(folder):
    """The weights bit for bit, what is recorded about them, and the picture."""
    checkpoint = torch.load(folder / "own.pth", weights_only=True)
    state = {name: tensor.numpy().tobytes() for name, tensor in checkpoint["state_dict"].items()}
    return state, checkpoint["metadata"], (folder / "own.png").read_bytes()


def state_of(folder):
    return torch.load(folder / "own.pth.unfinished", weights_only=True)


def at(where, nth, action):
    """For before=: action() at the nth call of a function, as "train.finish" or "posix.fsync".

    By Python's own hook for profilers: nothing is patched. With "" it is the nth of all calls.
    """
    left = nth

    def hook(frame, kind, function):
        nonlocal left
        if kind == "call":
            name = f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"
        elif kind == "c_call":
            name = f"{function.__module__}.{function.__name__}"
        else:
            return
        left -= not where or name == where
        if not left:
            sys.setprofile(None)
            action()

    return lambda: sys.setprofile(hook)


def signals(*signums):
    """An action: this process gets these signals."""

    def action():
        for signum in signums:
            os.kill(os.getpid(), signum)

    return action


def failure(error):
    """An action: what is called at that moment fails."""

    def action():
        raise error

    return action


# Networks


class Norm(nn.BatchNorm1d):
    """torch.nn has the channels of three dimensions in the middle."""

    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def pairs(n=2):
    return nn.Sequential(nn.Unflatten(1, (-1, n)), nn.Flatten(2))


def twin(vocab_size, block_size, n_embd, n_hidden):
    """The same network in layers of torch.nn."""
    stack, n_in = [nn.Embedding(vocab_size + 1, n_embd)], n_embd
    while block_size > 1:
        stack += [pairs() if block_size > 2 else nn.Flatten()]
        stack += [nn.Linear(2 * n_in, n_hidden, bias=False), Norm(n_hidden), nn.Tanh()]
        block_size, n_in = block_size // 2, n_hidden
    return nn.Sequential(*stack, nn.Linear(n_in, vocab_size))


def random_net(seed, *config):
    """A network with weights and statistics of all kinds."""
    torch.manual_seed(seed)
    net = WaveNet(*config)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    return net


def slow_windows(names, vocab, block_size):
    """One context and target after the other, in plain Python."""
    pairs = []
    for name in names:
        context = [0] * block_size
        for char in name + vocab.end:
            for code in [char] if char in vocab.chars else [CASE_MARK, char.swapcase()]:
                pairs.append((context, vocab.chars.index(code)))
                context = context[1:] + [pairs[-1][1]]
    return pairs
