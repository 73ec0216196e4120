"""The vocabulary, the network against a torch.nn stack, the shared rows, and the checkpoint."""

import io
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from layers import Level, backward_distinct, distinct_rows, forward_distinct
from model import (
    END,
    Vocabulary,
    WaveNet,
    contexts_and_targets,
    load,
    read_names,
    save,
    transfer,
    windows,
    write_tensors,
)

texts = st.lists(
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1),
    min_size=1,
)


@given(texts)
def test_vocabulary(names):
    vocab = Vocabulary(names)
    assert vocab.chars[0] == vocab.end == ("\n" if "." in "".join(names) else END)
    assert list(vocab.chars[1:]) == sorted(set("".join(names)))
    assert len(vocab) == len(set("".join(names))) + 1
    for name in names:
        codes = vocab.encode(name + vocab.end)
        assert codes[-1] == 0
        assert all(vocab.chars[code] == char for code, char in zip(codes, name))
        assert vocab.decode(codes) == name + vocab.end


def test_vocabulary_refuses():
    with pytest.raises(ValueError, match="'z' is not among"):
        Vocabulary(["ann"]).encode("zoe")


class Flatten(nn.Module):
    """FlattenConsecutive(2), with torch.nn's own Unflatten and Flatten."""

    def forward(self, x):
        x = nn.Unflatten(1, (-1, 2))(x)
        return nn.Flatten(2)(x).squeeze(1)


class Norm(nn.BatchNorm1d):
    def forward(self, x):
        return (
            super().forward(x.transpose(1, 2)).transpose(1, 2)
            if x.dim() == 3
            else super().forward(x)
        )


def twin(vocab_size, block_size, n_embd, n_hidden):
    """The same network in layers of torch.nn."""
    stack, n_in = [nn.Embedding(vocab_size, n_embd)], n_embd
    while block_size > 1:
        stack += [Flatten(), nn.Linear(2 * n_in, n_hidden, bias=False), Norm(n_hidden), nn.Tanh()]
        block_size, n_in = block_size // 2, n_hidden
    return nn.Sequential(*stack, nn.Linear(n_in, vocab_size))


def padded_contexts(B, T, vocab_size):
    """Contexts as names make them: padding on the left, and many alike."""
    contexts = torch.randint(1, vocab_size, (B, T))
    contexts[torch.arange(T) < torch.randint(T + 1, (B, 1))] = 0
    return contexts


sizes = dict(
    vocab_size=st.integers(2, 9),
    block_size=st.sampled_from([2, 4, 8, 16]),
    n_embd=st.integers(1, 6),
    n_hidden=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)


def random_net(seed, **config):
    torch.manual_seed(seed)
    net = WaveNet(**config).double()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    return net


@given(**sizes)
def test_network_is_the_torch_stack(seed, **config):
    net, same = random_net(seed, **config), twin(**config).double()
    same.load_state_dict(net.state_dict())
    assert list(net.state_dict()) == list(same.state_dict())
    contexts = padded_contexts(6, config["block_size"], config["vocab_size"])
    for mode in (True, False):
        net.train(mode), same.train(mode)
        torch.testing.assert_close(net(contexts), same(contexts))
    torch.testing.assert_close(net.state_dict(), same.state_dict())


@given(**sizes)
def test_distinct_rows_change_nothing(seed, **config):
    """Logits, gradients and running statistics from trees are those of the whole windows."""
    net, same = random_net(seed, **config), twin(**config).double()
    K, B, T, V = 3, 6, config["block_size"], config["vocab_size"]
    contexts = torch.stack([padded_contexts(B, T, V) for _ in range(K)])
    for batch, (levels, ids) in zip(contexts, distinct_rows(contexts, V)):
        same.load_state_dict(net.state_dict())
        same.zero_grad()
        targets = torch.randint(V, (B,))
        logits = same(batch)
        F.cross_entropy(logits, targets).backward()
        tree = (
            [
                Level(children, (weights.double() * n).round() / n, n)
                for children, weights, n in levels
            ],
            ids,
        )
        with torch.no_grad():
            torch.testing.assert_close(forward_distinct(net, tree), logits)
            backward_distinct(net, tree, (logits.softmax(1) - F.one_hot(targets, V)) / B)
        torch.testing.assert_close(
            [p.grad for p in net.parameters()], [p.grad for p in same.parameters()]
        )
        torch.testing.assert_close(net.state_dict(), same.state_dict())


