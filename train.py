"""Train the network on a list of names and write model_state.pth."""

import copy
import io
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice

import torch
from filelock import FileLock, Timeout
from torch import distributed, nn
from tqdm import tqdm

import layers
import model
import sampling
from model import Vocabulary, WaveNet, contexts_and_targets, windows
from sampling import bounded, refuse_flags, token_losses, usual_temperature

EVAL_WINDOWS = 25_000, 430_000  # at most, of a split: at each validation, and at the end
SCALES = [percent / 100 for percent in range(30, 136, 5)]  # of the logits, for calibrate()
MAX_SMOOTHED = 2**24  # probabilities in a table of smooth_targets(): 64 MB, 600 while it is made
SOFTWARE = "train.py, names character by character"  # by which our own pictures are known
STOP_SIGNALS = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
cross_entropy = layers.CrossEntropyLoss()


# The data and the minibatches


def split(names):
    """Distinct names -> {"train", "val", "test"}: shuffled; 80 %, the last 10 %, the rest."""
    names = list(names)
    random.Random(42).shuffle(names)
    a, b = int(0.8 * len(names)), int(0.9 * len(names))
    parts = {"train": names[:a], "val": names[b:], "test": names[a:b]}
    if not all(parts.values()):
        raise ValueError(f"{len(names)} names are too few to split in three: give some hundreds")
    return parts


