"""Print new names, drawn character by character from a trained network."""

import argparse
import base64
import bisect
import gzip
import json
import math
import os
import re
import sys
import time
import warnings
from contextlib import suppress
from functools import partial
from itertools import islice

import torch

import layers
import model
from model import contexts_and_targets, load, normalize, windows

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES, MODEL = os.path.join(HERE, "names.txt"), os.path.join(HERE, "model_state.pth")
BATCH = 20_000  # names drawn at once
MAX_LENGTH = 1000  # characters of a name; a network that never ends one would go on for ever
MAX_MISSES = 10**6  # draws in a row that find nothing, after which it gives up
PAUSE = 2  # seconds until it says how many were found
POOL = 20  # --best looks at so many times the names asked for
NOT_FINITE = "the network's weights are too large or no numbers: train it anew"


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
    longest = T + max_length * (2 if vocab.mark else 1)
    while len(alive) and tokens.shape[1] <= longest:
        (rows,) = layers.distinct_rows(net, tokens[None, alive, -T:].to(device))
        logits = layers.forward(net.eval(), rows).double().cpu()
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


@torch.no_grad()
def token_losses(net, tokens, scales=(1.0,)):
    """The loss of each of N windows (N, T + 1), in nats, in eval mode: (N, S).

    Each of S scales multiplies what the network adds to its head's bias.
    """
    bias, losses = getattr(net.eval()[-1], "bias", None), []
    bias = 0.0 if bias is None else bias
    for part in tokens.split(min(8192, 2**25 // net.config["vocab_size"])):
        contexts, targets = contexts_and_targets(part.to(next(net.parameters()).device))
        logits = layers.forward(net, layers.distinct_rows(net, contexts[None])[0])
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


@torch.no_grad()
def next_chances(net, vocab, text=""):
    """{character: its chance after `text`}, likeliest first; that of the end is under vocab.end."""
    T = net.config["block_size"]
    tokens = [0] * T + vocab.encode(text)
    after = net.eval()(torch.tensor([tokens[-T:], (tokens + [vocab.mark or 0])[-T:]])).softmax(1)
    chances = {}
    for char, (*mark, token) in vocab.tokens_of.items():  # p(mark) * p(letter) where it is marked
        chances[char] = (after[0, mark[0]] * after[1, token] if mark else after[0, token]).item()
    return dict(sorted(chances.items(), key=lambda item: -item[1]))


def usual_temperature(truncate):
    """0.7 where contexts were truncated, as a short list teaches too little for 1."""
    return 0.7 if truncate else 1.0


# What both command lines share


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


# Flags that were given, and those that they exclude


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}: see --help")


def parse(parser, argv):
    """(all flags, {name: value} of those that were given)."""
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # its values win over the defaults
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not None}
    refuse_flags([name for name in given if given[name] == ""], ["start", "match"], "is empty")
    return args, given


def refuse_flags(given, allowed, why):
    for name in given:
        if name not in allowed:
            raise ValueError(f"--{name.replace('_', '-')} {why}")


# The command line of this one

MODES = {"score": ["best", "num_samples"], "explain": [], "page": ["new", "data", "column"]}


def build_parser():
    parser = Parser(description=__doc__)
    count, length = partial(bounded, int, 1, 10**9), partial(bounded, int, 1, MAX_LENGTH)
    seed, threads = partial(bounded, int, 0, 2**32 - 1), partial(bounded, int, 1, 1024)
    add = parser.add_argument_group("which names").add_argument
    add("-n", "--num-samples", type=count, metavar="N", default=20, help="how many: -n 100 (20)")
    add("--start", metavar="TEXT", default="", help="names that begin with it: --start jo")
    add("--min-length", type=count, metavar="N", default=1, help="of at least N characters")
    add("--max-length", type=length, metavar="N", default=MAX_LENGTH, help="of at most N")
    add("--match", metavar="REGEX", default="", help="that match: --match '^j.*n$', from j to n")
    add("--new", action="store_true", help="that are not in its training list, without repeats")
    add("--min-edits", type=length, metavar="D", help="new, at least D edits from any in the list")
    add("--best", action="store_true", help="the best of 20 times as many that fit all other flags")
    add("--data", metavar="LIST", help="the list it was trained on: --new --data elves.txt")
    add("--column", metavar="C", help="of a table: the number or the heading of its column")
    add = parser.add_argument_group("how they are drawn").add_argument
    add("--model", metavar="FILE", default=MODEL, help="the network: --model elves.pth")
    temperature = partial(bounded, float, 0, 1e6)
    add("--temperature", type=temperature, metavar="T", default=1.0, help="below 1 more usual: 0.7")
    add("--top-k", type=count, metavar="K", help="only from the K likeliest characters: --top-k 3")
    add("--seed", type=seed, metavar="N", help="for the same names again: --seed 1")
    add("--threads", type=threads, metavar="N", default=1, help="processor cores to use (1)")
    add = parser.add_argument_group("instead of drawing").add_argument
    add("--score", metavar="FILE", help="how well each line fits; - is standard input")
    add("--explain", nargs="+", metavar="NAME", help="where a name fits, character by character")
    add("--page", metavar="FILE", help="write a web page that draws names: --page names.html")
    return parser


