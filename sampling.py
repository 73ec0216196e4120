"""Print new names, drawn character by character from a trained model."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported

import argparse
import math
import os
import sys
from contextlib import contextmanager, suppress
from itertools import islice, takewhile
from unicodedata import normalize

import torch

from layers import BatchNorm1d, Linear
from model import canonical, digest, load, out_of_memory, read_names

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES, MODEL = (os.path.join(HERE, name) for name in ("names.txt", "model_state.pth"))
MAX_SEED = 2**32 - 1
TINY = 1e-6  # the smallest positive number that a flag takes
BATCH = 8192  # names drawn at once


class Parser(argparse.ArgumentParser):
    """argparse, with one line on stderr and exit status 2 for any error."""

    def error(self, message):
        remark(f"{self.prog}: error: {message}")
        self.exit(2)

    @contextmanager
    def one_line_errors(self):
        """What can go wrong inside ends the program with one line, or quietly, but with no traceback."""
        # A stream that was closed before the start is one that nobody reads.
        sys.stdout = sys.stdout or open(os.devnull, "w")
        sys.stderr = sys.stderr or open(os.devnull, "w")
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
        try:
            with on_signals(interrupt):
                yield
                sys.stdout.flush()
        except KeyboardInterrupt as error:
            sys.exit(128 + (*error.args, signal.SIGINT)[0])
        except BrokenPipeError:  # the reader has enough
            self.close_stdout()
            sys.exit(141)
        except OSError as error:  # of reading and writing files, model.py makes a ValueError
            self.close_stdout()
            self.error(f"standard output cannot be written ({error.strerror})")
        except ValueError as error:
            self.error(str(error))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self.error("there is not enough memory: close other programs, or take smaller sizes")

    def close_stdout(self):
        """Nothing more can be printed, nor must Python try when it ends."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def remark(text):
    """Print one line on stderr, with escapes for what is not printable. That nobody listens is no error."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")


@contextmanager
def on_signals(handler):
    """Inside, the first signal that asks the program to stop calls handler(signum), and a second ends it at once.

    A signal that was ignored, as in the background of a script, stays so.
    """
    signums = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {signum: signal.getsignal(signum) for signum in signums if signal.getsignal(signum) != signal.SIG_IGN}

    def first(signum, frame):
        for signum_ in before:
            signal.signal(signum_, signal.SIG_DFL)
        handler(signum)

    for signum in before:
        signal.signal(signum, first)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def interrupt(signum):
    raise KeyboardInterrupt(signum)


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind`, low <= number <= high."""

    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")

    return parse


def fold(net):
    """The network for sampling: (embedding (V, C), [(left, right, bias) a level], (weight, bias)).

    In eval mode BatchNorm1d is a scale and a shift, so it folds into the Linear before it. That Linear's
    matrix is cut in two: what it does to the left one of a pair, and what to the right one.
    """
    embedding, *layers, head = net
    levels = []
    for layer in layers:
        if isinstance(layer, Linear):
            weight = layer.weight
        elif isinstance(layer, BatchNorm1d):
            scale = layer.weight * (layer.running_var + layer.eps).rsqrt()
            left, right = (weight * scale.unsqueeze(1)).T.chunk(2)
            levels.append((left.contiguous(), right.contiguous(), layer.bias - layer.running_mean * scale))
    return embedding.weight, levels, (head.weight.T, head.bias)


class Prefixes:
    """The distinct beginnings of the names being drawn, and the logits (N, V) of what follows each.

    A level's output at a character depends on two outputs of the level below: at that character and
    2^level characters before. So each character costs one row a level, when the rows of the last
    2^level characters are kept: Fast WaveNet, arXiv:1611.09482. Here a row is kept for each distinct
    beginning, with `ancestor` telling the older rows which of them is whose.
    """

    def __init__(self, net):
        embedding, self.levels, self.head = fold(net)
        self.embedding = embedding
        self.padding = [embedding[:1]]  # a level's output where only padding is seen
        for left, right, bias in self.levels:
            x = self.padding[-1]
            self.padding.append(torch.tanh(x @ left + x @ right + bias))
        self.past = []  # of the last characters, newest first: (ancestor (N,), the rows of each level)
        self.logits = self.padding[-1] @ self.head[0] + self.head[1]

    def extend(self, parent, codes):
        """Go on from beginning parent[i] with character codes[i]; both (N,) int64."""
        self.past = [(ancestor[parent], rows) for ancestor, rows in self.past]
        x, rows = self.embedding[codes], []
        for level, (left, right, bias) in enumerate(self.levels):
            rows.append(x)
            distance = 2**level
            if distance <= len(self.past):
                ancestor, older = self.past[distance - 1]
                before = older[level][ancestor] @ left
                older[level] = None  # this was its last use
            else:
                before = self.padding[level] @ left
            x = torch.tanh(before + x @ right + bias)
        self.past.insert(0, (torch.arange(len(codes)), rows))
        del self.past[2 ** (len(self.levels) - 1) :]
        self.logits = x @ self.head[0] + self.head[1]


