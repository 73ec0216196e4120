"""Interpolated Kneser-Ney counts on the same names, the measure to beat; Chen & Goodman 1998.

    python tests/kneser_ney.py        a 6-gram with discount 0.85
"""

import math
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import END, read_names  # noqa: E402
from train import split  # noqa: E402


class KneserNey:
    """chances(context) -> {character: probability}: an order's counts, discounted, above the order below.

    The highest order counts how often a character follows a context, the lower ones after how many
    different characters the shorter context was seen before it.
    """

    def __init__(self, names, order=6, discount=0.85):
        self.order, self.discount = order, discount
        self.chars = sorted(set("".join(names)) | {END})
        self.counts = [defaultdict(Counter) for _ in range(order)]
        for name in names:
            text = END * (order - 1) + name + END
            for i in range(order - 1, len(text)):
                self.counts[-1][text[i - order + 1 : i]][text[i]] += 1
        for n in range(order - 2, -1, -1):
            for context, followers in self.counts[n + 1].items():
                for char in followers:
                    self.counts[n][context[1:]][char] += 1
        self.known = {}

    def chances(self, context):
        context = (END * self.order + context)[len(context) + 1 :]
        if context not in self.known:
            chances = dict.fromkeys(self.chars, 1 / len(self.chars))
            for n in range(self.order):
                followers = self.counts[n].get(context[self.order - 1 - n :])
                if followers:
                    total = sum(followers.values())
                    left = self.discount * len(followers) / total
                    chances = {
                        char: max(followers[char] - self.discount, 0) / total + left * chance
                        for char, chance in chances.items()
                    }
            self.known[context] = chances
        return self.known[context]

    def loss(self, names, temperature=1.0):
        """Mean cross-entropy, in nats a character, the end of each name included."""
        total = n = 0
        for name in names:
            for i, char in enumerate(name + END):
                chances = self.chances(name[:i])
                norm = sum(chance ** (1 / temperature) for chance in chances.values())
                total -= math.log(chances[char]) / temperature - math.log(norm)
                n += 1
        return total / n

    def draw(self):
        """A name, drawn character by character."""
        name = ""
        while True:
            chances = self.chances(name)
            char = random.choices(list(chances), chances.values())[0]
            if char == END:
                return name
            name += char


def main():
    train, _, val = split(read_names(ROOT / "names.txt"))
    known = set(train)
    model = KneserNey(train)
    unseen = [name for name in val if name not in known]
    print(f"train {model.loss(train):.3f}  val {model.loss(val):.3f}  unseen {model.loss(unseen):.3f}")


if __name__ == "__main__":
    main()
