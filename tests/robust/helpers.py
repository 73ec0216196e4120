"""What the robust tests share: a list that is quickly learned, a training, any moment of it."""

import os
import sys
from itertools import product

import torch
from conftest import forked

import train

NAMES = ["".join(name) for name in product("kmrst", "aeio", "ln", ["", "a", "is", "ta", "o", "u"])]
SIZES = "--batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8".split()
SMALL = [*SIZES, *"--steps 120 --checkpoint-every 35 --lr 0.3 --dropout 0.1".split()]
LEFT = ["names.txt", "own.png", "own.pth"]  # after a training there is no other file
OLD = b"an older network"


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
