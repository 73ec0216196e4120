"""Names against the network's own probabilities, losses against its logits, and the flags."""

import math
import os
import re
import shutil
from collections import Counter

import pytest
import torch
from helpers import SIZES, forked, random_net, slow_windows
from scipy.stats import chisquare
from torch.nn import functional as F

import sampling
import train
from model import Vocabulary, save, token_losses, windows

PLAIN, TITLE = Vocabulary(["abc"]), Vocabulary(["Aabb"])
NETS = {vocab: random_net(5, len(vocab), 4, 3, 6).eval() for vocab in (PLAIN, TITLE)}
for net in NETS.values():
    net[-1].weight.data -= 0.6  # or all tokens were about as likely
both = pytest.mark.parametrize("vocab", NETS, ids=["plain", "title"])


def chances(vocab, args):
    """{name: its probability} under these flags, multiplied up from logits of whole windows."""
    result, most = Counter(), args.max_length * (2 if vocab.mark else 1)

    def grow(tokens, chance):
        logits = NETS[vocab](torch.tensor([([0] * 4 + tokens)[-4:]]))[0].double()
        weights = (logits / args.temperature).exp()
        weights[0] *= len(tokens) > 0
        weights[weights < weights.sort().values[-(args.top_k or 0)]] = 0
        for token, weight in enumerate((weights / weights.sum()).tolist()):
            if token == 0:
                result[vocab.decode(tokens)] += chance * weight
            elif weight and len(tokens) < most:
                grow([*tokens, token], chance * weight)

    with torch.no_grad():
        grow(vocab.encode(args.start), 1.0)
    lengths, pattern = range(args.min_length, args.max_length + 1), re.compile(args.match)
    result = {k: v for k, v in result.items() if v and len(k) in lengths and pattern.search(k)}
    return {name: chance / sum(result.values()) for name, chance in result.items()}


@both
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--temperature 0.5 --start b",
        "--temperature 2 --top-k 3",
        "--start ab --temperature 1.3 --top-k 3",
        "--min-length 2 --match a$",
        "--min-length 2 --max-length 2 --match ^[^A]*$",
    ],
)
def test_frequencies_are_the_networks_probabilities(vocab, flags, tmp_path):
    """Also under filters: no name is cut, none holds the mark or counts it as a character."""
    save(tmp_path / "own.pth", NETS[vocab], vocab, {})
    argv = f"--model {tmp_path}/own.pth -n 9000 --seed 2 --max-length 3 {flags}".split()
    expected = chances(vocab, sampling.build_parser().parse_args(argv))
    process = forked(sampling.main, *argv)
    assert (process.returncode, process.stderr) == (0, "")
    drawn = sampling.generate(NETS[vocab], vocab, 500, max_length=2)
    assert {len(name) for name in drawn} == {1, 2}
    counts = Counter(process.stdout.splitlines())
    assert counts.total() == 9000 and set(counts) <= set(expected) and len(expected) > 2
    common = [name for name in expected if expected[name] * 9000 >= 5]
    rest = 1 - sum(expected[name] for name in common), 9000 - sum(counts[n] for n in common)
    wanted, found = [expected[name] * 9000 for name in common], [counts[name] for name in common]
    # 5 more, as the rest may be next to nothing.
    assert chisquare([*found, rest[1] + 5], [*wanted, rest[0] * 9000 + 5]).pvalue > 0.01


def test_the_chance_of_a_capital_is_that_of_the_mark_and_its_letter():
    tokens = torch.tensor([[0, TITLE.mark, 2, 3], [TITLE.mark, 2, 3, TITLE.mark]])  # "Ab", marked
    (end, mark, a, b), (_, _, A, B) = NETS[TITLE](tokens).softmax(1).tolist()
    found = sampling.next_chances(NETS[TITLE], TITLE, "Ab")
    assert found == pytest.approx({".": end, "a": a, "b": b, "A": mark * A, "B": mark * B})
    assert list(found.values()) == sorted(found.values(), reverse=True)
    (loss,) = sampling.score(NETS[TITLE], TITLE, ["Ab"])
    assert sampling.explain(NETS[TITLE], TITLE, "Ab").startswith(f"Ab: {loss:.4f} nats per char")


@both
def test_scores_are_cross_entropies_per_character_of_the_name(vocab):
    names = ["a", "bab", "x", "abababababab" * 9, "bab", "a.b", "", "bBA", "AA"]
    losses = sampling.score(NETS[vocab], vocab, names)
    unknown = [2, 5] if vocab.mark else [2, 5, 7, 8]
    assert [i for i, loss in enumerate(losses) if loss == math.inf] == unknown
    for name, loss in zip(names, losses):
        if loss < math.inf:
            contexts, targets = map(torch.tensor, zip(*slow_windows([name], vocab, 4)))
            expected = F.cross_entropy(NETS[vocab](contexts), targets, reduction="sum")
            assert loss == pytest.approx(expected.item() / (len(name) + 1))


