"""Interruptions, faults and hostile files: each promise of the README."""

import hashlib
import io
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unicodedata import normalize

import pytest
import torch
from conftest import ROOT, forked, run, train_until
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

import model
import sampling
import train
from model import load, read_names, read_tensors, write, write_tensors

SIZES = "--batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8".split()
SMALL = [*SIZES, *"--steps 450 --checkpoint-every 70".split()]


def command(folder, *more):
    return ["--data", str(folder / "names.txt"), "--out", str(folder / "own.pth"), *SMALL, *more]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The bytes of a checkpoint whose training nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(tiny / "names.txt", folder)
    process = forked(train.main, *command(folder))
    assert process.returncode == 0, process.stderr
    assert sorted(os.listdir(folder)) == ["names.txt", "own.png", "own.pth"]
    return result(folder)


def result(folder):
    """The weights, bit for bit, how they were made, and the picture."""
    checkpoint = torch.load(folder / "own.pth", weights_only=True)
    state = {name: tensor.numpy().tobytes() for name, tensor in checkpoint["state_dict"].items()}
    return state, checkpoint["made"], (folder / "own.png").read_bytes()


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copy(tiny / "names.txt", tmp_path)
    (tmp_path / "own.pth").write_bytes(b"an older network")
    return tmp_path


def test_killed_and_resumed_to_the_same_bytes(folder, undisturbed):
    resume = []
    for step in 75, 140, 1, 199:  # each counted from where it went on
        process = train_until("sgd_step", step, [signal.SIGKILL], *command(folder, *resume))
        assert process.returncode == -signal.SIGKILL
        assert (folder / "own.pth").read_bytes() == b"an older network"
        resume = ["--resume"]
    process = forked(train.main, *command(folder, "--resume"))
    assert process.returncode == 0, process.stderr
    assert result(folder) == undisturbed
    assert sorted(os.listdir(folder)) == ["names.txt", "own.png", "own.pth"]


AT = [
    ("sgd_step", 123),
    ("sgd_step", 450),  # the last step
    ("recompute_statistics", 20),
    ("finished", 1),
    ("save", 1),
    ("plot", 1),
]


@pytest.mark.parametrize(
    "signum, where, nth",
    [(signum, *at) for at in AT for signum in (signal.SIGTERM, signal.SIGKILL)]
    + [(signal.SIGINT, "sgd_step", 123), (signal.SIGINT, "finished", 1)],
)
def test_stopped_at_any_moment_and_resumed_to_the_same_bytes(
    folder, undisturbed, signum, where, nth
):
    process = train_until(where, nth, [signum], *command(folder))
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert (process.returncode, process.stdout) == (128 + signum, "")
        assert (
            process.stderr.splitlines()[-1].startswith("stopped") and "--resume" in process.stderr
        )
        left = ["names.txt", "own.png", "own.pth", "own.pth.unfinished"]
        assert [name for name in left if name in os.listdir(folder)] == sorted(os.listdir(folder))
    if where != "plot":
        assert (folder / "own.pth").read_bytes() == b"an older network"
    # --resume alone is enough: the other flags are those of the unfinished training.
    process = forked(train.main, "--out", folder / "own.pth", "--resume")
    assert process.returncode == 0, process.stderr
    assert result(folder) == undisturbed
    assert sorted(os.listdir(folder)) == ["names.txt", "own.png", "own.pth"]


def test_begun_stopped_and_resumed_to_the_same_bytes(folder, tiny):
    """What the weights decay to is kept, and --init-from need not be said again."""
    begun = command(folder, "--init-from", tiny / "model.pth")
    assert forked(train.main, *begun).returncode == 0
    expected = result(folder)
    assert train_until("sgd_step", 123, [signal.SIGTERM], *begun).returncode != 0
    assert forked(train.main, "--out", folder / "own.pth", "--resume").returncode == 0
    assert result(folder) == expected


