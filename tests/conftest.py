"""Settings and fixtures of all tests: what is refused, and folders with lists and networks."""

import os
import shutil
import signal

import matplotlib.figure  # noqa: F401  not in each fork anew
import pytest
import torch
from helpers import LEFT, SIZES, at, fill, forked, signals, training
from hypothesis import settings

import sampling
import train

# A shell that starts the tests in its background may have them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
sampling.PAUSE = 10**9  # no test depends on how long a thing takes
os.environ["OMP_NUM_THREADS"] = "1"  # of processes, too: on a busy machine threads only wait
torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def float32():
    """A test may compute in float64: torch.set_default_dtype() lasts until its end."""
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def refused(capsys):
    """refused(main, args, *words): status 2, and one line on stderr that holds the words."""

    def check(main, args, *words):
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (exit.value.code, out, len(err.splitlines())) == (2, "", 1), err
        assert all(word in err for word in words), err

    return check


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a short list of names and a network that was trained on it for 40 steps."""
    folder = tmp_path_factory.mktemp("tiny")
    names = "ada bea cleo dora edda finn gus hal ida jo kai lea".split()
    (folder / "names.txt").write_text("\n".join(names))
    files = "--data", folder / "names.txt", "--out", folder / "model.pth"
    process = forked(train.main, *files, *SIZES, "--steps", 40)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder with a list and an older network."""
    return fill(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a list and the files of a training that nothing interrupted."""
    folder = fill(tmp_path_factory.mktemp("trained"))
    process = training(folder)
    assert process.returncode == 0, process.stderr
    assert sorted(os.listdir(folder)) == LEFT
    return folder


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """A folder with a list, an older network and a training stopped at its 75th step."""
    folder = fill(tmp_path_factory.mktemp("stopped"))
    process = training(folder, before=at("train.train_step", 75, signals(signal.SIGTERM)))
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    return folder


@pytest.fixture
def interrupted(stopped, tmp_path):
    """Such a folder of this test's own."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    state = torch.load(tmp_path / "own.pth.unfinished", weights_only=True)
    state["args"]["data"] = str(tmp_path / "names.txt")
    torch.save(state, tmp_path / "own.pth.unfinished")
    return tmp_path
