"""What both command lines share: flags, messages of one line, signals; nothing about names."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMES, MODEL = os.path.join(HERE, "names.txt"), os.path.join(HERE, "model_state.pth")
MAX_SIZE, MAX_BLOCK_SIZE = 4096, 1024  # of --n-embd and --n-hidden; of --block-size
MAX_LENGTH = 1000  # characters of a name; a network that never ends one would go on for ever
STOP_SIGNALS = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
script = False  # as_script() was called


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


def as_script():
    """This process is the command itself: Ctrl-C leaves no traceback, also while torch is imported,
    and nothing is flushed to a closed pipe at the end."""
    global script
    script = True
    hook = sys.excepthook
    sys.excepthook = lambda *error: os._exit(130) if error[0] is KeyboardInterrupt else hook(*error)


@contextmanager
def as_guest():
    """Inside, output is UTF-8 and nothing warns; afterwards all is as the caller had it."""
    import torch

    stdout, threads = sys.stdout, torch.get_num_threads()
    sys.stdout = stdout or open(os.devnull, "w")  # closed before the start
    changes = hasattr(stdout, "reconfigure")  # a notebook's does not
    if changes:
        before = dict(encoding=stdout.encoding, errors=stdout.errors)
        encoding = None if stdout.isatty() else "utf-8"
        stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from libraries: users could do nothing about them
            yield
    finally:
        sys.stdout = stdout
        torch.set_num_threads(threads)
        with suppress(OSError):  # it flushes
            if script:
                sys.stdout = open(os.devnull, "w")
            elif changes:
                stdout.reconfigure(**before)


def run_cli(function):
    """Exit with the status of function(); what a user can mend is one line on stderr, status 2."""
    message = None
    try:
        with as_guest():
            status = function()
            sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError) as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 141
    except OSError as error:
        what = error.filename or "standard output"
        status, message = 2, f"{what} cannot be used: {error.strerror or error}"
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
    import torch

    here = ["cpu"] + [each for each in ("cuda", "mps") if getattr(torch, each).is_available()]
    if name not in here:
        uses = " or ".join(here)
        raise argparse.ArgumentTypeError(f"{name!r} is not on this machine: use --device {uses}")
    return name


def command(*words):
    """What to type for `python WORDS ...`, also where a path holds what cannot be printed."""

    def quoted(word):
        data = os.fsencode(word)
        if (text := data.decode(errors="surrogateescape")).isprintable():
            return shlex.quote(text)
        return "$'" + repr(data)[2:-1].replace("\\'", "'").replace("'", "\\x27") + "'"

    nt = os.name == "nt"
    return "python " + (subprocess.list2cmdline(words) if nt else " ".join(map(quoted, words)))


def as_value(path):
    """A path as the value of a flag: not like a flag itself."""
    return f"./{path}" if path.startswith("-") and path != "-" else path


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
    if threading.current_thread() is not threading.main_thread():
        ours = []  # signals only ever reach the main thread
    before = {signum: signal.signal(signum, handler) for signum in ours}
    try:
        yield received
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
