"""Print new names, drawn character by character from a trained network."""

from plumbing import cli

if __name__ == "__main__":
    cli.as_script()  # before torch is imported: that takes a second, in which Ctrl-C may come

import bisect
import math
import os
import time
from functools import partial
from itertools import islice

import torch

from model import load, token_losses, windows
from plumbing import fast, lists
from plumbing.cli import MAX_LENGTH, MODEL, bounded, log
from plumbing.files import check_output
from plumbing.filters import apart, capitals_hint, check_flags, check_start, fitting, read_known
from plumbing.lists import composed, key, normalize
from plumbing.page import is_page, write_page

BATCH = 20_000  # names drawn at once; 8,192 would take a tenth more time, 40,000 twice the memory
MAX_LOGITS = 2**22  # for them: with a large alphabet fewer names are drawn at once
MAX_MISSES = 10**6  # draws in a row that find nothing, after which it gives up
PAUSE = 2  # seconds until it says how many were found
POOLS = 20, 100  # --best looks at so many times the names asked for; then at more, if too few


# Drawing and scoring


def generate(net, vocab, n, start="", temperature=1.0, top_k=None, max_length=MAX_LENGTH):
    """Draw n names that begin with `start`; return those of at most max_length characters.

    Each token is drawn from softmax(logits / temperature), with top_k from the top_k likeliest
    only. A name ends at the end token and is never cut: longer ones are dropped. Raises ValueError
    when `start` holds the end token or an unknown character, or a logit is not finite.
    """
    if vocab.end in start:
        raise ValueError(f"a name cannot hold {vocab.end!r}, which marks its end")
    device, T = next(net.parameters()).device, net.config["block_size"]
    tokens = torch.tensor([[0] * T + vocab.encode(composed(start))]).repeat(n, 1)
    alive = torch.arange(n)  # the names that have not come to their end
    longest = T + max_length * (2 if vocab.mark else 1)
    with fast.evaluating(net):
        while len(alive) and tokens.shape[1] <= longest:
            logits = fast.finite(fast.logits(net, tokens[alive, -T:].to(device)).double().cpu())
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
    # All as one text, which is split at the ends: decode() once, not n times.
    names = vocab.decode(tokens[:, T:].flatten().tolist()).split(vocab.end)
    return [name for name in names if 0 < len(name) <= max_length]


def score(net, vocab, names):
    """The mean loss of each name, in nats per character, the end included.

    It is infinite for a name with a character that the network does not know.
    """
    names, chars = list(map(composed, names)), vocab.tokens_of.keys() - {vocab.end}
    known = [i for i, name in enumerate(names) if chars >= set(name)]
    losses = torch.full((len(names),), math.inf, dtype=torch.float64)
    if known:
        tokens = windows([names[i] for i in known], vocab, net.config["block_size"])
        ends = (tokens[:, -1] == 0).long()
        name_ids = ends.cumsum(0) - ends  # how many names ended before each window
        sums = torch.zeros(len(known), dtype=torch.float64)
        sums.index_add_(0, name_ids, token_losses(net, tokens)[:, 0].double())
        losses[known] = fast.finite(sums) / torch.tensor([len(names[i]) + 1 for i in known])
    return losses.tolist()


def next_chances(net, vocab, text=""):
    """{character: its chance after `text`}, likeliest first; that of the end is under vocab.end."""
    T = net.config["block_size"]
    tokens = [0] * T + vocab.encode(composed(text))
    # What comes after the text, and after the text and a mark.
    contexts = torch.tensor([tokens[-T:], (tokens + [vocab.mark or 0])[-T:]])
    with fast.evaluating(net):
        after = fast.finite(net(contexts)).softmax(1)
    chances = {}
    for char, (*mark, token) in vocab.tokens_of.items():  # p(mark) * p(letter) where it is marked
        chances[char] = (after[0, mark[0]] * after[1, token] if mark else after[0, token]).item()
    return dict(sorted(chances.items(), key=lambda item: -item[1]))


# The command line


def build_parser():
    parser = cli.Parser(description=__doc__)
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
    add("--best", action="store_true", help="the best of 20 times as many, unlike each other")
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
    add("--title", metavar="TEXT", help="the heading of that page")
    return parser


def main(argv=None):
    cli.run_cli(lambda: run(*cli.parse(build_parser(), argv)))


