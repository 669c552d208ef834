"""Reading hand-ins: the layouts of folders, Canvas and Moodle, and archives and notebooks made to do harm."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import stat
import struct
import time
import warnings
import zipfile
from datetime import datetime, timedelta, timezone

import pytest

from effattn_lab.grading.archives import CLASS, STUDENT, ArchiveError, read_zip, safe_parts, unpack
from effattn_lab.grading.model import Assignment, Item, LabPlan
from effattn_lab.grading.notebook import read_cells
from effattn_lab.grading.submissions import collect
from effattn_lab.grading.text import key_of

FLASH = LabPlan("full/flash", "flash.ipynb", "", (Item("full/flash/merge", "merge", 1),), ())
OTHER = LabPlan("sparse/window", "window.ipynb", "", (Item("sparse/window/mask", "mask", 1),), ())
DUE = datetime(2026, 3, 1, 12, tzinfo=timezone(timedelta(hours=3)))
ONE = Assignment("Lab 1", "0.1.0", (FLASH,), due=DUE)
TWO = Assignment("Labs", "0.1.0", (FLASH, OTHER), due=DUE)


def notebook(*sources, lab=None, **more):
    cells = [{"cell_type": "code", "id": f"c{n}", "source": s} for n, s in enumerate(sources)]
    metadata = {"effattn": {"lab": lab}} if lab else {}
    return json.dumps({"nbformat": 4, "metadata": metadata, "cells": cells, **more}).encode()


def archive(entries, **options):
    """Bytes of a zip: name or ZipInfo → bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, **options) as z, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names are the point of one test
        for name, data in entries:
            z.writestr(name, data)
    return out.getvalue()


def write_zip(folder, entries, name="class.zip"):
    path = folder / name
    path.write_bytes(archive(entries))
    return path


def everything(data, limits=STUDENT):
    return list(read_zip(io.BytesIO(data), lambda parts: True, limits))


# ---- layouts -----------------------------------------------------------------------------------------------


