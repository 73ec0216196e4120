"""Print new names, drawn character by character from a trained model."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported

import argparse
import math
import os
import re
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from functools import partial
from unicodedata import normalize

import torch

from layers import BatchNorm1d, Linear
from model import canonical, digest, load, read_names

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES, MODEL = (os.path.relpath(f"{HERE}/{name}") for name in ("names.txt", "model_state.pth"))
BATCH = 8192  # names drawn at once
LONGEST = 1000  # characters of a name; a network that never ends one would be asked for ever
PAUSE = 2  # seconds until it is said how many were found
PATIENCE = 10**6  # draws in a row that bring nothing, after which no more are made
NOT_FINITE = "the network's weights are too large or no numbers: train it anew"


# Drawing and scoring


def tanh_(x):
    """tanh in place, as 2 sigmoid(2x) - 1: that takes half the time of torch's tanh."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class Prefixes:
    """n texts that grow a character at a time, and the logits of what follows each.

    A level's output at a character depends on two outputs of the level below: at that character
    and 2^level characters before. So a character costs one row a level, when the rows of the last
    2^level characters are kept: Fast WaveNet, arXiv:1611.09482. And texts whose last characters
    are the same share their rows, so that each distinct row is computed once.

    `alive` (N,) are the numbers of the texts that have not come to the end token. What follows text
    alive[i] has row ids[i] of the logits (R, V).
    """

    def __init__(self, net, n):
        self.embedding, *layers, self.head = net
        self.alive = torch.arange(n)
        # In eval mode BatchNorm1d is a scale and a shift, so it folds into the Linear before it.
        # That Linear's matrix is cut in two: what it does to the older one of a pair, and to the
        # newer one.
        self.levels = []
        x, ids = self.embedding.weight[:1], torch.zeros(n, dtype=torch.int64)  # only padding so far
        for layer in layers:
            if isinstance(layer, Linear):
                weight = layer.weight
            elif isinstance(layer, BatchNorm1d):
                scale, bias = layer.scale_and_shift()
                left, right = (weight * scale.unsqueeze(1)).T.chunk(2)
                queue = [(ids, x)] * 2 ** len(self.levels)  # the level's inputs, oldest first
                self.levels.append((left, right, bias, queue))
                x = tanh_(x @ (left + right) + bias)
        self.ids, self.logits = ids, self.head(x)

    def extend(self, codes):
        """Add character codes[i] to text alive[i]; the end token, 0, ends it."""
        living = codes.nonzero().squeeze(1)
        self.alive = self.alive[living]
        codes, ids = torch.unique(codes[living], return_inverse=True)
        x = self.embedding.weight[codes]
        for left, right, bias, queue in self.levels:
            queue[:] = [(older_ids[living], older) for older_ids, older in queue]
            queue.append((ids, x))
            older_ids, older = queue.pop(0)
            # Each distinct pair (row of older, row of x) is one number, and gets one row.
            pairs, ids = torch.unique(older_ids * len(x) + ids, return_inverse=True)
            y = torch.addmm(bias, older, left).index_select(0, pairs // len(x))
            x = tanh_(y.add_((x @ right).index_select(0, pairs % len(x))))
        self.ids, self.logits = ids, self.head(x)


@torch.no_grad()
def generate(net, vocab, n, start="", temperature=1.0, top_k=None, max_length=LONGEST):
    """Draw n names that begin with `start`, and return those of at most max_length characters.

    Each character is drawn from softmax(logits / temperature), with top_k only from the top_k
    likeliest. A name ends at the end token and is never cut: a longer one than max_length is left
    out.
    Raises ValueError when `start` holds the end token or a character that the model does not know.
    """
    if vocab.end in start:
        raise ValueError(f"a name cannot hold {vocab.end!r}, which marks its end")
    prefixes = Prefixes(net, n)
    columns = [torch.full((n,), code) for code in vocab.encode(start)]
    for codes in columns:
        prefixes.extend(codes)
    while len(prefixes.alive) and len(columns) <= max_length:
        logits = prefixes.logits.double()
        if not columns:
            logits[:, 0] = -math.inf  # a name has at least one character
        if top_k is not None and top_k < len(vocab):
            logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
        # With the highest logit at 0, no temperature makes exp overflow.
        weights = ((logits - logits.amax(1, keepdim=True)) / temperature).exp()
        if weights.isnan().any():
            raise ValueError(NOT_FINITE)
        # A point between 0 and the sum of a row's weights falls to each character in proportion to
        # its weight: to the first at which the sum so far is above the point. One exists, because
        # rand() < 1; and it has some weight, because otherwise the sum would not have grown there.
        sums = weights.cumsum(1)[prefixes.ids]
        points = torch.rand(len(sums), 1, dtype=torch.float64) * sums[:, -1:]
        codes = torch.searchsorted(sums, points, right=True).squeeze(1)
        columns.append(torch.zeros(n, dtype=torch.int64).index_copy_(0, prefixes.alive, codes))
        prefixes.extend(codes)
    table = torch.stack(columns, 1)
    table[prefixes.alive] = 0
    return [name for name in vocab.decode(table.flatten().tolist()).split(vocab.end) if name]


def draw(sample, n, batch=BATCH, min_length=1, pattern=re.compile(""), known=None):
    """Yield n names that sample(size <= batch) draws: those long enough that hold the pattern.

    With `known`, only those that are not in there, each once. After PATIENCE draws in a row that
    bring nothing it ends, and says so on stderr. There the count so far is shown after 2, 4, 8, ...
    seconds.
    """
    begin, pause, seen = time.monotonic(), PAUSE, set(known or ())
    drawn = found = last = 0  # last: how many were drawn up to the last find
    while found < n and drawn - last < PATIENCE:
        # As many as should be needed, going by the share of those drawn that were wanted.
        size = min(batch, (n - found) * (drawn + 1) // (found + 1))
        drawn += size
        for name in map(canonical, sample(size)):
            if found < n and len(name) >= min_length and name not in seen and pattern.search(name):
                found, last = found + 1, drawn
                if known is not None:
                    seen.add(name)
                yield name
        if time.monotonic() - begin > pause:
            remark(f"{found:,} of {n:,} names found among {drawn:,} drawn")
            pause *= 2
    if found < n:
        remark(f"only {found:,} of {n:,} names found among {drawn:,} drawn")


@torch.no_grad()
def score(net, vocab, names):
    """For each name of a list, the mean loss in nats a character, the end token included.

    It is infinite for a name with a character that the model does not know.
    """
    losses = torch.full((len(names),), math.inf, dtype=torch.float64)
    chars = set(vocab.chars[1:])
    known = [i for i, name in enumerate(names) if chars.issuperset(name)]
    lengths = torch.tensor([len(names[i]) + 1 for i in known], dtype=torch.int64)
    starts = lengths.cumsum(0) - lengths
    text = "".join(names[i] + vocab.end for i in known)
    codes = torch.tensor(vocab.encode(text), dtype=torch.int64)
    prefixes = Prefixes(net, len(known))
    sums, position = torch.zeros(len(known), dtype=torch.float64), 0
    while len(prefixes.alive):
        given = codes[starts[prefixes.alive] + position]
        log_probs = prefixes.logits.double().log_softmax(1)
        sums[prefixes.alive] -= log_probs[prefixes.ids, given]
        prefixes.extend(given)
        position += 1
    if sums.isnan().any():
        raise ValueError(NOT_FINITE)
    losses[known] = sums / lengths
    return losses.tolist()


# What both command lines share


class Parser(argparse.ArgumentParser):
    """argparse, a line for each flag; any error is one line on stderr and exit status 2."""

    def __init__(self, description):
        wide = partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=28, width=120)
        super().__init__(description=description, formatter_class=wide)

    def error(self, message):
        remark(f"{self.prog}: error: {message}")
        self.exit(2)

    def guard(self, function):
        """Call function(). What goes wrong there ends the program with one line, or quietly."""
        warnings.simplefilter("ignore")  # of libraries: users could do nothing about them
        # A stream that was closed before the start is one that nobody reads.
        sys.stdout, sys.stderr = sys.stdout or nobody(), sys.stderr or nobody()
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
        try:
            with on_signals(interrupt):
                function()
                sys.stdout.flush()
        except (KeyboardInterrupt, OSError) as error:
            with suppress(OSError):
                sys.stdout.flush()
            sys.stdout = nobody()  # Python must not try to print what is left when it ends
            if isinstance(error, KeyboardInterrupt):
                sys.exit(128 + (*error.args, signal.SIGINT)[0])
            if isinstance(error, BrokenPipeError):  # the reader has enough
                sys.exit(141)
            what = "standard output" if error.filename is None else error.filename
            what = f"{what} cannot be read or written ({error.strerror})"
            self.error(f"{what}: check its name, its rights, and the room there")
        except ValueError as error:
            self.error(str(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):
                raise
            self.error("there is not enough memory: close other programs, or take smaller sizes")


def nobody():
    """A stream that nobody reads."""
    return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")


def remark(text):
    """Print one line on stderr, what is not printable escaped, whether anybody listens or not."""
    shown = (char if char.isprintable() else repr(char)[1:-1] for char in text)
    try:
        print("".join(shown), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = nobody()


@contextmanager
def on_signals(handler):
    """Inside, the first signal to stop calls handler(signum), and a second one ends it at once.

    A signal that was ignored, as in the background of a script, stays so.
    """
    stops = signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)
    before = {stop: old for stop in stops if (old := signal.getsignal(stop)) != signal.SIG_IGN}

    def first(signum, frame):
        for other in before:
            signal.signal(other, signal.SIG_DFL)
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


def number(kind, low, high):
    """An argparse type: a number of `kind`, low <= number <= high."""

    def number(text):  # argparse shows this name: invalid number value
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not from {low} to {high}")
        return value

    return number


POSITIVE, SEED, THREADS = number(float, 1e-6, 1e6), number(int, 0, 2**32 - 1), number(int, 1, 1024)


# The command line of this one


def flags():
    """The parser of the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("which names").add_argument
    count = number(int, 1, 10**9)
    add("-n", "--num-samples", type=count, metavar="N", default=20, help="how many names")
    add("--start", metavar="TEXT", default="", help="names that begin with this text")
    add("--min-length", type=count, metavar="N", default=1, help="of at least so many characters")
    length = number(int, 1, LONGEST)
    add("--max-length", type=length, metavar="N", default=LONGEST, help="of at most so many")
    add("--match", metavar="REGEX", default="", help="in which this regular expression is found")
    add("--new", action="store_true", help="that are not in the list it was trained on, each once")
    add("--data", metavar="LIST", help="the list for --new; left out: names.txt")
    add = parser.add_argument_group("how they are drawn").add_argument
    add("--model", metavar="FILE", default=MODEL, help="the network, as train.py wrote it")
    add("--temperature", type=POSITIVE, metavar="T", default=1.0, help="below 1 more usual names")
    add("--top-k", type=count, metavar="K", help="only from the K likeliest characters")
    add("--seed", type=SEED, metavar="N", help="for the same names again; left out: others")
    add("--threads", type=THREADS, metavar="N", default=1, help="processor cores to use")
    add = parser.add_argument_group("instead of drawing").add_argument
    add("--score", metavar="FILE", help="print each name of this file with its loss; -: of stdin")
    return parser


def main(argv=None):
    parser = flags()
    parser.guard(lambda: run(parser.parse_args(argv)))


def run(args):
    """Print what was asked for."""
    torch.set_num_threads(args.threads)
    start = normalize("NFC", args.start).lstrip()
    if args.data is not None and not args.new:
        raise ValueError("--data is the list for --new: add --new")
    if max(len(start), args.min_length) > args.max_length:
        raise ValueError(f"--start or --min-length is longer than --max-length {args.max_length}")
    try:
        pattern = re.compile(args.match)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"--match {args.match!r} is not a regular expression: {error}") from None
    net, vocab, made = load(args.model)
    batch = min(BATCH, 2**22 // len(vocab))
    if args.score is not None:
        names, unknown = read_names("/dev/stdin" if args.score == "-" else args.score), 0
        for i in range(0, len(names), batch):
            part = names[i : i + batch]
            losses = score(net, vocab, part)
            print("\n".join(f"{loss:.4f}\t{name}" for loss, name in zip(losses, part)))
            unknown += losses.count(math.inf)
        if unknown:
            remark(f"names with characters that the network does not know: {unknown:,}")
        return
    known = None
    if args.new:
        known = read_names(NAMES if args.data is None else args.data)
        if args.data is None and digest(known) != made.get("names"):
            what = "was not trained on names.txt: give --new its list with --data LIST"
            raise ValueError(f"{args.model} {what}")
    torch.manual_seed(torch.seed() if args.seed is None else args.seed)

    def sample(size):
        names = generate(net, vocab, size, start, args.temperature, args.top_k, args.max_length)
        if not names and size == batch and args.max_length == LONGEST:
            what = f"none of {size:,} names ended within {LONGEST:,} characters"
            raise ValueError(f"{args.model}: {what}")
        return names

    for name in draw(sample, args.num_samples, batch, args.min_length, pattern, known):
        print(name)


if __name__ == "__main__":
    main()
