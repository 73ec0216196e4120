"""The vocabulary, the network, and the file that keeps both: model_state.pth."""

import hashlib
import io
import os
import zipfile
from contextlib import suppress
from pickletools import genops
from textwrap import shorten
from unicodedata import category

import torch
from torch import nn

from layers import BatchNorm1d, Dropout, Embedding, FlattenConsecutive, Linear, Tanh

END = "."  # ends every name and pads the context on the left

# All that a file of tensors may name. torch.load(weights_only=True) knows a few more, some of which a
# file of a hundred bytes could use to fill the memory.
GLOBALS = {
    "collections OrderedDict",
    "torch FloatStorage",
    "torch LongStorage",
    "torch ByteStorage",
    "torch._utils _rebuild_tensor_v2",
}


class Vocabulary:
    """The characters of `texts`, with indices from 1 in sorted order; END has index 0.

    Raises ValueError when a text holds END.
    """

    def __init__(self, texts):
        chars = set().union(*texts)
        if END in chars:
            text = next(text for text in texts if END in text)
            raise ValueError(f"{text!r} holds {END!r}, which marks the end of a name")
        self.chars = END + "".join(sorted(chars))
        self.index = {char: i for i, char in enumerate(self.chars)}

    def __len__(self):
        return len(self.chars)

    def encode(self, text):
        """str -> list of int, END included. Raises ValueError for a character that is not known."""
        try:
            return [self.index[char] for char in text]
        except KeyError as error:
            raise ValueError(f"{error.args[0]!r} is not among the characters {self.chars[1:]!r}") from None

    def decode(self, codes):
        """Sequence of int -> str."""
        return "".join(self.chars[code] for code in codes)