def test_decomposed_letters_are_composed_ones_and_the_mode_stays():
    """In Python as on the command line; and a network in training stays so, with no gradients."""
    vocab = Vocabulary(["né"])
    net = random_net(3, len(vocab), 4, 3, 6)
    for mode in True, False:
        net.train(mode)
        assert sampling.score(net, vocab, ["ne\u0301"]) == sampling.score(net, vocab, ["né"])
        both = [sampling.next_chances(net, vocab, text) for text in ("e\u0301", "é")]
        assert both[0] == both[1]
        drawn = sampling.generate(net, vocab, 9, start="e\u0301", max_length=20)
        assert all(name.startswith("é") for name in drawn)
        token_losses(net, windows(["né"], vocab, 4))
        assert all(module.training == mode for module in net.modules())
        assert all(weight.grad is None for weight in net.parameters())


def test_score_prints_a_line_for_each_line(tiny, tmp_path):
    (tmp_path / "some.txt").write_bytes("\ufeffida\r\n\n  jo \nIda\nida".encode())
    process = forked(sampling.main, "--model", tiny / "model.pth", "--score", tmp_path / "some.txt")
    rows = [line.split("\t") for line in process.stdout.split("\n")]
    assert [row[-1] for row in rows] == ["ida", "", "  jo ", "Ida", "ida", ""]
    assert rows[0] == rows[4] and 0 < float(rows[0][0]) < 4 and rows[3][:2] == ["inf", "0"]
    assert process.stderr == "names with characters that the network does not know: 1\n"


def test_flags(tiny):
    known = (tiny / "names.txt").read_text().split()

    def names(*flags, status=0):
        process = forked(sampling.main, "--model", tiny / "model.pth", *flags)
        assert process.returncode == status, process.stderr
        return process.stdout.splitlines()

    assert names("--seed", 1, "-n", 500) == names("--seed", 1, "-n", 500) != names("-n", 500)
    assert len(names()) == 20 and len(set(names("--top-k", 1))) == 1
    new = ["--data", tiny / "names.txt", "--new", "-n", 300]
    assert len(set(names(*new)) - set(known)) == 300
    assert set(names(*new, "--max-length", 1, status=1)) == set("".join(known))  # all there are
    far = names(*new, "--min-edits", 2, "--max-length", 4)
    assert not any(name[:i] + name[i + 1 :] in known for name in far for i in range(len(name)))


def edits(a, b):
    """Levenshtein's distance by its definition."""
    rows = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        rows, above = [i], rows
        for j, y in enumerate(b, 1):
            rows.append(min(above[j] + 1, rows[-1] + 1, above[j - 1] + (x != y)))
    return rows[-1]


def allowed(a, b):
    """Whether both may be shown by --best."""
    return edits(a, b) > {1: 0, 2: 0, 3: 1, 4: 1}.get(min(len(a), len(b)), 2)


def test_best_are_the_best_new_names_that_are_unlike_each_other(tiny):
    known = (tiny / "names.txt").read_text().split()
    net, vocab, _ = sampling.load(tiny / "model.pth")
    args = "--model", tiny / "model.pth", "--seed", 1
    process = forked(sampling.main, *args, "--best", "-n", 9)
    best = process.stdout.splitlines()
    assert (process.returncode, process.stderr, len(best)) == (0, "", 9)
    pool = forked(sampling.main, *args, "--new", "-n", 180).stdout.splitlines()  # 20 times as many
    assert len({*pool}) == 180 and not {*pool} & {*known}
    expected = []
    for name in sorted(pool, key=lambda name: sampling.score(net, vocab, [name])):
        if all(allowed(name, other) for other in expected):
            expected.append(name)
    assert best == expected[:9]


def test_best_enlarges_its_pool_once_and_says_how_many_there_are(tiny, monkeypatch):
    """Of three letters out of 17, at most 17^2 differ in two."""
    monkeypatch.setattr(sampling, "MAX_MISSES", 3000)
    args = "--model", tiny / "model.pth", "--best", "--min-length", 3, "--max-length", 3
    process = forked(sampling.main, *args, "-n", 300)
    short = process.stdout.splitlines()
    assert process.returncode == 1 and 20 < len(short) < 290
    assert f"only {len(short)} of 300 names" in process.stderr.splitlines()[-1]
    assert all(allowed(a, b) for i, a in enumerate(short) for b in short[:i])


def test_best_without_the_list_says_so_and_draws(tiny, tmp_path):
    shutil.copy(tiny / "model.pth", tmp_path / "moved.pth")
    process = forked(sampling.main, "--model", tmp_path / "moved.pth", "--best", "-n", 9)
    assert process.returncode == 0 and len({*process.stdout.split()}) == 9
    assert "moved.pth is not at hand" in process.stderr and process.stderr.count("\n") == 1


