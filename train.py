"""Train the network on a list of names and write model_state.pth."""

import hashlib
import io
import math
import os
import random
import shlex
import signal
import sys
from contextlib import suppress

import torch
from filelock import FileLock, Timeout
from torch.nn import functional as F
from tqdm import tqdm

from layers import BatchNorm1d
from model import END, Vocabulary, backward_shared, forward_shared, read_names, read_tensors, save, share
from model import wavenet, write, write_tensors
from sampling import HERE, TINY, Parser, generate, number

CHUNK = 100  # steps whose minibatches are drawn at once, which costs hardly more than drawing one


def split(names):
    """Rows -> (train, test, validation): shuffled, then 80 %, 10 % and 10 % of them."""
    names = list(names)
    random.Random(42).shuffle(names)
    a, b = int(0.8 * len(names)), int(0.9 * len(names))
    parts = names[:a], names[a:b], names[b:]
    if not all(parts):
        raise ValueError(f"{len(names)} names are too few to split in three: give at least 10")
    return parts


def windows(names, vocab, block_size):
    """Names -> (N, block_size + 1) codes: every character and end of a name, after what stands before it.

    All windows are one view over one array of a byte, or four, a character.
    """
    text = END * block_size + "".join(name + END for name in names)
    codes = torch.tensor(vocab.encode(text), dtype=torch.uint8 if len(vocab) <= 256 else torch.int32)
    return codes.unfold(0, block_size + 1, 1)


def contexts_and_targets(window):
    """(..., T + 1) codes -> contexts (..., T) and targets (...), int64."""
    contexts, targets = window[..., :-1].long(), window[..., -1].long()
    # What stands before the last END is another name: all of it becomes padding.
    return contexts * (contexts != 0).flip(-1).cumprod(-1).flip(-1), targets


