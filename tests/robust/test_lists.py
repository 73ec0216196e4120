"""Lists as people have them: what is one is read as meant, anything else is one clear line."""

import io
import json
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter
from unicodedata import normalize as form

import pytest
from helpers import NAMES, ROOT, command, forked, last_line, training
from hypothesis import given, settings
from hypothesis import strategies as st

import model
import sampling
import train
from model import load
from plumbing import lists
from plumbing.lists import read_names


@pytest.fixture
def listed(tmp_path):
    """listed(text or bytes, column) -> the names read from such a file, and the messages."""

    def read(content, column=None):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "list.txt").write_bytes(data)
        messages = []
        return read_names(tmp_path / "list.txt", column, messages.append), messages

    return read


@pytest.fixture
def no_list(tmp_path, listed):
    """no_list(content, *words): it is refused in one line that holds them and the file's name."""

    def check(content, *words, column=None):
        with pytest.raises(ValueError) as error:
            listed(content, column)
        assert all(word in str(error.value) for word in (str(tmp_path / "list.txt"), *words))
        assert "\n" not in str(error.value) and len(str(error.value)) < 400

    return check


# Names


def test_repeated_rows_count_once_and_it_says_so(listed):
    """Also where only Unicode's form or the blanks around them differ."""
    names, messages = listed("zoë\n anna\t\nbob\nzoe\u0308\nanna\n\nanna")
    assert names == ["zoë", "anna", "bob"]  # in the order of their first rows
    assert messages == ["3 repeated rows count once"]
    assert listed("anna\nbob\n") == (["anna", "bob"], [])


def test_names_txt_has_29693_distinct_names_of_32257_rows():
    messages = []
    assert len(read_names(ROOT / "names.txt", log=messages.append)) == 29_693
    assert messages == ["2,564 repeated rows count once"]


def lists_that_people_bring():
    draw, syllables = random.Random(3), "ta ra no sau rus ky lo pho don te ri ba lau".split()
    made = ["".join(draw.choices(syllables, k=draw.randint(2, 5))) for _ in range(900)]
    yield "dinosaurs", [name + "saurus" for name in made[:250]]
    yield "towns", [name.title() + draw.choice(["", ", D.C.", ", Va.", " upon X"]) for name in made]
    yield "dots", ["St. " * (i % 3 == 0) + name for i, name in enumerate(made)]
    yield "capitals", [name.upper() for name in made]
    yield "creatures", [name + draw.choice(["", "♀", " 2", "'d", "-o", " 747"]) for name in made]
    for script, first in (
        ("Korean", 0xAC00),
        ("Chinese", 0x4E00),
        ("Arabic", 0x628),
        ("Thai", 0xE01),
    ):
        yield script, ["".join(chr(first + ord(c) % 20) for c in name) for name in made]
    yield "quotes", ['"' * (i % 5 == 0) + name + "'s" * (i % 7 == 0) for i, name in enumerate(made)]
    yield "apostrophes", ["O’" * (i % 2) + name + " l'a-b." for i, name in enumerate(made)]
    yield "Hebrew", ["בת־" + name + "׳" for name in made]
    yield "comments", ["# elves, of all kinds", "1,2"] + made + ["[end]"]
    yield "one", ["anna"]


@pytest.mark.parametrize("kind, names", list(lists_that_people_bring()))
def test_lists_that_people_bring_are_read_as_they_stand(listed, kind, names):
    assert listed("\n".join(names))[0] == list(dict.fromkeys(names))


def test_invisible_characters_are_taken_out_and_counted_and_joiners_stay(listed):
    spelled = ["\u0645\u06cc\u200c\u0634\u0648\u062f", "\u0915\u094d\u200d\u0937", "👩\u200d🚀"]
    text = ["an\u200bna", "bo\u00adb", "\u202ecarl\u202c", "\ufeffdora", "e\u2060va", *spelled]
    names, messages = listed("\n".join(text))
    assert names == ["anna", "bob", "carl", "dora", "eva", *spelled]
    assert messages == ["invisible characters were taken out of 5 rows"]


def test_encodings_and_line_ends_of_all_systems(listed):
    text = "zoë\r\nanna\r\nżółć\r\n"
    big_endian = ("\ufeff" + text).encode("utf-16-be")
    datas = [text.encode(name) for name in ("utf-8", "utf-8-sig", "utf-16")] + [big_endian]
    for data in [*datas, text.replace("\r\n", "\r").encode()]:
        assert listed(data) == (["zoë", "anna", "żółć"], [])


def test_names_are_the_same_in_other_letters_blanks_and_apostrophes(listed):
    """The first form is kept as it was written, with one blank where there were several."""
    text = "Rae,RAE,rae,San  Juan,san\u00a0juan,San Juan,O’Lehna,O'Lehna,Éve,e\u0301ve"
    names, messages = listed(text.replace(",", "\n"))
    assert names == ["Rae", "San Juan", "O’Lehna", "Éve"]
    assert messages == ["6 repeated rows count once"]


