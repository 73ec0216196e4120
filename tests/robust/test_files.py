"""Whatever stands in a file of weights: it is refused in one line, and none of its code runs."""

import copy
import io
import os
import pickle
import random
import shutil
import struct
import zipfile

import pytest
import torch
from helpers import forked, last_line, resume, state_of
from hypothesis import given
from hypothesis import strategies as st

import sampling
import train
from model import CHECKPOINT, load
from plumbing.files import atomic_write, read_checkpoint, write_checkpoint
from plumbing.runs import STATE


class Code:
    """A pickle that leaves a file behind where it is loaded."""

    def __reduce__(self):
        return open, ("ran", "w")


@pytest.fixture
def own(trained, tmp_path, monkeypatch):
    """A copy of a trained network, in a folder which is the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "own.pth", tmp_path)
    return tmp_path / "own.pth"


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(path, content, **kwargs):
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        for info in archive.infolist():
            info.external_attr = 0  # as torch.save() has it


def contents(content):
    """All of it as bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def refuses(path, words="is damaged"):
    """load() raises one line, which names the file."""
    with pytest.raises(ValueError, match=words) as error:
        load(path)
    assert str(path) in str(error.value) and str(error.value).isprintable()


def changed(content, key, value):
    """A dict with another value there, or none for None; "a.b" is the key b of the dict at a."""
    outer, _, inner = key.partition(".")
    if inner:
        return content | {outer: changed(content[outer], inner.replace(".", "/"), value)}
    key = key.replace("/", ".")
    content = {name: old for name, old in content.items() if name != key}
    return content if value is None else content | {key: value}


# Damage


def flipped(path, read):
    """For 400 flipped bits: the one line that read(path) raised, or None where it read the same."""
    good, expected, bits = (
        bytearray(path.read_bytes()),
        contents(read(path)),
        random.Random(1),
    )
    for _ in range(400):
        place, flip = bits.randrange(len(good)), 1 << bits.randrange(8)
        good[place] ^= flip
        path.write_bytes(good)
        good[place] ^= flip
        try:
            assert contents(read(path)) == expected
            yield None
        except ValueError as error:
            assert str(error).startswith(f"{path} ")
            yield error


def test_a_flipped_bit_is_refused_or_changes_nothing(own):
    """The latter between the entries and in their dates."""

    def read(path):
        net, vocab, metadata = load(path)
        return dict(net.state_dict()), net.config, vocab.chars, metadata

    assert sum(error is not None for error in flipped(own, read)) > 250


def test_a_flipped_bit_of_a_state_is_refused_or_changes_nothing(interrupted):
    path = interrupted / "own.pth.unfinished"
    errors = list(flipped(path, lambda path: read_checkpoint(path, STATE, "")))
    assert sum(error is not None for error in errors) > 250


def test_a_file_cut_anywhere_is_refused(own):
    good = own.read_bytes()
    for length in [0, 1, 4, 22, 64, *range(100, len(good), 211), len(good) - 22, len(good) - 1]:
        own.write_bytes(good[:length])
        refuses(own)


