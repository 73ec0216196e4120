"""Print new names, drawn character by character from a trained network."""

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from functools import partial
from itertools import islice

import torch

from layers import distinct_rows, forward
from model import contexts_and_targets, load, normalize, read_lines, read_names, sha256, windows

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES, MODEL = os.path.join(HERE, "names.txt"), os.path.join(HERE, "model_state.pth")
BATCH = 8192  # names drawn at once
MAX_LENGTH = 1000  # characters of a name; a network that never ends one would go on for ever
MAX_MISSES = 10**6  # draws in a row that find nothing, after which it gives up
NOT_FINITE = "the network's weights are too large or no numbers: train it anew"
PAUSE = 2  # seconds until it says how many were found


# Drawing and scoring


@torch.no_grad()
def generate(net, vocab, n, start="", temperature=1.0, top_k=None, max_length=MAX_LENGTH):
    """Draw n names that begin with `start`; return those of at most max_length characters.

    Each token is drawn from softmax(logits / temperature), with top_k from the top_k likeliest
    only. A name ends at the end token and is never cut: longer ones are dropped. Raises ValueError
    when `start` holds the end token or an unknown character, or the weights are not finite.
    """
    if vocab.end in start:
        raise ValueError(f"a name cannot hold {vocab.end!r}, which marks its end")
    device, T = next(net.parameters()).device, net.config["block_size"]
    tokens = torch.tensor([[0] * T + vocab.encode(start)]).repeat(n, 1)
    alive = torch.arange(n)  # the names that have not come to their end
    limit = T + max_length * (2 if vocab.mark else 1)
    while len(alive) and tokens.shape[1] <= limit:
        contexts = tokens[alive, -T:].to(device)
        (rows,) = distinct_rows(net, contexts[None])
        logits = forward(net.eval(), rows).double().cpu()
        if not logits.isfinite().all():
            raise ValueError(NOT_FINITE)
        if tokens.shape[1] == T:
            logits[:, 0] = -math.inf  # a name has at least one character
        if top_k is not None and top_k < len(vocab):
            logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
        # With the highest logit at 0, no temperature makes exp() overflow.
        chances = ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)
        column = torch.zeros(n, 1, dtype=torch.int64)
        column[alive] = torch.multinomial(chances, 1)
        tokens = torch.cat((tokens, column), 1)
        alive = alive[column[alive, 0] != 0]
    tokens[alive] = 0
    names = vocab.decode(tokens[:, T:].flatten().tolist()).split(vocab.end)
    return [name for name in names if 0 < len(name) <= max_length]


