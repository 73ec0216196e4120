"""torchrun: several processes train one network, and each of them is heard."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from helpers import (
    LEFT,
    NAMES,
    OLD,
    ROOT,
    at,
    command,
    failure,
    forked,
    resume,
    signals,
    state_of,
)
from torch.nn import functional as F

import model
import train
from model import WaveNet, load
from plumbing.fast import distinct_rows
from plumbing.processes import process_group, rank, world_size


def in_processes(n, main, *args, before=lambda nth: lambda: None):
    """main in n forks, in torchrun's environment -> of each its status, stdout and stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = dict(WORLD_SIZE=n, MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_RUN_ID=1)
    pids, pipes = [], [os.pipe() for _ in range(n)]
    for nth in range(n):
        if pid := os.fork():
            pids.append(pid)
            continue
        env = world | {"RANK": nth, "LOCAL_RANK": nth}
        os.environ.update({name: str(value) for name, value in env.items()})
        process = forked(main, *args, before=before(nth))
        with open(pipes[nth][1], "w") as file:
            json.dump([process.returncode, process.stdout, process.stderr], file)
        os._exit(0)
    results = []
    for pid, (read, write) in zip(pids, pipes):
        os.close(write)
        with open(read) as file:
            results.append(json.load(file))
        os.waitpid(pid, 0)
    return results


def only(nth, hook):
    """A `before` for in_processes(): the hook in one of them."""
    return lambda this: hook if this == nth else lambda: None


def one_step(argv):
    """Rank r steps with its half of the windows; the step is that of the mean of the gradients."""
    torch.manual_seed(5)
    net = WaveNet(12, 4, 4, 8)
    contexts, targets = torch.randint(12, (1, 32, 4)), torch.randint(12, (32,))
    parameters = list(net.parameters())
    gradients = []
    for half in 0, 1:
        loss = F.cross_entropy(net.train()(contexts[0, half::2]), targets[half::2])
        gradients.append(torch.autograd.grad(loss, parameters))
    expected = [p - 0.5 * (a + b) / 2 for p, a, b in zip(parameters, *gradients)]
    with process_group("cpu"), torch.no_grad():
        share = slice(rank(), None, world_size())
        (rows,) = distinct_rows(net, contexts[:, share])
        train.train_step(net, rows, targets[share], 0.5, parameters)
        assert world_size() == 2
    torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)


def test_a_step_of_two_processes_is_that_of_the_mean_of_their_gradients():
    assert in_processes(2, one_step) == [[0, "", ""]] * 2


def shares(argv):
    """The targets that this process draws for the first two steps."""
    args = train.build_parser().parse_args("--batch-size 12 --steps 2 --truncate 0".split())
    vocab = model.Vocabulary(NAMES)
    with process_group("cpu"):
        net, tokens = WaveNet(len(vocab), 4, 4, 8), model.windows(NAMES, vocab, 4)
        drawn = train.minibatches(net, tokens, 0, args)
        print(json.dumps([targets.tolist() for _, targets in drawn]))


def test_the_processes_share_the_windows_of_one():
    whole = json.loads(forked(shares).stdout)
    parts = [json.loads(stdout) for _, stdout, _ in in_processes(3, shares)]
    assert all(len(part[step]) == 4 for part in parts for step in (0, 1))
    for step in 0, 1:
        assert sorted(sum((part[step] for part in parts), [])) == sorted(whole[step])


@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_train_one_network_and_the_first_speaks(folder, n):
    args = command(folder, "--batch-size", 24)
    (status, stdout, stderr), *others = in_processes(n, train.main, *args)
    assert status == 0, stderr
    assert others == [[0, "", ""]] * (n - 1)
    assert stdout.count("nats per character") == 1 and "240 names" in stderr
    losses = load(folder / "own.pth")[2]["losses"]
    assert losses["val"] < 1.7  # counting characters has 2.3
    assert sorted(os.listdir(folder)) == LEFT


def test_an_error_in_the_second_process_is_seen(folder):
    """One that a user can mend as a line, any other with its traceback."""
    for error, words in (ValueError("too few"), "error: too few"), (KeyError("x"), "KeyError: 'x'"):
        hook = at("train.train_step", 5, failure(error))
        first, second = in_processes(2, train.main, *command(folder), before=only(1, hook))
        assert second[0] != 0 and words in second[2]
        assert first[0] == 2 and "process 0" in first[2].splitlines()[-1], first[2]
        assert (folder / "own.pth").read_bytes() == OLD
        (folder / "own.pth.unfinished").unlink(missing_ok=True)


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_one_can_go_on(folder, killed):
    hook = at("train.train_step", 40, signals(signal.SIGKILL))
    both = in_processes(2, train.main, *command(folder), before=only(killed, hook))
    status, stdout, stderr = both[1 - killed]
    assert both[killed][0] == -signal.SIGKILL
    assert (status, stdout) == (2, "") and "--resume" in stderr.splitlines()[-1], stderr
    assert "Traceback" not in stderr
    assert state_of(folder)["step"] == 35
    assert resume(folder).returncode == 0
    load(folder / "own.pth")


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_any_process_stops_all_and_one_can_go_on(folder, signalled):
    hook = at("train.train_step", 30, signals(signal.SIGTERM))
    both = in_processes(2, train.main, *command(folder), before=only(signalled, hook))
    (status, _, stderr), other = both
    assert status == other[0] == 128 + signal.SIGTERM and other[1:] == ["", ""]
    assert "--resume" in stderr.splitlines()[-1]
    assert state_of(folder)["step"] == 30
    assert resume(folder).returncode == 0
    assert sorted(os.listdir(folder)) == LEFT


@pytest.mark.parametrize("flag", ["--lr", "--seed", "--n-hidden", "--data"])
def test_other_lists_or_flags_are_refused_in_one_line(folder, flag):
    (folder / "5").write_text("\n".join(NAMES[1:]))

    def main(argv):
        if os.environ["RANK"] == "1":
            argv += [flag, str(folder / "5") if flag == "--data" else "5"]
        train.main(argv)

    main.__module__ = "train"
    (status, stdout, stderr), other = in_processes(2, main, *command(folder))
    assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert "different lists or flags" in stderr
    assert other == [2, "", ""]
    assert sorted(os.listdir(folder)) == ["5", "names.txt", "own.pth"]


@pytest.mark.parametrize("n, size", [(2, 9), (3, 3), (3, 8), (2, 2)])
def test_a_batch_that_cannot_be_shared_is_refused_in_one_line(folder, n, size):
    args = command(folder, "--batch-size", size)
    (status, stdout, stderr), *_ = in_processes(n, train.main, *args)
    assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert f"--batch-size {size}" in stderr
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]


def test_a_list_that_the_first_cannot_read_ends_both(folder):
    first, second = in_processes(2, train.main, *command(folder, "--data", folder / "none"))
    assert first[0] == 2 and "none" in first[2] and "Traceback" not in first[2] + second[2]
    assert second[0] == 2


def test_torchrun_itself(folder):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [sys.executable, *words, str(ROOT / "train.py"), *command(folder)]
    process = subprocess.run(args, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("nats per character") == 1
    assert process.stderr.count("240 names") == 1
    load(folder / "own.pth")
