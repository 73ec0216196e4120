"""Interpolated Kneser-Ney counts, the measure to beat; Chen & Goodman 1998.

python tests/kneser_ney.py              names.txt: a 6-gram with discount 0.9
python tests/kneser_ney.py LIST ...     a table: order and discount of least validation loss
"""

import math
import os
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.lists import read_names  # noqa: E402
from train import split  # noqa: E402

END = "\n"  # no name holds it


class KneserNey:
    """chance(char, context): an order's counts, discounted, above the order below.

    The highest order counts how often a character follows a context, the lower ones after how many
    different characters the shorter context was seen before it. One character, the nth of all
    names and their ends, can be left out.
    """

    def __init__(self, names, chars, order=6, discount=0.9, without=None):
        self.order, self.discount = order, discount
        self.chars = sorted(set(chars) | {END})
        self.counts = [defaultdict(Counter) for _ in range(order)]
        texts = [END * (order - 1) + name + END for name in names]
        grams = [text[i : i + order] for text in texts for i in range(len(text) - order + 1)]
        for n, gram in enumerate(grams):
            if n != without:
                self.counts[-1][gram[:-1]][gram[-1]] += 1
        for n in range(order - 2, -1, -1):
            for context, followers in self.counts[n + 1].items():
                for char in followers:
                    self.counts[n][context[1:]][char] += 1
        self.totals = [
            {context: sum(seen.values()) for context, seen in level.items()}
            for level in self.counts
        ]

    def chance(self, char, context):
        context = (END * self.order + context)[len(context) + 1 :]
        chance = 1 / len(self.chars)
        for n in range(self.order):
            shorter = context[self.order - 1 - n :]
            followers = self.counts[n].get(shorter)
            if not followers:
                break
            left = self.discount * len(followers) * chance
            chance = (max(followers[char] - self.discount, 0) + left) / self.totals[n][shorter]
        return chance

    def loss(self, names, temperature=1.0):
        """Mean cross-entropy, in nats per character, the end of each name included."""
        total = n = 0
        for name in names:
            for i, char in enumerate(name + END):
                total -= math.log(self.chance(char, name[:i])) / temperature
                if temperature != 1:
                    total += math.log(
                        sum(self.chance(char, name[:i]) ** (1 / temperature) for char in self.chars)
                    )
                n += 1
        return total / n

    def draw(self):
        """A name, drawn character by character."""
        name = ""
        while True:
            char = random.choices(self.chars, [self.chance(char, name) for char in self.chars])[0]
            if char == END:
                return name
            name += char


def tuned(names):
    """The counts of the training split, order and discount of the least validation loss."""
    parts = split(names)
    best, least = None, math.inf
    for order in range(3, 8):
        model = KneserNey(parts["train"], "".join(names), order)
        for percent in range(60, 95, 5):
            model.discount = percent / 100
            loss = model.loss(parts["val"])
            if loss < least:
                best, least = (order, model.discount), loss
    return KneserNey(parts["train"], "".join(names), *best)


def main():
    if not sys.argv[1:]:
        names = read_names(ROOT / "names.txt")
        parts = split(names)
        model = KneserNey(parts["train"], "".join(names))
        print("  ".join(f"{part} {model.loss(some):.3f}" for part, some in parts.items()))
        return
    print("| list | names | order | discount | val | test | samples in the list |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in sys.argv[1:]:
        names = read_names(path)
        model, parts = tuned(names), split(names)
        random.seed(1)
        rows = set(names)
        known = sum(model.draw() in rows for _ in range(1000)) / 1000
        what = f"{os.path.basename(path)} | {len(names):,} | {model.order} | {model.discount:.2f}"
        losses = f"{model.loss(parts['val']):.3f} | {model.loss(parts['test']):.3f}"
        print(f"| {what} | {losses} | {known:.1%} |", flush=True)


if __name__ == "__main__":
    main()
