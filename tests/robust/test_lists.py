"""Lists as people have them: what is one is read as meant, anything else is one clear line."""

import codecs
import io
import json
import os
import random
import subprocess
import zipfile
from unicodedata import normalize as unicode_form

import pytest
from conftest import ROOT, forked
from helpers import NAMES, command
from hypothesis import given, settings
from hypothesis import strategies as st

import model
import sampling
import train
from model import load, read_names

pytest_plugins = "folders"
FOLK = ["Ann-Marie", "Zoë", "O'Neill", "Bob", "Łucja", "Washington, D.C.", "St. Ives", "Kay"] * 4
FOLK = [f"{name} {chr(ord('A') + i)}" for i, name in enumerate(FOLK[:26])]


@pytest.fixture
def listed(tmp_path):
    """listed(content, column) -> the names read from a file of that text or bytes, and messages."""

    def read(content, column=None):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "list.txt").write_bytes(data)
        messages = []
        return read_names(tmp_path / "list.txt", column, messages.append), messages

    return read


@pytest.fixture
def no_list(tmp_path, listed):
    """no_list(content, words): it is refused in one line that holds them and the file's name."""

    def check(content, *words, column=None):
        with pytest.raises(ValueError) as error:
            listed(content, column)
        for word in (str(tmp_path / "list.txt"), *words):
            assert word in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400

    return check


# Names


def test_repeated_rows_count_once_and_it_says_so(listed):
    """Also where only Unicode's form or the blanks around them differ."""
    text = "\n".join(["zoë", " anna\t", "bob", "zoe\u0308", "anna", "", "anna"])
    names, messages = listed(text)
    assert names == ["zoë", "anna", "bob"]  # in the order of their first rows
    assert messages == ["3 repeated rows count once"]
    assert listed("anna\nbob\n") == (["anna", "bob"], [])


def test_names_txt_has_29693_distinct_names_of_32257_rows():
    messages = []
    assert len(read_names(ROOT / "names.txt", log=messages.append)) == 29_693
    assert messages == ["2,564 repeated rows count once"]


def lists_that_people_bring():
    """Dinosaurs, towns with commas, dots, blanks and numbers, creatures, capitals, scripts."""
    draw, syllables = random.Random(3), "ta ra no sau rus ky lo pho don te ri ba lau".split()
    made = ["".join(draw.choices(syllables, k=draw.randint(2, 5))) for _ in range(900)]
    yield "dinosaurs", [name + "saurus" for name in made[:250]]
    yield "towns", [name.title() + draw.choice(["", " upon " + name.title()]) for name in made]
    yield "states", [name.title() + draw.choice(["", ", D.C.", ", Va."]) for name in made]
    yield "dots", ["St. " * (i % 3 == 0) + name for i, name in enumerate(made)]
    yield "capitals", [name.upper() for name in made]
    yield "creatures", [name + draw.choice(["", "♀", " 2", "'d", "-o"]) for name in made]
    yield "numbers", [name + draw.choice(["", "", " 747"]) for name in made]
    for script, first in (
        ("korean", 0xAC00),
        ("chinese", 0x4E00),
        ("arabic", 0x628),
        ("thai", 0xE01),
    ):
        yield script, ["".join(chr(first + ord(c) % 20) for c in name) for name in made]
    yield "quotes", ['"' * (i % 5 == 0) + name + "'s" * (i % 7 == 0) for i, name in enumerate(made)]
    yield "brackets", [name + " [the old]" for name in made] + ["[x]"]
    yield "folk", FOLK
    yield "one", ["anna"]


@pytest.mark.parametrize("kind, names", lists_that_people_bring())
def test_lists_that_people_bring_are_read_as_they_stand(listed, kind, names):
    assert listed("\n".join(names))[0] == list(dict.fromkeys(names))


def test_invisible_characters_are_taken_out_and_counted_and_joiners_stay(listed):
    spells = ["\u0645\u06cc\u200c\u0634\u0648\u062f", "\u0915\u094d\u200d\u0937", "👩\u200d🚀"]
    text = ["an\u200bna", "bo\u00adb", "\u202ecarl\u202c", "\ufeffdora", "e\u2060va", *spells]
    names, messages = listed("\n".join(text))
    assert names == ["anna", "bob", "carl", "dora", "eva", *spells]
    assert messages == ["invisible characters were taken out of 5 rows"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "mac"])
def test_encodings_and_line_ends_of_all_systems(listed, encoding):
    text = "zoë\r\nanna\r\nżółć\r\n"
    if encoding == "mac":
        text, encoding = text.replace("\r\n", "\r"), "utf-8"
    assert listed(text.encode(encoding))[0] == ["zoë", "anna", "żółć"]
    assert listed(codecs.BOM_UTF16_BE + text.encode("utf-16-be"))[0] == ["zoë", "anna", "żółć"]


# Tables

ROWS = [("Sophia", "F", "21147"), ("O'Neil, Ann", "F", "12"), ('Kate "Kit"', "M", "9")]
CSV = 'Sophia,F,21147\n"O\'Neil, Ann",F,12\n"Kate ""Kit""",M,9\n'


@pytest.mark.parametrize("delimiter", ",;\t")
def test_a_column_is_taken_by_its_number_or_its_heading(listed, delimiter):
    quoted = [
        [f'"{field}"'.replace('t"K', 't""K').replace('t"" ', "") for field in row] for row in ROWS
    ]
    rows = ["name,sex,births".replace(",", delimiter)]
    for row in ROWS:
        fields = ['"' + field.replace('"', '""') + '"' for field in row]
        rows.append(delimiter.join(fields))
    text = "\n".join(rows)
    assert listed(text, "name")[0] == [row[0] for row in ROWS]
    assert listed(text, "births")[0] == ["21147", "12", "9"]
    assert listed(text, "1")[0] == ["name", *(row[0] for row in ROWS)]
    assert listed(text, "2")[0] == ["sex", "F", "M"]


