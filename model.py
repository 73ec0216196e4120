"""What a model is: names and their windows, the vocabulary, the network, the file that keeps it."""

import codecs
import csv
import hashlib
import io
import json
import os
import re
import shutil
import unicodedata
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import nn

from layers import BatchNorm1d, Dropout, Embedding, FlattenConsecutive, Linear, Tanh

END, LINE_END = ".", "\n"  # ends a name and pads its context; where names hold ".", LINE_END does
CASE_MARK = "\x0e"  # before a letter: the other case of it; a control character is in no name
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Soft hyphen, zero-width space, byte order mark, bidi marks; not the joiners, which spell words.
INVISIBLE = re.compile("[\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
ARCHIVES = {b"PK\3\4.*xl/": "an Excel workbook", b"PK\3\4.*word/": "a Word document"}
ARCHIVES |= {b"PK\3\4": "a zip file", b"\x1f\x8b": "a gzip file"}  # how the files begin
NUMBERED = re.compile(r"\d+[\s.,:;)-]+\D|.*\D[\s,:;]+\d[\d.,]*%?$")
MAX_CHARACTERS, MAX_LINE = 2**28, 2**15  # of a list, as a pipe might never end, and of a line
MAX_SIZE, MAX_BLOCK_SIZE = 4096, 1024  # of a network
SIZES = "vocab_size", "block_size", "n_embd", "n_hidden"
CHECKPOINT = "config", "vocab", "layers", "metadata", "state_dict"  # what its file holds


@contextmanager
def named(path):
    """An OSError inside is about the file at path, also where the system does not say so."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def normalize(name):
    """The form in which equal names are equal: NFC, nothing invisible, no blanks around it."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", INVISIBLE.sub("", name))
    return name.strip()


def read_lines(path):
    """Yield the lines of a file in UTF-8, or in UTF-16 with its mark; "-" is standard input.

    Raises OSError when it cannot be read, and ValueError when it is no text.
    """
    with named(path), open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
        head, total = file.peek(), 0
        for pattern, kind in ARCHIVES.items():
            if re.match(pattern, head, re.DOTALL):
                raise ValueError(f"{path} is {kind}: save its names as text, one per line")
        utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = io.TextIOWrapper(file, "utf-16" if utf16 else "utf-8-sig")
        try:
            while line := text.readline(MAX_LINE + 1):
                total += len(line)
                if len(line) > MAX_LINE or total > MAX_CHARACTERS:
                    limits = f"{MAX_CHARACTERS:,} characters, or {MAX_LINE:,} in a line"
                    raise ValueError(f"{path} holds more than {limits}: give a part of it")
                yield line.removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8")


def fields_shared(rows, delimiter):
    """How many of the rows have the commonest number of fields, of two or more."""
    widths = Counter(len(next(csv.reader([row], delimiter=delimiter), [])) for row in rows)
    return max((count for width, count in widths.items() if width > 1), default=0)


def read_column(path, lines, column):
    """Yield the fields of a table's column: its number from 1, or its name in the first row."""
    head, widest = list(islice(lines, 100)), 0
    delimiter = max(",;\t", key=partial(fields_shared, head))
    # With their ends, which no name may hold, a quote that is never closed does not go unnoticed.
    rows = csv.reader((f"{line}\n" for line in chain(head, lines)), delimiter=delimiter)
    try:
        names = [] if column.isdecimal() else list(map(normalize, next(rows, [])))
        i = names.index(normalize(column)) if names else int(column) - 1
        for row in rows:
            widest = max(widest, len(row))
            yield row[i] if i < len(row) else ""
        if not 0 <= i < widest:
            raise ValueError("too few fields")
    except (csv.Error, ValueError) as error:
        what = f"{path} has no column {column!r} ({error}), its first row is {head[:1]}"
        raise ValueError(what) from None


def refuse_table(path, lines, rows):
    """Raise ValueError when a file's lines, of which `rows` are some, are no list of names."""
    first, what = rows[0], None
    shared = max(fields_shared(rows, delimiter) for delimiter in ",;\t")
    numbered = sum(NUMBERED.match(row) is not None for row in rows)
    if len(rows) == 1 and max(numbered, shared):
        raise ValueError(f"one name per line: the file {path} has one line, {first[:60]!r}")
    if shared >= 0.9 * len(rows):
        what = "looks like a table: take one column (--column 1, or --column HEADING)"
    elif numbered >= 0.9 * len(rows):
        what = "is numbered: take the numbers out"
    if first[0] in "[{":
        with suppress(ValueError, RecursionError):
            json.loads("\n".join(lines))
            what = "is JSON: save its names as text, one per line"
    if what:
        keep = "or keep the lines as they are (--column 0)"
        raise ValueError(f"{path}, whose first row is {first[:60]!r}, {what}, {keep}")


