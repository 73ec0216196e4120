"""Both commands as shells, pipes, terminals and other programs call them."""

import ntpath
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, forked, run
from helpers import NAMES, at, command, failure, result, signals

import sampling
import train

pytest_plugins = "folders"
N1 = 10**6


def script(name, *args):
    return [sys.executable, str(ROOT / name), *map(str, args)]


def started(name, *args, **kwargs):
    return subprocess.Popen(script(name, *args), stderr=subprocess.PIPE, text=True, **kwargs)


# What goes where


def test_results_go_to_stdout_and_all_else_to_stderr(folder, trained):
    process = run("train.py", *command(folder))
    assert process.returncode == 0
    header, losses, kept, *names = process.stdout.splitlines()[:13]
    assert header.split() == ["train", "val", "test"] and losses.endswith("nats per character")
    assert [float(loss) < 2 for loss in losses.split()[:3]] == [True] * 3 and len(names) == 10
    assert "names" in process.stderr and "val" in process.stderr
    assert result(folder) == result(trained)  # in a new process as in a fork
    process = run("sampling.py", "--model", folder / "own.pth", "-n", 7)
    assert (process.stderr, len(process.stdout.splitlines())) == ("", 7)


def test_the_last_line_is_the_command_to_type_next(folder):
    process = forked(train.main, *command(folder))
    last = process.stdout.splitlines()[-1]
    assert last.startswith("python sampling.py")
    process = subprocess.run(
        last.replace("python", sys.executable, 1), shell=True, cwd=ROOT, capture_output=True
    )
    assert (process.returncode, process.stderr) == (0, b"") and process.stdout


