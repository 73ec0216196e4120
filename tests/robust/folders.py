"""Folders for the robust tests: with a list, with a finished training, with one that was stopped."""

import os
import shutil
import signal

import pytest
import torch
from conftest import forked
from helpers import LEFT, NAMES, at, command, signals

import train


def fill(folder):
    (folder / "names.txt").write_text("\n".join(NAMES))
    (folder / "own.pth").write_bytes(b"an older network")


@pytest.fixture
def folder(tmp_path):
    """A folder with a list and an older network."""
    fill(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a list and the files of a training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "names.txt").write_text("\n".join(NAMES))
    process = forked(train.main, *command(folder))
    assert process.returncode == 0, process.stderr
    assert sorted(os.listdir(folder)) == LEFT
    return folder


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """A folder with a list, an older network and a training stopped at its 75th step."""
    folder = tmp_path_factory.mktemp("stopped")
    fill(folder)
    stop = at("train.train_step", 75, signals(signal.SIGTERM))
    process = forked(train.main, *command(folder), before=stop)
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