def read_names(path, column=None, log=lambda message: None):
    """The distinct names of a file, as normalize() gives them, in the order of their first rows.

    `column` is that of a table, as for read_column(), or "0" for the lines as they are; log() is
    told what does not count. Raises OSError, and ValueError for what is no list of names.
    """
    lines = read_lines(path)
    if column not in (None, "0"):
        lines = read_column(path, lines, column)
    head = list(islice(lines, 10_000))
    rows = [row for line in head if (row := normalize(line))]
    if rows and column is None:
        head += lines if rows[0][0] in "[{" else []  # all of what may be JSON
        refuse_table(path, head, rows)
    names, n_rows, invisible, control = {}, 0, 0, []
    for number, line in enumerate(chain(head, lines), 1):
        if name := normalize(line):
            names[name] = None
            n_rows += 1
            invisible += not line.isascii() and INVISIBLE.search(line) is not None
            if not name.isprintable() and CONTROL.search(name):
                control.append(number)
    if control:
        what = f"{len(control):,} rows hold control characters, the first is line {control[0]:,}"
        raise ValueError(f"{path}: {what}: take them out")
    if not names:
        raise ValueError(f"{path} holds no names: give a text file with one name per line")
    if invisible:
        log(f"invisible characters were taken out of {invisible:,} rows")
    if n_rows > len(names):
        log(f"{n_rows - len(names):,} repeated rows count once")
    return list(names)


