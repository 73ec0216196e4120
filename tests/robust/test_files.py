"""Whatever stands in a file of weights: it is refused in one line, and none of its code runs."""

import io
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from conftest import forked
from helpers import command, resume
from hypothesis import given
from hypothesis import strategies as st

import sampling
import train
from model import CHECKPOINT, load, read_checkpoint, write_checkpoint

pytest_plugins = "folders"


class Code:
    """A pickle that leaves a file behind where it is loaded."""

    def __reduce__(self):
        return open, ("ran", "w")


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rezip(path, content, **kwargs):
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def refuses(path, words=""):
    """load() raises one line that names the file, and sampling.py prints it with status 2."""
    with pytest.raises(ValueError, match=words) as error:
        load(path)
    assert str(path) in str(error.value) and str(error.value).isprintable()


@pytest.fixture
def own(trained, tmp_path, monkeypatch):
    """A copy of a trained network, in a folder which is the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "own.pth", tmp_path)
    return tmp_path / "own.pth"


def contents(content):
    """All of it as bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# Damage


def test_a_flipped_bit_is_refused_or_changes_nothing(own):
    good, (net, vocab, metadata) = bytearray(own.read_bytes()), load(own)
    bits, refusals = random.Random(1), 0
    for _ in range(400):
        place, flip = bits.randrange(len(good)), 1 << bits.randrange(8)
        good[place] ^= flip
        own.write_bytes(good)
        good[place] ^= flip
        try:
            loaded, its_vocab, its_metadata = load(own)
        except ValueError as error:
            assert str(error).startswith(f"{own} ")
            refusals += 1
        else:
            assert (its_vocab.chars, its_metadata) == (vocab.chars, metadata)
            assert contents(loaded.state_dict()) == contents(net.state_dict())
    assert refusals > 250  # the rest lies between the entries, or in dates


def test_a_flipped_bit_of_a_state_is_refused_or_changes_nothing(interrupted):
    path = interrupted / "own.pth.unfinished"
    good = bytearray(path.read_bytes())
    saved = contents(read_checkpoint(path, train.STATE, ""))
    bits = random.Random(2)
    for _ in range(400):
        place, flip = bits.randrange(len(good)), 1 << bits.randrange(8)
        good[place] ^= flip
        path.write_bytes(good)
        good[place] ^= flip
        try:
            assert contents(read_checkpoint(path, train.STATE, "")) == saved
        except ValueError as error:
            assert str(error).startswith(f"{path} ")


def test_a_file_cut_anywhere_is_refused(own):
    good = own.read_bytes()
    for length in [0, 1, 4, 22, 64, *range(100, len(good), 211), len(good) - 22, len(good) - 1]:
        own.write_bytes(good[:length])
        refuses(own, "is damaged")


