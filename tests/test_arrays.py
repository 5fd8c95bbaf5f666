"""Arrays from files that are not trusted, and representations made of them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import python
from safetensors.torch import save_file

from torchprobe.analysis import (
    Embeddings,
    ablate,
    evaluate,
    outlier_features,
    privileged_directions,
    rotation_control,
    summarize,
    vector_kurtosis,
)
from torchprobe.analysis.given_files import Given, keep, open_given, open_head
from torchprobe.common import arrays
from torchprobe.common.arrays import located, open_arrays, to_tensor
from torchprobe.common.parquet_footer import values_of

RANDOM = np.random.default_rng(0)
H = RANDOM.normal(size=(30, 8)).astype(np.float32)
Y = np.arange(30) % 3


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, ("pickled-code-was-run",)


# -- what is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_floating_type_and_order(tmp_path: Path, dtype: str, order: str) -> None:
    h = np.array(H, dtype=dtype, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "h.npy", h)
    np.savez(tmp_path / "h.npz", h=h)
    np.savez_compressed(tmp_path / "c.npz", h=h)
    for name in ("h.npy", "h.npz", "c.npz"):
        found = open_given(tmp_path / name)
        assert np.array_equal(found.h.double().numpy(), h.astype(np.float64)) and found.ids[3] == "row 3 of 30"


def test_bfloat16_and_half_from_safetensors(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        save_file({"h": torch.from_numpy(H).to(dtype), "y": torch.from_numpy(Y)}, tmp_path / "h.safetensors")
        found = open_given(tmp_path / "h.safetensors")
        assert torch.equal(found.h, torch.from_numpy(H).to(dtype)) and found.y.tolist() == Y.tolist()


def test_a_file_of_embed_keeps_names_and_labels(tmp_path: Path) -> None:
    e = Embeddings.from_arrays(H, Y, [f"{i}.png" for i in range(30)])
    e.save(tmp_path / "e.safetensors")
    found = open_given(tmp_path / "e.safetensors")
    assert found.ids == e.ids and torch.equal(found.y, e.y) and torch.equal(found.h, e.h)
    np.save(tmp_path / "y.npy", 2 - Y)
    assert open_given(tmp_path / "e.safetensors", tmp_path / "y.npy").y.tolist() == (2 - Y).tolist()


@pytest.mark.parametrize("kind", ["list", "fixed"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    inner = pyarrow.list_(pyarrow.float32(), 8 if kind == "fixed" else -1)
    names = [f"{i}.png" for i in range(30)]
    table = pyarrow.table({"h": pyarrow.array(H.tolist(), inner), "label": Y, "ids": names})
    parquet.write_table(table, tmp_path / "h.parquet", row_group_size=7)
    found = open_given(tmp_path / "h.parquet")
    assert np.array_equal(found.h.numpy(), H) and found.y.tolist() == Y.tolist() and found.ids == names
    for wrong, message in (
        ([[1.0, 2.0], [1.0]], "lists of different lengths"),
        ([[1.0, None], [1.0, 2.0]], "lacks a number"),
        ([[1.0, 2.0], None], "has no value in a row from 0 to 1"),
    ):
        if kind == "list":
            parquet.write_table(pyarrow.table({"h": wrong}), tmp_path / "w.parquet")
            with pytest.raises(ValueError, match=message):
                open_given(tmp_path / "w.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match="broken.parquet cannot be read as .parquet"):
        open_given(tmp_path / "broken.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pyarrow, which is not installed: pip install pyarrow, or 'torchprobe-interp\[parquet\]'"):
        open_given(tmp_path / "h.parquet")


def test_large_arrays_stay_on_the_disk(tmp_path: Path) -> None:
    """20 GB that the disk does not hold either: only the pages that are read exist."""
    rows = 5_000_000
    with open(tmp_path / "h.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, 1024)})
        file.truncate(file.tell() + 4 * rows * 1024)
    h = open_arrays(tmp_path / "h.npy")[""].tensor()
    assert h.shape == (rows, 1024) and float(h[rows - 1, 5]) == 0
    np.savez(tmp_path / "h.npz", h=H)
    member = open_arrays(tmp_path / "h.npz")["h"].tensor()
    assert np.array_equal(member.numpy(), H)
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / "h.npz") in Path("/proc/self/maps").read_text()


def test_a_name_with_a_colon_is_a_file_if_it_exists(tmp_path: Path) -> None:
    assert located("a.npz:b") == (Path("a.npz"), "b") and located("C:folder") == (Path("C:folder"), None)
    odd = tmp_path / "a.npz:b"
    odd.touch()
    assert located(odd) == (odd, None)


# -- hostile files --------------------------------------------------------------------------------------------------------


def member(path: Path, content: bytes, name: str = "h.npy") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickle_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.array([Evil(), Evil()], dtype=object)
    np.save("h.npy", objects, allow_pickle=True) if suffix == "npy" else np.savez("h.npz", h=objects)
    with pytest.raises(ValueError, match=r"h.np.* holds object, not real numbers; Python objects are code \(pickle\) and are never read"):
        open_given(f"h.{suffix}")
    Path("h.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="Files with pickle may hold code: save the numbers with np.save or safetensors"):
        open_given("h.pkl")
    assert not Path("pickled-code-was-run").exists()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", h=np.zeros((40_000, 1000), np.float32))  # 160 MB in 160 kB
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=r"bomb.npz:h unpacks .* bytes to 160,000,128, which is refused: .*; or save it with np.save"):
        open_given(tmp_path / "bomb.npz")


def test_headers_that_lie(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)})
    for path, message in (
        (member(tmp_path / "a.npz", header.getvalue()), "a.npz:h is damaged: float32 .* the archive says"),
        (member(tmp_path / "b.npz", b"no array"), "b.npz:h is not an array in NumPy's format"),
        (member(tmp_path / "c.npz", saved(H)[:-4]), "c.npz:h is damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            open_given(path)
    (tmp_path / "cut.npy").write_bytes(saved(H)[:-4])
    with pytest.raises(ValueError, match=r"cut.npy is cut off: float32 \(30, 8\) needs 960 bytes"):
        open_given(tmp_path / "cut.npy")
    for name in ("no.npy", "no.npz", "no.safetensors"):
        (tmp_path / name).write_bytes(b"no numbers")
        with pytest.raises(ValueError, match=name):
            open_given(tmp_path / name)
    np.savez(tmp_path / "d.npz", h=H)
    whole = bytearray((tmp_path / "d.npz").read_bytes())
    struct.pack_into("<H", whole, 26, 60_000)  # the local header claims a long name, so the data would lie outside of the file
    (tmp_path / "d.npz").write_bytes(whole)
    with pytest.raises(ValueError, match="d.npz"):
        open_given(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (H[0], r"must be representations \(n, d\), one vector in each row; got \(8,\); a single vector is h\[None\]"),
        (H[:0], r"got \(0, 8\)"),
        (H[None], r"got \(1, 30, 8\)"),
        (H.astype(np.int8), "must be floating point, got torch.int8: convert it first, and undo a quantization"),
        (H > 0, "must be floating point, got torch.bool|holds bool"),
        (H.astype(np.complex64), "holds complex64, not real numbers"),
        (np.array([["a"]]), "holds <U1, not real numbers"),
        (np.zeros(3, dtype=[("a", "f4")]), "not real numbers"),
        (np.zeros((1, 1 << 16), np.float32), "has 65,536 features in each row, more than 32,768: is it transposed"),
    ],
)
def test_wrong_representations(tmp_path: Path, given: np.ndarray, message: str) -> None:
    np.save(tmp_path / "h.npy", given)
    with pytest.raises(ValueError, match=message):
        open_given(tmp_path / "h.npy")
    with pytest.raises(ValueError, match=message):
        Embeddings.from_arrays(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Y[:7], "has 7 labels for 30 representations"),
        (Y[:8], "has 8 labels for 30 representations. Are the representations transposed"),
        (Y.astype(float), r"must be whole numbers \(n,\), rows of the head; got torch.float64"),
        (Y[:, None], "must be whole numbers"),
        (Y - 3, "has the label -3"),
        (np.full(30, 1 << 63, np.uint64), "does not fit 64 bits"),
        (np.array(["cat"] * 30), "holds <U3"),
    ],
)
def test_wrong_labels(tmp_path: Path, given: np.ndarray, message: str) -> None:
    np.save(tmp_path / "h.npy", H)
    np.save(tmp_path / "y.npy", given)
    np.savez(tmp_path / "both.npz", h=H, y=given)
    for arguments in ((tmp_path / "h.npy", tmp_path / "y.npy"), (tmp_path / "both.npz",)):
        if given.ndim == 1 or len(arguments) == 2:
            with pytest.raises(ValueError, match=message):
                open_given(*arguments)
    with pytest.raises(ValueError, match=message):
        Embeddings.from_arrays(H, given)


def test_which_array_of_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "h.npz", images=H, captions=2 * H, ids=np.array([f"{i}" for i in range(30)]))
    with pytest.raises(ValueError, match=r"h.npz has several arrays that may be representations: images: float32 \(30, 8\)"):
        open_given(tmp_path / "h.npz")
    with pytest.raises(ValueError, match="has no array 'image'.*did you mean images"):
        open_given(f"{tmp_path}/h.npz:image")
    found = open_given(f"{tmp_path}/h.npz:captions")
    assert torch.equal(found.h, torch.from_numpy(2 * H)) and found.ids == [f"{i}" for i in range(30)]
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_given(tmp_path / "none.npy")
    np.savez(tmp_path / "twice.npz", h=H, ids=np.array(["a"] * 30))
    with pytest.raises(ValueError, match="has the name 'a' twice"):
        open_given(tmp_path / "twice.npz")


def test_a_head_of_an_array(tmp_path: Path) -> None:
    weight, bias = RANDOM.normal(size=(3, 8)), RANDOM.normal(size=3)
    np.save(tmp_path / "w.npy", weight.astype(np.float16))
    np.savez(tmp_path / "wb.npz", weight=weight, bias=bias)
    head = open_head(tmp_path / "w.npy", 8)
    assert torch.equal(head.weight, torch.from_numpy(weight.astype(np.float16)).float()) and head.bias is None
    assert torch.allclose(open_head(tmp_path / "wb.npz", 8).bias, torch.from_numpy(bias).float())
    for names in (("fc.weight", "fc.bias"), ("coef_", "intercept_"), ("w", "b"), ("head", "head_bias")):  # of PyTorch, of sklearn …
        np.savez(tmp_path / "named.npz", **dict(zip(names, (weight, bias), strict=True)), other=weight[:, :3])
        for where in ("named.npz", f"named.npz:{names[0]}"):
            assert torch.allclose(open_head(tmp_path / where, 8).bias, torch.from_numpy(bias).float())
    np.savez(tmp_path / "named.npz", w=weight, other=bias)
    assert open_head(tmp_path / "named.npz:w", 8).bias is None
    with pytest.raises(ValueError, match=r"named.npz:other cannot be a head: that is a weight \(classes, features\), got \(3,\)"):
        open_head(tmp_path / "named.npz:other", 8)
    np.save(tmp_path / "t.npy", weight.T)
    with pytest.raises(ValueError, match="takes 3 features, but the representations have 8. Is it transposed"):
        open_head(tmp_path / "t.npy", 8)
    weight[1, 2] = np.nan
    np.save(tmp_path / "nan.npy", weight)
    with pytest.raises(ValueError, match="nan.npy: the head has nan or inf in 1 of its 3 rows, the first is row 1"):
        open_head(tmp_path / "nan.npy", 8)


def test_kept_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchprobe.analysis.given_files._BLOCK", 24)
    h = H.astype(np.float64)
    h[4, 2] = np.nan
    given = Given(torch.from_numpy(h), torch.from_numpy(Y), [f"{i}" for i in range(30)])
    found = keep(given, tmp_path / "e.safetensors", "mine")
    assert np.array_equal(found.h.numpy(), h.astype(np.float32), equal_nan=True) and found.nonfinite == 1 and found.ids == given.ids
    assert keep(given, tmp_path / "e.safetensors", "mine", resume=True).provenance == found.provenance
    other = Given(2 * given.h, given.y, given.ids)
    with pytest.raises(ValueError, match="was made with another representations"):
        keep(other, tmp_path / "e.safetensors", "mine", resume=True)
    given.h[3, 0] = 1e39
    with pytest.raises(ValueError, match=r"mine: row 3 has a number beyond ±3.4e38"):
        keep(given, tmp_path / "f.safetensors", "mine")
    given.h[3] = 1e-39
    given.h[5] = 0
    with pytest.raises(ValueError, match=r"mine: row 3 has no number above 1.2e-38"):
        keep(given, tmp_path / "f.safetensors", "mine")
    with pytest.raises(ValueError, match="every one of the 30 representations has nan or inf"):
        keep(Given(given.h * torch.nan, given.y, given.ids), tmp_path / "f.safetensors", "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


# -- NumPy wherever tensors are -------------------------------------------------------------------------------------------


def test_measures_take_numpy_arrays() -> None:
    h, weight = RANDOM.normal(size=(40, 64)), RANDOM.normal(size=(5, 64))
    t, w = torch.from_numpy(h), torch.from_numpy(weight)
    for array in (h, h.astype(">f8"), np.asfortranarray(h), h[::-1][::-1], np.ascontiguousarray(h.T).T):
        assert torch.equal(vector_kurtosis(array), vector_kurtosis(t))
    assert summarize(h, rotations=2).mean == summarize(t, rotations=2).mean
    assert rotation_control(h, 2).mean == rotation_control(t, 2).mean
    assert outlier_features(h).rows() == outlier_features(t).rows()
    assert torch.equal(ablate(h, np.array([3, 5]), how="mean", reference=h), ablate(t, [3, 5], how="mean"))  # type: ignore[arg-type]
    assert torch.equal(privileged_directions(weight, h).importance, privileged_directions(w, t).importance)
    e = Embeddings.from_arrays(h, np.arange(40) % 5)
    assert evaluate(weight, e).accuracy == evaluate(w, e).accuracy
    h.setflags(write=False)
    assert torch.equal(vector_kurtosis(h), vector_kurtosis(t))
    assert Embeddings.from_arrays(H).h.data_ptr() == H.ctypes.data  # not copied


def test_types_of_numpy() -> None:
    assert to_tensor(np.array([1, 2], ">u2")).tolist() == [1, 2] and to_tensor(np.array([1], np.uint64)).dtype == torch.int64
    assert to_tensor(np.arange(4.0)[::-1]).tolist() == [3, 2, 1, 0]
    with pytest.raises(TypeError, match="h must be a NumPy array or a tensor, got list"):
        Embeddings.from_arrays([[1.0]])  # type: ignore[arg-type]
    assert arrays.SUFFIXES == (".npy", ".npz", ".safetensors", ".parquet")


# -- the footer of Parquet files -------------------------------------------------------------------------------------------


def test_values_in_a_parquet_file_are_those_that_its_library_counts(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "h": pyarrow.array([[1.0, 2.0]] * 700),
        "a.b": pyarrow.array([[1.0], None, [2.0, 3.0], []] * 175),
        "größe": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.ones(2100, np.float32)), 3),
        "y": pyarrow.array(range(700)),
        "word": pyarrow.array(["cat", "dog"] * 350).dictionary_encode(),
        "pair": pyarrow.array([{"x": 1, "y": 2.0}] * 700),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=128)
    groups = [parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(i) for i in range(6)]
    expected: dict[str, int] = {}
    for group in groups:
        for part in (group.column(j) for j in range(group.num_columns)):
            name = next(name for name in columns if part.path_in_schema.startswith(name))
            expected[name] = expected.get(name, 0) + part.num_values
    assert values_of(tmp_path / "a.parquet") == expected
    assert expected["h"] == 1400 and expected["a.b"] == 875 and expected["größe"] == 2100


_FOOTERS = """
import sys
from pathlib import Path
import pyarrow
from pyarrow import parquet
from torchprobe.common.arrays import open_arrays

