"""Windows, splits, minibatches, the schedule, the loss, averaging, and repeatable training."""

import math
import random
from collections import Counter
from itertools import islice
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

import sampling
import train
from layers import distinct_rows
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
    loss, grad = train.cross_entropy(logits.detach(), targets, B)
    assert loss == pytest.approx(expected.item())
    torch.testing.assert_close(grad, logits.grad)


def small(**changes):
    defaults = dict(steps=300, batch_size=16, block_size=4, dropout=0.0, lr=0.1, seed=3)
    return SimpleNamespace(**defaults | dict(device="cpu", checkpoint_every=10**9) | changes)


def drawn_windows(names, vocab, first, **changes):
    """What train.minibatches() drew, read off its trees: (context, target) of the codes."""
    window = windows(names, vocab, 4)
    batches = train.minibatches(window, len(vocab), first, small(**changes))
    for (levels, ids), targets in islice(batches, 100):
        rows = [(code,) for code in range(len(vocab))]
        for children, *_ in levels:
            rows = [rows[left] + rows[right] for left, right in children.view(-1, 2).tolist()]
        assert len(ids) == len(targets)
        yield from ((rows[i], code) for i, code in zip(ids, targets.tolist()))


def test_minibatches_are_windows_drawn_evenly():
    names = ["abcab", "cabbc", "acbaa"]
    vocab = Vocabulary(names)
    possible = Counter((tuple(context), code) for context, code in slow_windows(names, vocab, 4))
    drawn = Counter(drawn_windows(names, vocab, 0, batch_size=64))
    assert set(drawn) == set(possible)
    expected = [possible[pair] * drawn.total() / possible.total() for pair in possible]
    assert chisquare([drawn[pair] for pair in possible], expected).pvalue > 0.01
    assert drawn == Counter(drawn_windows(names, vocab, 0, batch_size=64))
    assert drawn != Counter(drawn_windows(names, vocab, 100, batch_size=64))


def test_dropout_cuts_contexts_short():
    """With 2 or 3 of the last characters left, in the share that goes with the dropout."""
    names = ["abcdefghij"] * 6
    vocab = Vocabulary(names)
    whole = {tuple(context) for context, _ in slow_windows(names, vocab, 4)}
    drawn = Counter(
        context
        for context, _ in drawn_windows(names, vocab, 0, batch_size=960, dropout=0.2)
        if context[-4:][0] or sum(map(bool, context)) < 4
    )
    cut = {context: count for context, count in drawn.items() if context not in whole}
    assert {len([code for code in context if code]) for context in cut} == {2, 3}
    # Of 11 windows the 7 that show more than 3 characters lose some for 2 of the 7 numbers of
    # characters left, and the one that shows 3 does for 1 of them.
    share = 0.4 * (7 * 2 / 7 + 1 / 7) / 11
    assert sum(cut.values()) / drawn.total() == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(
    "n, dropout, steps",
    [
        (183_802, 0.15, 200_000),
        (10**8, 0.023, 200_000),
        (33_619, 0.25, 43_704),
        (13_466, 0.25, 17_505),
        (8_000, 0.375, 15_000),
        (2_544, 0.4, 10_176),
    ],
)
def test_recipe(n, dropout, steps):
    assert train.recipe(n) == {"dropout": dropout, "steps": steps}


def test_recipe_grows_with_the_list():
    recipes = [train.recipe(10**i) for i in range(2, 9)]
    assert all(
        one["dropout"] >= two["dropout"] and one["steps"] <= two["steps"]
        for one, two in zip(recipes, recipes[1:])
    )


NAMES = ["ada", "bea", "cleo", "dora", "edda", "finn"]


def trained(args, names=NAMES):
    vocab = Vocabulary(names)
    window = windows(names, vocab, args.block_size)
    torch.manual_seed(args.seed)
    net = WaveNet(len(vocab), args.block_size, 8, 32, args.dropout)
    best, curves = train.train(net, vocab, window, window, args, id)
    config = {name: net.config[name] for name in net.config}
    return train.finished(config, best, window, window), vocab, (best, curves)


