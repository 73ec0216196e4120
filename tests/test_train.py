"""The split, the minibatches, the steps, measuring, what is kept, and edits of the network."""

import copy
import importlib
import math
import random
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, SIZES, forked, twin
from kneser_ney import END, KneserNey
from scipy.optimize import minimize_scalar
from scipy.stats import chisquare
from torch.nn import functional as F
from torch.testing import assert_close

import layers
import train
from model import Vocabulary, WaveNet, contexts_and_targets, layer_names, load, windows
from plumbing import fast, recipe, runs
from plumbing.lists import read_names
from sampling import generate

SIX = ["Ada", "Bea", "Cleo", "Dora", "Edda", "Finn"]
N_CHARACTERS = sum(len(name) + 1 for name in SIX)
VOCAB = Vocabulary(SIX)
TOKENS = windows(SIX, VOCAB, 8)
VAL = ["Bo", "Edd", "Rod", "Fleo", "Cea"]


def flags(**changes):
    defaults = dict(steps=200, batch_size=32, block_size=8, n_embd=10, n_hidden=64, lr=0.1, seed=3)
    more = dict(dropout=0.0, truncate=0.0, smoothing=0.0, device="cpu", checkpoint_every=10**9)
    return SimpleNamespace(**defaults | more | changes)


def network(args):
    return train.new_network(args, VOCAB, TOKENS, None)


TENSORS = [name for name in runs.STATE if name not in ("layers", "names", "args")]


class Recorded(runs.Run):
    """A run whose states, the numbers in them, go to a list, not to a file."""

    def save(self):
        self.saved.append(copy.deepcopy({name: getattr(self, name) for name in TENSORS}))


def trained(args, val=SIX, pretrained=False, resume=None):
    """A training, or one from a saved state on -> the network to be written, the states saved."""
    net, average, data = network(args), network(args), {"val": windows(val, VOCAB, 8)}
    data["train"] = TOKENS
    if resume:
        resume = copy.deepcopy(resume) | {"layers": layer_names(net), "names": "the list"}
    setup = runs.Setup("", "", "", resume, (network(args),) if pretrained else None)
    run = Recorded(args, setup, net, average, "the list")
    run.saved = []
    train.train(net, average, VOCAB, data, args, run)
    return train.finalize(net.config, run.best, data, VOCAB)[0], run.saved


def plain_loss(net, names, scale=1.0, vocab=VOCAB):
    """Per character of the names and their ends, by net(contexts); its head's weight scaled."""
    net = copy.deepcopy(net.eval())
    net[-1].weight.data *= scale
    contexts, targets = contexts_and_targets(windows(names, vocab, net.config["block_size"]))
    with torch.no_grad():
        loss = F.cross_entropy(net(contexts), targets, reduction="sum").item()
    return loss / sum(len(name) + 1 for name in names)


def test_the_distinct_names_of_names_txt_are_split_by_the_protocol():
    names = list(dict.fromkeys((ROOT / "names.txt").read_text().split()))
    assert read_names(ROOT / "names.txt") == names and len(names) == 29_693
    parts = train.split(names)
    random.Random(42).shuffle(names)
    assert [len(parts[part]) for part in ("train", "test", "val")] == [23_754, 2_969, 2_970]
    assert parts["train"] + parts["test"] + parts["val"] == names


def test_truncate_hides_all_but_the_last_2_to_8_tokens_of_a_share():
    contexts, counts = torch.arange(1, 17).repeat(2, 20_000, 1), Counter()
    for context in recipe.truncate(contexts, 0.7, 99, torch.Generator()).flatten(0, 1).tolist():
        counts[n := 16 - context.count(99)] += 1
        assert context == [99] * (16 - n) + list(range(17 - n, 17)) and (2 <= n <= 8 or n == 16)
    found = [counts[n] for n in (2, 3, 4, 5, 6, 7, 8, 16)]
    assert chisquare(found, [4_000] * 7 + [12_000]).pvalue > 0.01
    begun = torch.tensor([[0] * 12 + [5, 6, 7, 8]] * 99)  # padding tells how long the name is
    hidden = {tuple(row[12:]) for row in recipe.truncate(begun, 1, 9, torch.Generator()).tolist()}
    assert hidden == {(9, 9, 7, 8), (9, 6, 7, 8), (5, 6, 7, 8)}


