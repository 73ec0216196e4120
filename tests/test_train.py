"""Windows, splits, minibatches, the schedule, the loss, averaging, and repeatable training."""

import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import chisquare
from test_model import twin
from torch.nn import functional as F

import train
from layers import share
from model import Vocabulary, WaveNet, contexts_and_targets, load, read_names, windows
from sampling import generate

name_lists = st.lists(st.text("abcdé", min_size=1, max_size=20), min_size=1, max_size=8)


def slow_windows(names, vocab, block_size):
    """One context and target after the other, in plain Python."""
    pairs = []
    for name in names:
        context = [0] * block_size
        for char in name + ".":
            code = vocab.chars.index(char)
            pairs.append((context, code))
            context = context[1:] + [code]
    return pairs


@given(name_lists, st.sampled_from([2, 4, 8, 16]))
def test_windows(names, block_size):
    vocab = Vocabulary(names)
    window = windows(names, vocab, block_size)
    contexts, targets = contexts_and_targets(window)
    assert list(zip(contexts.tolist(), targets.tolist())) == slow_windows(names, vocab, block_size)
    assert contexts.dtype == targets.dtype == torch.int64


def test_windows_are_a_view_of_one_byte_a_character():
    names = ["ada", "bea"] * 500
    window = windows(names, Vocabulary(names), 16)
    assert window.untyped_storage().nbytes() == 16 + 4 * len(names)


def test_more_than_256_characters():
    names = [chr(0x4E00 + i) for i in range(300)]
    vocab = Vocabulary(names)
    _, targets = contexts_and_targets(windows(names, vocab, 4))
    assert vocab.decode(targets.tolist()) == ".".join(names) + "."


def test_split_is_the_protocols():
    names = read_names(ROOT / "names.txt")
    assert (len(names), len(set(names))) == (32_257, 29_693)
    shuffled = list(names)
    random.seed(42)
    random.shuffle(shuffled)
    first, second = int(0.8 * len(names)), int(0.9 * len(names))
    assert train.split(names) == (shuffled[:first], shuffled[first:second], shuffled[second:])


@pytest.mark.parametrize("n", range(1, 12))
def test_split_refuses_too_few(n):
    names = [str(i) for i in range(n)]
    if n >= 6:
        assert all(train.split(names)) and sorted(sum(train.split(names), [])) == sorted(names)
    else:
        with pytest.raises(ValueError, match="too few"):
            train.split(names)


def test_learning_rate():
    rates = [train.learning_rate(step, 200_000, 0.1) for step in (0, 99_999, 100_000, 199_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])


@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 2**32))
def test_cross_entropy(B, V, seed):
    torch.manual_seed(seed)
    logits, targets = torch.randn(B, V).double().requires_grad_(), torch.randint(V, (B,))
    expected = F.cross_entropy(logits, targets)
    expected.backward()
    loss, grad = train.cross_entropy(logits.detach(), targets)
    assert loss == pytest.approx(expected.item())
    torch.testing.assert_close(grad, logits.grad)


def small(**changes):
    defaults = dict(steps=300, batch_size=16, block_size=4, dropout=0.0, lr=0.1, seed=3)
    return SimpleNamespace(**defaults | dict(device="cpu", checkpoint_every=10**9) | changes)


def test_minibatches_are_windows_drawn_evenly():
    names = ["abcab", "cabbc", "acbaa"]
    vocab = Vocabulary(names)
    possible = Counter((tuple(context), code) for context, code in slow_windows(names, vocab, 4))
    window = windows(names, vocab, 4)
    drawn = Counter()
    for (levels, ids), targets in train.draw(window, len(vocab), 0, small(batch_size=64)):
        rows = [(code,) for code in range(len(vocab))]
        for children, *_ in levels:
            rows = [rows[left] + rows[right] for left, right in children.view(-1, 2).tolist()]
        assert len(ids) == len(targets) == 64
        drawn.update((rows[i], code) for i, code in zip(ids, targets.tolist()))
    assert set(drawn) == set(possible)
    expected = [possible[pair] * drawn.total() / possible.total() for pair in possible]
    assert chisquare([drawn[pair] for pair in possible], expected).pvalue > 0.01


NAMES = ["ada", "bea", "cleo", "dora", "edda", "finn"]


def trained(args, names=NAMES):
    vocab = Vocabulary(names)
    window = windows(names, vocab, args.block_size)
    torch.manual_seed(args.seed)
    net = WaveNet(len(vocab), args.block_size, 8, 32, args.dropout)
    curves = train.train(net, window, window, args)
    return net, vocab, curves


def test_the_same_seed_gives_the_same_bits():
    one, two, other = (trained(small(dropout=0.2, seed=seed)) for seed in (3, 3, 4))
    assert one[2] == two[2] != other[2]
    for name, tensor in one[0].state_dict().items():
        assert torch.equal(tensor, two[0].state_dict()[name])


def test_a_short_list_is_learnt_by_heart():
    net, vocab, _ = trained(small(steps=2000, block_size=8))
    drawn = generate(net.eval(), vocab, 1000)
    assert sum(name in NAMES for name in drawn) > 950
    assert set(NAMES) < set(drawn)
    # Nothing is left to know but which name it is: ln 6 spread over the characters of all names.
    window = windows(NAMES, vocab, 8)
    assert train.evaluate(net, window) == pytest.approx(6 * math.log(6) / len(window), abs=0.03)


