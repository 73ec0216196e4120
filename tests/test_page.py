"""The page in a real browser: what it computes, compared with torch, and what it does."""

import base64
import bisect
import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from rapidfuzz.distance import Levenshtein

import model
import sampling
from layers import BatchNorm1d, Dropout, Embedding, FlattenConsecutive, Linear, Tanh
from plumbing import page as plumbing_page
from plumbing.lists import read_names

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt install chromium")
torch.set_num_threads(1)
MARK = "\u000e"
LETTERS = ".abcdefghij"


def write_page(net, chars, path, names=None, title="a list", **settings):
    """The only place that knows how a page is made."""
    vocab = model.Vocabulary(["".join(chars[1:])])
    assert vocab.chars == "".join(chars)
    plumbing_page.write_page(path, net, vocab, title, names, **settings)


# Networks


def spread(net):
    """As if it had been trained: random statistics, BatchNorm1d far from doing nothing."""
    for layer in net:
        if isinstance(layer, BatchNorm1d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.3, 2)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.3)
        elif isinstance(layer, Linear) and layer.bias is not None:
            layer.bias.data.normal_(0, 0.5)
    return net.eval()


def wavenet(chars=LETTERS, block_size=4, n_embd=6, n_hidden=13, end=0.0):
    torch.manual_seed(1)
    net = spread(model.WaveNet(len(chars), block_size, n_embd, n_hidden, dropout=0.1))
    net[len(net) - 1].weight.data *= 10
    net[len(net) - 1].bias.data[0] += end
    return net


