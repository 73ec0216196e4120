"""The runs behind the tables of other lists in RESULTS.md: each list, without a flag and started
from the shipped network, three seeds.

python tests/other_lists.py FOLDER LIST ...     some hours on two cores; networks stay in FOLDER
"""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch
from kneser_ney import ROOT, tuned

from model import load
from plumbing.lists import read_names
from sampling import generate
from train import split

SEEDS, HOW = (1, 2, 3), {"no flag": [], "from the shipped": ["--init-from", "model_state.pth"]}


def network(folder, data, how, seed):
    """The path of a network that was trained on a list, unless it is there already."""
    out = folder / f"{data.stem}-{'init' if HOW[how] else 'alone'}-{seed}.pth"
    if not out.exists():
        flags = ["--data", data, "--out", out, "--seed", seed, *HOW[how]]
        resume = (
            ["--resume", "--out", out] if out.with_suffix(".pth.unfinished").exists() else flags
        )
        with open(out.with_suffix(".txt"), "a") as log:
            command = [sys.executable, "train.py", *map(str, resume)]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    return out


def shares(names, drawn):
    """The share of the drawn that stand in the list, and of those with a rare character."""
    counts, rows = Counter("".join(names)), set(names)
    rare = {char for char, count in counts.items() if count <= 2}
    return [mean(name in rows for name in drawn), mean(not rare.isdisjoint(name) for name in drawn)]


def row(folder, data, how, counts):
    """Print a list's row -> the mean test loss less that of the counts."""
    names = read_names(data)
    loaded = [load(network(folder, data, how, seed)) for seed in SEEDS]
    val, test = (
        [metadata["losses"][part] for _, _, metadata in loaded] for part in ("val", "test")
    )
    torch.manual_seed(1)
    samples = [shares(names, generate(net, vocab, 2000)) for net, vocab, _ in loaded]
    known, rare = (f"{mean(each):.1%}" for each in zip(*samples))
    kept = [metadata["kept"] for _, _, metadata in loaded]
    gain, steps = mean(test) - counts[1], loaded[0][2]["steps"]
    cells = [data.stem, f"{len(names):,}", f"{counts[0]:.3f} / {counts[1]:.3f}", how]
    cells += [f"{mean(val):.3f} / {mean(test):.3f}", f"{min(test):.3f} to {max(test):.3f}"]
    cells += [f"{gain:+.3f}", f"{mean(kept):,.0f} of {steps:,}", known]
    cells += [f"{rare} ({shares(names, names)[1]:.1%})"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return gain


def main():
    folder, lists = Path(sys.argv[1]).resolve(), [Path(name).resolve() for name in sys.argv[2:]]
    folder.mkdir(exist_ok=True)
    runs = [(data, how, seed) for seed in SEEDS for how in HOW for data in lists]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: network(folder, *run), runs))
    columns = ["list", "names", "Kneser-Ney val / test", "", "val / test", "test, from to"]
    columns += ["test - Kneser-Ney", "step kept, of", "in the list", "rare"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    counts = {}
    for data in lists:
        parts, table = split(read_names(data)), tuned(read_names(data))
        counts[data] = [table.loss(parts[part]) for part in ("val", "test")]
    for how in HOW:
        gains = [row(folder, data, how, counts[data]) for data in lists]
        print(f"| mean of {len(lists)} | | | {how} | | | {mean(gains):+.3f} | | | |")


if __name__ == "__main__":
    main()
