"""The split, the minibatches, the steps, measuring, what is kept, and edits of the network."""

import copy
import math
import random
import re
import runpy
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, forked
from scipy.optimize import minimize_scalar
from scipy.stats import chisquare
from test_model import slow_windows, twin
from torch.nn import functional as F

import layers
import train
from model import Vocabulary, WaveNet, contexts_and_targets, load, read_names, windows
from sampling import generate

NAMES = ["Ada", "Bea", "Cleo", "Dora", "Edda", "Finn"]
VOCAB = Vocabulary(NAMES)
TOKENS = windows(NAMES, VOCAB, 8)


def small(**changes):
    defaults = dict(steps=200, batch_size=32, block_size=8, n_embd=10, n_hidden=64, lr=0.1, seed=3)
    more = dict(dropout=0.0, truncate=0.0, device="cpu", checkpoint_every=10**9)
    return SimpleNamespace(**defaults | more | changes)


def trained(args, val=NAMES, pretrained=False, resume=None):
    """A training, or one from a saved state on -> the last network, and the states saved."""
    net, saved = train.new_network(args, VOCAB, TOKENS, None), []
    average, origin = copy.deepcopy(net), [p.detach().clone() for p in net.parameters()]
    state = dict(step=0, averaged=0, loss_sum=0.0, best={"loss": math.inf})
    state |= dict(curves={"train": [], "val": []}, pretrained=origin if pretrained else [])
    if resume:
        state = copy.deepcopy(resume)
        net.load_state_dict(state["state_dict"])
        average.load_state_dict(state["average"])
    state |= dict(state_dict=dict(net.state_dict()), average=dict(average.state_dict()))

    def save_state(state):
        saved.append(copy.deepcopy(state))

    train.train(net, average, VOCAB, TOKENS, windows(val, VOCAB, 8), args, state, save_state)
    return net.eval(), saved


def test_split_is_the_protocol():
    names = [f"name {i}" for i in range(29_693)]
    parts, shuffled = train.split(names), names.copy()
    random.Random(42).shuffle(shuffled)
    assert [len(parts[part]) for part in ("train", "test", "val")] == [23_754, 2_969, 2_970]
    assert parts["train"] + parts["test"] + parts["val"] == shuffled


def test_schedules():
    """The rate falls at half way; the longer a list, the more steps and the less dropout."""
    rates = [train.learning_rate(step, small(steps=10)) for step in range(10)]
    assert rates == pytest.approx([0.1] * 5 + [0.01] * 5)
    hparams = [train.default_hparams(10**i) for i in range(2, 9)]
    for one, two in zip(hparams, hparams[1:]):
        assert one["steps"] <= two["steps"] and 0 <= two["truncate"] <= one["truncate"] < 1
        assert 0 < two["dropout"] <= one["dropout"] < 1


def drawn(args):
    """All minibatches of a training, as contexts and targets: a twin has no fast way."""
    return list(train.minibatches(twin(len(VOCAB), 8, 1, 1), TOKENS, 0, args))


def test_minibatches_are_windows_drawn_evenly():
    possible = Counter((tuple(c), t) for c, t in slow_windows(NAMES, VOCAB, 8))
    contexts, targets = map(torch.cat, zip(*drawn(small())))
    counts = Counter(zip(map(tuple, contexts.tolist()), targets.tolist()))
    assert counts.keys() == possible.keys() and counts.total() == 6400
    expected = [possible[pair] * 6400 / possible.total() for pair in possible]
    assert chisquare([counts[pair] for pair in possible], expected).pvalue > 0.01


def test_truncate_keeps_the_last_2_to_8_tokens_of_a_share():
    contexts = torch.arange(1, 17).repeat(2, 20_000, 1)
    cut = train.truncate(contexts, 0.7, torch.Generator().manual_seed(0)).flatten(0, 1).tolist()
    counts = Counter(16 - context.count(0) for context in cut)
    assert all(c == [0] * c.count(0) + list(range(c.count(0) + 1, 17)) for c in cut)
    lengths = [*range(2, 9), 16]
    assert set(counts) == set(lengths)
    assert chisquare([counts[n] for n in lengths], [4_000] * 7 + [12_000]).pvalue > 0.01


