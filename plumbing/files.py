"""Files that a crash leaves whole, and whose loading runs no code."""

import io
import os
import shutil
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from plumbing.cli import MAX_BLOCK_SIZE, MAX_LENGTH, MAX_SIZE

SIZES = "vocab_size", "block_size", "n_embd", "n_hidden"  # of a network: its config


@contextmanager
def named(path):
    """An OSError inside is about the file at path, also where the system does not say so."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def check_output(path, is_ours, read=()):
    """Raise ValueError unless there is nothing at `path`, or a file that this project wrote there.

    is_ours(path) tells that of a file; the paths in `read` are never written.
    """
    if os.path.realpath(path) in map(os.path.realpath, filter(None, read)):
        raise ValueError(f"{path} is to be read: write to another file")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a file: write to another one")
    if os.path.lexists(path) and not is_ours(path):
        raise ValueError(f"{path} is another kind of file: write to another one, or move it")


def holds(path, mark):
    """Whether these bytes stand in a file."""
    with named(path), open(path, "rb") as file:
        return mark in file.read(2**26)


def is_network(path):
    """Whether a file is a network that train.py wrote, of this version or an earlier one."""
    with suppress(ValueError):
        return checkpoint(path, "").keys() >= {"config", "vocab", "state_dict"}
    return False


def atomic_write(path, data, own=""):
    """Write bytes so that a crash leaves either the old file or the whole new one.

    A link stays a link, and a file keeps its permissions. Where several processes may write the
    same file at once, `own` tells their partial files apart.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}{own}.partial")
    with named(path):
        try:
            partial.unlink(missing_ok=True)  # what stood there is not written through
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, partial)
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink()


def write_checkpoint(path, content):
    """Write a dict of tensors and plain values, as torch.save() does, in one piece."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def checkpoint(path, advice):
    """The dict that write_checkpoint() wrote. Runs no code from the file.

    Raises ValueError, which ends with the advice, when there is no file, or it is damaged or
    another's.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file: {advice}")
    size = os.path.getsize(path)
    with open(path, "rb") as file, suppress(Exception):  # whatever zipfile and torch raise
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        # zipfile checks all sums; these two fields have none. Nothing may be larger than the file.
        plain = all(entry.external_attr == entry.compress_type == 0 for entry in entries)
        if plain and sum(entry.file_size for entry in entries) <= size and not archive.testzip():
            return dict(torch.load(path, "cpu", weights_only=True))
    raise ValueError(f"{path} is damaged, or was not written by train.py: {advice}")


def read_checkpoint(path, keys, advice):
    """checkpoint(), with these keys: ValueError when it has others."""
    content = checkpoint(path, advice)
    if content.keys() == set(keys):
        return content
    earlier = content.keys() & {"made", "origin", "averaged"}
    what = "was written by an earlier version" if earlier else "holds something else"
    raise ValueError(f"{path} {what}: {advice}")


def is_plausible(config, metadata, size, build):
    """Whether these may be those of a network in a file of `size` bytes, which build(**config)
    makes. Types come first: nothing forged takes time or memory.
    """
    if [type(config), type(metadata)] != [dict, dict] or {*config} != {*SIZES}:
        return False
    V, T, E, H = (config[key] for key in SIZES)
    quantiles = metadata.get("quantiles", [0.0] * 101)
    fits = all(type(n) is int and n > 0 for n in config.values())
    fits = fits and T <= MAX_BLOCK_SIZE and max(E, H) <= MAX_SIZE and type(quantiles) is list
    fits = fits and [type(loss) for loss in quantiles if loss >= 0] == [float] * 101
    temperature, lengths = metadata.get("temperature", 1.0), metadata.get("lengths", [1, 1])
    fits = fits and [*map(type, [temperature, lengths, *lengths])] == [float, list, int, int]
    fits = fits and 0 < temperature <= 1 and 1 <= lengths[0] <= lengths[1] <= MAX_LENGTH
    if fits and V * (E + H) + 2 * H * (E + H * T.bit_length()) > 2**24:  # or it leaves some unused
        with torch.device("meta"):  # two seconds, but no memory
            fits = sum(weight.numel() for weight in build(**config).parameters()) <= 4 * size
    return fits
