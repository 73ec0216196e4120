"""Whatever happens to a training, its work is kept, nothing else is touched, nothing is left."""

import os
import random
import resource
import signal
import subprocess
from itertools import count

import pytest
import torch
from filelock import FileLock
from helpers import (
    LEFT,
    NAMES,
    OLD,
    at,
    command,
    failure,
    fill,
    forked,
    last_line,
    result,
    resume,
    signals,
    state_of,
    training,
)

import model
import train
from plumbing import cli
from plumbing.files import atomic_write

KILL, TERM, INT, HUP = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP
UNTOUCHED = ["names.txt", "own.pth"]


def ends_as_if_nothing_happened(folder, trained):
    process = resume(folder)
    assert process.returncode == 0, process.stderr
    assert result(folder) == result(trained)
    assert sorted(os.listdir(folder)) == LEFT


def nothing_happened(folder):
    return sorted(os.listdir(folder)) == UNTOUCHED and (folder / "own.pth").read_bytes() == OLD


# Stopped and resumed

MOMENTS = """train.train_step 1, train.train_step 63, train.train_step 120,
train.recompute_statistics 8, train.finish 1, plumbing.report.plot 1, model.save 1,
plumbing.files.write_checkpoint 3"""


@pytest.mark.parametrize("moment", MOMENTS.replace("\n", " ").split(", "))
@pytest.mark.parametrize("signum", [KILL, TERM])
def test_a_training_stopped_anywhere_resumes_to_the_same_bits(folder, trained, signum, moment):
    where, nth = moment.split()
    process = training(folder, before=at(where, int(nth), signals(signum)))
    assert process.returncode in (-signum, 128 + signum)
    assert not process.stdout and "Traceback" not in process.stderr
    if "plot" not in moment:
        assert (folder / "own.pth").read_bytes() == OLD
    ends_as_if_nothing_happened(folder, trained)


@pytest.mark.parametrize("call", ["posix.fsync", "posix.replace"])
def test_a_training_killed_at_every_moment_of_its_writing_resumes(tmp_path, trained, call):
    for nth in count(1):
        (tmp_path / str(nth)).mkdir()
        folder = fill(tmp_path / str(nth))
        process = training(folder, before=at(call, nth, signals(KILL)))
        if process.returncode == 0:
            break
        assert process.returncode == -KILL
        if (folder / "own.pth.unfinished").exists():
            ends_as_if_nothing_happened(folder, trained)
        else:
            assert nth == 1 and (folder / "own.pth").read_bytes() == OLD
    assert nth > 6  # the first state, one each 35 steps, the last one, the network, its picture


@pytest.mark.parametrize("seed", range(16))
def test_a_training_killed_at_any_call_loses_nothing(folder, trained, seed):
    """One of the first 400,000 calls of Python's or the system's functions."""
    nth = int(10 ** random.Random(seed).uniform(3, 5.6))
    assert training(folder, before=at("", nth, signals(KILL))).returncode == -KILL
    if (folder / "own.pth").read_bytes() != OLD:
        model.load(folder / "own.pth")
    if (folder / "own.pth.unfinished").exists():
        ends_as_if_nothing_happened(folder, trained)
    else:  # it had not begun
        assert (folder / "own.pth").read_bytes() == OLD
        assert training(folder).returncode == 0
        assert result(folder) == result(trained) and sorted(os.listdir(folder)) == LEFT


@pytest.mark.parametrize("signum", [INT, HUP, TERM])
def test_a_signal_stops_at_that_step_and_says_how_to_go_on(folder, trained, signum):
    process = training(folder, before=at("train.train_step", 42, signals(signum)))
    assert (process.returncode, process.stdout) == (128 + signum, "")
    last = process.stderr.splitlines()[-1]
    assert last.startswith("stopped") and f"--resume --out {folder / 'own.pth'}" in last
    assert state_of(folder)["step"] == 42
    assert sorted(os.listdir(folder)) == [*UNTOUCHED, "own.pth.unfinished"]
    ends_as_if_nothing_happened(folder, trained)


def test_killed_four_times_and_resumed_to_the_same_bits(folder, trained):
    args = command(folder)
    for nth in 40, 33, 1, 20:  # each counted from where it went on
        process = forked(train.main, *args, before=at("train.train_step", nth, signals(KILL)))
        assert process.returncode == -KILL
        args = "--resume", "--out", folder / "own.pth"
    ends_as_if_nothing_happened(folder, trained)