def main(argv=None):
    run_cli(lambda: run(*parse(build_parser(), argv)))


def run(args, given):
    """Do what was asked for -> exit status."""
    torch.set_num_threads(args.threads)
    for mode, allowed in MODES.items():
        if mode in given:
            refuse_flags(given, ["model", "threads", mode, *allowed], f"cannot go with --{mode}")
    args.new |= args.min_edits is not None
    if args.score is not None and not args.best and "num_samples" in given:
        raise ValueError("-n goes with --score only beside --best")
    net, vocab, metadata = load(args.model)
    if args.score is not None:
        return print_scores(args, net, vocab, metadata)
    if args.explain:
        explained = [explain(net, vocab, normalize(name)) for name in args.explain]
        return print("\n".join(explained))
    known = read_known(args, metadata)
    if args.page:
        model.check_output(args.page, [args.model, args.data or NAMES])
        title = os.path.basename(args.data or (NAMES if known else args.model))
        temperature = usual_temperature(metadata.get("truncate"))
        return write_page(args.page, net, vocab, title, args.new and known, temperature)
    return print_names(args, net, vocab, known)


def read_known(args, metadata):
    """The names that the network was trained on, None where they are not at hand."""
    if args.data is None and args.column is not None:
        raise ValueError("--column is that of a list: add --data LIST")
    try:
        names = model.read_names(args.data or NAMES, args.column)
    except (OSError, ValueError):
        if args.new or args.data:
            raise
        return None
    if model.sha256(names) == metadata.get("names"):
        return names
    if args.data is None and args.new:
        raise ValueError(f"{args.model} was not trained on names.txt: add --data LIST, its list")
    if args.data:
        log(f"{args.data} is not the list that {args.model} was trained on")
    return names if args.new else None