def sample_matching(sample, n, batch=BATCH, min_length=1, pattern=re.compile(""), known=None):
    """Yield n names that sample(size <= batch) draws: those long enough that match the pattern.

    With `known`, only names that are not in there, each once. It ends, and says so on stderr, after
    MAX_MISSES draws in a row that find nothing; after 2, 4, 8 ... seconds the count is shown.
    """
    begin, pause, seen = time.monotonic(), PAUSE, set(known or ())
    drawn = found = last = 0  # last: how many were drawn up to the last find
    while found < n and drawn - last < MAX_MISSES:
        # As many as should be needed, going by the share of those drawn that were wanted.
        size = min(batch, (n - found) * (drawn + 1) // (found + 1))
        drawn += size
        for name in map(normalize, sample(size)):
            if found < n and len(name) >= min_length and name not in seen and pattern.search(name):
                found, last = found + 1, drawn
                if known is not None:
                    seen.add(name)
                yield name
        if time.monotonic() - begin > pause:
            log(f"{found:,} of {n:,} names found among {drawn:,} drawn")
            pause *= 2
    if found < n:
        log(f"only {found:,} of {n:,} names found among {drawn:,} drawn")


@torch.no_grad()
def token_losses(net, tokens, scales=(1.0,)):
    """The loss of each of N windows (N, T + 1), in nats, in eval mode: (N, S).

    Each of S scales multiplies what the network adds to its head's bias.
    """
    bias, losses = getattr(net.eval()[-1], "bias", None), []
    bias = 0.0 if bias is None else bias
    for part in tokens.split(min(8192, 2**25 // net.config["vocab_size"])):
        contexts, targets = contexts_and_targets(part.to(next(net.parameters()).device))
        (rows,) = distinct_rows(net, contexts[None])
        logits = forward(net, rows)
        log_probs = [(bias + scale * (logits - bias)).log_softmax(1) for scale in scales]
        losses.append(torch.cat([-each.gather(1, targets.unsqueeze(1)) for each in log_probs], 1))
    return torch.cat(losses).cpu()


def score(net, vocab, names):
    """The mean loss of each name, in nats per character, the end included.

    It is infinite for a name with a character that the network does not know.
    """
    chars = vocab.tokens_of.keys() - {vocab.end}
    known = [i for i, name in enumerate(names) if chars >= set(name)]
    losses = torch.full((len(names),), math.inf, dtype=torch.float64)
    if known:
        tokens = windows([names[i] for i in known], vocab, net.config["block_size"])
        ends = (tokens[:, -1] == 0).long()
        sums = torch.zeros(len(known), dtype=torch.float64)
        sums.index_add_(0, ends.cumsum(0) - ends, token_losses(net, tokens)[:, 0].double())
        if not sums.isfinite().all():
            raise ValueError(NOT_FINITE)
        losses[known] = sums / torch.tensor([len(names[i]) + 1 for i in known])
    return losses.tolist()


# What both command lines share


def log(message):
    """One line on stderr, what is not printable escaped, whether anybody listens or not."""
    shown = (char if char.isprintable() else repr(char)[1:-1] for char in message)
    with suppress(OSError):
        print("".join(shown), file=sys.stderr or open(os.devnull, "w"), flush=True)


def fail(message):
    """The end of the command: one line on stderr, exit status 2."""
    log(f"{os.path.basename(sys.argv[0])}: error: {message}")
    sys.exit(2)


def command(*words):
    """The command line to type for `python WORDS ...`."""
    return f"python {subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)}"


def new_parser(description):
    wide = partial(argparse.HelpFormatter, max_help_position=28, width=100)
    parser = argparse.ArgumentParser(description=description, formatter_class=wide)
    parser.error = fail
    return parser


def bounded(kind, low, high):
    """An argparse type: a number of `kind` from low to high."""

    def number(text):  # argparse shows this name: invalid number value
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not from {low} to {high}")
        return value

    return number


def run_cli(function):
    """function(), where every error that a user can mend is one line on stderr, with status 2."""
    warnings.simplefilter("ignore")  # from libraries: users could do nothing about them
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed before the start
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        encoding = None if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        function()
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError) as error:  # the reader may have had enough
        sys.stdout = open(os.devnull, "w")  # nothing more to flush at the end
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 141)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")
        fail(f"{error.filename or 'standard output'} cannot be used: {error.strerror or error}")
    except ValueError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        fail("there is not enough memory: close other programs, or choose smaller sizes")


# The command line of this one


def build_parser():
    parser = new_parser(__doc__)
    add = parser.add_argument_group("which names").add_argument
    count, length = bounded(int, 1, 10**9), bounded(int, 1, MAX_LENGTH)
    add("-n", "--num-samples", type=count, metavar="N", default=20, help="how many (20)")
    add("--start", metavar="TEXT", default="", help="names that begin with this text")
    add("--min-length", type=count, metavar="N", default=1, help="of at least N characters")
    add("--max-length", type=length, metavar="N", default=MAX_LENGTH, help="of at most N")
    add("--match", metavar="REGEX", default="", help="in which this regular expression is found")
    add("--new", action="store_true", help="that are not in the list it was trained on, each once")
    add("--data", metavar="LIST", help="the list for --new (names.txt)")
    add("--column", metavar="C", help="of a table: the number or the heading of its column")
    add = parser.add_argument_group("how they are drawn").add_argument
    add("--model", metavar="FILE", default=MODEL, help="the network, as train.py wrote it")
    positive = bounded(float, 1e-6, 1e6)
    add("--temperature", type=positive, metavar="T", default=1.0, help="below 1 more usual names")
    add("--top-k", type=count, metavar="K", help="only from the K likeliest characters")
    seed, threads = bounded(int, 0, 2**32 - 1), bounded(int, 1, 1024)
    add("--seed", type=seed, metavar="N", help="for the same names again")
    add("--threads", type=threads, metavar="N", default=1, help="processor cores to use (1)")
    add = parser.add_argument_group("instead of drawing").add_argument
    add("--score", metavar="FILE", help="print each name of this file with its loss; -: of stdin")
    return parser


def main(argv=None):
    parser = build_parser()
    run_cli(lambda: run(parser.parse_args(argv)))


def print_scores(path, net, vocab, batch):
    """For each line of a file that holds a name: its loss, tab, the name."""
    names, unknown = filter(None, map(normalize, read_lines(path))), 0
    while part := list(islice(names, batch)):
        losses = score(net, vocab, part)
        print("\n".join(f"{loss:.4f}\t{name}" for loss, name in zip(losses, part)))
        unknown += losses.count(math.inf)
    if unknown:
        log(f"names with characters that the network does not know: {unknown:,}")


def known_names(args, metadata):
    """The list that the network was trained on."""
    names = read_names(args.data or NAMES, args.column)
    if args.data is None and sha256(names) != metadata.get("names"):
        raise ValueError(f"{args.model} was not trained on names.txt: add --data LIST, its list")
    return names


def run(args):
    """Print what was asked for."""
    torch.set_num_threads(args.threads)
    start = normalize(f"{args.start}|")[:-1]  # blanks at its end count
    if not args.new and (args.data is not None or args.column is not None):
        raise ValueError("--data and --column are about the list for --new: add --new")
    if max(len(start), args.min_length) > args.max_length:
        raise ValueError(f"--start or --min-length is longer than --max-length {args.max_length}")
    try:
        pattern = re.compile(args.match)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"--match {args.match!r} is not a regular expression: {error}")
    net, vocab, metadata = load(args.model)
    batch = min(BATCH, 2**22 // len(vocab))
    if args.score is not None:
        return print_scores(args.score, net, vocab, batch)
    known = known_names(args, metadata) if args.new else None
    torch.manual_seed(torch.seed() if args.seed is None else args.seed)

    def sample(size):
        names = generate(net, vocab, size, start, args.temperature, args.top_k, args.max_length)
        if not names and size == batch and args.max_length == MAX_LENGTH:
            raise ValueError(f"{args.model}: none of {size:,} names ended within {MAX_LENGTH:,}")
        return names

    for name in sample_matching(sample, args.num_samples, batch, args.min_length, pattern, known):
        print(name)


if __name__ == "__main__":
    main()
