"""Train the network on a list of names and write model_state.pth."""

import argparse
import io
import os
import random
import sys

import torch
from torch.nn import functional as F
from tqdm import tqdm

from layers import BatchNorm1d
from model import END, Vocabulary, backward_shared, forward_shared, read_names, save, share, wavenet, write
from sampling import HERE, Parser, generate, number

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

    All windows are one view over one array of a byte or four a character.
    """
    text = END * block_size + "".join(name + END for name in names)
    codes = torch.tensor(vocab.encode(text), dtype=torch.uint8 if len(vocab) <= 256 else torch.int32)
    return codes.unfold(0, block_size + 1, 1)


def contexts_and_targets(window):
    """(..., T + 1) codes -> contexts (..., T) and targets (...), int64."""
    contexts, targets = window[..., :-1].long(), window[..., -1].long()
    # What stands before the last END is another name: all of it becomes padding.
    return contexts * (contexts != 0).flip(-1).cumprod(-1).flip(-1), targets


def minibatches(window, batch_size, noise, vocab_size, device, generator):
    """Endless (tree, targets (B,)) of windows drawn at random.

    Each character of a context is blanked with probability `noise`: smoothing by noise, arXiv:1703.02573,
    keeps the network from learning names by heart.
    """
    while True:
        drawn = window[torch.randint(len(window), (CHUNK, batch_size), generator=generator)]
        contexts, targets = contexts_and_targets(drawn)
        contexts *= torch.rand(contexts.shape, generator=generator) >= noise
        yield from zip(share(contexts.to(device), vocab_size), targets.to(device))


def learning_rate(step, steps, lr):
    """lr for the first half of the steps, a tenth of it for the second."""
    return lr if step < steps // 2 else lr / 10


def cross_entropy(logits, targets):
    """Logits (B, V), targets (B,) -> mean loss in nats, and its gradient (softmax - one-hot) / B."""
    log_probs = logits.log_softmax(1)
    targets = targets.unsqueeze(1)
    picked = log_probs.gather(1, targets)
    loss = -picked.mean().item()
    return loss, log_probs.exp_().scatter_(1, targets, picked.exp_() - 1) / len(targets)


def evaluate(net, window, batch_size=8192):
    """Mean loss, in nats a character, of the network in eval mode over all windows."""
    device = net[0].weight.device
    net.eval()
    total = 0.0
    for part in window.split(batch_size):
        contexts, targets = contexts_and_targets(part)
        (tree,) = share(contexts[None].to(device), len(net[0].weight))
        total += F.cross_entropy(forward_shared(net, tree), targets.to(device), reduction="sum").item()
    net.train()
    return total / len(window)


@torch.no_grad()
def sgd_step(net, parameters, tree, targets, lr):
    """One step of plain SGD on one minibatch -> its loss."""
    loss, grad = cross_entropy(forward_shared(net, tree), targets)
    backward_shared(net, tree, grad)
    for parameter in parameters:
        parameter.sub_(parameter.grad, alpha=lr)
    return loss


@torch.no_grad()
def train(net, train_windows, val_windows, args):
    """Plain SGD on the network; it ends with the mean of its weights over the second half of the steps.

    Returns the curves, {"train": [(step, smoothed loss)], "val": [(step, loss)]}, for the picture.
    """
    generator = torch.Generator().manual_seed(args.seed)
    batches = minibatches(train_windows, args.batch_size, args.noise, len(net[0].weight), args.device, generator)
    parameters = list(net.parameters())
    average = [torch.zeros_like(parameter) for parameter in parameters]
    averaged = 0
    curves = {"train": [], "val": []}
    every = max(1, args.steps // 200)
    losses = []
    net.train()
    with tqdm(total=args.steps, unit="step", disable=None) as bar:
        for step in range(args.steps):
            losses.append(sgd_step(net, parameters, *next(batches), learning_rate(step, args.steps, args.lr)))
            # Neighbouring weights are nearly the same, so every tenth step is enough for their mean.
            if step >= args.steps // 2 and (args.steps - 1 - step) % 10 == 0:
                averaged += 1
                for mean, parameter in zip(average, parameters):
                    mean.lerp_(parameter, 1 / averaged)
            bar.update()
            if len(losses) == every:
                curves["train"].append((step + 1, sum(losses) / every))
                losses.clear()
                if (step + 1) % max(args.steps // 40, 1000) == 0:
                    curves["val"].append((step + 1, evaluate(net, val_windows)))
                    remark = f"train {curves['train'][-1][1]:.3f}, val {curves['val'][-1][1]:.3f}"
                    bar.set_postfix_str(remark)
                    if bar.disable:
                        print(f"step {step + 1} of {args.steps}: {remark}", file=sys.stderr)
    for mean, parameter in zip(average, parameters):
        parameter.copy_(mean)
    recompute_statistics(net, train_windows, generator)
    return curves


def recompute_statistics(net, window, generator, batches=60, batch_size=2048):
    """BatchNorm1d's running statistics for averaged weights: none of them was measured; arXiv:1803.05407."""
    norms = [layer for layer in net if isinstance(layer, BatchNorm1d)]
    for norm in norms:
        norm.num_batches_tracked.zero_()
        norm.momentum, momentum = None, norm.momentum
    for _ in range(batches):
        drawn = window[torch.randint(len(window), (1, batch_size), generator=generator)]
        contexts, _ = contexts_and_targets(drawn)
        forward_shared(net, share(contexts.to(net[0].weight.device), len(net[0].weight))[0])
    for norm in norms:
        norm.momentum = momentum


