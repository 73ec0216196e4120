"""What README.md says: its examples run, its losses and its table of imports are true."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT, forked

import train
from model import load, windows
from plumbing.lists import read_names

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run(monkeypatch):
    """Every block in Python."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    assert len(blocks) > 2
    for block in blocks:
        process = forked(lambda argv: exec(argv[0], {}), block)
        assert (process.returncode, process.stderr) == (0, ""), block


def test_the_shipped_network_has_the_losses_that_are_told():
    """Those that it records, and those of the README's row, recomputed from names.txt."""
    net, vocab, metadata = load(ROOT / "model_state.pth")
    parts = train.split(read_names(ROOT / "names.txt"))
    tokens = {part: windows(parts[part], vocab, net.config["block_size"]) for part in parts}
    losses = {part: train.evaluate(net, tokens[part], vocab)[0] for part in parts}
    assert losses == pytest.approx(metadata["losses"], abs=1e-5)
    (row,) = re.findall(r"^\| \*\*shipped.*", README, re.MULTILINE)
    told = re.findall(r"\b\d\.\d{3}\b", row)
    assert told == [f"{losses[part]:.3f}" for part in ("train", "val", "test")]


def imports(path, modules):
    """The project's own modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("plumbing.") for name in found} & modules


def test_the_arrows_are_those_of_the_table_and_make_no_circle():
    files = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/[!_]*.py")]
    modules = {path.stem for path in files}
    arrows = {path.stem: imports(path, modules) for path in files}
    rows = re.findall(r"^\| `(?:plumbing/)?(\w+)\.py` \|[^|]*\|([^|]*)\|$", README, re.MULTILINE)
    assert {name: set(re.findall(r"\w+", cell)) for name, cell in rows} == arrows
    list(TopologicalSorter(arrows).static_order())  # raises CycleError