def test_a_second_signal_within_a_second_does_not_kill(folder, trained):
    """a terminal that is closed sends SIGHUP twice, and a key may bounce."""
    process = training(folder, before=at("train.train_step", 5, signals(HUP, HUP, INT, TERM)))
    assert process.returncode in (128 + HUP, 128 + INT, 128 + TERM)
    assert "stopped" in process.stderr and state_of(folder)["step"] == 5
    ends_as_if_nothing_happened(folder, trained)


def test_a_second_signal_after_a_second_ends_at_once(folder, monkeypatch):
    times = iter([0.0, 1.5])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(times))
    process = training(folder, before=at("train.train_step", 5, signals(INT, TERM)))
    assert process.returncode == -TERM


def test_what_ignores_a_signal_goes_on_doing_so(folder, trained):
    """As behind nohup, or in the background of a script."""

    def before():
        signal.signal(HUP, signal.SIG_IGN)
        at("train.train_step", 5, signals(HUP))()

    process = training(folder, before=before)
    assert process.returncode == 0 and result(folder) == result(trained)


def test_the_losses_are_out_before_the_state_is_removed(folder):
    """whoever is killed after that has seen them."""
    process = training(folder, before=at("plumbing.runs.locked", 2, signals(KILL)))  # as it is left
    assert not (folder / "own.pth.unfinished").exists()
    assert "nats per character" in process.stdout and "next:" in process.stdout


def test_a_finetuning_is_resumed_without_its_first_network(folder, trained):
    """What the weights decay to is in the state."""
    first = folder / "first.pth"
    first.write_bytes((trained / "own.pth").read_bytes())
    args = [*command(folder)[:6], "--init-from", first, "--steps", 90]
    assert forked(train.main, *args).returncode == 0
    expected = result(folder)
    process = forked(train.main, *args, before=at("train.train_step", 63, signals(TERM)))
    assert process.returncode == 128 + TERM, process.stderr
    first.unlink()
    assert resume(folder).returncode == 0
    assert result(folder) == expected


def test_a_finetuning_keeps_the_first_network_where_no_step_is_better(folder, trained, refused):
    args = [*command(folder)[:4], "--init-from", trained / "own.pth", "--lr", 100, "--dropout", 0]
    process = forked(train.main, *args, "--steps", 9)
    assert process.returncode == 0, process.stderr
    (net, _, metadata), (old, *_) = model.load(folder / "own.pth"), model.load(trained / "own.pth")
    assert net.config == old.config and metadata["kept"] == 0
    for new, first in list(zip(net.parameters(), old.parameters()))[:-2]:  # those are calibrated
        assert torch.equal(new, first)
    refused(train.main, [*args, "--n-hidden", 9], "--n-hidden")
    refused(
        train.main, [*command(folder)[:4], "--init-from", folder / "none"], "none is not a file"
    )


# What --resume takes

OTHER = "--n-hidden 9,--n-hidden 8,--n-embd 4,--lr 0.1,--lr 0.3,--steps 120,--seed 1,--dropout 0.1,"
OTHER += "--batch-size 96,--block-size 4,--threads 1,--init-from own.pth,--truncate 0"


def test_resume_refuses_other_flags_whatever_their_value(interrupted, refused):
    state = (interrupted / "own.pth.unfinished").read_bytes()
    for flag in OTHER.split(","):
        args = ["--resume", "--out", interrupted / "own.pth", *flag.split()]
        refused(train.main, args, flag.split()[0], "--resume")
    assert (interrupted / "own.pth.unfinished").read_bytes() == state


def test_resume_takes_the_files_the_device_and_how_often_to_save(interrupted, trained):
    (interrupted / "elsewhere.txt").write_text("\n".join(f"x,{name}" for name in NAMES))
    more = "--data", interrupted / "elsewhere.txt", "--column", 2, "--device", "cpu"
    process = resume(interrupted, *more, "--checkpoint-every", 7)
    assert process.returncode == 0, process.stderr
    (weights, metadata, _), (expected, told, _) = result(interrupted), result(trained)
    assert weights == expected
    assert metadata == told | {"list": "elsewhere.txt", "column": "2"}


def test_resume_without_a_state_or_with_another_list_is_refused(interrupted, refused):
    refused(train.main, ["--resume", "--out", interrupted / "x.pth"], "nothing to resume")
    state = (interrupted / "own.pth.unfinished").read_bytes()
    (interrupted / "names.txt").write_text("\n".join(NAMES[1:]))
    refused(train.main, ["--resume", "--out", interrupted / "own.pth"], "another list", "--data")
    assert (interrupted / "own.pth.unfinished").read_bytes() == state


