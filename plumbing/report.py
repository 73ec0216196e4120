"""What a training says and draws."""

import io
import os
import sys

from tqdm import tqdm

from plumbing import cli
from plumbing.files import atomic_write, holds
from plumbing.processes import log, rank

SOFTWARE = "train.py, names character by character"  # by which our own pictures are known


def describe(n_names, vocab, data, net, chosen):
    """Say what is about to happen."""
    counts = ", ".join(f"{part} {len(tokens):,}" for part, tokens in data.items())
    log(f"{n_names:,} names, {len(vocab)} tokens; windows: {counts}")
    flags = " ".join(f"--{name} {value}" for name, value in chosen.items())
    parameters = sum(parameter.numel() for parameter in net.parameters())
    log(f"{parameters:,} parameters" + f"; what suits the list: {flags}" * bool(flags))
    if n_names < 200:
        log("so few names teach little: sample with --temperature 0.7; Latin letters: --init-from")


def taken(path, took):
    """Say what load_pretrained() took from the network at path."""
    same = "".join(char for char, old in took.items() if char == old)
    other = "".join(f", {char} from {old}" for char, old in took.items() if char != old)
    log(f"from {path}: all levels, and the vectors of {same or 'none'}{other}")
    log("if the two lists share names, the losses look better than they are")


def progress_bar(step, steps):
    hidden = True if rank() or sys.stderr is None else None  # None: unless on a terminal
    bar = tqdm(total=steps, initial=step, dynamic_ncols=True, disable=hidden)
    bar.bar_format = "{n_fmt}/{total_fmt} {remaining} {rate_fmt} {desc}"
    return bar


def validation(bar, step, steps, curve, name):
    """Say the last loss of the curve, and its best one; where there is no terminal, as a line."""
    best, at = min((loss, step) for step, loss in curve)
    message = f"val {curve[-1][1]:.3f} (best {best:.3f} at {at:,}) {name}"
    bar.set_description_str(message, refresh=False)
    if bar.disable:
        log(f"step {step:,} of {steps:,}: {message}")


def is_picture(path):
    """Whether a file is a picture that plot() wrote."""
    return holds(path, SOFTWARE.encode())


def plot(path, title, curves, kept, steps):
    """Write the picture of the curves, with the network that was kept, (step, loss), as a dot."""
    from matplotlib.figure import Figure  # slow to import: not before it is needed

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curves["train"]), label="training, smoothed")
    axes.plot(*zip(*curves["val"]), label="validation, averaged weights")
    axes.plot(*kept, "ko", label=f"kept: {kept[1]:.3f}")
    axes.axvline(steps // 2, color="grey", linewidth=0.8, linestyle=":", label="learning rate / 10")
    title = title.replace("$", r"\$")  # not the beginning of mathematics
    axes.set(xlabel="step", ylabel="loss (nats per character)", title=title)
    shown = sorted(loss for curve in curves.values() for _, loss in curve)
    axes.set_ylim(shown[0] - 0.05, shown[int(0.95 * len(shown))] + 0.1)  # not the steep beginning
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": SOFTWARE})
    atomic_write(path, buffer.getvalue())


def finished(run, losses, scale, temperature, names):
    """Draw the picture, and print the losses, a few names, and the command that draws more."""
    args, kept, written = run.args, run.best["step"], run.setup.out
    title = os.fsencode(os.path.basename(args.data)).decode(errors="replace")
    try:
        plot(run.setup.picture, title, run.curves, (kept, losses["val"]), args.steps)
        written += f" and {run.setup.picture}"
    except Exception as error:  # whatever matplotlib may stumble over, the network is what counts
        log(f"no picture: {str(error)[:200]}")
    print("  ".join(f"{part:>6}" for part in losses))
    print("  ".join(f"{loss:6.4f}" for loss in losses.values()), "nats per character")
    print(f"kept: averaged weights of step {kept:,}, logits scaled by {scale:.2f}")
    print("\n".join(names))
    print(f"written: {written}\nnext:")
    words = ["--model", cli.as_value(args.out)] if args.out else []
    words += ["--new"]
    words += ["--data", cli.as_value(args.data)] * (args.data != cli.NAMES)
    words += ["--column", args.column] * bool(args.column)
    words += ["--temperature", str(temperature)] * (temperature < 1)
    print(cli.command("sampling.py", *words), flush=True)  # before the state is removed