def run(args, given):
    """Do what was asked for -> exit status."""
    check_flags(args, given)
    torch.set_num_threads(args.threads)
    net, vocab, metadata = load(args.model)
    if args.score is not None:
        return print_scores(args, net, vocab, metadata)
    if args.explain:
        return print("\n".join(explain(net, vocab, normalize(name)) for name in args.explain))
    path, known = read_known(args, metadata)
    if args.page:
        title, names = os.path.basename(path or args.data or args.model), args.new and known
        recorded = "quantiles", "lengths", "temperature"
        more = {name: metadata[name] for name in recorded if name in metadata}
        check_output(args.page, is_page, [args.model, path, args.data])
        return write_page(args.page, net, vocab, title, names, heading=args.title, **more)
    args.start = normalize(f"{args.start}|")[:-1]  # so blanks at its end stay: "de " is a beginning
    if known and vocab.tokens_of.keys() >= set(args.start):
        check_start(args.start, known)
    if args.best:
        return print_best(args, net, vocab, known)
    return print_names(args, net, vocab, known, path)


def sample_matching(args, net, vocab, known, n):
    """Yield n names that fit the flags, with --new each once.

    It ends, and says so on stderr, after MAX_MISSES draws in a row that find nothing.
    """
    if args.temperature == 0:
        raise ValueError("--temperature 0 is always the likeliest character: that is --top-k 1")
    keys = list(map(key, known)) if args.new else []
    fits, refused, start = fitting(args, args.start, keys), set(keys), args.start
    torch.manual_seed(torch.seed() if args.seed is None else args.seed)
    batch, begin, pause = min(BATCH, MAX_LOGITS // len(vocab)), time.monotonic(), PAUSE
    drawn = found = last = 0  # last: how many were drawn up to the last find
    while found < n and drawn - last < MAX_MISSES:
        # As many as should be needed, going by the share of those drawn that fitted.
        size = min(batch, (n - found) * (drawn + 1) // (found + 1))
        names = generate(net, vocab, size, start, args.temperature, args.top_k, args.max_length)
        if not names and args.max_length == MAX_LENGTH and (size == batch or args.top_k == 1):
            raise ValueError(f"{args.model}: none of {size:,} names ended within {MAX_LENGTH:,}")
        drawn += size
        for name in map(normalize, names):
            if found < n and key(name) not in refused and fits(name):
                found, last = found + 1, drawn
                if args.new:
                    refused.add(key(name))
                yield name
        hint = "" if found else capitals_hint(args.match, names)
        if time.monotonic() - begin > pause:
            log(f"{found:,} of {n:,} names found among {drawn:,} drawn{hint}")
            pause *= 2
    if found < n:
        log(f"only {found:,} of {n:,} names found among {drawn:,} drawn{hint}")


def print_best(args, net, vocab, known):
    """Print the names that fit best and are unlike each other -> 1 when there are too few."""
    n, args.new = args.num_samples, known is not None
    if not args.new:
        log(f"the list of {args.model} is not at hand: names of it may come (else --data LIST)")
    for pool in POOLS:
        names = list(dict.fromkeys(sample_matching(args, net, vocab, known, n * pool)))
        best = apart((name for _, name in sorted(zip(score(net, vocab, names), names))), n)
        if len(best) == n or len(names) < n * pool:  # or no more are to be found
            break
    for name in best:
        print(name)
    if len(best) < n:
        log(f"only {len(best):,} of {n:,} names are as unlike each other as --best has them")
    return int(len(best) < n)


def print_names(args, net, vocab, known, path):
    """Draw names and print them -> 1 when there are fewer than were asked for."""
    in_list = set() if args.new else set(map(key, known or ()))
    found = repeated = 0
    for name in sample_matching(args, net, vocab, known, args.num_samples):
        print(name)
        found, repeated = found + 1, repeated + (key(name) in in_list)
    if repeated:
        log(f"{repeated:,} of {found:,} are in {os.path.basename(path)}: --new leaves them out")
    return int(found < args.num_samples)


def print_scores(args, net, vocab, metadata):
    """For each line of a file its loss, the percentage that fits worse, and the line itself."""
    lines, quantiles = lists.read_lines(args.score), metadata.get("quantiles")
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


if __name__ == "__main__":
    main()