def test_dropout_changes_dropout_alone_and_truncate_the_contexts_alone(tiny, tmp_path):
    plain, dropping, cutting = small(), small(dropout=0.3), small(truncate=0.5)
    for one, two, short in zip(*map(drawn, (plain, dropping, cutting))):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        assert torch.equal(one[1], short[1]) and not torch.equal(one[0], short[0])
    nets = [train.new_network(args, VOCAB, TOKENS, None) for args in (plain, dropping, cutting)]
    assert [[m.p for m in net if hasattr(m, "p")] for net in nets] == [[], [0.3] * 3, []]
    for weights in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    n = sum(
        len(name) + 1 for name in train.split((tiny / "names.txt").read_text().split())["train"]
    )
    for flag, value in ("dropout", 0.3), ("truncate", 0.2), ("steps", 40):
        args = ["--data", tiny / "names.txt", "--out", tmp_path / "own.pth", *SMALL]
        assert forked(train.main, *args, f"--{flag}", value).returncode == 0
        expected = train.default_hparams(n) | {"steps": 40, flag: value}
        metadata = load(tmp_path / "own.pth")[2]
        assert {name: metadata[name] for name in expected} == expected


def test_the_heads_bias_starts_at_the_frequencies():
    net = train.new_network(small(), VOCAB, TOKENS, None)
    text = "".join(f"\x0e{name.lower()}." for name in NAMES)
    expected = [text.count(char) + 0.5 for char in VOCAB.chars]
    assert net[-1].bias.exp().tolist() == pytest.approx([n / sum(expected) for n in expected])


@pytest.mark.parametrize("pretrained", [False, True])
def test_200_steps_are_those_of_torch_and_of_the_plain_way(pretrained, monkeypatch):
    """Each loss: in torch's layers, by autograd and SGD, where a penalty pulls matrices to 0 or to
    what they were; and, with and without dropout, by autograd through our layers."""
    net, same = train.new_network(small(), VOCAB, TOKENS, None), twin(len(VOCAB), 8, 10, 64)
    same.load_state_dict(net.state_dict())
    optimizer, losses = torch.optim.SGD(same.parameters()), []
    for step, (contexts, targets) in enumerate(drawn(small())):
        loss, penalty = F.cross_entropy(same(contexts), targets), 0
        losses.append(loss.item() * len(TOKENS) / sum(len(name) + 1 for name in NAMES))
        for now, origin in zip(same.parameters(), net.parameters()):
            if now.dim() == 2:
                away = now - origin.detach() if pretrained else now
                penalty = penalty + 60 / 12_000 / 2 * away.square().sum()
        optimizer.param_groups[0]["lr"] = 0.1 if step < 100 else 0.01
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
    curves = {}
    for way in layers.FAST, ():
        monkeypatch.setattr(layers, "FAST", way)
        for dropout in 0.0, 0.2:
            (state,) = trained(small(dropout=dropout), pretrained=pretrained)[1]
            curves[way, dropout] = torch.tensor([loss for _, loss in state["curves"]["train"]])
    fast = [key for key in curves if key[0]]
    torch.testing.assert_close(curves[fast[0]], torch.tensor(losses), rtol=0, atol=1e-4)
    for key in fast:
        torch.testing.assert_close(curves[key], curves[(), key[1]], rtol=0, atol=1e-5)
    assert not torch.equal(curves[fast[0]], curves[fast[1]])


def test_resuming_gives_the_same_bits():
    flags = dict(dropout=0.2, truncate=0.3, checkpoint_every=70)
    saved = trained(small(**flags))[1]
    assert [state["step"] for state in saved] == [70, 140, 200]
    again = trained(small(**flags), resume=saved[0])[1]
    torch.testing.assert_close(again[-1], saved[-1], rtol=0, atol=0)
    assert trained(small(**flags, seed=4))[1][-1]["curves"] != saved[-1]["curves"]


def test_average_is_a_mean_with_polynomial_weights():
    """Of every tenth step; the nth with a weight of about n^3."""
    saved = trained(small(checkpoint_every=10), val=NAMES * 200)[1]  # measured at the end alone
    assert len(saved) == 20 and len(saved[-1]["curves"]["val"]) == 1
    shares = [4 / (i + 4) * math.prod(j / (j + 4) for j in range(i + 1, 20)) for i in range(20)]
    assert sum(shares) == pytest.approx(1)
    for name in "0.weight", "3.weight", "10.weight", "13.bias":
        mean = sum(share * state["state_dict"][name] for share, state in zip(shares, saved))
        torch.testing.assert_close(saved[-1]["average"][name], mean, rtol=1e-4, atol=1e-5)


