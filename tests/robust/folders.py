"""Folders for the robust tests: with a list, with a finished training, with one that was stopped."""

import os
import shutil

import pytest
from conftest import forked
from helpers import LEFT, NAMES, at, command, signals

import train


@pytest.fixture
def folder(tmp_path):
    """A folder with a list and an older network."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "own.pth").write_bytes(b"an older network")
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


@pytest.fixture
def interrupted(folder):
    """A folder with a list, an older network and a training stopped before its 75th step."""
    process = forked(train.main, *command(folder), before=at("train.train_step", 75, signals(15)))
    assert process.returncode == 128 + 15, process.stderr
    return folder


@pytest.fixture
def own(trained, tmp_path):
    """A folder of this test's own with all that `trained` holds."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path
