"""The vocabulary, the network, and the file that keeps both: model_state.pth."""

import io
import os
import zipfile
from contextlib import suppress
from unicodedata import category

import torch
from torch import nn

from layers import BatchNorm1d, Embedding, FlattenConsecutive, Linear, Tanh

END = "."  # ends every name and pads the context on the left


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
    few distinct ones. A tree is (levels, ids): levels[l] = (children (2R,), counts (R,)) says which rows
    of the level below make up each of R rows, and how often each occurs; ids (B,) finds each context's
    row in the last level. Rows of level 0 are the characters.
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
        sizes = sizes.tolist()
        levels.append(list(zip(children.split([2 * size for size in sizes]), counts.float().split(sizes))))
        n = max(sizes)
    return list(zip(zip(*levels), ids.squeeze(2)))


def wavenet(vocab_size, block_size, n_embd, n_hidden):
    """The network: contexts (B, block_size) int64 -> logits (B, vocab_size).

    log2(block_size) levels join the characters pair by pair, each FlattenConsecutive(2), Linear,
    BatchNorm1d, Tanh: (B, T, C) -> (B, T/2, 2C) -> (B, T/2, n_hidden). It is the tree of dilated
    convolutions of WaveNet, arXiv:1609.03499, seen through one output.
    Raises ValueError when block_size is not a power of two of at least 2.
    """
    if block_size < 2 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two of at least 2, not {block_size}")
    layers, n_in = [Embedding(vocab_size, n_embd)], n_embd
    for _ in range(block_size.bit_length() - 1):
        linear = Linear(2 * n_in, n_hidden, bias=False)  # BatchNorm1d would take a bias away again
        # Tanh squeezes what passes it; the gain of 5/3 keeps the variance from level to level.
        linear.weight.data *= 5 / 3
        layers += [FlattenConsecutive(2), linear, BatchNorm1d(n_hidden), Tanh()]
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
            children, counts = next(below)
            x = layer(x.index_select(0, children).view(len(counts), 2, -1))
        elif isinstance(layer, BatchNorm1d):
            x = layer(x, counts)
        else:
            x = layer(x)
    return x.index_select(0, ids)


def backward_shared(net, tree, g):
    """Set .grad of every parameter, from g (B, vocab_size) = dL/dlogits of the last forward_shared()."""
    levels, ids = tree
    embedding, *layers = net
    sizes = [len(embedding.weight)] + [len(counts) for _, counts in levels]
    # A row that was taken several times gathers the gradients of all its uses.
    g = g.new_zeros(sizes.pop(), g.shape[1]).index_add_(0, ids, g)
    below = reversed(levels)
    for layer in reversed(layers):
        g = layer.backward(g)
        if isinstance(layer, FlattenConsecutive):
            children, _ = next(below)
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
    for name in names:
        if END in name:
            raise ValueError(f"{path}: {name!r} holds {END!r}, which marks the end of a name: take it out")
        if any(category(char) == "Cc" for char in name):
            raise ValueError(f"{path}: {name!r} holds a control character: give a text file with one name a line")
    if not names:
        raise ValueError(f"{path} holds no names: give a text file with one name a line")
    return names


def write(path, data):
    """Put bytes into the file at path, so that a crash leaves either the old file or the whole new one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def save(path, net, vocab, made):
    """Write a checkpoint: the state dict, the sizes, the vocabulary, and how it was made (a flat dict)."""
    config = {
        "vocab_size": len(vocab),
        "block_size": 2 ** sum(isinstance(layer, FlattenConsecutive) for layer in net),
        "n_embd": net[0].weight.shape[1],
        "n_hidden": net[-1].in_features,
    }
    state = {name: tensor.detach().cpu().clone() for name, tensor in net.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"config": config, "vocab": vocab.chars, "made": made, "state_dict": state}, buffer)
    write(path, buffer.getvalue())


def load(path):
    """path -> (the network in eval mode, its vocabulary). Runs no code from the file.

    Raises ValueError when the file cannot be read or is not a whole checkpoint.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): train a network first") from None
    try:
        if not zipfile.is_zipfile(io.BytesIO(data)):
            raise ValueError
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # a broken zip, a broken pickle and one that would run code: each raises its own
        raise ValueError(f"{path} is not a checkpoint of train.py, or is damaged: train a network anew") from None
    try:
        vocab = Vocabulary([checkpoint["vocab"][1:]])
        net = wavenet(**checkpoint["config"])
        net.load_state_dict(checkpoint["state_dict"])
        if vocab.chars != checkpoint["vocab"] or len(vocab) != len(net[0].weight):
            raise ValueError
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{path}: its sizes, vocabulary and weights do not fit together: train a network anew") from None
    return net.eval(), vocab