def test_a_new_training_is_refused_while_a_state_is_there(interrupted, refused):
    state = (interrupted / "own.pth.unfinished").read_bytes()
    refused(train.main, command(interrupted), "own.pth.unfinished", "--resume")
    assert (interrupted / "own.pth.unfinished").read_bytes() == state


# Trainings that come to nothing


@pytest.mark.parametrize("step", [4, 80])
def test_one_that_diverges_keeps_the_last_saved_state_if_there_is_one(folder, step):
    stop = failure(ValueError("the loss is nan: lower --lr"))
    process = training(folder, before=at("plumbing.runs.record", step, stop))
    assert "lower --lr" in last_line(process) and (folder / "own.pth").read_bytes() == OLD
    assert nothing_happened(folder) if step < 35 else state_of(folder)["step"] == 70


@pytest.mark.parametrize("lr", [10, 100, 1e6])
def test_a_network_that_has_learned_nothing_replaces_nothing(folder, lr):
    """No better than the frequencies of the characters."""
    assert "lower --lr" in last_line(training(folder, "--lr", lr, "--batch-size", 2))
    assert nothing_happened(folder)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_too_little_memory_says_so_and_loses_nothing(folder, trained, error):
    process = training(folder, before=at("train.train_step", 1, failure(error)))
    assert "not enough memory" in last_line(process) and nothing_happened(folder)
    process = training(folder, before=at("train.finalize", 1, failure(error)))
    assert "not enough memory" in last_line(process)
    ends_as_if_nothing_happened(folder, trained)


def test_a_second_training_to_the_same_file_is_refused(folder, refused):
    (folder / "link.pth").symlink_to("own.pth")
    lock = folder / "own.pth.unfinished.lock"
    with FileLock(lock):
        for name in "own.pth", "link.pth":
            refused(train.main, command(folder, "--out", folder / name), str(lock))
    assert training(folder).returncode == 0  # whatever is left of a lock
    assert not lock.exists()


# Files that cannot be written


def test_a_full_disk_is_said_before_the_first_step(folder):
    """no file may grow past a few kB."""

    def before():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        at("train.train_step", 1, failure(AssertionError("it trains")))()

    process = training(folder, before=before)
    assert "own.pth.unfinished cannot be used: File too large" in last_line(process)
    assert nothing_happened(folder)


@pytest.mark.parametrize("call", ["posix.fsync", "posix.replace", "shutil.copymode"])
def test_a_failing_write_leaves_the_old_file(tmp_path, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(argv):
        with pytest.raises(OSError, match="No space left.*/file"):
            atomic_write(path, b"new")

    full = failure(OSError(28, "No space left on device"))
    process = forked(write, before=at(call, 1, full))
    assert process.returncode == 0, process.stderr
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["posix.fsync", "posix.replace"])
def test_where_the_end_fails_the_network_is_safe_in_the_state(folder, trained, call):
    """EBUSY on a bind mount, EPERM in a sticky folder; the message says what to do."""
    busy = at(call, 1, failure(OSError(16, "Device or resource busy")))
    last = last_line(training(folder, before=at("model.save", 1, busy)))
    assert "Device or resource busy" in last and "own.pth.unfinished" in last
    assert "rename" in last and "--resume --out" in last
    assert (folder / "own.pth").read_bytes() == OLD
    other = folder / "other"  # it is done, under the same name in another folder
    other.mkdir()
    os.rename(folder / "own.pth.unfinished", other / "own.pth.unfinished")
    assert resume(other).returncode == 0 and result(other) == result(trained)


def test_a_file_left_by_a_killed_write_is_overwritten_and_goes(folder, trained):
    """one fixed name, and nobody else's."""
    kept = ["own.pth.test", "own.pth.tmp", "own.pth.lock", ".own.pth.tmp", "new", "own.txt"]
    for name in [*kept, ".own.pth.partial", ".own.pth.unfinished.partial", ".own.png.partial"]:
        (folder / name).write_text("mine")
    assert training(folder).returncode == 0
    assert all((folder / name).read_text() == "mine" for name in kept)
    assert sorted(os.listdir(folder)) == sorted(LEFT + kept)
    assert result(folder) == result(trained)


def test_a_picture_that_is_not_the_projects_is_not_replaced(folder, trained):
    """nothing is trained for it; the project's own pictures are replaced."""
    cats = b"\x89PNG\r\n\x1a\n, but of cats"
    (folder / "own.png").write_bytes(cats)
    process = training(folder)
    assert "own.png" in last_line(process) and process.stderr.count("\n") == 1
    assert (folder / "own.png").read_bytes() == cats
    (folder / "own.png").write_bytes((trained / "own.png").read_bytes())
    assert training(folder).returncode == 0 and result(folder) == result(trained)