def test_a_name_of_the_list_is_not_new_in_other_letters(trained, tmp_path):
    """Nor near to it: what is drawn are small letters, the list has capitals."""
    text = (trained / "names.txt").read_text()
    (tmp_path / "capitals.txt").write_text(text.upper())
    args = "--model", trained / "own.pth", "--data", tmp_path / "capitals.txt", "-n", 300
    process = forked(sampling.main, *args, "--new")
    assert not {*process.stdout.split()} & {*text.split()} and len(process.stdout) > 1000
    process = forked(sampling.main, *args, "--min-edits", 2, "--max-length", 4)
    far = process.stdout.split()
    assert far and not any(
        name[:i] + name[i + 1 :] in text.split() for name in far for i in range(4)
    )


# Tables

ROWS = [("Sophia", "F", "21147"), ("O'Neil, Ann", "F", "12"), ('Kate "Kit"', "M", "9")]
CSV = 'Sophia,F,21147\n"O\'Neil, Ann",F,12\n"Kate ""Kit""",M,9\n'


@pytest.mark.parametrize("delimiter", ",;|~\t")
def test_a_column_is_taken_by_its_number_or_its_heading(listed, delimiter):
    rows = [['"' + field.replace('"', '""') + '"' for field in row] for row in ROWS]
    text = "\n".join(delimiter.join(row) for row in [["name", "sex", "births"], *rows])
    assert listed(text, "name") == ([row[0] for row in ROWS], ["column 1 of 3"])
    assert listed(text, "births") == (["21147", "12", "9"], ["column 3 of 3"])
    assert listed(text, "1")[0] == ["name", *(row[0] for row in ROWS)]
    assert listed(text, "2") == (["sex", "F", "M"], ["column 2 of 3", "1 repeated rows count once"])


def test_a_column_that_is_not_there_is_said(listed, no_list):
    for column in "0.5", "4", "name", "-1", "²", "1.5", "":
        no_list(CSV, "3 columns" if column == "4" else "no column", column=column)
    no_list("", column="name")
    no_list('anna,"' + "b" * 140_000, column="1")
    no_list("anna\nbob\n", "it has one column", column="1")
    assert listed("name\nanna\nbob\n", "name") == (["anna", "bob"], [])


def test_the_delimiter_is_the_one_that_the_rows_share(listed):
    text = "Name;Place\nAnna;Paris, Texas, USA\nBob;Rome\n"
    assert listed(text, "Name")[0] == ["Anna", "Bob"]
    assert listed(text, "2")[0] == ["Place", "Paris, Texas, USA", "Rome"]


def test_a_quote_that_is_never_closed_swallows_no_rows_unnoticed(no_list):
    no_list('name,sex\n"Anna,F\nBob,M\n', "control characters", column="1")


def test_a_name_may_begin_like_an_archive(listed):
    assert listed("PKal\nkal\n")[0] == ["PKal", "kal"]


COLUMN, OUT, NUMBERS, ALONE = "--column 1", "take it out", "numbers out", "save the names alone"
PATTERNS = {
    COLUMN: ["{name},{i}", "{name};F", "{name}|F", "{name}~F", "{name}\t{i}", "{i}\t{name}"]
    + ["{name}, spirit of winter", "{name}, a, b, c, d, e, f", "{name}, {i}"],
    OUT: ["- {name}", "* {name}", "• {name}", "* [[{name}]]", '"{name}"', "'{name}'", "key={name}"]
    + ["{name} # check", "({name})", "{name}:", "_{name}_", "#{name}", "-{name}", ".{name}"],
    NUMBERS: ["{i}. {name}", "{i} {name}", "{name} {i}", "({i}) {name} 7", "{name} 0.753 6.692 4"]
    + ["{name} {i}%", "{name} {i}.", "{i}) {name}", "#{i} {name} 3"],
    ALONE: ["<li>{name}</li>", '{{"name": "{name}"}}', "[[{name}]]", '["{name}"],'],
}
KINDS = [(pattern, what) for what, patterns in PATTERNS.items() for pattern in patterns]


@pytest.mark.parametrize("pattern, what", KINDS)
def test_what_is_no_list_is_refused_with_a_row_and_what_to_do(listed, no_list, pattern, what):
    """Where nine rows in ten are such; and read where fewer are, or with --column 0."""
    rows = [pattern.format(i=i, name=name) for i, name in enumerate(NAMES, 1)]
    text = "\n".join(rows)
    no_list(text, repr(rows[0])[1:-1], what, "(--column 0)")
    no_list("\n".join([*rows, *NAMES[:20]]), what)
    if "\t" in text:
        no_list(text, "control characters", column="0")
    else:
        assert listed(text, "0")[0] == rows
        assert what == ALONE or listed("\n".join([*NAMES[:80], *rows]))[0][80:] == rows


