"""What a training says and draws."""

import io
import os
import shutil
import sys
from itertools import chain

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from plumbing import cli, filters, lists
from plumbing.fast import LAYERS, is_stack_of
from plumbing.files import atomic_write, holds
from plumbing.filters import is_one_edit_away
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


def measuring_bar(part, parts):
    """The parts of a split, with a bar on a terminal while they are measured."""
    hidden = True if sys.stderr is None else None
    return tqdm(parts, f"measuring {part}", leave=False, dynamic_ncols=True, disable=hidden)


def validation(run, names):
    """Say the last validation loss, the best of those that may be kept, and the first name.

    On a terminal in the bar, cut to its columns; else as a line.
    """
    best, name = run.best, "".join(names[:1])
    message = f"val {run.curves['val'][-1][1]:.3f} "
    if best["step"]:  # not before the second half
        message += f"(best {best['loss']:.3f} at step {best['step']:,}) "
    if run.bar.disable:
        return log(f"step {run.step:,} of {run.args.steps:,}: {message}{name}")
    room = shutil.get_terminal_size().columns - len(message) - 2 * len(str(run.args.steps)) - 30
    if disp_len(name) > room:
        name = disp_trim(name, max(0, room - 1)) + "…"
    run.bar.set_description_str(message + name, refresh=False)


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


def likeness(drawn, names, temperature):
    """In words: how many of the drawn are in the list, and how many one edit from a name of it."""
    drawn, keys = list(map(lists.key, drawn)), set(map(lists.key, names))
    chars, known = set(chain.from_iterable(keys)), sum(name in keys for name in drawn)
    near = sum(name not in keys and is_one_edit_away(name, keys, chars) for name in drawn)
    shares = [f"{100 * count / max(1, len(drawn)):.0f} %" for count in (known, near)]
    what = f"of {len(drawn):,} names drawn at temperature {temperature:g}"
    what += f", {shares[0]} are in the list (--new leaves them out)"
    return f"{what} and {shares[1]} one edit from a name of it (--min-edits 2, these too)"


def next_commands(args, out, net, metadata):
    """Up to three commands to type: new names; the best of them; a page."""
    model = ["--model", cli.as_value(args.out)] if args.out else []
    shortest, longest = map(str, metadata["lengths"])
    usual = ["--min-length", shortest, "--max-length", longest]
    if metadata["temperature"] < 1:
        usual += ["--temperature", str(metadata["temperature"])]
    recorded = filters.recorded(args.data, args.column, out).get("list", "")
    beside, known = os.path.join(os.path.dirname(out), recorded), []
    if args.data != cli.NAMES and os.path.realpath(beside) != os.path.realpath(args.data):
        known = ["--data", cli.as_value(args.data)] + ["--column", args.column] * bool(args.column)
    kinds = [["--new"], ["--best", "--min-edits", "2"]] if recorded else [[]]  # [] from a pipe
    commands = [[*model, *kind, *known * bool(recorded), *usual] for kind in kinds]
    if is_stack_of(net, LAYERS):
        page = (args.out or "names.pth").removesuffix(".pth") + ".html"
        kind = ["--new", *known] if recorded else []
        commands.append([*model, "--page", cli.as_value(page), *kind])
    return [cli.command("sampling.py", *words) for words in commands]


def finished(run, net, losses, scale, metadata, drawn, names):
    """Draw the picture; print the losses, what names drawn are like, and what to do next."""
    args, kept, written = run.args, run.best["step"], run.setup.out
    title = os.fsencode(os.path.basename(args.data)).decode(errors="replace")
    try:
        plot(run.setup.picture, title, run.curves, (kept, losses["val"]), args.steps)
        written += f" and {run.setup.picture}"
    except Exception as error:  # whatever matplotlib may stumble over, the network is what counts
        log(f"no picture: {str(error)[:200]}")
    print("loss in nats per character")
    print("  ".join(f"{part:>6}" for part in losses))
    print("  ".join(f"{loss:6.4f}" for loss in losses.values()))
    print(f"kept: averaged weights of step {kept:,}, logits scaled by {scale:.2f}")
    print(likeness(drawn[:1000], names, metadata["temperature"]))
    print("\n".join(drawn[:10]))
    print(f"written: {written}\nnext:")
    commands = next_commands(args, run.setup.out, net, metadata)
    print("\n".join(commands), flush=True)  # before the state is removed