@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from([2, 4, 8]), st.integers(2, 6))
def test_distinct_rows_hold_each_distinct_row_once(K, B, T, V):
    torch.manual_seed(K + B + T + V)
    contexts = torch.stack([padded_contexts(B, T, V) for _ in range(K)])
    for batch, (levels, ids) in zip(contexts, distinct_rows(contexts, V)):
        rows = [(code,) for code in range(V)]
        for level, (children, weights, n) in enumerate(levels, 1):
            rows = [rows[left] + rows[right] for left, right in children.view(-1, 2).tolist()]
            parts = [
                tuple(part)
                for context in batch.tolist()
                for part in zip(*[iter(context)] * 2**level)
            ]
            assert sorted(rows) == sorted(set(parts))
            assert n == len(parts)
            torch.testing.assert_close(
                weights, torch.tensor([parts.count(row) / n for row in rows])
            )
        assert [rows[i] for i in ids] == [tuple(context) for context in batch.tolist()]


def test_distinct_rows_of_the_worked_example():
    """That in the docstring of distinct_rows()."""
    vocab = Vocabulary(["aen"])
    contexts = torch.tensor([[0, 0, *vocab.encode(text)] for text in ("an", "en")])
    (((one, two), ids),) = distinct_rows(contexts[None], len(vocab))
    assert (one.children.tolist(), one.weights.tolist(), one.n) == (
        [0, 0, 1, 3, 2, 3],
        [0.5, 0.25, 0.25],
        4,
    )
    assert (two.children.tolist(), two.weights.tolist(), two.n) == ([0, 1, 0, 2], [0.5, 0.5], 2)
    assert ids.tolist() == [0, 1]


@pytest.mark.parametrize("block_size", [2, 4, 8, 16])
def test_causal_tree(block_size):
    """A logit depends on every character of the window, a level's row on its own part."""
    torch.manual_seed(0)
    net = WaveNet(5, block_size, 3, 8).double().eval()
    embedded = net[0](torch.randint(5, (1, block_size))).detach().requires_grad_()
    x = embedded
    for layer in net[1:]:
        x = layer(x)
        if x.dim() == 3:
            for position in range(x.shape[1]):
                (grad,) = torch.autograd.grad(x[0, position].sum(), embedded, retain_graph=True)
                width = block_size // x.shape[1]
                seen = grad[0].abs().sum(1).nonzero().view(-1).tolist()
                assert seen == list(range(position * width, (position + 1) * width))
    (grad,) = torch.autograd.grad(x[0, 1], embedded)
    assert (grad[0].abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    "config, parameters",
    [((27, 8, 10, 128), 72_617), ((27, 8, 24, 128), 76_579), ((27, 16, 24, 280), 494_315)],
)
def test_parameter_counts(config, parameters):
    assert sum(parameter.numel() for parameter in WaveNet(*config).parameters()) == parameters


@pytest.mark.parametrize("block_size", [0, 1, 3, 6, 12])
def test_block_size_must_be_a_power_of_two(block_size):
    with pytest.raises(ValueError, match="power of two"):
        WaveNet(27, block_size, 4, 8)


@pytest.mark.parametrize("shape", [(1, 8), (1, 32), (16,), (1, 16, 1), (1, 0)])
def test_contexts_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"contexts must be \(B, 16\), not"):
        WaveNet(5, 16, 3, 4)(torch.zeros(shape, dtype=torch.int64))


