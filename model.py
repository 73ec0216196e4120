"""What a model is: names and their windows, the vocabulary, the network, the file that keeps them."""

import hashlib
import io
import math
import os
import pickle
import shutil
import stat
import zipfile
from pickletools import genops
from tempfile import TemporaryDirectory
from textwrap import shorten
from unicodedata import category, normalize

import torch
from torch import nn

from layers import BatchNorm1d, Dropout, Embedding, FlattenConsecutive, Linear, Tanh

# The end token ends every name and pads the context on the left. A list whose names hold "." has one that
# no line can hold.
END, LINE_END = ".", "\n"

LARGEST_BLOCK = 1024
LARGEST_LIST = 2**28  # characters; a pipe might never end
LARGEST_LINE = 2**20
PART = 2**24  # characters of a list that are read at once
LARGEST_PIPE = 2**30  # bytes of a checkpoint that comes through a pipe


def canonical(name):
    """The form in which equal names are equal: Unicode's NFC, without blanks around it."""
    return normalize("NFC", name).strip()


def read_names(path, progress=lambda text: None):
    """The names of a UTF-8 text file, one a line, each as canonical(); blank lines do not count.

    Raises ValueError when the file cannot be read or holds no list of names. progress(text) is called after
    each 16 million characters of a long list.
    """
    names, size = [], 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            while text := file.read(PART):
                rest = file.readline(LARGEST_LINE)  # of the last line
                text += rest
                size += len(text)
                if size > LARGEST_LIST:
                    raise ValueError(f"{path} holds more than {LARGEST_LIST:,} characters: give a part of it")
                if len(rest) == LARGEST_LINE:
                    raise ValueError(f"{path} holds a line of more than {LARGEST_LINE:,} characters: one name a line")
                some = [name for line in normalize("NFC", text).split("\n") if (name := line.strip())]
                for char in set(text) - {"\n"}:
                    # A tab before or after a name is no part of it.
                    if category(char) == "Cc" and (name := next((name for name in some if char in name), None)):
                        what = f"{shorten(repr(name), 60)} holds the control character {char!r}"
                        raise ValueError(f"{path}: {what}: take it out")
                names += some
                if size > PART:
                    progress(f"{len(names):,} names read")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a text file with one name a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    if not names:
        raise ValueError(f"{path} holds no names: give a text file with one name a line")
    return names


def digest(names):
    """A list of names -> the SHA-256 that tells it from others."""
    sha256 = hashlib.sha256()
    for part in batched(names):
        sha256.update("\n".join([*part, ""]).encode())
    return sha256.hexdigest()


def batched(names, n=100_000):
    """A list in parts of n: what is done to all names at once takes much memory, and no signal ends it."""
    return (names[i : i + n] for i in range(0, len(names), n))


class Vocabulary:
    """The characters of `texts`, with indices from 1 in sorted order; the end token has index 0."""

    def __init__(self, texts):
        chars = set()
        for part in batched(texts):
            chars.update(*part)
        self.end = LINE_END if END in chars else END
        self.chars = self.end + "".join(sorted(chars))
        self.index = {char: i for i, char in enumerate(self.chars)}

    def __len__(self):
        return len(self.chars)

    def encode(self, text):
        """str -> list of int, the end token included. Raises ValueError for a character that is not known."""
        try:
            return [self.index[char] for char in text]
        except KeyError as error:
            known = repr(self.chars[1:60]) + " ..." * (len(self) > 60)
            raise ValueError(f"{error.args[0]!r} is not among the characters {known}") from None

    def decode(self, codes):
        """Sequence of int -> str."""
        return "".join(self.chars[code] for code in codes)


def windows(names, vocab, block_size, progress=lambda text: None):
    """Names -> (N, block_size + 1) codes: every character and end of a name, after what stands before it.

    All windows are one view over one array of a byte, or four, a character.
    """
    encoding, dtype = ("latin-1", torch.uint8) if len(vocab) <= 256 else ("utf-32-le", torch.int32)
    table = {ord(char): code for char, code in vocab.index.items()}
    characters = sum(sum(map(len, part)) for part in batched(names))
    codes, end = torch.zeros(block_size + characters + len(names), dtype=dtype), block_size
    for i, part in enumerate(batched(names)):
        if i and i % 10 == 0:
            progress(f"{i // 10:,} million names encoded")
        text = vocab.end.join([*part, ""]).translate(table)  # str.translate is a hundred times as fast as a loop
        codes[end : end + len(text)] = torch.frombuffer(bytearray(text.encode(encoding, "surrogatepass")), dtype=dtype)
        end += len(text)
    return codes.unfold(0, block_size + 1, 1)


def contexts_and_targets(window):
    """(..., T + 1) codes -> contexts (..., T) and targets (...), int64."""
    contexts, targets = window[..., :-1].long(), window[..., -1].long()
    # What stands before the last end token is another name: all of it becomes padding.
    return contexts * (contexts != 0).flip(-1).cumprod(-1).flip(-1), targets


