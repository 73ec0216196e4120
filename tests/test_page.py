"""The page in a real browser: what it computes, compared with torch, and what it does."""

import base64
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


def write_page(net, chars, path, names=None, title="a list"):
    """The only place that knows how a page is made."""
    vocab = model.Vocabulary(["".join(chars[1:])])
    assert vocab.chars == "".join(chars)
    plumbing_page.write_page(path, net, vocab, title, names)


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
    session.send(
        "Performance.enable", {"timeDomain": "threadTicks"}
    )  # processor time, not the clock's
    page.reload()
    page.wait_for_selector("#tree span")
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    assert 0 < metrics["TaskDuration"] < 0.5
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
    assert [row.query_selector("th").inner_text() for row in rows] == ["", "e", "em", "emm", "emma"]
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
    page.fill("#text", "emma1")
    assert "“1” is not among" in page.inner_text("#likeliest")


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
    with pytest.raises(ValueError, match="only the layers of layers.py"):
        plumbing_page.write_page(page, net, model.Vocabulary([LETTERS[1:]]), "", None)
    assert not page.exists()
    sampling.main(["--page", str(page)])
    assert page.stat().st_size < 800_000 and capsys.readouterr().err == ""
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
