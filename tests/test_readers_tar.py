"""The walk over tar archives: what tarfile finds, and nothing of what a hostile archive asks for."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import tarfile
from pathlib import Path

import pytest
from shard_sets import png, samples, tar

from torchprobe.common import limits
from torchprobe.datasets import DatasetError, open_shards
from torchprobe.datasets.readers.tar import BLOCK, Entry, Tape, entries

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def walk(data: bytes, streamed: bool = False) -> list[Entry]:
    tape = Tape(io.BytesIO(data), None if streamed else len(data))
    found = [*entries(tape)]
    assert tape.digest() == (hashlib.sha256(data).hexdigest() if streamed else None)
    return found


def archive(*members: tarfile.TarInfo | tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as writer:
        for one in members:
            if isinstance(one, tarfile.TarInfo):
                writer.addfile(one)
            else:
                member = tarfile.TarInfo(one[0])
                member.size = len(one[1])
                writer.addfile(member, io.BytesIO(one[1]))
    return file.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def changed(data: bytes, at: int, new: bytes) -> bytes:
    """With other bytes in the first header, whose checksum fits."""
    header = bytearray(data[:BLOCK])
    header[at : at + len(new)] = new
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[BLOCK:]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_members_are_those_that_tarfile_finds(format, streamed):
    rng = random.Random(0)
    names = ["a.jpg", "deep/er/b.png", "ü/ß 1.png", "x" * 90 + "/" + "y" * 90 + ".png", "dot.s.tar.gz"]
    if format != "ustar":
        names += ["z" * 150 + ".png", "/".join(["long"] * 60) + "/c.webp"]
    data = archive(
        special("folder", tarfile.DIRTYPE), *((name, rng.randbytes(rng.choice([0, 1, 511, 512, 513, 5000]))) for name in names),
        format=FORMATS[format],
    )  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(data)) as expected:
        theirs = [(one.name, one.offset_data, one.size) for one in expected.getmembers() if one.isfile()]
    ours = walk(data, streamed)
    assert [(one.name, one.offset, one.size) for one in ours] == theirs and len(theirs) == len(names)
    assert not any(one.problem for one in ours)


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        (special("a.png", tarfile.SYMTYPE, "/etc/passwd"), "a link, which is not followed"),
        (special("a.png", tarfile.LNKTYPE, "first.png"), "a link, which is not followed"),
        (special("a.png", tarfile.CHRTYPE), "a device"),
        (special("a.png", tarfile.BLKTYPE), "a device"),
        (special("a.png", tarfile.FIFOTYPE), "a pipe"),
        (special("a.png", b"Y"), "a member of the unknown type b'Y'"),
        (special("a.png", tarfile.GNUTYPE_SPARSE), "a sparse file, whose bytes are not in one piece"),
        (("/etc/a.png", b"1"), "its name leads out of the archive"),
        (("../a.png", b"1"), "its name leads out of the archive"),
        (("b/../../a.png", b"1"), "its name leads out of the archive"),
        (("first.png", b"1"), "its name occurs twice in the shard"),
    ],
)
def test_what_is_no_plain_file_is_named_and_the_others_are_read(member, problem):
    found = walk(archive(("first.png", b"12"), member, ("last.png", b"345")))
    assert [one.problem for one in found] == ["", problem, ""]
    assert [one.size for one in found if not one.problem] == [2, 3]
    assert len({one.name for one in found}) == 3


def test_a_sparse_file_of_pax_is_refused():
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9000000000"}
    assert [one.problem[:13] for one in walk(archive(member, ("b.png", b"1")))] == ["a sparse file", ""]


def test_further_headers_of_an_old_sparse_file_are_passed_over():
    data = changed(archive(special("a.png", tarfile.GNUTYPE_SPARSE), ("b.png", b"1"), format=tarfile.GNU_FORMAT), 482, b"\1")
    more = bytearray(BLOCK)
    more[504] = 1
    data = data[:BLOCK] + bytes(more) + bytes(BLOCK) + data[BLOCK:]
    assert [(one.name, bool(one.problem)) for one in walk(data)] == [("a.png", True), ("b.png", False)]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_truncated_archive_keeps_what_is_whole(streamed):
    data = archive(("a.png", b"1" * 700), ("b.png", b"2" * 700))
    second = BLOCK + 1024
    for length in (*range(0, second, 100), second, second + 1, second + BLOCK, second + BLOCK + 699, second + BLOCK + 1024):
        found = walk(data[:length], streamed)
        whole = (length >= second) + (length >= second + BLOCK + 1024)
        assert [one.name for one in found[:-1]] == ["a.png", "b.png"][:whole]
        assert found[-1].name.startswith("(from byte ") and "truncated" in found[-1].problem, length


def test_a_size_that_no_file_has_takes_no_memory():
    huge = archive(("a.png", b"1"))
    for size in (b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12):  # octal, base 256, a negative number
        for streamed in (False, True):
            (found,) = walk(changed(huge, 124, size), streamed)
            assert found.problem.startswith("the rest of the shard cannot be read") and found.size == 0


def test_extended_headers_are_bounded():
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        data = changed(archive(("a.png", b"1" * 9000)), 156, kind)
        (found,) = walk(data)
        assert "an extended header has more than 4,096 bytes (9,000)" in found.problem
    chain = b"".join(changed(archive(("a", b"6 a=b\n"))[: 2 * BLOCK], 156, tarfile.XHDTYPE) for _ in range(3000))
    assert [one.name for one in walk(chain + archive(("b.png", b"1")))] == ["b.png"]  # tarfile would recurse 3000 levels deep


@pytest.mark.parametrize("record", [b"x path=a\n", b"0 path=a\n", b"999 path=a\n", b"9 path=a ", b"7 patha\n", b"30 path"])
def test_a_damaged_extended_header_ends_the_walk(record):
    (found,) = walk(changed(archive(("a", record)), 156, tarfile.XHDTYPE))
    assert found.problem.endswith("an extended header is damaged")


def test_a_global_header_may_comment_but_not_rename():
    comment = changed(archive(("a", b"18 comment=abcdef\n"))[: 2 * BLOCK], 156, tarfile.XGLTYPE)
    assert [one.name for one in walk(comment + archive(("b.png", b"1")))] == ["b.png"]
    rename = changed(archive(("a", b"10 size=4\n"))[: 2 * BLOCK], 156, tarfile.XGLTYPE)
    (found,) = walk(rename + archive(("b.png", b"1")))
    assert found.problem.endswith("a global header sets the size of all members")


def test_the_end_is_marked_and_nothing_comes_after():
    data = archive(("a.png", b"1"))
    assert [one.name for one in walk(data + bytes(100_000))] == ["a.png"]
    for streamed in (False, True):
        assert "such as a second archive" in walk(data + archive(("b.png", b"1")), streamed)[-1].problem
        assert "without its end mark" in walk(data[: 2 * BLOCK], streamed)[-1].problem


def test_members_are_counted():
    with limits.changed(members=2):
        assert "more than 2 members (3)" in walk(archive(*((f"{i}.png", b"") for i in range(4))))[-1].problem


def test_names_that_are_no_text_become_escapes():
    data = changed(archive(("a.png", b"1"), format=tarfile.GNU_FORMAT), 0, b"\xff\xfe.png")
    assert walk(data)[0].name == "\\xff\\xfe.png"


# -- a shard that cannot be used at all ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a tar archive: the archive ends without its end mark"),
        (b"hello" * 1000, "is not a tar archive: its header is damaged .invalid header."),
        (gzip.compress(archive(("a.png", b"1"))), "compressed with gzip, and no part of it could be read alone; decompress it"),
        (archive(("a.txt", b"1")), "no images in .*but 1 other member. Expected members ending in .bmp"),
        (archive(special("a.png", tarfile.FIFOTYPE)), "no images in .*000.tar/a.png: a pipe"),
        (bytes(10240), "no images in "),
    ],
    ids=["empty", "text", "gzip", "no pictures", "a pipe", "zeros"],  # the bytes hold the time of the compression
)
def test_a_shard_that_cannot_be_used(tmp_path: Path, data, message):
    (tmp_path / "000.tar").write_bytes(data)
    with pytest.raises(DatasetError, match=message):
        open_shards([tmp_path / "000.tar"])


def test_no_such_shard(tmp_path):
    with pytest.raises(DatasetError, match=r"there is no shard .*a.tar"):
        open_shards([tmp_path / "a.tar"])
    with pytest.raises(DatasetError, match="not a regular file"):
        open_shards(["/dev/null"])


# -- labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        ({"cls": b"7"}, [7]),
        ({"cls": b" 7\n", "json": b'{"label": 3}'}, [7]),
        ({"json": b'{"label": 3, "cls": 4}'}, [3]),
        ({"json": b'{"cls": 4}'}, [4]),
        ({"json": b"5"}, [5]),
        ({"json": b'{"caption": "a cat"}'}, [-1]),
        ({"json": b'{"label": null}'}, [-1]),
        ({"txt": b"a cat"}, [-1]),
        ({"cls": b"-1"}, [-1]),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_labels(tmp_path, members, labels, first):
    beside = [(f"a.{kind}", data) for kind, data in members.items()]
    images = open_shards([tar(tmp_path / "0.tar", [*beside, ("a.PNG", png(1))] if first else [("a.PNG", png(1)), *beside])])
    assert images.labels == labels


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("cls", b"cat", "b'cat' is not a whole number"),
        ("cls", b"1.5", "not a whole number"),
        ("cls", b"-2", "-2 is not a row of a head"),
        ("cls", b"9" * 5000, "not a whole number"),
        ("json", b'{"label": "cat"}', "'cat' is not a whole number"),
        ("json", b'{"label": true}', "True is not a whole number"),
        ("json", b'{"label": 4294967296}', "not a row of a head"),
        ("json", b"{", "property name"),
        ("json", b"[" * 2000, "levels"),
    ],
)
def test_a_label_that_is_none_is_an_error_and_can_be_left_out(tmp_path, kind, data, message):
    path = tar(tmp_path / "0.tar", [("a.png", png(1)), (f"a.{kind}", data)])
    with pytest.raises(DatasetError, match=f"0.tar: the label a.{kind} cannot be used: .*{message}.*labels=False"):
        open_shards([path])
    assert open_shards([path], labels=False).labels == [-1]


def test_a_label_is_bounded(tmp_path):
    path = tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.json", b" " * 2000)])
    with limits.changed(label_bytes=1000), pytest.raises(DatasetError, match="a.json has more than 1,000 bytes"):
        open_shards([path])


def test_names_of_classes_are_beside_the_shards_or_above(tmp_path):
    path = tar(tmp_path / "test" / "0.tar", samples([1]))
    assert open_shards([path]).names is None
    (tmp_path / "classnames.txt").write_text("\ufeffcat\n big dog \n\n", encoding="utf-8")
    assert open_shards([path]).names == ("cat", "big dog")
    (tmp_path / "classnames.txt").write_text("cat\n\nbig dog\n")  # whose row is 2
    with pytest.raises(DatasetError, match="line 2 is empty"):
        open_shards([path])


def test_another_picture_of_a_sample_is_no_image(tmp_path):
    images = open_shards([tar(tmp_path / "0.tar", samples([1], {"seg.png": png(2), "txt": b"a"}))])
    assert [images.name(path) for path in images.paths] == ["0.tar/00001.png"]
    assert images.remarks == ["left out: 2 other members, such as 00001.seg.png, 00001.txt"]