class WaveNet(nn.Sequential):
    """The network: contexts (B, block_size) int64 -> logits (B, vocab_size).

    log2(block_size) levels join the characters pair by pair, each FlattenConsecutive(2), Linear,
    BatchNorm1d, Tanh: (B, T, C) -> (B, T/2, 2C) -> (B, T/2, n_hidden). It is the tree of dilated
    convolutions of WaveNet, arXiv:1609.03499, seen through one output. With dropout > 0, a Dropout follows
    each Tanh.
    Raises ValueError when block_size is not a power of two of at least 2, and for contexts of another size.
    """

    def __init__(self, vocab_size, block_size, n_embd, n_hidden, dropout=0.0):
        if block_size < 2 or block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two of at least 2, not {block_size}")
        layers, n_in = [Embedding(vocab_size, n_embd)], n_embd
        for _ in range(block_size.bit_length() - 1):
            linear = Linear(2 * n_in, n_hidden, bias=False)  # BatchNorm1d would take a bias away again
            # BatchNorm1d takes the scale of this weight away again, and what it leaves is that a step of SGD
            # turns a smaller weight further: arXiv:1706.05350. With 0.5 in place of Kaiming's gain for tanh,
            # 5/3, which would keep the variance from level to level, training gets further in its steps.
            linear.weight.data *= 0.5
            layers += [FlattenConsecutive(2), linear, BatchNorm1d(n_hidden), Tanh()]
            if dropout:
                layers.append(Dropout(dropout))
            n_in = n_hidden
        head = Linear(n_hidden, vocab_size)
        # Small logits: training starts at a loss of about ln(vocab_size), knowing nothing, and not from
        # confident mistakes that it would first have to unlearn.
        head.weight.data *= 0.1
        super().__init__(*layers, head)
        self.config = dict(vocab_size=vocab_size, block_size=block_size, n_embd=n_embd, n_hidden=n_hidden)

    def forward(self, contexts):
        if contexts.dim() != 2 or contexts.shape[1] != self.config["block_size"]:
            raise ValueError(f"contexts must be (B, {self.config['block_size']}), not {tuple(contexts.shape)}")
        return super().forward(contexts)

    def __getitem__(self, index):
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


def write(path, data):
    """Put bytes into the file at path, so that a crash leaves either the old file or the whole new one.

    A link stays a link, and a file keeps its permissions. Raises ValueError when it cannot be written.
    """
    path = os.path.realpath(path)
    try:
        with TemporaryDirectory(prefix=".", suffix=".tmp", dir=os.path.dirname(path)) as folder:
            temporary = os.path.join(folder, "new")
            with open(temporary, "wb") as file:
                if os.path.exists(path):
                    shutil.copymode(path, temporary)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): make room there, or choose another place") from None


def write_tensors(path, content):
    """Write a dict of tensors, numbers, strings, lists, tuples and dicts to the file at path.

    It is a file of torch.save(), a zip archive, whose comment is the SHA-256 of all before it.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()[:-2] + bytes((64, 0))  # the length of the comment, which was 0
    write(path, data + hashlib.sha256(data).hexdigest().encode())


def rebuild_tensor(storage, offset, size, *_):
    """What torch._utils._rebuild_tensor_v2 makes of a contiguous tensor's pickle."""
    if len(size) > 2 or any(type(number) is not int or not 0 <= number <= len(storage) for number in (offset, *size)):
        raise pickle.UnpicklingError("a tensor outside its storage")
    return storage[offset : offset + math.prod(size)].view(size)


