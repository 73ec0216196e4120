"""What a training owns: its files, of which it is the only writer, and the state to resume from."""

import copy
import math
import os
from contextlib import contextmanager, nullcontext, suppress
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

import model
from plumbing import cli, files, filters, processes, report
from plumbing.cli import MODEL, refuse_flags
from plumbing.processes import log, rank, world_size

SIZES = model.SIZES[1:]  # those that are flags
# The flags that make a training the one it is, and those that may change when it is resumed.
RUN_ARGS = *"steps dropout truncate smoothing lr batch_size seed threads".split(), *SIZES
FREE_ARGS = "data", "column", "device", "checkpoint_every"
STATE = "step loss_sum best curves pretrained state_dict average layers names args".split()
POINTS = 200  # of the training curve


class Setup(NamedTuple):
    """Where a training writes, and what it starts from: the state of --resume, or the network of
    --init-from, as load() gives it, or neither."""

    out: str
    unfinished: str
    picture: str
    state: dict | None = None
    pretrained: tuple | None = None


def start(parser, argv, train_list):
    """Start a training or resume one -> exit status.

    train_list(args, setup) does the rest, and returns the signal that stopped it, or 0.
    """
    args, given = cli.parse(parser, argv)
    out = output_path(args, given)
    setup = Setup(out, f"{out}.unfinished", f"{out.removesuffix('.pth')}.png")
    lock = f"{setup.unfinished}.lock"
    if args.resume:
        others = given.keys() - {"resume", "out", *FREE_ARGS}
        refuse_flags(others, "cannot go with --resume, which knows its flags")
        state = files.read_checkpoint(setup.unfinished, STATE, "there is nothing to resume")
        parser.set_defaults(**state["args"])
        args, setup = parser.parse_args(argv), setup._replace(state=state)
    check_files(args, setup, lock)
    with processes.process_group(args.device), nullcontext() if rank() else locked(lock):
        if not args.resume and os.path.exists(setup.unfinished):
            what = "is an unfinished training: add --resume, or delete it"
            raise ValueError(f"{setup.unfinished} {what}")
        if args.init_from:
            others = given.keys() & {*SIZES}
            refuse_flags(others, f"is that of {args.init_from}: leave it out")
            setup = setup._replace(pretrained=model.load(args.init_from))
            vars(args).update({name: setup.pretrained[0].config[name] for name in SIZES})
        signum = train_list(args, setup)
        if signum:
            words = ["--out", cli.as_value(args.out)] if args.out else []
            log(f"stopped; to go on: {cli.command('train.py', '--resume', *words)}")
    return signum and 128 + signum


def output_path(args, given):
    """Where the network goes. Raises ValueError where a trial would replace the shipped one."""
    if args.out is None:
        others = given.keys() - {"resume", "seed", "threads", "device", "checkpoint_every"}
        refuse_flags(others, "would change the shipped network: add --out FILE.pth")
        own, shipped = model.WaveNet(2, *(getattr(args, size) for size in SIZES)), None
        with suppress(ValueError):  # where there is no network, none can be lost
            shipped = files.read_checkpoint(MODEL, model.CHECKPOINT, "")["layers"]
        if shipped not in (None, model.layer_names(own)):
            raise ValueError("the shipped network has other layers: add --out FILE.pth")
    out = os.path.realpath(args.out or MODEL)
    if not (out.endswith(".pth") and os.path.isdir(os.path.dirname(out))):
        raise ValueError(f"--out {args.out} must end in .pth, in a folder that exists")
    return out


def check_files(args, setup, lock):
    """Raise ValueError when what would be written is to be read, or is not ours to replace."""
    files.check_output(setup.out, files.is_network, [args.data])  # it may start from itself
    read = [args.data, args.init_from]
    files.check_output(setup.picture, report.is_picture, read)
    files.check_output(setup.unfinished, lambda path: True, read)  # start() asks to resume it
    files.check_output(lock, lambda path: os.path.getsize(path) == 0, read)


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