@torch.no_grad()
def generate(net, vocab, n, start="", temperature=1.0, top_k=None, max_length=50):
    """n names, str, that begin with `start`: each character drawn from softmax(logits / temperature).

    With top_k, only from the top_k likeliest. A name ends at the end token or when it is max_length characters long.
    Raises ValueError when `start` holds the end token or a character that the model does not know.
    """
    if vocab.end in start:
        raise ValueError(f"a name cannot hold {vocab.end!r}, which marks its end")
    prefixes = Prefixes(net)
    for code in vocab.encode(start):
        prefixes.extend(torch.tensor([0]), torch.tensor([code]))
    which = torch.zeros(n, dtype=torch.int64)  # the beginning that a name has come to
    alive = torch.arange(n)  # the names that have not ended
    columns = []
    for position in range(len(start), max_length):
        logits = prefixes.logits.double()
        if position == 0:
            logits[:, 0] = -math.inf  # a name has at least one character
        if top_k is not None and top_k < len(vocab):
            logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
        # With the highest logit at 0, no temperature makes the softmax overflow.
        chances = ((logits - logits.max(1, keepdim=True).values) / temperature).softmax(1)
        codes = torch.multinomial(chances[which], 1).squeeze(1)
        columns.append(torch.zeros(n, dtype=torch.int64).index_copy_(0, alive, codes))
        which, alive, codes = (x[codes != 0] for x in (which, alive, codes))
        if not len(alive):
            break
        keys, which = torch.unique(which * len(vocab) + codes, return_inverse=True)
        prefixes.extend(keys // len(vocab), keys % len(vocab))
    text = torch.stack(columns, 1).tolist() if columns else [()] * n
    return [start + vocab.decode(takewhile(bool, codes)) for codes in text]


def new_names(draw, known):
    """Names from draw(), a function that returns a list of them, that are not `known`, each once, canonical().

    It ends after a hundred draws in a row that bring nothing new.
    """
    seen, dry = {"", *known}, 0
    while dry < 100:
        dry += 1
        for name in map(canonical, draw()):
            if name not in seen:
                seen.add(name)
                dry = 0
                yield name


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("-n", "--num-samples", type=number(int, 1, 10**9), default=20, help="how many names (20)")
    parser.add_argument("--model", default=MODEL, help="what train.py wrote (model_state.pth)")
    parser.add_argument("--start", default="", metavar="TEXT", help="only names that begin so")
    parser.add_argument("--temperature", type=number(float, TINY, 1 / TINY), default=1.0, help="below 1 more usual names, above 1 stranger ones (1)")
    parser.add_argument("--top-k", type=number(int, 1, 10**9), metavar="K", help="draw each character from the K likeliest only")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), help="the same names at every run (none: new ones)")
    parser.add_argument("--max-length", type=number(int, 1, 10**6), default=50, help="cut names at so many characters (50)")
    parser.add_argument("--new", action="store_true", help="only names that are not in the list it was trained on, each once")
    parser.add_argument("--data", metavar="LIST", help="that list (names.txt, if it was trained on that)")
    parser.add_argument("--threads", type=number(int, 1, 1024), default=1, help="processor cores to use (1)")
    with parser.one_line_errors():
        run(parser.parse_args(argv))


def run(args):
    """Print what was asked for."""
    torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    else:
        torch.seed()
    start = normalize("NFC", args.start)
    if len(start) > args.max_length:
        raise ValueError(f"--start {start!r} is longer than --max-length {args.max_length}")
    net, vocab, made = load(args.model)
    batch = max(1, min(BATCH, 2**22 // len(vocab)))

    def draw(n):
        return generate(net, vocab, min(n, batch), start, args.temperature, args.top_k, args.max_length)

    left = args.num_samples
    if args.new:
        known = read_names(NAMES if args.data is None else args.data)
        if args.data is None and digest(known) != made.get("names"):
            raise ValueError(f"{args.model} was not trained on names.txt: give --new its list with --data LIST")
        names = new_names(lambda: draw(max(left, 100)), known)
        for name in islice(names, left):
            print(name)
            left -= 1
        if left:
            remark(f"only {args.num_samples - left} new names found")
    while not args.new and left > 0:
        names = draw(left)
        print("\n".join(names))
        left -= len(names)


if __name__ == "__main__":
    main()