@pytest.mark.parametrize("script", ["train.py", "sampling.py"])
def test_stopped_while_torch_is_imported(script, tmp_path):
    """A module torch that takes its time; no traceback, whoever imports it."""
    (tmp_path / "torch.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(60)"
    )
    process = run(script, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGINT, "", "")


def test_a_second_signal_ends_at_once(folder):
    process = train_until("sgd_step", 5, [signal.SIGINT, signal.SIGTERM], *command(folder))
    assert (process.returncode, process.stderr.count("\n")) == (-signal.SIGTERM, 2)
    assert "own.pth.unfinished" not in os.listdir(folder)


@pytest.fixture
def interrupted(folder):
    process = train_until("sgd_step", 75, [signal.SIGTERM], *command(folder))
    assert process.returncode == 128 + signal.SIGTERM
    return folder


def test_resume_refuses_what_contradicts(interrupted, refused):
    out = "--out", interrupted / "own.pth"
    state = (interrupted / "own.pth.unfinished").read_bytes()
    refused(train.main, [*out], "--resume", "own.pth.unfinished")
    refused(train.main, [*out, "--resume", "--n-hidden", 9], "--n-hidden 9", "--n-hidden 8")
    refused(train.main, [*out, "--resume", "--lr", 0.2], "--lr 0.2", "--lr 0.1")
    refused(
        train.main,
        [*out, "--resume", "--init-from", "none.pth"],
        "not allowed with argument --resume",
    )
    (interrupted / "names.txt").write_text("ada\n" * 20)
    refused(train.main, [*out, "--resume"], "names.txt")
    assert (interrupted / "own.pth.unfinished").read_bytes() == state
    refused(train.main, ["--out", interrupted / "other.pth", "--resume"], "nothing to resume")


def test_a_second_training_to_the_same_file_is_refused(folder, refused):
    (folder / "link.pth").symlink_to("own.pth")
    with FileLock(folder / "own.pth.unfinished.lock"):
        refused(train.main, command(folder), "another training")
        refused(train.main, ["--out", folder / "link.pth"], "another training")


def test_divergence_keeps_the_last_good_state(folder, refused, monkeypatch):
    original, steps = train.sgd_step, iter(range(10**9))
    monkeypatch.setattr(
        train, "sgd_step", lambda *args: original(*args) if next(steps) < 150 else float("nan")
    )
    with pytest.raises(SystemExit) as exit:
        train.main(command(folder))
    assert exit.value.code == 2
    state = torch.load(folder / "own.pth.unfinished", weights_only=True)
    assert state["step"] == 140
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    assert (folder / "own.pth").read_bytes() == b"an older network"


def test_a_learning_rate_that_overflows_replaces_nothing(folder):
    sizes = "--batch-size", 96, "--block-size", 16, "--n-embd", 24, "--n-hidden", 280, "--steps", 50
    process = forked(train.main, *command(folder, *sizes, "--lr", 1e6))
    assert (process.returncode, process.stdout) == (2, "")
    assert "lower --lr" in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr
    assert (folder / "own.pth").read_bytes() == b"an older network"


def test_out_is_no_other_file_of_the_run_and_no_device(folder, tiny, refused):
    """What is there is refused before anything is written, and stays as it is."""
    os.mkfifo(folder / "fifo.pth")
    (folder / "device.pth").symlink_to("/dev/null")
    (folder / "picture.png").mkdir()
    for name in "list.png", "own.pth.unfinished", "cities.txt", "used.pth.unfinished.lock":
        shutil.copy(folder / "names.txt", folder / name)
    (folder / "loop.pth").symlink_to("loop.pth")
    (folder / "names.png").symlink_to("names.txt")
    shutil.copy(tiny / "model.pth", folder / "begun.png")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    outs = (
        "loop.pth",
        "names.pth",
        "names.txt",
        "cities.txt",
        "own.pth.unfinished",
        "own.pth.lock",
        "loss.png",
        "picture.pth",
        "used.pth",
        "fifo.pth",
        "device.pth",
        "",
    )
    for out in outs:
        refused(
            train.main, ["--data", folder / "names.txt", *SMALL, "--out", folder / out], "--out"
        )
    refused(
        train.main, ["--data", folder / "list.png", *SMALL, "--out", folder / "list.pth"], "--out"
    )
    for out, word in ("/dev/null", "--out"), ("", "--out"), ("x" * 250 + ".pth", "too long"):
        refused(train.main, ["--data", folder / "names.txt", *SMALL, "--out", out], word)
    begun = ["--init-from", folder / "begun.png", "--out", folder / "begun.pth"]
    refused(train.main, ["--data", folder / "names.txt", *SMALL[-4:], *begun], "--out")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert (folder / "fifo.pth").is_fifo() and Path("/dev/null").is_char_device()