def stack(*layers):
    """A network of other layers than WaveNet's, such as students make."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(*layers)
    V, E = net[0].weight.shape
    net.config = dict(vocab_size=V, block_size=4, n_embd=E, n_hidden=12)
    return spread(net)


def stacks():
    V, E, H = len(LETTERS), 5, 12
    two, one = FlattenConsecutive(2), Linear(H, V)
    return {
        "two hidden layers per level": stack(
            *(Embedding(V, E), two, Linear(2 * E, H, bias=False), BatchNorm1d(H), Tanh()),
            *(Linear(H, H), BatchNorm1d(H), Tanh(), two, Linear(2 * H, H), BatchNorm1d(H), Tanh()),
            *(Dropout(0.2), Linear(H, H), Tanh(), one),
        ),
        "no BatchNorm1d": stack(
            *(Embedding(V, E), two, Linear(2 * E, H), Tanh(), two, Linear(2 * H, H), Tanh()),
            Linear(H, V, bias=False),
        ),
        "BatchNorm1d without a Linear before it": stack(
            *(Embedding(V, E), BatchNorm1d(E), two, BatchNorm1d(2 * E), Linear(2 * E, H), Tanh()),
            *(BatchNorm1d(H), two, Linear(2 * H, H), Tanh(), BatchNorm1d(H), Linear(H, V)),
        ),
        "four at once": stack(
            *(Embedding(V, E), Linear(E, E), Tanh(), FlattenConsecutive(4), Linear(4 * E, H)),
            *(Tanh(), Linear(H, V)),
        ),
    }


def content(path):
    """The network that stands in a page."""
    text = Path(path).read_text("utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="network">(.*?)</script>', text, re.S)[1]
    )


def reference(path):
    """contexts (B, T) -> what each layer gives, by torch, with the weights that the page holds."""
    floats = lambda text: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)  # noqa: E731

    def matrix(m):
        values = torch.frombuffer(bytearray(base64.b64decode(m["values"])), dtype=torch.int8)
        return values.view(m["rows"], m["columns"]) * floats(m["scale"]).unsqueeze(1)

    def outputs(x):
        found = []
        for layer in content(path)["layers"]:
            if layer["class"] == "Embedding":
                x = matrix(layer["weight"])[x]
            elif layer["class"] == "FlattenConsecutive":
                x = x.reshape(len(x), x.shape[1] // layer["n"], -1)
            elif layer["class"] == "Linear":
                bias = None if layer["bias"] is None else floats(layer["bias"])
                x = torch.nn.functional.linear(x, matrix(layer["weight"]), bias)
            elif layer["class"] == "BatchNorm1d":
                x = x * floats(layer["weight"]) + floats(layer["bias"])
            else:
                x = torch.tanh(x)
            found.append(x)
        return found

    return outputs


def tokens_of(chars, text):
    """The tokens of a text, capitals with a mark where the vocabulary holds one."""
    return [
        t
        for c in text
        for t in ([chars.index(c)] if c in chars else [chars.index(MARK), chars.index(c.lower())])
    ]


def logits_of(path, chars, texts):
    """The logits (B, V) after each text, by torch."""
    T = content(path)["config"]["block_size"]
    return reference(path)(torch.tensor([([0] * T + tokens_of(chars, t))[-T:] for t in texts]))[
        -1
    ].squeeze(1)


def losses_of(path, chars, names):
    """Nats per character by torch: the sum over tokens and end, by the characters and the end."""
    result, T = [], content(path)["config"]["block_size"]
    for name in names:
        tokens = [0] * T + tokens_of(chars, name) + [0]
        windows = torch.tensor(tokens).unfold(0, T + 1, 1)
        log_probs = reference(path)(windows[:, :-1])[-1].squeeze(1).log_softmax(1)
        result.append(-log_probs.gather(1, windows[:, -1:]).sum().item() / (len(name) + 1))
    return result


# The browser


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(path, hash) opens a page. None may ask for anything, nor complain."""
    contexts, complaints, requests = [], [], []

    def visit(path, hash="", width=1200, context=None, **settings):
        if context is None:
            settings = (
                dict(viewport=dict(width=width, height=844), accept_downloads=True) | settings
            )
            contexts.append(context := browser.new_context(**settings))
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on(
            "console",
            lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{path}{hash}")
        page.wait_for_selector("#tree span")  # the last thing that it draws
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "blob:"))] == []
    assert all(url.split("#")[0].endswith(".html") for url in requests if url.startswith("file:"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    net, vocab, _ = model.load(str(ROOT / "model_state.pth"))
    names = list(dict.fromkeys(read_names(str(ROOT / "names.txt"))))
    path = tmp_path_factory.mktemp("shipped") / "names.html"
    sampling.main(["--page", str(path), "--new"])
    return net, vocab.chars, names, path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.html"
    write_page(wavenet(end=1.0), LETTERS, path, names=["a", "b", "c", "ab", "ba", "abc"])
    return path


def names_on(page):
    return page.eval_on_selector_all("#names [data-name]", "all => all.map(e => e.dataset.name)")


def kept_on(page):
    return page.eval_on_selector_all("#kept [data-name]", "all => all.map(e => e.dataset.name)")


def drawing(page, act=lambda page: page.click("#draw")):
    """The names that stand there after act(page) has had others drawn."""
    page.eval_on_selector_all("#names > *", "all => all.forEach(e => e.classList.add('old'))")
    act(page)
    page.wait_for_function("() => !document.querySelector('#names > .old')")
    return names_on(page)


def draw(page, **settings):
    return page.evaluate("settings => wavenet.draw(settings)", settings)


# What it computes


CASES = {
    "WaveNet": (LETTERS, wavenet()),
    "block size 2": (LETTERS, wavenet(block_size=2)),
    "block size 64": (LETTERS, wavenet(block_size=64)),
    "3,000 characters": (
        c := "." + "".join(map(chr, range(0x4E00, 0x4E00 + 3000))),
        wavenet(c, end=9.0),
    ),
    "full stops in names": (c := "\n ." + LETTERS[1:], wavenet(c)),
    "capitals": (c := f".{MARK} -abcdefgh", wavenet(c)),
    "two numbers per character": (LETTERS, wavenet(n_embd=2)),
} | {name: (LETTERS, net) for name, net in stacks().items()}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_torch_on_the_same_weights(case, visit, tmp_path):
    chars, net = CASES[case]
    write_page(net, chars, path := tmp_path / "page.html")
    page, rng = visit(path), random.Random(1)
    letters = [c for c in chars[1:] if c != MARK] + (["A", "B", "H"] if MARK in chars else [])
    texts = [
        "".join(rng.choices(letters, k=rng.randrange(0, 3 * i % 40 + 1)))
        for i in range(200 if len(chars) < 100 else 40)
    ]
    expected = logits_of(path, chars, texts)
    found = torch.tensor(page.evaluate("texts => texts.map(text => wavenet.logits(text))", texts))
    assert page.evaluate("wavenet.vocab") == list(chars)
    assert (found - expected).abs().max() < 1e-3
    # Folding and rounding leave the network what it was.
    T = net.config["block_size"]
    contexts = torch.tensor([([0] * T + tokens_of(chars, text))[-T:] for text in texts])
    with torch.no_grad():
        original = net(contexts)
    assert original.std() > 0.3 and (expected - original).abs().mean() < 0.05
    assert len(names_on(page)) == 20


def test_the_shipped_network_fits_as_well_on_the_page(shipped, visit):
    net, chars, names, path = shipped
    random.Random(42).shuffle(names := list(names))
    names = names[-len(names) // 10 :: 3]  # of the validation names every third
    codes = model.windows(names, model.Vocabulary([chars[1:]]), net.config["block_size"])
    contexts, targets = model.contexts_and_targets(codes)
    losses = []
    with torch.no_grad():
        for outputs in (net, lambda x: reference(path)(x)[-1].squeeze(1)):
            parts = [outputs(x) for x in contexts.split(4096)]
            losses.append(torch.nn.functional.cross_entropy(torch.cat(parts), targets).item())
    assert abs(losses[0] - losses[1]) < 0.001
    sums = """names => names.map(name => [...name, "."].reduce((sum, char, i) => {
        const logits = wavenet.logits(name.slice(0, i)), highest = Math.max(...logits);
        const all = logits.reduce((sum, logit) => sum + Math.exp(logit - highest), 0);
        return sum + Math.log(all) + highest - logits[wavenet.vocab.indexOf(char)];
    }, 0) / (name.length + 1))"""
    some = names[:80]
    page = visit(path)
    found = torch.tensor(page.evaluate(sums, some))
    assert (found - torch.tensor(losses_of(path, chars, some))).abs().max() < 1e-3


def test_the_shipped_page_is_small_and_quick(shipped, visit, tmp_path):
    net, chars, _, path = shipped
    write_page(net, chars, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 800_000
    page = visit(path)
    session = page.context.new_cdp_session(page)
    # Processor time, not the clock's; and beside that of a plain loop, as processors differ.
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds():
        metrics = session.send("Performance.getMetrics")["metrics"]
        return {metric["name"]: metric["value"] for metric in metrics}["TaskDuration"]

    page.reload()
    page.wait_for_selector("#tree span")
    ours = seconds()
    page.evaluate("() => { let x = 0; for (let i = 0; i < 1e9; i++) x += i * 1.5; return x; }")
    assert 0 < ours < seconds() - ours
    assert page.evaluate("performance.getEntriesByName('first names').length") == 1


def chi_square(counts, probs, n):
    """Whether counts are a draw of n by probs, as one in a million are not."""
    likely = [(counts.get(key, 0), p * n) for key, p in probs.items() if p * n >= 5]
    rest = n - sum(c for c, _ in likely), n - sum(e for _, e in likely)
    likely += [rest] if rest[1] >= 5 else []
    assert rest[1] >= 5 or rest[0] < 30
    df = len(likely) - 1
    return sum((c - e) ** 2 / e for c, e in likely) < df + 7 * math.sqrt(df) + 12


def chances_after(path, text, temperature=1.0, top_k=None):
    """Each character of LETTERS that may follow, "" for the end, and its chance in drawing."""
    logits = logits_of(path, LETTERS, [text])[0].double()
    if not text:
        logits[0] = -math.inf
    logits[logits < logits.topk(top_k or len(logits)).values[-1]] = -math.inf
    return dict(zip(["", *LETTERS[1:]], (logits / temperature).softmax(0).tolist()))


@pytest.mark.parametrize(
    "temperature, top_k, end", [(1, None, 1), (0.6, None, 1), (1.7, 4, 1), (1, 1, 1), (1, 2, 5)]
)
def test_names_are_drawn_as_often_as_the_network_says(temperature, top_k, end, visit, tmp_path):
    write_page(wavenet(end=float(end)), LETTERS, path := tmp_path / "page.html")
    first, second = chances_after(path, "", temperature, top_k), Counter()
    for a, p in first.items():
        for b, q in chances_after(path, a, temperature, top_k).items() if a else ():
            second[a + b] += p * q
    page, n = visit(path), 20_000
    settings = dict(count=n, temperature=temperature) | ({"topK": top_k} if top_k else {})
    names = draw(page, **settings)
    assert len(names) == n
    assert chi_square(Counter(name[0] for name in names), first, n)
    assert chi_square(Counter(name[:2] for name in names), second, n)


def test_a_name_that_is_too_long_is_dropped_and_not_cut(tiny, visit):
    probs = Counter()
    for a, p in chances_after(tiny, "").items():
        for b, q in chances_after(tiny, a).items() if a else ():
            probs[a + b] = p * q * (chances_after(tiny, a + b)[""] if b else 1)
    probs = {name: p / probs.total() for name, p in probs.items()}
    assert chi_square(Counter(draw(visit(tiny), count=10_000, maxLength=2)), probs, 10_000)


def test_a_text_is_taken_in_its_composed_form(visit, tmp_path):
    write_page(wavenet(chars := ".aeé"), chars, path := tmp_path / "page.html")
    page = visit(path)
    assert all(name.startswith("aé") for name in draw(page, start="ae\u0301", maxLength=9))
    assert page.evaluate("wavenet.logits('e\u0301')") == page.evaluate("wavenet.logits('é')")


# What it does


def test_every_control(tiny, visit):
    page = visit(tiny)
    assert len(names_on(page)) == 20 and page.inner_text("#message") == "20 names"
    page.uncheck("#new")
    page.fill("#count", "400")
    plain = drawing(page)
    assert len(plain) == 400
    lengths = Counter(map(len, plain))
    assert min(lengths) < 3 and max(lengths) > 6

    page.fill("#start", "ab")
    names = drawing(page)
    assert all(name.startswith("ab") for name in names) and len(set(names)) > 20
    page.fill("#start", "AB")  # it knows no capitals: the small letters are meant
    assert all(name.startswith("ab") for name in drawing(page))
    page.fill("#start", "")

    page.fill("#min-length", "3")
    page.fill("#max-length", "5")
    assert set(map(len, drawing(page))) == {3, 4, 5}
    page.fill("#min-length", "")
    page.fill("#max-length", "")

    page.fill("#match", "^[^a].*a$")
    assert all(re.search("^[^a].*a$", name) for name in drawing(page))
    page.fill("#match", "")

    page.fill("#top-k", "1")
    page.fill("#max-length", "40")
    page.fill("#temperature", "1")
    page.fill("#count", "30")
    assert len(set(drawing(page, lambda page: page.fill("#top-k", "2")))) > 1
    page.fill("#top-k", "")
    page.fill("#count", "400")
    distinct = []
    for temperature in "0.1", "1", "2":
        page.fill("#temperature", temperature)
        distinct.append(len(set(drawing(page))))
        assert page.inner_text("#degree") == temperature
    assert distinct[0] < distinct[1] < distinct[2]

    page.fill("#temperature", "1")
    page.check("#new")
    names = drawing(page)
    assert len(names) == len(set(names)) == 400
    assert not {"a", "b", "c", "ab", "ba", "abc"} & set(names)
    assert {"a", "b", "c", "ab", "ba", "abc"} & set(plain) and len(set(plain)) < 400


def test_a_setting_draws_by_itself_and_the_last_one_counts(tiny, visit):
    page = visit(tiny)

    def act(page):
        for text in "a", "ab", "abc":
            page.fill("#start", text)

    assert all(name.startswith("abc") for name in drawing(page, act))


def test_the_space_key_draws_unless_it_is_typed_or_presses_a_button(tiny, visit):
    page = visit(tiny)
    before = names_on(page)
    page.evaluate("document.activeElement.blur()")
    assert drawing(page, lambda page: page.keyboard.press("Space")) != before
    before = names_on(page)
    page.focus("#match")
    page.keyboard.press("Space")
    page.fill("#match", "")
    page.focus("#names [data-name]")
    page.keyboard.press("Space")
    assert page.get_attribute("#names [data-name]", "aria-pressed") == "true"
    page.wait_for_timeout(400)
    assert page.evaluate("scrollY") == 0
    assert kept_on(page) == [before[0]] or kept_on(page) == [names_on(page)[0]]


def test_each_name_shows_how_well_it_fits_and_they_sort_by_it(tiny, visit):
    page = visit(tiny)
    drawn = names_on(page)
    rows = "all => all.map(e => [e.innerText.trim(), e.querySelector('i').offsetWidth])"
    shown = page.eval_on_selector_all("#names [data-name]", rows)
    losses = losses_of(tiny, LETTERS, drawn)
    for name, loss, (text, _) in zip(drawn, losses, shown):
        assert text.split() == [name, f"{loss:.2f}"] or abs(float(text.split()[1]) - loss) < 0.0051
    bars = [width for _, (_, width) in sorted(zip(losses, shown))]
    assert bars == sorted(bars, reverse=True) and bars[0] > bars[-1]
    by_fit = drawing(page, lambda page: page.check("#sort"))
    assert by_fit == [name for _, name in sorted(zip(losses, drawn))]
    assert drawing(page, lambda page: page.uncheck("#sort")) == drawn


def test_a_pattern_that_no_name_meets_ends_with_a_count(visit, tmp_path):
    chars = ".ab"
    write_page(
        wavenet(chars, block_size=2, n_embd=2, n_hidden=2, end=9.0),
        chars,
        path := tmp_path / "page.html",
    )
    page = visit(path)
    page.evaluate("""() => { window.gaps = []; let last = performance.now();
        const beat = () => {
            gaps.push(performance.now() - last); last += gaps.at(-1); setTimeout(beat); };
        beat(); }""")
    page.fill("#match", "c")
    page.click("#draw")
    expected = "0 of 20 names found among 1,000,000 drawn"
    page.wait_for_function("text => message.innerText === text", arg=expected, timeout=50_000)
    assert names_on(page) == []
    assert page.evaluate("gaps.length > 50 && Math.max(...gaps) < 500")  # it never froze
    page.fill("#match", "b")
    assert len(drawing(page)) == 20 and page.inner_text("#message") == "20 names"


def test_what_cannot_be_drawn_is_said(tiny, visit):
    page = visit(tiny)
    page.fill("#max-length", "9")
    for field, text, words in (
        ("#match", "(", "regular expression"),
        ("#start", "é", "“é” is not among the characters"),
        ("#start", ".", "“.” is not among the characters"),
        ("#min-length", "999", "too short"),
    ):
        before = drawing(page)
        page.fill(field, text)
        page.click("#draw")
        page.wait_for_function("words => message.innerText.includes(words)", arg=words)
        assert page.get_attribute("#message", "aria-live") == "polite"
        assert names_on(page) == before
        page.fill(field, "1" if field == "#min-length" else "")
    for settings in dict(match="("), dict(start="é"), dict(minLength=3, maxLength=2):
        with pytest.raises(playwright.Error):
            draw(page, **settings)


def test_kept_names_stay_and_can_be_copied_and_saved(tiny, visit):
    page = visit(tiny, permissions=["clipboard-read", "clipboard-write"])
    assert not page.is_visible("#save") and page.is_visible("#hint")
    names = list(dict.fromkeys(names_on(page)))[:3]
    for name in names:
        page.click(f"#names [data-name={name}]")
    assert kept_on(page) == names
    page.click(f"#names [data-name={names[1]}]")
    page.click(f"#kept [data-name={names[0]}]")
    assert kept_on(page) == names[2:]
    page.click(f"#names [data-name={names[0]}]")
    drawing(page)
    page.reload()
    page.wait_for_selector("#tree span")
    assert kept_on(page) == [names[2], names[0]]
    text = f"{names[2]}\n{names[0]}\n"
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "names.txt"
    assert Path(download.value.path()).read_text("utf-8") == text
    page.click("#copy")
    page.wait_for_function("() => message.innerText === 'Copied.'")
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_a_browser_that_keeps_nothing_still_draws(tiny, visit, browser):
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new Error(); } })"
    )
    page = visit(tiny, context=context)
    name = names_on(page)[0]
    page.click(f"#names [data-name={name}] >> nth=0")
    assert kept_on(page) == [name]
    context.close()


