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
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

import model
import train
from model import load, read_names, read_tensors, write, write_tensors

SMALL = "--batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8 --steps 1500 --checkpoint-every 70".split()


def command(folder, *more):
    data = "--data", str(folder / "names.txt"), "--out", str(folder / "own.pth")
    return [sys.executable, str(ROOT / "train.py"), *data, *SMALL, *more]


def start(folder, *more):
    """Start a training; return when its first state is on disk."""
    process = subprocess.Popen(command(folder, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = folder / "own.pth.unfinished"
    before = state.stat().st_mtime_ns if state.exists() else 0
    while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
        time.sleep(0.01)
    return process


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The bytes of a checkpoint whose training nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(tiny / "names.txt", folder)
    subprocess.run(command(folder), check=True, capture_output=True)
    assert sorted(os.listdir(folder)) == ["loss.png", "names.txt", "own.pth"]
    return result(folder)


def result(folder):
    """The weights, bit for bit, how they were made, and the picture."""
    checkpoint = torch.load(folder / "own.pth", weights_only=True)
    state = {name: tensor.numpy().tobytes() for name, tensor in checkpoint["state_dict"].items()}
    return state, checkpoint["made"], (folder / "loss.png").read_bytes()


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copy(tiny / "names.txt", tmp_path)
    (tmp_path / "own.pth").write_bytes(b"an older network")
    return tmp_path


def test_killed_and_resumed_to_the_same_bytes(folder, undisturbed):
    pause = random.Random(1)
    process = start(folder)
    for _ in range(3):
        time.sleep(pause.random() * 0.3)
        process.kill()
        process.communicate()
        assert (folder / "own.pth").read_bytes() == b"an older network"
        process = start(folder, "--resume")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert result(folder) == undisturbed
    assert sorted(os.listdir(folder)) == ["loss.png", "names.txt", "own.pth"]


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_resumed_to_the_same_bytes(folder, undisturbed, signum, status):
    process = start(folder)
    process.send_signal(signum)
    out, err = process.communicate()
    assert (process.returncode, out) == (status, "")
    assert err.splitlines()[-1].startswith("stopped") and "--resume" in err.splitlines()[-1]
    # --resume alone is enough: the other flags are those of the unfinished training.
    process = run("train.py", "--out", folder / "own.pth", "--resume")
    assert process.returncode == 0, process.stderr
    assert result(folder) == undisturbed


@pytest.fixture
def interrupted(folder):
    process = start(folder)
    process.terminate()
    process.communicate()
    return folder


def test_resume_refuses_what_contradicts(interrupted, refused):
    out = "--out", interrupted / "own.pth"
    state = (interrupted / "own.pth.unfinished").read_bytes()
    refused(train.main, [*out], "--resume", "own.pth.unfinished")
    refused(train.main, [*out, "--resume", "--n-hidden", 9], "--n-hidden 9", "--n-hidden 8")
    refused(train.main, [*out, "--resume", "--lr", 0.2], "--lr 0.2", "--lr 0.1")
    (interrupted / "names.txt").write_text("ada\n" * 20)
    refused(train.main, [*out, "--resume"], "names.txt")
    assert (interrupted / "own.pth.unfinished").read_bytes() == state
    refused(train.main, ["--out", interrupted / "other.pth", "--resume"], "nothing to resume")


def test_a_second_training_to_the_same_file_is_refused(folder, refused):
    with FileLock(folder / "own.pth.lock"):
        refused(train.main, ["--out", folder / "own.pth"], "another training")


def test_divergence_keeps_the_last_good_state(folder, refused, monkeypatch):
    original, steps = train.sgd_step, iter(range(10**9))
    monkeypatch.setattr(train, "sgd_step", lambda *args: original(*args) if next(steps) < 150 else float("nan"))
    args = command(folder)[2:]
    with pytest.raises(SystemExit) as exit:
        train.main(args)
    assert exit.value.code == 2
    state = read_tensors(folder / "own.pth.unfinished", "")
    assert state["step"] == 140
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    assert (folder / "own.pth").read_bytes() == b"an older network"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError) as error:
        write(path, b"new")
    assert error.value.filename == str(path)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_full_disk(folder):
    """No file may grow past a few kB: the state cannot be written, which is said, and nothing is lost."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    process = subprocess.run(command(folder), capture_output=True, text=True, preexec_fn=limit)
    assert (process.returncode, process.stdout) == (2, "")
    assert "own.pth.unfinished cannot be written (File too large)" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert (folder / "own.pth").read_bytes() == b"an older network"
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]


def test_read_only_folder(folder, refused):
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True)
        if mounted.returncode:
            pytest.skip("root may write everywhere, and may not mount here")
    else:
        folder.chmod(0o500)
    try:
        refused(train.main, ["--out", folder / "own.pth"], "cannot be written")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)
        else:
            folder.chmod(0o700)


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode) | st.text(".\n\r\t aé\x00\x1b\ufeff").map(str.encode))
def test_any_bytes_are_names_or_one_clear_line(data):
    path = Path(f"/dev/shm/names-{os.getpid()}.txt")
    path = path if path.parent.is_dir() else Path(os.devnull)
    path.write_bytes(data)
    try:
        names = read_names(path)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
    else:
        text = data.decode("utf-8-sig")
        assert names == [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]
        assert all("." not in name and name.strip() == name for name in names)
        vocab = model.Vocabulary(names)
        assert [vocab.decode(vocab.encode(name)) for name in names] == names
    finally:
        if path.name != "null":
            path.unlink()


@given(st.lists(st.text(st.characters(exclude_characters=".", exclude_categories=["Cs", "Cc"])), max_size=30), st.data())
def test_training_on_any_list_ends_well_or_with_one_line(lines, data):
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"any-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        (folder / "names.txt").write_text("\n".join(lines), encoding="utf-8")
        args = "--batch-size 4 --block-size 4 --n-embd 2 --n-hidden 4 --steps 2".split()
        try:
            train.main(["--data", str(folder / "names.txt"), "--out", str(folder / "own.pth"), *args])
        except SystemExit as exit:
            assert exit.code == 2
            assert os.listdir(folder) == ["names.txt"]
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
                read_tensors(broken, "")


@given(st.binary(max_size=400))
def test_any_bytes_are_no_checkpoint(data):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"any-{os.getpid()}.pth"
    path.write_bytes(data)
    try:
        with pytest.raises(ValueError, match="any-"):
            load(path)
    finally:
        path.unlink()


def test_a_broken_state_is_refused(interrupted, refused):
    path = interrupted / "own.pth.unfinished"
    good = path.read_bytes()
    again = "--out", interrupted / "own.pth", "--resume"
    for data in b"", good[: len(good) // 2], good[:-1], b"names\n":
        path.write_bytes(data)
        refused(train.main, again, "own.pth.unfinished")
    state = torch.load(io.BytesIO(good), weights_only=True)
    for flags in {"steps": "x"}, {"steps": -1}, {"unknown": 3}, {"help": 1}, None:
        write_tensors(path, state | {"flags": flags})
        with pytest.raises(SystemExit) as exit:
            train.main([str(arg) for arg in again])
        assert exit.value.code == 2
    for change in {"step": "x"}, {"average": []}, {"state_dict": {}}, {"generator": torch.zeros(3)}, {"curves": 3}:
        write_tensors(path, state | change)
        with pytest.raises(SystemExit) as exit:
            train.main([str(arg) for arg in again])
        assert exit.value.code == 2


@pytest.mark.parametrize("sizes", [{"n_hidden": 10**6}, {"n_hidden": 10**30}, {"block_size": 2**60}, {"n_embd": 10**12}])
def test_sizes_of_terabytes_are_refused_before_they_are_built(tmp_path, tiny, sizes):
    checkpoint = torch.load(tiny / "model.pth", weights_only=True)
    checkpoint["config"] |= sizes
    write_tensors(tmp_path / "huge.pth", checkpoint)
    with pytest.raises(ValueError, match="huge.pth"):
        load(tmp_path / "huge.pth")


class Bomb:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_files_that_would_fill_the_memory_are_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    write_tensors(path, {"made": Bomb(bytearray, 10**12)})
    with pytest.raises(ValueError, match="bomb.pth"):
        load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps("a" * 10**8, 2))
    data = path.read_bytes()[:-2] + bytes((64, 0))
    path.write_bytes(data + hashlib.sha256(data).hexdigest().encode())
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match="bomb.pth"):
        load(path)


def test_names_longer_than_the_context_are_learnt_from_whole(tmp_path):
    """10,000 characters are 10,001 windows, and a pattern that only shows at their end is learnt."""
    names = ["ab" * 5000, "ab" * 5000 + "c"] * 5
    vocab = model.Vocabulary(names)
    window = train.windows(names, vocab, 16)
    assert len(window) == sum(len(name) + 1 for name in names)
    contexts, targets = train.contexts_and_targets(window[10_000:10_001])
    assert vocab.decode(contexts[0].tolist()) == "ab" * 8 and targets.item() == 0


def test_a_closed_pipe_ends_quietly(tiny):
    for script, args in ("sampling.py", ["-n", "100000"]), ("train.py", ["--help"]):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *(["--model", str(tiny / "model.pth")] if args[0] == "-n" else []), *args],
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
        process = run("sampling.py", "--model", tiny / "model.pth", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert process.returncode == 2
    assert process.stderr == "sampling.py: error: standard output cannot be written (No space left on device)\n"


def test_terminals_and_paths_of_all_kinds(tmp_path):
    """A path with blanks and other letters, another current folder, a terminal that knows only ASCII."""
    folder = tmp_path / "mé mo żż"
    folder.mkdir()
    (folder / "my names.txt").write_text("zoë\nżółć\n" * 8, encoding="utf-8")
    ascii_only = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    ascii_only |= {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    args = "--steps", 300, "--batch-size", 8, "--block-size", 4, "--n-embd", 4, "--n-hidden", 16
    process = run("train.py", "--data", folder / "my names.txt", "--out", folder / "my own.pth", *args, env=ascii_only)
    assert process.returncode == 0, process.stderr
    process = run("sampling.py", "--model", folder / "my own.pth", "-n", 50, cwd=tmp_path, env=ascii_only)
    assert (process.returncode, process.stderr) == (0, "")
    assert len(process.stdout.splitlines()) == 50 and "\\xeb" in process.stdout


def test_started_from_another_folder(tmp_path):
    process = run("sampling.py", "--new", "-n", 5, cwd=tmp_path)
    assert (process.returncode, process.stderr, len(process.stdout.splitlines())) == (0, "", 5)
    assert os.listdir(tmp_path) == []


def test_ctrl_c_ends_sampling_quietly(tiny):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sampling.py"), "--model", str(tiny / "model.pth"), "-n", str(10**9)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(100_000)
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (130, 141)
