"""The tables of other lists in RESULTS.md: losses, and what is drawn.

python tests/other_lists.py FOLDER [--init-from] [--seeds N] LIST ...

Each list is trained without a flag, or from the shipped network, with seeds 1 to 3. Networks stay
in FOLDER, and are not trained again.
"""

import argparse
import io
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean

from kneser_ney import ROOT, tuned

import sampling
from model import load
from plumbing.lists import read_names
from plumbing.recipe import commonest_new, length_distance
from train import split

LOSSES = "list", "Kneser-Ney val / test", "val / test", "test, from to", "test - Kneser-Ney"
LOSSES = *LOSSES, "step kept, of"
LOOKS = "list", "names", "rare", "temperature", "in the list", "rare", "distinct", "lengths, halves"
LOOKS = *LOOKS, "commonest new", "lengths", "too short", "too long", "commonest new"


def network(folder, data, init, seed):
    """The path of a network that was trained on a list, unless it is there already."""
    out = folder / f"{data.stem}-{'init' if init else 'alone'}-{seed}.pth"
    if not out.exists():
        flags = ["--data", data, "--out", out, "--seed", seed]
        flags += ["--init-from", "model_state.pth"] * init
        if out.with_suffix(".pth.unfinished").exists():
            flags = ["--resume", "--out", out]
        with open(out.with_suffix(".txt"), "a") as log:
            command = [sys.executable, "train.py", *map(str, flags)]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    return out


def print_row(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def print_heads(columns):
    print_row(columns)
    print_row(["---"] * len(columns))


def losses_row(data, metadata, counts):
    """Print the losses of a list's networks -> the mean test loss less that of the counts."""
    val, test = ([each["losses"][part] for each in metadata] for part in ("val", "test"))
    kept, steps = mean(each["kept"] for each in metadata), metadata[0]["steps"]
    gain = mean(test) - counts[1]
    cells = [data.stem, f"{counts[0]:.3f} / {counts[1]:.3f}", f"{mean(val):.3f} / {mean(test):.3f}"]
    cells += [f"{min(test):.3f} to {max(test):.3f}", f"{gain:+.3f}", f"{kept:,.0f} of {steps:,}"]
    print_row(cells)
    return gain


def drawn(out, flags):
    """5,000 names by the command that training prints, without --new."""
    command = ["--model", str(out), "-n", "5000", "--seed", "1", *map(str, flags)]
    with redirect_stdout(io.StringIO()) as names, redirect_stderr(io.StringIO()):
        sampling.main(command)
    return names.getvalue().splitlines()


def looks_row(data, outs, metadata):
    """Print what the names look like that a list's networks draw."""
    names, shortest, longest = read_names(data), *metadata[0]["lengths"]
    lengths = ["--min-length", shortest, "--max-length", longest]
    temperatures = [["--temperature", each["temperature"]] for each in metadata]
    usual = [drawn(out, [*flags, *lengths]) for out, flags in zip(outs, temperatures)]
    free = [drawn(out, flags) for out, flags in zip(outs, temperatures)]
    known, counts = set(names), Counter("".join(names))
    rare = {char for char, count in counts.items() if count <= 2}

    def share(is_so, lists=usual):
        return f"{mean(is_so(name) for each in lists for name in each):.1%}"

    def of_lists(lists):
        distance = mean(length_distance(each, names) for each in lists)
        most, name = max(commonest_new(each, names) for each in lists)
        return f"{distance:.3f}", f"`{name}` {most:.1%}"

    cells = [data.stem, f"{len(names):,}", share(lambda name: not rare.isdisjoint(name), [names])]
    cells += [", ".join(str(flags[1]) for flags in temperatures), share(known.__contains__)]
    cells += [share(lambda name: not rare.isdisjoint(name))]
    cells += [f"{mean(len(set(each)) / len(each) for each in usual):.1%}"]
    distance, commonest = of_lists(usual)
    cells += [f"{distance}, {length_distance(names[::2], names[1::2]):.3f}", commonest]
    distance, commonest = of_lists(free)
    cells += [distance, share(lambda name: len(name) < shortest, free)]
    cells += [share(lambda name: len(name) > longest, free), commonest]
    print_row(cells)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=lambda path: Path(path).resolve())
    parser.add_argument("--init-from", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("lists", type=lambda path: Path(path).resolve(), nargs="+")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    seeds = range(1, args.seeds + 1)
    with ThreadPoolExecutor(2) as pool:
        runs = {
            data: [pool.submit(network, args.folder, data, args.init_from, seed) for seed in seeds]
            for data in args.lists
        }
        outs = {data: [run.result() for run in some] for data, some in runs.items()}
    metadata = {data: [load(out)[2] for out in some] for data, some in outs.items()}
    gains = []
    print_heads(LOSSES)
    for data in args.lists:
        parts, table = split(read_names(data)), tuned(read_names(data))
        counts = [table.loss(parts[part]) for part in ("val", "test")]
        gains.append(losses_row(data, metadata[data], counts))
    print(f"| mean of {len(gains)} | | | | {mean(gains):+.3f} | |\n")
    print_heads(LOOKS)
    for data in args.lists:
        looks_row(data, outs[data], metadata[data])


if __name__ == "__main__":
    main()