def test_folders_and_files(tmp_path):
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "flash.ipynb").write_bytes(notebook("a"))
    (tmp_path / "bob.ipynb").write_bytes(notebook("b"))
    (tmp_path / "eve.zip").write_bytes(archive([("deep/er/flash.ipynb", notebook("e"))]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "roster.csv").write_text("not a hand-in")
    os.utime(tmp_path / "ann" / "flash.ipynb", (1_770_000_000, 1_770_000_000))
    found = collect(tmp_path, ONE)
    assert [s.student for s in found] == ["ann", "bob", "empty", "eve"]
    assert [read_cells(s.notebooks["full/flash"])[0].source for s in found if s.notebooks] == ["a", "b", "e"]
    assert found[0].submitted == datetime.fromtimestamp(1_770_000_000, timezone.utc)
    assert found[2].problems == ("no notebook was handed in",)
    assert not any(s.problems for s in (found[0], found[1], found[3]))


def test_canvas(tmp_path):
    path = write_zip(
        tmp_path,
        [
            ("lovelaceada_11_501_flash.ipynb", notebook("old")),
            ("lovelaceada_11_502_flash-1.ipynb", notebook("new")),
            ("hopper_LATE_12_600_flash.ipynb", notebook("h")),
            ("noether_13_601_work.zip", archive([("flash.ipynb", notebook("n"))])),
            ("anon_x9Yz1_700_flash.ipynb", notebook("x")),
            ("doe_14_602_notes.pdf", b"%PDF-"),
            ("LATE_anon_a9Yz1_701_flash.ipynb", notebook("y")),
        ],
    )
    by_key = {s.student: s for s in collect(path, ONE)}
    assert set(by_key) == {"anon_x9Yz1", "anon_a9Yz1", "doe_14", "hopper_12", "lovelaceada_11", "noether_13"}
    ada = by_key["lovelaceada_11"]
    assert ada.ids == {"canvas": "11"}
    assert read_cells(ada.notebooks["full/flash"])[0].source == "new"
    assert "“flash-1.ipynb” counts as the newest, not “flash.ipynb”" in ada.problems[0]
    # Whoever hands in a PDF has a row in the gradebook too, with the reason.
    assert by_key["doe_14"].problems == ("no notebook was handed in, only “notes.pdf”",)
    assert by_key["hopper_12"].late_flag
    assert not ada.late_flag
    assert by_key["anon_a9Yz1"].late_flag
    assert by_key["anon_x9Yz1"].ids == {}
    # Canvas dates entries by the download; that is not when anything was handed in.
    assert all(s.submitted is None for s in by_key.values())


def test_moodle_folders_and_flat(tmp_path):
    path = write_zip(
        tmp_path,
        [
            ("Zoë Müller_101_assignsubmission_file_/flash.ipynb", notebook("z")),
            ("Ann Lee_102_assignsubmission_file_flash.ipynb", notebook("a")),
            ("Li Wei_103_assignsubmission_file/flash.ipynb", notebook("l")),
            ("Bo Ek_104_assignsubmission_onlinetext_/onlinetext.html", b"<p>sorry"),
            # A file name chosen to look like somebody else's.
            ("Eve_105_assignsubmission_file_Ann Lee_102_assignsubmission_file_flash.ipynb", notebook("e")),
        ],
    )
    found = collect(path, ONE)
    assert {s.ids["moodle"]: s.name for s in found} == {
        "101": "Zoë Müller",
        "102": "Ann Lee",
        "103": "Li Wei",
        "104": "Bo Ek",
        "105": "Eve",
    }
    assert [s.student for s in found] == [
        "Ann-Lee_102",
        "Bo-Ek_104",
        "Eve_105",
        "Li-Wei_103",
        "Zoe-Muller_101",
    ]
    sources = {
        s.name: read_cells(s.notebooks["full/flash"])[0].source for s in found if "full/flash" in s.notebooks
    }
    assert sources == {"Zoë Müller": "z", "Ann Lee": "a", "Li Wei": "l", "Eve": "e"}


def test_archive_of_a_folder(tmp_path):
    path = write_zip(
        tmp_path, [("handins/", b""), ("handins/ann/flash.ipynb", notebook("a"))], name="handins.zip"
    )
    assert [s.student for s in collect(path, ONE)] == ["ann"]


def test_times(tmp_path):
    (tmp_path / "ann.ipynb").write_bytes(notebook("a"))
    (tmp_path / "bob.ipynb").write_bytes(notebook("b"))
    (tmp_path / "submitted.csv").write_text(
        "student,submitted\nann,2026-03-01T13:00\nbob,2026-03-01T09:00:00Z\n"
    )
    ann, bob = collect(tmp_path, ONE)
    assert ann.submitted == DUE + timedelta(hours=1)
    assert bob.submitted == DUE
    (tmp_path / "submitted.csv").write_text("student,submitted\nann,tomorrow\n")
    with pytest.raises(ValueError, match="line 2: expected a time like"):
        collect(tmp_path, ONE)
    (tmp_path / "submitted.csv").write_text("name,when\nann,2026-03-01\n")
    with pytest.raises(ValueError, match="expected the columns student and submitted"):
        collect(tmp_path, ONE)


def test_times_of_nobody(tmp_path):
    (tmp_path / "Ann Lee").mkdir()
    (tmp_path / "Ann Lee" / "flash.ipynb").write_bytes(notebook("a"))
    (tmp_path / "submitted.csv").write_text("student,submitted\nann lee,2026-03-01\nann_lee,2026-03-01\n")
    notes = []
    (ann,) = collect(tmp_path, ONE, notes)
    assert ann.submitted == datetime(2026, 3, 1, tzinfo=DUE.tzinfo)
    assert notes == ["submitted.csv: nobody who handed in is called “ann_lee”; those times count for nobody"]
    (tmp_path / "submitted.csv").write_text("student,submitted\nAnn-Lee,2026-03-01\n")
    collect(tmp_path, ONE, notes)
    assert len(notes) == 1


def test_which_lab(tmp_path):
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "anything.ipynb").write_bytes(notebook("w", lab="sparse/window"))
    (tmp_path / "ann" / "Flash (2).ipynb").write_bytes(notebook("f2"))
    (tmp_path / "ann" / "flash.ipynb").write_bytes(notebook("f"))
    (tmp_path / "ann" / "diary.ipynb").write_bytes(notebook("d"))
    (tmp_path / "ann" / "other.ipynb").write_bytes(notebook("o", lab="some/thing"))
    (ann,) = collect(tmp_path, TWO)
    assert read_cells(ann.notebooks["sparse/window"])[0].source == "w"
    assert read_cells(ann.notebooks["full/flash"])[0].source == "f2"
    assert [p for p in ann.problems if "diary" in p or "other" in p] == [
        "“diary.ipynb” belongs to no lab of this assignment and was not graded",
        "“other.ipynb” belongs to no lab of this assignment and was not graded",
    ]