def default_hparams(n, vocab_size):
    """{flag: value} that suits a list of n training windows; measured in tests/RESULTS.md."""
    dropout = round(min(0.25, 5.7 / n**0.3), 2)
    truncate, steps = round(8 * max(0.0, dropout - 0.15), 2), min(200_000, n * 13 // 10)
    fits = n * vocab_size <= MAX_SMOOTHED
    table = {  # for at most so many windows: dropout, truncate, smoothing, steps
        5_000: (0.4, 0.95, 0.5 * fits, 12_000),
        25_000: (round(min(0.4, max(0.25, 3000 / n)), 2), 0.8, 0.2 * fits, 20_000),
        math.inf: (dropout, truncate, 0.0, steps),
    }
    row = next(row for most, row in table.items() if n <= most)
    return dict(zip(("dropout", "truncate", "smoothing", "steps"), row))


def truncate(contexts, share, generator):
    """Reduce a share of the contexts to their last 2 to 8 tokens.

    So what often follows a few characters is learned wherever they stand, as by counts of n-grams.
    """
    T = contexts.shape[-1]
    kept = torch.randint(2, 9, (*contexts.shape[:-1], 1), generator=generator)
    kept[torch.rand(kept.shape, generator=generator) >= share] = T
    return contexts * (torch.arange(T, 0, -1) <= kept)  # 0 is padding


def smooth_targets(tokens, vocab_size, share, order=6, discount=0.9):
    """(N, V): the targets of N windows as probabilities, a share of them from the other windows.

    It is label smoothing by Kneser-Ney counts, arXiv:2403.17240, without the window's own, so that
    what is seen only once is not learned by heart. Raises ValueError where N * V is too large.
    """
    if (n := len(tokens) * vocab_size) > MAX_SMOOTHED:
        raise ValueError(f"--smoothing would take {n:,} probabilities, too many: leave it out")
    contexts, targets = contexts_and_targets(tokens)
    onehot = nn.functional.one_hot(targets, vocab_size).float()
    ids = [torch.zeros_like(targets)]  # ids[k]: equal where the last k tokens are equal
    for k in range(min(order - 1, contexts.shape[1])):
        ids.append((ids[-1] * vocab_size + contexts[:, -1 - k]).unique(return_inverse=True)[1])
    ids.append(torch.arange(len(targets)))
    expected = torch.full_like(onehot, 1 / vocab_size)
    for same, longer in zip(ids, ids[1:]):
        # An n-gram counts once per distinct token before it; the longest, once per window.
        grams = longer * vocab_size + targets
        _, gram, counts = grams.unique(return_inverse=True, return_counts=True)
        times = counts[gram]
        followers = torch.zeros(same.max() + 1, vocab_size)
        followers.index_put_((same, targets), 1 / times, accumulate=True)
        others = followers[same] - onehot * (times == 1).unsqueeze(1)
        kept, total = (others - discount).clamp(min=0), others.sum(1, keepdim=True)
        backed_off = (kept + (total - kept.sum(1, keepdim=True)) * expected) / total
        # Where no other window has the context, total is 0 but for rounding.
        expected = torch.where(total > 0.5, backed_off, expected)
    return onehot.lerp(expected, share)


def minibatches(net, tokens, start, args):
    """Yield the minibatch of each step from `start` on: (rows, targets), drawn at random.

    targets are tokens (B,), or with --smoothing their probabilities (B, vocab_size).
    """
    if args.smoothing:
        smoothed = smooth_targets(tokens, net.config["vocab_size"], args.smoothing).to(args.device)
    # A hundred small ones are drawn at once: the calls take about as long as those for one.
    chunk = max(1, min(100, 2**22 // (args.batch_size * args.block_size)))
    share = slice(rank(), None, world_size())  # each process takes its own windows
    for first in range(start - start % chunk, args.steps, chunk):
        # It depends on the step and --seed alone, so that a resumed training draws the same.
        generator = torch.Generator().manual_seed(args.seed * 10**9 + first)
        drawn = torch.randint(len(tokens), (chunk, args.batch_size), generator=generator)
        contexts, targets = contexts_and_targets(tokens[drawn])
        contexts = truncate(contexts, args.truncate, generator)[:, share].to(args.device)
        targets = targets[:, share].to(args.device)
        if args.smoothing:
            targets = (smoothed[ids] for ids in drawn[:, share])
        rows = layers.distinct_rows(net, contexts)
        yield from islice(zip(rows, targets), max(0, start - first), None)


# One step


def learning_rate(step, args):
    """--lr for the first half of the steps, a tenth of it for the second."""
    return args.lr if step < args.steps // 2 else args.lr / 10


def train_step(net, rows, targets, lr, parameters, weight_decay=0.0, pretrained=()):
    """One step of SGD -> the loss in nats per token. Equivalent to this, but usually faster:

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
        if world_size() > 1:
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


def token_counts(tokens, vocab):
    """How often each token is the target of a window, (V,)."""
    parts = tokens[:, -1].split(2**22)  # in parts: a list of ten million fits
    return sum(torch.bincount(part, minlength=len(vocab)) for part in parts)


def n_characters(tokens, vocab):
    """How many windows have a character or the end of a name as target: not a mark."""
    return len(tokens) - ((tokens[:, -1] == vocab.mark).sum().item() if vocab.mark else 0)


def evaluate(net, tokens, vocab, scales=(1.0,)):
    """The mean loss, in nats per character of the names and their ends, for each scale."""
    losses = token_losses(net, tokens, scales)
    return (losses.double().sum(0) / n_characters(tokens, vocab)).tolist()


def calibrate(net, tokens, vocab):
    """(loss, scale): the scale of what the network adds to its bias that has the least loss.

    A network is too sure of what it knows by heart, arXiv:1706.04599: less of it leaves more to the
    bias, the frequencies of the characters.
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
            module.momentum = None  # the mean of all batches
    batch_size = min(8192, max(2048, len(tokens) // 4))
    for _ in range(batches):
        drawn = torch.randint(len(tokens), (1, batch_size), generator=generator)
        contexts, _ = contexts_and_targets(tokens[drawn].to(next(net.parameters()).device))
        layers.forward(net, layers.distinct_rows(net, contexts)[0])
    net.eval()


def validate(average, train_windows, val_windows, vocab, args, state, bar):
    """Measure the averaged weights, snapshot them where none was better, and say so."""
    recompute_statistics(average, train_windows, batches=1)
    loss, _ = calibrate(average, val_windows, vocab)
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss is {loss} at step {state['step']:,}: lower --lr")
    state["curves"]["val"].append((state["step"], loss))
    # In the first half a small validation split would choose far too early a step.
    first_half = 0 < state["step"] <= args.steps // 2
    if loss < state["best"]["loss"] and not first_half:
        weights = copy.deepcopy(average.state_dict())
        state["best"] = dict(step=state["step"], loss=loss, state_dict=weights)
    best, at = min((loss, step) for step, loss in state["curves"]["val"])
    temperature = usual_temperature(args.truncate)
    names = sampling.generate(average, vocab, 1, temperature=temperature, max_length=12)
    message = f"val {loss:.3f} (best {best:.3f} at {at:,}) {''.join(names)}"
    bar.set_description_str(message, refresh=False)
    if bar.disable:  # there is no terminal
        log(f"step {state['step']:,} of {args.steps:,}: {message}")


# The training


def record_loss(state, loss, per_point):
    """Add a step's loss to the curve, which has a point for the mean of so many steps."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {state['step']:,}: lower --lr")
    state["loss_sum"] += loss
    if state["step"] % per_point == 0:
        state["curves"]["train"].append((state["step"], state["loss_sum"] / per_point))
        state["loss_sum"] = 0.0


@torch.no_grad()
def train(net, average, vocab, train_windows, val_windows, args, state, save_state):
    """SGD from state["step"] to args.steps -> the signal that stopped it earlier, or 0.

    state["best"] becomes the averaged weights of least validation loss, of the second half of the
    steps or of those that it starts from; state["curves"] the losses.
    save_state(state) is called every args.checkpoint_every steps, at the end, and when stopped; to
    go on from there gives the same bits on a CPU. Raises ValueError when a loss is not finite.
    """
    parameters, steps = list(net.train().parameters()), args.steps
    pretrained = [weight.to(args.device) for weight in state["pretrained"]]
    batches = minibatches(net, train_windows, state["step"], args)
    weight_decay = 30 / len(train_windows) if pretrained else 60 / max(12_000, steps)
    # Validating on a thousand windows takes the time of some ten steps: so at least fifty follow.
    eval_every = max(steps // 40, len(val_windows) // 20, 1)
    per_character = len(train_windows) / n_characters(train_windows, vocab)
    hidden = True if rank() or sys.stderr is None else None  # None: unless on a terminal
    bar = tqdm(total=steps, initial=state["step"], dynamic_ncols=True, disable=hidden)
    bar.bar_format = "{n_fmt}/{total_fmt} {remaining} {rate_fmt} {desc}"
    with bar, stop_signals() as received:
        if pretrained and not state["step"] and not rank():  # what it starts from may remain best
            validate(average, train_windows, val_windows, vocab, args, state, bar)
        for step in range(state["step"], steps):
            # For dropout: another seed than that of minibatches(), and resuming repeats it.
            torch.manual_seed(~(args.seed * 10**9 + step))
            rows, targets = next(batches)
            lr = learning_rate(step, args)
            loss = train_step(net, rows, targets, lr, parameters, weight_decay, pretrained)
            state["step"] = step + 1
            record_loss(state, loss * per_character, max(1, steps // 200))
            last, stop = step == steps - 1, agreed(received, args.device)
            eval_due = last or (step + 1) % eval_every == 0
            if step % 10 == 9 or eval_due:  # not at each step: neighbours are nearly the same
                update_average(average, net, state["averaged"])
                state["averaged"] += 1
            if eval_due and not rank():
                validate(average, train_windows, val_windows, vocab, args, state, bar)
            bar.update()
            if (last or stop or (step + 1) % args.checkpoint_every == 0) and not rank():
                save_state(state)
            if stop:
                break
    return agreed(received, args.device)


@torch.no_grad()
def finalize(config, best, train_windows, val_windows, vocab):
    """(network, scale): the best weights as they are written, without Dropout, logits scaled."""
    net = WaveNet(**config)
    # By position: without Dropout the layers have other numbers, and so other names.
    net.load_state_dict(dict(zip(net.state_dict(), best["state_dict"].values(), strict=True)))
    recompute_statistics(net, train_windows, batches=16)
    _, scale = calibrate(net, val_windows, vocab)
    net[-1].weight.mul_(scale)
    return net.eval(), scale


def plot(path, title, state, loss, steps):
    """Write the picture of the curves, with the network that was kept as a dot."""
    from matplotlib.figure import Figure  # slow to import: not before it is needed

    figure, curves = Figure(figsize=(7, 4), layout="constrained"), state["curves"]
    axes = figure.subplots()
    axes.plot(*zip(*curves["train"]), label="training, smoothed")
    axes.plot(*zip(*curves["val"]), label="validation, averaged weights")
    axes.plot(state["best"]["step"], loss, "ko", label=f"kept: {loss:.3f}")
    axes.axvline(steps // 2, color="grey", linewidth=0.8, linestyle=":", label="learning rate / 10")
    title = title.replace("$", r"\$")  # not the beginning of mathematics
    axes.set(xlabel="step", ylabel="loss (nats per character)", title=title)
    shown = sorted(loss for curve in curves.values() for _, loss in curve)
    axes.set_ylim(shown[0] - 0.05, shown[int(0.95 * len(shown))] + 0.1)  # not the steep beginning
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": SOFTWARE})
    model.atomic_write(path, buffer.getvalue())


# Several processes: torchrun --nproc-per-node N train.py


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def log(message):
    """sampling.log(), of process 0 alone."""
    if not rank():
        sampling.log(message)


@contextmanager
def process_group(device):
    """Inside, the processes that torchrun started can reach each other."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"process {rank()}: {message}: if another one ended, --resume") from None
    finally:
        distributed.destroy_process_group()


def average_gradients(parameters):
    """The mean over all processes, by one sum of one flat buffer, as DistributedDataParallel."""
    gradients = [parameter.grad for parameter in parameters]
    flat = nn.utils.parameters_to_vector(gradients)
    distributed.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / world_size(), gradients)


def agreed(received, device):
    """The signal that has reached any of the processes, or 0."""
    signum = max((signum for _, signum in received), default=0)
    if world_size() > 1:
        signum = torch.tensor(signum, device=device)
        distributed.all_reduce(signum, distributed.ReduceOp.MAX)
    return int(signum)


def check_processes(args, sha256):
    """Raise ValueError, in process 0, when the processes cannot train together."""
    here, everywhere = [sha256, *(getattr(args, each) for each in RUN_ARGS)], [None] * world_size()
    distributed.all_gather_object(everywhere, here)
    message = None
    if everywhere != [here] * world_size():
        message = "the processes have different lists or flags: start all with the same"
    elif args.batch_size % world_size() or args.batch_size < 2 * world_size():
        message = f"--batch-size {args.batch_size} must be two or more for each of {world_size()}"
    if message:
        raise SystemExit(2) if rank() else ValueError(message)


# The command line, and what it does to files

# What makes a training the one it is, and the flags that --resume, or no --out, may have beside it.
SIZES = "block_size n_embd n_hidden".split()
RUN_ARGS = "steps dropout truncate smoothing lr batch_size seed threads".split() + SIZES
WITH_RESUME = "resume out data column device checkpoint_every".split()
WITHOUT_OUT = "resume seed threads device checkpoint_every".split()
STATE = "step averaged loss_sum best curves pretrained state_dict average layers names args".split()


def device(name):
    """An argparse type: a device of this machine."""
    here = ["cpu"] + [each for each in ("cuda", "mps") if getattr(torch, each).is_available()]
    if name not in here:
        raise ArgumentTypeError(
            f"{name!r} is not on this machine: use --device {' or '.join(here)}"
        )
    return name


def build_parser():
    parser = sampling.Parser(description=__doc__)
    whole, real = partial(bounded, int), partial(bounded, float)
    n, size = partial(whole, 1, 10**12), partial(whole, 1, model.MAX_SIZE)
    batch_size, threads = partial(whole, 2, 10**6), partial(whole, 1, 1024)
    seed, dropout = partial(whole, 0, 2**32 - 1), partial(real, 0, 0.99)
    share, positive = partial(real, 0, 1), partial(real, 1e-6, 1e6)
    blocks = [2**i for i in range(1, 11)]
    add = parser.add_argument_group("files").add_argument
    add("--data", metavar="LIST", default=sampling.NAMES, help="one name per line (names.txt)")
    add("--column", metavar="C", help="of a table: the number or the heading of its column")
    add("--out", metavar="FILE.pth", help="the network; its picture becomes FILE.png")
    add("--init-from", metavar="FILE", help="start from this network, not from random weights")
    add("--resume", action="store_true", help="go on with an interrupted training")
    add("--checkpoint-every", type=n, metavar="N", default=3000, help="steps between saves (3000)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=n, metavar="N", help="steps of SGD (what suits the list)")
    add("--dropout", type=dropout, metavar="P", help="share of channels (what suits the list)")
    add("--truncate", type=share, metavar="P", help="share of short contexts (what suits the list)")
    add("--smoothing", type=share, metavar="P", help="share from n-grams (what suits the list)")
    add("--lr", type=positive, metavar="X", default=0.1, help="learning rate at first (0.1)")
    add("--batch-size", type=batch_size, metavar="N", default=96, help="windows per step (96)")
    add("--seed", type=seed, metavar="N", default=1, help="another seed, another network (1)")
    add("--threads", type=threads, metavar="N", default=1, help="processor cores to use (1)")
    add("--device", type=device, metavar="D", default="cpu", help="cpu, cuda or mps (cpu)")
    add = parser.add_argument_group("network").add_argument
    add("--block-size", type=int, choices=blocks, metavar="N", default=16, help="2 ... 1024 (16)")
    add("--n-embd", type=size, metavar="N", default=24, help="size of a character's vector (24)")
    add("--n-hidden", type=size, metavar="N", default=280, help="channels of each level (280)")
    return parser


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
    before = {signum: signal.signal(signum, handler) for signum in ours}
    try:
        yield received
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextmanager
def locked(path):
    """Nobody else is inside for the same path."""
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):
                    os.remove(path)
    except Timeout:
        raise ValueError(f"another training holds {path}: choose another --out") from None


def main(argv=None):
    sampling.run_cli(lambda: run(*sampling.parse(build_parser(), argv)))


def command(*words):
    """What to type for `python WORDS ...`."""
    return f"python {subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)}"


def run(args, given):
    """Start a training or go on with one, the only one that writes to its files -> exit status."""
    if args.out is None:
        refuse_flags(given, WITHOUT_OUT, "would change the shipped network: add --out FILE.pth")
        own, shipped = model.layer_names(WaveNet(2, args.block_size, 1, 1)), None
        with suppress(ValueError):  # where there is no network, none can be lost
            shipped = model.read_checkpoint(sampling.MODEL, model.CHECKPOINT, "")["layers"]
        if shipped not in (None, own):
            raise ValueError("the shipped network has other layers: add --out FILE.pth")
    out, pretrained, state = os.path.realpath(args.out or sampling.MODEL), None, None
    if not (out.endswith(".pth") and os.path.isdir(os.path.dirname(out))):
        raise ValueError(f"--out {args.out} must end in .pth, in a folder that exists")
    unfinished = f"{out}.unfinished"
    with process_group(args.device), nullcontext() if rank() else locked(f"{unfinished}.lock"):
        if args.resume:
            refuse_flags(given, WITH_RESUME, "cannot go with --resume, which knows its flags")
            state = model.read_checkpoint(unfinished, STATE, "there is nothing to resume")
            args = resumed(given, state["args"])
        elif os.path.exists(unfinished):
            raise ValueError(f"{unfinished} is an unfinished training: add --resume, or delete it")
        elif args.init_from:
            refuse_flags(given, given.keys() - SIZES, f"is that of {args.init_from}: leave it out")
            pretrained = model.load(args.init_from)
            vars(args).update({name: pretrained[0].config[name] for name in SIZES})
        signum = train_list(args, state, pretrained, out, unfinished)
        if signum:
            words = ["train.py", "--resume"] + (["--out", args.out] if args.out else [])
            log(f"stopped; to go on: {command(*words)}")
    return signum and 128 + signum


def resumed(given, saved):
    """The flags of a saved training, those given now over them, checked as on a command line."""
    if not isinstance(saved, dict):
        raise ValueError("the unfinished training holds something else: delete it")
    names = [*RUN_ARGS, "data", "column", "device", "checkpoint_every"]
    flags = {name: saved.get(name) for name in names} | given | {"resume": None}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items() if v is not None]
    return sampling.parse(build_parser(), words)[0]


def train_list(args, state, pretrained, out, unfinished):
    """A training, from the list of names to the files -> the signal that stopped it, or 0."""
    torch.set_num_threads(args.threads)
    picture, new = f"{out.removesuffix('.pth')}.png", not state
    check_files(args, out, picture, unfinished)
    names = model.read_names(args.data, args.column, log)
    vocab, parts, sha256 = Vocabulary(names), split(names), model.sha256(names)
    data = {part: windows(some, vocab, args.block_size) for part, some in parts.items()}
    hparams = default_hparams(len(data["train"]), len(vocab))
    chosen = {name: hparams[name] for name in hparams if getattr(args, name) is None}
    vars(args).update(chosen)
    if world_size() > 1:
        check_processes(args, sha256)
    net, weights = new_network(args, vocab, data["train"], pretrained)
    average, own = copy.deepcopy(net), {"layers": model.layer_names(net), "names": sha256}
    if new:
        best = dict(step=0, loss=math.inf, state_dict=copy.deepcopy(average.state_dict()))
        state = dict(step=0, averaged=0, loss_sum=0.0, best=best, pretrained=weights)
        state["curves"] = {"train": [], "val": []}
    else:
        restore(state, own, net, average, args, unfinished)
    describe(len(names), vocab, data, net, chosen)
    # Not copies but the weights themselves: whenever the state is saved they are those of its step.
    state |= own | {"state_dict": dict(net.state_dict()), "average": dict(average.state_dict())}
    path = args.data if args.data == "-" else os.path.abspath(args.data)
    state["args"] = vars(args) | {"data": path}
    save_state = partial(model.write_checkpoint, unfinished)
    fitting = data["train"], data["val"][: min(EVAL_WINDOWS[0], 2**25 // len(vocab))]
    try:
        if new and not rank():
            save_state(state)  # so whether it can be written shows before the work
        signum = train(net, average, vocab, *fitting, args, state, save_state)
        if not signum and not rank():
            finish(args, net, state, vocab, parts, data, fitting, out, picture)
            os.remove(unfinished)
        return signum
    except (ValueError, MemoryError, RuntimeError) as error:
        # It diverged at once, or what it learned is refused: then there is nothing to go on with.
        refused = isinstance(error, ValueError) and state["step"] == args.steps
        saved = state["step"] >= min(args.checkpoint_every, args.steps)
        if new and not rank() and (refused or not saved):
            os.remove(unfinished)
        raise


def restore(state, own, net, average, args, unfinished):
    """Load the weights of a saved state. Raises ValueError when it belongs to another training."""
    if own["names"] != state["names"]:
        raise ValueError(f"{unfinished} is of another list than --data")
    if own["layers"] != state["layers"]:
        raise ValueError(f"{unfinished} has other layers than model.py: delete it and train anew")
    try:
        best, curves = state["best"], state["curves"]
        for weights in best["state_dict"], state["average"]:
            average.load_state_dict(weights)
        net.load_state_dict(state["state_dict"])
        shapes = [weight.shape for weight in net.parameters()]
        fits = [weight.shape for weight in state["pretrained"]] in ([], shapes)
        fits &= 0 <= best["step"] <= state["step"] <= args.steps and state["averaged"] >= 0
        fits &= best["loss"] > 0 and math.isfinite(state["loss_sum"])
        fits &= all(len(point) == 2 for point in curves["train"] + curves["val"])
    except Exception:  # whatever is missing there, or of another type
        fits = False
    if not fits:
        raise ValueError(f"{unfinished} holds something else: delete it and train anew")


def check_files(args, out, picture, unfinished):
    """Raise ValueError when what would be written is to be read, or is not ours to replace."""
    model.check_output(out, [args.data])  # it may start from itself
    for path in picture, unfinished, f"{unfinished}.lock":
        model.check_output(path, [args.data, args.init_from])
    with suppress(FileNotFoundError), open(picture, "rb") as file:
        if SOFTWARE.encode() not in file.read(4096):
            raise ValueError(f"{picture} is not from train.py: choose another --out, or move it")


def new_network(args, vocab, tokens, pretrained):
    """(the network of the seed, on --device; the weights that it started from with --init-from).

    Its bias knows the frequencies, so that training need not unlearn rare tokens. Raises ValueError
    where the device gives other losses than a CPU.
    """
    torch.manual_seed(args.seed)
    net = WaveNet(len(vocab), args.block_size, args.n_embd, args.n_hidden, args.dropout)
    if getattr(net[-1], "bias", None) is not None:
        net[-1].bias.data = (token_counts(tokens, vocab) + 0.5).log().log_softmax(0)
    weights = []
    if pretrained:
        took = model.load_pretrained(net, vocab, *pretrained[:2])
        same = "".join(char for char, old in took.items() if char == old)
        other = "".join(f", {char} from {old}" for char, old in took.items() if char != old)
        log(f"from {args.init_from}: all levels, and the vectors of {same or 'none'}{other}")
        log("if the two lists share names, the losses look better than they are")
        weights = [weight.detach().clone() for weight in net.parameters()]
    if args.device != "cpu":
        losses = token_losses(net, tokens[:1000])
        if not torch.allclose(losses, token_losses(net.to(args.device), tokens[:1000]), atol=1e-3):
            raise ValueError(f"--device {args.device} computes wrongly here: leave it out")
    return net, weights


def describe(n_names, vocab, data, net, chosen):
    """Say what is about to happen."""
    counts = ", ".join(f"{part} {len(tokens):,}" for part, tokens in data.items())
    log(f"{n_names:,} names, {len(vocab) - 1} tokens; windows: {counts}")
    flags = " ".join(f"--{name} {value}" for name, value in chosen.items())
    parameters = sum(parameter.numel() for parameter in net.parameters())
    log(f"{parameters:,} parameters" + f"; what suits the list: {flags}" * bool(flags))
    if n_names < 200:
        log("so few names teach little: sample with --temperature 0.7; Latin letters: --init-from")


def finish(args, net, state, vocab, parts, data, fitting, out, picture):
    """Write the best network and its picture, and print the losses and a few names."""
    net, scale = finalize(net.config, state["best"], *fitting, vocab)
    losses = {part: evaluate(net, t[: EVAL_WINDOWS[1]], vocab)[0] for part, t in data.items()}
    counts = token_counts(data["train"], vocab)
    entropy = torch.special.entr(counts / len(data["train"])).sum().item()
    unigram = entropy * len(data["train"]) / n_characters(data["train"], vocab)
    if not losses["train"] < unigram:
        what = f"has a loss of {losses['train']:.3f}, counting characters {unigram:.3f}"
        raise ValueError(f"the network learned nothing, it {what}: lower --lr, or more --steps")
    held_out = parts["val"][: EVAL_WINDOWS[0]] + parts["test"][: EVAL_WINDOWS[0]]
    scores = torch.tensor(sampling.score(net, vocab, held_out), dtype=torch.float64)
    metadata = {name: getattr(args, name) for name in RUN_ARGS} | {
        "names": state["names"],
        "rows": sum(map(len, parts.values())),
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
        plot(picture, os.path.basename(args.data), state, losses["val"], args.steps)
    except Exception as error:  # whatever matplotlib may stumble over, the network is what counts
        log(f"no picture: {error}")
    print("  ".join(f"{part:>6}" for part in losses))
    print("  ".join(f"{loss:6.4f}" for loss in losses.values()), "nats per character")
    print(f"kept: averaged weights of step {state['best']['step']:,}, logits scaled by {scale:.2f}")
    temperature = usual_temperature(args.truncate)
    print("\n".join(sampling.generate(net, vocab, 10, temperature=temperature)))
    print(f"written: {out} and {picture}\nnext:")
    words = ["--model", args.out] * bool(args.out) + ["--new"]
    words += ["--data", args.data] * (args.data != sampling.NAMES)
    words += ["--column", args.column] * bool(args.column)
    words += ["--temperature", str(temperature)] * (temperature < 1)
    print(command("sampling.py", *words), flush=True)  # before the state is removed


if __name__ == "__main__":
    main()