def test_what_is_hidden_is_a_row_of_its_own_or_padding_where_there_is_none():
    args = flags(truncate=1.0, steps=20)
    net = network(args)
    for embedding, mask in (net[0], len(VOCAB)), (torch.nn.Embedding(len(VOCAB), 10), 0):
        net[0] = embedding
        batches = [rows.contexts for rows, _ in train.minibatches(net, TOKENS, 0, args)]
        assert max(batch.max() for batch in batches) == max(mask, len(VOCAB) - 1)


def test_smoothing_is_kneser_ney_of_all_windows_but_each_ones_own():
    names = ["anna", "ann", "hanna", "joanna", "nan", "banana", "ana", "bea", "beanna"]
    vocab, text, expected = Vocabulary(names), "".join(name + END for name in names), []
    for i in range(len(text)):
        counts, before = KneserNey(names, text, without=i), text[:i].rpartition(END)[2]
        expected.append([counts.chance(char, before) for char in [END, *vocab.chars[1:]]])
    tokens = windows(names, vocab, 8)
    onehot = F.one_hot(tokens[:, -1].long(), len(vocab))
    for share in 0.0, 0.3, 1.0:
        smoothed = recipe.smooth_targets(tokens, len(vocab), share)
        assert_close(smoothed, (1 - share) * onehot + share * torch.tensor(expected))


