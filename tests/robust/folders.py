"""Folders for the robust tests: with a list, with a trained network, with a stopped training."""

import os
import shutil
import signal

import pytest
import torch
from helpers import LEFT, NAMES, OLD, at, signals, training


def fill(folder):
    (folder / "names.txt").write_text("\n".join(NAMES))
    (folder / "own.pth").write_bytes(OLD)
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