def test_files_beside_the_network_are_left_alone(folder):
    names = "own.pth.test", "own.pth.tmp", "own.pth.lock", "new", "own.txt"
    for name in names:
        (folder / name).write_text("mine")
    assert forked(train.main, *command(folder)).returncode == 0
    assert all((folder / name).read_text() == "mine" for name in names)


def test_a_link_stays_a_link_and_permissions_stay(folder):
    (folder / "here.pth").symlink_to("own.pth")
    (folder / "own.pth").chmod(0o604)
    process = forked(train.main, *command(folder, "--out", folder / "here.pth"))
    assert process.returncode == 0, process.stderr
    assert (folder / "here.pth").is_symlink() and (
        folder / "own.pth"
    ).stat().st_mode & 0o777 == 0o604
    load(folder / "own.pth")
    assert sorted(os.listdir(folder)) == ["here.pth", "names.txt", "own.png", "own.pth"]
    write(folder / "new", b"")
    (folder / "plain").write_bytes(b"")
    assert (folder / "new").stat().st_mode == (folder / "plain").stat().st_mode


@pytest.mark.parametrize("how", ["folder", "tex", "backend"])
def test_a_picture_that_fails_costs_one_line(folder, how):
    env = dict(os.environ)
    if how == "tex":
        (folder / "matplotlibrc").write_text("text.usetex: True\n")
        env |= {"MATPLOTLIBRC": str(folder), "PATH": os.path.dirname(sys.executable)}
    if how == "backend":
        env["MPLBACKEND"] = "garbage"
    if how == "folder":  # that appears while it trains
        code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import model, train\n"
        code += "save = model.save\n"
        code += "model.save = lambda *args: (os.mkdir(sys.argv.pop()), save(*args))\n"
        code += "train.main(sys.argv[1:-1])"
        process = subprocess.run(
            [sys.executable, "-c", code, *command(folder), folder / "own.png"],
            capture_output=True,
            text=True,
        )
    else:
        process = run("train.py", *command(folder), env=env)
    assert process.returncode == 0, process.stderr
    assert (
        len([line for line in process.stderr.splitlines() if line.startswith("no picture: ")]) == 1
    )
    assert "Traceback" not in process.stderr and "no picture" in process.stdout
    load(folder / "own.pth")


def test_out_is_the_command_lines_alone_and_the_rest_is_remembered(interrupted, refused):
    path = interrupted / "own.pth.unfinished"
    state = torch.load(path, weights_only=True)
    assert state["flags"]["checkpoint_every"] == 70
    victim = interrupted / "victim.pth"
    victim.write_text("mine")
    write_tensors(path, state | {"flags": state["flags"] | {"out": str(victim)}})
    process = forked(train.main, "--out", interrupted / "own.pth", "--resume")
    assert process.returncode == 0, process.stderr
    load(interrupted / "own.pth")
    assert victim.read_text() == "mine"


def test_threads_are_part_of_the_run(folder, refused, monkeypatch, capsys):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    process = train_until("sgd_step", 75, [signal.SIGTERM], *command(folder, "--threads", "2"))
    assert process.returncode == 128 + signal.SIGTERM
    capsys.readouterr()
    refused(train.main, command(folder, "--resume", "--threads", "1"), "--threads 1", "--threads 2")
    train.main(["--out", str(folder / "own.pth"), "--resume"])
    assert threads == [2]


