"""What suits a list: settings by its size, two ways to learn less by heart, the temperature.

Where no reason stands beside a number, it was the best of several on the validation splits of lists
that had served for nothing else: tests/RESULTS.md has them, under "The recipe".
"""

from collections import Counter
from itertools import chain

import torch
from torch import nn

from model import contexts_and_targets
from plumbing.lists import key, normalize
from sampling import MAX_LOGITS, generate

TEMPERATURES, DRAWS = (1.0, 0.9, 0.8, 0.7), 5000  # that may be suggested; names drawn at each
MAX_SMOOTHED = 2**24  # probabilities in a table of smooth_targets(): 64 MB, 600 while it is made


def default_hparams(n, vocab_size):
    """{flag: value} that suits a list of n training windows."""
    dropout = round(min(0.4, max(3000 / n, min(0.25, 4.5 / n**0.3))), 2)
    truncate = round(min(0.8, 8 * max(0.0, dropout - 0.15)), 2)
    # Counts know nothing of characters that are seen a few times, and the table must fit in memory.
    smoothing = 0.3 if 20 * vocab_size <= n <= MAX_SMOOTHED // vocab_size else 0.0
    steps = min(200_000, 60 * n // min(600, vocab_size))
    return dict(dropout=dropout, truncate=truncate, smoothing=smoothing, steps=steps)


def fill_in(args, n, vocab_size):
    """Set the flags that were left out to what suits the list -> {flag: value} of these."""
    hparams = default_hparams(n, vocab_size)
    chosen = {name: value for name, value in hparams.items() if getattr(args, name) is None}
    vars(args).update(chosen)
    return chosen


def weight_decay(n, steps, pretrained):
    """Of the matrices, for n training windows.

    With `pretrained` weights to decay to, the longer the list, the weaker the pull to them. Else
    decay times steps is 60 from 12,000 steps on, and less below: a trial of few steps has hardly
    begun to learn by heart.
    """
    return 30 / n if pretrained else 60 / max(12_000, steps)


def eval_every(n_val, steps):
    """The steps between two validations of n_val windows: 40 in all, in tens of steps.

    A thousand windows take the time of some ten steps: so at least fifty steps follow.
    """
    return 10 * max(1, -(-max(steps // 40, n_val // 20) // 10))


def truncate(contexts, share, mask, generator):
    """Hide all but the last 2 to 8 tokens in a share of the contexts, behind the token `mask`.

    So what often follows a few characters is learned wherever they stand, as by counts of n-grams.
    Padding stays: it tells how long the name is so far, hidden or not.
    """
    kept = torch.randint(2, 9, (*contexts.shape[:-1], 1), generator=generator)
    kept[torch.rand(kept.shape, generator=generator) >= share] = contexts.shape[-1]
    hidden = torch.arange(contexts.shape[-1], 0, -1) > kept
    return contexts.masked_fill(hidden & (contexts != 0), mask)


def smooth_targets(tokens, vocab_size, share, order=6, discount=0.9):
    """(N, V): the targets of N windows as probabilities, a share of them from the other windows.

    It is label smoothing by Kneser-Ney counts, arXiv:2403.17240, without the window's own, so that
    what is seen only once is not learned by heart. Raises ValueError where N * V is too large.
    """
    if (n := len(tokens) * vocab_size) > MAX_SMOOTHED:
        raise ValueError(f"--smoothing would take {n:,} probabilities, too many: leave it out")
    contexts, targets = contexts_and_targets(tokens)
    onehot = nn.functional.one_hot(targets, vocab_size).float()
    ids = [torch.zeros_like(targets)]  # ids[k]: equal where the last k tokens are equal
    for k in range(min(order - 1, contexts.shape[1])):
        ids.append((ids[-1] * vocab_size + contexts[:, -1 - k]).unique(return_inverse=True)[1])
    ids.append(torch.arange(len(targets)))
    expected = torch.full_like(onehot, 1 / vocab_size)
    for same, longer in zip(ids, ids[1:]):
        # An n-gram counts once per different token before it; the longest, once per window.
        grams, gram, times = (longer * vocab_size + targets).unique(
            return_inverse=True, return_counts=True
        )
        shorter = torch.empty_like(grams).scatter_(0, gram, same)  # the context of each
        followers = torch.zeros(same.max() + 1, vocab_size)  # whole numbers, so exact in any order
        followers.index_put_((shorter, grams % vocab_size), torch.ones(1), accumulate=True)
        # Without the window's own; each count gives `discount` of it to the shorter context.
        others = followers[same] - onehot * (times[gram] == 1).unsqueeze(1)
        kept, total = (others - discount).clamp(min=0), others.sum(1, keepdim=True)
        backed_off = (kept + (total - kept.sum(1, keepdim=True)) * expected) / total
        expected = torch.where(total > 0, backed_off, expected)  # 0: no other window has it
    return onehot.lerp(expected, share)


def length_distance(drawn, names):
    """The total variation between the lengths of the drawn and of the names: 0 where alike."""
    if not drawn:
        return 1.0
    ours, theirs = Counter(map(len, drawn)), Counter(map(len, names))
    return sum(abs(ours[n] / len(drawn) - theirs[n] / len(names)) for n in ours | theirs) / 2


def commonest_new(drawn, names):
    """(share, name): how much of the drawn is the commonest name that is not in the list."""
    counts, listed = Counter(map(key, drawn)), set(map(key, names))
    new = ((n / len(drawn), name) for name, n in counts.items() if name not in listed)
    return max(new, default=(0.0, ""))


def choose_temperature(net, vocab, names, shortest, longest):
    """(temperature, names drawn): where the lengths of the drawn are most like the list's, if no
    name that is not in the list has more than 0.5 % of them; else where it has least.
    """
    torch.manual_seed(0)  # so that a resumed training chooses the same
    n, draws = min(DRAWS, 2**19 // longest), {}  # fewer of names that may be very long
    for temperature in TEMPERATURES:
        drawn = []
        for part in torch.arange(n).split(MAX_LOGITS // len(vocab)):
            drawn += generate(net, vocab, len(part), "", temperature, None, longest)
        draws[temperature] = [name for name in map(normalize, drawn) if len(name) >= shortest]
    every = set(map(key, chain.from_iterable(draws.values())))
    listed = every.intersection(map(key, names))  # no set of a long list

    def unlike(drawn):
        return max(commonest_new(drawn, listed)[0], 0.005), length_distance(drawn, names)

    return min(draws.items(), key=lambda item: unlike(item[1]))
