"""Train the network on a list of names and write model_state.pth."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported

import io
import math
import os
import random
import shlex
import sys
from contextlib import contextmanager, suppress
from textwrap import shorten

import torch
from filelock import FileLock, Timeout
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from layers import BatchNorm1d, backward_shared, forward_shared, share
from model import LARGEST_BLOCK, Vocabulary, WaveNet, check, contexts_and_targets, digest, read_names, read_tensors, save
from model import windows, write, write_tensors
from sampling import MAX_SEED, MODEL, NAMES, TINY, Parser, generate, interrupt, number, on_signals, remark

def split(names):
    """Rows -> (train, test, validation): shuffled, then 80 %, 10 % and 10 % of them."""
    names = list(names)
    random.Random(42).shuffle(names)
    a, b = int(0.8 * len(names)), int(0.9 * len(names))
    parts = names[:a], names[a:b], names[b:]
    if not all(parts):
        raise ValueError(f"{len(names)} names are too few to split in three: give at least 10")
    return parts


def chunk_size(args):
    """How many steps' minibatches are drawn at once: a hundred cost hardly more than one, if they are small."""
    return max(1, min(100, 2**22 // (args.batch_size * args.block_size)))


def seed_of(step, args):
    """What is drawn at a step depends on it and --seed alone: so a resumed training draws the same."""
    return args.seed * 10**9 + step


def draw(window, vocab_size, first, args):
    """The minibatches of windows from step `first` on, drawn at random: a list of (tree, targets (B,))."""
    generator = torch.Generator().manual_seed(seed_of(first, args))
    index = torch.randint(len(window), (chunk_size(args), args.batch_size), generator=generator)
    contexts, targets = contexts_and_targets(window[index])
    return list(zip(share(contexts.to(args.device), vocab_size), targets.to(args.device)))


def learning_rate(step, steps, lr):
    """lr for the first half of the steps, a tenth of it for the second."""
    return lr if step < steps // 2 else lr / 10


def cross_entropy(logits, targets):
    """Logits (B, V), targets (B,) -> mean loss in nats, and its gradient (softmax - one-hot) / B."""
    targets = targets.unsqueeze(1)
    log_probs = logits.log_softmax(1)
    loss = -log_probs.gather(1, targets).mean().item()
    return loss, log_probs.exp().scatter_(1, targets, -1.0, reduce="add").div_(len(targets))


@torch.inference_mode()  # every operation takes less time than under no_grad
def sgd_step(net, parameters, tree, targets, lr):
    """One step of plain SGD on one minibatch -> its loss."""
    loss, grad = cross_entropy(forward_shared(net, tree), targets)
    backward_shared(net, tree, grad)
    for parameter in parameters:
        parameter.sub_(parameter.grad, alpha=lr)
    return loss


@torch.no_grad()
def predictions(net, window, batch_size=8192):
    """Yield logits (B, V) of the network in eval mode and targets (B,), for all windows."""
    device, training = net[0].weight.device, net.training
    net.eval()
    for part in window.split(batch_size):
        contexts, targets = contexts_and_targets(part)
        (tree,) = share(contexts[None].to(device), len(net[0].weight))
        yield forward_shared(net, tree), targets.to(device)
    net.train(training)


def evaluate(net, window, batch_size=8192):
    """Mean loss, in nats a character, of the network in eval mode over all windows."""
    batches = predictions(net, window, batch_size)
    return sum(F.cross_entropy(*batch, reduction="sum").item() for batch in batches) / len(window)


@torch.no_grad()
def calibrate(net, window):
    """Scale the logits to the least loss over the windows: temperature scaling, arXiv:1706.04599.

    What it has learnt by heart makes a network too sure of what it has not seen. The scale stays within
    0.8 to 1.25, as the few names that a short list has for validation say little.
    """
    scale = 1.0
    for _ in range(4):  # of Newton's method: the loss is convex in the scale
        slope = curvature = 0.0
        # Each time anew: the logits of all windows, of a large vocabulary, might not fit into the memory.
        for logits, targets in predictions(net, window):
            probs = (scale * logits).softmax(1)
            mean = (probs * logits).sum(1, keepdim=True)
            slope += (mean - logits.gather(1, targets.unsqueeze(1))).sum().item()
            curvature += (probs * (logits - mean).square()).sum().item()
        scale = min(max(scale - slope / max(curvature, TINY), 0.8), 1.25)
    net[-1].weight.mul_(scale)
    net[-1].bias.mul_(scale)


@torch.no_grad()
def train(net, train_windows, val_windows, args, state=None, keep=lambda state: None, stopped=lambda: False):
    """Plain SGD; it ends with the mean of the weights over the last quarter of the steps in the network.

    Returns the curves {"train": [(step, smoothed loss)], "val": [(step, loss)]} for the picture. Every
    args.checkpoint_every steps, and after the last, keep(state) is given all that is needed to go on from
    there, as `state`, to the very same bits; when stopped(), once more, and None is returned.
    Raises FloatingPointError when the loss or a weight is no longer a finite number.
    """
    parameters, average = list(net.parameters()), AveragedModel(net)
    start, loss_sum, curves = 0, 0.0, {"train": [], "val": []}
    if state:
        start, loss_sum, curves = state["step"], state["loss_sum"], state["curves"]
        net.load_state_dict(state["state_dict"])
        average.load_state_dict(state["average"])

    for layer in net:
        if isinstance(layer, BatchNorm1d):
            layer.track_running_stats = False  # only eval mode needs them, and then they are measured
    late, every, chunk = args.steps - max(1, args.steps // 4), max(1, args.steps // 200), chunk_size(args)
    net.train()
    with tqdm(total=args.steps, initial=start, unit="step", smoothing=0.05, disable=None) as bar:
        for step in range(start, args.steps):
            if step % chunk == 0 or step == start:
                batches = draw(train_windows, len(net[0].weight), step - step % chunk, args)
            torch.manual_seed(~seed_of(step, args))  # for Dropout: not the numbers that drew the windows
            loss = sgd_step(net, parameters, *batches[step % chunk], learning_rate(step, args.steps, args.lr))
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step + 1}")
            # Neighbouring weights are nearly the same, so every tenth step is enough for their mean.
            if step >= late and (args.steps - 1 - step) % 10 == 0:
                average.update_parameters(net)
            loss_sum += loss
            done = step + 1
            if done % every == 0:
                curves["train"].append((done, loss_sum / every))
                loss_sum = 0.0
            validate = done % max(every * 5, 1000) == 0
            if validate:
                recompute_statistics(net, train_windows, batches=1)
                curves["val"].append((done, evaluate(net, val_windows)))
            stop = stopped()
            if done % args.checkpoint_every == 0 or done == args.steps or stop:
                try:
                    check(net.state_dict(), net)
                except ValueError as error:
                    raise FloatingPointError(f"{error} at step {done}") from None
                keep(
                    {
                        "step": done,
                        "loss_sum": loss_sum,
                        "curves": curves,
                        "state_dict": dict(net.state_dict()),
                        "average": dict(average.state_dict()),
                    }
                )
            if stop:
                return None
            bar.update()
            if validate or done % every == 0:
                losses = ", ".join(f"{part} {curve[-1][1]:.3f}" for part, curve in curves.items() if curve)
                bar.set_postfix_str(losses, refresh=False)
                if bar.disable and validate:
                    remark(f"step {done:,} of {args.steps:,}: {losses}")
    net.load_state_dict(average.module.state_dict())
    recompute_statistics(net, train_windows, batches=16)
    return curves


def check_state(state, net, steps):
    """Raises ValueError unless `state` can be one that train() gave away for this network and these steps."""
    curves = state["curves"]
    points = [*curves["train"], *curves["val"], (state["step"], state["loss_sum"])]
    if any(type(step) is not int or not 0 < step <= steps or not math.isfinite(loss) for step, loss in points):
        raise ValueError("its steps and losses are impossible")
    check(state["state_dict"], net)
    check(state["average"], AveragedModel(net))


@torch.no_grad()
def recompute_statistics(net, window, batches, batch_size=8192):
    """BatchNorm1d's running statistics over windows drawn at random, always the same; arXiv:1803.05407."""
    generator, training = torch.Generator().manual_seed(0), net.training
    norms = [layer for layer in net if isinstance(layer, BatchNorm1d)]
    net.eval()  # no Dropout
    for norm in norms:
        norm.train().num_batches_tracked.zero_()
        norm.momentum, momentum = None, norm.momentum
        norm.track_running_stats, tracked = True, norm.track_running_stats
    for _ in range(batches):
        contexts, _ = contexts_and_targets(window[torch.randint(len(window), (1, batch_size), generator=generator)])
        (tree,) = share(contexts.to(net[0].weight.device), len(net[0].weight))
        forward_shared(net, tree)
    for norm in norms:
        norm.momentum, norm.track_running_stats = momentum, tracked
    net.train(training)


def plot(path, curves, losses):
    """Write the picture of the curves, with the validation loss of the finished network as a line."""
    from matplotlib.figure import Figure  # slow to import: not before it is needed

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curves["train"]), label="training, smoothed")
    if curves["val"]:
        axes.plot(*zip(*curves["val"]), label="validation")
    axes.axhline(losses["val"], color="black", linewidth=0.8, label="validation, finished network")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a character)")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write(path, buffer.getvalue())


