"""What both command lines share: flags, messages of one line, signals; nothing about names."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress

import torch

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMES, MODEL = os.path.join(HERE, "names.txt"), os.path.join(HERE, "model_state.pth")
STOP_SIGNALS = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGTERM", "SIGHUP")}


def log(message):
    """One line on stderr, what is not printable escaped, whether anybody listens or not."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
    with suppress(OSError):
        print(shown, file=sys.stderr or open(os.devnull, "w"), flush=True)


def bounded(kind, low, high, text):
    """An argparse type, with partial(): a number of `kind` from low to high."""
    with suppress(ValueError):
        if low <= (value := kind(text)) <= high:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low} to {high}")


def run_cli(function):
    """Exit with the status of function(); what a user can mend is one line on stderr, status 2."""
    warnings.simplefilter("ignore")  # from libraries: users could do nothing about them
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed before the start
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        encoding = None if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    message = None
    try:
        status = function()
        sys.stdout.flush()
    except (KeyboardInterrupt, OSError) as error:
        if sys.stdout is sys.__stdout__:  # not a notebook's; nothing more is flushed at the end
            sys.stdout = open(os.devnull, "w")
        status = {KeyboardInterrupt: 130, BrokenPipeError: 141}.get(type(error), 2)
        if status == 2:
            what = error.filename or "standard output"
            message = f"{what} cannot be used: {error.strerror or error}"
    except (ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        memory = "there is not enough memory: close other programs, or choose smaller sizes"
        status, message = 2, error if isinstance(error, ValueError) else memory
    if message:
        log(f"{os.path.basename(sys.argv[0])}: error: {message}")
    if status:
        sys.exit(status)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}: see --help")


def parse(parser, argv):
    """(all flags, {name: value} of those that were given)."""
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # its values win over the defaults
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not None}
    empty = {name for name, value in given.items() if value == ""}
    refuse_flags(empty - {"start", "match"}, "is empty")
    return args, given


def refuse_flags(names, why):
    """Raise ValueError when any flag is among them."""
    for name in sorted(names):
        raise ValueError(f"--{name.replace('_', '-')} {why}")


def device(name):
    """An argparse type: a device of this machine."""
    here = ["cpu"] + [each for each in ("cuda", "mps") if getattr(torch, each).is_available()]
    if name not in here:
        uses = " or ".join(here)
        raise argparse.ArgumentTypeError(f"{name!r} is not on this machine: use --device {uses}")
    return name


def command(*words):
    """What to type for `python WORDS ...`."""
    return f"python {subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)}"


@contextmanager
def stop_signals():
    """Inside, a signal to stop is put into the list; one a second after the first ends at once."""
    received = []  # of (time, signal)

    def handler(signum, frame):
        received.append((time.monotonic(), signum))
        if received[-1][0] - received[0][0] > 1:  # a terminal that is closed sends two
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    ours = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, handler) for signum in ours}
    try:
        yield received
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
