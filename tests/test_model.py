"""The vocabulary, windows, the network against a torch.nn stack, distinct rows, the file."""

import copy

import pytest
import torch
from helpers import random_net, slow_windows, twin
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

import model
from model import CASE_MARK, Vocabulary, WaveNet, contexts_and_targets, windows
from plumbing.fast import backward, distinct_rows, forward
from plumbing.files import write_checkpoint

# 'ß' and 'İ' have no other case of one character, 'Dž' is neither small nor a capital.
letters = st.sampled_from("aAbBeEzßẞİıDŽDždžςσΣéÉ .'-名") | st.characters(exclude_categories=["C"])
lists = st.lists(st.text(letters, min_size=1, max_size=9), min_size=1, max_size=9)


@given(lists)
@example(["İſK", "ǅǆ", "straßE"])
def test_vocabulary(names):
    """Each name comes back from its tokens, which spell the rarer case of letters with a mark."""
    vocab, text = Vocabulary(names), "".join(names)
    assert vocab.chars == vocab.end + "".join(sorted(set(vocab.chars[1:]))) == "".join(vocab.stoi)
    assert vocab.end == ("\n" if "." in text else ".") and len(vocab) == len(vocab.chars)
    for name in [*names, *(name.swapcase() for name in names)]:
        if vocab.tokens_of.keys() >= set(name):
            assert vocab.decode(vocab.encode(name + vocab.end)) == name + vocab.end
    small = {c: c.lower() for c in map(chr, range(0x1F000)) if c.lower() != c == c.lower().upper()}
    capitals = {c.lower(): c for c in small}
    counts = [sum(map(text.count, letters)) for letters in (small, capitals)]
    other = (small if counts[0] <= counts[1] else capitals) if all(counts) else {}
    spelled = [CASE_MARK + other[c] if c in other else c for c in text]
    assert set(vocab.chars[1:]) == set("".join(spelled))
    assert [vocab.chars[token] for token in vocab.encode(text)] == list("".join(spelled))


def test_what_is_learned_of_small_letters_serves_capitals():
    title, capitals, small = (Vocabulary([name]) for name in ("Eve Em", "EVE", "eve"))
    assert title.chars == f".{CASE_MARK} emv" and title.encode("Eve") == [1, 3, 5, 3]
    assert (capitals.chars, small.chars, small.mark) == (".EV", ".ev", None)
    assert title.decode([1, 1, 3, 1, 0, 1, 2, 1]) == "E. "  # a mark with no letter is nothing


@given(st.lists(st.text("abcéABÉ.", min_size=1), min_size=1), st.sampled_from([2, 4, 8, 16]))
@example([chr(0x4E00 + i) for i in range(300)] + ["Ann", "\U0001f600b"], 8)
def test_windows(names, block_size):
    vocab = Vocabulary(names)
    tokens = windows(names, vocab, block_size)
    contexts, targets = contexts_and_targets(tokens)
    expected = slow_windows(names, vocab, block_size)
    assert list(zip(contexts.tolist(), targets.tolist())) == expected
    width = 1 if len(vocab) <= 256 else 4  # bytes a token
    assert tokens.untyped_storage().nbytes() == width * (block_size + len(expected))


def padded_contexts(B, T, vocab_size):
    """Contexts as names make them: padding on the left, and many alike."""
    contexts = torch.randint(1, vocab_size, (B, T))
    contexts[torch.arange(T) < torch.randint(T + 1, (B, 1))] = 0
    return contexts


widths = st.integers(1, 6)


@given(st.tuples(st.integers(2, 9), st.sampled_from([2, 4, 8, 16]), widths, widths), widths)
def test_network_is_the_torch_stack_and_distinct_rows_change_nothing(config, seed):
    """Logits, gradients and statistics, of three minibatches; then in eval mode."""
    torch.set_default_dtype(torch.float64)
    net, same, (V, T, *_) = random_net(seed, *config), twin(*config), config
    same.load_state_dict(net.state_dict())
    assert list(net.state_dict()) == list(same.state_dict())
    contexts, targets = padded_contexts(18, T, V).view(3, 6, T), torch.randint(V, (3, 6))
    for context, target, rows in zip(contexts, targets, distinct_rows(net, contexts)):
        logits = same(context)
        gradients = torch.autograd.grad(F.cross_entropy(logits, target), same.parameters())
        assert_close(copy.deepcopy(net)(context), logits)
        with torch.no_grad():
            assert_close(forward(net, rows), logits)
            backward(net, rows, (logits.softmax(1) - F.one_hot(target, V)) / 6)
        assert_close(tuple(parameter.grad for parameter in net.parameters()), gradients)
        assert_close(net.state_dict(), same.state_dict())
    expected = same.eval()(contexts[0])
    assert_close(net.eval()(contexts[0]), expected)
    assert_close(forward(net, distinct_rows(net, contexts[:1])[0]), expected)


