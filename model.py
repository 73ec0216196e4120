"""What a model is: names and their windows, the vocabulary, the network, the file that keeps it."""

import hashlib
import io
import os
import re
import shutil
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from unicodedata import normalize

import torch
from torch import nn

from layers import BatchNorm1d, Dropout, Embedding, FlattenConsecutive, Linear, Tanh

# The end token ends every name and pads the context on the left. A list whose names hold "." has
# another one, which no line of a file can hold.
END, LINE_END = ".", "\n"

LARGEST_LIST = 2**28  # characters: a pipe might never end
LARGEST_LINE = 2**15  # characters: Unicode's normal form can take quadratic time
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@contextmanager
def named(path):
    """An OSError inside is of the file at path, also where the system does not say so."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def canonical(name):
    """The form in which equal names are equal: Unicode's NFC, without blanks around it."""
    return normalize("NFC", name).strip()


def read_names(path):
    """The names of a UTF-8 text file, one a line, each as canonical(); blank lines do not count.

    Raises OSError when the file cannot be read, and ValueError when it holds no list of names.
    """
    try:
        with named(path), open(path, encoding="utf-8-sig") as file:
            text = file.read(LARGEST_LIST + 1)
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        raise ValueError(f"{path} {what}") from None
    lines = text.split("\n")
    if len(text) > LARGEST_LIST or max(map(len, lines)) > LARGEST_LINE:
        what = f"{LARGEST_LIST:,} characters, or {LARGEST_LINE:,} in a line: give a part of it"
        raise ValueError(f"{path} holds more than {what}")
    names = [name for line in lines if (name := canonical(line))]
    if not names:
        raise ValueError(f"{path} holds no names: give a text file with one name a line")
    for name in names:  # in Python, here and below: within a long call no signal is answered
        if CONTROL.search(name):
            raise ValueError(f"{path}: {name[:60]!r} holds a control character: take it out")
    return names


def digest(names):
    """A list of names -> the SHA-256 that tells it from others."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


class Vocabulary:
    """The characters of `texts`, with indices from 1 in sorted order; the end token has index 0."""

    def __init__(self, texts):
        chars = set()
        for text in texts:
            chars.update(text)
        self.end = LINE_END if END in chars else END
        self.chars = self.end + "".join(sorted(chars))
        self.index = {char: i for i, char in enumerate(self.chars)}

    def __len__(self):
        return len(self.chars)

    def encode(self, text):
        """str, in which the end token may stand -> list of int.

        Raises ValueError for an unknown character.
        """
        try:
            return [self.index[char] for char in text]
        except KeyError as error:
            known = repr(self.chars[1:60]) + " ..." * (len(self) > 60)
            what = f"{error.args[0]!r} is not among the characters {known}"
            # Small letters, or capitals, may be what was meant.
            forms = [[f for f in (c, c.lower(), c.upper()) if f in self.index] for c in text]
            if all(forms):
                what += f": did you mean {''.join(form[0] for form in forms)!r}?"
            raise ValueError(what) from None

    def decode(self, codes):
        """Sequence of int -> str."""
        return "".join(self.chars[code] for code in codes)


def windows(names, vocab, block_size):
    """Names -> (N, block_size + 1) codes: each character and end of a name, after what precedes it.

    All names stand in one long row, of a byte or four a character, and each window is a view of it.
    """
    encoding, dtype = ("latin-1", torch.uint8) if len(vocab) <= 256 else ("utf-32-le", torch.int32)
    table = {ord(char): code for char, code in vocab.index.items()}
    characters = sum(len(name) + 1 for name in names)
    codes, place = torch.zeros(block_size + characters, dtype=dtype), block_size
    # Each character becomes the one whose number is its code, so that the codes are what encode()
    # writes: a hundred times as fast as a loop. In parts, it takes little memory.
    for i in range(0, len(names), 100_000):
        text = vocab.end.join([*names[i : i + 100_000], ""]).translate(table)
        part = bytearray(text.encode(encoding, "surrogatepass"))
        codes[place : place + len(text)] = torch.frombuffer(part, dtype=dtype)
        place += len(text)
    return codes.unfold(0, block_size + 1, 1)


def contexts_and_targets(codes):
    """(..., T + 1) codes -> contexts (..., T) and targets (...), int64."""
    contexts, targets = codes[..., :-1].long(), codes[..., -1].long()
    # What stands before the last end token is another name and becomes padding: "nn.em" is "...em".
    return contexts * (contexts != 0).flip(-1).cumprod(-1).flip(-1), targets


class WaveNet(nn.Sequential):
    """The network: contexts (B, block_size) int64 -> logits (B, vocab_size).

    log2(block_size) levels join the characters pair by pair, each FlattenConsecutive(2), Linear,
    BatchNorm1d, Tanh: (B, T, C) -> (B, T/2, 2C) -> (B, T/2, n_hidden). It is the tree of dilated
    convolutions of WaveNet, arXiv:1609.03499, seen through one output. With dropout > 0, a Dropout
    follows each Tanh.
    Raises ValueError when block_size is not a power of two of at least 2, and for contexts of
    another size.
    """

    def __init__(self, vocab_size, block_size, n_embd, n_hidden, dropout=0.0):
        if block_size < 2 or block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two of at least 2, not {block_size}")
        layers, n_in = [Embedding(vocab_size, n_embd)], n_embd
        for _ in range(block_size.bit_length() - 1):
            linear = Linear(2 * n_in, n_hidden, bias=False)  # BatchNorm1d would take away a bias
            # BatchNorm1d also takes away the scale of this weight; but the smaller a weight is, the
            # further a step of SGD turns it: arXiv:1706.05350. Kaiming's gain for tanh, 5/3, would
            # keep the variance from level to level; with 0.5 a long training gets further.
            linear.weight.data *= 0.5
            layers += [FlattenConsecutive(2), linear, BatchNorm1d(n_hidden), Tanh()]
            if dropout:
                layers.append(Dropout(dropout))
            n_in = n_hidden
        head = Linear(n_hidden, vocab_size)
        # Small logits: training starts at a loss of about ln(vocab_size), knowing nothing, and not
        # from confident mistakes that it would first have to unlearn.
        head.weight.data *= 0.1
        super().__init__(*layers, head)
        self.config = dict(
            vocab_size=vocab_size, block_size=block_size, n_embd=n_embd, n_hidden=n_hidden
        )

    def forward(self, contexts):
        T = self.config["block_size"]
        if contexts.shape[1:] != (T,):
            raise ValueError(f"contexts must be (B, {T}), not {tuple(contexts.shape)}")
        return super().forward(contexts)

    def __getitem__(self, i):  # nn.Sequential would make a slice with WaveNet(...)
        return nn.Sequential(*list(self)[i]) if isinstance(i, slice) else super().__getitem__(i)


def write(path, data):
    """Put bytes into the file at path, so that a crash leaves either the old or the whole new file.

    A link stays a link, and a file keeps its permissions.
    """
    path = os.path.realpath(path)
    hidden = dict(prefix=".", suffix=".tmp", dir=os.path.dirname(path))
    with named(path), TemporaryDirectory(**hidden) as folder:
        temporary = os.path.join(folder, "new")
        with open(temporary, "wb") as file:
            if os.path.exists(path):
                shutil.copymode(path, temporary)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_tensors(path, content):
    """Write what torch.load(path, weights_only=True) reads, and its SHA-256 behind it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    write(path, data + hashlib.sha256(data).hexdigest().encode())


