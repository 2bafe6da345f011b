"""Chrysalis-HLS: patches are applied where they belong, and files that break the format are named."""

import json

import numpy as np
import pytest

from experiments.data.chrysalis import BUG_TYPES, Unusable, labels, read_chrysalis
from experiments.data.hub import DataError

CODE = """void add(int a[8], int b[8]) {
    int s = 1;
    for (int i = 0; i < 8; i++) {
        s += a[i];
        b[i] = s;
    }
    for (int i = 0; i < 8; i++)
        b[i] <<= 2;
}
"""


def part(kind, original, faulty):
    return {"Error Type": kind, "Original Code": original, "Faulty Code": faulty}


def patch(*parts, **changes):
    return json.dumps({"Error Size": len(parts), "Error Specification": parts} | changes)


@pytest.fixture
def clone(tmp_path):
    """A function of a made-up suite in the layout of the repository; returns a writer of bugs."""
    folder = tmp_path / "HLS_Bug_Dataset" / "suite" / "add"
    for name in ("Source_Code", "Bugs"):
        (folder / name).mkdir(parents=True)
    (folder / "Source_Code" / "add.cpp").write_text(CODE)
    (tmp_path / "README.md").write_text("not a bug")

    def write(name, text):
        (folder / "Bugs" / name).write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_a_replacement_takes_the_first_place(clone):
    root = clone("bug_OOB.txt", patch(part("OOB", "i < 8", "i <= 8")))
    found = read_chrysalis(root)
    (record,) = found.records
    assert record.clean == CODE
    assert record.buggy == CODE.replace("i < 8", "i <= 8", 1)
    assert record.types == ("OOB",)
    assert record.function == "HLS_Bug_Dataset/suite/add"
    assert record.path == "HLS_Bug_Dataset/suite/add/Bugs/bug_OOB.txt"
    assert found.skipped == []


def test_indentation_of_the_patch_does_not_matter(clone):
    original = "for (int i = 0; i < 8; i++) {\ns += a[i];\nb[i]=s;"
    root = clone("bug_ILNU.txt", patch(part("ILNU", original, "#pragma HLS unroll factor=2\n" + original)))
    buggy = read_chrysalis(str(root)).records[0].buggy
    assert "".join(buggy.split()) == "".join(CODE.split()).replace("for", "#pragmaHLSunrollfactor=2for", 1)
    before, after = CODE.split("    for (int i = 0; i < 8; i++) {")[0], CODE.split("b[i] = s;")[1]
    assert buggy.startswith(before)  # what is around the place keeps its white space
    assert buggy.endswith(after)


def test_exact_matches_come_before_those_without_white_space(clone):
    root = clone("bug_SHFT.txt", patch(part("SHFT", "b[i] <<= 2", "b[i] <<= 40")))
    assert read_chrysalis(root).records[0].buggy == CODE.replace("<<= 2", "<<= 40")
    root = clone("bug_SHFT.txt", patch(part("SHFT", "i++)\n        b", "i++)\n        a")))
    assert read_chrysalis(root).records[0].buggy == CODE.replace("        b[i] <<=", "        a[i] <<=")


def test_two_bugs_are_put_in_one_after_the_other(clone):
    parts = part("INIT", "int s = 1;", "int s;"), part("OOB", "i < 8", "i < 9"), part("OOB", "i < 8", "i < 10")
    record = read_chrysalis(clone("bug_INIT_OOB.txt", patch(*parts))).records[0]
    assert record.types == ("INIT", "OOB", "OOB")
    # The second place is the first one that is left.
    expected = CODE.replace("int s = 1;", "int s;").replace("i < 8", "i < 9", 1).replace("i < 8", "i < 10", 1)
    assert record.buggy == expected


def test_any_part_of_the_clone_can_be_read(clone):
    clone("bug_ZERO.txt", patch(part("ZERO", "int s = 1;", "int s = 0;")))
    root = clone("bug_BUF.txt", patch(part("BUF", "s += a[i]", "s += b[i]")))
    whole = read_chrysalis(root)
    assert [record.types for record in whole.records] == [("BUF",), ("ZERO",)]  # by path
    assert [record.function for record in read_chrysalis(root / "HLS_Bug_Dataset" / "suite").records] == ["add"] * 2
    one = read_chrysalis(root / "HLS_Bug_Dataset" / "suite" / "add").records
    assert [(record.function, record.path) for record in one] == [(".", "Bugs/bug_BUF.txt"), (".", "Bugs/bug_ZERO.txt")]
    assert [record.buggy for record in one] == [record.buggy for record in whole.records]


