"Arrays, records, names and tables beyond nbs/core/00_files.ipynb: damage, claims, formulas."

import io
import zipfile

import numpy as np
import pytest
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.core.files import (
    check_entries,
    file_names,
    fits,
    is_file_name,
    map_array,
    path_inside,
    read_arrays,
    read_table,
    write_table,
)


@pytest.mark.parametrize(
    "value, cell",
    [
        ("=1+1", "'=1+1"),
        ("@SUM(1)", "'@SUM(1)"),
        ("+cmd", "'+cmd"),
        ("-a", "'-a"),
        ("\t=1", "'\t=1"),
        ("-3.2", "-3.2"),
        ("+1e5", "+1e5"),
        (-3.2, "-3.2"),
        (float("nan"), ""),
        (float("inf"), "inf"),
        (None, ""),
        ("a=1", "a=1"),
        ("", ""),
    ],
)
def test_no_cell_of_a_table_is_a_formula(tmp_path, value, cell):
    write_table(tmp_path / "t.csv", ("a", "b", "=c"), [{"a": 1, "b": value}, (2, "x", 3)])
    rows = read_table(tmp_path / "t.csv", ("a", "b", "'=c"))
    assert [row["b"] for _, row in rows] == [cell, "x"] and rows[0][1]["'=c"] == ""


def test_a_table_with_quotes_and_line_breaks_comes_back(tmp_path):
    text = 'a, "b"\nc;\td'
    write_table(tmp_path / "t.csv", ("x",), [(text,)])
    assert read_table(tmp_path / "t.csv") == [(2, {"x": text})]


def npz(path, **members):
    "An npz of raw npy bytes."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array, **header) -> bytes:
    "The bytes of an npy, with texts of its header replaced."
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    content = buffer.getvalue()
    for old, new in header.values():
        content = content.replace(old, new.ljust(len(old)), 1)
    return content


GOOD = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


def test_arrays_come_back_in_the_order_of_this_machine(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", hu=GOOD, big=GOOD.astype(">f8"), text=np.array("ä"))
    arrays = read_arrays(tmp_path / "a.npz")
    assert np.array_equal(arrays["hu"], GOOD) and np.array_equal(arrays["big"], GOOD)
    assert arrays["big"].dtype.isnative and str(arrays["text"]) == "ä"
    assert list(read_arrays(tmp_path / "a.npz", names=("hu", "other"))) == ["hu"]


@pytest.mark.parametrize(
    "content",
    [
        npy(GOOD, shape=(b"(2, 3, 4)", b"(9, 9, 9)")),
        npy(GOOD, shape=(b"(2, 3, 4)", b"(-2,-3,4)")),
        npy(GOOD, shape=(b"'<i2', 'fortran_order': False, 'shape': (2, 3, 4)", b"((((((((")),
        npy(GOOD, type=(b"<i2", b"<i4")),
        npy(GOOD)[:-1],
        npy(GOOD) + b"0",
        npy(np.array([{}], dtype=object)),
        b"",
        b"text",
    ],
)
def test_an_array_that_is_not_what_it_claims(tmp_path, content):
    with refused(file="a.npz", kind=FileError):
        read_arrays(npz(tmp_path / "a.npz", hu=content))
    (tmp_path / "a.npy").write_bytes(content)
    with refused(file="a.npy", kind=FileError):
        map_array(tmp_path / "a.npy")


def test_an_array_that_unpacks_to_too_much(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", hu=np.zeros(10**6, np.int8))
    assert (tmp_path / "a.npz").stat().st_size < 2000
    with refused(file="a.npz", kind=FileError):
        read_arrays(tmp_path / "a.npz", most=10**5)


def test_every_bit_of_an_npz_is_checked(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", hu=GOOD)
    whole = (tmp_path / "a.npz").read_bytes()
    for place in range(0, len(whole) * 8, 7):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / "a.npz").write_bytes(damaged)
        try:
            arrays = read_arrays(tmp_path / "a.npz")
        except FileError:
            continue
        assert np.array_equal(arrays["hu"], GOOD), place  # times and system, say


def test_a_mapped_array_is_in_the_order_of_c(tmp_path):
    np.save(tmp_path / "a.npy", GOOD)
    assert np.array_equal(map_array(tmp_path / "a.npy"), GOOD)
    np.save(tmp_path / "a.npy", np.asfortranarray(GOOD))
    with refused(file="a.npy", kind=FileError):
        map_array(tmp_path / "a.npy")


NAMES = {
    True: ("a", "lidc-0002", "scan (1).b", "Süd", ".a", "a" * 200),
    False: (
        "",
        ".",
        "..",
        " ",
        "a/b",
        "../a",
        "/a",
        "a\\b",
        "c:a",
        "a\n",
        "\x1b",
        "a" * 201,
        None,
        3,
    ),
}


@pytest.mark.parametrize("good", NAMES)
def test_names_that_can_name_a_file(tmp_path, good):
    for name in NAMES[good]:
        assert is_file_name(name) is good, name
        if good:
            assert path_inside(tmp_path, name).parent == tmp_path
        else:
            with refused("name"):
                path_inside(tmp_path, name)


@pytest.mark.parametrize(
    "form, good, bad",
    [
        (int, [0, -3], [True, 1.0, "1", None]),
        (float, [0, 1.5], [True, float("nan"), float("inf"), "1"]),
        (str, [""], [1, None, []]),
        (None, [None], [0, ""]),
        ([str], [[], ["a", "b"]], [None, "ab", ["a", 1], {}]),
        ([float, float], [[1, 2.5]], [[1], [1, 2, 3], ["a", 1], None]),
        ({str: int}, [{}, {"a": 1}], [{"a": "b"}, [], None]),
        ((None, [[float]]), [None, [[1.0]]], [[1.0], 0]),
        (dict, [{}], [[], None]),
    ],
)
def test_forms_of_entries(form, good, bad):
    assert all(fits(value, form) for value in good)
    assert not any(fits(value, form) for value in bad)


def test_a_record_is_compared_with_its_description():
    forms = {"id": str, "size": int}
    assert check_entries({"id": "a", "size": 1, "more": None}, forms, "x.json")
    assert check_entries({"id": "a"}, forms, "x.json", all_there=False)
    for wrong in ({"id": "a"}, {"id": "a", "size": 1.5}, [], None, "id"):
        with refused(file="x.json", kind=FileError):
            check_entries(wrong, forms, "x.json")


def test_every_case_has_a_folder_of_its_own():
    ids = ["a/b", "a_b", "A_B", "..", "../..", "plain", "x.nii", "é"]
    names = file_names(ids)
    assert (
        len({name.casefold() for name in names}) == len(ids)
        and names[5:] == ["plain", "x.nii", "é"]
        and not any("/" in name or name.startswith(".") for name in names)
    )
    assert file_names(ids[::-1]) == names[::-1]  # whatever the order