@given(st.binary(max_size=400) | st.binary(max_size=200).map(lambda data: b"PK\3\4" + data))
def test_any_bytes_are_no_network(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    path.write_bytes(data)
    refuses(path, "is damaged")


def test_zip_junk_is_refused_in_one_line(own):
    """N11: archives whose records no longer fit together, whatever zipfile raises for them."""
    good = own.read_bytes()
    start = good.rindex(b"PK\1\2")  # of the last entry in the directory
    for offset in range(4, 46, 2):
        for value in b"\xff\xff", b"\x7f\x00":
            own.write_bytes(good[: start + offset] + value + good[start + offset + 2 :])
            try:
                load(own)
            except ValueError as error:
                assert str(own) in str(error)
    for junk in b"PK\5\6" + bytes(18), b"PK\5\6" + b"\xff" * 18, good + good, b"PK\3\4" * 99:
        own.write_bytes(junk)
        try:
            load(own)
        except ValueError as error:
            assert str(own) in str(error)


# Forged


def test_code_in_a_pickle_never_runs(own):
    content = entries(own)
    for name in list(content):
        if name.endswith("data.pkl"):
            rezip(own, content | {name: pickle.dumps(Code(), 2)})
            refuses(own, "is damaged")
            whole = {"config": {}, "vocab": Code(), "layers": [], "metadata": {}, "state_dict": {}}
            rezip(own, content | {name: pickle.dumps(whole, 2)})
            refuses(own, "is damaged")
    legacy = io.BytesIO()
    torch.save(Code(), legacy, _use_new_zipfile_serialization=False)
    own.write_bytes(legacy.getvalue())
    refuses(own, "is damaged")
    own.write_bytes(pickle.dumps(Code()))
    refuses(own, "is damaged")
    own.write_bytes(legacy.getvalue() + own.read_bytes())  # the older format in front of a zip
    refuses(own, "is damaged")
    assert os.listdir() == ["own.pth"]  # no file "ran"


def test_torchs_older_format_is_refused(own):
    torch.save(torch.load(own, weights_only=True), own, _use_new_zipfile_serialization=False)
    refuses(own, "is damaged")


def test_what_is_larger_in_memory_than_in_the_file_is_refused(own):
    """N9: a deflated entry, a tensor that repeats one number, sizes that no file has."""
    content = torch.load(own, weights_only=True)
    rezip(own, entries(own), compression=zipfile.ZIP_DEFLATED)
    refuses(own, "is damaged")
    for tensor in torch.zeros(1).expand(10**9), torch.zeros(1).expand(2, 1, 3), torch.ones(9)[::2]:
        write_checkpoint(own, content | {"state_dict": {"0.weight": tensor}})
        refuses(own, "is damaged")
    write_checkpoint(own, content | {"state_dict": {str(i): tensor[:1] for i in range(9**4)}})
    refuses(own, "is damaged|holds something else")


def test_a_storage_that_claims_more_than_its_bytes_is_refused(own):
    """Its pickle says 2^20 or 2^40 numbers, its entry holds 300."""
    buffer = io.BytesIO()
    torch.save({"config": torch.zeros(300)}, buffer)
    content = entries(buffer)
    (name,) = (name for name in content if name.endswith("data.pkl"))
    said = b"M" + struct.pack("<H", 300)
    for claimed in b"J" + struct.pack("<i", 2**20), b"\x8a\x06" + (2**40).to_bytes(6, "little"):
        assert content[name].count(said) == 2
        rezip(own, content | {name: content[name].replace(said, claimed)})
        refuses(own, "is damaged")
    with zipfile.ZipFile(own, "a") as archive:  # the directory says that an entry is of 3 GB
        archive.infolist()[0].file_size = archive.infolist()[0].compress_size = 3 * 2**30
        archive.writestr("x", "")
    refuses(own, "is damaged")


def changed(content, path, value):
    """The nested dict with another value at the path; None takes it out."""
    first, *rest = path
    copy = type(content)(content)
    if rest:
        copy[first] = changed(copy[first], rest, value)
    elif value is None:
        del copy[first]
    else:
        copy[first] = value
    return copy


WRONG = [([key], value) for key in CHECKPOINT for value in (None, 7, "x", [1], {"a": 1}, True)]
WRONG += [
    (["config", key], value)
    for key in ("vocab_size", "block_size", "n_embd", "n_hidden")
    for value in (None, 0, -1, 3, 2**62, 4.5, "8", [8])
]
WRONG.remove((["metadata"], {"a": 1}))  # that is one
WRONG += [(["config", "dropout"], "x"), (["config", "colour"], 1), (["config"], OrderedDict())]
WRONG += [
    (["state_dict", "0.weight"], value)
    for value in (
        None,
        7,
        "x",
        [1.0],
        torch.zeros(2),
        torch.zeros(3, 4, 5),
        torch.eye(3).to_sparse(),
    )
]
WRONG += [(["state_dict", "more"], torch.zeros(4)), (["layers"], ["Embedding"]), (["more"], 1)]


@pytest.mark.parametrize("path, value", WRONG)
def test_missing_keys_wrong_types_and_wrong_shapes_are_refused(own, path, value):
    """N11: in one line each."""
    write_checkpoint(own, changed(torch.load(own, weights_only=True), path, value))
    refuses(own, "holds something else|is damaged|other layers")


@pytest.mark.parametrize("content", [None, 7, [], "names", {}, {"config": 1}, torch.zeros(3)])
def test_what_is_no_network_at_all_is_refused(own, content):
    torch.save(content, own)
    refuses(own, "is damaged|holds something else")


@pytest.mark.parametrize(
    "change",
    [lambda chars: chars[0] + "\x1b" + chars[2:], lambda chars: chars[0] + "\x9b" + chars[2:]]
    + [lambda chars: chars[0] + chars[:0:-1], lambda chars: chars[:-1], lambda chars: chars + "é"]
    + [lambda chars: chars[1:], lambda chars: chars[0] + chars[1] * 2 + chars[3:], list]
    + [lambda chars: "\x1b" + chars[1:], lambda chars: chars.encode(), lambda chars: ""],
)
def test_a_forged_vocabulary_is_refused(own, change):
    """N10: control characters, which would reach the terminal; a wrong order; a wrong length."""
    content = torch.load(own, weights_only=True)
    write_checkpoint(own, content | {"vocab": change(content["vocab"])})
    refuses(own, "holds something else")


def test_weights_that_are_no_numbers_are_said(own, refused):
    content = torch.load(own, weights_only=True)
    for value in float("nan"), float("inf"):
        content["state_dict"]["0.weight"][:] = value
        write_checkpoint(own, content)
        refused(sampling.main, ["--model", own], "weights")


def test_files_of_the_earlier_version_are_called_that(own, refused):
    content = torch.load(own, weights_only=True)
    made = {key: content[key] for key in ("config", "vocab", "state_dict")} | {"made": {"steps": 9}}
    torch.save(made, own)
    refuses(own, "was written by an earlier version")
    refused(sampling.main, ["--model", own], "was written by an earlier version")
    write_checkpoint("own.pth.unfinished", {"step": 3, "origin": [], "state_dict": {}, "flags": {}})
    refused(train.main, ["--resume", "--out", own], "an earlier version")


def test_a_network_of_other_layers_is_called_that(own, refused):
    content = torch.load(own, weights_only=True)
    layers = ["ReLU" if name == "Tanh" else name for name in content["layers"]]
    write_checkpoint(own, content | {"layers": layers})
    refused(sampling.main, ["--model", own], "other layers")


# States


@pytest.mark.parametrize(
    "path, value",
    [([key], None) for key in train.STATE]
    + [
        (["args"], 7),
        (["args"], {}),
        (["args", "steps"], "x"),
        (["args", "batch_size"], None),
        (["args", "lr"], [1]),
        (["args", "block_size"], 2**40),
        (["args", "data"], 5),
        (["step"], 10**6),
        (["step"], -5),
        (["step"], "x"),
        (["averaged"], "x"),
        (["best"], {}),
        (["best", "loss"], "x"),
        (["curves"], []),
        (["curves", "val"], 3),
        (["pretrained"], 5),
        (["state_dict"], {}),
        (["average"], {"0.weight": torch.zeros(1)}),
        (["loss_sum"], "x"),
        (["layers"], 5),
        (["names"], 5),
    ],
)
def test_a_forged_state_is_refused_in_one_line(interrupted, path, value):
    """N11."""
    state = interrupted / "own.pth.unfinished"
    write_checkpoint(state, changed(torch.load(state, weights_only=True), path, value))
    process = resume(interrupted)
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    assert "Traceback" not in process.stderr
    assert (interrupted / "own.pth").read_bytes() == b"an older network"


def test_args_of_none_in_a_state_are_refused(interrupted):
    """N11."""
    state = interrupted / "own.pth.unfinished"
    write_checkpoint(state, torch.load(state, weights_only=True) | {"args": None})
    process = resume(interrupted)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr


def test_a_damaged_state_is_refused_and_stays(interrupted, trained, refused):
    path = interrupted / "own.pth.unfinished"
    good = path.read_bytes()
    again = "--resume", "--out", interrupted / "own.pth"
    for data in b"", b"names\n", good[: len(good) // 2], good[:-1], pickle.dumps(Code()):
        path.write_bytes(data)
        refused(train.main, again, "own.pth.unfinished is damaged")
        assert path.read_bytes() == data
    shutil.copy(trained / "own.pth", path)
    refused(train.main, again, "own.pth.unfinished holds something else")


def test_a_state_says_nothing_about_where_to_write(interrupted):
    state = interrupted / "own.pth.unfinished"
    content = torch.load(state, weights_only=True)
    victim = interrupted / "victim.pth"
    victim.write_text("mine")
    write_checkpoint(state, content | {"args": content["args"] | {"out": str(victim)}})
    process = resume(interrupted)
    assert process.returncode == 0, process.stderr
    assert victim.read_text() == "mine" and load(interrupted / "own.pth")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_state_of_another_device_says_so_and_goes_on_with_device_cpu(interrupted):
    """N12."""
    state = interrupted / "own.pth.unfinished"
    content = torch.load(state, weights_only=True)
    write_checkpoint(state, content | {"args": content["args"] | {"device": "cuda"}})
    process = resume(interrupted)
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    last = process.stderr.splitlines()[-1]
    assert "cuda" in last and "--device cpu" in last
    process = resume(interrupted, "--device", "cpu")
    assert process.returncode == 0, process.stderr


# What is no file


def test_what_is_no_file_is_refused(own, refused):
    with open("holes", "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(3 * 2**30)
    for path in "holes", "/dev/null", ".", "none.pth", "":
        refused(sampling.main, ["--model", path], path)
    refused(train.main, [*command(own.parent)[2:4], "--init-from", "holes"], "holes")


def test_a_network_that_may_not_be_read_is_said(own):
    """As somebody whose rights count: root may read everything."""
    own.chmod(0)

    def before():
        if os.geteuid() == 0:
            own.parent.chmod(0o755)
            os.setuid(65534)

    process = forked(sampling.main, "--model", "own.pth", before=before)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1 and "own.pth" in process.stderr
