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
from contextlib import contextmanager, nullcontext, suppress
from itertools import accumulate
from textwrap import shorten

import torch
from filelock import FileLock, Timeout
from torch import distributed
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from layers import BatchNorm1d, all_reduce, backward_distinct, forward_distinct, distinct_rows
from model import (
    LARGEST_BLOCK,
    Vocabulary,
    WaveNet,
    batched,
    check,
    contexts_and_targets,
    digest,
    load,
    out_of_memory,
    read_names,
    read_tensors,
    save,
    transfer,
    windows,
    write,
    write_tensors,
)
from sampling import (
    MAX_SEED,
    MODEL,
    NAMES,
    TINY,
    Parser,
    generate,
    interrupt,
    nobody,
    number,
    on_signals,
    remark,
)

VALIDATED = 50_000  # windows, at most, for the curve of the validation losses and all that is chosen by them
MEASURED = 430_000  # windows, at most, of a split for its loss: the standard error is then below 0.002 nats
SCALES = [0.5 + 0.05 * i for i in range(17)]  # of the logits, from 0.5 to 1.3


def split(names):
    """Rows -> (train, test, validation): shuffled, then 80 %, 10 % and 10 % of them."""
    names = list(names)
    random.Random(42).shuffle(names)
    a, b = int(0.8 * len(names)), int(0.9 * len(names))
    parts = names[:a], names[a:b], names[b:]
    if not all(parts):
        raise ValueError(f"{len(names)} names are too few to split in three: give at least 10")
    return parts


def first_rows(names, n):
    """As many of the first names as make at most n windows."""
    for i, end in enumerate(accumulate(len(name) + 1 for name in names)):
        if end > n:
            return names[: max(i, 1)]
    return names