def test_the_same_seed_gives_the_same_bits():
    one, two, other = (trained(small(dropout=0.2, seed=seed)) for seed in (3, 3, 4))
    assert one[2][1] == two[2][1] != other[2][1]
    for name, tensor in one[0].state_dict().items():
        assert torch.equal(tensor, two[0].state_dict()[name])


def test_a_name_shown_on_the_way_changes_no_weight(monkeypatch):
    """However many random numbers it takes."""
    vocab, nets = Vocabulary(NAMES), []
    window = windows(NAMES, vocab, 4)
    for shown in (lambda *args, **kwargs: []), (lambda *args, **kwargs: [str(torch.rand(7))]):
        monkeypatch.setattr(sampling, "generate", shown)
        torch.manual_seed(1)
        net = WaveNet(len(vocab), 4, 8, 32, 0.2)
        train.train(net, vocab, window, window, small(dropout=0.2), id)
        nets.append(net)
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)


def test_of_a_large_list_the_first_rows_are_measured(tmp_path, monkeypatch):
    """Of each split the first windows, enough for a standard error below the limit."""
    names = read_names(ROOT / "names.txt")[:3000]
    (tmp_path / "list.txt").write_text("\n".join(names))
    monkeypatch.setattr(train, "ERROR", 0.02)  # 8,192 windows or less, for deviations below 1.8
    monkeypatch.setattr(train, "VALIDATED", 200)
    validated = []
    monkeypatch.setattr(
        train, "best_scale", lambda net, window, *_: validated.append(len(window)) or (1.0, 1.0)
    )
    out = tmp_path / "own.pth"
    sizes = "--steps 20 --batch-size 8 --block-size 4 --n-embd 4 --n-hidden 8".split()
    train.main(["--data", str(tmp_path / "list.txt"), "--out", str(out), *sizes])
    assert set(validated) == {200}
    net, vocab, made = load(out)
    first, test, val = train.split(names)
    for part, rows in ("train", first), ("test", test), ("val", val):
        contexts, targets = contexts_and_targets(windows(rows, vocab, 4)[:8192])
        with torch.no_grad():
            losses = F.cross_entropy(net(contexts), targets, reduction="none")
        assert made["losses"][part] == pytest.approx(losses.mean().item(), abs=1e-5)
        assert len(losses) < 8192 or losses.std() / len(losses) ** 0.5 < 0.02


def test_a_short_list_is_learnt_by_heart():
    net, vocab, _ = trained(small(steps=2000, block_size=8))
    drawn = generate(net.eval(), vocab, 1000)
    assert sum(name in NAMES for name in drawn) > 950
    assert set(NAMES) < set(drawn)
    # Nothing is left to know but which name it is: ln 6 spread over the characters of all names.
    window = windows(NAMES, vocab, 8)
    assert train.evaluate(net, window)[0] == pytest.approx(6 * math.log(6) / len(window), abs=0.03)


