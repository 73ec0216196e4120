"""Files that a crash leaves whole, and whose loading runs no code."""

import io
import os
import shutil
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


@contextmanager
def named(path):
    """An OSError inside is about the file at path, also where the system does not say so."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def check_output(path, read):
    """Raise ValueError when what is to be written is no file, or is among the paths to be read."""
    if os.path.realpath(path) in map(os.path.realpath, filter(None, read)):
        raise ValueError(f"{path} is to be read: write to another file")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a file: write to another one")


def atomic_write(path, data):
    """Write bytes so that a crash leaves either the old file or the whole new one.

    A link stays a link, and a file keeps its permissions.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.partial")
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


def read_checkpoint(path, keys, advice):
    """The dict with these keys that write_checkpoint() wrote. Runs no code from the file.

    Raises ValueError, which ends with the advice, when there is none, or it is damaged or another.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file: {advice}")
    what, size = "is damaged, or was not written by train.py", os.path.getsize(path)
    with open(path, "rb") as file, suppress(Exception):  # whatever zipfile and torch raise
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        # zipfile checks all sums; these two fields have none. Nothing may be larger than the file.
        plain = all(entry.external_attr == entry.compress_type == 0 for entry in entries)
        if plain and sum(entry.file_size for entry in entries) <= size and not archive.testzip():
            content = torch.load(path, "cpu", weights_only=True)
            if content.keys() == set(keys):
                return content
            earlier = content.keys() & {"made", "origin"}
            what = "was written by an earlier version" if earlier else "holds something else"
    raise ValueError(f"{path} {what}: {advice}")