class Unpickler(pickle.Unpickler):
    """Makes plain values, and tensors of an archive's records: all that write_tensors() writes, no more.

    torch.load(weights_only=True) knows some more, with which a file of a hundred bytes could fill the memory.
    """

    OPCODES = set(
        "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 "
        "TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET "
        "GLOBAL BINPERSID REDUCE".split()
    )
    GLOBALS = {
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("collections", "OrderedDict"): lambda: {},
        ("torch", "FloatStorage"): torch.float32,
        ("torch", "LongStorage"): torch.int64,
    }

    def __init__(self, archive):
        (path,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        data = archive.read(path)
        for i, (opcode, argument, _) in enumerate(genops(data)):
            memo = opcode.name in ("BINPUT", "LONG_BINPUT") and argument
            large = opcode.name == "LONG1" and abs(argument) >= 2**60  # numbers made to have the same hash
            if opcode.name not in self.OPCODES or i > 20_000 or memo > i or large:
                raise pickle.UnpicklingError(f"unexpected {opcode.name}")
        super().__init__(io.BytesIO(data))
        self.archive, self.folder, self.storages = archive, path.removesuffix("data.pkl"), {}

    def find_class(self, module, name):
        return self.GLOBALS[module, name]

    def persistent_load(self, identity):
        _, dtype, key, *_ = identity
        if type(key) is not str:
            raise pickle.UnpicklingError("a record without a name")
        if key not in self.storages:  # read once, however often it is asked for
            data = self.archive.read(f"{self.folder}data/{key}")
            self.storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def out_of_memory(error):
    """Whether a MemoryError, or the RuntimeError that torch makes of it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "you tried to allocate" in str(error)


def read_tensors(path, kinds, advice):
    """What write_tensors() wrote, a dict whose values are of these kinds, {key: type}. Runs no code of the file.

    Raises ValueError, which ends with the advice, when the file at path cannot be read, is damaged, or
    holds something else.
    """
    damaged = ValueError(f"{path} is damaged, or was not written by train.py: {advice}")
    try:
        with open(path, "rb") as file:
            pipe = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
            if not pipe and not os.path.isfile(path):
                raise ValueError(f"{path} is no file: {advice}")
            # What does not begin as a zip archive and end as a sum is not worth reading, however large it is.
            head = file.read(4)
            if not pipe:
                file.seek(-min(64, os.path.getsize(path)), os.SEEK_END)
                tail = file.read()
                file.seek(4)
            if head != b"PK\3\4" or not (pipe or tail.isalnum()):
                raise damaged
            data = head + file.read(LARGEST_PIPE if pipe else -1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {advice}") from None
    try:
        if hashlib.sha256(memoryview(data)[:-64]).hexdigest().encode() != data[-64:]:
            raise damaged
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            # What is packed, or stands in the file once for many records, could grow to anything.
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise damaged
            if sum(record.file_size for record in records) > len(data):
                raise damaged
            content = Unpickler(archive).load()
    except Exception as error:  # a broken zip and a broken pickle raise almost anything
        raise error if out_of_memory(error) else damaged from None
    if type(content) is not dict or any(type(content.get(key)) is not kind for key, kind in kinds.items()):
        raise ValueError(f"{path} holds something else: {advice}")
    return content


def check(state_dict, net):
    """Raises ValueError unless state_dict fits into net and its numbers are such as a network can have."""
    expected = net.state_dict()
    if list(state_dict) != list(expected):
        raise ValueError("the layers are not those of the network")
    for name, tensor in state_dict.items():
        like = expected[name]
        if not isinstance(tensor, torch.Tensor) or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise ValueError(f"{name} is not {like.dtype} of {tuple(like.shape)}")
        if not tensor.isfinite().all() or (name.endswith("_var") and (tensor < 0).any()):
            raise ValueError(f"{name} holds numbers that are not finite, or negative variances")


def save(path, net, vocab, made):
    """Write a checkpoint: the state dict, the sizes, the vocabulary, and how it was made (a flat dict).

    Raises ValueError, and writes nothing, when a weight is not finite or the file cannot be written.
    """
    state = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
    check(state, net)
    write_tensors(path, {"config": net.config, "vocab": vocab.chars, "made": made, "state_dict": state})


def load(path):
    """path -> (the network in eval mode, its vocabulary, how it was made). Runs no code from the file.

    Raises ValueError when the file cannot be read or is not a whole checkpoint.
    """
    kinds = {"config": dict, "vocab": str, "made": dict, "state_dict": dict}
    checkpoint = read_tensors(path, kinds, "train a network with train.py first")
    config, chars, made, state = (checkpoint[key] for key in kinds)
    try:
        vocab = Vocabulary([chars[1:]])
        if vocab.chars != chars or any(category(char) in ("Cc", "Cs") for char in chars[1:]):
            raise ValueError("its characters are no alphabet")
        (V, E), (_, H) = state["0.weight"].shape, list(state.values())[-2].shape
        T = config["block_size"]
        if any(type(size) is not int for size in config.values()) or min(V, E, H) < 1 or T > LARGEST_BLOCK:
            raise ValueError("its sizes are impossible")
        if config != dict(vocab_size=len(chars), block_size=T, n_embd=E, n_hidden=H):
            raise ValueError("its sizes are not those of its weights")
        levels = T.bit_length() - 1
        numbers = V * E + 2 * E * H + 2 * H * H * (levels - 1) + (4 * H + 1) * levels + H * V + V
        if numbers != sum(tensor.numel() for tensor in state.values()):
            raise ValueError("its weights are not as many as its sizes say")  # before memory is taken
        net = WaveNet(**config)
        check(state, net)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no network of train.py ({shorten(str(error), 80)}): name another one") from None
    net.load_state_dict(state, assign=True)
    return net.eval(), vocab, made


@torch.no_grad()
def transfer(net, vocab, trained, trained_vocab):
    """Copy into `net` what it shares with a trained network of the same block_size, n_embd and n_hidden.

    That is all levels, and what belongs to a character that both know: its embedding, its row of the output.
    A capital letter that was not known begins as its small one.
    """
    rows, known = [0], [0]  # the end token, whichever character it is
    for char, i in vocab.index.items():
        j = trained_vocab.index.get(char, trained_vocab.index.get(char.lower()))
        if i and j:
            rows.append(i)
            known.append(j)
    for new, old in zip(net.parameters(), trained.parameters(), strict=True):
        if len(new) == len(vocab) and len(old) == len(trained_vocab):
            new[rows] = old[known]
        else:
            new.copy_(old)