@pytest.mark.parametrize("weight_decay, begun", [(0.0, False), (0.05, False), (0.05, True)])
def test_200_steps_are_those_of_torch(weight_decay, begun):
    """Every loss against torch's layers, autograd and SGD on the same minibatches, and the weights.

    Matrices decay to 0 or, begun from a trained network, to what they were: with a penalty of
    weight_decay / 2 times the square of the difference.
    """
    vocab = Vocabulary(NAMES)
    window = windows(NAMES, vocab, 8)
    torch.manual_seed(0)
    ours, same = WaveNet(len(vocab), 8, 10, 64), twin(len(vocab), 8, 10, 64)
    same.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD(same.parameters(), lr=0.1)
    parameters, generator = list(ours.parameters()), torch.Generator().manual_seed(1)
    origin = [parameter.detach().clone() for parameter in parameters] if begun else []
    for _ in range(200):
        drawn = window[torch.randint(len(window), (32,), generator=generator)]
        contexts, targets = contexts_and_targets(drawn)
        loss = F.cross_entropy(same(contexts), targets)
        penalty = 0
        for i, parameter in enumerate(same.parameters()):
            if parameter.dim() == 2:
                away = parameter - origin[i] if begun else parameter
                penalty = penalty + weight_decay / 2 * away.square().sum()
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        (tree,) = distinct_rows(contexts[None], len(vocab))
        ours_loss = train.sgd_step(ours, parameters, tree, targets, 32, 0.1, weight_decay, origin)
        assert ours_loss == pytest.approx(loss.item(), abs=1e-3)
    for mine, theirs in zip(parameters, same.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def weights_of_every_step(monkeypatch):
    seen = []
    original = train.sgd_step

    def watched(net, parameters, *rest):
        loss = original(net, parameters, *rest)
        seen.append([parameter.detach().clone() for parameter in parameters])
        return loss

    monkeypatch.setattr(train, "sgd_step", watched)
    return seen


def test_average_is_a_mean_with_polynomial_weights(monkeypatch):
    """Of a run watched from outside, every tenth step; the nth with a weight of about n^3."""
    seen = weights_of_every_step(monkeypatch)
    vocab, args = Vocabulary(NAMES), small(steps=300)
    window = windows(NAMES, vocab, 4)
    net = WaveNet(len(vocab), 4, 8, 32)
    losses = iter(range(100, 0, -1))
    monkeypatch.setattr(train, "best_scale", lambda *args: (float(next(losses)), 1.0))
    best, curves = train.train(net, vocab, window, windows(NAMES * 43, vocab, 4), args, id)
    assert len(seen) == 300 and best["step"] == 300
    n = 30
    weights = torch.tensor(
        [4 / (i + 4) * math.prod(i2 / (i2 + 4) for i2 in range(i + 1, n)) for i in range(n)]
    )
    assert weights.sum().item() == pytest.approx(1)
    expected = [
        (torch.stack(steps) * weights.view(-1, *[1] * steps[0].dim())).sum(0)
        for steps in zip(*seen[9 : 10 * n : 10])
    ]
    kept = [best["state_dict"][name] for name, _ in net.named_parameters()]
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)


def test_the_step_of_least_validation_loss_is_kept(monkeypatch):
    """Whatever is validated, at the right steps, and the last one always."""
    losses = iter([3.0, 2.0, 1.0, 1.5, 1.0, 2.0, 4.0])
    validated = []

    def best_scale(net, window, scale, step):
        validated.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
        return next(losses), 0.9

    monkeypatch.setattr(train, "best_scale", best_scale)
    vocab = Vocabulary(NAMES)
    window = windows(NAMES, vocab, 4)
    net = WaveNet(len(vocab), 4, 8, 32)
    best, curves = train.train(
        net, vocab, window, windows(NAMES * 43, vocab, 4), small(steps=420), id
    )
    assert curves["val"] == list(
        zip([60, 120, 180, 240, 300, 360, 420], [3.0, 2.0, 1.0, 1.5, 1.0, 2.0, 4.0])
    )
    assert (best["step"], best["loss"], best["scale"]) == (180, 1.0, 0.9)
    torch.testing.assert_close(best["state_dict"], validated[2], rtol=0, atol=0)


def test_statistics_are_those_of_the_training_windows(monkeypatch):
    """Of the weights as they are, at every validation and at the end; in training none."""
    validated = []

    def check(net, window, scales=(1,)):
        contexts, _ = contexts_and_targets(window)
        first = (net[1](net[0](contexts)) @ net[2].weight.T).flatten(0, 1)
        torch.testing.assert_close(net[3].running_mean, first.mean(0), rtol=0, atol=0.05)
        torch.testing.assert_close(net[3].running_var, first.var(0), rtol=0.1, atol=0.02)
        validated.append(net)
        return [0.0] * len(scales)

    monkeypatch.setattr(train, "evaluate", check)
    trained(small(steps=300))
    assert len(validated) >= 42  # 40 and the last, each where it is least, at one look or more