def read_tensors(path, keys, advice):
    """What write_tensors() wrote: a dict with these keys. Runs no code.

    Raises ValueError, which ends with the advice, when there is no file, or it is damaged, or holds
    something else.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no file: {advice}")
    with named(path), open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        signed = not file.read().strip(b"0123456789abcdef")
        file.seek(0)
        data = file.read() if signed else b""  # what ends in no sum is not read: it may be huge
    checksum = hashlib.sha256(memoryview(data)[:-64]).hexdigest().encode()
    if data[-64:] != checksum or data[:2] != b"PK":
        raise ValueError(f"{path} is damaged, or was not written by train.py: {advice}")
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if type(content) is not dict or content.keys() != set(keys):
        raise ValueError(f"{path} holds something else: {advice}")
    return content


CHECKPOINT = "config", "vocab", "made", "state_dict"


def save(path, net, vocab, made):
    """Write a checkpoint: sizes, vocabulary, how it was made (a flat dict), and the state dict."""
    content = net.config, vocab.chars, made, dict(net.state_dict())
    write_tensors(path, dict(zip(CHECKPOINT, content)))


def load(path):
    """path -> (the network in eval mode, its vocabulary, how it was made). Runs no code.

    Raises ValueError when there is no file, or it is no whole checkpoint.
    """
    advice = "train a network with train.py first"
    checkpoint = read_tensors(path, CHECKPOINT, advice)
    config, chars, made, state = (checkpoint[key] for key in CHECKPOINT)
    (V, E), H = state["0.weight"].shape, [*state.values()][-2].shape[1]
    # Six tensors a level. Nothing is built that the weights in the file do not fill.
    if config != dict(vocab_size=V, block_size=2 ** (len(state) // 6), n_embd=E, n_hidden=H):
        raise ValueError(f"{path} holds weights of other sizes than it says: {advice}")
    net = WaveNet(**config)
    net.load_state_dict(state)
    return net.eval(), Vocabulary([chars[1:]]), made


@torch.no_grad()
def transfer(net, vocab, trained, trained_vocab):
    """Copy into `net` what a trained network of the same sizes, but for vocab_size, has learnt.

    That is all levels, and what belongs to a character that both know: its embedding and its row of
    the output. A capital letter that was not known begins as its small one.
    """
    rows, known = [0], [0]  # the end token, whichever character it is
    for char, i in vocab.index.items():
        j = trained_vocab.index.get(char, trained_vocab.index.get(char.lower()))
        if i and j:
            rows.append(i)
            known.append(j)
    embedding, *levels, weight, bias = zip(net.parameters(), trained.parameters(), strict=True)
    for new, old in levels:
        new.copy_(old)
    for new, old in embedding, weight, bias:
        new[rows] = old[known]