def test_a_list_of_json_is_refused_in_one_row_or_several(no_list):
    for text in json.dumps(NAMES), json.dumps([{"name": name} for name in NAMES], indent=1):
        no_list(text, repr(text.splitlines()[0][:60])[1:-1], ALONE)


def test_a_file_of_commas_is_refused_at_once(no_list):
    """By the number of characters that are looked at, not by a clock."""
    rows = ["anna" + "," * 2**14] * 300
    calls = Counter()

    def count(frame, kind, function):
        calls[kind] += 1

    sys.setprofile(count)
    try:
        no_list("\n".join(rows), COLUMN)
    finally:
        sys.setprofile(None)
    assert calls.total() < 100_000


def test_one_long_line_is_called_that(no_list):
    for text in "Anna,Bob,Carl", "Anna;Bob;Carl\n", "Anna\tBob\n\n", "Anna (Bob)":
        no_list(text, "one name per line", "its one line", "Anna")


def test_scoring_takes_lines_as_they_stand(trained, tmp_path):
    (tmp_path / "table.csv").write_text("kal,3\nkan,4\n1. mal\n[5]\n")
    args = "--model", trained / "own.pth", "--score", tmp_path / "table.csv"
    process = forked(sampling.main, *args)
    assert process.returncode == 0, process.stderr
    scored = [line.split("\t")[-1] for line in process.stdout.splitlines()]
    assert scored == ["kal,3", "kan,4", "1. mal", "[5]"]


# What is none


def package(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x" * 99)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "words, data",
    [
        ("an Excel", package("[Content_Types].xml", "_rels/.rels", "xl/workbook.xml")),
        ("a Word", package("[Content_Types].xml", "_rels/.rels", "word/document.xml")),
        ("a zip", package("names.txt")),
        ("a gzip", b"\x1f\x8b\x08\x00" + bytes(20)),
        ("not UTF-8", b"zo\xeb\n"),
        ("UTF", b"\xff\xfea\x00b"),
        ("no names", b""),
        ("no names", b"\n \n\r\n\t\n\xe2\x80\x8b\n"),
        ("in a line", b"x" * 2**16),
        ("3 rows hold control characters, the first is line 2", b"a\nb\x00\nc\nd\x1b\n\xc2\x9be\n"),
    ],
)
def test_other_files_are_called_what_they_are(no_list, words, data):
    no_list(data, words)


def test_what_is_endless_or_no_file_at_all_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(lists, "MAX_CHARACTERS", 10**5)
    os.mkfifo(tmp_path / "endless")
    with subprocess.Popen(["sh", "-c", f"yes > {tmp_path}/endless"], stderr=-3):
        for path in tmp_path / "endless", "/dev/zero", tmp_path, tmp_path / "none":
            refused(train.main, ["--data", path, "--out", tmp_path / "own.pth"], str(path))
    assert os.listdir(tmp_path) == ["endless"]


@given(
    st.binary(max_size=300)
    | st.text(max_size=200).map(str.encode)
    | st.text(".\n\r\t ,;[{1aé\x00\x1b\ufeff").map(str.encode),
    st.sampled_from([None, "0", "1", "a"]),
)
@settings(max_examples=200)
def test_any_bytes_are_names_or_one_clear_line(tmp_path_factory, data, column):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    try:
        names = read_names(path, column)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert names and len(set(names)) == len(names)
        assert all(name == form("NFC", name).strip() for name in names)
        vocab = model.Vocabulary(names)
        assert [vocab.decode(vocab.encode(name)) for name in names] == names


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=40))
def test_a_training_on_any_list_ends_well_or_with_one_line(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("any")
    (folder / "names.txt").write_text("\n".join(lines), encoding="utf-8")
    try:
        train.main(command(folder, "--steps", "9"))
    except SystemExit as exit:
        assert exit.code == 2 and os.listdir(folder) == ["names.txt"]
    else:
        names = read_names(folder / "names.txt")
        assert load(folder / "own.pth")[2]["rows"] == len(names)


def test_few_names_are_called_few_and_too_few_are_refused(folder):
    (folder / "names.txt").write_text("\n".join(NAMES[:60]))
    process = training(folder)
    assert process.returncode == 0, process.stderr
    assert all(word in process.stderr for word in ("few", "--temperature 0.7", "--init-from"))
    for n in range(1, 5):
        (folder / "names.txt").write_text("\n".join(NAMES[:n]))
        assert f"{n} names are too few" in last_line(training(folder))
    assert sorted(os.listdir(folder)) == ["names.txt", "own.png", "own.pth"]
