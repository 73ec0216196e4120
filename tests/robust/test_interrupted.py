"""Whatever happens to a training, its work is kept, nothing else is touched, nothing is left."""

import os
import random
import resource
import signal
import subprocess

import pytest
import torch
from conftest import forked
from filelock import FileLock
from helpers import LEFT, NAMES, at, command, failure, result, resume, signals

import model
import train
from model import load

pytest_plugins = "folders"
OLD = b"an older network"
FULL = OSError(28, "No space left on device")

# Stopped and resumed

MOMENTS = [
    ("train.train_step", 1),
    ("train.train_step", 63),
    ("train.train_step", 120),  # the last
    ("train.recompute_statistics", 20),
    ("model.write_checkpoint", 3),
    ("posix.fsync", 3),
    ("train.finish", 1),
    ("model.save", 1),
    ("train.plot", 1),
    ("posix.replace", 5),  # of the network, or of the picture
]


def ends_as_if_nothing_happened(folder, trained):
    process = resume(folder)
    assert process.returncode == 0, process.stderr
    assert result(folder) == result(trained)
    assert sorted(os.listdir(folder)) == LEFT
    return process


@pytest.mark.parametrize("where, nth", MOMENTS)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_training_stopped_anywhere_resumes_to_the_same_bits(folder, trained, signum, where, nth):
    process = forked(train.main, *command(folder), before=at(where, nth, signals(signum)))
    assert process.returncode in (-signum, 128 + signum)
    assert not process.stdout and "Traceback" not in process.stderr
    if where not in ("train.plot", "posix.replace"):
        assert (folder / "own.pth").read_bytes() == OLD
    ends_as_if_nothing_happened(folder, trained)


@pytest.mark.parametrize("seed", range(16))
def test_a_training_killed_at_any_call_loses_nothing(folder, trained, seed):
    """One of the first 400,000 calls of Python's or the system's functions, anywhere in it."""
    nth = int(10 ** random.Random(seed).uniform(3, 5.6))
    process = forked(train.main, *command(folder), before=at("", nth, signals(signal.SIGKILL)))
    old, state = (folder / "own.pth").read_bytes(), folder / "own.pth.unfinished"
    assert process.returncode == -signal.SIGKILL
    assert old == OLD or load(folder / "own.pth")
    if not state.exists():  # it had not begun
        assert old == OLD
        process = forked(train.main, *command(folder))
        assert process.returncode == 0, process.stderr
        assert result(folder) == result(trained) and sorted(os.listdir(folder)) == LEFT
    else:
        ends_as_if_nothing_happened(folder, trained)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_stops_at_that_step_and_says_how_to_go_on(folder, trained, signum):
    process = forked(
        train.main, *command(folder), before=at("train.train_step", 42, signals(signum))
    )
    assert (process.returncode, process.stdout) == (128 + signum, "")
    last = process.stderr.splitlines()[-1]
    assert last.startswith("stopped") and f"--resume --out {folder / 'own.pth'}" in last
    assert torch.load(folder / "own.pth.unfinished", weights_only=True)["step"] == 42
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth", "own.pth.unfinished"]
    ends_as_if_nothing_happened(folder, trained)


def test_killed_four_times_and_resumed_to_the_same_bits(folder, trained):
    args = command(folder)
    for nth in 40, 33, 1, 20:  # each counted from where it went on
        process = forked(
            train.main, *args, before=at("train.train_step", nth, signals(signal.SIGKILL))
        )
        assert process.returncode == -signal.SIGKILL
        args = "--resume", "--out", folder / "own.pth"
    ends_as_if_nothing_happened(folder, trained)