def test_wrong_places(tmp_path):
    with pytest.raises(ValueError, match=r"submissions: expected a folder or a \.zip archive, got"):
        collect(tmp_path / "none", ONE)
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ValueError, match=r"bad\.zip: not a readable zip archive"):
        collect(tmp_path / "bad.zip", ONE)


def test_keys_that_collide(tmp_path):
    path = write_zip(tmp_path, [("Ann/flash.ipynb", notebook("1")), ("ann/flash.ipynb", notebook("2"))])
    first, second = collect(path, ONE)
    assert first.student.casefold() != second.student.casefold()
    assert all("gives the same key" in s.problems[0] for s in (first, second))
    # The name of one student, the number of another.
    path = write_zip(
        tmp_path, [("eve_7_900_flash.ipynb", notebook("e")), ("ann_7_100_flash.ipynb", notebook("a"))]
    )
    found = collect(path, ONE)
    assert [s.student for s in found] == ["ann_7", "eve_7"]
    assert all("two names came with the canvas number 7" in s.problems[0] for s in found)


def test_keys():
    assert key_of("Ann Lee") == "Ann-Lee"
    assert key_of("李伟") != key_of("王芳")
    assert key_of("李伟").startswith("student-")
    assert key_of("nul").startswith("nul-")
    assert key_of("../..").startswith("student-")
    for name in ("a" * 500, "\u202egnp", "-rf", "", ".", "a/b", "a\0b", "=1+1"):
        key = key_of(name)
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}", key, re.ASCII), name


# ---- archives that mean harm -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x.ipynb",
        "a/../../x",
        "/etc/passwd",
        "C:/x",
        "C:x",
        "..\\x",
        "a\\b",
        "",
        ".",
        "a\u202eb",
        "a\nb",
        "a\x00b",
        "x" * 10000,
        "x" * 300,
        "/".join("abcdefghij"),
        "a/./..",
        "\u2066x",
        "a\x7f",
    ],
)
def test_names_that_are_refused(name):
    with pytest.raises(ArchiveError):
        safe_parts(name)


def test_names_that_are_not():
    assert safe_parts("./a//b.ipynb") == ("a", "b.ipynb")
    assert safe_parts("Zoë/..flash..ipynb") == ("Zoë", "..flash..ipynb")