def draw(window, vocab_size, generator, args):
    """CHUNK minibatches of windows drawn at random: a list of (tree, targets (B,))."""
    index = torch.randint(len(window), (CHUNK, args.batch_size), generator=generator)
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
    args.checkpoint_every steps keep(state) is given all that is needed to go on from there, as `state`,
    to the very same bits; when stopped(), once more, and None is returned.
    Raises FloatingPointError when the loss is no longer a finite number.
    """
    parameters = list(net.parameters())
    average = [torch.zeros_like(parameter) for parameter in parameters]
    generator = torch.Generator().manual_seed(args.seed)
    device = torch if args.device == "cpu" else getattr(torch, args.device)  # whose generator Dropout uses
    start, loss_sum, curves = 0, 0.0, {"train": [], "val": []}
    if state:
        start, loss_sum = int(state["step"]), float(state["loss_sum"])
        curves = {part: [(int(step), float(loss)) for step, loss in state["curves"][part]] for part in curves}
        net.load_state_dict(state["state_dict"])
        for mean, saved in zip(average, state["average"], strict=True):
            mean.copy_(saved)
        generator.set_state(state["generator"])
        device.set_rng_state(state["dropout"])

    for layer in net:
        if isinstance(layer, BatchNorm1d):
            layer.track_running_stats = False  # only eval mode needs them, and then they are measured
    late, every = args.steps - max(1, args.steps // 4), max(1, args.steps // 200)
    net.train()
    with tqdm(total=args.steps, initial=start, unit="step", smoothing=0.05, disable=None) as bar:
        for step in range(start, args.steps):
            if step % CHUNK == 0 or step == start:
                drawn_with = generator.get_state()
                batches = draw(train_windows, len(net[0].weight), generator, args)
            loss = sgd_step(net, parameters, *batches[step % CHUNK], learning_rate(step, args.steps, args.lr))
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step + 1}: --lr {args.lr} is too high")
            # Neighbouring weights are nearly the same, so every tenth step is enough for their mean.
            if step >= late and (args.steps - 1 - step) % 10 == 0:
                count = (step - late) // 10 + 1
                for mean, parameter in zip(average, parameters):
                    mean.lerp_(parameter, 1 / count)
            loss_sum += loss
            done = step + 1
            bar.update()
            if done % every == 0:
                curves["train"].append((done, loss_sum / every))
                loss_sum = 0.0
            validate = done % max(every * 5, 1000) == 0
            if validate:
                recompute_statistics(net, train_windows, batches=1)
                curves["val"].append((done, evaluate(net, val_windows)))
            if validate or done % every == 0:
                remark = ", ".join(f"{part} {curve[-1][1]:.3f}" for part, curve in curves.items() if curve)
                bar.set_postfix_str(remark, refresh=False)
                if bar.disable and validate:
                    print(f"step {done:,} of {args.steps:,}: {remark}", file=sys.stderr)
            if done % args.checkpoint_every == 0 or stopped():
                if not all(parameter.isfinite().all() for parameter in parameters):
                    raise FloatingPointError(f"the weights overflowed at step {done}: --lr {args.lr} is too high")
                keep(
                    {
                        "step": done,
                        "loss_sum": loss_sum,
                        "curves": curves,
                        "state_dict": net.state_dict(),
                        "average": average,
                        "generator": generator.get_state() if done % CHUNK == 0 else drawn_with,
                        "dropout": device.get_rng_state(),
                    }
                )
                if stopped():
                    return None
    for mean, parameter in zip(average, parameters):
        parameter.copy_(mean)
    recompute_statistics(net, train_windows, batches=16)
    return curves


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
    parser.add_argument("--data", default=os.path.join(HERE, "names.txt"), help="a text file, one name a line (names.txt)")
    parser.add_argument("--out", default=os.path.join(HERE, "model_state.pth"), help="where the network goes (model_state.pth)")
    parser.add_argument("--steps", type=number(int, 1, 10**12), default=200_000, help="SGD steps (200000)")
    parser.add_argument("--batch-size", type=number(int, 2, 10**6), default=96, help="windows a step (96)")
    parser.add_argument("--block-size", type=number(int, 2, 2**16), default=16, help="characters seen, a power of two (16)")
    parser.add_argument("--n-embd", type=number(int, 1, 10**5), default=24, help="size of a character's vector (24)")
    parser.add_argument("--n-hidden", type=number(int, 1, 10**5), default=280, help="size of each level (280)")
    parser.add_argument("--lr", type=number(float, TINY, 1 / TINY), default=0.1, help="learning rate; a tenth of it in the second half (0.1)")
    parser.add_argument("--dropout", type=number(float, 0, 0.99), default=0.15, help="share of each level's channels left out (0.15)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1, help="the same weights at every run (1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"], help="where to train (cpu)")
    parser.add_argument("--checkpoint-every", type=number(int, 1, 10**12), default=3000, help="steps between saves (3000)")
    parser.add_argument("--resume", action="store_true", help="go on with a training that was interrupted")
    return parser


# The flags that make a training what it is: --resume cannot change them.
OF_THE_RUN = "steps batch_size block_size n_embd n_hidden lr dropout seed device".split()


def resumed(parser, argv, unfinished):
    """The state in the file `unfinished`, and its flags with those of argv over them.

    Raises ValueError when there is none, or when a flag in argv would make it another training.
    """
    state = read_tensors(unfinished, "there is nothing to resume")
    if not isinstance(state, dict) or not isinstance(state.get("flags"), dict):
        raise ValueError(f"{unfinished} is not of an unfinished training: delete it and start anew")
    saved = [f"--{name}={value}" for name, value in state["flags"].items()]
    before, after = parser.parse_args(saved), parser.parse_args(saved + argv)
    for name in OF_THE_RUN:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {new} contradicts the unfinished training's {flag} {old}")
    return state, after


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = flags()
    args = parser.parse_args(argv)
    if "OMP_NUM_THREADS" not in os.environ:
        # Two threads gain little on products of this size, and wait for each other on a busy machine.
        torch.set_num_threads(1)
    with parser.one_line_errors():
        if os.path.isdir(args.out):
            raise ValueError(f"{args.out} is a folder: choose another --out")
        try:  # what cannot be written shall fail now, not after hours
            write(f"{args.out}.test", b"")
            os.remove(f"{args.out}.test")
        except OSError as error:
            raise ValueError(f"{args.out} cannot be written ({error.strerror}): choose another --out") from None
        lock = FileLock(f"{args.out}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another training is writing to {args.out}: choose another --out") from None
        try:
            state, unfinished = None, f"{args.out}.unfinished"
            if args.resume:
                state, args = resumed(parser, argv, unfinished)
            elif os.path.exists(unfinished):
                raise ValueError(f"{unfinished} is of an unfinished training: add --resume to go on, or delete it")
            run(args, state, unfinished)
        finally:
            with suppress(OSError):
                os.remove(lock.lock_file)
            lock.release()


def run(args, state, unfinished):
    """The whole training: from the list of names to model_state.pth, loss.png and a few names."""
    if args.device != "cpu" and not getattr(torch, args.device).is_available():
        raise ValueError(f"this machine has no device {args.device!r}: leave out --device")
    names = read_names(args.data)
    data = hashlib.sha256("\n".join(names).encode()).hexdigest()
    if state and data != state.get("names"):
        raise ValueError(f"the names in {args.data} are not those of the unfinished training")
    parts = dict(zip(("train", "test", "val"), split(names)))
    known = set(parts["train"])
    if unseen := [name for name in parts["val"] if name not in known]:
        parts["unseen"] = unseen
    vocab = Vocabulary(names)
    views = {part: windows(some, vocab, args.block_size) for part, some in parts.items()}
    torch.manual_seed(args.seed)
    net = wavenet(len(vocab), args.block_size, args.n_embd, args.n_hidden, args.dropout).to(args.device)
    print(
        f"{len(names):,} rows, {len(set(names)):,} distinct, {len(vocab) - 1} characters; "
        f"windows: {', '.join(f'{part} {len(view):,}' for part, view in views.items())}; "
        f"{sum(parameter.numel() for parameter in net.parameters()):,} parameters",
        file=sys.stderr,
    )

    caught = []

    def stop(signum, frame):
        caught.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # the second one ends at once

    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, stop)
    kept = {"names": data, "flags": {name.replace("_", "-"): getattr(args, name) for name in OF_THE_RUN}}
    kept["flags"]["data"] = os.path.abspath(args.data)

    def keep(state):
        write_tensors(unfinished, state | kept)

    try:
        curves = train(net, views["train"], views["val"], args, state, keep, lambda: caught)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        if not state:
            raise
        raise ValueError(f"{unfinished} does not fit its flags: delete it and start anew") from None
    except FloatingPointError as error:
        hint = f"; the last good state is in {unfinished}" if os.path.exists(unfinished) else ""
        raise ValueError(f"{error}{hint}") from None
    if curves is None:
        print(f"stopped; to go on: python train.py --out {shlex.quote(args.out)} --resume", file=sys.stderr)
        sys.exit(128 + caught[0])

    # The finished network is the same without its Dropout.
    plain = wavenet(len(vocab), args.block_size, args.n_embd, args.n_hidden)
    plain.load_state_dict(dict(zip(plain.state_dict(), net.cpu().state_dict().values(), strict=True)))
    calibrate(plain, views["val"])
    losses = {part: evaluate(plain, view) for part, view in views.items()}
    made = {name: getattr(args, name) for name in OF_THE_RUN} | {"rows": len(names), "losses": losses}
    save(args.out, plain, vocab, made | {"torch": str(torch.__version__)})
    picture = os.path.join(os.path.dirname(args.out), "loss.png")
    plot(picture, curves, losses)
    with suppress(FileNotFoundError):
        os.remove(unfinished)
    print("  ".join(f"{part:>6}" for part in losses))
    print("  ".join(f"{loss:6.4f}" for loss in losses.values()), "nats a character")
    print("\n".join(generate(plain.eval(), vocab, 10)))
    print(f"written: {args.out} and {picture}")


if __name__ == "__main__":
    main()