def test_labels_have_a_column_for_each_type(clone):
    assert len(BUG_TYPES) == 18
    for kind in BUG_TYPES:
        root = clone(f"bug_{kind}.txt", patch(part(kind, "int s", "short s")))
    root = clone("bug_INF_USE.txt", patch(part("USE", "int s", "short s"), part("INF", "i++", "i")))
    records = read_chrysalis(root).records
    found = labels(records)
    assert (found.shape, found.dtype) == ((19, 18), np.int8)
    for record, row in zip(records, found, strict=True):
        assert {list(BUG_TYPES)[i] for i in np.flatnonzero(row)} == set(record.types)
    assert labels([]).shape == (0, 18)


GOOD = part("OOB", "i < 8", "i <= 8")
BROKEN = {
    "no JSON": ('{"Error Size": 1,', "no JSON: Expecting"),
    "a list": (json.dumps([GOOD]), "'Error Specification' is missing or empty"),
    "no list": (
        json.dumps({"Error Size": 1, "Error Specification": GOOD}),
        "'Error Specification' is missing or empty",
    ),
    "empty": (patch(), "'Error Specification' is missing or empty"),
    "size": (patch(GOOD, **{"Error Size": 2}), "'Error Size' is 2, but there are 1 replacements"),
    "field": (patch({"Error Type": "OOB", "Original Code": "i < 8"}), "no text for 'Faulty Code'"),
    "number": (patch(part("OOB", "i < 8", 9)), "no text for 'Faulty Code'"),
    "not a dictionary": (patch("OOB"), "no text for 'Error Type'"),
    "type": (patch(part("OOPS", "i < 8", "i <= 8")), "'Error Type' is 'OOPS', expected one of OOB, INIT"),
    "no place": (patch(part("OOB", " \n", "i <= 8")), "'Original Code' is empty"),
    "not there": (patch(part("OOB", "for (...) { ... }", "")), r"'Original Code' is not in the function: 'for \("),
    "gone": (patch(GOOD, part("INF", "int i = 0; i < 8; i++) {", "")), "'Original Code' was replaced before"),
    "same": (patch(part("OOB", "i < 8", "i < 8")), "the patch changes nothing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_patches_are_errors_that_name_the_file_or_are_listed(name, clone):
    text, message = BROKEN[name]
    clone("bug_ZERO.txt", patch(part("ZERO", "int s = 1;", "int s = 0;")))
    root = clone("bug_broken.txt", text)
    with pytest.raises(DataError, match=rf"suite/add/Bugs/bug_broken\.txt: .*{message}.*unusable='skip'"):
        read_chrysalis(root)
    found = read_chrysalis(root, unusable="skip")
    assert [record.types for record in found.records] == [("ZERO",)]
    (skipped,) = found.skipped
    assert isinstance(skipped, Unusable)
    assert skipped.path == "HLS_Bug_Dataset/suite/add/Bugs/bug_broken.txt"
    assert skipped.reason


def test_bytes_that_are_no_text_are_errors(clone, tmp_path):
    root = clone("bug_OOB.txt", patch(GOOD))
    bug = root / "HLS_Bug_Dataset" / "suite" / "add" / "Bugs" / "bug_OOB.txt"
    bug.write_bytes(bug.read_bytes().decode().encode("utf-16"))
    with pytest.raises(DataError, match=r"bug_OOB\.txt: no JSON: 'utf-8' codec"):
        read_chrysalis(root)
    (root / "HLS_Bug_Dataset" / "suite" / "add" / "Source_Code" / "add.cpp").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"add\.cpp: not UTF-8"):
        read_chrysalis(root, unusable="skip")  # a function is not a patch


@pytest.mark.parametrize("count", [0, 2])
def test_a_function_has_one_source(count, clone):
    root = clone("bug_OOB.txt", patch(GOOD))
    folder = root / "HLS_Bug_Dataset" / "suite" / "add" / "Source_Code"
    (folder / "add.cpp").unlink()
    for i in range(count):
        (folder / f"add{i}.cpp").write_text(CODE)
    with pytest.raises(DataError, match=rf"suite/add/Source_Code has {count} files \.cpp, expected exactly 1"):
        read_chrysalis(root)


def test_other_folders_and_wrong_choices_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"no bugs in .*expected a clone of github\.com/UIUC-ChenLab/Chrysalis-HLS"):
        read_chrysalis(tmp_path)
    with pytest.raises(DataError, match="no bugs in"):
        read_chrysalis(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unusable is 'ignore', expected 'raise' or 'skip'"):
        read_chrysalis(tmp_path, unusable="ignore")
