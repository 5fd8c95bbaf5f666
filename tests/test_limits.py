"""Limits: each reader refuses what is larger, says how to raise the limit, and reads it when the limit is raised."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import png, tar, to_tensor

from torchprobe.analysis import Baseline
from torchprobe.analysis.given_files import open_head
from torchprobe.common import limits
from torchprobe.common.arrays import open_arrays
from torchprobe.common.reading import depth, parse_json, read_json, read_toml
from torchprobe.datasets import Broden, BrodenWriter, DatasetError, image_folder, open_shards, text_file
from torchprobe.datasets.importers import import_coco
from torchprobe.datasets.photos import read_photo
from torchprobe.dissection.words import read_concepts
from torchprobe.encoders import EncoderError
from torchprobe.encoders.checkpoint import read_checkpoint
from torchprobe.encoders.suite import load_suite
from torchprobe.studies.compare import load_results

ROW = '[[encoder]]\nname = "{}"\nrole = "supervised"\nbackbone = "b"\npretraining = "p"\nsource = "timm:{}"\n'


# -- the table of limits -----------------------------------------------------------------------------------------------------


def test_changes_hold_in_all_threads_and_end_with_the_block() -> None:
    found: list[int] = []
    with limits.changed(json_depth=3, table_rows=7):
        with limits.changed(json_depth=2):
            assert limits.value("json_depth") == 2
        thread = threading.Thread(target=lambda: found.append(limits.value("json_depth")))
        thread.start()
        thread.join()
    assert found == [3] and limits.value("json_depth") == 64 and limits.value("table_rows") == 10_000_000
    for wrong in ({"json_dept": 3}, {"json_depth": 0}):
        with pytest.raises(ValueError, match="json_dept"), limits.changed(**wrong):
            raise AssertionError


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limits.VARIABLE, "json_depth=3, picture_pixels=2_000")
    assert limits.value("json_depth") == 3 and limits.value("picture_pixels") == 2000 and limits.value("table_rows") == 10_000_000
    with limits.changed(json_depth=9):
        assert limits.value("json_depth") == 9
    for wrong, message in (("json_depth", "'json_depth' is not NAME=NUMBER"), ("json_depth=-1", "NAME=NUMBER"), ("no=1", "no limit 'no'")):
        monkeypatch.setenv(limits.VARIABLE, wrong)
        with pytest.raises(ValueError, match=message):
            limits.value("json_depth")


def test_the_page_lists_every_limit() -> None:
    text = (Path(__file__).parents[1] / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    listed = {row[1].strip(" `"): row[2].strip() for row in rows}
    assert listed == {name: f"{limit.default:,} {limit.unit}" for name, limit in limits.LIMITS.items()}


# -- every reader ------------------------------------------------------------------------------------------------------------


def broden(folder: Path) -> object:
    with BrodenWriter(folder / "set", {"object": ["sky"]}, size=16, image_format="png") as writer:
        writer.add("a/1", np.zeros((16, 16, 3), np.uint8), {"object": np.ones((2, 8, 8), int)})
    return Broden(folder / "set").image_labels(0)


def coco(folder: Path) -> object:
    (folder / "photos").mkdir()
    (folder / "set.json").write_text('{"images": [{"a": ' + "[" * 8 + "]" * 8 + "}]}")
    return import_coco(folder / "set.json", folder / "photos", folder / "out")


def text(name: str, content: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    def case(folder: Path) -> object:
        (folder / name).write_text(content)
        return read(folder / name)

    return case


def picture(read: Callable[[Path], object]) -> Callable[[Path], object]:
    def case(folder: Path) -> object:
        Image.new("RGB", (20, 10)).save(folder / "a.png")
        return read(folder / "a.png")

    return case


def sharded(folder: Path) -> object:
    """Two shards, each with a picture and its label, of which every image must be read."""
    paths = [tar(folder / f"{i}.tar", [(f"{'x' * 120}.png", png(i)), (f"{'x' * 120}.cls", b"1")]) for i in range(2)]
    for batch in open_shards(paths).batches(to_tensor, 8):
        if batch.unreadable:
            raise DatasetError(batch.unreadable[0][1])
    return None


def arrays(read: Callable[[Path], object]) -> Callable[[Path], object]:
    def case(folder: Path) -> object:
        np.savez_compressed(folder / "a.npz", weight=np.zeros((60, 50)), bias=np.zeros(60))
        return read(folder / "a.npz")

    return case


def plain(folder: Path) -> object:
    torch.save({"weight": torch.zeros(9, 9)}, folder / "a.pt")
    return read_checkpoint(folder / "a.pt")


def expanded(folder: Path) -> object:
    torch.save({"weight": torch.zeros(1).expand(5000, 5000)}, folder / "a.pt")
    return read_checkpoint(folder / "a.pt")


def baseline(path: Path) -> object:
    return Baseline.from_csv(path)


BASELINE = "model,imagenet,noisy\n" + "".join(f"m{i},{50 + i},{40 + i}\n" for i in range(5))
CASES: list[tuple[str, int, Callable[[Path], object], type[Exception]]] = [
    ("picture_side", 15, picture(read_photo), DatasetError),
    ("picture_pixels", 150, picture(read_photo), DatasetError),
    ("picture_bytes", 30, picture(read_photo), DatasetError),
    ("row_pixels", 100, broden, DatasetError),
    ("files", 1, picture(lambda path: (path.with_name("b.txt").touch(), image_folder(path.parent))), DatasetError),
    ("shards", 1, sharded, DatasetError),
    ("members", 1, sharded, DatasetError),
    ("member_name", 100, sharded, DatasetError),
    ("label_bytes", 1, lambda folder: open_shards([tar(folder / "a.tar", [("a.png", png(1)), ("a.cls", b" 1")])]), DatasetError),
    ("table_bytes", 50, text("a.csv", BASELINE, baseline), ValueError),
    ("table_rows", 3, text("a.csv", BASELINE, baseline), ValueError),
    ("table_cell", 5, text("a.csv", BASELINE, baseline), ValueError),
    ("table_cell", 5, broden, DatasetError),
    ("text_bytes", 5, text("a.txt", "cat\ndog\n", read_concepts), DatasetError),
    ("text_line", 5, text("a.txt", "a cat\n", text_file), DatasetError),
    ("json_depth", 6, coco, DatasetError),
    ("json_bytes", 5, text("a.json", '{"a": 1}', read_json), ValueError),
    ("toml_bytes", 50, text("a.toml", ROW.format("a", "a"), load_suite), EncoderError),
    ("suite_rows", 1, text("a.toml", ROW.format("a", "a") + ROW.format("b", "b"), load_suite), EncoderError),
    ("arrays", 1, arrays(lambda path: open_arrays(path)), ValueError),
    ("array_bytes", 5000, arrays(lambda path: open_arrays(path)["weight"].tensor()), ValueError),
    ("head_numbers", 100, arrays(lambda path: open_head(path, 50)), ValueError),
    ("checkpoint_bytes", 100, plain, EncoderError),
    ("checkpoint_ratio", 100, expanded, EncoderError),
]


@pytest.mark.parametrize(("name", "most", "case", "kind"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_a_reader_refuses_and_obeys(name: str, most: int, case: Callable[[Path], object], kind: type[Exception], tmp_path: Path) -> None:
    refused, read = tmp_path / "refused", tmp_path / "read"
    refused.mkdir(), read.mkdir()
    with limits.changed(**{name: most}), pytest.raises(kind, match=f"TORCHPROBE_LIMITS={name}="):
        case(refused)
    with limits.changed(**{name: 10**9}):
        if name == "json_depth":  # deep enough, and then no images
            with pytest.raises(DatasetError, match="categories is missing"):
                case(read)
        else:
            case(read)


def test_every_limit_has_a_case() -> None:
    assert limits.LIMITS.keys() - {case[0] for case in CASES} == {"array_ratio"}  # tests/test_arrays.py


def test_one_mask_is_as_before(tmp_path: Path) -> None:
    ((category, planes),) = broden(tmp_path)  # type: ignore[misc]
    assert category == "object" and planes.shape == (2, 8, 8) and planes.dtype == torch.int32 and bool((planes == 1).all())


# -- nesting -----------------------------------------------------------------------------------------------------------------


def test_depth_of_json_is_counted_before_it_is_parsed() -> None:
    brackets = '[{"a": "' + "[" * 500 + '", "b": "\\"' + "{" * 500 + '"}]'
    assert parse_json(brackets) == [{"a": "[" * 500, "b": '"' + "{" * 500}]
    assert depth(parse_json("[" * 64 + "]" * 64)) == 64
    for deep in ("[" * 65 + "]" * 65, "[" * 10**6, '{"a":' * 10**5, "[" * 65):
        with pytest.raises(ValueError, match="more than 64 levels"):
            parse_json(deep)
    with limits.changed(json_depth=10**7), pytest.raises(ValueError, match="more deeply than Python can read"):
        parse_json("[" * 10**5 + "]" * 10**5)
    with pytest.raises(ValueError, match="not text in UTF-8"):
        parse_json(b'{"a": "\xff"}')


@pytest.mark.parametrize(
    "content",
    [
        "a = " + "[" * 5000,
        "a = " + "[" * 100 + "]" * 100,
        "a" + ".a" * 100_000 + " = 1",
        "[" + "a." * 90 + "a]",
        "a = {" + "b.c." * 50 + "d = 1}",
    ],
)
def test_deep_toml(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(content)
    with pytest.raises(ValueError, match="nested too deeply|more than 64 levels|a key of more than 16 parts"):
        read_toml(tmp_path / "a.toml")
    with pytest.raises(EncoderError, match="cannot be read as TOML"):
        load_suite(tmp_path / "a.toml")


def test_many_problems_of_a_suite_are_a_short_message(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("".join(f"[[encoder]]\nx{i} = 1\n" for i in range(500)))
    with pytest.raises(EncoderError, match=r"… and \d+ more") as caught:
        load_suite(tmp_path / "a.toml")
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("name", ["results.json"])
def test_deep_results(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"a":' * 5000 + "1" + "}" * 5000)
    with pytest.raises(ValueError, match=r"results.json is damaged: .*more than 64 levels"):
        load_results(tmp_path)


# -- memory ------------------------------------------------------------------------------------------------------------------


def measured(code: str, folder: Path) -> int:
    """Bytes by which the peak of a process grows over a piece of code; it prints what it finds."""
    program = f"""
        import resource, numpy as np, torch
        from torchprobe.common.arrays import open_arrays
        from torchprobe.datasets import Broden, Images
        from torchprobe.datasets.pictures import opened
        from torchprobe.encoders.checkpoint import read_checkpoint
        torch.zeros(10).sum()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        folder = {str(folder)!r}
        {code}
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_small_files_take_little_memory(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow as pa

    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, bytes(1 << 28) if "data/" in name else archive.read(name))
    parquet.write_table(pa.table({"y": pa.array(np.zeros(100_000_000, np.int8))}), tmp_path / "a.parquet")
    parquet.write_table(
        pa.table({"t": pa.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), ["x" * 100_000])}), tmp_path / "t.parquet"
    )
    for name in ("a.pt", "b.pt", "a.parquet", "t.parquet"):
        assert (tmp_path / name).stat().st_size < 1 << 20
    code = """
        for name in ("a.pt", "b.pt"):
            try:
                read_checkpoint(f"{folder}/{name}")
            except Exception as error:
                assert "bytes" in str(error), error
            else:
                raise SystemExit(f"{name} was read")
        try:
            open_arrays(folder + "/a.parquet")["y"].tensor()
        except ValueError as error:
            assert "array_ratio" in str(error), error
        else:
            raise SystemExit("a.parquet was read")
        assert len(open_arrays(folder + "/t.parquet")["t"].texts()) == 100_000
    """
    assert measured(textwrap.indent(textwrap.dedent(code), " " * 8), tmp_path) < 1 << 29
