"""Concepts from a file: CSV with and without a header, plain text, and what is refused."""

import pytest

from overpaint.edit.pairs_file import load_pairs


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'erase,replace\nvan gogh style,monet style\n"one, two",three\nsnoopy,\n'),
        ("a.csv", '\ufeffvan gogh style,monet style\n# a remark\n\n"one, two",three\nsnoopy\n'),
        ("a.txt", "van gogh style -> monet style\none, two → three\nsnoopy\n"),
        ("a", "# a remark\nvan gogh style\tmonet style\n\none, two\tthree\nsnoopy\n"),
    ],
)
def test_each_form_gives_the_same_pairs(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    pairs = {"van gogh style": "monet style", "one, two": "three", "snoopy": ""}
    assert load_pairs(tmp_path / name) == pairs
    assert list(load_pairs(tmp_path / name)) == list(pairs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n# nothing\n", "names no concept: write one in each line"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text: save it as UTF-8"),
        ("a.csv", b"a,b,c\n", "line 1: 3 columns: give one or two"),
        ("a.csv", b",b\n", "line 1: no concept to erase"),
        ("a.csv", b'a,"b\n', "line 1: unexpected end of data: put texts with commas"),
        ("a.txt", b"a -> b\na -> c\n", "line 2: 'a' has two replacements, 'b' and 'c'"),
        ("a.txt", b"a" * (4 * 1024 * 1024 + 1), "is larger than 4 MiB"),
    ],
)
def test_a_file_without_pairs_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_pairs(tmp_path / name)