def flags():
    """The parser of the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default=NAMES, help="a text file, one name a line (names.txt)")
    parser.add_argument("--out", default=MODEL, help="where the network goes (model_state.pth)")
    parser.add_argument("--steps", type=number(int, 1, 10**12), default=200_000, help="SGD steps (200000)")
    parser.add_argument("--batch-size", type=number(int, 2, 10**6), default=96, help="windows a step (96)")
    parser.add_argument("--block-size", type=number(int, 2, LARGEST_BLOCK), default=16, help="characters seen, a power of two (16)")
    parser.add_argument("--n-embd", type=number(int, 1, 10**5), default=24, help="size of a character's vector (24)")
    parser.add_argument("--n-hidden", type=number(int, 1, 10**5), default=280, help="size of each level (280)")
    parser.add_argument("--lr", type=number(float, TINY, 1 / TINY), default=0.1, help="learning rate; a tenth of it in the second half (0.1)")
    parser.add_argument("--dropout", type=number(float, 0, 0.99), default=0.15, help="share of each level's channels left out (0.15)")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=1, help="the same weights at every run (1)")
    parser.add_argument("--threads", type=number(int, 1, 1024), default=1, help="processor cores to use (1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"], help="where to train (cpu)")
    parser.add_argument("--checkpoint-every", type=number(int, 1, 10**12), default=3000, help="steps between saves (3000)")
    parser.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    return parser


# The flags that make a training what it is: --resume cannot change them. Threads are among them, since sums
# are rounded in another way when they are shared out.
OF_THE_RUN = "steps batch_size block_size n_embd n_hidden lr dropout seed threads device".split()
STATE = {"step": int, "loss_sum": float, "curves": dict, "state_dict": dict, "average": dict, "names": str, "flags": dict}
REMEMBERED = OF_THE_RUN + ["checkpoint_every", "data"]


def resumed(parser, argv, unfinished):
    """The state in the file `unfinished`, and its flags with those of argv over them.

    Raises ValueError when there is none, or when a flag in argv would make it another training.
    """
    state = read_tensors(unfinished, STATE, "there is nothing to resume")
    saved = {name: state["flags"].get(name) for name in REMEMBERED}
    before = parser.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in saved.items()])
    parser.set_defaults(**{name: getattr(before, name) for name in REMEMBERED})
    after = parser.parse_args(argv)
    for name in OF_THE_RUN:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {new} contradicts the unfinished training's {flag} {old}")
    return state, after


def files_of(args):
    """The files of a training beside the network, args.out -> its picture, its unfinished state, their lock.

    Raises ValueError when one of them is no file, or could be another one that the user needs.
    """
    stem, ending = os.path.splitext(args.out)
    files = f"{stem}.png", f"{args.out}.unfinished", f"{args.out}.unfinished.lock"
    for path in args.out, *files:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is a folder or a device: choose another --out")
    if os.path.exists(files[-1]) and os.path.getsize(files[-1]):
        raise ValueError(f"{files[-1]} is another program's: choose another --out")
    if os.path.realpath(args.data) in (args.out, *files) or ending in (".png", ".unfinished", ".lock"):
        raise ValueError(f"--out {args.out} would overwrite a file of another kind: choose another, such as own.pth")
    if not os.path.isdir(os.path.dirname(args.out)):
        raise ValueError(f"{args.out} cannot be written (no such folder): choose another --out")
    return files


@contextmanager
def locked(path, remove):
    """Nobody else is inside for the same path. At the end the lock's file is removed, if this run made it, or told to."""
    remove = remove or not os.path.exists(path)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another training holds {path}: choose another --out") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another --out") from None
    try:
        yield
    finally:
        if remove:
            with suppress(OSError):
                os.remove(path)
        lock.release()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = flags()
    with parser.one_line_errors():
        args, state = parser.parse_args(argv), None
        args.out = os.path.realpath(args.out)  # a link stays a link
        picture, unfinished, lock = files_of(args)
        with locked(lock, remove=args.resume):
            if args.resume:
                out = args.out
                state, args = resumed(parser, argv, unfinished)
                args.out = out
                files_of(args)
            elif os.path.exists(unfinished):
                raise ValueError(f"{unfinished} is of an unfinished training: add --resume to go on, or delete it")
            try:
                run(args, state, picture, unfinished)
            except KeyboardInterrupt:
                if os.path.exists(unfinished):
                    remark(f"stopped; to go on: python train.py --out {shlex.quote(args.out)} --resume")
                raise