def test_a_second_signal_within_a_second_does_not_kill(folder, trained):
    """A terminal that is closed sends SIGHUP twice, and a key may bounce."""
    both = signals(signal.SIGHUP, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    process = forked(train.main, *command(folder), before=at("train.train_step", 5, both))
    assert process.returncode in {128 + signum for signum in (1, 2, 15)}
    assert "stopped" in process.stderr
    assert torch.load(folder / "own.pth.unfinished", weights_only=True)["step"] == 5
    ends_as_if_nothing_happened(folder, trained)


def test_a_second_signal_after_a_second_ends_at_once(folder, monkeypatch):
    times = iter([0.0, 1.5])
    monkeypatch.setattr(train.time, "monotonic", lambda: next(times))
    twice = at("train.train_step", 5, signals(signal.SIGINT, signal.SIGTERM))
    assert forked(train.main, *command(folder), before=twice).returncode == -signal.SIGTERM


def test_what_ignores_a_signal_goes_on_doing_so(folder, trained):
    """As behind nohup, or in the background of a script."""
    hook = at("train.train_step", 5, signals(signal.SIGHUP))

    def before():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        hook()

    assert forked(train.main, *command(folder), before=before).returncode == 0
    assert result(folder) == result(trained)


def test_the_losses_are_printed_before_the_state_is_removed(folder, trained):
    """Whoever is stopped after that has seen them: N8."""
    removed = at("train.locked", 2, signals(signal.SIGKILL))  # as the lock is given back
    process = forked(train.main, *command(folder), before=removed)
    assert not (folder / "own.pth.unfinished").exists()
    assert "nats per character" in process.stdout and "next:" in process.stdout


def test_a_finetuning_is_resumed_without_its_first_network(folder, trained):
    """What the weights decay to is in the state."""
    begun = command(folder, "--init-from", folder / "first.pth")
    begun = [arg for i, arg in enumerate(begun) if i not in range(6, 12)]  # without the sizes
    (folder / "first.pth").write_bytes((trained / "own.pth").read_bytes())
    process = forked(train.main, *begun)
    assert process.returncode == 0, process.stderr
    expected = result(folder)
    stop = at("train.train_step", 63, signals(signal.SIGTERM))
    assert forked(train.main, *begun, before=stop).returncode == 128 + signal.SIGTERM
    (folder / "first.pth").unlink()
    process = resume(folder)
    assert process.returncode == 0, process.stderr
    assert result(folder) == expected


# What --resume takes


@pytest.mark.parametrize(
    "flag",
    ["--n-hidden 9", "--n-hidden 8", "--lr 0.1", "--steps 120", "--seed 1", "--dropout 0.1"]
    + ["--batch-size 96", "--block-size 4", "--threads 1", "--init-from own.pth", "--truncate 0"],
)
def test_resume_refuses_other_flags_whatever_their_value(interrupted, refused, flag):
    state = (interrupted / "own.pth.unfinished").read_bytes()
    args = ["--resume", "--out", interrupted / "own.pth", *flag.split()]
    refused(train.main, args, flag.split()[0], "--resume")
    assert (interrupted / "own.pth.unfinished").read_bytes() == state


def test_resume_takes_the_files_the_device_and_how_often_to_save(interrupted, trained):
    (interrupted / "elsewhere.txt").write_text("\n".join(f"x,{name}" for name in NAMES))
    more = "--data", interrupted / "elsewhere.txt", "--column", 2, "--device", "cpu"
    process = resume(interrupted, *more, "--checkpoint-every", 7)
    assert process.returncode == 0, process.stderr
    assert result(interrupted)[:2] == result(trained)[:2]


def test_a_state_goes_on_under_another_name(interrupted, trained):
    """As the message of a network that could not be written says."""
    os.rename(interrupted / "own.pth.unfinished", interrupted / "other.pth.unfinished")
    process = forked(train.main, "--resume", "--out", interrupted / "other.pth")
    assert process.returncode == 0, process.stderr
    assert (interrupted / "own.pth").read_bytes() == OLD
    os.rename(interrupted / "other.pth", interrupted / "own.pth")
    os.rename(interrupted / "other.png", interrupted / "own.png")
    assert result(interrupted) == result(trained)


def test_resume_without_a_state_or_with_another_list_is_refused(interrupted, refused):
    refused(train.main, ["--resume", "--out", interrupted / "x.pth"], "nothing to resume")
    state = (interrupted / "own.pth.unfinished").read_bytes()
    (interrupted / "names.txt").write_text("\n".join(NAMES[1:]))
    process = resume(interrupted)
    assert process.returncode == 2
    assert "another list" in (last := process.stderr.splitlines()[-1]) and "--data" in last
    assert (interrupted / "own.pth.unfinished").read_bytes() == state


def test_a_new_training_is_refused_while_a_state_is_there(interrupted, refused):
    state = (interrupted / "own.pth.unfinished").read_bytes()
    refused(train.main, command(interrupted), "own.pth.unfinished", "--resume")
    assert (interrupted / "own.pth.unfinished").read_bytes() == state


def test_the_state_is_there_before_the_first_step(folder, trained):
    hook = at("train.train_step", 1, signals(signal.SIGKILL))
    forked(train.main, *command(folder), before=hook)
    assert torch.load(folder / "own.pth.unfinished", weights_only=True)["step"] == 0
    ends_as_if_nothing_happened(folder, trained)


# Trainings that come to nothing


def test_one_that_diverges_at_once_leaves_what_was_there(folder, refused):
    stop = failure(ValueError("the loss is nan at step 4: lower --lr"))
    process = forked(train.main, *command(folder), before=at("train.record_loss", 4, stop))
    assert process.returncode == 2 and "lower --lr" in process.stderr.splitlines()[-1]
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]
    assert (folder / "own.pth").read_bytes() == OLD


