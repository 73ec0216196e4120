"""Names against the network's own probabilities, losses against its logits, and the flags."""

import math
import re
from collections import Counter

import pytest
import torch
from conftest import forked, run
from scipy.stats import chisquare
from test_model import random_net, slow_windows
from torch.nn import functional as F

from model import Vocabulary
from sampling import generate, main, sample_matching, score

PLAIN, TITLE = Vocabulary(["abc"]), Vocabulary(["Aabb"])
NETS = {vocab: random_net(5, len(vocab), 4, 3, 6).eval() for vocab in (PLAIN, TITLE)}
for net in NETS.values():
    net[-1].weight.data -= 0.6  # or all tokens were about as likely
both = pytest.mark.parametrize("vocab", NETS, ids=["plain", "title"])


def chances(vocab, start, max_length, temperature=1.0, top_k=None):
    """name -> its probability, multiplied up from the logits of whole windows."""
    result, most = Counter(), max_length * (2 if vocab.mark else 1)

    def grow(tokens, chance):
        logits = NETS[vocab](torch.tensor([([0] * 4 + tokens)[-4:]]))[0].double()
        weights = (logits / temperature).exp()
        weights[0] *= len(tokens) > 0
        weights[weights < weights.sort().values[-(top_k or 0)]] = 0
        for token, weight in enumerate((weights / weights.sum()).tolist()):
            if token == 0:
                result[vocab.decode(tokens)] += chance * weight
            elif weight and len(tokens) < most:
                grow([*tokens, token], chance * weight)

    with torch.no_grad():
        grow(vocab.encode(start), 1.0)
    return {name: chance for name, chance in result.items() if 0 < len(name) <= max_length}


def fit(names, expected):
    """Whether the frequencies of names are those of expected: chi-square."""
    counts, n = Counter(names), len(names)
    common = [name for name in expected if expected[name] * n >= 5]
    wanted, found = [expected[name] * n for name in common], [counts[name] for name in common]
    rest = 5 + n - sum(wanted), 5 + n - sum(found)  # 5: without, it may be next to nothing
    assert len(common) > 3 and set(counts) <= set(expected)
    return chisquare([*found, rest[1]], [*wanted, rest[0]]).pvalue > 0.01


@both
@pytest.mark.parametrize(
    "start, temperature, top_k", [("", 1.0, None), ("", 2.0, 2), ("b", 0.5, None), ("ab", 1.3, 3)]
)
def test_frequencies_are_the_networks_probabilities(vocab, start, temperature, top_k):
    """Names have no mark, and none is of more than 3 characters or cut to 3."""
    torch.manual_seed(2)
    names = generate(NETS[vocab], vocab, 20_000, start, temperature, top_k, 3)
    expected = chances(vocab, start, 3, temperature, top_k)
    names += [None] * (20_000 - len(names))
    assert fit(names, expected | {None: 1 - sum(expected.values())})


@both
@pytest.mark.parametrize(
    "start, min_length, max_length, match",
    [("", 3, 4, ""), ("", 1, 4, "a$"), ("b", 2, 4, "^[^A]*$"), ("ab", 3, 5, "a.*b")],
)
def test_names_asked_for_have_conditional_probabilities(
    vocab, start, min_length, max_length, match
):
    expected, pattern = chances(vocab, start, max_length), re.compile(match)
    expected = {k: v for k, v in expected.items() if len(k) >= min_length and pattern.search(k)}
    expected = {name: chance / sum(expected.values()) for name, chance in expected.items()}

    def sample(size):
        return generate(NETS[vocab], vocab, size, start, max_length=max_length)

    torch.manual_seed(3)
    names = list(sample_matching(sample, 5000, min_length=min_length, pattern=pattern))
    assert len(names) == 5000 and fit(names, expected)


@both
def test_longer_names_are_dropped_not_cut(vocab):
    """The same random numbers bring the same names, without the longer ones."""
    for most in 1000, 4:
        torch.manual_seed(1)
        names = generate(NETS[vocab], vocab, 1000, max_length=most)
        if most == 1000:
            shorter = [name for name in names if len(name) <= 4]
    assert names == shorter and 500 < len(names) < 950


def test_extreme_temperatures():
    net, likeliest = NETS[PLAIN], max(chances(PLAIN, "", 3, 0.1).items(), key=lambda x: x[1])[0]
    assert set(generate(net, PLAIN, 100, temperature=1e-300)) == {likeliest}
    firsts = Counter(name[0] for name in generate(net, PLAIN, 4000, temperature=1e30))
    assert chisquare([firsts[char] for char in "abc"]).pvalue > 0.01