@pytest.mark.parametrize(
    "too_sure, found", [(1.1, 1 / 1.1), (0.9, 1 / 0.9), (1.5, 1 / 1.5), (9.0, 0.45), (0.1, 1.35)]
)
def test_scale_takes_back_what_is_too_sure(too_sure, found):
    """On names that the network drew itself, its own logits are the best ones."""
    net, vocab, _ = trained(small(steps=100))
    window = windows(generate(net, vocab, 5000), vocab, 4)
    contexts, targets = contexts_and_targets(window)
    net[-1].weight.data *= too_sure
    net[-1].bias.data *= too_sure
    with torch.no_grad():
        logits = net(contexts)
    expected = minimize_scalar(
        lambda scale: F.cross_entropy(scale * logits, targets).item(),
        bounds=(0.45, 1.35),
        method="bounded",
    )
    loss, scale = train.best_scale(net, window, 1.0, 0.05)
    scales = [percent / 100 for percent in range(45, 136, 5)]
    assert (loss, scale) == min(zip(train.evaluate(net, window, scales), scales))
    assert scale == pytest.approx(expected.x, abs=0.026) == pytest.approx(found, abs=0.06)
    assert loss == pytest.approx(F.cross_entropy(scale * logits, targets).item(), abs=1e-5)
    loss, scale = train.best_scale(net, window, scale, 0.01)
    assert scale == pytest.approx(
        minimize_scalar(lambda scale: F.cross_entropy(scale * logits, targets).item()).x, abs=0.006
    ) or found in (0.45, 1.35)


def test_finished_network_is_the_best_one_scaled(monkeypatch):
    vocab = Vocabulary(NAMES)
    window = windows(NAMES, vocab, 4)
    net = WaveNet(len(vocab), 4, 8, 32, 0.1)
    best, _ = train.train(net, vocab, window, window, small(steps=300, dropout=0.1), id)
    kept = train.finished(net.config, best, window, window)
    assert not kept.training and "Dropout" not in repr(kept)
    loss, scale = (
        train.evaluate(kept, window)[0],
        kept[-1].weight[0, 0].item() / list(best["state_dict"].values())[-2][0, 0].item(),
    )
    assert loss == pytest.approx(best["loss"], abs=0.02) and scale == pytest.approx(
        best["scale"], abs=0.051
    )


def test_evaluate_is_the_mean_over_all_windows():
    net, vocab, _ = trained(small(steps=50))
    window = windows(NAMES, vocab, 4)
    contexts, targets = contexts_and_targets(window)
    expected = F.cross_entropy(net.eval()(contexts), targets).item()
    assert train.evaluate(net, windows(NAMES * 500, vocab, 4))[0] == pytest.approx(
        expected, abs=1e-5
    )


def test_shipped_checkpoint_has_the_readmes_losses():
    """All four losses, recomputed from names.txt with the whole windows, to three decimals."""
    net, vocab, made = load(ROOT / "model_state.pth")
    parts = dict(zip(("train", "test", "val"), train.split(read_names(ROOT / "names.txt"))))
    parts["unseen"] = [name for name in parts["val"] if name not in set(parts["train"])]
    losses, block_size = {}, made["block_size"]
    for part, names in parts.items():
        window = windows(names, vocab, block_size)
        (losses[part],) = train.evaluate(net, window)
        assert losses[part] == pytest.approx(made["losses"][part], abs=1e-5)
    contexts, targets = contexts_and_targets(windows(parts["val"], vocab, block_size))
    with torch.no_grad():
        plain = F.cross_entropy(
            torch.cat([net.eval()(part) for part in contexts.split(4096)]), targets
        ).item()
    assert plain == pytest.approx(losses["val"], abs=1e-5)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith("| **shipped")]
    assert [f"{losses[part]:.3f}" for part in ("train", "val", "unseen", "test")] == [
        cell.strip(" *") for cell in row.split("|")[3:7]
    ]
