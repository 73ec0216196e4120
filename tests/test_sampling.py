"""Names against the network's own probabilities, losses against its logits, and the flags."""

import math
import re
from collections import Counter

import pytest
import torch
from helpers import forked, random_net, slow_windows
from scipy.stats import chisquare
from torch.nn import functional as F

import sampling
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
    best, (net, vocab, _) = names("--best", "--seed", 1, "-n", 9), sampling.load(tiny / "model.pth")
    losses = sampling.score(net, vocab, best)
    assert losses == sorted(losses) and len(set(best)) == 9
    others = {*names("--seed", 1, "-n", 180)} - {*best}  # of 20 times as many draws
    assert len(others) > 100 and losses[-1] <= min(sampling.score(net, vocab, [*others]))


@pytest.mark.parametrize(
    "flags, words",
    {
        "--start a1": "'1' is not among the characters",
        "--start a.b": "a name cannot hold '.'",
        "--start Ada": "did you mean 'ada'",
        "--start abc --max-length 2": "--start or --min-length is longer than --max-length 2",
        "--score none.txt": "none.txt cannot be used",
        "--new": "was not trained on names.txt: add --data LIST",
        "--model none.pth": "none.pth is not a file",
        f"--model {__file__}": "test_sampling.py is damaged, or was not written by train.py",
        "--temperature 0": "that is --top-k 1",
        "-n 0": "-n/--num-samples: '0' is no int from 1",
    }.items(),
)
def test_bad_input(tiny, refused, flags, words):
    refused(sampling.main, ["--model", tiny / "model.pth", *flags.split()], words)