@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from([2, 4, 8]), st.integers(2, 6))
def test_distinct_rows_hold_each_distinct_row_once(K, B, T, V):
    torch.manual_seed(K + B + T + V)
    net, contexts = WaveNet(V, T, 1, 1), padded_contexts(K * B, T, V).view(K, B, T)
    for context, (_, levels, row_ids) in zip(contexts, distinct_rows(net, contexts)):
        rows = [(token,) for token in range(V)]  # the tokens that each row stands for
        for k, level in enumerate(levels, 1):
            rows = [rows[i] + rows[j] for i, j in level.children.view(-1, 2).tolist()]
            parts = [tuple(part) for part in context.view(-1, 2**k).tolist()]
            assert sorted(rows) == sorted(set(parts)) and level.n == len(parts)
            shares = [parts.count(row) / len(parts) for row in rows]
            assert level.weights.tolist() == pytest.approx(shares)
        assert [rows[i] for i in row_ids] == parts and 2**k == T


def test_distinct_rows_of_the_docstring():
    contexts = torch.tensor([[[0, 0, 1, 3], [0, 0, 2, 3]]])  # "..an" and "..en", . a e n
    ((_, (pairs, fours), row_ids),) = distinct_rows(WaveNet(4, 4, 1, 1), contexts)
    found = [(level.children.tolist(), level.weights.tolist(), level.n) for level in (pairs, fours)]
    assert found[0] == ([0, 0, 1, 3, 2, 3], [2 / 4, 1 / 4, 1 / 4], 4)
    assert found[1] == ([0, 1, 0, 2], [1 / 2, 1 / 2], 2) and row_ids.tolist() == [0, 1]


def test_causal_tree():
    """A token changes, in each level, the row of its own part of the window, and no other."""
    x = torch.cat((3 * torch.eye(16), torch.zeros(1, 16))).long()  # each context has another one
    for layer in random_net(0, 5, 16, 3, 8).double().eval():
        x = layer(x)
        rows = x.view(17, -1, x.shape[-1])
        changed = (rows[:16] != rows[16]).any(2)
        own_part = torch.eye(rows.shape[1]).repeat_interleave(16 // rows.shape[1], 0)
        assert torch.equal(changed, own_part.bool())


def test_sizes_of_the_network():
    for config, n in ((27, 8, 24, 128), 76_579), ((27, 16, 24, 280), 494_315):
        n += config[2]  # a vector for what is hidden: those of the lecture have none
        assert sum(parameter.numel() for parameter in WaveNet(*config).parameters()) == n
    for block_size in 0, 1, 3, 12:
        with pytest.raises(ValueError, match="power of two"):
            WaveNet(27, block_size, 4, 8)


def test_save_and_load(tmp_path):
    """The same bits come back; a network of other layers is refused."""
    path, vocab = tmp_path / "model.pth", Vocabulary(["Żé", "b, ż."])
    config = dict(vocab_size=len(vocab), block_size=8, n_embd=3, n_hidden=5)
    net = random_net(0, *config.values())
    model.save(path, net, vocab, {"steps": 3})
    again, vocab_again, metadata = model.load(path)
    assert metadata == {"steps": 3} and not again.training and vocab_again.chars == vocab.chars
    assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)
    content = torch.load(path, weights_only=True)
    level = ["FlattenConsecutive", "Linear", "BatchNorm1d", "Tanh"]
    assert content["layers"] == ["Embedding", *level * 3, "Linear"] and content["config"] == config
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
    write_checkpoint(path, content | {"layers": [*content["layers"][:-2], "ReLU", "Linear"]})
    with pytest.raises(ValueError, match=r"model.pth has other layers than model.py: [^\n]*$"):
        model.load(path)


def test_a_network_of_a_single_wide_level_comes_back(tmp_path):
    net, path = random_net(0, 3, 2, 2, 600), tmp_path / "wide.pth"
    model.save(path, net, Vocabulary(["ab"]), {})
    assert_close(model.load(path)[0].state_dict(), net.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name, known, taken", [("Zab.", "zab", "zab"), ("ZAQ", "ZA", "za")])
def test_load_pretrained(name, known, taken):
    """Known characters get their rows, or those of the other case; the levels are as they were."""
    old_vocab, vocab = Vocabulary(["abz", "é"]), Vocabulary([name])
    old, net = random_net(1, len(old_vocab), 4, 3, 5), random_net(2, len(vocab), 4, 3, 5)
    expected = {name: tensor.clone() for name, tensor in net.named_parameters()}
    for name in expected.keys() - {"9.bias"}:
        if name in ("0.weight", "9.weight"):
            for i, char in zip(vocab.encode(vocab.end + known), "." + taken):
                expected[name][i] = old.get_parameter(name)[old_vocab.chars.index(char)]
            if name == "0.weight":  # its last row is for hidden tokens
                expected[name][-1] = old.get_parameter(name)[-1]
        else:
            expected[name] = old.get_parameter(name)
    found = model.load_pretrained(net, vocab, old, old_vocab)
    assert found == dict(zip(known, taken))
    assert_close(dict(net.named_parameters()), expected, rtol=0, atol=0)


def test_a_full_stop_that_was_a_letter_does_not_become_the_end():
    old_vocab, vocab = Vocabulary(["st. ab"]), Vocabulary(["ab"])
    old, net = WaveNet(len(old_vocab), 4, 3, 5), WaveNet(len(vocab), 4, 3, 5)
    assert "." not in model.load_pretrained(net, vocab, old, old_vocab)
    assert torch.equal(net[0].weight[0], old[0].weight[0])
