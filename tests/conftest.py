import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes; two threads on a busy machine wait for each other
torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")


def run(script, *args, **kwargs):
    """Run a script of the project as its own process -> the finished process, with its output as text."""
    kwargs = dict(capture_output=True, text=True, timeout=120) | kwargs
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], **kwargs)


@pytest.fixture
def refused(capsys):
    """refused(main, args, *words): main ends with status 2 and one line on stderr that holds the words."""

    def check(main, args, *words):
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (exit.value.code, out, len(err.splitlines())) == (2, "", 1), err
        for word in words:
            assert word in err

    return check


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a short list of names and a network that was trained on it for a few steps."""
    folder = tmp_path_factory.mktemp("tiny")
    names = ["ada", "bea", "cleo", "dora", "edda", "finn", "gus", "hal", "ida", "jo", "kai", "lea"]
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    small = "--steps 40 --batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8".split()
    process = run("train.py", "--data", folder / "names.txt", "--out", folder / "model.pth", *small)
    assert process.returncode == 0, process.stderr
    return folder