def sample_matching(args, net, vocab, known, n):
    """Yield n names that fit the flags, with --new each once.

    It ends, and says so on stderr, after MAX_MISSES draws in a row that find nothing.
    """
    start = normalize(f"{args.start}|")[:-1]  # blanks at its end count
    if max(len(start), args.min_length) > args.max_length:
        raise ValueError(f"--start or --min-length is longer than --max-length {args.max_length}")
    if args.temperature == 0:
        raise ValueError("--temperature 0 is always the likeliest character: that is --top-k 1")
    try:
        pattern = re.compile(args.match)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"--match {args.match!r} is not a regular expression: {error}")
    if args.min_edits:
        from rapidfuzz import distance, process  # not before it is needed

        close = partial(process.extractOne, scorer=distance.Levenshtein.distance)
    torch.manual_seed(torch.seed() if args.seed is None else args.seed)
    batch, refused = min(BATCH, 2**22 // len(vocab)), set(known if args.new else ())
    begin, pause = time.monotonic(), PAUSE
    drawn = found = last = 0  # last: how many were drawn up to the last find
    while found < n and drawn - last < MAX_MISSES:
        # As many as should be needed, going by the share of those drawn that fitted.
        size = min(batch, (n - found) * (drawn + 1) // (found + 1))
        names = generate(net, vocab, size, start, args.temperature, args.top_k, args.max_length)
        if not names and args.max_length == MAX_LENGTH and (size == batch or args.top_k == 1):
            raise ValueError(f"{args.model}: none of {size:,} names ended within {MAX_LENGTH:,}")
        drawn += size
        for name in map(normalize, names):
            fits = args.min_length <= len(name) <= args.max_length and name.startswith(start)
            if found == n or name in refused or not (fits and pattern.search(name)):
                continue
            if args.min_edits and close(name, known, score_cutoff=args.min_edits - 1):
                continue
            if args.new:
                refused.add(name)
            found, last = found + 1, drawn
            yield name
        if time.monotonic() - begin > pause:
            log(f"{found:,} of {n:,} names found among {drawn:,} drawn")
            pause *= 2
    if found < n:
        log(f"only {found:,} of {n:,} names found among {drawn:,} drawn")


def print_names(args, net, vocab, known):
    """Draw names and print them -> 1 when there are fewer than were asked for."""
    n, in_list = args.num_samples, set() if args.new else set(known or ())  # --new draws none
    names = sample_matching(args, net, vocab, known, n * (POOL if args.best else 1))
    if args.best:
        names = list(dict.fromkeys(names))
        names = [name for _, name in sorted(zip(score(net, vocab, names), names))][:n]
    found = repeated = 0
    for name in names:
        print(name)
        found, repeated = found + 1, repeated + (name in in_list)
    if args.best and found < n:
        log(f"only {found:,} of {n:,} different names found")
    if repeated:
        log(f"{repeated:,} of {found:,} are in {args.data or 'names.txt'}: --new leaves them out")
    return int(found < n)


def print_scores(args, net, vocab, metadata):
    """For each line of a file its loss, the percentage that fits worse, and the line itself."""
    lines, quantiles = model.read_lines(args.score), metadata.get("quantiles")
    unknown, rows = 0, set()
    while part := list(islice(lines, 10_000)):
        losses = score(net, vocab, [normalize(line) for line in part])
        for loss, line in zip(losses, part):
            worse = max(0, 100 - bisect.bisect_left(quantiles, loss)) if quantiles else "-"
            row = f"{loss:.4f}\t{worse}\t{line}" if normalize(line) else ""
            unknown += loss == math.inf
            if not args.best:
                print(row)
            elif row:
                rows.add((loss, line, row))
    for _, _, row in sorted(rows)[: args.num_samples]:
        print(row)
    if unknown:
        log(f"names with characters that the network does not know: {unknown:,}")


def explain(net, vocab, name):
    """A line for each character: its chance after the text so far, and the five likeliest."""
    vocab.encode(name)  # an unknown character is reported before anything is printed
    if not 0 < len(name) <= MAX_LENGTH or vocab.end in name:
        raise ValueError(f"{name[:60]!r} is not a name that this network can make")
    shown, rows = {vocab.end: "end", " ": "blank"}, []
    for i, char in enumerate(name + vocab.end):
        chances = next_chances(net, vocab, name[:i])
        likeliest = ", ".join(f"{shown.get(c, c)} {p:.0%}" for c, p in islice(chances.items(), 5))
        step, loss = f"{name[:i]}[{shown.get(char, char)}]", -math.log(max(chances[char], 1e-300))
        rows.append((loss, f"{step:{len(name) + 6}} {chances[char]:6.1%}", likeliest))
    total, worst = sum(loss for loss, *_ in rows), max(rows)[0]
    lines = [f"{name}: {total / len(rows):.4f} nats per character"]
    for loss, step, likeliest in rows:
        weakest = " <- weakest" if loss == worst else ""
        lines.append(f"{step}  {loss / total:4.0%} of the loss  {likeliest}{weakest}")
    return "\n".join(lines)


# A page that draws names


def packed(tensor):
    """A vector as base64 of float32; a matrix as int8 with one float32 scale per row."""
    if tensor.dim() == 1:
        return base64.b64encode(tensor.numpy().tobytes()).decode()
    scale = tensor.abs().amax(1).clamp(min=1e-30) / 127
    values = base64.b64encode((tensor / scale.unsqueeze(1)).round().char().numpy().tobytes())
    sizes = {"rows": len(tensor), "columns": tensor.shape[1]}
    return sizes | {"scale": packed(scale), "values": values.decode()}


@torch.no_grad()
def page_layers(net):
    """The layers in eval mode as plain values, each BatchNorm1d folded into the Linear before."""
    stack = []
    for layer in net:
        entry = {"class": type(layer).__name__, "n": getattr(layer, "n", None)}
        entry |= {"bias": None} | dict(layer.named_parameters())
        if isinstance(layer, layers.BatchNorm1d):
            scale = layer.weight * (layer.running_var + layer.eps).rsqrt()
            entry |= {"weight": scale, "bias": layer.bias - layer.running_mean * scale}
            if stack[-1]["class"] == "Linear":
                linear = stack.pop()
                bias = 0.0 if linear["bias"] is None else linear["bias"]
                linear["weight"] = linear["weight"] * scale.unsqueeze(1)
                entry = linear | {"bias": entry["bias"] + scale * bias}
        stack += [entry] * (entry["class"] != "Dropout")
    return [{k: packed(v) if torch.is_tensor(v) else v for k, v in e.items()} for e in stack]


def write_page(path, net, vocab, title, names, temperature=1.0):
    """Fill sampling.html with the network, and with the list where only new names are wanted."""
    known = [layers.Embedding, layers.FlattenConsecutive, layers.Linear]
    known += [layers.BatchNorm1d, layers.Tanh, layers.Dropout]
    stacked = type(net).forward is torch.nn.Sequential.forward
    if not stacked or any(type(layer) not in known for layer in net):
        raise ValueError("--page knows only the layers of layers.py, and this network has others")
    with open(os.path.join(HERE, "sampling.html"), encoding="utf-8") as file:
        page = file.read()
    network = {"config": net.config, "chars": list(vocab.chars), "mark": vocab.mark or -1}
    network |= {"title": title, "temperature": temperature, "layers": page_layers(net)}
    network["names"] = names and base64.b64encode(gzip.compress("\n".join(names).encode())).decode()
    if names:
        log(f"the page holds the list of {len(names):,} names: mind who may see it")
    filled = json.dumps(network).replace("<", "\\u003c")  # no text in it ends the script
    model.atomic_write(path, page.replace('id="network">null<', f'id="network">{filled}<').encode())


if __name__ == "__main__":
    main()