def test_a_picture_that_fails_costs_one_line(folder):
    broken = failure(RuntimeError("no font\nat all"))
    process = training(folder, before=at("matplotlib.figure.savefig", 1, broken))
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("no picture: ")]
    assert len(lines) == 1 and "Traceback" not in process.stderr
    model.load(folder / "own.pth")


def test_a_link_stays_a_link_and_permissions_stay(folder):
    (folder / "here.pth").symlink_to("own.pth")
    (folder / "own.pth").chmod(0o604)
    assert training(folder, "--out", folder / "here.pth").returncode == 0
    assert (folder / "here.pth").is_symlink() and model.load(folder / "own.pth")
    assert (folder / "own.pth").stat().st_mode & 0o777 == 0o604
    assert sorted(os.listdir(folder)) == sorted([*LEFT, "here.pth"])
    atomic_write(folder / "new", b"")
    (folder / "plain").write_bytes(b"")
    assert (folder / "new").stat().st_mode == (folder / "plain").stat().st_mode


def test_a_read_only_folder_is_said(folder, refused):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if os.geteuid():
        folder.chmod(0o500)
    elif subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root may write everywhere, and may not mount here")
    try:
        refused(train.main, ["--out", folder / "own.pth"], str(folder), "cannot be used")
    finally:
        subprocess.run(["umount", str(folder)] if os.geteuid() == 0 else ["chmod", "700", folder])


def test_out_is_no_file_that_is_read_and_no_device(folder, trained, refused):
    os.mkfifo(folder / "fifo.pth")
    (folder / "device.pth").symlink_to("/dev/null")
    (folder / "picture.png").mkdir()
    (folder / "loop.pth").symlink_to("loop.pth")
    (folder / "names.png").symlink_to("names.txt")
    (folder / "list.pth").write_text("\n".join(NAMES))
    (folder / "first.png").write_bytes((trained / "own.pth").read_bytes())
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    outs = "loop.pth,names.txt,names.pth,fifo.pth,device.pth,picture.pth,,x,own.pth.unfinished,"
    for out in [*(outs + "none/own.pth,names.txt/x.pth").split(","), "y" * 250 + ".pth"]:
        refused(train.main, command(folder, "--out", folder / out), str(folder))
    refused(train.main, ["--data", folder / "list.pth", "--out", folder / "list.pth"], "list.pth")
    first = ["--init-from", folder / "first.png", "--out", folder / "first.pth"]
    refused(train.main, ["--data", folder / "names.txt", *first], "first.png is to be read")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["own.pth", "own.png", "own.pth.unfinished.lock"])
def test_a_list_is_never_replaced_whatever_its_name(folder, refused, name):
    """Not as what is read, and not as what just stands there."""
    text = (folder / "names.txt").read_text()
    (folder / name).write_text(text)
    for data in name, "names.txt":
        args = ["--data", folder / data, "--out", folder / "own.pth"]
        refused(train.main, args, name)
        assert (folder / name).read_text() == text and os.listdir(folder).count(name) == 1
    assert not (folder / "own.pth.unfinished").exists()


def test_an_empty_lock_that_a_killed_process_left_is_taken_and_removed(folder, trained):
    (folder / "own.pth.unfinished.lock").touch()
    assert training(folder).returncode == 0
    assert result(folder) == result(trained) and sorted(os.listdir(folder)) == LEFT


def test_networks_of_all_versions_are_replaced_and_other_checkpoints_are_not(folder, refused):
    torch.save({"model": {}, "optimizer": {}}, folder / "own.pth")
    before = (folder / "own.pth").read_bytes()
    refused(train.main, command(folder), "own.pth is another kind of file")
    assert (folder / "own.pth").read_bytes() == before
    (folder / "own.pth").write_bytes(OLD)
    assert training(folder).returncode == 0
    assert training(folder).returncode == 0  # over a network of this version


def test_room_for_one_state_but_not_for_two_is_said_before_the_first_step(folder):
    def before():
        at("posix.replace", 2, failure(OSError(28, "No space left on device")))()

    process = training(folder, before=before)
    last = last_line(process)
    assert "own.pth.unfinished cannot be used: No space left on device" in last
    assert "val " not in process.stderr.splitlines()[1] and nothing_happened(folder)