class Run:
    """A training under way: its state, which is saved so that it can be resumed.

    Of it train() reads and writes `step`, the number of steps done, and `best`, the averaged
    weights to keep, with their step and loss; it reads `curves`, of (step, loss), and `pretrained`,
    the weights that training started from, if any.
    """

    def __init__(self, args, setup, net, average, names):
        """`names` is the SHA-256 of the list. Raises ValueError for the state of another one."""
        if world_size() > 1:
            flags = [getattr(args, name) for name in RUN_ARGS]
            processes.check_processes(args.batch_size, [names, *flags])
        self.args, self.setup = args, setup
        self.names, self.layers = names, model.layer_names(net)
        self.per_point = max(1, args.steps // POINTS)
        self.step, self.loss_sum, self.curves = 0, 0.0, {"train": [], "val": []}
        self.best = dict(step=0, loss=math.inf, state_dict=copy.deepcopy(average.state_dict()))
        weights = net.parameters() if setup.pretrained else ()
        self.pretrained = [weight.detach().clone() for weight in weights]
        self.saved_step = self.signum = 0
        self.bar, self.received = None, []  # the signals
        self.resumed = setup.state is not None
        if self.resumed:
            self.restore(setup.state, net, average)
        # Not copies but the weights themselves: whenever it is saved they are those of its step.
        self.state_dict, self.average = dict(net.state_dict()), dict(average.state_dict())

    def restore(self, state, net, average):
        """Load a saved state. Raises ValueError when it is another training's."""
        unfinished = self.setup.unfinished
        if state["names"] != self.names:
            raise ValueError(f"{unfinished} is of another list than --data")
        if state["layers"] != self.layers:
            raise ValueError(f"{unfinished} has other layers than model.py: delete it, train anew")
        net.load_state_dict(state["state_dict"])
        average.load_state_dict(state["average"])
        for name in "step", "loss_sum", "best", "curves", "pretrained":
            setattr(self, name, state[name])
        state.clear()  # the rest is copied: it need not stay in memory

    def save(self):
        """Write the state."""
        path = os.path.abspath(self.args.data) if self.args.data != "-" else "-"
        flags = {name: getattr(self.args, name) for name in [*RUN_ARGS, *FREE_ARGS]}
        state = {name: getattr(self, name) for name in STATE} | {"args": flags | {"data": path}}
        files.write_checkpoint(self.setup.unfinished, state)
        self.saved_step = self.step

    def record(self, loss):
        """Count a step, and its loss in nats per character: the curve has a point for some steps.

        Raises ValueError for a loss that is not finite.
        """
        self.step += 1
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step:,}: lower --lr")
        self.loss_sum += loss
        if self.step % self.per_point == 0:
            self.curves["train"].append((self.step, self.loss_sum / self.per_point))
            self.loss_sum = 0.0

    def record_validation(self, loss):
        """Add a validation loss to its curve. Raises ValueError for one that is not finite."""
        if not math.isfinite(loss):
            raise ValueError(f"the validation loss is {loss} at step {self.step:,}: lower --lr")
        self.curves["val"].append((self.step, loss))

    def checkpoint(self):
        """End a step: save the state when it is due -> whether a signal asks to stop here."""
        self.bar.update()
        stop = processes.agreed(self.received, self.args.device) != 0
        due = self.step % self.args.checkpoint_every == 0 or self.step == self.args.steps
        if (due or stop) and not rank():
            self.save()
        return stop

    @contextmanager
    def watching(self):
        """Inside there is a progress bar, and a signal to stop waits for the end of a step."""
        self.bar = report.progress_bar(self.step, self.args.steps)
        with self.bar, cli.stop_signals() as self.received:
            yield
        self.signum = processes.agreed(self.received, self.args.device)

    @contextmanager
    def resumable(self):
        """Inside there is a saved state; afterwards, only where there is work to resume."""
        try:
            if not self.resumed and not rank():
                self.save()  # so whether it can be written shows before the work; and twice, as
                self.save()  # the old one stays until the new one is whole
            yield
        except Exception as error:
            # It failed when only the first state was saved, or what it learned is refused.
            refused = isinstance(error, ValueError) and self.step == self.args.steps
            if not (self.resumed or rank()) and (refused or not self.saved_step):
                with suppress(FileNotFoundError):
                    os.remove(self.setup.unfinished)
            raise
        if not self.signum and not rank():
            os.remove(self.setup.unfinished)


def about(run, n_names, losses, scores, lengths, temperature):
    """What the file of a network tells about its training; `scores`: losses of held-out names;
    `lengths`: of the shortest and the longest name.
    """
    scores, percent = torch.tensor(scores, dtype=torch.float64), torch.linspace(0, 1, 101)
    return {name: getattr(run.args, name) for name in RUN_ARGS} | {
        "names": run.names,
        **filters.recorded(run.args.data, run.args.column, run.setup.out),
        "rows": n_names,
        "kept": run.best["step"],
        "losses": losses,
        "quantiles": scores.quantile(percent.double()).tolist(),
        "lengths": lengths,
        "temperature": temperature,
        "torch": str(torch.__version__),
    }


def write_network(run, net, vocab, metadata):
    """Write the file of the network. An OSError says how to have it elsewhere."""
    out, unfinished = run.setup.out, run.setup.unfinished
    try:
        model.save(out, net, vocab, metadata)
    except OSError as error:
        safe = f"{error.strerror}; the network is safe in {unfinished}: to have it elsewhere,"
        how = "rename that to OTHER.pth.unfinished, then train.py --resume --out OTHER.pth"
        raise OSError(error.errno, f"{safe} {how}", out) from None