def test_a_network_knows_its_list(tiny, tmp_path, refused):
    """In its folder or below, by its SHA-256; else one line asks for --data, which always wins."""
    names, below = (tiny / "names.txt").read_text().split(), tmp_path / "lists" / "mé"
    below.mkdir(parents=True)
    table = below / "table.csv"
    table.write_text("\n".join(f"{name},1" for name in names))
    args = "--data", table, "--column", 1, "--out", tmp_path / "own.pth", *SIZES, "--steps", 40
    process = forked(train.main, *args)
    assert process.returncode == 0 and "--data" not in process.stdout, process.stderr
    content = (tmp_path / "own.pth").read_bytes()
    assert str(tmp_path).encode() not in content and b"cleo" not in content
    metadata = sampling.load(tmp_path / "own.pth")[2]
    assert (metadata["list"], metadata["column"]) == ("lists/mé/table.csv", "1")
    os.rename(tmp_path, tmp_path.with_name("elsewhere"))
    (tmp_path.with_name("elsewhere")).rename(tmp_path)
    own = "--model", tmp_path / "own.pth"
    drawn = forked(sampling.main, *own, "--new", "-n", 300)
    assert drawn.returncode == 0 and not {*drawn.stdout.split()} & {*names}
    drawn = forked(sampling.main, *own, "-n", 500, "--temperature", 0.2)
    known = sum(name in names for name in drawn.stdout.split())
    said = f"{known} of 500 are in table.csv: --new leaves them out\n"
    assert drawn.stderr == said * bool(known)
    for page in "a.html", "b.html":
        assert forked(sampling.main, *own, "--page", tmp_path / page, "--new").returncode == 0
    table.rename(below / "other.csv")
    refused(sampling.main, [*own, "--new"], "moved or changed", "--data")
    found = forked(sampling.main, *own, "--new", "--data", below / "other.csv", "--column", "1")
    assert (found.returncode, found.stderr) == (0, "")
    table.write_text("another,1\nlist,2\n")
    refused(sampling.main, [*own, "--min-edits", 2], "moved or changed", "--data")
    assert forked(sampling.main, *own).stderr == ""  # without the list it still draws


def test_what_stands_where_a_network_has_its_list_is_no_harm(tiny, tmp_path):
    """A device, a folder, a forged path."""
    content = torch.load(tiny / "model.pth", weights_only=True)
    for path in "/dev/zero", ".", "/etc/passwd", 7, "a\0b", ["x"]:
        content["metadata"] |= {"list": path, "column": path}
        torch.save(content, tmp_path / "own.pth")
        process = forked(sampling.main, "--model", tmp_path / "own.pth", "-n", 3)
        assert (process.returncode, process.stderr) == (0, ""), process.stderr


def test_other_letters_are_pointed_out(tmp_path):
    """A beginning that the list has in capitals, a pattern that finds nothing."""
    names = ["Galadril", "Gandor", "Elrin", "Elwing", "Maelor", "Thalion", "ga El", "Tinuviel"]
    (tmp_path / "names.txt").write_text("\n".join(names[:6] + names[7:] + ["Idril", "Nim", "Dol"]))
    args = "--data", tmp_path / "names.txt", "--out", tmp_path / "own.pth", *SIZES, "--steps", 40
    assert forked(train.main, *args).returncode == 0
    own = "--model", tmp_path / "own.pth", "-n", 3
    process = forked(sampling.main, *own, "--start", "gal")
    assert process.stderr.startswith("no listed name begins with gal: did you mean --start Gal?\n")
    assert len(process.stdout.split()) == 3
    assert "did you mean" not in forked(sampling.main, *own, "--start", "Gal").stderr


def test_a_pattern_that_finds_nothing_says_that_capitals_count(tiny, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_MISSES", 1000)
    args = "--model", tiny / "model.pth", "--match"
    assert "capitals count" in forked(sampling.main, *args, "^Jo").stderr
    assert "capitals count" not in forked(sampling.main, *args, "^0").stderr
    process = forked(sampling.main, *args, "a", "--min-length", 900)  # not the pattern's fault
    assert process.returncode == 1 and "capitals count" not in process.stderr
    process = forked(sampling.main, *args, "^0", "--best", "-n", 2)
    assert process.stderr.count("drawn") == 1  # it has given up once


@pytest.mark.parametrize(
    "flags, words",
    {
        "--start a1": "'1' is not among the characters",
        "--start a.b": "a name cannot hold '.'",
        "--start Ada": "did you mean 'ada'",
        "--start abc --max-length 2": "--start or --min-length is longer than --max-length 2",
        "--score none.txt": "none.txt cannot be used",
        "--model none.pth": "none.pth is not a file",
        f"--model {__file__}": "test_sampling.py is damaged, or was not written by train.py",
        "--best -n 1001": "--best gives 1,000 names at most",
        "--title x": "--title is that of a page",
        "--temperature 0": "that is --top-k 1",
        "-n 0": "-n/--num-samples: '0' is no int from 1",
    }.items(),
)
def test_bad_input(tiny, refused, flags, words):
    refused(sampling.main, ["--model", tiny / "model.pth", *flags.split()], words)
