"""What averaging, calibration, truncation and smoothing buy: the README's table, its exercises.

python tests/what_each_buys.py FOLDER LIST ...     three seeds per list, with one thing left out
"""

import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean
from unittest.mock import patch

from kneser_ney import ROOT  # noqa: F401  puts the project on the path

import train
from model import load

averaged = train.update_average
LEFT_OUT = {
    "nothing": ([], None),
    "averaging": ([], patch.object(train, "update_average", lambda a, net, n: averaged(a, net, 0))),
    "calibration": ([], patch.object(train, "SCALES", [1.0])),
    "truncation": (["--truncate", "0"], None),
    "smoothing": (["--smoothing", "0"], None),
}


def losses(folder, data, what, seed):
    flags, change = LEFT_OUT[what]
    out = Path(folder) / f"{Path(data).stem}-without-{what}-{seed}.pth"
    command = ["--data", data, "--out", str(out), "--seed", str(seed), *flags]
    with open(out.with_suffix(".txt"), "w") as log, redirect_stdout(log), redirect_stderr(log):
        if change:
            with change:
                train.main(command)
        else:
            train.main(command)
    return load(out)[2]["losses"]


def main():
    folder, *lists = sys.argv[1:]
    print("| list | left out | val | test |\n| --- | --- | --- | --- |")
    for data in lists:
        for what in LEFT_OUT:
            runs = [losses(folder, data, what, seed) for seed in (1, 2, 3)]
            val, test = (mean(run[part] for run in runs) for part in ("val", "test"))
            print(f"| {Path(data).stem} | {what} | {val:.3f} | {test:.3f} |", flush=True)


if __name__ == "__main__":
    main()
