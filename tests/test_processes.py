"""Several processes do what one does: every loss, the weights; and when one of them ends."""

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, forked

import model
import train
from model import load, read_names

SIZES = "--batch-size 24 --block-size 8 --n-embd 6 --n-hidden 20 --dropout 0.2".split()
SMALL = [*SIZES, "--steps", "200"]
SHORT = [*SIZES, "--steps", "50", "--checkpoint-every", "20"]


def in_processes(n, *args, before=lambda rank: None):
    """train.main in n forks, in torchrun's environment -> the finished processes, by rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = [None] * n
    readers = []
    for rank in range(n):
        read, write = os.pipe()
        if os.fork() == 0:
            env = dict(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=n,
                MASTER_ADDR="localhost",
                MASTER_PORT=port,
                TORCHELASTIC_RUN_ID=1,
            )
            os.environ.update({key: str(value) for key, value in env.items()})
            process = forked(train.main, *args, before=partial(before, rank))
            with open(write, "w") as file:
                file.write(repr((process.returncode, process.stdout, process.stderr)))
            os._exit(0)
        os.close(write)
        readers.append(read)
    for rank, read in enumerate(readers):
        with open(read) as file:
            returncode, stdout, stderr = eval(file.read())
        results[rank] = SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)
    for _ in range(n):
        os.wait()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "names.txt").write_text("\n".join(read_names(ROOT / "names.txt")[:300]))
    return folder


def losses_of(path):
    """A `before` that notes the loss of every step in the file."""

    def before(rank):
        original = train.sgd_step

        def noting(*args):
            loss = original(*args)
            if rank == 0:
                with open(path, "a") as file:
                    print(loss, file=file)
            return loss

        train.sgd_step = noting

    return before


@pytest.fixture(scope="module")
def alone(folder):
    """One process: its losses and its network."""
    args = "--data", folder / "names.txt", "--out", folder / "alone.pth", *SMALL
    process = forked(train.main, *args, before=lambda: losses_of(folder / "alone.txt")(0))
    assert process.returncode == 0, process.stderr
    return list(map(float, (folder / "alone.txt").read_text().split())), load(folder / "alone.pth")


@pytest.fixture(scope="module")
def short(folder):
    """One process with fewer steps: its network."""
    args = "--data", folder / "names.txt", "--out", folder / "short.pth", *SHORT
    assert forked(train.main, *args).returncode == 0
    return load(folder / "short.pth")[0]


def close(net, other):
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_do_what_one_does(folder, alone, n):
    args = "--data", folder / "names.txt", "--out", folder / f"{n}.pth", *SMALL
    first, *others = in_processes(n, *args, before=losses_of(folder / f"{n}.txt"))
    assert first.returncode == 0, first.stderr
    assert all((other.returncode, other.stdout, other.stderr) == (0, "", "") for other in others)
    losses, (net, vocab, made) = alone
    torch.testing.assert_close(
        list(map(float, (folder / f"{n}.txt").read_text().split())), losses, rtol=0, atol=1e-3
    )
    again = load(folder / f"{n}.pth")
    close(again[0], net)
    assert again[2]["losses"] == pytest.approx(made["losses"], abs=2e-3)
    assert {name for name in os.listdir(folder) if name.startswith(f"{n}.")} == {
        f"{n}.png",
        f"{n}.pth",
        f"{n}.txt",
    }


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_state_goes_on_with_another_number_of_processes(folder, short, before, after):
    def stop(rank):
        calls, original = iter(range(100)), train.sgd_step

        def stopping(*args):
            if next(calls) == 29 and rank == before - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        train.sgd_step = stopping

    def start(n, *args, **kwargs):
        return (
            in_processes(n, *args, **kwargs)
            if n > 1
            else [forked(train.main, *args, before=lambda: kwargs.get("before", id)(0))]
        )

    out = folder / f"from{before}to{after}.pth"
    first, *_ = start(before, "--data", folder / "names.txt", "--out", out, *SHORT, before=stop)
    assert first.returncode == 128 + signal.SIGTERM and "--resume" in first.stderr
    assert torch.load(f"{out}.unfinished", weights_only=True)["step"] == 30
    first, *_ = start(after, "--out", out, "--resume")
    assert first.returncode == 0, first.stderr
    close(load(out)[0], short)


@pytest.mark.parametrize(
    "where, nth, killed, step",
    [
        ("sgd_step", 5, 1, 0),
        ("sgd_step", 30, 0, 20),
        ("recompute_statistics", 3, 1, 20),
        ("learning_rate", 30, 1, 20),
    ],
)
def test_when_one_is_killed_the_others_say_so_and_can_go_on(
    folder, short, where, nth, killed, step
):
    def kill(rank):
        calls, original = iter(range(1, 1000)), getattr(train, where)

        def dying(*args, **kwargs):
            if next(calls) == nth and rank == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(train, where, dying)

    out = folder / f"killed-{where}-{killed}.pth"
    processes = in_processes(3, "--data", folder / "names.txt", "--out", out, *SHORT, before=kill)
    assert processes.pop(killed).returncode == -signal.SIGKILL
    for process in processes:
        assert (
            process.returncode == 2
            and "another process of this training has ended" in process.stderr
        ), process.stderr
        assert "Traceback" not in process.stderr
    assert torch.load(f"{out}.unfinished", weights_only=True)["step"] == step
    assert forked(train.main, "--out", out, "--resume").returncode == 0
    close(load(out)[0], short)


def test_all_begin_with_the_weights_of_the_first(folder, short):
    """Whatever another machine has drawn, or read from its own --init-from."""

    def other_weights(rank):
        def drawn(*sizes, original=train.WaveNet, **more):
            net = original(*sizes, **more)
            for parameter in net.parameters():
                parameter.data += rank
            return net

        train.WaveNet = drawn

    out = folder / "begun.pth"
    args = "--data", folder / "names.txt", "--out", out, *SHORT
    assert [p.returncode for p in in_processes(2, *args, before=other_weights)] == [0, 0]
    close(load(out)[0], short)


def test_processes_that_see_different_things_are_refused(folder):
    def other_list(rank):
        if rank:
            model.read_names = lambda path: read_names(path)[1:]

    args = ["--data", folder / "names.txt", "--out", folder / "refused.pth", *SHORT]
    first, _ = in_processes(2, *args, before=other_list)
    assert (first.returncode, first.stdout) == (2, "") and "different names" in first.stderr
    first, _ = in_processes(2, *args, "--batch-size", 2, before=lambda rank: None)
    assert first.returncode == 0
    first, *_ = in_processes(3, *args, "--batch-size", 2)
    assert first.returncode == 2 and "--batch-size 2" in first.stderr.splitlines()[-1]


def test_torchrun(folder):
    out = folder / "torchrun.pth"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "train.py"),
    ]
    args = ["--data", str(folder / "names.txt"), "--out", str(out), *SHORT]
    process = subprocess.run(command + args, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("nats a character") == 1 and process.stderr.count("rows") == 1
    load(out)
