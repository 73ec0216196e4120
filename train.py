"""Train the network on a list of names and write model_state.pth."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported

import copy
import io
import math
import os
import random
import shlex
import sys
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from textwrap import shorten

import torch
from filelock import FileLock, Timeout
from torch import distributed
from torch.nn import functional as F
from tqdm import tqdm

import layers
import model
import sampling
from layers import BatchNorm1d, all_reduce, distinct_rows, parallel
from model import Vocabulary, WaveNet, contexts_and_targets, windows
from sampling import POSITIVE, SEED, THREADS, number, remark

VALIDATED = 25_000  # windows, at most, that each validation measures
MEASURED = 430_000  # windows, at most, of a split at the end
ERROR = 0.002  # nats: VALIDATED windows and more are enough once the loss has this standard error


# The data and the minibatches


def split(names):
    """Rows -> (train, test, validation): shuffled, then 80 %, 10 % and 10 % of them."""
    names = list(names)
    random.Random(42).shuffle(names)
    a, b = int(0.8 * len(names)), int(0.9 * len(names))
    parts = names[:a], names[a:b], names[b:]
    if not all(parts):
        raise ValueError(f"{len(names)} names are too few to split in three: give some hundreds")
    return parts


def recipe(n):
    """The flags that suit a list of n training windows, as measured in tests/RESULTS.md."""
    dropout = min(0.4, max(3000 / n, min(0.25, 5.7 / n**0.3)))
    steps = min(200_000, max(n * 13 // 10, min(n * 4, 15_000)))
    return {"dropout": round(dropout, 3), "steps": steps}


def minibatches(codes, vocab_size, start, args):
    """Yield the minibatches of the steps from `start` on, drawn at random: (tree, targets (B,))."""
    # A hundred small ones are drawn at once: the calls take about as long as those for one.
    chunk = max(1, min(100, 2**22 // (args.batch_size * args.block_size)))
    for first in range(start - start % chunk, args.steps, chunk):
        # It depends on the step and --seed alone, so that a resumed training draws the same.
        generator = torch.Generator().manual_seed(args.seed * 10**9 + first)
        drawn = own_part(torch.randint(len(codes), (chunk, args.batch_size), generator=generator))
        contexts, targets = contexts_and_targets(codes[drawn])
        # Dropout of what is far away: some contexts lose all but their last 2 to 8 characters. So
        # what often follows a few characters is learnt wherever they stand, as by counts of
        # n-grams.
        share = min(0.8, max(0.0, 8 * (args.dropout - 0.15)))
        left = torch.randint(2, 9, (chunk, args.batch_size, 1), generator=generator)
        left[torch.rand(left.shape, generator=generator) >= share] = args.block_size  # all of them
        contexts *= torch.arange(args.block_size, 0, -1) <= own_part(left)  # 0 is padding
        trees = distinct_rows(contexts.to(args.device), vocab_size, args.batch_size)
        yield from islice(zip(trees, targets.to(args.device)), max(0, start - first), None)


def own_part(drawn):
    """What this process computes of minibatches (K, B, ...): every nth of each, of n processes."""
    return drawn[:, rank() :: distributed.get_world_size()] if parallel() else drawn


# One step, and what is measured


def learning_rate(step, steps, lr):
    """lr for the first half of the steps, a tenth of it for the second."""
    return lr if step < steps // 2 else lr / 10


def cross_entropy(logits, targets, n):
    """Logits (B, V), targets (B,) of a minibatch of n -> sum of the losses / n, its gradient.

    The loss is in nats; the gradient by the logits is (softmax - one-hot) / n. Of several processes
    each has B < n.
    """
    targets = targets.unsqueeze(1)
    log_probs = logits.log_softmax(1)
    loss = -log_probs.gather(1, targets).sum() / n
    return loss, log_probs.exp().scatter_(1, targets, -1.0, reduce="add").div_(n)


@torch.inference_mode()  # every operation takes less time than under no_grad
def sgd_step(net, parameters, tree, targets, n, lr, weight_decay=0.0, origin=()):
    """One step of SGD on a minibatch of n windows -> its loss.

    It is this, but each distinct row is computed once, and the gradients are worked out by hand:

        loss = F.cross_entropy(net(contexts), targets)
        loss.backward()
        for parameter in parameters:
            parameter -= lr * (parameter.grad + weight_decay * parameter)

    Only matrices decay. With `origin`, the weights of the trained network that this one began as,
    it is (parameter - origin) that decays: L2-SP, arXiv:1802.01483.
    """
    logits = layers.forward_distinct(net, tree)
    loss, grad = cross_entropy(logits, targets, n)
    layers.backward_distinct(net, tree, grad)
    all_reduce(loss)
    for i, parameter in enumerate(parameters):
        if weight_decay and parameter.dim() == 2:
            parameter.mul_(1 - lr * weight_decay)
            if origin:
                parameter.add_(origin[i], alpha=lr * weight_decay)
        parameter.sub_(parameter.grad, alpha=lr)
    return loss.item()


@torch.no_grad()
def evaluate(net, codes, scales=(1.0,)):
    """Mean loss, nats a character, in eval mode, for each scale of the logits.

    It ends early, after more than VALIDATED windows, once its standard error is below ERROR.
    """
    embedded = net.eval()[0].weight  # (V, E)
    total = squares = n = 0
    for part in codes.split(min(8192, 2**25 // len(embedded))):
        contexts, targets = contexts_and_targets(part.to(embedded.device))
        (tree,) = distinct_rows(contexts[None], len(embedded))
        logits = layers.forward_distinct(net, tree)
        losses = [F.cross_entropy(scale * logits, targets, reduction="none") for scale in scales]
        losses = torch.stack(losses).cpu().double()
        total, squares, n = total + losses.sum(1), squares + losses.square().sum(1), n + len(part)
        if n > VALIDATED and (squares / n - (total / n) ** 2).max() < n * ERROR**2:
            break
    return (total / n).tolist()


def best_scale(net, codes, scale, step):
    """(loss, scale) of the scale of the logits with the least loss, in steps: arXiv:1706.04599.

    What it has learnt by heart makes a network too sure of what it has not seen. The loss is a
    convex function of the scale: so the way from `scale` to the best one is downhill.
    """
    while True:
        near = [min(max(0.45, round(scale + change, 2)), 1.35) for change in (0, -step, step)]
        losses = evaluate(net, codes, near)
        loss, best = min(zip(losses, near), key=lambda pair: pair[0])  # of equal ones the first
        if best == scale:
            return loss, scale
        scale = best


@torch.no_grad()
def recompute_statistics(net, codes, batches):
    """BatchNorm1d's running statistics over windows drawn at random, always the same ones.

    Those kept in training would be of the weights before they were averaged: arXiv:1803.05407.
    """
    generator = torch.Generator().manual_seed(0)
    net.eval()  # no Dropout
    for layer in net:
        if isinstance(layer, BatchNorm1d):
            layer.train().num_batches_tracked.zero_()
            layer.momentum = None  # the mean of all batches
    batch_size = min(8192, max(2048, len(codes) // 4))
    for _ in range(batches):
        drawn = torch.randint(len(codes), (1, batch_size), generator=generator)
        contexts, _ = contexts_and_targets(codes[own_part(drawn)].to(net[0].weight.device))
        (tree,) = distinct_rows(contexts, len(net[0].weight), batch_size)
        layers.forward_distinct(net[:-1], tree)
    net.eval()


# The whole training


def take_in(average, net, n):
    """Polynomial-decay averaging, arXiv:1212.1824: the nth weights (n from 0) count 4 / (n + 4).

    Those before count less and less, so that the mean is one of about the last quarter of all.
    """
    for mean, weight in zip(average.parameters(), net.parameters()):
        mean.lerp_(weight, 4 / (n + 4))


def validate(average, train_windows, val_windows, progress):
    """Measure the averaged weights, and copy them to progress["best"] if none were better."""
    recompute_statistics(average, train_windows, batches=1)
    if rank():
        return
    loss, scale = best_scale(average, val_windows, progress["best"]["scale"], 0.05)
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss is {loss} at step {progress['step']}: lower --lr")
    progress["curves"]["val"].append((progress["step"], loss))
    if loss < progress["best"]["loss"]:
        weights = copy.deepcopy(average.state_dict())
        progress["best"] = dict(step=progress["step"], loss=loss, scale=scale, state_dict=weights)


@torch.no_grad()
def train(net, vocab, train_windows, val_windows, args, keep, state=None, begun=False):
    """Plain SGD -> (best, curves): the averaged weights of least validation loss, and all losses.

    Every args.checkpoint_every steps, after the last, and when a signal has stopped it,
    keep(state) is given all that is needed to go on from there, as `state`, to the very same bits;
    after a signal KeyboardInterrupt follows. Where the network has begun as a trained one, its
    weights decay to what they were then.
    best is {"step", "loss", "scale": of the logits, "state_dict"}; curves are {"train": [(step,
    smoothed loss)], "val": [(step, loss)]}. Raises ValueError when a loss or a weight is not finite
    any more.
    """
    parameters, average = list(net.parameters()), copy.deepcopy(net)
    progress = state or {
        "step": 0,
        "averaged": 0,
        "loss_sum": 0.0,
        "best": {"loss": math.inf, "scale": 1.0},
        "curves": {"train": [], "val": []},
        "origin": [weight.clone() for weight in parameters if begun],
    }
    if state:
        net.load_state_dict(state["state_dict"])
        average.load_state_dict(state["average"])
    # Not copies, but the very weights: whenever `progress` is saved, they are those of that step.
    progress |= {"state_dict": dict(net.state_dict()), "average": dict(average.state_dict())}
    origin = [weight.to(args.device) for weight in progress["origin"]]
    start, curves, signals = progress["step"], progress["curves"], []
    for layer in net:
        if isinstance(layer, BatchNorm1d):
            layer.track_running_stats = False  # only the average's are needed: by validate()
    batches = minibatches(train_windows, len(vocab), start, args)
    every = max(1, args.steps // 200)
    weight_decay = 60 / max(12_000, args.steps)
    # To validate on a thousand windows takes the time of some ten steps: so at least fifty follow.
    validate_every = max(args.steps // 40, len(val_windows) // 20, 1)
    layout = "{percentage:3.0f}%|{bar:10}|{postfix} {n_fmt}/{total_fmt} [{remaining}, {rate_fmt}]"
    bar = tqdm(total=args.steps, initial=start, bar_format=layout, dynamic_ncols=True, disable=None)
    net.train()
    if begun and not state:  # what it begins with may remain the best
        validate(average, train_windows, val_windows, progress)
    if parallel() and not state and not rank():  # another process may end before the first save
        keep(progress)
    with bar, sampling.on_signals(signals.append):
        for step in range(start + 1, args.steps + 1):
            torch.manual_seed(~(args.seed * 10**9 + step - 1))  # of Dropout: not those that drew
            lr = learning_rate(step - 1, args.steps, args.lr)
            batch = next(batches)
            loss = sgd_step(net, parameters, *batch, args.batch_size, lr, weight_decay, origin)
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {step}: lower --lr")
            progress["step"] = step
            progress["loss_sum"] += loss
            validates = step % validate_every == 0 or step == args.steps
            if step % 10 == 0 or validates:  # not at each step: neighbours are nearly the same
                take_in(average, net, progress["averaged"])
                progress["averaged"] += 1
            if step % every == 0:
                curves["train"].append((step, progress["loss_sum"] / every))
                progress["loss_sum"] = 0.0
            if validates:
                validate(average, train_windows, val_windows, progress)
                show(bar, progress, average, vocab)
            bar.update()
            # A signal to one of several processes stops them all.
            stop = all_reduce(torch.tensor(len(signals), device=args.device)).item()
            if (stop or step % args.checkpoint_every == 0 or step == args.steps) and not rank():
                if not all(weight.isfinite().all() for weight in parameters):
                    raise ValueError(f"the weights are not finite at step {step}: lower --lr")
                keep(progress)
            if stop:
                raise KeyboardInterrupt(*signals or [signal.SIGTERM])
    if signals:
        raise KeyboardInterrupt(*signals)
    return progress["best"], curves


def show(bar, progress, average, vocab):
    """The last losses and a new name, behind the bar; where there is no bar, on a line."""
    last = [f"{part} {curve[-1][1]:.3f}" for part, curve in progress["curves"].items() if curve]
    last += sampling.generate(copy.deepcopy(average).cpu(), vocab, 1, max_length=30)
    bar.set_postfix_str(", ".join(last), refresh=False)
    if bar.disable:
        remark(f"step {progress['step']:,} of {bar.total:,}: {', '.join(last)}")


@torch.no_grad()
def finished(sizes, best, train_windows, val_windows):
    """The network to keep: of the best weights, without Dropout, its logits scaled."""
    net = WaveNet(**sizes)
    # By position: without Dropout the layers have other numbers, and so other names.
    net.load_state_dict(dict(zip(net.state_dict(), best["state_dict"].values(), strict=True)))
    recompute_statistics(net, train_windows, batches=16)
    _, scale = best_scale(net, val_windows, best["scale"], 0.01)
    net[-1].weight.mul_(scale)
    net[-1].bias.mul_(scale)
    return net.eval()


def plot(path, curves, losses):
    """Write the picture of the curves, with a line at the finished network's validation loss."""
    from matplotlib.figure import Figure  # slow to import: not before it is needed

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curves["train"]), label="training, smoothed")
    axes.plot(*zip(*curves["val"]), label="validation, averaged weights")
    axes.axhline(losses["val"], color="black", linewidth=0.8, label="validation, what was kept")
    axes.set(xlabel="step", ylabel="loss (nats a character)")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    model.write(path, buffer.getvalue())