def test_too_little_memory_says_so(interrupted, refused, monkeypatch):
    """Whatever needs it, and as torch or as Python says it; a good file is not called bad."""

    def fail(*args, **kwargs):
        torch.empty(2**60)

    def fail_in_python(*args, **kwargs):
        raise MemoryError

    for name in "WaveNet", "sgd_step", "evaluate":
        with monkeypatch.context() as patched:
            patched.setattr(train, name, fail)
            process = forked(train.main, "--out", interrupted / "own.pth", "--resume")
            assert (
                process.returncode == 2 and "not enough memory" in process.stderr.splitlines()[-1]
            )
    for failing in fail, fail_in_python:
        with monkeypatch.context() as patched:
            patched.setattr(torch, "load", failing)
            refused(sampling.main, [], "not enough memory")
            refused(train.main, ["--out", interrupted / "own.pth", "--resume"], "not enough memory")


@pytest.mark.parametrize(
    "sizes",
    [
        ["--n-hidden", 100_000],
        ["--n-hidden", 30_000],
        ["--block-size", 65_536],
        ["--block-size", 6],
    ],
)
def test_sizes_beyond_the_memory_are_refused(folder, refused, sizes):
    refused(train.main, command(folder, *sizes), sizes[0])


def test_nobody_listening_in_an_ascii_locale(folder):
    """Names that the locale cannot write are shown while it trains."""
    (folder / "names.txt").write_text("zoë\nżółć\n" * 10, encoding="utf-8")
    env = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    args = ["sh", "-c", '"$@" 2>&-', "sh", sys.executable, str(ROOT / "train.py"), *command(folder)]
    assert subprocess.run(args, capture_output=True, env=env).returncode == 0
    load(folder / "own.pth")