def test_smoothing_is_refused_where_its_table_would_be_too_large():
    tokens = TOKENS[:1].expand(2**20, -1)
    with pytest.raises(ValueError, match="leave it out"):
        recipe.smooth_targets(tokens, 17, 0.3)
    shares = [recipe.default_hparams(n, 1000)["smoothing"] for n in (2**24 // 1000, 2**15)]
    assert shares[0] == 0 < recipe.default_hparams(2**24 // 27, 27)["smoothing"]
    assert shares[1] == 0 == recipe.default_hparams(2**24 // 27 + 1, 27)["smoothing"]


def test_steps_are_60_for_each_window_per_token():
    def steps(n, vocab_size):
        return recipe.default_hparams(n, vocab_size)["steps"]

    assert [steps(n, 30) for n in (500, 5_000, 10**9)] == [1_000, 10_000, 200_000]
    assert steps(1_800, 400) == 270 and steps(26_000, 2_400) == 2_600  # at most 600 tokens count


def test_lengths_are_as_far_apart_as_their_histograms():
    assert recipe.length_distance(["a", "bb"], ["a", "b", "ccc"]) == pytest.approx(1 / 2)
    assert recipe.length_distance(["ab", "cd"], ["xy"]) == 0
    assert recipe.length_distance([], ["a"]) == 1  # no name at all is not like the list


def test_the_commonest_new_name_is_in_no_form_in_the_list():
    drawn = ["Ann", "ann", "ANN", "Bo", "Bo", "Cleo"]
    assert recipe.commonest_new(drawn, ["anN"]) == (2 / 6, "bo")
    assert recipe.commonest_new(drawn[:3], ["Ann"]) == (0, "")


FEW = [f"{a}{b}" for a in "abcdefghij" for b in "uvwxyz"] * 2  # each 1.7 % of the draws
MANY = [f"{a}{b}{c}" for a in "abcdefg" for b in "uvwxyz" for c in "abcdef"]  # each 0.4 %


@pytest.mark.parametrize(
    ("listed", "draws", "chosen"),
    [
        ("ann", [MANY, MANY + ["a"] * 50, MANY, MANY], 1.0),  # where they are equal, the first
        ("ann", [MANY + ["a"], MANY + ["b"], MANY, MANY], 0.8),  # lengths most like the list's
        ("so", [FEW, FEW, FEW, MANY], 0.7),  # the others have those, but favourites
        ("ann", [MANY + ["ada"] * n for n in (9, 8, 5, 7)], 0.8),  # the least of a favourite
        ("ann", [[], [], [], MANY], 0.7),
    ],
)
def test_the_temperature_has_lengths_of_the_list_and_no_favourites(
    monkeypatch, listed, draws, chosen
):
    given = dict(zip(recipe.TEMPERATURES, draws))
    monkeypatch.setattr(recipe, "generate", lambda *args: given[args[4]])
    assert recipe.choose_temperature(None, "abc", [listed], 1, 9) == (chosen, given[chosen])


def drawn(args):
    """The contexts and targets of all minibatches of a training."""
    batches = train.minibatches(network(args), TOKENS, 0, args)
    return [(rows.contexts, targets) for rows, targets in batches]


def test_dropout_truncate_and_smoothing_change_nothing_else(tiny, tmp_path):
    every = flags(), flags(dropout=0.3), flags(truncate=0.5), flags(smoothing=0.5)
    pairs = (map(torch.cat, zip(*drawn(each))) for each in every)
    (contexts, targets), dropping, cutting, (same_contexts, smoothed) = pairs
    assert_close([contexts, targets], list(dropping), rtol=0, atol=0)
    assert not torch.equal(targets[:3200], targets[3200:])  # a hundred steps are drawn at once
    shorter, same_targets = cutting
    assert torch.equal(targets, same_targets) and not torch.equal(contexts, shorter)
    assert torch.equal(contexts, same_contexts)
    table = recipe.smooth_targets(TOKENS, len(VOCAB), 0.5)
    row = {
        tuple(each): i
        for i, each in enumerate(torch.column_stack(contexts_and_targets(TOKENS)).tolist())
    }
    chosen = [row[tuple(each)] for each in torch.column_stack((contexts, targets)).tolist()]
    assert_close(smoothed, table[chosen], rtol=0, atol=0)
    dropped = [[m.p for m in network(args) if hasattr(m, "p")] for args in every]
    assert dropped == [[], [0.3] * 3, [], []]
    for one, *others in zip(*(network(args).parameters() for args in every), strict=True):
        assert all(torch.equal(one, other) for other in others)
    for flag, value in ("dropout", 0.3), ("truncate", 0.2), ("smoothing", 0.1):
        args = ["--data", tiny / "names.txt", "--out", tmp_path / "own.pth", *SIZES, "--steps", 40]
        assert forked(train.main, *args, f"--{flag}", value).returncode == 0
        one, other = load(tiny / "model.pth")[2], load(tmp_path / "own.pth")[2]
        assert {name for name in runs.RUN_ARGS if one[name] != other[name]} == {flag}


def test_the_heads_bias_starts_at_the_frequencies():
    text = "".join(f"\x0e{name.lower()}." for name in SIX)
    counts = torch.tensor([text.count(char) + 0.5 for char in VOCAB.chars])
    assert_close(network(flags())[-1].bias.exp(), counts / counts.sum())


@pytest.mark.parametrize("pretrained", [False, True])
def test_200_steps_are_those_of_torch_and_of_the_plain_way(pretrained, monkeypatch):
    """Each loss: in torch's layers, by autograd and SGD, where a penalty pulls matrices to 0 or to
    what they were; and, with and without dropout, by autograd through our layers."""
    origin, same, losses = list(network(flags()).parameters()), twin(len(VOCAB), 8, 10, 64), []
    decay = 30 / len(TOKENS) if pretrained else 60 / 12_000
    same.load_state_dict(network(flags()).state_dict())
    optimizer = torch.optim.SGD(same.parameters())
    for step, (contexts, targets) in enumerate(drawn(flags())):
        loss, both = F.cross_entropy(same(contexts), targets), zip(same.parameters(), origin)
        losses.append(loss.item() * len(TOKENS) / N_CHARACTERS)
        away = [now - pretrained * old.detach() for now, old in both if now.dim() == 2]
        optimizer.param_groups[0]["lr"] = 0.1 if step < 100 else 0.01
        optimizer.zero_grad()
        (loss + decay / 2 * sum(each.square().sum() for each in away)).backward()
        optimizer.step()
    for dropout in 0.0, 0.2:
        by_hand = trained(flags(dropout=dropout), pretrained=pretrained)[1][-1]["curves"]
        with monkeypatch.context() as patch:
            patch.setattr(fast, "FAST", ())
            plain = trained(flags(dropout=dropout), pretrained=pretrained)[1][-1]["curves"]
        for part in "train", "val":
            assert_close(torch.tensor(by_hand[part]), torch.tensor(plain[part]), rtol=0, atol=1e-5)
        found = [loss for _, loss in by_hand["train"]]
        assert (found == pytest.approx(losses, abs=1e-4)) == (dropout == 0)


def test_resuming_gives_the_same_bits_and_the_average_has_polynomial_weights():
    """Of the weights after every tenth step; the nth counts about n^3."""
    args = flags(dropout=0.2, truncate=0.3, checkpoint_every=5)
    saved = trained(args)[1]
    again = trained(args, resume=saved[13])[1]
    assert len(again) == 26 and again[-1]["step"] == 200
    assert_close(again, saved[14:], rtol=0, atol=0)
    shares = [4 / (i + 4) * math.prod(j / (j + 4) for j in range(i + 1, 20)) for i in range(20)]
    tenth = saved[1::2]
    for name, average in saved[-1]["average"].items():
        if name.endswith(("weight", "bias")):
            mean = sum(share * each["state_dict"][name] for share, each in zip(shares, tenth))
            assert_close(average, mean, rtol=1e-4, atol=1e-5)


def test_the_best_step_is_kept_and_written_with_its_heads_weight_scaled():
    args = flags(dropout=0.1, seed=4)
    written, (state,) = trained(args, val=VAL)
    best, curve, net = state["best"], state["curves"]["val"], network(args)
    second_half = [point for point in curve if point[0] > 100]
    assert (best["step"], best["loss"]) == min(second_half, key=lambda point: point[1])
    assert best["loss"] > min(curve, key=lambda point: point[1])[1] and second_half[-1][0] == 200
    net.load_state_dict(best["state_dict"])
    *others, weight, bias = net.parameters()
    scale = (written[-1].weight / weight).mean().item()
    least = min(plain_loss(net, VAL, each) for each in train.SCALES)
    assert least == pytest.approx(best["loss"], abs=1e-5)
    rescaled = [plain_loss(written, VAL, each / scale) for each in train.SCALES]
    assert scale == pytest.approx(train.SCALES[rescaled.index(min(rescaled))])
    assert_close(list(written.parameters()), [*others, weight * scale, bias])
    assert abs(scale - 1) > 0.01 and not any(type(layer) is layers.Dropout for layer in written)


@pytest.mark.parametrize("kind", [WaveNet, twin])
def test_statistics_are_means_and_variances_of_the_training_windows(kind):
    """Of our BatchNorm1d and of torch.nn's, whatever they were before, and without Dropout."""
    torch.manual_seed(0)
    net = kind(len(VOCAB), 8, 10, 16).insert(5, layers.Dropout(0.5))
    norms = [layer for layer in net if hasattr(layer, "running_mean")]
    for norm in norms:
        norm.running_mean += 9
    train.recompute_statistics(net, TOKENS, batches=3)
    x, _ = contexts_and_targets(TOKENS)
    assert len(norms) == 3 and not any(module.training for module in net.modules())
    for layer in net:
        if layer in norms:
            rows = x.flatten(0, -2)
            assert_close(layer.running_mean, rows.mean(0), rtol=0, atol=0.06)
            assert_close(layer.running_var, rows.var(0, unbiased=False), rtol=0.1, atol=0.03)
        x = layer(x)


@pytest.mark.parametrize("too_sure", [0.1, 0.9, 1.5, 9.0])
def test_calibrate_takes_back_what_is_too_sure(too_sure):
    """On names that the network drew itself its own logits are the best ones."""
    net = trained(flags(steps=60))[0]
    names = generate(net, VOCAB, 1000, max_length=30)
    tokens = windows(names, VOCAB, 8)
    net[-1].weight.data *= too_sure
    loss, scale = train.calibrate(net, tokens, VOCAB)
    best = minimize_scalar(lambda scale: plain_loss(net, names, scale), bounds=(0.3, 1.35)).x
    assert scale == pytest.approx(best, abs=0.03)
    assert scale == pytest.approx(min(1.35, max(0.3, 1 / too_sure)), abs=0.08)
    expected = [plain_loss(net, names, each) for each in (scale, 0.7, 1.0)]
    assert [loss, *train.evaluate(net, tokens, VOCAB, [0.7, 1.0])] == pytest.approx(expected, 1e-5)


def test_a_short_list_is_learned_by_heart():
    net = trained(flags(steps=1500))[0]
    names = generate(net, VOCAB, 1000)
    assert sum(name in SIX for name in names) > 950 and set(SIX) < set(names)
    # Nothing is left to know but which name it is: ln 6 spread over the characters of all names.
    assert plain_loss(net, SIX) == pytest.approx(6 * math.log(6) / N_CHARACTERS, abs=0.03)


OWN = """
class Own(nn.Module):
    def forward(self, x):
        self.mask = x > 0
        return x * self.mask

class WithBackward(Own, Tanh):
    def backward(self, grad_out):
        return grad_out * self.mask

class WaveNet("""
LEVEL = "Tanh(), Linear(n_hidden, n_hidden, bias=False), BatchNorm1d(n_hidden), Tanh()]"
EDITS = [  # of the text of WaveNet, and whether the fast way is taken
    ("Tanh()]", "Own()]", False),
    ("Tanh()]", "WithBackward()]", False),
    ("Tanh()]", "WithBackward()]", "added to FAST"),
    ("Tanh()]", "nn.GELU()]", False),
    ("Tanh()]", "nn.Tanh()]", False),
    ("BatchNorm1d(n_hidden), ", "", True),
    ("bias=False", "bias=True", True),
    ("n_hidden, vocab_size)", "n_hidden, vocab_size, bias=False)", True),
    ("Tanh()]", LEVEL, True),
    (" Linear(", " nn.Linear(", False),
    ("(*layers, ", "(*layers, nn.BatchNorm1d(n_hidden), ", False),
]
MODULES = "layers", "model", "train", "sampling", "plumbing.fast"


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_an_edited_network_trains_saves_loads_samples_and_scores(edit, tmp_path, monkeypatch):
    """The losses of names are those of net(contexts)."""
    (old, new, new_way), (head, text) = (
        edit,
        (ROOT / "model.py").read_text().split("class WaveNet("),
    )
    names = [one + other.lower() for one in SIX for other in SIX]
    for name in MODULES[:4]:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "plumbing", tmp_path / "plumbing")
    assert old in text
    (tmp_path / "model.py").write_text(head + OWN + text.replace(old, new))
    (tmp_path / "names.txt").write_text("\n".join(names))
    monkeypatch.chdir(tmp_path)

    def check(argv):  # in its own process, with the modules of this folder
        for name in list(sys.modules):
            if name in MODULES or name.startswith("plumbing"):
                del sys.modules[name]
        sys.path.insert(0, "")
        layers, model, train, sampling, fast = map(importlib.import_module, MODULES)
        if new_way == "added to FAST":
            fast.FAST += (model.WithBackward,)
        small = [*SIZES, "--steps", "40", "--dropout", "0.1"]
        train.main(["--data", "names.txt", "--out", "own.pth", *small])
        sampling.main(["--model", "own.pth", "-n", "5", "--max-length", "30"])
        sampling.main(["--model", "own.pth", "--score", "names.txt"])
        net, vocab, _ = model.load("own.pth")
        losses = sampling.score(net, vocab, names)
        assert losses == pytest.approx([plain_loss(net, [n], vocab=vocab) for n in names], abs=1e-4)
        assert fast.has_fast_way(net) == bool(new_way)

    process = forked(check)
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) > 5 + len(names)