def sha256(names):
    """The SHA-256 of a list, by which it is known again."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\n".encode())
    return digest.hexdigest()


def other_case(char):
    """The capital of a small letter, or the reverse; None where it is not a single character."""
    other = char.swapcase()
    return other if other != char and len(other) == 1 and other.swapcase() == char else None


class Vocabulary:
    """The tokens of `texts`: the end token is 0, the characters follow in sorted order from 1.

    Where both cases of letters occur, the rarer one is spelled with CASE_MARK and the other one,
    "Eve" as "^eve", so that what is learned about "e" serves "E". stoi maps a token's character to
    its number, tokens_of maps each known character to its one or two tokens.
    """

    def __init__(self, texts):
        counts = Counter(chain.from_iterable(texts))
        capitals = {char for char in counts if other_case(char) and char.isupper()}
        small = {char for char in counts if other_case(char)} - capitals
        rarer = min(capitals, small, key=lambda case: sum(counts[char] for char in case))
        chars = counts.keys() - rarer | {other_case(c) for c in rarer} | {CASE_MARK for _ in rarer}
        self.end = LINE_END if END in chars else END
        self.chars = self.end + "".join(sorted(chars))
        self.stoi = {char: i for i, char in enumerate(self.chars)}
        self.mark = self.stoi.get(CASE_MARK)
        self.tokens_of = {char: [i] for char, i in self.stoi.items() if i != self.mark}
        if self.mark:
            cased = {char: i for char, i in self.stoi.items() if other_case(char)}
            self.tokens_of |= {other_case(char): [self.mark, i] for char, i in cased.items()}

    def __len__(self):
        return len(self.chars)

    def encode(self, text):
        """str, in which the end token may stand -> list of int.

        Raises ValueError for an unknown character.
        """
        known = self.tokens_of.keys()
        if unknown := [char for char in text if char not in known]:
            chars = "".join(known)[1:60] + "..." * (len(known) > 60)
            forms = [form for form in (text.lower(), text.upper()) if known >= set(form)]
            hint = f": did you mean {forms[0]!r}?" if forms else ""
            raise ValueError(f"{unknown[0]!r} is not among the characters {chars!r}{hint}")
        return [token for char in text for token in self.tokens_of[char]]

    def decode(self, tokens):
        """Sequence of int -> str. A mark without a letter after it is nothing."""
        text = "".join(self.chars[token] for token in tokens)
        return re.sub(f"{CASE_MARK}+(.?)", lambda match: other_case(match[1]) or match[1], text)


def windows(names, vocab, block_size):
    """Names -> (N, block_size + 1) tokens: each token and end of a name, after what precedes it.

    All names stand in one long row, of one or four bytes a token, and each window is a view of it.
    """
    encoding, dtype = ("latin-1", torch.uint8) if len(vocab) <= 256 else ("utf-32-le", torch.int32)
    # Each character becomes those whose numbers are its tokens: a hundred times as fast as a loop.
    table = {ord(char): "".join(map(chr, tokens)) for char, tokens in vocab.tokens_of.items()}
    data = bytearray(block_size * dtype.itemsize)
    for i in range(0, len(names), 100_000):
        text = vocab.end.join([*names[i : i + 100_000], ""])
        data += text.translate(table).encode(encoding, "surrogatepass")
    return torch.frombuffer(data, dtype=dtype).unfold(0, block_size + 1, 1)


def contexts_and_targets(tokens):
    """(..., T + 1) tokens -> contexts (..., T) and targets (...), int64."""
    contexts, targets = tokens[..., :-1].long(), tokens[..., -1].long()
    # What stands before the last end token is another name and becomes padding: "nn.em" is "...em".
    return contexts * (contexts != 0).flip(-1).cumprod(-1).flip(-1), targets


class WaveNet(nn.Sequential):
    """The network: contexts (B, block_size) int64 -> logits (B, vocab_size).

    log2(block_size) levels join the positions pair by pair, (B, T, C) -> (B, T/2, 2C) ->
    (B, T/2, n_hidden): the tree of dilated convolutions of WaveNet, arXiv:1609.03499, seen through
    one output. Raises ValueError when block_size is not a power of two of at least 2.
    """

    def __init__(self, vocab_size, block_size, n_embd, n_hidden, dropout=0.0):
        if block_size < 2 or block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two of at least 2, not {block_size}")
        layers, n_in = [Embedding(vocab_size, n_embd)], n_embd
        for _ in range(block_size.bit_length() - 1):
            linear = Linear(2 * n_in, n_hidden, bias=False)  # BatchNorm1d would cancel a bias
            # It cancels the scale of this weight too; but a smaller weight is turned further by
            # each step of SGD, arXiv:1706.05350, and a long training gains from that.
            linear.weight.data *= 0.5
            layers += [FlattenConsecutive(2), linear, BatchNorm1d(n_hidden), Tanh()]
            layers += [Dropout(dropout)] if dropout else []
            n_in = n_hidden
        head = Linear(n_hidden, vocab_size)
        head.weight.data *= 0.1  # small logits: no confident mistakes at first, to be unlearned
        super().__init__(*layers, head)
        self.config = dict(zip(SIZES, (vocab_size, block_size, n_embd, n_hidden)))

    def __getitem__(self, i):  # nn.Sequential would make a slice with WaveNet(...)
        return nn.Sequential(*list(self)[i]) if isinstance(i, slice) else super().__getitem__(i)


def layer_names(net):
    """The class names of all layers, by which a file knows which network it belongs to."""
    return [type(module).__name__ for module in net.modules()][1:]


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


def save(path, net, vocab, metadata):
    """Write a network: sizes, vocabulary, layers, how it was trained (a dict), weights."""
    content = net.config, vocab.chars, layer_names(net), metadata, dict(net.state_dict())
    write_checkpoint(path, dict(zip(CHECKPOINT, content)))


def load(path):
    """path -> (the network in eval mode, its vocabulary, metadata). Runs no code from the file.

    Raises ValueError when there is no file, or it holds no network, or one of other layers.
    """
    advice, what = "train a network with train.py first", "holds something else"
    checkpoint = read_checkpoint(path, CHECKPOINT, advice)
    config, chars, layers, metadata, state = (checkpoint[key] for key in CHECKPOINT)
    with suppress(Exception):  # missing keys, other types, shapes that do not fit
        V, T, E, H = (config[key] for key in SIZES)
        vocab, quantiles = Vocabulary([chars[1:]]), metadata.get("quantiles", [0.0] * 101)
        fits = vocab.chars == chars and not CONTROL.search(chars[1:].replace(CASE_MARK, ""))
        fits &= len(quantiles) == 101 and quantiles == sorted(map(float, quantiles))
        weights = [*state.values(), torch.tensor(quantiles)]
        fits &= all(w.is_contiguous() and bool(w.isfinite().all()) for w in weights)
        # No memory for weights that are only claimed; of your own layers, a 16th may be enough.
        claimed = V * E + 2 * E * H + 2 * H * H * (T.bit_length() - 2) + H * V
        fits &= len(chars) == V and min(E, H) > 0 and T <= MAX_BLOCK_SIZE
        if fits and claimed <= 16 * sum(w.numel() for w in weights):
            net = WaveNet(**config)
            if layer_names(net) == layers:
                net.load_state_dict(state)
                return net.eval(), vocab, metadata
            what = "has other layers than this model.py"
    raise ValueError(f"{path} {what}: {advice}")


@torch.no_grad()
def load_pretrained(net, vocab, pretrained, pretrained_vocab):
    """Copy what a trained network of the same sizes has learned -> {character: that it is from}.

    For these characters their vectors and rows of the head's weight, and every level between. The
    head's bias stays: it holds the frequencies of the new list.
    """
    stoi = pretrained_vocab.stoi
    known = {i: stoi.get(c) or stoi.get(other_case(c)) for i, c in enumerate(vocab.chars)}
    known = {0: 0} | {i: old for i, old in known.items() if i and old}  # 0: whatever ends a name
    for new, old in zip(net.parameters(), pretrained.parameters(), strict=True):
        if new is net[0].weight or new is net[-1].weight:
            new[[*known]] = old[[*known.values()]]
        elif new is not net[-1].bias:
            new.copy_(old)
    taken = {vocab.chars[i]: pretrained_vocab.chars[old] for i, old in known.items()}
    return {char: old for char, old in taken.items() if char not in (vocab.end, CASE_MARK)}