def test_one_that_diverges_later_keeps_the_last_state_before(folder):
    stop = failure(ValueError("the loss is nan at step 80: lower --lr"))
    process = forked(train.main, *command(folder), before=at("train.record_loss", 80, stop))
    assert process.returncode == 2
    assert torch.load(folder / "own.pth.unfinished", weights_only=True)["step"] == 70
    assert (folder / "own.pth").read_bytes() == OLD


@pytest.mark.parametrize("lr", [10, 100, 1e6])
def test_a_network_that_has_learned_nothing_replaces_nothing(folder, lr):
    """N1: no better than the frequencies of the characters."""
    process = forked(train.main, *command(folder, "--lr", lr, "--batch-size", 2))
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    assert "lower --lr" in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr
    assert (folder / "own.pth").read_bytes() == OLD
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]


def test_too_little_memory_says_so_and_keeps_what_was_there(folder):
    for error in MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"):
        process = forked(
            train.main, *command(folder), before=at("train.train_step", 1, failure(error))
        )
        assert process.returncode == 2
        assert "not enough memory" in process.stderr.splitlines()[-1]
        assert (folder / "own.pth").read_bytes() == OLD
        assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]


# The lock


def test_a_second_training_to_the_same_file_is_refused(folder, refused):
    (folder / "link.pth").symlink_to("own.pth")
    lock = folder / "own.pth.unfinished.lock"
    with FileLock(lock):
        for name in "own.pth", "link.pth":
            refused(train.main, command(folder, "--out", folder / name), f"{lock}")
    process = forked(train.main, *command(folder))  # whatever is left of a lock
    assert process.returncode == 0 and not lock.exists()


# Files that cannot be written


def test_a_full_disk_is_said_before_the_first_step(folder):
    """No file may grow past a few kB: N6."""
    hook = at("train.train_step", 1, failure(AssertionError("it trains")))

    def before():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        hook()

    process = forked(train.main, *command(folder), before=before)
    assert (process.returncode, process.stdout) == (2, "")
    assert "own.pth.unfinished cannot be used: File too large" in process.stderr.splitlines()[-1]
    assert (folder / "own.pth").read_bytes() == OLD
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]


@pytest.mark.parametrize("call", ["posix.fsync", "posix.replace", "shutil.copymode"])
def test_a_failing_write_leaves_the_old_file(tmp_path, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    hook = at(call, 1, failure(FULL))

    def write(argv):
        with pytest.raises(OSError, match="No space left.*/file"):
            model.atomic_write(path, b"new")

    process = forked(write, before=hook)
    assert process.returncode == 0, process.stderr
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["posix.fsync", "posix.replace"])
def test_where_the_end_fails_the_network_is_safe_in_the_state(folder, trained, call):
    """N6: EBUSY on a bind mount, EPERM in a sticky folder; the message says what to do."""
    error, hooks = failure(OSError(16, "Device or resource busy")), []
    hooks.append(at("model.save", 1, lambda: at(call, 1, error)()))
    process = forked(train.main, *command(folder), before=hooks[0])
    last = process.stderr.splitlines()[-1]
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    assert "Device or resource busy" in last and "own.pth.unfinished" in last
    assert "rename" in last and "--resume --out" in last
    assert (folder / "own.pth").read_bytes() == OLD
    ends_as_if_nothing_happened(folder, trained)


