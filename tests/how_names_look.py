"""How the names look: the table in RESULTS.md, for the network and for Kneser-Ney counts.

python tests/how_names_look.py
"""

import random

import torch
from kneser_ney import ROOT, KneserNey, split

from model import load, token_losses, windows
from plumbing.lists import read_names
from plumbing.recipe import length_distance
from sampling import generate

N = 10_000


def shares(drawn, names, train):
    """Share of new names, share of distinct ones, total variation of the length histograms."""
    new = sum(name not in names for name in drawn) / len(drawn)
    return f"{new:.1%} | {len(set(drawn)) / len(drawn):.1%} | {length_distance(drawn, train):.3f}"


def main():
    names = read_names(ROOT / "names.txt")
    parts = split(names)
    net, vocab, _ = load(ROOT / "model_state.pth")
    counts = KneserNey(parts["train"], "".join(names))
    torch.manual_seed(1)
    random.seed(1)
    print("| | not in names.txt | distinct | length distance | val |")
    print("| --- | --- | --- | --- | --- |")
    window = windows(parts["val"], vocab, net.config["block_size"])
    ours = generate(net, vocab, N), token_losses(net, window).mean().item()
    theirs = [counts.draw() for _ in range(N)], counts.loss(parts["val"])
    for what, (drawn, loss) in ("this network", ours), ("Kneser-Ney 6-gram", theirs):
        print(f"| {what} | {shares(drawn, set(names), parts['train'])} | {loss:.3f} |")


if __name__ == "__main__":
    main()