def plot(path, curves, losses):
    """Write the picture of the curves, with the losses of the finished network as a line."""
    from matplotlib.figure import Figure  # slow to import: not before it is needed

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curves["train"]), label="training, smoothed")
    if curves["val"]:
        axes.plot(*zip(*curves["val"]), label="validation")
    axes.axhline(losses["val"], color="black", linewidth=0.8, label="validation, weights averaged")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a character)")
    axes.set_ylim(top=min(axes.get_ylim()[1], curves["train"][0][1]))
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write(path, buffer.getvalue())


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default=os.path.join(HERE, "names.txt"), help="a text file, one name a line (names.txt)")
    parser.add_argument("--out", default=os.path.join(HERE, "model_state.pth"), help="where the network goes (model_state.pth)")
    parser.add_argument("--steps", type=number(int, 1, 10**12), default=200_000, help="SGD steps (200000)")
    parser.add_argument("--batch-size", type=number(int, 2, 10**6), default=32, help="windows a step (32)")
    parser.add_argument("--block-size", type=number(int, 2, 2**16), default=16, help="characters seen, a power of two (16)")
    parser.add_argument("--n-embd", type=number(int, 1, 10**5), default=24, help="size of a character's vector (24)")
    parser.add_argument("--n-hidden", type=number(int, 1, 10**5), default=280, help="size of each level (280)")
    parser.add_argument("--lr", type=number(float, 0), default=0.1, help="learning rate; a tenth of it in the second half (0.1)")
    parser.add_argument("--noise", type=number(float, 0, 1), default=0.1, help="share of each context replaced at random (0.1)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1, help="the same weights at every run (1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"], help="where to train (cpu)")
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename} cannot be written ({error.strerror})")


def run(args):
    """The whole training: from the list of names to model_state.pth, loss.png and a few names."""
    if not getattr(torch, args.device).is_available():
        raise ValueError(f"this machine has no device {args.device!r}: leave out --device")
    names = read_names(args.data)
    parts = dict(zip(("train", "test", "val"), split(names)))
    known = set(parts["train"])
    if unseen := [name for name in parts["val"] if name not in known]:
        parts["unseen"] = unseen
    vocab = Vocabulary(names)
    torch.manual_seed(args.seed)
    net = wavenet(len(vocab), args.block_size, args.n_embd, args.n_hidden).to(args.device)
    picture = os.path.join(os.path.dirname(args.out), "loss.png")
    for path in args.out, picture:
        check_writable(path)

    views = {part: windows(some, vocab, args.block_size) for part, some in parts.items()}
    print(
        f"{len(names):,} rows, {len(set(names)):,} distinct, {len(vocab) - 1} characters; "
        f"windows: {', '.join(f'{part} {len(view):,}' for part, view in views.items())}; "
        f"{sum(parameter.numel() for parameter in net.parameters()):,} parameters",
        file=sys.stderr,
    )
    curves = train(net, views["train"], views["val"], args)
    losses = {part: evaluate(net, view) for part, view in views.items()}
    made = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "noise", "seed")}
    save(args.out, net, vocab, made | {"rows": len(names), "torch": str(torch.__version__), "losses": losses})
    plot(picture, curves, losses)
    print("  ".join(f"{part:>6}" for part in losses))
    print("  ".join(f"{loss:6.4f}" for loss in losses.values()), "nats a character")
    print("\n".join(generate(net.cpu().eval(), vocab, 10)))
    print(f"written: {args.out} and {picture}")


def check_writable(path):
    """Raise OSError or ValueError now, not after hours of training, when path cannot be written."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: name a file with --out")
    try:
        write(path + ".test", b"")
        os.remove(path + ".test")
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another --out") from None


if __name__ == "__main__":
    main()
