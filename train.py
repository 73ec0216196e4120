"""Train the network on a list of names and write model_state.pth."""

import argparse
import copy
import io
import math
import os
import random
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice

import torch
from filelock import FileLock, Timeout
from torch import distributed
from tqdm import tqdm

import layers
import model
import sampling
from layers import CrossEntropyLoss, distinct_rows
from model import Vocabulary, WaveNet, contexts_and_targets, windows
from sampling import bounded, token_losses

EVAL_WINDOWS = 25_000, 430_000  # at most, of a split: at each validation, and at the end
SCALES = [percent / 100 for percent in range(30, 136, 5)]  # of the logits, for calibrate()
SOFTWARE = "train.py, names character by character"  # marks our pictures
cross_entropy = CrossEntropyLoss()


# The data and the minibatches


def split(names):
    """Distinct names -> {"train", "val", "test"}: shuffled, then 80 %, the last 10 %, the rest."""
    names = list(names)
    random.Random(42).shuffle(names)
    a, b = int(0.8 * len(names)), int(0.9 * len(names))
    parts = {"train": names[:a], "val": names[b:], "test": names[a:b]}
    if not all(parts.values()):
        raise ValueError(f"{len(names)} names are too few to split in three: give some hundreds")
    return parts


def default_hparams(n):
    """The flags that suit a list of n training windows, as measured in tests/RESULTS.md."""
    dropout = min(0.4, max(3000 / n, min(0.25, 5.7 / n**0.3)))
    steps = min(200_000, max(n * 13 // 10, min(n * 4, 15_000)))
    return {
        "dropout": round(dropout, 3),
        "truncate": round(min(0.8, max(0.0, 8 * (dropout - 0.15))), 3),
        "steps": steps,
    }


def truncate(contexts, share, generator):
    """Reduce a share of the contexts to their last 2 to 8 tokens.

    So what often follows a few characters is learned wherever they stand, as by counts of n-grams.
    """
    T = contexts.shape[-1]
    kept = torch.randint(2, 9, (*contexts.shape[:-1], 1), generator=generator)
    kept[torch.rand(kept.shape, generator=generator) >= share] = T
    return contexts * (torch.arange(T, 0, -1) <= kept)  # 0 is padding


def minibatches(net, tokens, start, args):
    """Yield the minibatch of each step from `start` on: (rows, targets (B,)), drawn at random."""
    # A hundred small ones are drawn at once: the calls take about as long as those for one.
    chunk = max(1, min(100, 2**22 // (args.batch_size * args.block_size)))
    for first in range(start - start % chunk, args.steps, chunk):
        # It depends on the step and --seed alone, so that a resumed training draws the same.
        generator = torch.Generator().manual_seed(args.seed * 10**9 + first)
        drawn = torch.randint(len(tokens), (chunk, args.batch_size), generator=generator)
        contexts, targets = contexts_and_targets(tokens[drawn])
        contexts, targets = shard(truncate(contexts, args.truncate, generator)), shard(targets)
        rows = distinct_rows(net, contexts.to(args.device))
        yield from islice(zip(rows, targets.to(args.device)), max(0, start - first), None)


# One step


def learning_rate(step, args):
    """--lr for the first half of the steps, a tenth of it for the second."""
    return args.lr if step < args.steps // 2 else args.lr / 10


def train_step(net, rows, targets, lr, parameters, weight_decay=0.0, pretrained=()):
    """One step of SGD -> the loss in nats per token. It is this, but usually faster:

        loss = F.cross_entropy(net(contexts), targets)
        loss.backward()
        for parameter in parameters:
            parameter -= lr * (parameter.grad + weight_decay * parameter)

    Only matrices decay; with `pretrained`, the weights that training started from, it is
    (parameter - pretrained) that decays: L2-SP, arXiv:1802.01483.
    """
    with torch.enable_grad() if torch.is_tensor(rows) else torch.inference_mode():
        logits = layers.forward(net, rows)
        with torch.no_grad():
            loss = cross_entropy(logits, targets)
            grad_logits = cross_entropy.backward()
        layers.backward(net, rows, logits, grad_logits)
    with torch.inference_mode():  # each operation takes less time than under no_grad
        if is_distributed():
            average_gradients(parameters)
        for i, parameter in enumerate(parameters):
            if weight_decay and parameter.dim() == 2:
                parameter.mul_(1 - lr * weight_decay)
                if pretrained:
                    parameter.add_(pretrained[i], alpha=lr * weight_decay)
            parameter.sub_(parameter.grad, alpha=lr)
    return loss.item()


# Measuring


def update_average(average, net, n):
    """Polynomial-decay averaging, arXiv:1212.1824: the nth weights (n from 0) count 4 / (n + 4).

    Earlier ones count less and less, so that the mean is one of about the last quarter of all.
    """
    for mean, weight in zip(average.parameters(), net.parameters()):
        mean.lerp_(weight, 4 / (n + 4))


def n_characters(tokens, vocab):
    """How many of the windows stand for a character or the end of a name: not for a mark."""
    marks = [(part == vocab.mark).sum() for part in tokens[:, -1].split(2**22) if vocab.mark]
    return len(tokens) - sum(marks, torch.tensor(0)).item()


def evaluate(net, tokens, vocab, scales=(1.0,)):
    """The mean loss, in nats per character of the names and their ends, for each scale."""
    losses = token_losses(net, tokens, scales)
    return (losses.double().sum(0) / n_characters(tokens, vocab)).tolist()


def calibrate(net, tokens, vocab):
    """(loss, scale): the scale of what the network adds to its bias that has the least loss.

    A network is too sure of what it has learned by heart: arXiv:1706.04599. Towards its bias it
    shrinks to the characters' frequencies.
    """
    return min(zip(evaluate(net, tokens, vocab, SCALES), SCALES))


@torch.no_grad()
def recompute_statistics(net, tokens, batches):
    """Set the statistics of BatchNorm layers, by windows drawn at random, always the same ones.

    Those from training would belong to the weights before the average: arXiv:1803.05407.
    """
    generator = torch.Generator().manual_seed(0)
    net.eval()  # no Dropout
    for module in net.modules():
        if hasattr(module, "running_mean"):
            module.train().num_batches_tracked.zero_()
            module.track_running_stats, module.momentum = True, None  # the mean of all batches
    batch_size = min(8192, max(2048, len(tokens) // 4))
    for _ in range(batches):
        drawn = torch.randint(len(tokens), (1, batch_size), generator=generator)
        contexts, _ = contexts_and_targets(tokens[drawn].to(next(net.parameters()).device))
        (rows,) = distinct_rows(net, contexts)
        layers.forward(net, rows)
    net.eval()


def validate(average, train_windows, val_windows, vocab, state):
    """Measure the averaged weights, and snapshot them when none were better."""
    recompute_statistics(average, train_windows, batches=1)
    loss, scale = calibrate(average, val_windows, vocab)
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss is {loss} at step {state['step']}: lower --lr")
    state["curves"]["val"].append((state["step"], loss))
    if loss < state["best"]["loss"]:
        weights = copy.deepcopy(average.state_dict())
        state["best"] = dict(step=state["step"], loss=loss, scale=scale, state_dict=weights)


# The training


def initial_state(net, pretrained):
    """Where a training starts: what .unfinished holds at step 0."""
    return {
        "step": 0,
        "averaged": 0,
        "loss_sum": 0.0,
        "best": {"loss": math.inf},
        "curves": {"train": [], "val": []},
        "pretrained": [weight.detach().clone() for weight in net.parameters() if pretrained],
        "state_dict": dict(net.state_dict()),
        "average": copy.deepcopy(dict(net.state_dict())),
    }


def restore(net, state):
    """Load the weights of `state` into the network -> its average, a network of the same layers.

    From then on the state holds not copies but these weights themselves, so that whenever it is
    saved they are those of its step.
    """
    average = copy.deepcopy(net)
    net.load_state_dict(state["state_dict"])
    average.load_state_dict(state["average"])
    state |= {"state_dict": dict(net.state_dict()), "average": dict(average.state_dict())}
    for module in net.modules():
        if hasattr(module, "running_mean"):  # only the average's are needed: validate() sets them
            module.track_running_stats = False
    return average


def record_loss(state, loss, per_point):
    """Add the loss of a step to the curve, which has a point for the mean of so many steps."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {state['step']}: lower --lr")
    state["loss_sum"] += loss
    if state["step"] % per_point == 0:
        state["curves"]["train"].append((state["step"], state["loss_sum"] / per_point))
        state["loss_sum"] = 0.0


@torch.no_grad()
def train(net, vocab, train_windows, val_windows, args, state, save_state):
    """SGD from state["step"] to args.steps -> the signal that stopped it earlier, or None.

    state["best"] becomes the averaged weights of least validation loss, state["curves"] the losses.
    save_state(state) is called every args.checkpoint_every steps, at the end, and when stopped; to
    go on from there gives the same bits on a CPU. Raises ValueError when a loss is not finite.
    """
    average, parameters = restore(net, state), list(net.parameters())
    pretrained = [weight.to(args.device) for weight in state["pretrained"]]
    batches = minibatches(net, train_windows, state["step"], args)
    weight_decay = 60 / max(12_000, args.steps)
    # Validating on a thousand windows takes the time of some ten steps: so at least fifty follow.
    eval_every = max(args.steps // 40, len(val_windows) // 20, 1)
    per_character = len(train_windows) / n_characters(train_windows, vocab)
    bar = progress_bar(args.steps, state["step"])
    if pretrained and not state["step"] and not rank():  # what it starts from may remain the best
        validate(average, train_windows, val_windows, vocab, state)
    net.train()
    with bar, stop_signals() as signals:
        for step in range(state["step"], args.steps):
            torch.manual_seed(~(args.seed * 10**9 + step))  # for dropout; resuming repeats it
            rows, targets = next(batches)
            lr = learning_rate(step, args)
            loss = train_step(net, rows, targets, lr, parameters, weight_decay, pretrained)
            state["step"] = step + 1
            record_loss(state, loss * per_character, max(1, args.steps // 200))
            last, stop = state["step"] == args.steps, agreed(signals, args.device)
            eval_due = last or state["step"] % eval_every == 0
            if step % 10 == 9 or eval_due:  # not at each step: neighbours are nearly the same
                update_average(average, net, state["averaged"])
                state["averaged"] += 1
            if eval_due and not rank():
                validate(average, train_windows, val_windows, vocab, state)
                report(bar, state, average, vocab, args)
            bar.update()
            if (last or stop or state["step"] % args.checkpoint_every == 0) and not rank():
                save_state(state)
            if stop:
                return stop
    return None


def progress_bar(steps, start):
    layout = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{remaining}, {rate_fmt}] {postfix}"
    hidden = True if rank() else None  # None: where stderr is no terminal
    return tqdm(total=steps, initial=start, bar_format=layout, dynamic_ncols=True, disable=hidden)


def report(bar, state, average, vocab, args):
    """The last losses and a new name, behind the bar; where there is no bar, on a line."""
    best, curves = state["best"], state["curves"]
    message = f"val {curves['val'][-1][1]:.3f} (best {best['loss']:.3f} at {best['step']:,})"
    if curves["train"]:
        message = f"train {curves['train'][-1][1]:.3f} {message}"
    (name,) = sampling.generate(average, vocab, 1, temperature=usual(args), max_length=30) or [""]
    bar.set_postfix_str(f"{message} {name}", refresh=False)
    if bar.disable:
        log(f"step {state['step']:,} of {args.steps:,}: {message} {name}")


def usual(args):
    """The temperature for names to show: a short list teaches too little for temperature 1."""
    return 0.7 if args.truncate else 1.0


@torch.no_grad()
def finalize(config, state, train_windows, val_windows, vocab):
    """The best weights as the network to write: without Dropout, its logits scaled."""
    net = WaveNet(**config)
    # By position: without Dropout the layers have other numbers, and so other names.
    best = state["best"]["state_dict"].values()
    net.load_state_dict(dict(zip(net.state_dict(), best, strict=True)))
    recompute_statistics(net, train_windows, batches=16)
    _, state["best"]["scale"] = calibrate(net, val_windows, vocab)
    net[-1].weight.mul_(state["best"]["scale"])
    return net.eval()


def plot(path, title, state, losses, steps):
    """Write the picture of the curves, with the network that was kept as a dot."""
    from matplotlib.figure import Figure  # slow to import: not before it is needed

    curves, best = state["curves"], state["best"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curves["train"]), label="training, smoothed")
    axes.plot(*zip(*curves["val"]), label="validation, averaged weights")
    axes.plot(best["step"], losses["val"], "ko", label=f"kept: {losses['val']:.3f}")
    axes.axvline(steps // 2, color="grey", linewidth=0.8, linestyle=":", label="learning rate / 10")
    shown = [loss for _, loss in curves["train"][len(curves["train"]) // 20 :] + curves["val"]]
    axes.set(xlabel="step", ylabel="loss (nats per character)", title=title)
    axes.set_ylim(min(shown) - 0.05, sorted(shown)[int(0.98 * len(shown))] + 0.1)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": SOFTWARE})
    model.atomic_write(path, buffer.getvalue())


# Several processes: torchrun --nproc-per-node N train.py


def is_distributed():
    return distributed.is_available() and distributed.is_initialized()


def rank():
    return distributed.get_rank() if is_distributed() else 0


def log(message):
    """sampling.log(), of process 0 alone."""
    if not rank():
        sampling.log(message)


@contextmanager
def process_group(device):
    """Inside, the processes that torchrun started can reach each other."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"process {rank()}: {first}. Did another one end? Try --resume") from None
    finally:
        distributed.destroy_process_group()


def shard(drawn):
    """Of minibatches (K, B, ...) what this process computes: every nth window, of n processes."""
    return drawn[:, rank() :: distributed.get_world_size()] if is_distributed() else drawn


def average_gradients(parameters):
    """The mean over all processes, by one sum of one flat buffer, as DistributedDataParallel."""
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad.copy_(mean.view_as(parameter))


def agreed(signals, device):
    """The signal that has reached any of the processes, or 0."""
    signum = torch.tensor(signals[0] if signals else 0, device=device)
    if is_distributed():
        distributed.all_reduce(signum, distributed.ReduceOp.MAX)
    return signum.item()


def check_processes(args, digest):
    """Raise ValueError where the processes cannot train together: in process 0, the others end."""
    n, run = distributed.get_world_size(), {name: getattr(args, name) for name in RUN_ARGS}
    everywhere = [None] * n
    distributed.all_gather_object(everywhere, (run, digest))
    message = None
    if any(other != everywhere[0] for other in everywhere):
        message = "the processes have different lists or flags: start all with the same"
    elif args.batch_size % n or args.batch_size < 2 * n:
        message = f"--batch-size {args.batch_size} is no multiple of {n} processes, two for each"
    if message:
        raise SystemExit(2) if rank() else ValueError(message)


# The command line, and what it does to files


def build_parser():
    wide = partial(argparse.HelpFormatter, max_help_position=28, width=100)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=wide)
    parser.error = sampling.fail
    n, size, share = bounded(int, 1, 10**12), bounded(int, 1, model.MAX_SIZE), bounded(float, 0, 1)
    batch_size, dropout = bounded(int, 2, 10**6), bounded(float, 0, 0.99)
    devices = ["cpu"] + [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
    add = parser.add_argument_group("files").add_argument
    add("--data", metavar="LIST", help="a text file, one name per line (names.txt)")
    add("--column", metavar="C", help="of a table: the number or the heading of its column")
    add("--out", metavar="FILE.pth", help="the network, and FILE.png, its picture")
    add("--init-from", metavar="FILE", help="start from this network, not from random weights")
    add("--resume", action="store_true", help="go on with an interrupted training")
    add("--checkpoint-every", type=n, metavar="N", default=3000, help="steps between saves (3000)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=n, metavar="N", help="steps of SGD (what suits the list)")
    add("--dropout", type=dropout, metavar="P", help="share of channels (what suits the list)")
    add("--truncate", type=share, metavar="P", help="share of short contexts (what suits the list)")
    positive, seed = bounded(float, 1e-6, 1e6), bounded(int, 0, 2**32 - 1)
    add(
        "--lr",
        type=positive,
        metavar="X",
        default=0.1,
        help="learning rate, / 10 at half way (0.1)",
    )
    add("--batch-size", type=batch_size, metavar="N", default=96, help="windows per step (96)")
    add("--seed", type=seed, metavar="N", default=1, help="another seed, another network (1)")
    threads = bounded(int, 1, 1024)
    add("--threads", type=threads, metavar="N", default=1, help="processor cores to use (1)")
    add("--device", default="cpu", choices=devices, help="where to train: cpu, cuda, mps (cpu)")
    add = parser.add_argument_group("network").add_argument
    blocks = [2**i for i in range(1, 11)]
    add(
        "--block-size", type=int, choices=blocks, metavar="N", default=16, help="2, 4 ... 1024 (16)"
    )
    add("--n-embd", type=size, metavar="N", default=24, help="size of a character's vector (24)")
    add("--n-hidden", type=size, metavar="N", default=280, help="channels of each level (280)")
    return parser


# What makes a training the one it is: all but where it reads, writes and computes.
RUN_ARGS = "steps dropout truncate lr batch_size seed threads block_size n_embd n_hidden".split()
SIZES = "block_size", "n_embd", "n_hidden"
WITH_RESUME = "out data column device checkpoint_every resume".split()
WITHOUT_OUT = "seed threads device checkpoint_every resume".split()
STATE = "step averaged loss_sum best curves pretrained state_dict average layers names args".split()


def refuse_flags(given, allowed, why):
    for name in given:
        if name not in allowed:
            raise ValueError(f"--{name.replace('_', '-')} {why}")


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


@contextmanager
def stop_signals():
    """Inside, a signal to stop is put into the list. A second after it, another ends at once."""
    received, first = [], math.inf
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}

    def handler(signum, frame):
        nonlocal first
        if time.monotonic() - first > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        received.append(signum)
        first = min(first, time.monotonic())

    for signum, old in before.items():
        if old != signal.SIG_IGN:  # as in the background of a script: it stays so
            signal.signal(signum, handler)
    try:
        yield received
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def main(argv=None):
    parser = build_parser()
    sampling.run_cli(lambda: run(parser, argv))


def run(parser, argv):
    """Start a training or go on with one: the only one that writes to its files."""
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # its values win over defaults
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not None}
    if "out" not in given:
        refuse_flags(given, WITHOUT_OUT, "would replace the shipped network: name another, --out")
    out = os.path.realpath(args.out or sampling.MODEL)
    unfinished = f"{out}.unfinished"
    if not out.endswith(".pth"):
        raise ValueError(f"--out {args.out} is no name like own.pth: choose one that ends in .pth")
    with process_group(args.device), nullcontext() if rank() else locked(f"{unfinished}.lock"):
        state, pretrained = None, None
        if args.resume:
            refuse_flags(given, WITH_RESUME, "cannot be given with --resume, which knows its flags")
            state = model.read_checkpoint(unfinished, STATE, "there is nothing to resume")
            args = argparse.Namespace(**(state["args"] | given))
        elif os.path.exists(unfinished):
            raise ValueError(f"{unfinished} is an unfinished training: add --resume, or delete it")
        elif args.init_from:
            refuse_flags(given, given.keys() - SIZES, f"is given by {args.init_from}: leave it out")
            pretrained = model.load(args.init_from)
            vars(args).update({name: pretrained[0].config[name] for name in SIZES})
        stopped = train_list(args, state, pretrained, out, unfinished)
    if stopped:
        hint = ["train.py", "--resume"] + (["--out", args.out] if args.out else [])
        log(f"stopped; to go on: {sampling.command(*hint)}")
        sys.exit(128 + stopped)


def train_list(args, state, pretrained, out, unfinished):
    """A training, from the list of names to the files -> the signal that stopped it, or None."""
    torch.set_num_threads(args.threads)
    args.data = os.path.abspath(args.data or sampling.NAMES)
    picture = f"{out.removesuffix('.pth')}.png"
    check_files(args, out, picture, unfinished)
    names = model.read_names(args.data, args.column, log)
    vocab, digest = Vocabulary(names), model.sha256(names)
    if state and digest != state["names"]:
        raise ValueError(f"{args.data} is not the list of the unfinished training: give --data")
    data = {part: windows(some, vocab, args.block_size) for part, some in split(names).items()}
    hparams = default_hparams(len(data["train"]))
    chosen = {name: hparams[name] for name in hparams if getattr(args, name) is None}
    vars(args).update(chosen)
    if is_distributed():
        check_processes(args, digest)
    net = new_network(args, vocab, data["train"], pretrained)
    describe(names, vocab, data, net, chosen)
    fitting = data["train"], data["val"][: min(EVAL_WINDOWS[0], 2**25 // len(vocab))]
    own = {"layers": model.layer_names(net), "names": digest, "args": vars(args)}
    if state and state["layers"] != own["layers"]:
        raise ValueError(f"{unfinished} has other layers than this model.py: delete it")
    new = not state
    state = state or initial_state(net, pretrained)

    def save_state(state):
        if not all(weight.isfinite().all() for weight in net.parameters()):
            raise ValueError(f"the weights are not finite at step {state['step']}: lower --lr")
        model.write_checkpoint(unfinished, state | own)

    try:
        if new and not rank():
            save_state(state)  # whether it can be written shows before the work
        stopped = train(net, vocab, *fitting, args, state, save_state)
        if not stopped and not rank():
            finish(args, net, state, vocab, names, data, fitting, out, picture)
            os.remove(unfinished)
        return stopped
    except ValueError:  # it diverged at once, or its network is refused: nothing to go on with
        if new and not rank() and not args.checkpoint_every <= state["step"] < args.steps:
            os.remove(unfinished)
        raise


def check_files(args, out, picture, unfinished):
    """Raise ValueError when a file that is to be written is one to be read, or no file of ours."""
    read = {os.path.realpath(path) for path in (args.data, args.init_from) if path}
    if os.path.realpath(args.data) == out or read & {picture, unfinished, f"{unfinished}.lock"}:
        raise ValueError(f"--out {args.out} would replace what is to be read: choose another --out")
    for path in out, picture:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is no file: choose another --out")
    with suppress(FileNotFoundError), open(picture, "rb") as file:
        if SOFTWARE.encode() not in file.read(4096):
            raise ValueError(f"{picture} is not from train.py: move it, or choose another --out")


def new_network(args, vocab, tokens, pretrained):
    """A network with the weights of the seed, on --device, whose bias knows the frequencies."""
    torch.manual_seed(args.seed)
    net = WaveNet(len(vocab), args.block_size, args.n_embd, args.n_hidden, args.dropout)
    if getattr(net[-1], "bias", None) is not None:
        # It starts from how frequent each token is, so that rare ones need not be unlearned.
        net[-1].bias.data = (token_counts(tokens, vocab) + 0.5).log().log_softmax(0)
    if pretrained:
        took = model.load_pretrained(net, vocab, *pretrained[:2])
        log(f"{args.init_from} gives all levels and the vectors of {len(took)} characters: {took}")
        log("where the lists share names, the losses flatter")
    return net.to(args.device)


def token_counts(tokens, vocab):
    """How often each token is a target, (V,)."""
    parts = tokens[:, -1].split(2**22)  # in parts: a list of ten million fits
    return sum(torch.bincount(part, minlength=len(vocab)) for part in parts)


def describe(names, vocab, data, net, chosen):
    """Say what is about to happen."""
    counts = ", ".join(f"{part} {len(tokens):,}" for part, tokens in data.items())
    parameters = sum(parameter.numel() for parameter in net.parameters())
    log(f"{len(names):,} names, {len(vocab.tokens_of) - 1} characters; windows: {counts}")
    flags = " ".join(f"--{name} {value}" for name, value in chosen.items())
    log(f"{parameters:,} parameters" + f"; what suits the list: {flags}" * bool(chosen))
    if len(names) < 200:
        log(f"{len(names)} names are few: --temperature 0.7 in sampling.py helps, and for Latin")
        log("letters --init-from model_state.pth here")


def finish(args, net, state, vocab, names, data, fitting, out, picture):
    """Write the best network and its picture, and print the losses and a few names."""
    net = finalize(net.config, state, *fitting, vocab)
    losses = {part: evaluate(net, t[: EVAL_WINDOWS[1]], vocab)[0] for part, t in data.items()}
    frequencies = token_counts(data["train"], vocab).double()
    characters = n_characters(data["train"], vocab)
    unigram = -(frequencies * (frequencies / frequencies.sum()).clamp(1e-30).log()).sum().item()
    if not losses["train"] < unigram / characters:
        message = f"its loss is {losses['train']:.3f}, that of counting {unigram / characters:.3f}"
        raise ValueError(f"the network has learned nothing ({message}): lower --lr")
    held_out = sum([split(names)[part][: EVAL_WINDOWS[0]] for part in ("val", "test")], [])
    scores = torch.tensor(sampling.score(net, vocab, held_out), dtype=torch.float64)
    metadata = {name: getattr(args, name) for name in RUN_ARGS} | {
        "names": model.sha256(names),
        "rows": len(names),
        "kept": state["best"]["step"],
        "losses": losses,
        "quantiles": scores.quantile(torch.linspace(0, 1, 101).double()).tolist(),
        "torch": str(torch.__version__),
    }
    try:
        model.save(out, net, vocab, metadata)
    except OSError as error:
        safe = f"{error.strerror}; the network is safe in {out}.unfinished: to have it elsewhere,"
        how = "rename that to OTHER.pth.unfinished, then train.py --resume --out OTHER.pth"
        raise OSError(error.errno, f"{safe} {how}", out) from None
    try:
        plot(picture, os.path.basename(args.data), state, losses, args.steps)
    except Exception as error:  # whatever matplotlib may stumble over, the network is what counts
        log(f"no picture: {error}")
    print("  ".join(f"{part:>6}" for part in losses))
    print("  ".join(f"{loss:6.4f}" for loss in losses.values()), "nats per character")
    best = state["best"]
    print(f"kept: averaged weights of step {best['step']:,}, logits scaled by {best['scale']:.2f}")
    print("\n".join(sampling.generate(net, vocab, 10, temperature=usual(args))))
    print(f"written: {out} and {picture}\nnext:")
    own = ["--model", args.out] if args.out else []
    listed = ["--data", os.path.relpath(args.data)] if args.data != sampling.NAMES else []
    listed += ["--column", args.column] if args.column else []
    print(sampling.command("sampling.py", *own, "--new", *listed))


if __name__ == "__main__":
    main()