@given(st.binary(max_size=400) | st.binary(max_size=200).map(lambda data: b"PK\3\4" + data))
def test_any_bytes_are_no_network(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    path.write_bytes(data)
    refuses(path)


def test_zip_junk_is_refused_in_one_line_or_changes_nothing(own):
    """Records that do not fit together, whatever zipfile raises; a date may be anything."""
    good, expected, refused = own.read_bytes(), contents(dict(load(own)[0].state_dict())), 0
    start = good.rindex(b"PK\1\2")  # of the last entry in the directory
    junk = [good[: start + i] + b"\xff\xff" + good[start + i + 2 :] for i in range(4, 46)]
    for data in [*junk, b"PK\5\6" + bytes(18), b"PK\5\6" + b"\xff" * 18, b"PK\3\4" * 99]:
        own.write_bytes(data)
        try:
            assert contents(dict(load(own)[0].state_dict())) == expected
        except ValueError as error:
            assert str(error).startswith(f"{own} is damaged")
            refused += 1
    assert refused > 30


# Forged


def test_code_in_a_pickle_never_runs(own):
    content, legacy = entries(own), io.BytesIO()
    (name,) = (name for name in content if name.endswith("data.pkl"))
    for value in Code(), dict.fromkeys(CHECKPOINT, Code()):
        rezip(own, content | {name: pickle.dumps(value, 2)})
        refuses(own)
    good = own.read_bytes()
    torch.save(Code(), legacy, _use_new_zipfile_serialization=False)
    for data in pickle.dumps(Code()), legacy.getvalue(), legacy.getvalue() + good:
        own.write_bytes(data)
        refuses(own)
    torch.save({"config": {}}, own, _use_new_zipfile_serialization=False)
    refuses(own)  # harmless, but without sums
    assert os.listdir() == ["own.pth"]  # no file "ran"


def test_what_is_larger_in_memory_than_in_the_file_is_refused(own):
    """a deflated entry; a tensor that repeats numbers or leaves some out."""
    content = torch.load(own, weights_only=True)
    rezip(own, entries(own), compression=zipfile.ZIP_DEFLATED)
    refuses(own)
    for tensor in torch.zeros(1).expand(10**9), torch.zeros(1).expand(2, 1, 3), torch.ones(9)[::2]:
        write_checkpoint(own, changed(content, "state_dict", {"0.weight": tensor}))
        refuses(own, "holds something else")


def test_sizes_that_are_only_claimed_are_refused(own):
    """the pickle says 2^20 or 2^40 numbers where 300 stand; the directory says 3 GB."""
    content = entries(io.BytesIO(contents({"config": torch.zeros(300)})))
    (name,) = (name for name in content if name.endswith("data.pkl"))
    said = b"M" + struct.pack("<H", 300)
    assert content[name].count(said) == 2
    for claimed in b"J" + struct.pack("<i", 2**20), b"\x8a\x06" + (2**40).to_bytes(6, "little"):
        rezip(own, content | {name: content[name].replace(said, claimed)})
        refuses(own)
    with zipfile.ZipFile(own, "a") as archive:
        archive.infolist()[0].file_size = archive.infolist()[0].compress_size = 3 * 2**30
        archive.writestr("x", "")
    refuses(own)


@pytest.mark.parametrize("key", CHECKPOINT)
def test_missing_keys_and_wrong_types_are_refused(own, key):
    content = torch.load(own, weights_only=True)
    for value in None, 7, "x", [1], True, {}, b"x":
        if (key, value) != ("metadata", {}):
            write_checkpoint(own, changed(content, key, value))
            refuses(own, "holds something else|is damaged|other layers")
    for content in None, 7, [], "names", {}, torch.zeros(3):
        torch.save(content, own)
        refuses(own, "is damaged|holds something else")


WRONG_SIZES = [None, 0, -1, 3, 2**62, 4.5, "8", [8]]
WEIGHTS = [None, 7, [1.0], torch.zeros(2), torch.zeros(3, 4, 5), torch.eye(3).to_sparse()]
INSIDE = {
    f"config.{key}": WRONG_SIZES for key in ("vocab_size", "block_size", "n_embd", "n_hidden")
}
INSIDE |= {"config.dropout": ["x"], "config.colour": [1], "more": [1], "layers": [["Embedding"]]}
INSIDE |= {"state_dict.0.weight": WEIGHTS, "state_dict.more": [torch.zeros(4)]}


@pytest.mark.parametrize("key", INSIDE)
def test_wrong_sizes_and_shapes_are_refused(own, key):
    content = torch.load(own, weights_only=True)
    for value in INSIDE[key]:
        write_checkpoint(own, changed(content, key, value))
        refuses(own, "holds something else|is damaged|other layers")


def test_a_forged_vocabulary_is_refused(own):
    """control characters, which would reach the terminal; a wrong order; a wrong length."""
    content = torch.load(own, weights_only=True)
    end, first, *rest = chars = content["vocab"]
    forged = [end + wild + "".join(rest) for wild in ("\x1b", "\x9b", "\x7f", "\n", "\t", end)]
    forged += [end + chars[:0:-1], chars[:-1], chars + "é", chars[1:], end + rest[0] + chars[2:]]
    for vocab in [*forged, "\x1b" + chars[1:], "", list(chars), chars.encode()]:
        write_checkpoint(own, content | {"vocab": vocab})
        refuses(own, "holds something else")


ARGS = "-n 3", "--score names.txt", "--explain kal", "--page page.html"


@pytest.mark.parametrize("args", ARGS)
def test_what_gives_no_finite_numbers_is_said_whatever_is_asked_for(own, trained, refused, args):
    """Weights that are no numbers, finite ones that overflow, negative variances."""
    shutil.copy(trained / "names.txt", ".")
    good = torch.load(own, weights_only=True)
    for key, value in ("0.weight", float("nan")), ("2.weight", float("inf")), ("3.running_var", -1):
        content = copy.deepcopy(good)
        content["state_dict"][key][:] = value
        write_checkpoint(own, content)
        refused(sampling.main, ["--model", own, *args.split()], "numbers that are not finite")
    content = copy.deepcopy(good)
    content["state_dict"]["9.weight"][:] = 3e38
    write_checkpoint(own, content)
    refused(sampling.main, ["--model", own, *args.split()], "numbers that are not finite")
    assert not os.path.exists("page.html")


def test_files_of_other_versions_and_layers_are_called_that(own, refused):
    content = torch.load(own, weights_only=True)
    layers = ["ReLU" if name == "Tanh" else name for name in content["layers"]]
    write_checkpoint(own, content | {"layers": layers})
    refused(sampling.main, ["--model", own], "other layers")
    made = {key: content[key] for key in ("config", "vocab", "state_dict")} | {"made": {"steps": 9}}
    torch.save(made, own)
    refused(sampling.main, ["--model", own], "was written by an earlier version")
    torch.save({"step": 3, "origin": [], "state_dict": {}, "flags": {}}, "own.pth.unfinished")
    refused(train.main, ["--resume", "--out", own], "was written by an earlier version")


# States


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
    victim = interrupted / "victim.pth"
    victim.write_text("mine")
    forged = changed(state_of(interrupted), "args.out", str(victim))
    torch.save(forged, interrupted / "own.pth.unfinished")
    assert resume(interrupted).returncode == 0
    assert victim.read_text() == "mine" and load(interrupted / "own.pth")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_state_of_another_device_says_so_and_goes_on_with_device_cpu(interrupted):
    forged = changed(state_of(interrupted), "args.device", "cuda")
    torch.save(forged, interrupted / "own.pth.unfinished")
    last = last_line(resume(interrupted))
    assert "cuda" in last and "--device cpu" in last
    assert resume(interrupted, "--device", "cpu").returncode == 0


# What is not a file


def test_what_is_no_file_is_refused(own, refused):
    with open("holes", "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(3 * 2**30)
    for path in "holes", "/dev/null", ".", "none.pth", "":
        refused(sampling.main, ["--model", path], path)
        refused(train.main, ["--out", "new.pth", "--init-from", path or "''"], path)


def test_a_network_that_may_not_be_read_is_said(own):
    def before():  # root may read everything
        os.chmod(own, 0)
        if os.geteuid() == 0:
            os.setuid(65534)

    assert "own.pth" in last_line(forked(sampling.main, "--model", "own.pth", before=before))


def test_lists_within_lists_do_not_hang_the_loader(own):
    content = torch.load(own, weights_only=True)
    for _ in range(60):
        content["metadata"]["x"] = [content["metadata"].get("x")] * 2
    torch.save(content, own)
    assert load(own)[2]["steps"] == 120


NO_QUANTILES = {0.5: 1}, {1.0, 2.0}, [1.0, 2.0, 3.0], [float("nan")] * 101, [2] * 101
FORGED = [("quantiles", value) for value in NO_QUANTILES]
FORGED += [("lengths", value) for value in ([1], [1, 2, 3], ["1", "2"], [0, 5], [9, 3], 5)]
FORGED += [("lengths", value) for value in ({3: 1, 4: 1}, [1, 2000], None)]
FORGED += [("temperature", value) for value in ("1", -1.0, 0.0, float("inf"), None)]


@pytest.mark.parametrize(("key", "value"), FORGED)
def test_forged_metadata_is_refused(own, key, value):
    content = torch.load(own, weights_only=True)
    content["metadata"][key] = value
    torch.save(content, own)
    with pytest.raises(ValueError, match="own.pth holds something else"):
        load(own)


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".file.partial").symlink_to("victim")
    atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()