def test_the_address_brings_the_settings_back(tiny, visit):
    page = visit(tiny)
    page.fill("#start", "a")
    page.fill("#count", "7")
    page.fill("#min-length", "2")
    page.fill("#max-length", "12")
    page.fill("#match", "b.*[c-f]")
    page.fill("#temperature", "1.4")
    page.fill("#top-k", "9")
    page.uncheck("#new")
    page.check("#sort")
    page.fill("#text", "face")
    drawing(page)
    values = """() => Object.fromEntries([...document.querySelectorAll("input")].map(
        e => [e.id, e.type === "checkbox" ? e.checked : e.value]))"""
    set_before = page.evaluate(values)
    other = visit(tiny, hash=page.evaluate("location.hash"))
    assert other.evaluate(values) == set_before
    assert (
        set_before["match"] == "b.*[c-f]" and not set_before["new"] and set_before["text"] == "face"
    )
    names = names_on(other)
    assert len(names) == 7 and all(re.search("^a.*b.*[c-f]", name) for name in names)
    drawing(other, lambda page: page.evaluate("location.hash = '#start=b&count=3'"))
    assert other.is_checked("#new") and not other.is_checked(
        "#sort"
    )  # what a link leaves out is as usual
    assert len(names_on(other)) == 3 and all(name.startswith("b") for name in names_on(other))