@pytest.mark.parametrize("name, args", [("sampling.py", ["-n", N1]), ("train.py", ["--help"])])
def test_a_closed_pipe_ends_quietly(trained, name, args):
    args = args + ["--model", trained / "own.pth"] * (name == "sampling.py")
    process = started(name, *args, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() in ((0, 141) if "--help" in args else (141,))


def test_nobody_listening_loses_no_work(folder, trained):
    read, end = os.pipe()
    os.close(read)
    assert subprocess.run(script("train.py", *command(folder)), stderr=end, stdout=end).returncode
    assert result(folder) == result(trained)
    for streams in "2>&-", ">&- 2>&- <&-":
        (folder / "own.pth").unlink()
        shell = ["sh", "-c", f'"$@" {streams}', "sh", *script("train.py", *command(folder))]
        process = subprocess.run(shell, capture_output=True, text=True)
        assert process.returncode == 0 and "Traceback" not in process.stdout + process.stderr
        assert result(folder) == result(trained)


def test_a_full_standard_output_is_said(trained, folder):
    for name, args in (
        ("sampling.py", ["--model", trained / "own.pth"]),
        ("train.py", command(folder)),
    ):
        with open("/dev/full", "w") as full:
            process = started(name, *args, stdout=full)
            last = process.communicate()[1].splitlines()[-1]
        assert process.returncode == 2
        assert last == f"{name}: error: standard output cannot be used: No space left on device"


def test_ctrl_c_ends_both_quietly(trained, folder):
    process = started("sampling.py", "--model", trained / "own.pth", "-n", N1, stdout=-1)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == 130
    reading = at("model.read_lines", 1, signals(signal.SIGINT))
    process = forked(train.main, *command(folder), before=reading)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")


# Terminals, folders, paths


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_are_utf8_wherever_stdout_is_no_terminal(tmp_path, encoding):
    """N4: and what one command writes the other reads."""
    folder = tmp_path / "mé mo żż"
    folder.mkdir()
    names = [name.replace("k", "ż").replace("a", "ë") for name in NAMES]
    (folder / "my names.txt").write_text("\n".join(names), encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    env |= {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    files = "--data", folder / "my names.txt", "--out", folder / "my own.pth"
    process = run("train.py", *files, *command(folder)[4:], env=env, cwd=tmp_path, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    assert "ë" in process.stdout and "\\x" not in process.stdout
    model = "--model", folder / "my own.pth"
    process = run("sampling.py", *model, "-n", 90, env=env, cwd=tmp_path, encoding="utf-8")
    assert (process.returncode, process.stderr) == (0, "")
    assert "ë" in process.stdout and len(process.stdout.splitlines()) == 90
    (folder / "drawn.txt").write_text(process.stdout, encoding="utf-8")
    process = run("sampling.py", *model, "--score", folder / "drawn.txt", env=env, encoding="utf-8")
    assert (process.returncode, process.stderr) == (0, "") and "inf" not in process.stdout


def test_a_terminal_that_knows_only_ascii_gets_escapes(trained, folder):
    (folder / "names.txt").write_text("\n".join(name.replace("a", "ë") for name in NAMES))
    assert forked(train.main, *command(folder)).returncode == 0
    ours, terminal = os.openpty()
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = started("sampling.py", "--model", folder / "own.pth", stdout=terminal, env=env)
    os.close(terminal)
    shown = os.read(ours, 10**5)
    assert process.communicate()[1] == "" and process.returncode == 0
    assert shown.isascii() and b"\\xeb" in shown


def test_started_from_another_folder_it_finds_its_files_and_leaves_none(tmp_path):
    process = run("sampling.py", "--new", "-n", 5, cwd=tmp_path)
    assert (process.returncode, process.stderr, len(process.stdout.splitlines())) == (0, "", 5)
    assert os.listdir(tmp_path) == []


def test_windows_with_another_current_drive(monkeypatch):
    """N4: no path of the project is made relative; what is to be typed is quoted as there."""
    source = "".join((ROOT / name).read_text() for name in ("train.py", "sampling.py", "model.py"))
    assert "relpath" not in source
    with pytest.raises(ValueError):
        ntpath.relpath("C:\\project", "D:\\")  # this is why
    monkeypatch.setattr(sampling.os, "name", "nt")
    typed = sampling.command("train.py", "--resume", "--out", "my own.pth")
    assert typed == 'python train.py --resume --out "my own.pth"'


def test_scores_come_from_file_descriptor_0_itself(trained, tmp_path):
    """N3: at an offset, on a socket, and without a /dev/stdin."""
    args = "--model", trained / "own.pth", "--score", "-"
    (tmp_path / "list").write_text("skipped\nkal\nmin\n")
    with open(tmp_path / "list") as file:
        os.lseek(file.fileno(), len("skipped\n"), os.SEEK_SET)
        process = run("sampling.py", *args, stdin=file)
    assert [line.split("\t")[-1] for line in process.stdout.splitlines()] == ["kal", "min"]
    ours, theirs = socket.socketpair()
    ours.sendall(b"kal\nmin\n")
    ours.shutdown(socket.SHUT_WR)
    assert run("sampling.py", *args, stdin=theirs).stdout == process.stdout


# What is typed wrong


TRAINING = {
    "--steps": [0, -1, "x", 1.5],
    "--batch-size": [0, 1, -3, 10**7],
    "--block-size": [0, 1, 3, 6, 12, -2, 65_536, 2**40],
    "--n-embd": [0, -1, 10**9],
    "--n-hidden": [0, -1, 30_000, 10**9],
    "--lr": [0, -0.1, "nan", "inf", "x"],
    "--dropout": [-0.1, 1, "nan"],
    "--truncate": [-0.1, 1.1, "nan"],
    "--seed": [-1, 2**64],
    "--threads": [0, 10**6],
    "--checkpoint-every": [0],
    "--device": ["tpu", "cpu:x"],
    "--column": [9, "nothing"],
    "--nonsense": [1],
}
SAMPLING = {
    "-n": [0, -1, "x", 10**10],
    "--max-length": [0, 1001],
    "--min-length": [0, 2000],
    "--match": ["(", "a{99999999999}"],
    "--temperature": [-1, "nan", "inf", "x"],
    "--top-k": [0, 1.5],
    "--seed": [-1, 2**32],
    "--threads": [0],
    "--start": ["k\n", "é", "."],
    "--model": ["none.pth"],
    "--score": ["none.txt"],
    "--column": [1],
    "nonsense": [1],
}


@pytest.mark.parametrize("flag", TRAINING)
def test_every_flag_of_train_out_of_range_is_one_line(folder, refused, flag):
    for value in TRAINING[flag]:
        refused(train.main, command(folder, flag, value), str(value))
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]


@pytest.mark.parametrize("flag", SAMPLING)
def test_every_flag_of_sampling_out_of_range_is_one_line(trained, refused, flag):
    for value in SAMPLING[flag]:
        refused(sampling.main, ["--model", trained / "own.pth", flag, value])


@pytest.mark.parametrize("flag", ["--steps 9", "--data own.txt", "--lr 0.1", "--n-hidden 280"])
def test_without_out_the_shipped_network_cannot_be_replaced_by_a_trial(refused, flag):
    refused(train.main, flag.split(), flag.split()[0], "--out")


def test_messages_show_what_they_quote_escaped(folder, trained, refused):
    """N10's kind: a path, a name, a list's row that would move the cursor."""
    wild, shown = "a\nb\x1b[31m\u202e", "a\\nb\\x1b[31m\\u202e"
    refused(train.main, command(folder, "--data", folder / wild), shown)
    refused(train.main, ["--data", folder / "names.txt", "--out", folder / wild], shown)
    refused(
        train.main, command(folder, "--init-from", folder / wild)[:4] + ["--init-from", wild], shown
    )
    refused(sampling.main, ["--model", folder / wild], shown)
    model = "--model", trained / "own.pth"
    refused(sampling.main, [*model, "--start", wild])
    refused(sampling.main, [*model, "--match", f"({wild}"])
    (folder / wild).write_bytes(b"ada\xff")
    refused(sampling.main, [*model, "--new", "--data", folder / wild], shown)
    (folder / "table").write_text("\x1b[31mada,1\n\x1b[31mbea,2\n")
    refused(train.main, command(folder, "--data", folder / "table"))


def test_the_shipped_files_can_be_trained_anew():
    """N5: its picture bears the mark; and nothing of the machine is in the network."""
    assert train.SOFTWARE.encode() in (ROOT / "model_state.png").read_bytes()[:4096]
    assert str(ROOT).encode() not in (ROOT / "model_state.pth").read_bytes()