def run(args, state, picture, unfinished):
    """The whole training: from the list of names to the network, its picture and a few names."""
    torch.set_num_threads(args.threads)
    if args.device != "cpu" and not getattr(torch, args.device).is_available():
        raise ValueError(f"this machine has no device {args.device!r}: leave out --device")
    names = read_names(args.data)
    if state and digest(names) != state["names"]:
        raise ValueError(f"the names in {args.data} are not those of the unfinished training: give its list with --data")
    parts = dict(zip(("train", "test", "val"), split(names)))
    known = set(parts["train"])
    if unseen := [name for name in parts["val"] if name not in known]:
        parts["unseen"] = unseen
    vocab = Vocabulary(names)
    views = {part: windows(some, vocab, args.block_size) for part, some in parts.items()}
    sizes = dict(vocab_size=len(vocab), block_size=args.block_size, n_embd=args.n_embd, n_hidden=args.n_hidden)
    parameters = refuse_too_large(sizes)
    torch.manual_seed(args.seed)
    net = WaveNet(**sizes, dropout=args.dropout).to(args.device)
    remark(
        f"{len(names):,} rows, {len(set(names)):,} distinct, {len(vocab) - 1} characters; "
        f"windows: {', '.join(f'{part} {len(view):,}' for part, view in views.items())}; {parameters:,} parameters"
    )
    if state:
        try:
            check_state(state, net, args.steps)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = shorten(str(error), 80)
            raise ValueError(f"{unfinished} does not fit its flags ({what}): choose another --out") from None
    of_the_run = {name: getattr(args, name) for name in OF_THE_RUN}
    remembered = of_the_run | {"checkpoint_every": args.checkpoint_every, "data": os.path.abspath(args.data)}

    def keep(state):
        write_tensors(unfinished, state | {"names": digest(names), "flags": remembered})

    caught = []
    try:
        with on_signals(caught.append):
            curves = train(net, views["train"], views["val"], args, state, keep, lambda: caught)
        if caught:
            interrupt(caught[0])

        # The finished network is the same without its Dropout.
        plain = WaveNet(**sizes)
        plain.load_state_dict(dict(zip(plain.state_dict(), net.cpu().state_dict().values(), strict=True)))
        calibrate(plain, views["val"])
        losses = {part: evaluate(plain, view) for part, view in views.items()}
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError("the losses of the finished network are not finite")
    except FloatingPointError as error:
        hint = f"; the last good state is in {unfinished}" if os.path.exists(unfinished) else ""
        raise ValueError(f"{error}: --lr {args.lr} is too high{hint}") from None

    made = of_the_run | {"names": digest(names), "rows": len(names), "losses": losses, "torch": str(torch.__version__)}
    save(args.out, plain, vocab, made)
    try:
        plot(picture, curves, losses)
    except Exception as error:  # whatever matplotlib may stumble over, the network is what counts
        remark(f"no picture: {error}")
        picture = "no picture"
    with suppress(FileNotFoundError):
        os.remove(unfinished)
    print("  ".join(f"{part:>6}" for part in losses))
    print("  ".join(f"{loss:6.4f}" for loss in losses.values()), "nats a character")
    print("\n".join(generate(plain.eval(), vocab, 10)))
    print(f"written: {args.out} and {picture}")


def refuse_too_large(sizes):
    """The parameters of a network of these sizes. Raises ValueError when this machine's memory is too small for it."""
    with torch.device("meta"):  # where they take no memory
        parameters = sum(parameter.numel() for parameter in WaveNet(**sizes).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    needed = 20 * parameters  # four bytes for each weight, its gradient, its mean, and two copies when they are saved
    if needed > memory:
        raise ValueError(f"{parameters:,} parameters need {needed / 1e9:,.0f} GB of memory: take a smaller --n-hidden")
    return parameters


if __name__ == "__main__":
    main()
