"""What the README's table "How the names look" says, for the network and for Kneser-Ney counts.

python tests/how_names_look.py
"""

import random
from collections import Counter

import torch
from kneser_ney import ROOT, KneserNey, split

from model import load, read_names, windows
from sampling import generate
from train import evaluate

N = 10_000


def shares(drawn, names, train):
    """Share of new names, share of distinct ones, total variation of the length histograms."""
    ours, theirs = Counter(map(len, drawn)), Counter(map(len, train))
    distance = sum(abs(ours[n] / len(drawn) - theirs[n] / len(train)) for n in ours | theirs) / 2
    return [
        sum(name not in names for name in drawn) / len(drawn),
        len(set(drawn)) / len(drawn),
        distance,
    ]


def main():
    names = read_names(ROOT / "names.txt")
    train, _, val = split(names)
    net, vocab, made = load(ROOT / "model_state.pth")
    window = windows(val, vocab, made["block_size"])
    counts = KneserNey(train, "".join(names))
    torch.manual_seed(1)
    random.seed(1)
    print("| | not in names.txt | distinct | length distance | val 0.8 | val 1.0 | val 1.2 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    temperatures = 0.8, 1.0, 1.2
    ours = shares(generate(net, vocab, N), set(names), train)
    ours += evaluate(net, window, [1 / t for t in temperatures])
    theirs = shares([counts.draw() for _ in range(N)], set(names), train) + [
        counts.loss(val, t) for t in temperatures
    ]
    held_out = shares(val, set(train), train)
    for what, row in ("this network", ours), ("Kneser-Ney 6-gram", theirs):
        print(
            f"| {what} | "
            + " | ".join(
                [f"{share:.1%}" for share in row[:2]] + [f"{value:.3f}" for value in row[2:]]
            )
            + " |"
        )
    print(
        f"(of the validation rows {held_out[0]:.1%} are not in the training split; "
        f"length distance {held_out[2]:.3f})"
    )


if __name__ == "__main__":
    main()