def test_200_steps_are_those_of_torch():
    """The loss of every step against torch's own layers, autograd and SGD on the same minibatches."""
    vocab = Vocabulary(NAMES)
    window = windows(NAMES, vocab, 8)
    torch.manual_seed(0)
    ours, same = WaveNet(len(vocab), 8, 10, 64), twin(len(vocab), 8, 10, 64)
    same.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD(same.parameters(), lr=0.1)
    parameters, generator = list(ours.parameters()), torch.Generator().manual_seed(1)
    for _ in range(200):
        drawn = window[torch.randint(len(window), (32,), generator=generator)]
        contexts, targets = contexts_and_targets(drawn)
        loss = F.cross_entropy(same(contexts), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        (tree,) = share(contexts[None], len(vocab))
        assert train.sgd_step(ours, parameters, tree, targets, 0.1) == pytest.approx(loss.item(), abs=1e-3)


def test_average_is_the_mean_over_the_last_quarter(monkeypatch):
    """Weights of a run that is watched from outside, every tenth step counted back from the last."""
    seen = []
    original = train.sgd_step

    def watched(net, parameters, *rest):
        loss = original(net, parameters, *rest)
        seen.append([parameter.detach().clone() for parameter in parameters])
        return loss

    monkeypatch.setattr(train, "sgd_step", watched)
    net, *_ = trained(small(steps=100))
    expected = [torch.stack(weights).mean(0) for weights in zip(*seen[79::10])]
    torch.testing.assert_close(list(net.parameters()), expected)
    assert len(seen) == 100


def test_statistics_are_those_of_the_training_windows(monkeypatch):
    """Of the weights as they are, whenever the network is validated, and at the end."""
    vocab, validated = Vocabulary(NAMES), []

    def check(net, window):
        contexts, _ = contexts_and_targets(window)
        first = (net[1](net[0](contexts)) @ net[2].weight.T).flatten(0, 1)
        torch.testing.assert_close(net[3].running_mean, first.mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(net[3].running_var, first.var(0), rtol=0.05, atol=0.02)
        validated.append(net)
        return 0.0

    monkeypatch.setattr(train, "evaluate", check)
    net, *_ = trained(small(steps=1000))
    assert len(validated) == 1
    check(net, windows(NAMES, vocab, 4))
    assert net[3].momentum == 0.1


@pytest.mark.parametrize("too_sure, left", [(1.1, 1.0), (0.9, 1.0), (9.0, 9 * 0.8), (0.1, 0.1 * 1.25)])
def test_calibrate_takes_back_what_is_too_sure(too_sure, left):
    """On names that the network drew itself, its own logits are the best ones; a factor of 0.8 to 1.25 is found."""
    net, vocab, _ = trained(small(steps=100))
    window = windows(generate(net.eval(), vocab, 5000), vocab, 4)
    contexts, targets = contexts_and_targets(window)
    net[-1].weight.data *= too_sure
    net[-1].bias.data *= too_sure
    before, logits = net[-1].weight.data.clone(), net(contexts)

    def loss(scale):
        return F.cross_entropy(scale * logits, targets).item()

    scale = minimize_scalar(loss, bounds=(0.8, 1.25), method="bounded").x
    train.calibrate(net, window)
    torch.testing.assert_close(net[-1].weight.data, before * scale, rtol=5e-3, atol=0)
    torch.testing.assert_close(net(contexts), logits * scale, rtol=5e-3, atol=1e-5)
    assert scale * too_sure == pytest.approx(left, rel=0.03)


def test_evaluate_is_the_mean_over_all_windows():
    net, vocab, _ = trained(small(steps=50))
    window = windows(NAMES, vocab, 4)
    contexts, targets = contexts_and_targets(window)
    expected = F.cross_entropy(net.eval()(contexts), targets).item()
    assert train.evaluate(net, window, batch_size=7) == pytest.approx(expected, abs=1e-5)


def test_shipped_checkpoint_has_the_readmes_losses():
    """All four losses, recomputed from names.txt with the whole windows, to three decimals."""
    net, vocab, made = load(ROOT / "model_state.pth")
    parts = dict(zip(("train", "test", "val"), train.split(read_names(ROOT / "names.txt"))))
    parts["unseen"] = [name for name in parts["val"] if name not in set(parts["train"])]
    losses, block_size = {}, made["block_size"]
    for part, names in parts.items():
        window = windows(names, vocab, block_size)
        losses[part] = train.evaluate(net, window)
        assert losses[part] == pytest.approx(made["losses"][part], abs=1e-5)
    contexts, targets = contexts_and_targets(windows(parts["val"], vocab, block_size))
    with torch.no_grad():
        plain = F.cross_entropy(torch.cat([net.eval()(part) for part in contexts.split(4096)]), targets).item()
    assert plain == pytest.approx(losses["val"], abs=1e-5)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith("| **shipped")]
    assert [f"{losses[part]:.3f}" for part in ("train", "val", "unseen", "test")] == [
        cell.strip(" *") for cell in row.split("|")[3:7]
    ]