def test_slip_reaches_nothing(tmp_path):
    entries = [("../evil/flash.ipynb", notebook("x")), ("/abs/flash.ipynb", notebook("x"))]
    entries += [("ok/flash.ipynb", notebook("ok"))]
    found = {s.student: s for s in collect(write_zip(tmp_path, entries), ONE)}
    assert found["ok"].notebooks
    assert not found["ok"].problems
    assert sum(bool(s.notebooks) for s in found.values()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["class.zip"]
    inner = archive([("../../x.ipynb", notebook("x")), ("flash.ipynb", notebook("y"))])
    problems = [f.problem for f in unpack(inner, lambda p: True) if f.problem]
    assert problems == ["the entry “../../x.ipynb” has a path that leaves its folder"]


def bomb(size, name="flash.ipynb"):
    return archive([(name, b"0" * size)])


def test_bombs():
    (found,) = everything(bomb(STUDENT.entry_bytes + 1))
    assert found.data is None
    assert "unpacks to over 200 times" in found.problem
    noise = random.Random(0).randbytes(1_000_000)
    (found,) = everything(archive([(zipfile.ZipInfo("n.ipynb"), noise * 21)]))
    assert found.data is None
    assert "more than 20000000 bytes" in found.problem
    # Eight entries of 15 MB each: none too large, together too large.
    half = random.Random(0).randbytes(100_000) * 150
    with pytest.raises(ArchiveError, match="more than 100000000 bytes"):
        everything(archive([(zipfile.ZipInfo(f"{n}.ipynb"), half) for n in range(8)]))


def test_a_header_that_lies():
    data = bytearray(bomb(30_000_000))
    # Uncompressed size in the local header and in the directory: "100 bytes".
    struct.pack_into("<I", data, 22, 100)
    struct.pack_into("<I", data, data.rfind(b"PK\x01\x02") + 24, 100)
    (found,) = everything(bytes(data))
    assert found.data is None
    assert "cannot be unpacked" in found.problem


def test_a_hundred_thousand_entries(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for n in range(70_000):
            z.writestr(zipfile.ZipInfo(f"{n}"), b"")
    start = time.perf_counter()
    with pytest.raises(ArchiveError, match="directory is too large"):
        everything(out.getvalue())
    assert time.perf_counter() - start < 1, "the directory must not be read first"
    with pytest.raises(ArchiveError, match="at most 1000"):
        everything(archive([(str(n), b"") for n in range(1_001)]))
    path = write_zip(tmp_path, [("a_1_1_all.zip", out.getvalue()), ("b_2_2_flash.ipynb", notebook("b"))])
    a, b = collect(path, ONE)
    assert "directory is too large" in a.problems[0]
    assert b.notebooks
    assert not b.problems


def test_nested():
    data = notebook("x")
    one = archive([("flash.ipynb", data)])
    two = archive([("one.zip", one)])
    three = archive([("two.zip", two)])
    assert [f.data for f in unpack(one, lambda p: p[-1].endswith(".ipynb"))] == [data]
    assert [f.data for f in unpack(two, lambda p: p[-1].endswith(".ipynb"))] == [data]
    (found,) = unpack(three, lambda p: p[-1].endswith(".ipynb"))
    assert found.data is None
    assert "nested too deep" in found.problem
    # Seven archives of 9 MB in one: archives and what they hold count together, not each.
    inner = archive([("flash.ipynb", os.urandom(9_000_000))])
    many = archive([(zipfile.ZipInfo(f"{n}.zip"), inner) for n in range(7)])
    assert "more than 100000000 bytes" in [f.problem for f in unpack(many, lambda p: True)][-1]


def test_encrypted_and_strange_entries():
    data = bytearray(archive([("flash.ipynb", notebook("x"))]))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rfind(signature) + offset] |= 1
    (found,) = everything(bytes(data))
    assert found.data is None
    assert "encrypted" in found.problem
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as z:
        z.writestr("flash.ipynb", notebook("x"))
    (found,) = everything(out.getvalue())
    assert found.data is None
    assert "not accepted" in found.problem
    kinds = []
    for mode in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK):
        info = zipfile.ZipInfo(f"{mode}.ipynb")
        info.create_system, info.external_attr = 3, (mode | 0o777) << 16
        kinds.append((info, b"/etc/passwd"))
    for found in everything(archive(kinds)):
        assert found.data is None
        assert "link or a special file" in found.problem


def test_duplicate_names_and_wrong_crc():
    twice = everything(archive([("flash.ipynb", notebook("1")), ("flash.ipynb", notebook("2"))]))
    assert [read_cells(f.data)[0].source for f in twice] == ["1", "2"]
    data = bytearray(archive([("flash.ipynb", notebook("1"))], allowZip64=False))
    data[data.rfind(b"PK\x01\x02") + 16] ^= 0xFF
    (found,) = everything(bytes(data))
    assert found.data is None
    assert "cannot be unpacked" in found.problem


def test_names_in_other_encodings(tmp_path):
    """UTF-8 without the flag that says so (macOS), and bytes that are no UTF-8 at all."""
    data = archive([("Zoë/flash.ipynb", notebook("z"))])
    for signature, offset in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
        position = data.rfind(signature) + offset
        data = data[:position] + bytes([data[position] & ~0x08]) + data[position + 1 :]
    (tmp_path / "class.zip").write_bytes(data)
    assert [s.name for s in collect(tmp_path / "class.zip", ONE)] == ["Zoë"]
    latin = data.replace("Zoë".encode(), b"Zo\xe9\xff")
    (found,) = everything(latin.replace(b"Zo\xe9\xff", b"Zo\xe9x"))
    assert found.data is not None
    assert found.parts[1] == "flash.ipynb"