def test_names_of_strangers_are_text(visit, tmp_path):
    attack = "</script><img src=x onerror=alert(1)>"
    chars = "." + "".join(sorted(set(attack + "&\"'`\u2028\u2029{}$") - {"."}))
    write_page(
        wavenet(chars, end=2.0), chars, path := tmp_path / "page.html", title=f"{attack}<!--"
    )
    page = visit(path, hash="#" + "start=%3Cimg&text=%3C/script%3E")
    assert page.evaluate("wavenet.vocab") == list(chars)
    assert all(name.startswith("<img") for name in names_on(page))
    page.click("#names [data-name]")
    page.reload()
    assert page.evaluate("document.querySelectorAll('img, script').length") == 2
    assert attack in page.inner_text("body")
    # A list of such names travels in the page, and is what "new" means.
    listed = [
        attack,
        *(name for name in draw(page, count=300, maxLength=3) if name.strip() == name),
    ]
    write_page(wavenet(chars, end=2.0), chars, path, names=listed, title=attack)
    page = visit(path)
    names = draw(page, count=300, maxLength=3, new=True)
    assert len(set(names)) == 300 and not set(listed) & set(names)
    assert set(draw(page, count=300, maxLength=3)) & set(listed)


def test_full_stops_belong_to_names_where_the_list_has_them(visit, tmp_path):
    chars = "\n ." + LETTERS[1:]
    write_page(wavenet(chars), chars, path := tmp_path / "page.html")
    page = visit(path)
    names = draw(page, count=300, start="a.b")
    assert all(name.startswith("a.b") for name in names) and any("." in name[3:] for name in names)
    assert all(name == name.strip() and "\n" not in name for name in names)


def test_capitals_are_whole_characters(visit, tmp_path):
    chars = f".{MARK} -abcdefgh"
    write_page(wavenet(chars, end=1.0), chars, path := tmp_path / "page.html")
    page = visit(path)
    names = draw(page, count=2000, maxLength=6)
    assert any(c.isupper() for name in names for c in name) and MARK not in "".join(names)
    assert max(map(len, names)) == 6
    assert all(name.startswith("Ab") for name in draw(page, count=50, start="Ab"))
    assert all(re.search("[A-H]$", name) for name in draw(page, count=50, match="[A-H]$"))
    assert not any("A" in name for name in draw(page, count=200, start="a", match="^[^A]*$"))
    # What comes next: p(mark) p(letter | mark), and the loss of the whole name.
    page.fill("#text", "aB")
    probs = logits_of(path, chars, ["a"]).softmax(1)[0], logits_of(path, chars + MARK, ["a" + MARK])
    chance = probs[0][1] * probs[1].softmax(1)[0][chars.index("b")]
    row = page.get_attribute("#chances tr[tabindex] >> nth=1", "aria-label")
    assert row.startswith("After “a”") and f"What came: B {percent(chance)}" in row
    loss = losses_of(path, chars, ["aB"])[0]
    assert f"{loss:.2f} nats" in page.inner_text("#likeliest")
    assert MARK not in page.inner_text("body")


def percent(p):
    return f"{100 * p:.{1 if p < 0.0995 else 0}f} %"


def test_what_comes_next(shipped, visit):
    _, chars, _, path = shipped
    page = visit(path)
    page.fill("#text", "emma")
    probs = logits_of(path, chars, ["", "e", "em", "emm", "emma"]).softmax(1)
    rows = page.query_selector_all("#chances tr[tabindex]")
    heads = [row.query_selector("th").inner_text() for row in rows]
    assert heads == ["(start)", "e", "em", "emm", "emma"]
    for row, came, p in zip(rows, ["e", "m", "m", "a", "end"], probs):
        cells = row.query_selector_all("td")
        assert len(cells) == 27
        framed = [cell.get_attribute("class") for cell in cells].index("came")
        assert ["end", *chars[1:]][framed] == came
        shades = [float(cell.get_attribute("style")[10:-1]) for cell in cells]  # --chance: 12%
        assert (torch.tensor(shades) - 80 * p.sqrt()).abs().max() < 0.1
        five = ", ".join(f"{['end', *chars[1:]][i]} {percent(p[i])}" for i in p.topk(5).indices)
        row.hover()
        assert f"{five}. What came: {came} {percent(p[framed])}" in page.inner_text("#likeliest")
    page.mouse.move(0, 0)
    rows[0].focus()
    assert page.inner_text("#likeliest").startswith("After “”:")
    page.fill("#text", "emma")
    assert f"{losses_of(path, chars, ['emma'])[0]:.2f} nats" in page.inner_text("#likeliest")
    # An unknown letter is said beside the field; the table and the tree follow what is known.
    page.fill("#text", "em1ma")
    assert "“1” is not among" in page.inner_text("label:has(#text) em")
    assert page.locator("#chances tr[tabindex]").count() == 3
    assert page.inner_text("#fed").startswith("After “em”") and not page.inner_text("#likeliest")
    page.fill("#text", "")
    assert page.locator("label:has(#text) em").count() == 0
    assert page.inner_text("#likeliest") == ""