path = Path(sys.argv[1], "a.parquet")
parquet.write_table(pyarrow.table({"h": pyarrow.array([[1.0, 2.0], [3.0, 4.0]])}), path)
valid = path.read_bytes()
begin = len(valid) - 8 - int.from_bytes(valid[-8:-4], "little")
found = {"read": 0, "refused": 0}
for at in range(begin, len(valid) - 8):
    if valid[at] in (2, 4, 21, 41):  # among them: optional, as which lists are declared
        path.unlink()
        path.write_bytes(valid[:at] + bytes([0 if valid[at] == 2 else valid[at] + 16]) + valid[at + 1 :])
        try:
            [array.tensor() for array in open_arrays(path).values()]
            found["read"] += 1
        except ValueError:
            found["refused"] += 1
print(found)
"""


def test_no_footer_ends_the_process(tmp_path: Path) -> None:
    """pyarrow aborts when it is asked for the statistics of a column whose sizes contradict its schema."""
    pytest.importorskip("pyarrow")
    done = python(_FOOTERS, tmp_path)
    assert done.returncode == 0 and "'refused': 0" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1\xff\xff\xff\xffPAR1", b"PAR1" + b"\x29" * 50 + b"\x32\0\0\0PAR1", b"\x49\xfc" * 9])
def test_what_is_no_footer_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="no footer|footer is damaged"):
        values_of(tmp_path / "a.parquet")
