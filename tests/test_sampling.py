"""Names against the model's own probabilities, incremental against whole windows, and the flags."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import forked, run
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

import train
from model import Vocabulary, WaveNet
from sampling import Prefixes, generate, main, new_names


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
    """At every position, also past block_size, for beginnings that branch, merge their past and end."""
    net = random_net(seed, V, T, n_embd, n_hidden)
    with torch.no_grad():
        prefixes = Prefixes(net)
        texts = [[]]
        for _ in range(2 * T + 3):
            contexts = torch.tensor([([0] * T + text)[-T:] for text in texts])
            torch.testing.assert_close(prefixes.logits, net(contexts))
            parent, codes = torch.randint(len(texts), (5,)), torch.randint(V, (5,))
            prefixes.extend(parent, codes)
            texts = [texts[i] + [code] for i, code in zip(parent.tolist(), codes.tolist())]


def chances(net, vocab, start, temperature, top_k, max_length):
    """name -> its probability, multiplied up from the logits of whole windows."""
    block_size = 2 ** sum("Flatten" in repr(layer) for layer in net)
    result = Counter()

    def grow(name, chance):
        if len(name) == max_length:
            result[name] += chance
            return
        context = ([0] * block_size + vocab.encode(name))[-block_size:]
        weights = (net(torch.tensor([context]))[0] / temperature).exp()
        if not name:
            weights[0] = 0
        if top_k:
            weights[weights < weights.sort().values[-top_k]] = 0
        for char, weight in zip(vocab.chars, (weights / weights.sum()).tolist()):
            if weight:
                if char == ".":
                    result[name] += chance * weight
                else:
                    grow(name + char, chance * weight)

    with torch.no_grad():
        grow(start, 1.0)
    return result


@pytest.mark.parametrize(
    "start, temperature, top_k", [("", 1.0, None), ("", 0.5, None), ("", 2.0, 2), ("b", 1.0, None), ("ab", 1.3, 3)]
)
def test_frequencies_are_the_models_probabilities(start, temperature, top_k):
    net, vocab = random_net(5, 4, 4, 3, 6), Vocabulary(["abc"])
    expected = chances(net, vocab, start, temperature, top_k, 5)
    assert sum(expected.values()) == pytest.approx(1)
    torch.manual_seed(2)
    n = 20_000
    drawn = Counter(generate(net, vocab, n, start, temperature, top_k, 5))
    assert set(drawn) <= set(expected)
    common = [name for name in expected if expected[name] * n >= 5]
    rare = sum(expected[name] for name in expected if name not in common)
    observed = [drawn[name] for name in common] + [n - sum(drawn[name] for name in common)]
    wanted = [expected[name] * n for name in common] + [rare * n]
    if wanted[-1] < 5:
        wanted[-2:], observed[-2:] = [sum(wanted[-2:])], [sum(observed[-2:])]
    assert len(wanted) > 4
    assert chisquare(observed, wanted).pvalue > 0.01


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30])
def test_extreme_temperatures(temperature):
    net, vocab = random_net(5, 4, 4, 3, 6), Vocabulary(["abc"])
    names = generate(net.float(), vocab, 2000, temperature=temperature, max_length=3)
    if temperature < 1:  # the likeliest character, always
        assert len(set(names)) == 1
    else:  # every character is as likely as the others
        firsts = Counter(name[0] for name in names)
        assert chisquare([firsts[char] for char in "abc"]).pvalue > 0.01


def test_new_names_are_new_in_the_form_that_lists_are_read_in():
    draws = itertools.cycle([["ada ", " zoe\u0308", " ", "bea", "zoë"]])
    assert list(new_names(lambda: next(draws), ["ada", "bea"])) == ["zoë"]


def test_new_knows_which_list_was_learnt(tiny, refused):
    refused(main, ["--model", tiny / "model.pth", "--new"], "--data LIST")
    assert forked(main, "--new", "-n", 3).returncode == 0  # the shipped network, and names.txt


def test_start_in_any_form_of_unicode(tmp_path):
    (tmp_path / "list.txt").write_text("zoë\n" * 10, encoding="utf-8")
    small = "--steps 20 --batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8".split()
    assert forked(train.main, "--data", tmp_path / "list.txt", "--out", tmp_path / "own.pth", *small).returncode == 0
    process = forked(main, "--model", tmp_path / "own.pth", "--start", "zoe\u0308")
    assert process.returncode == 0 and all(name.startswith("zoë") for name in process.stdout.splitlines())


def test_one_thread_unless_asked_for_more(tiny):
    torch.set_num_threads(2)
    for more, threads in ([], 1), (["--threads", "2"], 2):
        main(["--model", str(tiny / "model.pth"), *more])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)


def test_new_names_ends_when_nothing_new_comes():
    draws = itertools.cycle([["ada", "bea"], ["bea", "cleo"]])
    assert list(new_names(lambda: next(draws), ["ada"])) == ["bea", "cleo"]


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
    names = forked(main, *model, "--start", "ada", "--num-samples", 50, "--max-length", 6).stdout.splitlines()
    assert len(names) == 50 and all(name.startswith("ada") and len(name) <= 6 for name in names)
    same = forked(main, *model, "--top-k", 1, "--temperature", 3).stdout.splitlines()
    assert len(same) == 20 and len(set(same)) == 1
    assert forked(main, *model, "--start", "ada", "--max-length", 3, "-n", 1).stdout == "ada\n"


def test_new(tiny):
    names = (tiny / "names.txt").read_text().split()
    new = "--new", "--data", tiny / "names.txt", "--model", tiny / "model.pth"
    process = forked(main, *new, "-n", 300, "--max-length", 8)
    drawn = process.stdout.splitlines()
    assert process.stderr == "" and len(drawn) == len(set(drawn)) == 300 and not set(drawn) & set(names)
    process = forked(main, *new, "-n", 300, "--max-length", 1)
    assert process.returncode == 0
    letters = set("".join(names))
    assert set(process.stdout.split()) == letters
    assert process.stderr == f"only {len(letters)} new names found\n"


@pytest.mark.parametrize(
    "args, words",
    [
        (["--start", "a1"], ["'1'"]),
        (["--start", "a.b"], ["'.'"]),
        (["--start", "abc", "--max-length", 2], ["--start", "--max-length"]),
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