def test_a_large_alphabet_shows_the_likeliest(visit, tmp_path):
    chars, net = CASES["3,000 characters"]
    write_page(net, chars, path := tmp_path / "page.html")
    page = visit(path, hash=f"#text={chars[7]}{chars[8]}", width=360)
    for row, p in zip(
        page.query_selector_all("#chances tr[tabindex]"), logits_of(path, chars, ["", chars[7]])
    ):
        shown = [cell.inner_text() for cell in row.query_selector_all("td")]
        best = [chars[i] if i else "end" for i in p.topk(20).indices]
        assert shown[:20] == best and len(shown) in (20, 21)
    assert page.locator("#map text").count() == 60
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_look_inside(shipped, visit):
    _, chars, _, path = shipped
    page = visit(path)
    page.fill("#text", "marina")
    page.focus("#text")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => fed.innerText.startsWith('After “marin”')")
    leaves = page.eval_on_selector_all("#tree span", "all => all.map(e => e.innerText.trim())")
    assert leaves == [""] * 11 + list("marin")
    assert page.locator("#tree canvas").count() == 8 + 4 + 2 + 1
    # The strips are the outputs of the Tanh layers: how strong a colour is, and which.
    window = torch.tensor([[0] * 11 + [chars.index(c) for c in "marin"]])
    layers = [layer["class"] for layer in content(path)["layers"]]
    tanh = [x for name, x in zip(layers, reference(path)(window)) if name == "Tanh"][::-1]
    pixels = """c => [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]"""
    for canvas, values in zip(
        page.query_selector_all("#tree canvas"), [tanh[0][0, 0], tanh[1][0, 0], tanh[2][0, 0]]
    ):
        rgba = torch.tensor(canvas.evaluate(pixels)).view(-1, 4)[: len(values)]
        signs = torch.where(rgba[:, 0] > rgba[:, 2], 1, -1)
        visible = values.abs() > 0.1
        assert ((rgba[:, 3] / 255 - values.abs()).abs() < 0.01).all()
        assert (signs[visible] == values.sign()[visible]).all()
    # A row that one points at, and the two that feed it.
    lit = """() => [...document.querySelectorAll("#tree .branch > :first-child")]
        .filter(e => getComputedStyle(e).outlineStyle === "solid").length"""
    page.mouse.move(0, 0)
    page.focus("#text")
    assert page.evaluate(lit) == 0
    for i in 0, 1, 2:
        page.hover(f"#tree canvas >> nth={i}")
        assert page.evaluate(lit) == 3


@pytest.mark.parametrize("n_embd", [2, 6])
def test_the_map_shows_the_two_main_directions(n_embd, visit, tmp_path):
    write_page(wavenet(n_embd=n_embd), LETTERS, path := tmp_path / "page.html")
    page = visit(path)
    places = "all => all.map(e => [e.textContent, +e.getAttribute('x'), +e.getAttribute('y')])"
    texts = page.eval_on_selector_all("#map text", places)
    assert sorted(text for text, _, _ in texts) == sorted(["end", *LETTERS[1:]])
    vectors = reference(path)(torch.arange(len(LETTERS)).view(-1, 1).expand(-1, 4))[0][:, 0]
    centred = vectors - vectors.mean(0)
    _, S, directions = torch.linalg.svd(centred, full_matrices=False)
    share = (S[:2].square().sum() / S.square().sum()).item()
    assert f"{percent(share)} of the variance" in page.inner_text("#share")
    expected = centred if n_embd == 2 else centred @ directions[:2].T
    order = [["end", *LETTERS[1:]].index(text) for text, _, _ in texts]
    for axis in 0, 1:
        ranks = torch.tensor([text[1 + axis] for text in texts]).argsort().argsort()
        wanted = expected[order, axis].argsort().argsort()
        assert torch.equal(ranks, wanted) or torch.equal(ranks, len(texts) - 1 - wanted)


