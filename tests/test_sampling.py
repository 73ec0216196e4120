"""Names against the model's own probabilities, incremental against whole windows, and the flags."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch
from conftest import forked, run
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

import sampling
import train
from model import Vocabulary, WaveNet, save
from sampling import LONGEST, PATIENCE, Prefixes, draw, generate, main, score


def random_net(seed, vocab_size, block_size, n_embd, n_hidden):
    """A network with weights and running statistics of all kinds, in eval mode."""
    torch.manual_seed(seed)
    net = WaveNet(vocab_size, block_size, n_embd, n_hidden).double().eval()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 2 - 0.5)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.abs_().add_(0.1)
    return net


@given(
    st.integers(2, 6),
    st.sampled_from([2, 4, 8, 16]),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(0, 2**32 - 1),
)
def test_incremental_logits_are_those_of_the_whole_window(V, T, n_embd, n_hidden, seed):
    """At every position, also past block_size, of texts that part, end alike, and are over."""
    net = random_net(seed, V, T, n_embd, n_hidden)
    with torch.no_grad():
        prefixes = Prefixes(net, 8)
        texts = [[] for _ in range(8)]
        for _ in range(2 * T + 3):
            contexts = torch.tensor([([0] * T + texts[i])[-T:] for i in prefixes.alive])
            torch.testing.assert_close(prefixes.logits[prefixes.ids], net(contexts))
            codes = torch.randint(V, (8,)) * (
                torch.rand(8) < 0.98
            )  # rarely END, or none would get far
            for text, code in zip(texts, codes.tolist()):
                text.append(code)
            prefixes.extend(codes[prefixes.alive])
            assert prefixes.alive.tolist() == [i for i, text in enumerate(texts) if all(text)]
            if not len(prefixes.alive):
                break


def chances(net, vocab, start, temperature, top_k, max_length):
    """name -> its probability, multiplied up from the logits of whole windows, up to max_length."""
    block_size = 2 ** sum("Flatten" in repr(layer) for layer in net)
    result = {}

    def grow(name, chance):
        context = ([0] * block_size + vocab.encode(name))[-block_size:]
        weights = (net(torch.tensor([context]))[0] / temperature).exp()
        if not name:
            weights[0] = 0
        if top_k:
            weights[weights < weights.sort().values[-top_k]] = 0
        for char, weight in zip(vocab.chars, (weights / weights.sum()).tolist()):
            if char == "." and weight:
                result[name] = chance * weight
            elif len(name) < max_length and weight:
                grow(name + char, chance * weight)

    with torch.no_grad():
        grow(start, 1.0)
    return result


def fits(names, expected):
    """Whether the frequencies of names are those of expected, a dict name -> probability:
    chi-square.

    What is missing of the probability 1 belongs to None among the names.
    """
    n, drawn = len(names), Counter(names)
    expected = expected | {None: 1 - sum(expected.values())}
    assert set(drawn) <= set(expected)
    common = [name for name in expected if expected[name] * n >= 5]
    wanted = [expected[name] * n for name in common]
    observed = [drawn[name] for name in common]
    rest = n - sum(wanted), n - sum(observed)
    if rest[0] >= 5:
        wanted, observed = wanted + [rest[0]], observed + [rest[1]]
    else:
        wanted[0], observed[0] = wanted[0] + rest[0], observed[0] + rest[1]
    assert len(wanted) > 4
    return chisquare(observed, wanted).pvalue > 0.01


@pytest.mark.parametrize(
    "start, temperature, top_k",
    [("", 1.0, None), ("", 0.5, None), ("", 2.0, 2), ("b", 1.0, None), ("ab", 1.3, 3)],
)
def test_frequencies_are_the_models_probabilities(start, temperature, top_k):
    net, vocab, n = random_net(5, 4, 4, 3, 6), Vocabulary(["abc"]), 20_000
    torch.manual_seed(2)
    names = generate(net, vocab, n, start, temperature, top_k, 5)
    names += [None] * (n - len(names))  # those that were longer than 5
    assert fits(names, chances(net, vocab, start, temperature, top_k, 5))


@pytest.mark.parametrize(
    "start, min_length, max_length, match",
    [
        ("", 3, 5, ""),
        ("", 1, 4, "a$"),
        ("", 2, 5, "^[^b]*$"),
        ("b", 3, 5, "(ac|ca)"),
        ("ab", 4, 6, "^a.*c$"),
    ],
)
def test_what_is_asked_for_has_the_models_conditional_probabilities(
    start, min_length, max_length, match
):
    net, vocab = random_net(5, 4, 4, 3, 6), Vocabulary(["abc"])
    expected = {
        name: chance
        for name, chance in chances(net, vocab, start, 1.0, None, max_length).items()
        if len(name) >= min_length and re.search(match, name)
    }
    expected = {name: chance / sum(expected.values()) for name, chance in expected.items()}

    def sample(size):
        return generate(net, vocab, size, start, max_length=max_length)

    torch.manual_seed(3)
    names = list(draw(sample, 5000, min_length=min_length, pattern=re.compile(match)))
    assert len(names) == 5000 and fits(names, expected)


@pytest.mark.parametrize(
    "point, start, top_k, name",
    [
        (0, "", None, "a"),  # END cannot be first, and then is the first that can
        (0, "c", None, "c"),
        (1 - 2**-53, "", None, None),  # c for ever
        (1 - 2**-53, "c", 1, "likeliest"),
        (0, "c", 1, "likeliest"),
    ],
)
def test_the_ends_of_the_range_of_random_numbers(monkeypatch, point, start, top_k, name):
    """The least and the greatest of rand() bring a character, and none of probability 0."""
    net, vocab = random_net(11, 4, 4, 3, 6), Vocabulary(["abc"])
    if name == "likeliest":
        (name,) = chances(net, vocab, start, 1.0, top_k, 50) or [None]
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype: torch.full(shape, point, dtype=dtype))
    assert generate(net, vocab, 3, start, top_k=top_k) == [name] * 3 * (name is not None)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30])
def test_extreme_temperatures(temperature):
    net, vocab = random_net(5, 4, 4, 3, 6), Vocabulary(["abc"])
    names = generate(net.float(), vocab, 4000, temperature=temperature)
    if temperature < 1:  # the likeliest character, always
        assert len(set(names)) == 1
    else:  # every character is as likely as the others
        firsts = Counter(name[0] for name in names)
        assert chisquare([firsts[char] for char in "abc"]).pvalue > 0.01


def never_ending():
    """A network that gives END next to no probability, and its vocabulary."""
    net = random_net(5, 4, 4, 3, 6)
    net[-1].bias.data[0] = -1e4
    return net, Vocabulary(["abc"])


def test_the_guard_stops_a_network_that_never_ends(tmp_path, refused, capsys):
    net, vocab = never_ending()
    assert generate(net, vocab, 5) == []
    assert generate(net, vocab, 5, "a" * LONGEST) == []
    save(tmp_path / "model.pth", net.float(), vocab, {})
    refused(main, ["--model", tmp_path / "model.pth"], "model.pth", f"{LONGEST:,} characters")


def test_an_expression_that_warns_is_quiet():
    process = run("sampling.py", "-n", 1, "--match", "[[a]")
    assert (process.returncode, process.stderr) == (0, "")


def test_weights_that_are_no_numbers():
    net, vocab = never_ending()
    net[-1].bias.data[1] = math.inf
    with pytest.raises(ValueError, match="weights"):
        generate(net, vocab, 5)


def test_no_names_are_cut():
    net, vocab = random_net(5, 4, 4, 3, 6), Vocabulary(["abc"])
    torch.manual_seed(1)
    names = generate(net, vocab, 1000)
    assert len(names) == 1000 and max(map(len, names)) > 10
    torch.manual_seed(1)
    assert generate(net, vocab, 1000) == names
    # The same random numbers make the same names, without those that are longer.
    torch.manual_seed(1)
    some = generate(net, vocab, 1000, max_length=4)
    assert some == [name for name in names if len(name) <= 4] and 500 < len(some) < 950


def test_draw_yields_what_is_wanted_and_no_more(capsys):
    draws, sizes = itertools.cycle(["ada", "bea", "bo"]), []

    def sample(size):
        sizes.append(size)
        return list(itertools.islice(draws, size))

    assert list(draw(sample, 5, 3)) == ["ada", "bea", "bo", "ada", "bea"]
    assert sizes == [3, 2]
    assert list(draw(sample, 3, 4, pattern=re.compile("^b"))) == ["bo", "bea", "bo"]
    assert capsys.readouterr() == ("", "")


def test_draw_ends_when_nothing_is_found(capsys):
    names = ["ada", "bea", "bo"]
    found = draw(lambda size: (names * size)[:size], 20, min_length=3, known=["ada"])
    assert list(found) == ["bea"]
    out, err = capsys.readouterr()
    (drawn,) = re.fullmatch(r"only 1 of 20 names found among ([0-9,]+) drawn\n", err).groups()
    assert out == "" and PATIENCE <= int(drawn.replace(",", "")) < PATIENCE + 2 * sampling.BATCH


def test_draw_counts_when_it_takes_long(monkeypatch, capsys):
    """A second passes at each look at the clock."""
    monkeypatch.setattr(sampling, "PAUSE", 2)
    monkeypatch.setattr(sampling.time, "monotonic", itertools.count().__next__)
    assert len(list(draw(lambda size: ["ada"] * size, 600, 100))) == 600
    counts = "".join(f"{n} of 600 names found among {n} drawn\n" for n in (300, 500))
    assert capsys.readouterr().err == counts


def test_scores_are_losses_of_the_plain_forward_pass():
    net, vocab = random_net(3, 4, 4, 3, 6), Vocabulary(["abc"])
    names = ["a", "cab", "x", "abcabcabcabcab", "cab", "a.b", "", "b" * 3 * LONGEST]
    losses = score(net, vocab, names)
    assert [i for i, loss in enumerate(losses) if loss == math.inf] == [2, 5]
    for name, loss in zip(names, losses):
        if loss < math.inf:
            codes = [0] * 4 + vocab.encode(name + ".")
            windows = torch.tensor(codes).unfold(0, 5, 1)
            with torch.no_grad():
                expected = torch.nn.functional.cross_entropy(net(windows[:, :4]), windows[:, 4])
            assert loss == pytest.approx(expected.item())
    assert score(net, vocab, ["x"]) == [math.inf] and score(net, vocab, []) == []


def test_score(tiny, tmp_path, monkeypatch):
    (tmp_path / "some.txt").write_bytes("\ufeffida\r\n\n  jo \nIda\nż\na.a\nida".encode())
    process = run("sampling.py", "--model", tiny / "model.pth", "--score", tmp_path / "some.txt")
    losses, names = zip(*(line.split("\t") for line in process.stdout.splitlines()))
    assert names == ("ida", "jo", "Ida", "ż", "a.a", "ida")
    assert [loss == "inf" for loss in losses] == [False, False, True, True, True, False]
    assert losses[0] == losses[5] != losses[1] and float(losses[0]) > 0
    assert process.stderr == "names with characters that the network does not know: 3\n"
    stdin = "".join(f"{name}\n" for name in names)
    again = run("sampling.py", "--model", tiny / "model.pth", "--score", "-", input=stdin)
    assert (again.stdout, again.stderr) == (process.stdout, process.stderr)


def test_the_form_that_is_known_is_meant_for_each_character():
    vocab = Vocabulary(["St. Éa"])
    with pytest.raises(ValueError, match="did you mean 'St. Éa'"):
        vocab.encode("sT. ÉA")


def test_new_knows_which_list_was_learnt(tiny, refused):
    refused(main, ["--model", tiny / "model.pth", "--new"], "--data LIST")
    assert forked(main, "--new", "-n", 3).returncode == 0  # the shipped network, and names.txt


def test_start_in_any_form_of_unicode(tmp_path):
    (tmp_path / "list.txt").write_text("zoë\n" * 10, encoding="utf-8")
    small = "--steps 20 --batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8".split()
    assert (
        forked(
            train.main, "--data", tmp_path / "list.txt", "--out", tmp_path / "own.pth", *small
        ).returncode
        == 0
    )
    process = forked(main, "--model", tmp_path / "own.pth", "--start", "zoe\u0308")
    assert process.returncode == 0 and all(
        name.startswith("zoë") for name in process.stdout.splitlines()
    )


def test_one_thread_unless_asked_for_more(tiny):
    torch.set_num_threads(2)
    for more, threads in ([], 1), (["--threads", "2"], 2):
        main(["--model", str(tiny / "model.pth"), *more])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)


def test_prints_names_one_a_line(tiny):
    process = run("sampling.py", "--model", tiny / "model.pth")
    assert (process.returncode, process.stderr) == (0, "")
    names = process.stdout.split("\n")
    assert names.pop() == ""
    assert len(names) == 20 and all(names) and "." not in process.stdout


def test_flags(tiny):
    model = "--model", tiny / "model.pth"
    one, two = (forked(main, *model, "--seed", 1, "-n", 5000).stdout for _ in range(2))
    assert one == two and len(one.splitlines()) == 5000
    assert forked(main, *model, "-n", 5000).stdout != forked(main, *model, "-n", 5000).stdout
    names = forked(
        main, *model, "--start", "ada", "--num-samples", 50, "--max-length", 6
    ).stdout.splitlines()
    assert len(names) == 50 and all(name.startswith("ada") and len(name) <= 6 for name in names)
    names = forked(main, *model, "--min-length", 4, "--match", "^[^a]*$").stdout.splitlines()
    assert len(names) == 20 and all(len(name) >= 4 and "a" not in name for name in names)
    same = forked(main, *model, "--top-k", 1, "--temperature", 3).stdout.splitlines()
    assert len(same) == 20 and len(set(same)) == 1
    assert forked(main, *model, "--start", "ada", "--max-length", 3, "-n", 1).stdout == "ada\n"


def test_new(tiny):
    names = (tiny / "names.txt").read_text().split()
    new = "--new", "--data", tiny / "names.txt", "--model", tiny / "model.pth"
    process = forked(main, *new, "-n", 300, "--max-length", 8)
    drawn = process.stdout.splitlines()
    assert (
        process.stderr == ""
        and len(drawn) == len(set(drawn)) == 300
        and not set(drawn) & set(names)
    )
    process = forked(main, *new, "-n", 300, "--max-length", 1)
    assert process.returncode == 0
    letters = set("".join(names))
    assert set(process.stdout.split()) == letters
    assert process.stderr.startswith(f"only {len(letters)} of 300 names found among ")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--start", "a1"], ["'1'"]),
        (["--start", "a.b"], ["'.'"]),
        (["--start", "abc", "--max-length", 2], ["--start", "--max-length"]),
        (["--min-length", 5, "--max-length", 4], ["--min-length", "--max-length"]),
        (["--start", "Ada"], ["'A'", "'ada'"]),
        (["--start", "aDa"], ["'D'", "'ada'"]),
        (["--data", "names.txt"], ["--new"]),
        (["--score", "/dev/zero"], ["/dev/zero holds more than"]),
        (["--match", "a("], ["--match", "a("]),
        (["--match", "a{99999999999999999999}"], ["--match"]),
        (["--score", "none.txt"], ["none.txt"]),
        (["-n", 0], ["-n"]),
        (["-n", "x"], ["-n"]),
        (["--temperature", 0], ["--temperature"]),
        (["--temperature", -1], ["--temperature"]),
        (["--temperature", "inf"], ["--temperature"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--top-k", 0], ["--top-k"]),
        (["--seed", -1], ["--seed"]),
        (["--seed", 2**64], ["--seed"]),
        (["--max-length", 0], ["--max-length"]),
        (["--max-length", LONGEST + 1], ["--max-length"]),
        (["--new", "--data", "none.txt"], ["none.txt"]),
        (["--model", "none.pth"], ["none.pth"]),
        (["--model", __file__], ["test_sampling.py"]),
    ],
)
def test_bad_input(tiny, refused, args, words):
    refused(main, ["--model", tiny / "model.pth", *args], *words)


def test_bad_input_of_the_process():
    process = run("sampling.py", "--start", "1")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("sampling.py: error: '1' is not among the characters")


def test_one_name_that_does_not_end_is_drawn_anew(monkeypatch, capsys):
    answers = iter([[], ["ada"]])
    monkeypatch.setattr(sampling, "generate", lambda *args: next(answers))
    sampling.main(["-n", "1"])
    assert capsys.readouterr().out == "ada\n"