def plain_loss(net, names, vocab=VOCAB, scale=1.0):
    """Per character of the names and their ends, with the whole forward pass of all windows."""
    contexts, targets = map(torch.tensor, zip(*slow_windows(names, vocab, 8)))
    with torch.no_grad():
        logits = net[-1].bias + scale * (net.eval()(contexts) - net[-1].bias)
    total = F.cross_entropy(logits, targets, reduction="sum").item()
    return total / sum(len(name) + 1 for name in names)


def test_the_best_step_is_kept_and_written_with_its_heads_weight_scaled():
    val = ["Bo", "Edd", "Rod", "Fleo", "Cea"]
    net, (state,) = trained(small(dropout=0.1), val=val)
    best, curve = state["best"], state["curves"]["val"]
    assert (best["step"], best["loss"]) == min(curve, key=lambda point: point[1]) != curve[-1]
    net.load_state_dict(best["state_dict"])
    assert plain_loss(net, val, scale=best["scale"]) == pytest.approx(best["loss"], abs=1e-5)
    written, scale = train.finalize(net.config, best, TOKENS, windows(val, VOCAB, 8), VOCAB)
    assert not written.training and not [m for m in written if isinstance(m, layers.Dropout)]
    *others, weight, bias = net.parameters()
    torch.testing.assert_close(list(written.parameters()), [*others, weight * scale, bias])
    assert scale == pytest.approx(best["scale"], abs=0.051) and scale < 1
    assert plain_loss(written, val) == pytest.approx(best["loss"], abs=0.02)


@pytest.mark.parametrize("kind", [WaveNet, twin])
def test_statistics_are_means_and_variances_of_the_training_windows(kind):
    """Of our BatchNorm1d and of torch.nn's, whatever they were before, and without Dropout."""
    torch.manual_seed(0)
    net = kind(len(VOCAB), 8, 10, 16).insert(5, layers.Dropout(0.5))
    norms = [layer for layer in net if hasattr(layer, "running_mean")]
    for norm in norms:
        norm.running_mean += 9
    train.recompute_statistics(net, TOKENS, batches=100)
    x, _ = contexts_and_targets(TOKENS)
    assert len(norms) == 3 and not any(module.training for module in net.modules())
    for layer in net:
        if layer in norms:
            rows = x.flatten(0, -2)
            torch.testing.assert_close(layer.running_mean, rows.mean(0), rtol=0, atol=0.02)
            var = rows.var(0, unbiased=False)
            torch.testing.assert_close(layer.running_var, var, rtol=0.02, atol=0.01)
        x = layer(x)


@pytest.mark.parametrize("too_sure", [0.1, 0.9, 1.1, 1.5, 9.0])
def test_calibrate_takes_back_what_is_too_sure(too_sure):
    """On names that the network drew itself its own logits are the best ones."""
    net, _ = trained(small(steps=60))
    names = generate(net, VOCAB, 1000, max_length=30)
    net[-1].weight.data *= too_sure
    best = minimize_scalar(lambda scale: plain_loss(net, names, scale=scale), bounds=(0.3, 1.35))
    loss, scale = train.calibrate(net, windows(names, VOCAB, 8), VOCAB)
    assert scale == pytest.approx(best.x, abs=0.03)
    assert scale == pytest.approx(min(1.35, max(0.3, 1 / too_sure)), abs=0.08)
    for wanted, found in (
        (scale, loss),
        (0.7, train.evaluate(net, windows(names, VOCAB, 8), VOCAB, [0.7])[0]),
    ):
        assert found == pytest.approx(plain_loss(net, names, scale=wanted), abs=1e-5)


def test_a_short_list_is_learned_by_heart():
    net, _ = trained(small(steps=1500))
    names = generate(net, VOCAB, 1000)
    assert sum(name in NAMES for name in names) > 950 and set(NAMES) < set(names)
    # Nothing is left to know but which name it is: ln 6 spread over the characters of all names.
    least = 6 * math.log(6) / sum(len(name) + 1 for name in NAMES)
    assert train.evaluate(net, TOKENS, VOCAB) == [pytest.approx(least, abs=0.03)]