def recipe(n, begun=False):
    """The flags that suit a list of n training windows, measured on lists of many sizes: tests/RESULTS.md.

    What was begun from a trained network takes half the steps.
    """
    steps = min(200_000, 10_000 + n * 11 // 10)
    return {"dropout": round(min(0.3, 3.1 / n**0.25), 3), "steps": steps // 2 if begun else steps}


def cut_share(dropout):
    """The share of contexts that training cuts short, where it leaves out this share of channels."""
    return min(0.8, max(0.0, 6 * (dropout - 0.15)))


def chunk_size(args):
    """How many steps' minibatches are drawn at once: a hundred cost hardly more than one, if they are small."""
    return max(1, min(100, 2**22 // (args.batch_size * args.block_size)))


def seed_of(step, args):
    """What is drawn at a step depends on it and --seed alone: so a resumed training draws the same."""
    return args.seed * 10**9 + step


def draw(window, vocab_size, first, args):
    """The minibatches of windows from step `first` on, drawn at random: a list of (tree, targets (B,))."""
    generator = torch.Generator().manual_seed(seed_of(first, args))
    shape = chunk_size(args), args.batch_size
    contexts, targets = contexts_and_targets(window[torch.randint(len(window), shape, generator=generator)])
    # Dropout of what is far away: of some contexts only the last 2 to 8 characters are left. So what is often
    # seen behind a few characters is learnt from every place where they stand, as by counts of n-grams.
    left = torch.randint(2, 9, (*shape, 1), generator=generator)
    left[torch.rand(left.shape, generator=generator) >= cut_share(args.dropout)] = args.block_size
    contexts *= torch.arange(args.block_size, 0, -1) <= left
    trees = distinct_rows(mine(contexts).to(args.device), vocab_size, args.batch_size)
    return list(zip(trees, mine(targets).to(args.device)))


def grouped():
    """Whether this is one of several processes of torchrun that train together."""
    return distributed.is_available() and distributed.is_initialized()


def rank():
    return distributed.get_rank() if grouped() else 0


def mine(minibatches):
    """What this process computes of minibatches (K, B, ...)."""
    return minibatches[:, rank() :: distributed.get_world_size() if grouped() else 1]


def from_all(value):
    """The values that the processes have, in their order."""
    values = [value]
    if grouped():
        values *= distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return values




def learning_rate(step, steps, lr):
    """lr for the first half of the steps, a tenth of it for the second."""
    return lr if step < steps // 2 else lr / 10


def cross_entropy(logits, targets, n):
    """Logits (B, V), targets (B,) of a minibatch of n -> its mean loss, nats, and the gradient (softmax - one-hot) / n."""
    targets = targets.unsqueeze(1)
    log_probs = logits.log_softmax(1)
    loss = all_reduce(-log_probs.gather(1, targets).sum() / n).item()
    return loss, log_probs.exp().scatter_(1, targets, -1.0, reduce="add").div_(n)


@torch.inference_mode()  # every operation takes less time than under no_grad
def sgd_step(net, parameters, tree, targets, n, lr, weight_decay=0.0):
    """One step of SGD on (this process's part of) a minibatch of n -> its loss. Only matrices decay."""
    loss, grad = cross_entropy(forward_distinct(net, tree), targets, n)
    backward_distinct(net, tree, grad)
    for parameter in parameters:
        if weight_decay and parameter.dim() == 2:
            parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(parameter.grad, alpha=lr)
    return loss


@torch.no_grad()
def predictions(net, window, batch_size=8192):
    """Yield logits (B, V) of the network in eval mode and targets (B,), for all windows."""
    device, training = net[0].weight.device, net.training
    net.eval()
    for part in window.split(batch_size):
        contexts, targets = contexts_and_targets(part)
        (tree,) = distinct_rows(contexts[None].to(device), len(net[0].weight))
        yield forward_distinct(net, tree), targets.to(device)
    net.train(training)


def evaluate(net, window, scales=(1.0,)):
    """Mean loss, in nats a character, of the network in eval mode over all windows, its logits times each scale."""
    total = torch.zeros(len(scales), dtype=torch.float64)
    for logits, targets in predictions(net, window):
        total += torch.tensor([F.cross_entropy(scale * logits, targets, reduction="sum") for scale in scales])
    return (total / len(window)).tolist()


def best_scale(net, window, scales):
    """The scale of the logits with the least loss -> (loss, scale): temperature scaling, arXiv:1706.04599.

    What it has learnt by heart makes a network too sure of what it has not seen.
    """
    return min(zip(evaluate(net, window, scales), scales))


def towards(average, weights, n):
    """The nth weights go into their mean with weight 4 / n: it spans about the last quarter of all. arXiv:1212.1824."""
    return average.lerp(weights, 4 / (n + 4))


@torch.no_grad()
def train(net, train_windows, val_windows, args, state=None, keep=lambda state: None, stopped=tuple, sample=lambda net: ""):
    """Plain SGD -> (best, curves): the averaged weights of the least validation loss, and the losses for the picture.

    Every args.checkpoint_every steps, after the last, and when stopped() holds a signal, keep(state) is given
    all that is needed to go on from there, as `state`, to the very same bits; KeyboardInterrupt follows the signal.
    best is {"step", "loss", "scale": of the logits, "state_dict"}; curves are {"train": [(step, smoothed
    loss)], "val": [(step, loss of the averaged weights, scaled)]}.
    Raises FloatingPointError when the loss or a weight is no longer a finite number.
    """
    parameters, average = list(net.parameters()), AveragedModel(net, avg_fn=towards)
    start, loss_sum, curves, best = 0, 0.0, {"train": [], "val": []}, {}
    if state:
        start, loss_sum, curves, best = (state[key] for key in ("step", "loss_sum", "curves", "best"))
        net.load_state_dict(state["state_dict"])
        average.load_state_dict(state["average"])

    for layer in net:
        if isinstance(layer, BatchNorm1d):
            layer.track_running_stats = False  # only eval mode needs them, and then they are measured
    every, chunk, weight_decay = max(1, args.steps // 200), chunk_size(args), 60 / max(12_000, args.steps)
    # A validation takes the time of some ten steps for each thousand windows: it shall be a small part.
    validate_every = max(args.steps // 40, len(val_windows) // 20, 1)
    def snapshot(step):
        state = {
            "step": step,
            "loss_sum": loss_sum,
            "curves": curves,
            "state_dict": dict(net.state_dict()),
            "average": dict(average.state_dict()),
            "best": best,
        }
        try:
            check_state(state, net, args.steps)
        except ValueError as error:
            raise FloatingPointError(f"{error} at step {step}") from None
        return state

    def validate(step):
        nonlocal best
        mean = average.module
        recompute_statistics(mean, train_windows, batches=1)
        if rank():
            return ""
        name = sample(mean)  # each step has a seed of its own: random numbers taken here change nothing
        loss, scale = best_scale(mean, val_windows, SCALES)
        curves["val"].append((step, loss))
        if not best or loss < best["loss"]:
            state_dict = {name: tensor.clone() for name, tensor in mean.state_dict().items()}
            best = {"step": step, "loss": loss, "scale": scale, "state_dict": state_dict}
        return name

    def show(step, name):
        losses = ", ".join(f"{part} {curve[-1][1]:.3f}" for part, curve in curves.items() if curve)
        bar.set_postfix_str(f"{losses} {name}", refresh=False)
        if bar.disable and name and not rank():
            remark(f"step {step:,} of {args.steps:,}: {losses}, {name}")

    net.train()
    last_validated = curves["val"][-1][0] if curves["val"] else 0
    layout = "{percentage:3.0f}%|{bar:10}|{postfix} {n_fmt}/{total_fmt} [{remaining}, {rate_fmt}]"
    bar = tqdm(total=args.steps, initial=start, smoothing=0.05, bar_format=layout, dynamic_ncols=True, disable=None)
    with bar:
        for step in range(start, args.steps + 1):
            try:
                if step > last_validated and (step % validate_every == 0 or step == args.steps):
                    show(step, validate(step))
                stop = all_reduce(torch.tensor(len(stopped()), device=args.device)).item()
                save_now = step > start and (step % args.checkpoint_every == 0 or step == args.steps)
                if (save_now or stop) and not rank():
                    keep(snapshot(step))
                if stop:
                    raise KeyboardInterrupt(*stopped() or [signal.SIGTERM])
                if step == args.steps:
                    break
                if step % chunk == 0 or step == start:
                    batches = draw(train_windows, len(net[0].weight), step - step % chunk, args)
                torch.manual_seed(~seed_of(step, args))  # for Dropout: not the numbers that drew the windows
                lr = learning_rate(step, args.steps, args.lr)
                loss = sgd_step(net, parameters, *batches[step % chunk], args.batch_size, lr, weight_decay)
            except RuntimeError as error:
                # Another process has ended. The weights still are those after `step` steps.
                if grouped() and not rank() and not out_of_memory(error):
                    keep(snapshot(step))
                raise
            done = step + 1
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {done}")
            loss_sum += loss
            if done % 10 == 0 or done % validate_every == 0 or done == args.steps:
                average.update_parameters(net)  # neighbouring weights are nearly the same: not at every step
            if done % every == 0:
                curves["train"].append((done, loss_sum / every))
                loss_sum = 0.0
                show(done, "")
            bar.update()
    return best, curves


def check_state(state, net, steps):
    """Raises ValueError unless `state` can be one of train() for this network and these steps."""
    curves, best = state["curves"], state["best"]
    if list(curves) != ["train", "val"] or any(type(curve) is not list for curve in curves.values()):
        raise ValueError("its curves are impossible")
    points = [*curves["train"], *curves["val"], (state["step"], state["loss_sum"])]
    points += [(best["step"], best["loss"]), (best["step"], best["scale"])] if best else []
    for step, value in points:
        if type(step) is not int or not 0 <= step <= steps or type(value) is not float or not math.isfinite(value):
            raise ValueError("its steps and losses are impossible")
    if best and not SCALES[0] <= best["scale"] <= SCALES[-1]:
        raise ValueError("its scale is impossible")
    check(state["state_dict"], net)
    check(state["average"], AveragedModel(net))
    if best or state["step"] == steps:
        check(best["state_dict"], net)


@torch.no_grad()
def recompute_statistics(net, window, batches):
    """BatchNorm1d's running statistics over windows drawn at random, always the same; arXiv:1803.05407."""
    generator, training = torch.Generator().manual_seed(0), net.training
    norms = [layer for layer in net if isinstance(layer, BatchNorm1d)]
    before = [(norm.momentum, norm.track_running_stats) for norm in norms]
    net.eval()  # no Dropout
    for norm in norms:
        norm.train().num_batches_tracked.zero_()
        norm.momentum, norm.track_running_stats = None, True  # None: the plain mean of all batches
    batch_size = min(8192, max(2048, len(window) // 4))
    for _ in range(batches):
        contexts, _ = contexts_and_targets(window[torch.randint(len(window), (1, batch_size), generator=generator)])
        (tree,) = distinct_rows(mine(contexts).to(net[0].weight.device), len(net[0].weight), batch_size)
        forward_distinct(net, tree)
    for norm, (momentum, tracked) in zip(norms, before):
        norm.momentum, norm.track_running_stats = momentum, tracked
    net.train(training)


@torch.no_grad()
def finished(sizes, best, train_windows, val_windows):
    """The network to keep: of the best weights, without Dropout, its logits scaled to the least validation loss."""
    net = WaveNet(**sizes)
    net.load_state_dict(dict(zip(net.state_dict(), best["state_dict"].values(), strict=True)))
    recompute_statistics(net, train_windows, batches=16)
    _, scale = best_scale(net, val_windows, [best["scale"] + percent / 100 for percent in range(-5, 6)])
    net[-1].weight.mul_(scale)
    net[-1].bias.mul_(scale)
    return net.eval()


def plot(path, curves, losses):
    """Write the picture of the curves, with the validation loss of the finished network as a line."""
    from matplotlib.figure import Figure  # slow to import: not before it is needed

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curves["train"]), label="training, smoothed")
    axes.plot(*zip(*curves["val"]), label="validation, averaged weights")
    axes.axhline(losses["val"], color="black", linewidth=0.8, label="validation, the network that was kept")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a character)")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write(path, buffer.getvalue())


def flags():
    """The parser of the command line."""
    parser = Parser(description=__doc__)
    steps, size = number(int, 1, 10**12), number(int, 1, 10**5)
    add = parser.add_argument_group("files").add_argument
    add("--data", metavar="LIST", default=NAMES, help="a text file, one name a line")
    add("--out", metavar="FILE", default=MODEL, help="where the network goes, with its picture beside it")
    add("--init-from", metavar="FILE", help="a network to begin with, of another list or this one; None: a new one")
    add("--resume", action="store_true", help="go on with a training that was interrupted")
    add("--checkpoint-every", type=steps, metavar="N", default=3000, help="steps from which on it could go on")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=steps, metavar="N", help="SGD steps; None: as many as the list can use, 200000 at most")
    add("--dropout", type=number(float, 0, 0.99), metavar="P", help="channels left out; None: what suits the list")
    add("--lr", type=number(float, TINY, 1 / TINY), default=0.1, help="learning rate; a tenth of it in the second half")
    add("--batch-size", type=number(int, 2, 10**6), metavar="N", default=96, help="windows a step")
    add("--seed", type=number(int, 0, MAX_SEED), metavar="N", default=1, help="the same weights at every run")
    add("--threads", type=number(int, 1, 1024), metavar="N", default=1, help="processor cores to use")
    add("--device", default="cpu", choices=["cpu", "cuda", "mps"], help="where to train")
    add = parser.add_argument_group("network").add_argument
    add("--block-size", type=number(int, 2, LARGEST_BLOCK), metavar="N", default=16, help="characters seen, a power of two")
    add("--n-embd", type=size, metavar="N", default=24, help="size of a character's vector")
    add("--n-hidden", type=size, metavar="N", default=280, help="channels of each level")
    return parser


# The flags that make a training what it is: --resume cannot change them. Threads are among them, since sums
# are rounded in another way when they are shared out.
OF_THE_RUN = "steps batch_size block_size n_embd n_hidden lr dropout seed threads device".split()
REMEMBERED = OF_THE_RUN + ["checkpoint_every", "data"]
STATE = {"step": int, "loss_sum": float, "curves": dict, "state_dict": dict, "average": dict, "best": dict}
STATE |= {"names": str, "flags": dict}


def settled(parser, argv, given, what):
    """The flags of argv, with `given` as defaults. Raises ValueError when argv has another value for one of them."""
    parser.set_defaults(**given)
    args = parser.parse_args(argv)
    for name, old in given.items():
        if getattr(args, name) != old:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {getattr(args, name)} contradicts {what}, which has {flag} {old}")
    return args


def resumed(parser, argv, unfinished):
    """The state in the file `unfinished`, and its flags with those of argv over them.

    Raises ValueError when there is none, or when a flag in argv would make it another training.
    """
    state = read_tensors(unfinished, STATE, "there is nothing to resume")
    saved = {name: state["flags"].get(name) for name in REMEMBERED}
    before = vars(parser.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in saved.items()]))
    parser.set_defaults(**{name: before[name] for name in REMEMBERED})
    return state, settled(parser, argv, {name: before[name] for name in OF_THE_RUN}, "the unfinished training")


def files_of(out, data):
    """The files of a training beside the network, `out` -> its picture, its unfinished state, their lock.

    Raises ValueError when one of them is no file, or could be another one that the user needs.
    """
    names = f"{out.removesuffix('.pth')}.png", f"{out}.unfinished", f"{out}.unfinished.lock"
    files = [os.path.realpath(name) for name in names]
    for path in out, *files:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is a folder or a device: choose another --out")
    if os.path.exists(files[-1]) and os.path.getsize(files[-1]):
        raise ValueError(f"{files[-1]} is another program's: choose another --out")
    if len({os.path.realpath(data), out, *files}) < 5 or out.endswith((".png", ".unfinished", ".lock")):
        raise ValueError(f"--out {out} would overwrite a file of another kind: choose another, such as own.pth")
    if not os.path.isdir(os.path.dirname(out)):
        raise ValueError(f"{out} cannot be written (no such folder): choose another --out")
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


@contextmanager
def process_group(device):
    """Inside, the processes that torchrun started can reach each other; only the first of them is heard."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    if rank():
        sys.stdout = sys.stderr = nobody()
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        sys.stderr = sys.__stderr__
        raise ValueError("another process of this training has ended: go on with --resume, if a state is left") from None
    finally:
        if grouped():
            distributed.destroy_process_group()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = flags()
    with parser.one_line_errors():
        args = parser.parse_args(argv)
        refuse_device(args.device)
        with process_group(args.device):
            start(parser, argv, args)


def start(parser, argv, args):
    """Begin or go on with the training of these flags, the only one that writes to its files."""
    out, state, trained = os.path.realpath(args.out), None, None  # a link stays a link
    picture, unfinished, lock = files_of(out, args.data)
    with locked(lock, remove=args.resume) if not rank() else nullcontext():
        if args.resume and not rank():
            state, args = resumed(parser, argv, unfinished)
            files_of(out, args.data)
            refuse_device(args.device)
        elif os.path.exists(unfinished) and not args.resume:
            raise ValueError(f"{unfinished} is of an unfinished training: add --resume to go on, or delete it")
        elif args.init_from is not None:
            trained = load(args.init_from)
            sizes = {name: trained[0].config[name] for name in ("block_size", "n_embd", "n_hidden")}
            args = settled(parser, argv, sizes, args.init_from)
        if any(theirs != argv for theirs in from_all(argv)):
            raise ValueError("the processes have different flags: start all with the same")
        state, args = from_all((state, args))[0]
        try:
            run(args, state, trained, out, picture, unfinished)
        except KeyboardInterrupt:
            if os.path.exists(unfinished):
                remark(f"stopped; to go on: python train.py --out {shlex.quote(out)} --resume")
            raise


def refuse_device(device):
    if device != "cpu" and not getattr(torch, device).is_available():
        raise ValueError(f"this machine has no device {device!r}: leave out --device")


def run(args, state, trained, out, picture, unfinished):
    """The whole training: from the list of names to the network, its picture and a few names."""
    torch.set_num_threads(args.threads)
    names = read_names(args.data, progress=remark)
    if len(names) > 10**6:
        remark(f"{len(names):,} names; now they are shuffled, split and encoded")
    names_digest = digest(names)
    if any(theirs != names_digest for theirs in from_all(names_digest)):
        raise ValueError(f"the processes see different names in {args.data}: give all the same")
    if grouped() and args.batch_size < distributed.get_world_size():
        raise ValueError(f"--batch-size {args.batch_size} is less than the number of processes")
    if state and names_digest != state["names"]:
        raise ValueError(f"the names in {args.data} are not those of the unfinished training: give its list with --data")
    vocab, parts = Vocabulary(names), dict(zip(("train", "test", "val"), split(names)))
    # Of a large list no more is tested and validated on than is needed.
    parts["test"], parts["val"] = (first_rows(parts[part], MEASURED) for part in ("test", "val"))
    validation, known = set(parts["val"]), set()
    for part in batched(parts["train"]):
        known |= validation.intersection(part)
    if unseen := [name for name in parts["val"] if name not in known]:
        parts["unseen"] = unseen
    views = {part: windows(some, vocab, args.block_size, progress=remark) for part, some in parts.items()}
    rows = len(names)
    del names, parts  # much memory, for a large list
    sizes = dict(vocab_size=len(vocab), block_size=args.block_size, n_embd=args.n_embd, n_hidden=args.n_hidden)
    parameters = refuse_too_large(sizes)
    remark(
        f"{rows:,} rows, {len(vocab) - 1} characters; windows: "
        f"{', '.join(f'{part} {len(view):,}' for part, view in views.items())}; {parameters:,} parameters"
    )
    for name, value in recipe(len(views["train"]), begun=trained is not None).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
            remark(f"--{name} {value}, which suits {len(views['train']):,} training windows")
    torch.manual_seed(args.seed)
    net = WaveNet(**sizes, dropout=args.dropout)
    if trained:
        transfer(net, vocab, *trained[:2])
    net.to(args.device)
    if grouped():
        for tensor in net.state_dict().values():
            distributed.broadcast(tensor, 0)
    if state:
        try:
            check_state(state, net, args.steps)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            what = shorten(str(error), 80)
            raise ValueError(f"{unfinished} does not fit its flags ({what}): choose another --out") from None
    of_the_run = {name: getattr(args, name) for name in OF_THE_RUN}
    remembered = of_the_run | {"checkpoint_every": args.checkpoint_every, "data": os.path.abspath(args.data)}

    def keep(state):
        write_tensors(unfinished, state | {"names": names_digest, "flags": remembered})

    def one_name(net):
        with suppress(ValueError):  # weights that overflow are noticed elsewhere
            return " ".join(generate(net, vocab, 1, max_length=30))
        return ""

    caught = []
    try:
        with on_signals(caught.append):
            best, curves = train(net, views["train"], views["val"][:VALIDATED], args, state, keep, lambda: caught, one_name)
        if rank():
            return
        if grouped():
            distributed.destroy_process_group()  # from here on this process works alone
        if caught:
            interrupt(caught[0])
        net = finished(sizes, best, views["train"], views["val"][:VALIDATED])
        losses = {}
        for part, view in views.items():
            # In a list of distinct names all that validates is unseen.
            again = part == "unseen" and len(view) == len(views["val"])
            losses[part] = losses["val"] if again else evaluate(net, view[:MEASURED])[0]
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError("the losses of the finished network are not finite")
    except FloatingPointError as error:
        hint = f"; the last good state is in {unfinished}" if os.path.exists(unfinished) else ""
        raise ValueError(f"{error}: --lr {args.lr} is too high{hint}") from None
    made = {"names": names_digest, "rows": rows, "kept": best["step"], "losses": losses}
    save(out, net, vocab, of_the_run | made | {"torch": str(torch.__version__)})
    try:
        plot(picture, curves, losses)
    except Exception as error:  # whatever matplotlib may stumble over, the network is what counts
        remark(f"no picture: {error}")
        picture = "no picture"
    with suppress(FileNotFoundError):
        os.remove(unfinished)
    print("  ".join(f"{part:>6}" for part in losses))
    print("  ".join(f"{loss:6.4f}" for loss in losses.values()), "nats a character")
    if len(views["train"]) > MEASURED:
        print(f"measured on the first {MEASURED:,} windows of a split, validated on {VALIDATED:,}")
    print(f"kept: the averaged weights of step {best['step']:,}, of least validation loss, logits times {best['scale']:.2f}")
    print("\n".join(generate(net, vocab, 10)))
    print(f"written: {out} and {picture}")


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