def share(contexts, vocab_size):
    """K batches of contexts (K, B, T) int64 -> a list of K trees that hold each distinct row once.

    Most of a window is padding, and most names begin like others, so the B * T/2 pairs of a level are
    few distinct ones. A tree is (levels, ids): levels[l] = (children (2R,), shares (R,), n) says which rows
    of the level below make up each of R rows, and which share of the level's n pairs each stands for;
    ids (B,) finds each context's row in the last level. Rows of level 0 are the characters.
    """
    K = len(contexts)
    batch = torch.arange(K, device=contexts.device).view(K, 1, 1)
    ids, n, levels = contexts, vocab_size, []
    while ids.shape[2] > 1:
        keys = (batch * n + ids[..., 0::2]) * n + ids[..., 1::2]  # < K n^2, in the order of the batches
        keys, ids, counts = torch.unique(keys, return_inverse=True, return_counts=True)
        sizes = torch.bincount(keys // n**2, minlength=K)
        ids = ids - (sizes.cumsum(0) - sizes).view(K, 1, 1)
        children = torch.stack((keys // n % n, keys % n), 1).view(-1)
        sizes, pairs = sizes.tolist(), ids[0].numel()
        shares = (counts / pairs).split(sizes)
        levels.append(list(zip(children.split([2 * size for size in sizes]), shares, [pairs] * K)))
        n = max(sizes)
    return list(zip(zip(*levels), ids.squeeze(2)))


def wavenet(vocab_size, block_size, n_embd, n_hidden, dropout=0.0):
    """The network: contexts (B, block_size) int64 -> logits (B, vocab_size).

    log2(block_size) levels join the characters pair by pair, each FlattenConsecutive(2), Linear,
    BatchNorm1d, Tanh: (B, T, C) -> (B, T/2, 2C) -> (B, T/2, n_hidden). It is the tree of dilated
    convolutions of WaveNet, arXiv:1609.03499, seen through one output. With dropout > 0, a Dropout follows
    each Tanh.
    Raises ValueError when block_size is not a power of two of at least 2.
    """
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
    return nn.Sequential(*layers, head)


def forward_shared(net, tree):
    """The logits (B, vocab_size) of net(contexts) from a tree of share(): each distinct row once."""
    levels, ids = tree
    embedding, *layers = net
    x, below = embedding.weight, iter(levels)
    for layer in layers:
        if isinstance(layer, FlattenConsecutive):
            children, shares, n = next(below)
            x = layer(x.index_select(0, children).view(len(shares), 2, -1))
        elif isinstance(layer, BatchNorm1d):
            x = layer(x, shares, n)
        else:
            x = layer(x)
    return x.index_select(0, ids)


def backward_shared(net, tree, g):
    """Set .grad of every parameter, from g (B, vocab_size) = dL/dlogits of the last forward_shared()."""
    levels, ids = tree
    embedding, *layers = net
    sizes = [len(embedding.weight)] + [len(shares) for _, shares, _ in levels]
    # A row that was taken several times gathers the gradients of all its uses.
    g = g.new_zeros(sizes.pop(), g.shape[1]).index_add_(0, ids, g)
    below = reversed(levels)
    for layer in reversed(layers):
        g = layer.backward(g)
        if isinstance(layer, FlattenConsecutive):
            children, _, _ = next(below)
            g = g.flatten(0, 1)
            g = g.new_zeros(sizes.pop(), g.shape[1]).index_add_(0, children, g)
    embedding.weight.grad = g


def read_names(path):
    """The names of a UTF-8 text file, one a line; blank lines and blanks around names do not count.

    Raises ValueError when the file cannot be read or holds no list of names.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [name for line in file if (name := line.strip())]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a text file with one name a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    if not names:
        raise ValueError(f"{path} holds no names: give a text file with one name a line")
    for char in sorted(set().union(*names)):
        if char == END or category(char) == "Cc":
            name = next(name for name in names if char in name)
            what = f"{END!r}, which marks the end of a name" if char == END else f"the control character {char!r}"
            raise ValueError(f"{path}: {shorten(repr(name), 60)} holds {what}: take it out")
    return names


def write(path, data):
    """Put bytes into the file at path, so that a crash leaves either the old file or the whole new one."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def write_tensors(path, content):
    """Write a dict of tensors, numbers, strings, lists and dicts to the file at path.

    It is a file of torch.save(), a zip archive, whose comment is the SHA-256 of all before it.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()[:-2] + bytes((64, 0))  # the length of the comment, which was 0
    write(path, data + hashlib.sha256(data).hexdigest().encode())


def read_tensors(path, advice):
    """What write_tensors() wrote, checked before anything is made of it: no code of the file is run.

    Raises ValueError, which ends with the advice, when the file at path cannot be read, is damaged, or
    is no such file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {advice}") from None
    try:
        if hashlib.sha256(data[:-64]).hexdigest().encode() != data[-64:]:
            raise ValueError
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError  # what is packed could unpack to anything
            (pickle,) = (archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
        for opcode, argument, _ in genops(pickle):
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4") and argument not in GLOBALS:
                raise ValueError
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # a broken zip and a broken pickle raise almost anything
        raise ValueError(f"{path} is damaged, or was not written by train.py: {advice}") from None


def save(path, net, vocab, made):
    """Write a checkpoint: the state dict, the sizes, the vocabulary, and how it was made (a flat dict)."""
    config = {
        "vocab_size": len(vocab),
        "block_size": 2 ** sum(isinstance(layer, FlattenConsecutive) for layer in net),
        "n_embd": net[0].weight.shape[1],
        "n_hidden": net[-1].in_features,
    }
    state = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
    write_tensors(path, {"config": config, "vocab": vocab.chars, "made": made, "state_dict": state})


def load(path):
    """path -> (the network in eval mode, its vocabulary). Runs no code from the file.

    Raises ValueError when the file cannot be read or is not a whole checkpoint.
    """
    checkpoint = read_tensors(path, "train a network with train.py first")
    try:
        config, vocab = checkpoint["config"], Vocabulary([checkpoint["vocab"][1:]])
        V, T, E, H = (config[name] for name in ("vocab_size", "block_size", "n_embd", "n_hidden"))
        # A network larger than its file is refused before memory is taken for it.
        parameters = V * E + 2 * E * H + 2 * H * H * (T.bit_length() - 2) + H * V
        if 4 * parameters > os.path.getsize(path) or min(V, T, E, H) < 1:
            raise ValueError
        net = wavenet(V, T, E, H)
        net.load_state_dict(checkpoint["state_dict"])
        if vocab.chars != checkpoint["vocab"] or len(vocab) != V:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{path}: its sizes, vocabulary and weights do not fit together: train a network anew") from None
    return net.eval(), vocab
