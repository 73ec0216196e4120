"""What the tests share: running a script, refusing, a network trained within a second."""

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib.figure  # noqa: F401  not in each fork anew

import sampling
import train

# A shell that starts the tests in its background may have them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
sampling.PAUSE = 10**9  # no test depends on how long a thing takes
os.environ["OMP_NUM_THREADS"] = "1"  # of processes, too: on a busy machine threads only wait
torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")
SMALL = "--steps 40 --batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8".split()


def run(script, *args, **kwargs):
    """Run a script of the project as its own process -> the finished process, with its output."""
    kwargs = dict(capture_output=True, text=True, timeout=600) | kwargs
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], **kwargs)


def forked(main, *args, before=lambda: None):
    """Like run(), in a fork of this process, which need not import torch anew."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
                sys.argv[0] = f"{main.__module__}.py"
                before()
                main(list(map(str, args)))
                status = 0
            except SystemExit as exit:
                status = exit.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(args, status, out.read().decode(), err.read().decode())


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
    process = forked(train.main, *files, *SMALL)
    assert process.returncode == 0, process.stderr
    return folder