def test_training_starts_at_ln_v():
    torch.manual_seed(0)
    contexts, targets = torch.randint(27, (512, 8)), torch.randint(27, (512,))
    loss = F.cross_entropy(WaveNet(27, 8, 24, 128)(contexts), targets).item()
    assert loss == pytest.approx(torch.tensor(27.0).log().item(), abs=0.03)


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    net, vocab = WaveNet(4, 8, 3, 5), Vocabulary(["żé", "b"])
    net(torch.randint(4, (9, 8)))  # moves the running statistics
    save(tmp_path / "model.pth", net, vocab, {"steps": 3, "seed": 1})
    again, vocab_again, made = load(tmp_path / "model.pth")
    assert made == {"steps": 3, "seed": 1}
    assert not again.training
    assert vocab_again.chars == vocab.chars
    torch.testing.assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert torch.load(tmp_path / "model.pth", weights_only=True)["made"] == {"steps": 3, "seed": 1}
    assert torch.load(tmp_path / "model.pth", weights_only=True)["config"] == dict(
        vocab_size=4, block_size=8, n_embd=3, n_hidden=5
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


BROKEN = {
    "not a checkpoint": b"emma\nolivia\n",
    "empty": b"",
    "a pickle": pickle.dumps([1, 2, 3]),
    "an empty archive": b"PK\x05\x06" + bytes(18),
    "a list": [1, 2, 3],
    "no vocabulary": {"config": {}, "made": {}, "state_dict": {}},
    "another dict": {"step": 3},
    "torch.save": saved({"config": {}, "vocab": ".", "made": {}, "state_dict": {}}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_checkpoints_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "model.pth").write_bytes(content)
    else:
        write_tensors("model.pth", content)
    with pytest.raises(ValueError, match="model.pth"):
        load("model.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_truncated_checkpoint_is_refused(tiny, tmp_path):
    data = (tiny / "model.pth").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "model.pth").write_bytes(data[:length])
        with pytest.raises(ValueError, match="model.pth"):
            load(tmp_path / "model.pth")


def test_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none.pth is no file"):
        load(tmp_path / "none.pth")


def test_names_are_read_whatever_the_line_ends(tmp_path):
    path = tmp_path / "names.txt"
    for data in (
        b"ada\nbea\n",
        b"ada\r\nbea\r\n",
        b"ada\nbea",
        b"\xef\xbb\xbfada\nbea\n",
        b"\n  ada \t\n\n \nbea\n\n",
    ):
        path.write_bytes(data)
        assert read_names(path) == ["ada", "bea"]
    path.write_text("ada\na" + "\u0301\u0323" * 20_000)
    with pytest.raises(ValueError, match="in a line"):
        read_names(path)
    path.write_text("jean luc\nz\u0307o\u0301łc\u0301\n名\n", encoding="utf-8")
    assert read_names(path) == ["jean luc", "żółć", "名"]


def test_the_readmes_example(monkeypatch, capsys):
    """The four lines that the README gives to those who build on the network."""
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in readme.split("```python\n")[1:] if "load(" in block]
    exec(code.split("```")[0], {})
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_names_with_a_full_stop_are_names_like_any_others(tmp_path):
    names = ["st. ann", "st. bea", "washington, d.c."]
    vocab = Vocabulary(names)
    contexts, targets = contexts_and_targets(windows(names, vocab, 4))
    assert vocab.decode(targets.tolist()) == "\n".join(names) + "\n"
    assert contexts[len("st. ann") + 1].tolist() == [0] * 4 and "." in vocab.chars[1:]
    save(tmp_path / "own.pth", WaveNet(len(vocab), 4, 2, 3), vocab, {})
    assert load(tmp_path / "own.pth")[1].chars == vocab.chars


def test_transfer_where_a_level_is_as_long_as_the_vocabulary():
    vocab, old_vocab = Vocabulary(["abc"]), Vocabulary(["xyz"])
    net, trained = WaveNet(4, 4, 3, 4), WaveNet(4, 4, 3, 4)
    transfer(net, vocab, trained, old_vocab)
    for new, old in list(zip(net.parameters(), trained.parameters()))[1:-2]:
        assert torch.equal(new, old)


def test_transfer():
    """Shared characters keep their rows, capitals begin as small letters, others anew."""
    old_vocab, vocab = Vocabulary(["abz", "é"]), Vocabulary(["A. Zab"])
    assert (old_vocab.end, vocab.end) == (".", "\n")
    trained, net = WaveNet(len(old_vocab), 4, 3, 5), WaveNet(len(vocab), 4, 3, 5, dropout=0.2)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    transfer(net, vocab, trained, old_vocab)
    like = {"\n": ".", "a": "a", "b": "b", "A": "a", "Z": "z"}
    parameters = list(zip(net.parameters(), trained.parameters(), before))
    for new, old, _ in parameters[1:-2]:
        assert torch.equal(new, old)
    for new, old, begun in parameters[:1] + parameters[-2:]:
        for char, i in vocab.index.items():
            row = old[old_vocab.index[like[char]]] if char in like else begun[i]
            assert torch.equal(new[i], row), char


def test_sizes_that_the_weights_do_not_fill_are_refused(tmp_path):
    """Before memory is taken for them."""
    content = torch.load(ROOT / "model_state.pth", weights_only=True)
    for sizes in {"n_hidden": 10**7}, {"n_embd": 10**9}, {"block_size": 2**30}, {"vocab_size": 28}:
        write_tensors(tmp_path / "own.pth", content | {"config": content["config"] | sizes})
        with pytest.raises(ValueError, match="own.pth holds weights of other sizes"):
            load(tmp_path / "own.pth")


def test_loading_imports_hardly_more_than_torch():
    """Parts of torch that this needs by accident, such as meta tensors, take seconds to import."""
    code = (
        "import sys, torch; before = len(sys.modules); import sampling; sampling.main(['-n', '1'])"
    )
    command = [sys.executable, "-c", f"{code}; print(len(sys.modules) - before)"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert int(process.stdout.splitlines()[-1]) < 50