@both
def test_scores_are_cross_entropies_per_character_of_the_name(vocab):
    names = ["a", "bab", "x", "abababababab" * 9, "bab", "a.b", "", "bBA", "AA"]
    losses = score(NETS[vocab], vocab, names)
    unknown = [2, 5] if vocab.mark else [2, 5, 7, 8]
    assert [i for i, loss in enumerate(losses) if loss == math.inf] == unknown
    for name, loss in zip(names, losses):
        if loss < math.inf:
            contexts, targets = map(torch.tensor, zip(*slow_windows([name], vocab, 4)))
            expected = F.cross_entropy(NETS[vocab](contexts), targets, reduction="sum")
            assert loss == pytest.approx(expected.item() / (len(name) + 1))
    assert score(NETS[vocab], vocab, []) == []


def test_score_prints_the_loss_of_each_name(tiny, tmp_path):
    (tmp_path / "some.txt").write_bytes("\ufeffida\r\n\n  jo \nIda\na.a\nida".encode())
    process = run("sampling.py", "--model", tiny / "model.pth", "--score", tmp_path / "some.txt")
    losses, names = zip(*(line.split("\t") for line in process.stdout.splitlines()))
    assert names == ("ida", "jo", "Ida", "a.a", "ida")
    assert losses[2:4] == ("inf", "inf") and 0 < float(losses[0]) == float(losses[4]) < 4
    assert process.stderr == "names with characters that the network does not know: 2\n"
    again = run("sampling.py", "--model", tiny / "model.pth", "--score", "-", input="ida\njo\n")
    assert again.stdout == process.stdout[: len(again.stdout)]


def test_flags(tiny):
    def names(*flags):
        process = forked(main, "--model", tiny / "model.pth", *flags)
        assert (process.returncode, process.stderr) == (0, "")
        return process.stdout.splitlines()

    assert names("--seed", 1, "-n", 5000) == names("--seed", 1, "-n", 5000)
    assert names("--seed", 1) != names("--seed", 2) and names("-n", 500) != names("-n", 500)
    assert len(names()) == 20 and all(names())
    drawn = names("--start", "ada", "--num-samples", 50, "--max-length", 6)
    assert len(drawn) == 50 and all(re.fullmatch("ada.{0,3}", name) for name in drawn)
    drawn = names("--min-length", 4, "--match", "^[^a]*$")
    assert len(drawn) == 20 and all(re.fullmatch("[^a]{4,}", name) for name in drawn)
    assert len(set(names("--top-k", 1, "--temperature", 3))) == 1


def test_new(tiny, refused):
    """Names that are not in the list, each once; which list it was, the network knows."""
    known = set((tiny / "names.txt").read_text().split())
    new = "--model", tiny / "model.pth", "--new", "-n", 300
    refused(main, new, "--data LIST")
    drawn = forked(main, *new, "--data", tiny / "names.txt").stdout.splitlines()
    assert len(drawn) == len(set(drawn)) == 300 and not known & set(drawn)
    process = forked(main, *new, "--data", tiny / "names.txt", "--max-length", 1)
    assert set(process.stdout.split()) == set("".join(known)) and process.returncode == 0
    assert process.stderr.startswith(f"only {len(set(''.join(known)))} of 300 names found among ")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--start", "a1"], "'1' is not among the characters"),
        (["--start", "a.b"], "'.'"),
        (["--start", "Ada"], "did you mean 'ada'"),
        (["--start", "abc", "--max-length", 2], "--start"),
        (["--min-length", 5, "--max-length", 4], "--min-length"),
        (["--data", "names.txt"], "--new"),
        (["--match", "a("], "--match"),
        (["--score", "none.txt"], "none.txt"),
        (["--new", "--data", "none.txt"], "none.txt"),
        (["--model", "none.pth"], "none.pth is no file"),
        (["--model", __file__], "test_sampling.py is damaged, or was not written by train.py"),
        (["-n", 0], "-n"),
        (["--temperature", 0], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-k", 0], "--top-k"),
        (["--max-length", 1001], "--max-length"),
        (["--seed", -1], "--seed"),
    ],
)
def test_bad_input(tiny, refused, args, words):
    refused(main, ["--model", tiny / "model.pth", *args], words)