def test_nobody_listening_loses_no_work(folder, undisturbed):
    """Output goes to a pipe that nobody reads, or is closed: the training ends all the same."""
    read, end = os.pipe()
    os.close(read)
    args = [sys.executable, str(ROOT / "train.py"), *command(folder)]
    assert subprocess.run(args, stderr=end, stdout=end).returncode == 141
    assert result(folder) == undisturbed
    for streams in "2>&-", ">&- 2>&- <&-":
        os.remove(folder / "own.pth")
        process = subprocess.run(
            ["sh", "-c", f'"$@" {streams}', "sh", *args], capture_output=True, text=True
        )
        assert process.returncode == 0 and "Traceback" not in process.stdout + process.stderr
        assert ("rows" in process.stderr) == ("2>" not in streams) and "rows" not in process.stdout
        assert result(folder) == undisturbed


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left.*/file"):
        write(path, b"new")
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_full_disk(folder):
    """No file may grow past a few kB: that is said, and nothing is lost."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    process = forked(train.main, *command(folder), before=limit)
    assert (process.returncode, process.stdout) == (2, "")
    assert (
        "own.pth.unfinished cannot be read or written (File too large)"
        in process.stderr.splitlines()[-1]
    )
    assert "Traceback" not in process.stderr
    assert (folder / "own.pth").read_bytes() == b"an older network"
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]


def test_read_only_folder(folder, refused):
    if os.geteuid() == 0:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("root may write everywhere, and may not mount here")
    else:
        folder.chmod(0o500)
    try:
        refused(train.main, ["--out", folder / "own.pth"], "cannot be read or written")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)
        else:
            folder.chmod(0o700)


@given(
    st.binary(max_size=300)
    | st.text(max_size=200).map(str.encode)
    | st.text(".\n\r\t aé\x00\x1b\ufeff").map(str.encode)
)
def test_any_bytes_are_names_or_one_clear_line(data):
    path = Path(f"/dev/shm/names-{os.getpid()}.txt")
    path = path if path.parent.is_dir() else Path(os.devnull)
    path.write_bytes(data)
    try:
        names = read_names(path)
    except (OSError, ValueError) as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
    else:
        text = data.decode("utf-8-sig")
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert names == [normalize("NFC", line).strip() for line in lines if line.strip()]
        assert all(name and name.strip() == name for name in names)
        vocab = model.Vocabulary(names)
        assert [vocab.decode(vocab.encode(name)) for name in names] == names
    finally:
        if path.name != "null":
            path.unlink()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), max_size=30), st.data())
def test_training_on_any_list_ends_well_or_with_one_line(lines, data):
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"any-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        (folder / "names.txt").write_text("\n".join(lines), encoding="utf-8")
        args = "--batch-size 4 --block-size 4 --n-embd 2 --n-hidden 4 --steps 2".split()
        try:
            train.main(
                ["--data", str(folder / "names.txt"), "--out", str(folder / "own.pth"), *args]
            )
        except SystemExit as exit:
            assert exit.code == 2
            assert os.listdir(folder) == ["names.txt"]
            os.remove(folder / "names.txt")
        else:
            load(folder / "own.pth")
    finally:
        shutil.rmtree(folder)


def test_every_flipped_bit_is_noticed(tiny, interrupted):
    """Of a checkpoint and of a state; and what torch itself reads from them is what was written."""
    for path in tiny / "model.pth", interrupted / "own.pth.unfinished":
        torch.load(path, weights_only=True)
        good = bytearray(path.read_bytes())
        broken = path.with_name("broken")
        bits = random.Random(1)
        for place in bits.sample(range(len(good)), 500):
            good[place] ^= (flip := 1 << bits.randrange(8))
            broken.write_bytes(good)
            good[place] ^= flip
            with pytest.raises(ValueError, match="broken is damaged"):
                read_tensors(broken, (), "")


@given(st.binary(max_size=400))
def test_any_bytes_are_no_checkpoint(data):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"any-{os.getpid()}.pth"
    path.write_bytes(data)
    try:
        with pytest.raises(ValueError, match="any-"):
            load(path)
    finally:
        path.unlink()


def test_a_broken_state_is_refused(interrupted, refused, tiny):
    path = interrupted / "own.pth.unfinished"
    good = path.read_bytes()
    again = "--out", interrupted / "own.pth", "--resume"
    for data in b"", good[: len(good) // 2], good[:-1], b"names\n", good[:-64] + bytes(64):
        path.write_bytes(data)
        refused(train.main, again, "own.pth.unfinished is damaged")
    shutil.copy(tiny / "model.pth", path)
    refused(train.main, again, "own.pth.unfinished holds something else")


def test_no_code_is_run(tmp_path, tiny, monkeypatch):
    """A pickle that would run code, and a stream of torch's older format in front of all.

    Both are refused for their sum; and where somebody has made that right, all the same.
    """
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new, zipfile.ZipFile(tiny / "model.pth") as good:
        for name in good.namelist():
            code = name == "archive/data.pkl"
            new.writestr(name, pickle.dumps(Code(), 2) if code else good.read(name))
    stream = io.BytesIO()
    torch.save(Code(), stream, _use_new_zipfile_serialization=False)
    for data in buffer.getvalue(), stream.getvalue() + (tiny / "model.pth").read_bytes()[:-64]:
        (tmp_path / "code.pth").write_bytes(data)
        with pytest.raises(ValueError, match="code.pth is damaged"):
            load(tmp_path / "code.pth")
        data = data[:-2] + bytes((64, 0))
        (tmp_path / "code.pth").write_bytes(data + hashlib.sha256(data).hexdigest().encode())
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            load(tmp_path / "code.pth")
        assert os.listdir(tmp_path) == ["code.pth"]


class Code:
    def __reduce__(self):
        return open, ("ran", "w")


def test_what_is_no_file_is_refused(tmp_path, tiny, refused, monkeypatch):
    holes = tmp_path / "holes"
    with open(holes, "wb") as file:
        file.truncate(3 * 2**30)
    with open(tmp_path / "zip of holes", "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(3 * 2**30)
    refused(sampling.main, ["--model", tmp_path / "zip of holes"], "is damaged")
    for path in "/dev/zero", holes, tmp_path:
        refused(sampling.main, ["--model", path], str(path))
        process = forked(train.main, "--data", path, "--out", tmp_path / "own.pth")
        assert process.returncode == 2 and str(path) in process.stderr.splitlines()[-1]
    os.mkfifo(tmp_path / "endless")
    monkeypatch.setattr(model, "LARGEST_LIST", 10**6)
    refused(sampling.main, ["--model", tmp_path / "endless"], "endless is no file")
    with subprocess.Popen(["sh", "-c", f"yes > {tmp_path}/endless"], stderr=subprocess.PIPE):
        args = "--data", tmp_path / "endless", "--out", tmp_path / "own.pth"
        process = forked(train.main, *args)
    assert process.returncode == 2 and "endless" in process.stderr, process.stderr
    with open(tiny / "model.pth", "rb") as file:
        process = run("sampling.py", "--model", "/dev/stdin", "-n", 3, stdin=file)
    assert len(process.stdout.splitlines()) == 3


def test_messages_show_what_they_quote_escaped(tmp_path, refused):
    path = tmp_path / "a\nb\x1b[31m\u202e.txt"
    refused(
        train.main, ["--data", path, "--out", tmp_path / "own.pth"], "a\\nb\\x1b[31m\\u202e.txt"
    )
    path.write_bytes(b"ada\xff")
    refused(sampling.main, ["--new", "--data", path], "a\\nb\\x1b[31m\\u202e.txt")


def test_names_longer_than_the_context_are_learnt_from_whole(tmp_path):
    """10,000 characters are 10,001 windows, and the last one shows the end of the name."""
    names = ["ab" * 5000, "ab" * 5000 + "c"] * 5
    vocab = model.Vocabulary(names)
    window = model.windows(names, vocab, 16)
    assert len(window) == sum(len(name) + 1 for name in names)
    contexts, targets = model.contexts_and_targets(window[10_000:10_001])
    assert vocab.decode(contexts[0].tolist()) == "ab" * 8 and targets.item() == 0


def test_a_closed_pipe_ends_quietly(tiny):
    for script, args in ("sampling.py", ["-n", "100000"]), ("train.py", ["--help"]):
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / script),
                *(["--model", str(tiny / "model.pth")] if args[0] == "-n" else []),
                *args,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, 141)


def test_a_full_standard_output_is_said(tiny):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        process = run(
            "sampling.py",
            "--model",
            tiny / "model.pth",
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert process.returncode == 2
    assert (
        process.stderr == "sampling.py: error: standard output cannot be read or written"
        " (No space left on device): check its name, its rights, and the room there\n"
    )


def test_terminals_and_paths_of_all_kinds(tmp_path):
    """Paths with blanks and other letters, another folder, a terminal that knows only ASCII."""
    folder = tmp_path / "mé mo żż"
    folder.mkdir()
    (folder / "my names.txt").write_text("zoë\nżółć\n" * 8, encoding="utf-8")
    ascii_only = {
        key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))
    }
    ascii_only |= {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    args = "--steps", 300, "--batch-size", 8, "--block-size", 4, "--n-embd", 4, "--n-hidden", 16
    process = run(
        "train.py",
        "--data",
        folder / "my names.txt",
        "--out",
        folder / "my own.pth",
        *args,
        env=ascii_only,
    )
    assert process.returncode == 0, process.stderr
    process = run(
        "sampling.py", "--model", folder / "my own.pth", "-n", 50, cwd=tmp_path, env=ascii_only
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert len(process.stdout.splitlines()) == 50 and "\\xeb" in process.stdout


def test_started_from_another_folder(tmp_path):
    process = run("sampling.py", "--new", "-n", 5, cwd=tmp_path)
    assert (process.returncode, process.stderr, len(process.stdout.splitlines())) == (0, "", 5)
    assert os.listdir(tmp_path) == []


def test_ctrl_c_ends_sampling_quietly(tiny):
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "sampling.py"),
            "--model",
            str(tiny / "model.pth"),
            "-n",
            str(10**9),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(100_000)
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (130, 141)