# Several processes


def rank():
    return distributed.get_rank() if parallel() else 0


def from_all(value):
    """The values that the processes have, in their order."""
    values = [value]
    if parallel():
        values *= distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def process_group(device):
    """Inside, the processes of torchrun can reach each other; only the first of them is heard."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    if rank():
        sys.stdout = sys.stderr = sampling.nobody()
    try:
        yield
    except RuntimeError as error:
        sys.stderr = sys.__stderr__
        what = f"this or another process of this training has ended ({shorten(str(error), 150)})"
        raise ValueError(f"{what}: go on with --resume, if a state is left") from None
    finally:
        if parallel():
            distributed.destroy_process_group()


# The command line, and what it does to files


def flags():
    """The parser of the command line."""
    parser = sampling.Parser(description=__doc__)
    n, size, dropout = number(int, 1, 10**12), number(int, 1, 4096), number(float, 0, 0.99)
    batch_size, powers = number(int, 2, 10**6), [2**i for i in range(1, 11)]
    devices = ["cpu"] + [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
    files = parser.add_argument_group("files")
    add, either = files.add_argument, files.add_mutually_exclusive_group().add_argument
    add("--data", metavar="LIST", default=sampling.NAMES, help="a text file, one name a line")
    add("--out", metavar="FILE", default=sampling.MODEL, help="the network; a picture goes beside")
    either("--init-from", metavar="FILE", help="a network to begin with, in place of a new one")
    either("--resume", action="store_true", help="go on with a training that was interrupted")
    add("--checkpoint-every", type=n, metavar="N", default=3000, help="steps between saved states")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=n, metavar="N", help="steps of SGD; left out: what suits the list")
    add("--dropout", type=dropout, metavar="P", help="share of channels; left out: what suits")
    add("--lr", type=POSITIVE, default=0.1, help="learning rate; from half way a tenth")
    add("--batch-size", type=batch_size, metavar="N", default=96, help="windows a step")
    add("--seed", type=SEED, metavar="N", default=1, help="another number, another network")
    add("--threads", type=THREADS, metavar="N", default=1, help="processor cores to use")
    add("--device", default="cpu", choices=devices, help="where to train; others are cuda, mps")
    add = parser.add_argument_group("network").add_argument
    add("--block-size", type=int, choices=powers, metavar="N", default=16, help="2, 4, 8 ... 1024")
    add("--n-embd", type=size, metavar="N", default=24, help="size of a character's vector")
    add("--n-hidden", type=size, metavar="N", default=280, help="channels of each level")
    return parser


# The flags that make a training what it is: --resume cannot change them. Threads are among them,
# since sums are rounded in another way when they are shared out.
OF_THE_RUN = "steps batch_size block_size n_embd n_hidden lr dropout seed threads device".split()
REMEMBERED = OF_THE_RUN + ["checkpoint_every", "data"]
STATE = "step averaged loss_sum curves best origin state_dict average names flags".split()


def settled(parser, argv, given, what):
    """The flags that are `given` by a file, and those of argv, which come later and so win.

    Raises ValueError where they contradict in what makes the training what it is.
    """
    flag_of = {name: "--" + name.replace("_", "-") for name in given}
    args = parser.parse_args([f"{flag_of[name]}={given[name]}" for name in given] + argv)
    for name, flag in flag_of.items():
        if name in OF_THE_RUN and (new := getattr(args, name)) != given[name]:
            raise ValueError(f"{flag} {new} contradicts {what}, which has {flag} {given[name]}")
    return args


def files_of(out):
    """-> the network's file, its picture, its unfinished state, and the lock of all.

    Raises ValueError when two of them are the same, or one is a folder, a device or the like.
    """
    path = os.path.realpath(out)  # a link stays a link
    names = f"{path.removesuffix('.pth')}.png", f"{path}.unfinished", f"{path}.unfinished.lock"
    files = [path, *map(os.path.realpath, names)]
    taken = any(os.path.lexists(file) and not os.path.isfile(file) for file in files)
    taken |= os.path.exists(files[-1]) and os.path.getsize(files[-1])  # another program's lock
    if not path.endswith(".pth") or taken or len(set(files)) < 4:
        what = "a name like own.pth, beside which own.png and own.pth.unfinished are free"
        raise ValueError(f"--out {out} cannot be used: give {what}")
    if not os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"--out {out} is in no folder: make the folder first")
    return files


@contextmanager
def locked(path):
    """Nobody else is inside for the same path."""
    lock = FileLock(path)
    with model.named(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another training holds {path}: choose another --out") from None
    try:
        yield
    finally:
        with suppress(OSError):
            os.remove(path)
        lock.release()


def main(argv=None):
    parser, argv = flags(), sys.argv[1:] if argv is None else argv
    parser.guard(lambda: start(parser, argv))


def start(parser, argv):
    """Begin or go on with the training of these flags, the only one that writes to its files."""
    args, state, trained = parser.parse_args(argv), None, None
    out, picture, unfinished, lock = files_of(args.out)
    with process_group(args.device), nullcontext() if rank() else locked(lock):
        if args.resume:
            if not rank():
                state = model.read_tensors(unfinished, STATE, "there is nothing to resume")
                args = settled(parser, argv, state["flags"], "the unfinished training")
        elif os.path.exists(unfinished):
            what = "is of an unfinished training: add --resume to go on, or delete it"
            raise ValueError(f"{unfinished} {what}")
        elif args.init_from is not None:
            trained = model.load(args.init_from)
            sizes = {key: trained[0].config[key] for key in ("block_size", "n_embd", "n_hidden")}
            args = settled(parser, argv, sizes, args.init_from)
        if any(theirs != argv for theirs in from_all(argv)):
            raise ValueError("the processes have different flags: start all with the same")
        state, args = from_all((state, args))[0]  # all take what process 0 has read
        data, begun = os.path.realpath(args.data), os.path.realpath(args.init_from or "")
        if data == out or {data, begun} & {picture, unfinished, lock}:
            raise ValueError(f"--out {args.out} would replace what it needs: choose another --out")
        try:
            run(args, state, trained, out, picture, unfinished)
        except KeyboardInterrupt:
            if os.path.exists(unfinished):
                remark(f"stopped; to go on: python train.py --out {shlex.quote(out)} --resume")
            raise


def read_list(args, state):
    """The list of names -> its digest, its rows, its vocabulary, {split: windows}."""
    long = os.path.isfile(args.data) and os.path.getsize(args.data) > 2**24
    if long:
        remark(f"{args.data} is read")
    names = model.read_names(args.data)
    rows, digest = len(names), model.digest(names)
    if long:
        remark(f"{rows:,} names are shuffled and encoded")
    if any(theirs != digest for theirs in from_all(digest)):
        raise ValueError(f"the processes see different names in {args.data}: give all the same")
    if state and digest != state["names"]:
        what = "are not those of the unfinished training: give its list with --data"
        raise ValueError(f"the names in {args.data} {what}")
    vocab, (learnt, test, val) = Vocabulary(names), split(names)
    known = set(val).intersection(name for name in learnt)  # in Python: see read_names()
    unseen = [name for name in val if name not in known]
    parts = {"train": learnt, "val": val, "unseen": unseen, "test": test}
    codes = {part: windows(some, vocab, args.block_size) for part, some in parts.items() if some}
    return digest, rows, vocab, codes


def run(args, state, trained, out, picture, unfinished):
    """The whole training: from the list of names to the network, its picture and a few names."""
    torch.set_num_threads(args.threads)
    if parallel() and args.batch_size < distributed.get_world_size():
        raise ValueError(f"--batch-size {args.batch_size} is less than the number of processes")
    digest, rows, vocab, split_windows = read_list(args, state)
    n_val = min(VALIDATED, 2**25 // len(vocab))  # fewer where each takes long
    data = split_windows["train"], split_windows["val"][:n_val]
    suits = recipe(len(data[0]))
    chosen = {name: suits[name] for name in suits if getattr(args, name) is None}
    vars(args).update(chosen, data=os.path.abspath(args.data))
    torch.manual_seed(args.seed)
    net = WaveNet(len(vocab), args.block_size, args.n_embd, args.n_hidden, args.dropout)
    if trained:
        model.transfer(net, vocab, *trained[:2])
    net.to(args.device)
    if parallel():  # another machine may have drawn, or read, other weights
        for tensor in net.state_dict().values():
            distributed.broadcast(tensor, 0)
    counts = ", ".join(f"{part} {len(some):,}" for part, some in split_windows.items())
    parameters = sum(parameter.numel() for parameter in net.parameters())
    what = f"{rows:,} rows, {len(vocab) - 1} characters; windows: {counts}"
    remark(f"{what}; {parameters:,} parameters")
    for name, value in chosen.items():
        remark(f"--{name} {value}, which suits {len(data[0]):,} training windows")
    unchanging = {"names": digest, "flags": {name: getattr(args, name) for name in REMEMBERED}}

    def keep(progress):
        model.write_tensors(unfinished, progress | unchanging)

    best, curves = train(net, vocab, *data, args, keep, state, begun=bool(trained))
    if rank():
        return
    if parallel():
        distributed.destroy_process_group()  # from here on this process works alone
    net = finished(net.config, best, *data)
    losses = {}
    for part, some in split_windows.items():
        # In a list of distinct names all that validates is unseen.
        again = part == "unseen" and len(some) == len(split_windows["val"])
        losses[part] = losses["val"] if again else evaluate(net, some[:MEASURED])[0]
    if not all(map(math.isfinite, losses.values())):
        raise ValueError(f"the finished network has the losses {losses}: lower --lr")
    made = {name: getattr(args, name) for name in OF_THE_RUN}
    made |= {"names": digest, "rows": rows, "kept": best["step"], "losses": losses}
    model.save(out, net, vocab, made | {"torch": str(torch.__version__)})
    try:
        plot(picture, curves, losses)
    except Exception as error:  # whatever matplotlib may stumble over, the network is what counts
        remark(f"no picture: {error}")
        picture = "no picture"
    with suppress(FileNotFoundError):
        os.remove(unfinished)
    print("  ".join(f"{part:>6}" for part in losses))
    print("  ".join(f"{loss:6.4f}" for loss in losses.values()), "nats a character")
    if len(split_windows["val"]) > n_val:
        what = f"of long splits {n_val:,} windows validate, at most {MEASURED:,} are measured"
        print(f"{what}, fewer for a standard error < {ERROR}")
    kept = f"averaged weights of step {best['step']:,}" if best["step"] else "what it began with"
    print(f"kept: {kept}, of least validation loss, logits times {best['scale']:.2f}")
    print("\n".join(sampling.generate(net, vocab, 10)))
    print(f"written: {out} and {picture}")


if __name__ == "__main__":
    main()
