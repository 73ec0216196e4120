"""Both commands as shells, pipes, terminals and other programs call them."""

import io
import ntpath
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from helpers import (
    NAMES,
    ROOT,
    SMALL,
    at,
    command,
    failure,
    forked,
    result,
    run,
    signals,
    training,
)

import sampling
import train
from plumbing import cli
from plumbing import page as plumbing_page
from plumbing.report import SOFTWARE


def script(name, *args):
    return [sys.executable, str(ROOT / name), *map(str, args)]


def started(name, *args, **kwargs):
    return subprocess.Popen(script(name, *args), stderr=subprocess.PIPE, text=True, **kwargs)


# What goes where


def test_results_go_to_stdout_and_all_else_to_stderr(folder, trained):
    process = run("train.py", *command(folder))
    assert process.returncode == 0
    heading, header, losses, kept, likeness, *names = process.stdout.splitlines()[:15]
    assert heading == "loss in nats per character" and header.split() == ["train", "val", "test"]
    assert all(float(loss) < 2 for loss in losses.split()) and len(names) == 10
    assert likeness.startswith("of 1,000 names drawn at ") and "% one edit from" in likeness
    assert "names" in process.stderr and "val" in process.stderr
    assert result(folder) == result(trained)  # in a new process as in a fork
    typed = process.stdout.split("next:\n")[1].splitlines()  # the commands to type next
    told = f"written: {folder}/own.html, to be opened in a browser; it holds the list of 240"
    for line, n, said in zip(typed, (20, 20, 0), ("", "", told), strict=True):
        python, script_name, *args = shlex.split(line)
        process = forked(sampling.main, *args)
        assert (python, script_name) == ("python", "sampling.py")
        assert process.stderr.startswith(said) and bool(process.stderr) == bool(said)
        assert len(process.stdout.splitlines()) == n
    shortest, longest = (str(most(map(len, NAMES))) for most in (min, max))
    for line in typed[:2]:
        assert f"--min-length {shortest} --max-length {longest}" in line
    assert (folder / "own.html").stat().st_size > 10_000
    (folder / "own.html").unlink()