def test_a_column_that_is_not_there_is_said(no_list):
    no_list(CSV, "'4'", column="4")
    no_list(CSV, "'name'", column="name")
    no_list("", column="name")
    no_list(CSV, column="-1")
    no_list(CSV, column="²")
    no_list('anna,"' + "b" * 140_000, column="1")


JSON = json.dumps([{"name": name} for name in NAMES], indent=1)


@pytest.mark.parametrize(
    "text, first",
    [
        (CSV, "Sophia,F,21147"),
        (CSV.replace(",", ";"), "Sophia;F;21147"),
        ("\n".join(f"{name}\t{i}" for i, name in enumerate(NAMES)), "Sophia|kal"),
        ("name,sex\n" + "".join(f"{name},F\n" for name in NAMES), "name,sex"),
        ("".join(f"{i}. {name}\n" for i, name in enumerate(NAMES)), "0. kal"),
        ("".join(f"{i} {name}\n" for i, name in enumerate(NAMES)), "0 kal"),
        ("".join(f"{name} {i}\n" for i, name in enumerate(NAMES)), "kal 0"),
        ("".join(f"{name}, {i}\n" for i, name in enumerate(NAMES)), "kal, 0"),
        (json.dumps(NAMES), "["),
        (JSON, "["),
        (json.dumps({"names": NAMES}), "{"),
    ],
)
def test_a_table_is_refused_with_its_first_row_and_what_to_do(listed, no_list, text, first):
    no_list(text, first.split("|")[-1], "--column 1" if "\n" in text else "")
    assert listed(text, "0")[0] == [unicode_form("NFC", row).strip() for row in text.splitlines()]


def test_one_long_line_is_called_that(no_list):
    for text in "Anna,Bob,Carl", "Anna;Bob;Carl\n", "Anna\tBob\n\n":
        no_list(text, "one name per line", "one line", "Anna")


def test_scoring_takes_lines_as_they_stand(trained, tmp_path):
    (tmp_path / "table.csv").write_text("kal,3\nkan,4\n1. mal\n[5]\n")
    args = "--model", trained / "own.pth", "--score", tmp_path / "table.csv"
    process = forked(sampling.main, *args)
    assert process.returncode == 0, process.stderr
    scored = [line.split("\t")[-1] for line in process.stdout.splitlines()]
    assert scored == ["kal,3", "kan,4", "1. mal", "[5]"]


# What is none


def test_control_characters_are_counted_and_the_first_line_named(no_list):
    no_list("anna\nbo\x00b\ncarl\nd\x1bora\n\x9beva\n", "3 rows", "line 2")


def package(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x" * 99)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, words",
    [
        (package("[Content_Types].xml", "_rels/.rels", "xl/workbook.xml"), "Excel"),
        (package("[Content_Types].xml", "_rels/.rels", "word/document.xml"), "Word"),
        (package("names.txt"), "zip"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "gzip"),
        (b"zo\xeb\n", "UTF-8"),
        (b"\xff\xfea\x00b", "UTF-8|UTF-16"),
        (b"", "no names"),
        (b"\n \n\r\n\t\n\xe2\x80\x8b\n", "no names"),
        (b"x" * 2**16, "in a line"),
    ],
)
def test_files_of_other_kinds_are_called_what_they_are(no_list, data, words):
    no_list(data, words.split("|")[0])


def test_too_long_endless_or_no_file_at_all(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(model, "MAX_CHARACTERS", 10**5)
    os.mkfifo(tmp_path / "endless")
    for path in "/dev/zero", tmp_path, tmp_path / "none", tmp_path / "endless":
        with subprocess.Popen(["sh", "-c", f"yes > {tmp_path}/endless"], stderr=-3) as yes:
            refused(train.main, ["--data", path, "--out", tmp_path / "own.pth"], str(path))
            yes.kill()
    assert os.listdir(tmp_path) == ["endless"]


@given(
    st.binary(max_size=300)
    | st.text(max_size=200).map(str.encode)
    | st.text(".\n\r\t ,;[{1aé\x00\x1b\ufeff").map(str.encode),
    st.sampled_from([None, "0", "1", "a"]),
)
@settings(max_examples=300)
def test_any_bytes_are_names_or_one_clear_line(tmp_path_factory, data, column):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    try:
        names = read_names(path, column)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert names and len(set(names)) == len(names)
        assert all(name == model.normalize(name) != "" for name in names)
        vocab = model.Vocabulary(names)
        assert [vocab.decode(vocab.encode(name)) for name in names] == names


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=40))
def test_a_training_on_any_list_ends_well_or_with_one_line(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("any")
    (folder / "names.txt").write_text("\n".join(lines), encoding="utf-8")
    try:
        train.main(command(folder, "--steps", "9"))
    except SystemExit as exit:
        assert exit.code == 2
        assert os.listdir(folder) == ["names.txt"]
    else:
        load(folder / "own.pth")


def test_few_names_are_called_few(folder):
    (folder / "names.txt").write_text("\n".join(NAMES[:60]))
    process = forked(train.main, *command(folder))
    assert process.returncode == 0, process.stderr
    assert "60 names are few" in process.stderr and "--temperature 0.7" in process.stderr
    assert "--init-from" in process.stderr


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_too_few_to_split_is_said(folder, n):
    (folder / "names.txt").write_text("\n".join(NAMES[:n]))
    process = forked(train.main, *command(folder))
    assert process.returncode == 2 and "too few" in process.stderr.splitlines()[-1]
    assert sorted(os.listdir(folder)) == ["names.txt", "own.pth"]