@pytest.mark.parametrize("seed", range(6))
def test_random_damage(seed):
    """Whatever is flipped, cut or repeated: an ArchiveError or entries, nothing else, and quickly."""
    rng = random.Random(seed)
    whole = archive([(f"s{n}/flash.ipynb", notebook("x" * 50 * n)) for n in range(5)])
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for limits in (STUDENT, CLASS):
            with contextlib.suppress(ArchiveError):
                for found in everything(bytes(data), limits):
                    assert found.problem or found.folder or found.data is not None


# ---- folders that mean harm --------------------------------------------------------------------------------


def test_links_and_pipes(tmp_path):
    secret = tmp_path / "secret.ipynb"
    secret.write_bytes(notebook("secret"))
    handed = tmp_path / "in"
    (handed / "ann").mkdir(parents=True)
    (handed / "ann" / "flash.ipynb").symlink_to(secret)
    (handed / "bob").symlink_to(tmp_path)
    (handed / "eve.ipynb").symlink_to(secret)
    (handed / "joe").mkdir()
    os.mkfifo(handed / "joe" / "flash.ipynb")
    (handed / "zed.ipynb").write_bytes(notebook("zed"))
    found = {s.student: s for s in collect(handed, ONE)}
    assert set(found) == {"ann", "bob", "eve", "joe", "zed"}
    for name in ("ann", "bob", "eve", "joe"):
        assert not found[name].notebooks, name
        assert "was not followed" in found[name].problems[0], name
    assert found["zed"].notebooks


def test_a_link_that_takes_a_files_place(tmp_path, monkeypatch):
    """Between the look at a file and its opening it may be replaced: the opening refuses links and pipes as well."""
    secret = tmp_path / "secret.ipynb"
    secret.write_bytes(notebook("secret"))
    handed = tmp_path / "in"
    (handed / "dir").mkdir(parents=True)
    (handed / "ann.ipynb").symlink_to(secret)
    (handed / "joe").symlink_to(tmp_path)
    os.mkfifo(handed / "eve.ipynb")
    file, folder = os.lstat(secret), os.lstat(handed / "dir")
    monkeypatch.setattr(os, "lstat", lambda name, dir_fd: file if name.endswith(".ipynb") else folder)
    for student in collect(handed, ONE):
        assert not student.notebooks, student
    problems = " ".join(p for s in collect(handed, ONE) for p in s.problems)
    assert "“ann.ipynb” cannot be read" in problems
    assert "“eve.ipynb” is not a regular file" in problems
    assert "“joe” cannot be opened" in problems


def test_names_on_disk(tmp_path):
    (tmp_path / "ann\u202e").mkdir()
    (tmp_path / "ann\u202e" / "flash.ipynb").write_bytes(notebook("x"))
    os.mkdir(os.fsencode(tmp_path) + b"/b\xff")
    (tmp_path / "zed.ipynb").write_bytes(notebook("zed"))
    found = collect(tmp_path, ONE)
    assert sum(bool(s.notebooks) for s in found) == 1
    text = " ".join(p for s in found for p in s.problems)
    assert "invisible characters" in text
    assert "not UTF-8" in text
    assert "\u202e" not in text


def test_too_much_from_one_student(tmp_path):
    (tmp_path / "eve").mkdir()
    for n in range(45):
        (tmp_path / "eve" / f"flash-{n}.ipynb").write_bytes(notebook(str(n)))
    (tmp_path / "huge.ipynb").write_bytes(b" " * 20_000_001)
    (tmp_path / "zed.ipynb").write_bytes(notebook("zed"))
    found = {s.student: s for s in collect(tmp_path, ONE)}
    assert "more than 60000000 bytes or 40 notebooks" in found["eve"].problems[0]
    assert "more than 20000000 bytes" in found["huge"].problems[0]
    assert not found["huge"].notebooks
    assert found["zed"].notebooks
    assert not found["zed"].problems