@pytest.mark.parametrize("case", ["WaveNet", "block size 64", "capitals"])
def test_a_phone(case, visit, tmp_path):
    chars, net = CASES[case]
    write_page(
        net,
        chars,
        path := tmp_path / "page.html",
        names=["ab"],
        title="a-list-with-a-long-name" * 3 + ".txt",
    )
    page = visit(path, hash="#text=abcdefghabcdefgh", width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#names [data-name]").first.bounding_box()["y"] < 500
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.is_visible("#match")


def test_light_and_dark(tiny, visit):
    def shades(scheme):
        page = visit(tiny, color_scheme=scheme)
        style = "getComputedStyle(document.body)"
        return [
            sum(map(int, re.findall(r"\d+", page.evaluate(f"{style}.{key}"))[:3]))
            for key in ("backgroundColor", "color")
        ]

    paper, ink = shades("light")
    assert paper - ink > 500
    paper, ink = shades("dark")
    assert ink - paper > 500


def test_keyboard_and_screen_reader(tiny, visit):
    page = visit(tiny)
    unnamed = """() => [...document.querySelectorAll("input, button")].filter(e => e.offsetParent &&
        !(e.labels?.length ? e.labels[0].innerText : e.innerText).trim()).map(e => e.id)"""
    assert page.evaluate(unnamed) == []
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    wanted = "start temperature count draw min-length max-length match top-k new sort text"
    assert {*wanted.split(), "BUTTON", "TR", "CANVAS"} <= reached
    page.focus("#start")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


# The best, and far from the list


def is_alike(a, b):
    """As --best leaves out: within two edits, of short names within one, of the shortest none."""
    shorter = min(len(a), len(b))
    return Levenshtein.distance(a, b) <= (0 if shorter < 3 else 1 if shorter < 5 else 2)


@pytest.mark.parametrize("settings", [{}, dict(minEdits=2), dict(maxLength=4), dict(start="jo")])
def test_the_best_of_20_times_as_many(settings, shipped, visit):
    _, chars, names, path = shipped
    page = visit(path)
    settings |= dict(seed=5)
    best = draw(page, count=20, best=True, **settings)
    pool = draw(page, count=400, new=True, **settings)  # the same seed draws the same names
    losses = dict(zip(pool, losses_of(path, chars, pool)))
    wanted = []
    for name in sorted(pool, key=losses.get):
        if len(wanted) < 20 and not any(is_alike(name, other) for other in wanted):
            wanted.append(name)
    assert best == wanted and len(best) == 20 and not set(best) & set(names)


@pytest.mark.parametrize("least", [1, 2, 3, 4])
def test_names_are_so_many_edits_from_the_list(least, shipped, visit):
    _, _, names, path = shipped
    page = visit(path)
    everything = draw(page, count=600, seed=7, new=True)
    edits = [min(Levenshtein.distance(name, other) for other in names) for name in everything[:80]]
    wanted = [name for name, e in zip(everything, edits) if e >= least]
    found = draw(page, count=len(wanted) or 1, seed=7, minEdits=least) if wanted else []
    assert found == wanted and (wanted or least == 4)


def test_edits_are_measured_between_characters_whatever_the_case(visit, tmp_path):
    chars = f".{MARK} abcdé😀"
    names = ["Ab 😀", "ÉCA", "dad 😀a", "CAÉbba", "BéÉ"]
    write_page(wavenet(chars, end=1.0), chars, path := tmp_path / "page.html", names=names)
    page = visit(path)
    for least in 2, 3:
        pool = draw(page, count=300, seed=3, new=True, maxLength=8)
        wanted = [
            name
            for name in pool
            if min(Levenshtein.distance(name.lower(), o.lower()) for o in names) >= least
        ]
        assert 10 < len(wanted) < 300
        found = draw(page, count=len(wanted), seed=3, minEdits=least, maxLength=8)
        assert found == wanted


def test_the_edits_of_400_names_are_quickly_counted(shipped, visit):
    page = visit(shipped[3])
    timed = """async settings => {
        const gaps = []; let last = performance.now(), done = false;
        const beat = () => { gaps.push(performance.now() - last); last += gaps.at(-1);
            if (!done) setTimeout(beat); };
        beat();
        const start = performance.now();
        await wavenet.draw(settings);
        const seconds = (performance.now() - start) / 1000;
        done = true;
        return [seconds, Math.max(...gaps)]; }"""
    page.evaluate(timed, dict(count=1, minEdits=2))
    plain, _ = page.evaluate(timed, dict(count=400, new=True, seed=1))
    far, gap = page.evaluate(timed, dict(count=400, minEdits=1, seed=1))
    assert far - plain < 1 and gap < 300


def test_fewer_than_asked_for_is_said(visit, tmp_path):
    net, chars = wavenet(".ab", end=1.0), ".ab"
    write_page(net, chars, path := tmp_path / "page.html", names=["ab"])
    page = visit(path)
    page.evaluate("location.hash = '#best=on&count=20&maxLength=5&new='")
    said = "() => message.innerText.includes(' of 20 names found among')"
    page.wait_for_function(said, timeout=60_000)
    names = names_on(page)
    assert 2 < len(names) < 20 and "ab" not in names
    assert page.inner_text("#message").startswith(f"{len(names)} of 20 names")
    assert not any(is_alike(a, b) for i, a in enumerate(names) for b in names[:i])


def test_what_a_page_without_a_list_cannot_do(visit, tmp_path):
    write_page(wavenet(end=1.0), LETTERS, path := tmp_path / "page.html")
    page = visit(path)
    assert not page.is_visible("#min-edits") and not page.is_visible("#new")
    page.check("#best")
    assert len(drawing(page)) == 20
    with pytest.raises(playwright.Error, match="not in this page"):
        draw(page, minEdits=2)


# Seeds, and what was there before


def sfc32(seed):
    """Doty-Humphrey's generator in Python."""
    a, b, c, n, M = 0, seed, 0, 1, 2**32 - 1
    for i in range(10**9):
        out, n = (a + b + n) & M, n + 1
        a, b, c = b ^ b >> 9, (c + (c << 3)) & M, (((c << 21 | c >> 11) & M) + out) & M
        if i >= 12:
            yield out / 2**32


def test_a_seed_gives_the_names_that_it_gives_in_python(tiny, visit):
    page = visit(tiny)
    for seed in 0, 1, 7, 2**32 - 1:
        points, name = sfc32(seed), ""
        while True:
            chances = chances_after(tiny, name)
            point, char = next(points) * sum(chances.values()), ""
            for char, p in chances.items():  # noqa: B007
                point -= p
                if point < 0:
                    break
            if not char:
                break
            name += char
        assert draw(page, count=1, seed=seed) == [name]


def test_a_link_gives_the_same_names_and_the_button_the_previous_ones(tiny, visit):
    page = visit(tiny)
    assert not page.is_visible("#previous")
    first = names_on(page)
    assert names_on(visit(tiny, hash=page.evaluate("location.hash"))) == first
    seed = page.input_value("#seed")
    page.fill("#text", "abc")
    shorter = drawing(page, lambda page: page.fill("#count", "5"))
    assert page.input_value("#seed") == seed and shorter == first[:5]
    third = drawing(page)
    assert page.input_value("#seed") != seed and third != shorter
    assert drawing(page, lambda page: page.click("#previous")) == shorter
    assert drawing(page, lambda page: page.click("#previous")) == first
    assert page.input_value("#count") == "20" and page.input_value("#text") == "abc"
    assert not page.is_visible("#previous")


# How it looks


def luminance(rgb):
    """WCAG 2: relative luminance of sRGB from 0 to 1."""
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def rgba(text):
    numbers = [float(x) for x in re.findall(r"(?<![a-z])[\d.]+(?:e-?\d+)?", text)]
    scale = 1 if text.startswith("color(") else 255
    return [x / scale for x in numbers[:3]], (numbers + [1.0])[3]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_four_and_a_half(scheme, shipped, visit):
    page = visit(shipped[3], hash="#text=emma&best=on", color_scheme=scheme)
    page.click("#names button")
    page.fill("#count", "0")
    page.wait_for_selector("#names.stale")
    page.fill("#text", "qu1")
    for text in "qu1", "emma", "jq":  # q is followed by u: a dark cell
        page.fill("#text", text)
        colours = page.evaluate("""() => {
            const found = [], walker = document.createTreeWalker(document.querySelector("main"), 4);
            const none = colour => /rgba\\(.*, 0\\)/.test(colour);
            while (walker.nextNode()) {
                const at = walker.currentNode.parentElement, style = getComputedStyle(at);
                if (!walker.currentNode.data.trim() || !at.getClientRects().length) continue;
                let under = at;
                while (under && none(getComputedStyle(under).backgroundColor))
                    under = under.parentElement;
                found.push([at.namespaceURI.endsWith("svg") ? style.fill : style.color,
                    getComputedStyle(under ?? document.body).backgroundColor,
                    walker.currentNode.data]);
            }
            for (const input of document.querySelectorAll("[placeholder]"))
                found.push([getComputedStyle(input, "::placeholder").color,
                    getComputedStyle(input).backgroundColor, "placeholder"]);
            return found; }""")
        assert len(colours) > 100
        for fore, back, words in colours:
            (front, solid), (ground, opaque) = rgba(fore), rgba(back)
            assert solid == opaque == 1
            a, b = sorted((luminance(front), luminance(ground)))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (words, fore, back)
    assert "light-dark(" not in Path(shipped[3]).read_text("utf-8")[:20_000]  # not in older Safari


@pytest.mark.parametrize("width", [1200, 360])
def test_targets_heads_and_landmarks(width, shipped, visit):
    page = visit(shipped[3], width=width)
    page.click("#names button")
    page.click("#draw")
    page.wait_for_selector("#previous:not([hidden])")
    if width < 720:
        page.click("summary")
    sizes = """() => [...document.querySelectorAll("button, input, summary, a")]
        .map(e => [e.id, e.getBoundingClientRect()]).filter(([, box]) => box.width)
        .map(([id, box]) => [id, box.width, box.height])"""
    small = [size for size in page.evaluate(sizes) if min(size[1:]) < 24]
    assert small == []
    assert page.locator("main").count() == 1 and page.locator("main h1").count() == 1
    heads = page.eval_on_selector_all("th", "all => all.map(e => e.textContent.trim())")
    assert heads and all(heads)


def test_a_phone_breaks_no_name_and_says_how_many_are_kept(shipped, visit):
    page = visit(shipped[3], hash="#count=200&new=&maxLength=10&seed=7", width=360)
    broken = """() => [...document.querySelectorAll("#names bdi")].filter(e =>
        e.getClientRects().length > 1 || e.offsetHeight > 30).map(e => e.innerText)"""
    assert page.evaluate(broken) == []
    assert page.locator("#draw").bounding_box()["height"] < 50
    assert not page.is_visible("#to-kept")
    for i in 0, 1:
        page.click(f"#names button >> nth={i}")
    assert page.inner_text("#to-kept") == "2 kept"
    for y in 0, 3000:
        page.evaluate("y => scrollTo(0, y)", y)
        box = page.locator("#to-kept").bounding_box()
        assert 0 < box["y"] < 844 - box["height"]
    before = page.evaluate("location.hash")
    page.evaluate("scrollTo(0, 0)")
    page.click("#to-kept")
    page.wait_for_function("() => scrollY > 300")
    assert page.locator("#kept").bounding_box()["y"] < 844
    assert page.evaluate("location.hash") == before


def test_the_map_moves_letters_apart_a_little(shipped, visit):
    page = visit(shipped[3])
    read = "(all, by) => all.map(e => by.map(k => +e.getAttribute(k)))"
    truth = torch.tensor(page.eval_on_selector_all("#map text", read, ["x", "y"]))
    moved = torch.tensor(page.eval_on_selector_all("#map text", read, ["dx", "dy"]))
    nearest = lambda at: torch.pdist(at).min()  # noqa: E731
    assert nearest(truth) < 9 and nearest(truth + moved) > 11
    assert moved.norm(dim=1).max() < 20
    assert "Map of the characters" in page.inner_text("h3")


# What is wrong, and other places to run in


def test_what_is_wrong_is_said_beside_its_field(tiny, visit):
    page = visit(tiny)
    wrong = (
        ("#count", "0", "whole number from 1 to 1000"),
        ("#count", "1001", "whole number from 1 to 1000"),
        ("#count", "2.5", "whole number from 1 to 1000"),
        ("#top-k", "0", "whole number from 1."),
        ("#match", "(", "“(” is not a regular expression"),
        ("#start", "é", "“é” is not among the characters"),
        ("#max-length", "0", "whole number from 1 to 1000"),
    )
    for field, text, words in wrong:
        before = page.input_value(field)
        page.fill(field, text)
        page.wait_for_selector("#names.stale")
        assert words in page.inner_text(f"label:has({field}) em")
        assert page.locator("#settings em").count() == 1
        assert page.get_attribute(field, "aria-invalid") == "true" and names_on(page)
        page.fill(field, before)
        page.wait_for_selector("#names:not(.stale)")
        assert page.locator("em").count() == 0
        assert page.get_attribute(field, "aria-invalid") == "false"


def test_capitals_that_the_list_has_otherwise(visit, tmp_path):
    chars = f".{MARK}agln"
    names = ["Gal", "Galla", "Nala"]
    write_page(wavenet(chars, end=1.0), chars, path := tmp_path / "page.html", names=names)
    page = visit(path)
    page.fill("#start", "gal")
    page.wait_for_selector("label:has(#start) em")
    said = page.inner_text("label:has(#start) em")
    assert said == "No name begins with gal: did you mean Gal?"
    assert all(name.startswith("gal") for name in drawing(page))  # and still draws
    for text in "Gal", "ll":
        assert drawing(page, lambda page, text=text: page.fill("#start", text))
        assert page.locator("em").count() == 0
    page.fill("#start", "")
    page.fill("#max-length", "2")
    page.fill("#match", "X")
    page.click("#draw")
    page.wait_for_selector("label:has(#match) em", timeout=60_000)
    assert "Capital letters count" in page.inner_text("label:has(#match) em")


def test_an_accent_behind_the_caret(visit, tmp_path):
    write_page(wavenet(chars := ".abé"), chars, path := tmp_path / "page.html")
    page = visit(path)
    page.fill("#text", "ae\u0301b")  # e alone is not known, é is
    page.evaluate("text.setSelectionRange(2, 2)")
    page.locator("#text").press("Shift")
    assert page.inner_text("#fed").startswith("After “aé”")
    page.evaluate("text.setSelectionRange(1, 1)")
    page.locator("#text").press("Shift")
    assert page.inner_text("#fed").startswith("After “a”")


@pytest.mark.parametrize("sandbox", [None, "allow-scripts"])
def test_inside_a_notebook(sandbox, tiny, browser):
    page = browser.new_page()
    page.set_content("<iframe width=1000 height=900></iframe>")
    page.evaluate(
        """([text, sandbox]) => { const frame = document.querySelector("iframe");
        if (sandbox) frame.sandbox = sandbox; frame.srcdoc = text; }""",
        [Path(tiny).read_text("utf-8"), sandbox],
    )
    frame = page.frame_locator("iframe")
    frame.locator("#names button >> nth=19").wait_for()
    before = frame.locator("#names").inner_text()
    frame.locator("#draw").click()
    frame.locator("#previous").wait_for()
    assert frame.locator("#names").inner_text() != before
    frame.locator("#names button >> nth=0").click()
    assert frame.locator("#kept button").count() == 1
    page.close()


def test_older_browsers_and_none(tiny, visit, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{tiny}")
    assert "needs JavaScript" in page.inner_text("main")
    context.close()
    context = browser.new_context()  # Safari before 17
    context.add_init_script("delete URLSearchParams.prototype.size")
    page = visit(tiny, hash="#count=3&new=", context=context)
    assert len(names_on(page)) == 3
    context.close()


def test_the_shelf_belongs_to_the_network(visit, tmp_path):
    paths = [tmp_path / f"{i}.html" for i in range(3)]
    write_page(wavenet(end=1.0), LETTERS, paths[0], title="one")
    write_page(wavenet(end=1.0), LETTERS, paths[1], title="two", names=["a"], heading="Three")
    write_page(wavenet(end=1.1), LETTERS, paths[2], title="one")
    page = visit(paths[0])
    name = names_on(page)[0]
    page.click("#names button")
    assert kept_on(visit(paths[1], context=page.context)) == [name]
    assert kept_on(visit(paths[2], context=page.context)) == []
    assert len({content(path)["id"] for path in paths}) == 2
    assert re.fullmatch("[0-9a-f]{12}", content(paths[0])["id"])


def test_space_with_another_key_is_left_alone(tiny, visit):
    page = visit(tiny)
    before = page.input_value("#seed")
    page.evaluate("document.activeElement.blur()")
    for key in "Control", "Shift", "Alt":
        page.keyboard.press(f"{key}+Space")
    assert page.input_value("#seed") == before
    page.evaluate("scrollTo(0, 0)")
    page.keyboard.press("Space")
    assert page.input_value("#seed") != before


def test_the_keyboard_inside_the_tree_the_table_and_the_kept_names(tiny, visit):
    page = visit(tiny, hash="#text=abc")
    for box in "#tree", "#chances":
        one = f"{box} [tabindex='0']"
        assert page.locator(one).count() == 1 and page.locator(f"{box} [tabindex]").count() > 2
        page.focus(one)
        page.keyboard.press("ArrowDown")
        index = "box => [...document.querySelectorAll(box)].indexOf(document.activeElement)"
        assert page.evaluate(index, f"{box} [tabindex]") == 1
        assert page.locator(one).count() == 1
        page.keyboard.press("ArrowLeft")
        assert page.evaluate(index, f"{box} [tabindex]") == 0
        page.keyboard.press("Tab")
        assert page.evaluate(index, f"{box} [tabindex]") == -1
    names = list(dict.fromkeys(names_on(page)))[:3]
    for name in names:
        page.click(f"#names [data-name={name}]")
    focus = "document.activeElement.dataset.name ?? document.activeElement.id"
    page.focus(f"#kept [data-name={names[1]}]")
    for expected in names[2], names[0], "draw":
        page.keyboard.press("Enter")
        assert page.evaluate(focus) == expected
    assert kept_on(page) == []


def test_a_name_that_is_clicked_is_explained(tiny, visit):
    page = visit(tiny)
    name = names_on(page)[3]
    page.click("#names button >> nth=3")
    assert page.input_value("#text") == name
    heads = page.eval_on_selector_all("#chances [scope=row]", "all => all.map(e => e.innerText)")
    assert heads == ["(start)", *(name[: i + 1] for i in range(len(name)))]
    assert page.inner_text("#fed").startswith(f"After “{name}”")


# What Python gives


def test_the_number_is_that_of_score(visit, tmp_path):
    quantiles = [1 + 0.02 * i for i in range(101)]
    path = tmp_path / "page.html"
    write_page(wavenet(end=1.0), LETTERS, path, quantiles=quantiles)
    page = visit(path, hash="#count=200&temperature=2")
    rows = "all => all.map(e => [e.dataset.name, e.querySelector('small').innerText, e.title])"
    shown = page.eval_on_selector_all("#names button", rows)
    losses = losses_of(path, LETTERS, [name for name, _, _ in shown])
    for loss, (_, number, title) in zip(losses, shown):
        near = {max(0, 100 - bisect.bisect_left(quantiles, loss + e)) for e in (-1e-3, 1e-3)}
        assert int(number) in near and abs(float(title.split()[0]) - loss) < 2e-3
        assert title.endswith(" nats per character")
    assert len({number for _, number, _ in shown}) > 10
    assert "held-out names" in page.inner_text("#number")
    write_page(wavenet(end=1.0), LETTERS, path)
    assert "nats per character" in visit(path).inner_text("#number")


def test_heading_and_lengths(visit, tmp_path):
    path, heading = tmp_path / "page.html", "Names & <b>towns</b>"
    settings = dict(heading=heading, lengths=[3, 6])
    write_page(wavenet(end=1.0), LETTERS, path, title="towns.txt", **settings)
    page = visit(path)
    assert page.inner_text("h1") == heading == page.title()
    assert page.inner_text("#list") == "towns.txt"
    assert page.input_value("#min-length") == "3" and page.input_value("#max-length") == "6"
    assert {len(name) for name in names_on(page)} <= {3, 4, 5, 6}
    write_page(wavenet(end=1.0), LETTERS, path)
    page = visit(path)
    assert page.inner_text("h1") == "Names" == page.title()  # which are new is not known
    write_page(wavenet(end=1.0), LETTERS, path, ["abc"])
    page = visit(path)
    assert page.inner_text("h1") == "New names" == page.title()


def test_the_page_can_load_nothing_and_run_no_text(tiny, browser):
    """Its policy: whatever a list might smuggle in."""
    page = browser.new_page()
    page.goto(f"file://{tiny}")
    blocked = "() => fetch('data:,x').then(() => false, () => true)"
    assert page.evaluate(blocked)
    assert page.evaluate("""() => new Promise(done => { const image = new Image();
        image.onload = () => done(false); image.onerror = () => done(true);
        image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="; })""")
    assert page.evaluate("""() => { const script = document.createElement("script");
        script.src = "data:text/javascript,window.ran=1"; document.body.append(script);
        return new Promise(done => setTimeout(() => done(window.ran === undefined), 200)); }""")
    page.close()


def test_an_unfilled_page_says_so(browser):
    page = browser.new_page()
    page.goto(f"file://{ROOT}/plumbing/page.html")
    assert "sampling.py --page" in page.inner_text("body")
    page.close()


def test_other_flags_and_other_layers_are_refused(tmp_path, refused, capsys):
    page = tmp_path / "names.html"
    refused(sampling.main, ["--page", page, "-n", 3], "--num-samples", "--page")
    net = torch.nn.Sequential(*wavenet()[:-1], torch.nn.Linear(13, len(LETTERS)))
    with pytest.raises(ValueError, match="only Embedding, Fl"):
        plumbing_page.write_page(page, net, model.Vocabulary([LETTERS[1:]]), "", None)
    assert not page.exists()
    sampling.main(["--page", str(page)])
    assert page.stat().st_size < 800_000 and f"{page}, to be" in capsys.readouterr().err
    sampling.main(["--page", str(page), "--new"])
    assert "29,693 names" in capsys.readouterr().err


def test_letters_whose_case_leads_one_way_are_themselves(visit, tmp_path):
    """A mark before a dotless i or a final sigma is nothing, as in model.py."""
    names = ["Ilıca", "ılgaz", "Σοφός", "σας"]
    vocab = model.Vocabulary(names)
    write_page(wavenet(vocab.chars, end=1.0), vocab.chars, path := tmp_path / "page.html")
    page = visit(path)
    for char in "ıςσiI":
        known = page.evaluate(
            "c => { try { wavenet.logits(c); return true; } catch { return false; } }", char
        )
        assert known == (char in vocab.tokens_of), char


def test_a_name_of_the_list_is_not_new_in_other_letters(visit, tmp_path):
    names = ["A", "B", "C", "AB", "Ba"]
    write_page(wavenet(end=1.0), LETTERS, path := tmp_path / "page.html", names=names)
    page = visit(path)
    drawn = draw(page, count=80, maxLength=2, new=True)
    assert len(set(drawn)) == 80 and not {name.lower() for name in names} & set(drawn)
    assert {name.lower() for name in names} & set(draw(page, count=300, maxLength=2))