def test_the_shipped_network_has_the_losses_that_are_told():
    """Those that it records, and those of the README's row, recomputed from names.txt."""
    net, vocab, metadata = load(ROOT / "model_state.pth")
    parts, losses = train.split(read_names(ROOT / "names.txt")), {}
    for part, names in parts.items():
        tokens = windows(names, vocab, net.config["block_size"])
        (losses[part],) = train.evaluate(net, tokens, vocab)
    assert losses == pytest.approx(metadata["losses"], abs=1e-5)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \*\*shipped.*", readme, re.MULTILINE)
    if rows and "unseen" not in readme:
        told = re.findall(r"\b\d\.\d{3}\b", rows[0])
        assert told == [f"{losses[part]:.3f}" for part in ("train", "val", "test")]


# New text for old text of model.py, and whether the network still has the fast way.
OWN = """
class Own(nn.Module):
    def forward(self, x):
        self.mask = x > 0
        return x * self.mask
{}

class WaveNet("""
BACKWARD = """
    def backward(self, grad_out):
        return grad_out * self.mask
"""
NORM = "Linear(n_hidden, n_hidden, bias=False), BatchNorm1d(n_hidden), Tanh()]"
EDITS = {
    "own activation": ({"\nclass WaveNet(": OWN.format(""), "Tanh()]": "Own()]"}, False),
    "with backward": ({"\nclass WaveNet(": OWN.format(BACKWARD), "Tanh()]": "Own()]"}, False),
    "nn.GELU": ({"Tanh()]": "nn.GELU()]"}, False),
    "nn.Tanh": ({"Tanh()]": "nn.Tanh()]"}, False),
    "no BatchNorm": ({"BatchNorm1d(n_hidden), ": ""}, True),
    "bias": ({"bias=False": "bias=True"}, True),
    "no bias": ({"Linear(n_hidden, vocab_size": "Linear(n_hidden, vocab_size, bias=False"}, True),
    "two a level": ({"Tanh()]": f"Tanh(), {NORM}"}, True),
    "nn.Linear": ({" Linear(": " nn.Linear("}, False),
    "nn.BatchNorm1d": ({"(*layers, ": "(*layers, nn.BatchNorm1d(n_hidden), "}, False),
}
CHECK = """
import torch, layers, model
net, vocab, _ = model.load("own.pth")
print(layers.has_fast_way(net))
for name in model.read_names("names.txt"):
    tokens = torch.tensor([0] * 4 + vocab.encode(name + vocab.end)).unfold(0, 5, 1)
    loss = torch.nn.functional.cross_entropy(net(tokens[:, :4]), tokens[:, 4], reduction="sum")
    print(f"{loss.item() / (len(name) + 1)}\t{name}")
"""


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_network_trains_saves_loads_samples_and_scores(edit, tmp_path, monkeypatch):
    """The loss that --score prints is the cross-entropy of net(context)."""
    for file in "layers.py", "model.py", "train.py", "sampling.py":
        shutil.copy(ROOT / file, tmp_path)
    changes, fast = EDITS[edit]
    text = (tmp_path / "model.py").read_text()
    for old, new in changes.items():
        head, found, init = text.partition(old if old[0] == "\n" else "class WaveNet(")
        assert old in found + init
        text = head + (found + init).replace(old, new)
    (tmp_path / "model.py").write_text(text)
    (tmp_path / "check.py").write_text(CHECK)
    (tmp_path / "names.txt").write_text("\n".join(NAMES * 2 + ["Edo", "Bob", "Flo", "Rea"]))
    monkeypatch.chdir(tmp_path)

    def script(argv):
        """Run another one than those that this process has imported."""
        for name in "layers", "model", "train", "sampling":
            sys.modules.pop(name, None)
        sys.path[0], sys.argv = str(tmp_path), argv
        runpy.run_path(argv[0], run_name="__main__")

    outputs = []
    for command in (
        ["train.py", "--data", "names.txt", "--out", "own.pth", *SMALL],
        ["sampling.py", "--model", "own.pth", "-n", 5, "--max-length", 20],
        ["sampling.py", "--model", "own.pth", "--score", "names.txt"],
        ["check.py"],
    ):
        process = forked(script, *command)
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout.splitlines())
    assert len(outputs[1]) == 5 and outputs[3].pop(0) == str(fast)