def test_a_closed_pipe_ends_quietly(trained):
    args = "--model", trained / "own.pth", "-n", 10**6
    for command_line, ends in (("sampling.py", *args), {141}), (("train.py", "--help"), {0, 141}):
        process = started(*command_line, stdout=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() in ends


def test_nobody_listening_loses_no_work(folder, trained):
    read, end = os.pipe()
    os.close(read)
    process = subprocess.run(script("train.py", *command(folder)), stderr=end, stdout=end)
    assert process.returncode == 141 and result(folder) == result(trained)
    (folder / "own.pth.unfinished").unlink(missing_ok=True)  # nobody has seen its losses
    (folder / "own.pth").unlink()
    shell = ["sh", "-c", '"$@" >&- 2>&- <&-', "sh", *script("train.py", *command(folder))]
    assert subprocess.run(shell).returncode == 0 and result(folder) == result(trained)


def test_a_full_standard_output_is_said_and_the_state_stays(trained, folder):
    """resuming prints the losses again."""
    sample = "sampling.py", "--model", trained / "own.pth"
    for name, *args in sample, ("train.py", *command(folder)):
        with open("/dev/full", "w") as full:
            process = started(name, *args, stdout=full)
            last = process.communicate()[1].splitlines()[-1]
        assert process.returncode == 2
        assert last == f"{name}: error: standard output cannot be used: No space left on device"
    assert (folder / "own.pth.unfinished").exists() and result(folder) == result(trained)


def test_ctrl_c_ends_both_quietly(trained, folder):
    process = started("sampling.py", "--model", trained / "own.pth", "-n", 10**6, stdout=-1)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == 130
    process = training(folder, before=at("plumbing.lists.read_lines", 1, signals(signal.SIGINT)))
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")


# Terminals, folders, paths


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_are_utf8_wherever_stdout_is_no_terminal(tmp_path, encoding):
    """what one command writes the other reads. A terminal gets escapes."""
    folder = tmp_path / "mé mo żż"
    folder.mkdir()
    names = [name.replace("k", "ż").replace("a", "ë") for name in NAMES]
    (folder / "names.txt").write_text("\n".join(names), encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    env |= {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    kwargs = dict(env=env, encoding="utf-8", errors="surrogateescape")
    process = run("train.py", *command(folder), cwd=tmp_path, **kwargs)
    assert process.returncode == 0, process.stderr
    assert "ë" in process.stdout and "mé mo żż" in process.stdout and "\\x" not in process.stdout
    model = "--model", folder / "own.pth"
    process = run("sampling.py", *model, "-n", 90, cwd=folder, **kwargs)
    assert process.returncode == 0 and "of 90 are in names.txt" in process.stderr
    assert "ë" in process.stdout and len(process.stdout.splitlines()) == 90
    process = run("sampling.py", *model, "--score", "-", input=process.stdout, **kwargs)
    assert (process.returncode, process.stderr) == (0, "") and "inf" not in process.stdout
    ours, terminal = os.openpty()
    process = started("sampling.py", *model, "-n", 90, stdout=terminal, env=env)
    os.close(terminal)
    assert "of 90 are in names.txt" in process.communicate()[1]
    assert (b"\\xeb" if encoding == "ascii" else b"\xeb") in os.read(ours, 4096)


def test_started_from_another_folder_it_finds_its_files_and_leaves_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = forked(sampling.main, "--new", "-n", 5)
    assert (process.returncode, process.stderr, len(process.stdout.splitlines())) == (0, "", 5)
    assert os.listdir(tmp_path) == []


def test_windows_with_another_current_drive(monkeypatch):
    """no path of the project is made relative; what is to be typed is quoted as there."""
    with pytest.raises(ValueError):
        ntpath.relpath("C:\\project", "D:\\")
    monkeypatch.setattr(cli.os, "name", "nt")
    typed = cli.command("train.py", "--resume", "--out", "my own.pth")
    assert typed == 'python train.py --resume --out "my own.pth"'


def test_scores_come_from_file_descriptor_0_itself(trained, tmp_path):
    """At an offset, and from a socket."""

    def scored(stdin):
        args = "--model", trained / "own.pth", "--score", "-"
        return forked(sampling.main, *args, before=lambda: os.dup2(stdin.fileno(), 0)).stdout

    (tmp_path / "list").write_text("skipped\nkal\nmin\n")
    with open(tmp_path / "list") as file:
        os.lseek(file.fileno(), len("skipped\n"), os.SEEK_SET)
        rows = scored(file)
    assert [line.split("\t")[-1] for line in rows.splitlines()] == ["kal", "min"]
    ours, theirs = socket.socketpair()
    ours.sendall(b"kal\nmin\n")
    ours.shutdown(socket.SHUT_WR)
    assert scored(theirs) == rows


@pytest.mark.parametrize("main", [train.main, sampling.main])
def test_help_goes_to_stdout_and_fits_a_terminal(main):
    process = forked(main, "--help")
    assert (process.returncode, process.stderr) == (0, "")
    assert max(map(len, process.stdout.splitlines())) <= 100


# What is typed wrong

TRAINING = """--steps 0 -1 x 1.5;--batch-size 0 1 -3 10000000;--block-size 0 1 3 6 -2 65536 2e40;
--n-embd 0 -1 1000000;--n-hidden 0 -1 30000 1000000;--lr 0 -0.1 nan inf x;--dropout -0.1 1 nan;
--truncate -0.1 1.1 nan;--seed -1 18446744073709551616;--threads 0 1000000;--checkpoint-every 0;
--device tpu cpu:x;--column 9 nothing;--nonsense 1"""
SAMPLING = """-n 0 -1 x 1.5;--max-length 0 1001;--min-length 0 2000;--match ( a{99999999999};
--temperature -1 nan inf x;--top-k 0 1.5;--seed -1 4294967296;--threads 0;--start é . k\x1b;
--model none.pth;--score none.txt;--column 1;nonsense 1"""


@pytest.mark.parametrize("words", TRAINING.replace("\n", "").split(";"))
def test_every_flag_of_train_out_of_range_is_one_line(folder, refused, words):
    flag, *values = words.split(" ")
    for value in values:
        refused(train.main, command(folder, flag, value), value)
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]


@pytest.mark.parametrize("words", SAMPLING.replace("\n", "").split(";"))
def test_every_flag_of_sampling_out_of_range_is_one_line(trained, refused, words):
    flag, *values = words.split(" ")
    for value in values:
        refused(sampling.main, ["--model", trained / "own.pth", flag, value])


@pytest.mark.parametrize("flag", ["--steps 9", "--data own.txt", "--lr 0.1", "--n-hidden 280"])
def test_without_out_the_shipped_network_cannot_be_replaced_by_a_trial(refused, flag):
    refused(train.main, flag.split(), flag.split()[0], "--out")


def test_messages_show_what_they_quote_escaped(folder, trained, refused):
    """A path, a name, a list's row that would move the cursor."""
    wild, shown = "a\nb\x1b[31m\u202e", "a\\nb\\x1b[31m\\u202e"
    data = ["--data", folder / "names.txt"]
    refused(train.main, command(folder, "--data", folder / wild), shown)
    refused(train.main, [*data, "--out", folder / wild], shown)
    refused(train.main, [*data, "--out", folder / "own.pth", "--init-from", folder / wild], shown)
    refused(sampling.main, ["--model", folder / wild], shown)
    for flag in "--start", "--match":
        refused(sampling.main, ["--model", trained / "own.pth", flag, f"({wild}"])
    (folder / wild).write_bytes(b"ada\xff")
    refused(sampling.main, ["--new", "--data", folder / wild], shown)
    (folder / "table").write_text("\x1b[31mada,1\n\x1b[31mbea,2\n")
    refused(train.main, command(folder, "--data", folder / "table"))


def test_the_shipped_picture_bears_the_mark_by_which_it_may_be_replaced():
    """without it train.py could not be run again."""
    assert SOFTWARE.encode() in (ROOT / "model_state.png").read_bytes()[:4096]


def test_nothing_of_this_machine_is_in_the_shipped_network():
    assert str(ROOT).encode() not in (ROOT / "model_state.pth").read_bytes()


@pytest.mark.parametrize("flag", ["--out", "--data", "--init-from", "--column"])
def test_an_empty_value_is_refused(folder, refused, flag):
    """As from --out "$UNSET", which must not replace the shipped network."""
    shipped = (ROOT / "model_state.pth").read_bytes()
    refused(train.main, [flag, "", "--steps", 3], flag, "empty")
    assert (ROOT / "model_state.pth").read_bytes() == shipped


def test_a_page_replaces_only_pages(trained, tmp_path, refused):
    """Not what it reads, not the template, no network, state or list; a page again and again."""
    own, page, template = tmp_path / "own.pth", tmp_path / "page.html", tmp_path / "template.html"
    shutil.copy(trained / "own.pth", own)
    shutil.copy(trained / "own.pth", tmp_path / "other.pth")
    shutil.copy(trained / "names.txt", tmp_path / "list.txt")
    shutil.copy(ROOT / "plumbing/page.html", template)
    (tmp_path / "empty.html").touch()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in before:
        refused(sampling.main, ["--model", own, "--page", path], path.name)
    os.mkfifo(page)
    refused(sampling.main, ["--model", own, "--page", page], "page.html")
    assert {path: path.read_bytes() for path in before} == before and page.is_fifo()
    page.unlink()
    for _ in range(2):  # equal pages are equal bytes
        sampling.main(
            [
                "--model",
                str(own),
                "--page",
                str(page),
                "--new",
                "--data",
                str(tmp_path / "list.txt"),
            ]
        )
        before[page] = before.get(page, page.read_bytes())
    assert page.read_bytes() == before[page]


def test_a_template_without_its_place_is_an_error(trained, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(plumbing_page, "TEMPLATE", str(trained / "names.txt"))
    page = tmp_path / "page.html"
    refused(sampling.main, ["--model", trained / "own.pth", "--page", page], "no place")
    assert not page.exists()


def test_pages_that_are_written_at_once_are_all_written(trained, tmp_path):
    args = "--model", trained / "own.pth", "--page", tmp_path / "page.html"
    pids = []
    for _ in range(8):
        if not (pid := os.fork()):
            os._exit(any(forked(sampling.main, *args).returncode for _ in range(5)))
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8
    assert os.listdir(tmp_path) == ["page.html"]


def test_what_is_printed_to_be_typed_works_as_it_stands(folder, monkeypatch):
    """For paths that look like flags, that are no UTF-8, that hold a quote or a line's end."""
    monkeypatch.chdir(folder)
    for name in ["-x", os.fsdecode(b"caf\xe9"), "it's", "a\nb $HOME"]:
        os.rename("names.txt", f"{name}.txt")
        flags = f"--data=./{name}.txt", f"--out={name}.pth", "--steps", "40"
        process = run("train.py", *SMALL, *flags, cwd=folder)
        assert process.returncode == 0, process.stderr
        typed = process.stdout.splitlines()[-3].replace("python sampling.py", '"$0" "$1"')
        shell = ["bash", "-c", typed, sys.executable, str(ROOT / "sampling.py")]
        process = subprocess.run(shell, cwd=folder, capture_output=True, text=True)
        assert (process.stderr, len(process.stdout.splitlines())) == ("", 20), typed
        assert os.path.exists(f"{name}.png")
        os.rename(f"{name}.txt", "names.txt")


# A guest in somebody's session


def test_a_notebook_keeps_its_output(monkeypatch, capsys):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        sampling.main(["--new", "--data", "none.txt"])
    assert sys.stdout is stream
    sampling.main(["-n", "2"])
    assert len(stream.getvalue().split()) == 2


def session():
    """What a call must leave as it was."""
    out = sys.stdout, sys.stderr, sys.stdout.encoding, sys.stdout.errors
    handlers = [signal.getsignal(signum) for signum in sorted(cli.STOP_SIGNALS)]
    return *out, list(warnings.filters), torch.get_num_threads(), handlers, sys.excepthook


CALLS = [  # what is called, where it is interrupted by an error, and its status
    (sampling.main, "-n 3", None, None),
    (sampling.main, "-n 3 --threads 2", None, None),
    (sampling.main, "--new --data none.txt", None, 2),
    (sampling.main, "-n 3", KeyboardInterrupt(), 130),
    (sampling.main, "-n 3", BrokenPipeError(), 141),
    (sampling.main, "-n 3", OSError(28, "No space left on device"), 2),
    (sampling.main, "-n 3", KeyError("a fault"), KeyError),
    (train.main, "", None, None),
    (train.main, "--threads 2 --lr 1000", None, 2),
]


@pytest.mark.parametrize("main, flags, error, status", CALLS, ids=range(len(CALLS)))
def test_a_call_leaves_the_session_as_it_was(folder, trained, main, flags, error, status):
    """And what is printed after it is seen."""
    args = command(folder) if main is train.main else ["--model", str(trained / "own.pth")]

    def check(argv):
        before, seen = session(), None
        try:
            if error:
                at("sampling.generate", 1, failure(error))()
            main([*args, *flags.split()])
        except (SystemExit, KeyError) as end:
            seen = end.code if type(end) is SystemExit else type(end)
        finally:
            sys.setprofile(None)
        assert session() == before and seen == status, seen
        print("and on it goes")

    process = forked(check)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("and on it goes\n")


def test_a_training_in_a_thread_trains(folder, trained):
    def check(argv):
        thread = threading.Thread(target=train.main, args=(command(folder),))
        thread.start()
        thread.join()

    process = forked(check)
    assert process.returncode == 0, process.stderr
    assert result(folder) == result(trained)


@pytest.mark.parametrize("script", ["train.py", "sampling.py"])
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(script, tmp_path):
    """A torch that waits for it."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = run(script, env=env)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")
