"""What a model is: the vocabulary, windows, the network, and the file that keeps all three."""

import math
import os
import re
from collections import Counter
from itertools import chain
from unicodedata import category

import torch
from torch import nn

from layers import BatchNorm1d, Dropout, Embedding, FlattenConsecutive, Linear, Tanh
from plumbing import fast
from plumbing.files import SIZES, is_plausible, read_checkpoint, write_checkpoint

END, LINE_END = ".", "\n"  # ends a name and pads its context; LINE_END where names contain "."
CASE_MARK = "\x0e"  # before a letter: the other case of it; a control character is in no name


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
        rarer_case = min(capitals, small, key=lambda case: sum(counts[char] for char in case))
        chars = counts.keys() - rarer_case
        if rarer_case:  # of "Eve" it is {"E"}, and chars become {"^", "e", "v"}
            chars |= {CASE_MARK} | {other_case(char) for char in rarer_case}
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
    """Names -> (N, block_size + 1) tokens, each after what precedes it: `..... → e`, `....e → m`.

    All names stand in one long row, of one or four bytes a token, and each window is a view of it.
    """
    encoding, dtype = ("latin-1", torch.uint8) if len(vocab) <= 256 else ("utf-32-le", torch.int32)
    # str.translate() replaces each character by chr() of its tokens, so that the bytes of the text
    # are the tokens: 60 times as fast as encode() of each name.
    table = {ord(char): "".join(map(chr, tokens)) for char, tokens in vocab.tokens_of.items()}
    data = bytearray(block_size * dtype.itemsize)
    for i in range(0, len(names), 100_000):
        text = vocab.end.join([*names[i : i + 100_000], ""])
        data += text.translate(table).encode(encoding, "surrogatepass")
    return torch.frombuffer(data, dtype=dtype).unfold(0, block_size + 1, 1)


def contexts_and_targets(tokens):
    """(..., T + 1) tokens -> contexts (..., T) and targets (...), int64: `....e` and `m`."""
    contexts, targets = tokens[..., :-1].long(), tokens[..., -1].long()
    # What stands before the last end token is another name and becomes padding: "nn.em" is "...em".
    own = (contexts != 0).flip(-1).cumprod(-1).flip(-1)  # 1 where no end token stands here or later
    return contexts * own, targets


class WaveNet(nn.Sequential):
    """The network: contexts (B, block_size) int64 -> logits (B, vocab_size).

    log2(block_size) levels join the positions pair by pair, (B, T, C) -> (B, T/2, 2C) ->
    (B, T/2, n_hidden): the tree of dilated convolutions of WaveNet, arXiv:1609.03499, seen through
    one output. Raises ValueError when block_size is not a power of two of at least 2.
    """

    def __init__(self, vocab_size, block_size, n_embd, n_hidden, dropout=0.0):
        if block_size < 2 or block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two of at least 2, not {block_size}")
        # One row more than there are tokens: for those that truncate() hides in training.
        layers, n_in = [Embedding(vocab_size + 1, n_embd)], n_embd
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


def token_losses(net, tokens, scales=(1.0,), progress=iter):
    """The loss of each of N windows (N, T + 1), in nats, in eval mode: (N, S).

    For each of S scales, that of the logits bias + scale * (logits - bias); bias is the head's.
    """
    bias, losses = getattr(net[-1], "bias", None), []
    bias = 0.0 if bias is None else bias
    with fast.evaluating(net):
        for part in progress(tokens.split(fast.part_size(net))):
            contexts, targets = contexts_and_targets(part.to(next(net.parameters()).device))
            logits = fast.logits(net, contexts)
            scaled = (bias + scale * (logits - bias) for scale in scales)
            columns = [-each.log_softmax(1).gather(1, targets.unsqueeze(1)) for each in scaled]
            losses.append(torch.cat(columns, 1))
    return torch.cat(losses).cpu()


# The file of a network

CHECKPOINT = "config", "vocab", "layers", "metadata", "state_dict"


def layer_names(net):
    """The class names of all layers, by which a file knows which network it belongs to."""
    return [type(module).__name__ for module in net.modules()][1:]


def save(path, net, vocab, metadata):
    """Write a network: sizes, vocabulary, layers, how it was trained (a dict), weights."""
    content = net.config, vocab.chars, layer_names(net), metadata, dict(net.state_dict())
    write_checkpoint(path, dict(zip(CHECKPOINT, content)))


def rebuild(content, size):
    """The network of a file of `size` bytes. Raises ValueError, or whatever its layers raise."""
    config, chars, layers, metadata, state = (content[key] for key in CHECKPOINT)
    unsafe = "Cc" in map(category, chars[1:].replace(CASE_MARK, ""))  # terminals obey those
    fits = is_plausible(config, metadata, size, WaveNet) and len(chars) == config["vocab_size"]
    if unsafe or not fits or Vocabulary([chars[1:]]).chars != chars:
        raise ValueError("holds something else")
    net = WaveNet(**config)
    if layer_names(net) != layers:
        raise ValueError("has other layers than model.py")
    net.load_state_dict(state)
    return net.eval()


def load(path):
    """path -> (the network in eval mode, its vocabulary, metadata). Runs no code from the file.

    Raises ValueError when there is no file, or it holds no network, or one of other layers.
    """
    advice = "train a network with train.py first"
    found = read_checkpoint(path, CHECKPOINT, advice)
    try:
        net, vocab = rebuild(found, os.path.getsize(path)), Vocabulary([found["vocab"][1:]])
    except Exception as error:
        what = error if "than model.py" in str(error) else "holds something else"
        raise ValueError(f"{path} {what}: {advice}") from None
    some = "".join(list(vocab.tokens_of)[1:1000])  # all characters as a name, to see what they give
    fast.finite(token_losses(net, windows([some], vocab, net.config["block_size"])))
    return net, vocab, found["metadata"]


@torch.no_grad()
def load_pretrained(net, vocab, pretrained, pretrained_vocab):
    """Copy what a trained network of the same sizes has learned -> {character: old character}.

    It is all weights, but where there is one per token, as in the rows of the head's, those of the
    characters that both know. The head's bias stays: it holds the frequencies of the new list.
    """
    old_stoi = {char: i for char, i in pretrained_vocab.stoi.items() if i}
    known = {0: 0}  # whatever ends a name
    for char, i in list(vocab.stoi.items())[1:]:
        form = char if char in old_stoi else other_case(char)
        if form in old_stoi:
            known[i] = old_stoi[form]
    here = torch.tensor([*known, len(vocab)])  # the last is for what truncate() hides
    there = torch.tensor([*known.values(), len(pretrained_vocab)])
    wider = WaveNet(**net.config | {"vocab_size": len(vocab) + 1})  # what grows has one per token
    for new, value, more in zip(*(each.parameters() for each in (net, pretrained, wider))):
        if new is getattr(net[-1], "bias", None):
            continue
        for dim, (n, m) in enumerate(zip(new.shape, more.shape)):
            if m > n:  # nan where a token is not known
                nans = value.new_full((*value.shape[:dim], n, *value.shape[dim + 1 :]), math.nan)
                k = len(here) - (n == len(vocab))  # the embedding alone has a row for that
                value = nans.index_copy_(dim, here[:k], value.index_select(dim, there[:k]))
        new.copy_(torch.where(value.isnan(), new, value))
    taken = {vocab.chars[i]: pretrained_vocab.chars[old] for i, old in known.items() if i}
    return {char: old for char, old in taken.items() if char != CASE_MARK}