def test_a_file_left_by_a_killed_write_is_overwritten_and_goes(folder, trained):
    """N7: one fixed name, and nobody else's."""
    kept = ["own.pth.test", "own.pth.tmp", "own.pth.lock", ".own.pth.tmp", "new", "own.txt"]
    for name in kept:
        (folder / name).write_text("mine")
    for name in ".own.pth.partial", ".own.pth.unfinished.partial", ".own.png.partial":
        (folder / name).write_text("stale")
    assert forked(train.main, *command(folder)).returncode == 0
    assert all((folder / name).read_text() == "mine" for name in kept)
    assert sorted(os.listdir(folder)) == sorted(LEFT + kept)
    assert result(folder) == result(trained)


def test_a_picture_that_is_not_the_projects_is_not_replaced(folder, trained):
    """N5: nor is anything trained for it; its own pictures are replaced."""
    cats = b"\x89PNG\r\n\x1a\n, but of cats"
    (folder / "own.png").write_bytes(cats)
    process = forked(
        train.main, *command(folder), before=at("train.train_step", 1, failure(AssertionError()))
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert "own.png" in process.stderr.splitlines()[-1] and process.stderr.count("\n") == 1
    assert (folder / "own.png").read_bytes() == cats
    (folder / "own.png").write_bytes((trained / "own.png").read_bytes())
    assert forked(train.main, *command(folder)).returncode == 0
    assert result(folder) == result(trained)


def test_a_picture_that_fails_costs_one_line(folder):
    hook = at("matplotlib.figure.savefig", 1, failure(RuntimeError("no font\nat all")))
    process = forked(train.main, *command(folder), before=hook)
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("no picture: ")]
    assert len(lines) == 1 and "Traceback" not in process.stderr
    load(folder / "own.pth")


def test_a_link_stays_a_link_and_permissions_stay(folder):
    (folder / "here.pth").symlink_to("own.pth")
    (folder / "own.pth").chmod(0o604)
    process = forked(train.main, *command(folder, "--out", folder / "here.pth"))
    assert process.returncode == 0, process.stderr
    assert (folder / "here.pth").is_symlink()
    assert (folder / "own.pth").stat().st_mode & 0o777 == 0o604
    load(folder / "own.pth")
    assert sorted(os.listdir(folder)) == sorted([*LEFT, "here.pth"])
    model.atomic_write(folder / "new", b"")
    (folder / "plain").write_bytes(b"")
    assert (folder / "new").stat().st_mode == (folder / "plain").stat().st_mode


def test_a_read_only_folder_is_said(folder, refused):
    if os.geteuid():
        folder.chmod(0o500)
    else:
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("root may write everywhere, and may not mount here")
    try:
        refused(train.main, ["--out", folder / "own.pth"], str(folder), "cannot be used")
    finally:
        if os.geteuid():
            folder.chmod(0o700)
        else:
            subprocess.run(["umount", str(folder)], check=True)


def test_out_is_no_file_that_is_read_and_no_device(folder, trained, refused):
    os.mkfifo(folder / "fifo.pth")
    (folder / "device.pth").symlink_to("/dev/null")
    (folder / "picture.png").mkdir()
    (folder / "loop.pth").symlink_to("loop.pth")
    (folder / "names.png").symlink_to("names.txt")
    (folder / "list.pth").write_text("\n".join(NAMES))
    (folder / "first.png").write_bytes((trained / "own.pth").read_bytes())
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    outs = ["loop.pth", "names.txt", "names.pth", "fifo.pth", "device.pth", "picture.pth", "", "x"]
    for out in [*outs, "y" * 250 + ".pth", "own.pth.unfinished", "none/own.pth", "names.txt/x.pth"]:
        refused(train.main, command(folder, "--out", folder / out), str(folder))
    own = folder / "list.pth"
    refused(train.main, command(folder, "--data", own, "--out", own), "list.pth")
    args = ["--init-from", folder / "first.png", "--out", folder / "first.pth"]
    refused(train.main, ["--data", folder / "names.txt", *args], "--out")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert (folder / "fifo.pth").is_fifo()
