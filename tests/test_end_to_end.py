"""Both scripts as a user runs them, and every error of train.py."""

import os

import pytest
import torch
from conftest import ROOT, forked, run

from model import load
from train import main

SMALL = "--steps 20 --batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8".split()


def test_train_then_sample(tmp_path):
    (tmp_path / "list.txt").write_text("ada\nbea\nzoë\n" * 10, encoding="utf-8")
    process = run("train.py", "--data", "list.txt", "--out", "own.pth", *SMALL, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    header, losses, kept, *names, written = process.stdout.splitlines()
    assert "step " in kept
    assert header.split() == ["train", "val", "test"]  # every name is in train
    values = losses.split()[:3]
    assert all(0 < float(value) < 4 for value in values)
    assert len(names) == 10
    assert "own.pth" in written and "own.png" in written
    assert "30 rows, 7 characters" in process.stderr
    assert (
        "--dropout 0.4, which suits 96 training windows" in process.stderr
        and "--steps" not in process.stderr
    )
    assert sorted(os.listdir(tmp_path)) == ["list.txt", "own.png", "own.pth"]
    assert (tmp_path / "own.png").read_bytes().startswith(b"\x89PNG")
    made = torch.load(tmp_path / "own.pth", weights_only=True)["made"]
    assert (made["steps"], made["seed"], made["torch"]) == (20, 1, torch.__version__)
    assert f"{made['losses']['val']:.4f}" == values[1]

    process = run(
        "sampling.py",
        "--model",
        "own.pth",
        "--start",
        "zo",
        "-n",
        3,
        cwd=tmp_path,
        encoding="utf-8",
    )
    assert process.returncode == 0 and process.stderr == ""
    assert all(name.startswith("zo") for name in process.stdout.splitlines())


def test_shipped_model_prints_names():
    process = run("sampling.py", "-n", 3)
    assert (process.returncode, process.stderr, len(process.stdout.splitlines())) == (0, "", 3)


def test_help_names_every_default():
    for script in "train.py", "sampling.py":
        process = run(script, "--help")
        assert process.returncode == 0 and process.stderr == ""


def test_begun_from_a_network(tiny, tmp_path, refused):
    """With its sizes it begins as it: the smallest steps leave it as it is. Others are refused."""
    args = ["--init-from", tiny / "model.pth", "--data", tiny / "names.txt"]
    out = tmp_path / "own.pth"
    process = forked(main, *args, "--out", out, "--steps", 1, "--lr", 1e-6, "--dropout", 0)
    assert process.returncode == 0, process.stderr
    (net, _, made), (old, *_) = load(out), load(tiny / "model.pth")
    assert net.config == old.config and made["steps"] == 1
    for name, parameter in list(net.named_parameters())[:-2]:  # the last two are scaled
        torch.testing.assert_close(parameter, old.get_parameter(name), rtol=0, atol=1e-4)
    # A learning rate that spoils it: what it began as is kept, and nothing is worse than before.
    process = forked(main, *args, "--out", out, "--steps", 50, "--lr", 100)
    assert process.returncode == 0, process.stderr
    assert load(out)[2]["kept"] == 0
    refused(main, [*args, "--out", tmp_path / "other.pth", "--n-hidden", 9], "--n-hidden 9")
    refused(main, ["--init-from", tmp_path / "none.pth", "--out", out], "none.pth is no file")


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["cannot be read"]),
        (b"", ["no names"]),
        (b"\n \n\r\n\t\n", ["no names"]),
        (b"zo\xeb\n", ["UTF-8"]),
        (b"\x00\x01\x02\n", ["control character"]),
        (b"ada\nbea\n", ["2 names are too few"]),
    ],
)
def test_bad_lists(tmp_path, refused, content, words):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    refused(main, ["--data", path, "--out", tmp_path / "own.pth", *SMALL], *words)
    assert not (tmp_path / "own.pth").exists()


@pytest.mark.parametrize(
    "flag, values",
    [
        ("--steps", [0, -1, "x", 1.5]),
        ("--batch-size", [0, 1, -3]),
        ("--block-size", [0, 1, 3, 12, -2, 2**40]),
        ("--n-embd", [0, -1, 10**9]),
        ("--n-hidden", [0, -1, 10**9]),
        ("--lr", [0, -0.1, "nan", "inf", "x"]),
        ("--dropout", [-0.1, 1, "nan"]),
        ("--seed", [-1, 2**64]),
        ("--device", ["tpu", "cuda"]),
    ],
)
def test_flags_out_of_range(tiny, tmp_path, refused, flag, values):
    for value in values:
        if value == "cuda" and torch.cuda.is_available():
            continue
        args = ["--data", tiny / "names.txt", "--out", tmp_path / "own.pth", flag, value]
        refused(main, args, str(value))
    assert os.listdir(tmp_path) == []


def test_output_that_cannot_be_written_is_said_first(tiny, tmp_path, refused):
    (tmp_path / "file").write_text("")
    for out in (
        tmp_path / "none" / "own.pth",
        tmp_path / "file" / "own.pth",
        tmp_path,
        "/proc/own.pth",
    ):
        refused(main, ["--data", tiny / "names.txt", "--out", out, *SMALL], str(out))


def test_nothing_of_this_machine_ships():
    data = (ROOT / "model_state.pth").read_bytes()
    assert str(ROOT).encode() not in data
