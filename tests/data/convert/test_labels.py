"""Labels and people from a CSV file."""

from __future__ import annotations

from pathlib import Path

import pytest

from physio_dist.data.convert.labels import read_labels
from physio_dist.errors import UserError

RECORDS = ["a/r1", "b/r2", "b/r3", "c/r3"]


def joined(
    tmp_path: Path, text: str | bytes, person: str | None = None
) -> tuple[dict[str, dict[str, object]], dict[str, str]]:
    file = tmp_path / "labels.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(str(file), person, RECORDS)


def test_read_labels_joins_by_full_name_and_last_part(tmp_path: Path) -> None:
    labels, people = joined(tmp_path, "record,ok\na/r1,1\nr2,0\nc/r3,1\nelsewhere,5\n")
    assert labels == {"a/r1": {"ok": 1}, "b/r2": {"ok": 0}, "c/r3": {"ok": 1}}
    assert people == {}


def test_read_labels_joins_by_file_with_any_extension(tmp_path: Path) -> None:
    labels, _ = joined(tmp_path, "file,ok\na/r1.hea,1\n./b/r2.dat,0\nc/r3.mat,2\nb/r3.edf,3\n")
    assert labels == {"a/r1": {"ok": 1}, "b/r2": {"ok": 0}, "c/r3": {"ok": 2}, "b/r3": {"ok": 3}}


def test_read_labels_raises_on_ambiguous_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="several records end in 'r3'; name them by their whole path"):
        joined(tmp_path, "record,ok\nr3,1\n")


def test_read_labels_converts_numbers_and_booleans(tmp_path: Path) -> None:
    row = "17,-3,1.5,1e-3,true,False,text, ,nan,inf,007,1_000,\u0661,+5,-0.5,.5,5.,1234567890123456789012"
    names = ",".join(f"c{i}" for i in range(18))
    labels, _ = joined(tmp_path, f"record,{names}\nr1,{row}\n")
    wanted = [
        17,
        -3,
        1.5,
        1e-3,
        True,
        False,
        "text",
        None,
        None,
        None,
        "007",
        "1_000",
        "\u0661",
        5,
        -0.5,
        0.5,
        5.0,
        "1234567890123456789012",
    ]
    assert list(labels["a/r1"].values()) == wanted
    assert [type(value) for value in labels["a/r1"].values()] == [type(value) for value in wanted]


def test_read_labels_keeps_people_out_of_labels(tmp_path: Path) -> None:
    labels, people = joined(tmp_path, "record,file,who,x\na/r1,r1.dat,Ann,1\nb/r2,r2.dat,,2\n", "who")
    assert people == {"a/r1": "Ann"}
    assert labels == {"a/r1": {"x": 1}, "b/r2": {"x": 2}}


def test_read_labels_accepts_spreadsheet_exports(tmp_path: Path) -> None:
    text = '\ufeffrecord,note,,x\r\nr1,"two\r\nlines, \u2028quoted",9,1\r\nr2\r\n'
    labels, _ = joined(tmp_path, text)
    assert labels["a/r1"] == {"note": "two\r\nlines, \u2028quoted", "x": 1}
    assert labels["b/r2"] == {"note": None, "x": None}


def test_read_labels_raises_on_contradicting_rows(tmp_path: Path) -> None:
    assert joined(tmp_path, "record,x\nr1,1\na/r1,1\n")[0] == {"a/r1": {"x": 1}}
    with pytest.raises(UserError, match="two rows say different things about record 'a/r1'"):
        joined(tmp_path, "record,x\nr1,1\na/r1,2\n")
    with pytest.raises(UserError, match="two rows say different things"):
        joined(tmp_path, "record,x,who\nr1,1,Ann\nr1,1,Bob\n", "who")


@pytest.mark.parametrize(
    ("text", "person", "told"),
    [
        ("name,x\nr1,1\n", None, "has no column `record` or `file`; its columns: name, x"),
        ("", None, "its columns: none"),
        ("record,x\n", None, "none of its 0 rows names one of the 4 records"),
        ("record,x\nzz,1\n", None, "none of its 1 rows names one of the 4 records"),
        ("record,subject\nr1,1\n", "subjct", "has no such column: did you mean 'subject'"),
        (b"record,x\nr1,\xff\n", None, "is not a UTF-8 text file"),
        ('record,x\nr1,"never closed\n', None, "is not a CSV file"),
    ],
)
def test_read_labels_raises_on_unusable_file(tmp_path: Path, text: str | bytes, person: str | None, told: str) -> None:
    with pytest.raises(UserError) as caught:
        joined(tmp_path, text, person)
    assert told in str(caught.value)
    assert "labels.csv" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: there is nothing there"):
        read_labels(str(tmp_path / "nowhere.csv"), None, RECORDS)
