"""The ground floor: files, storage, ranks, progress, digests, options, messages, deprecation, and the name of the distribution."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from processes import group
from safetensors.torch import save_file

from torchprobe.common import deprecation, storage
from torchprobe.common.files import replacing, to_json
from torchprobe.common.messages import DISTRIBUTION, counted, did_you_mean, install_hint, listing, reason
from torchprobe.common.ranks import Ranks, torchrun
from torchprobe.common.runs import Clock, Progress, RunOptions, counting
from torchprobe.common.storage import digest

# -- files ---------------------------------------------------------------------------------------------------------------


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with contextlib.suppress(error), replacing(target) as temporary:
        temporary.write_text("ha")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replacing(os.fspath(target)) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        temporary.chmod(0o600)  # as safetensors does
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_interruption_before_the_first_file_leaves_none(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), replacing(tmp_path / "a.txt"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_json_has_no_nan() -> None:
    assert json.loads(to_json({"a": [math.nan, math.inf, (1, 2.5)], 3: True})) == {"a": [None, None, [1, 2.5]], "3": True}
    with pytest.raises(TypeError):
        to_json({"a": object()})


def test_json_is_ascii() -> None:
    assert to_json(["κ"]) == '[\n  "\\u03ba"\n]'


# -- storage -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    storage.write(path, "example", {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(0)}, {"name": "ä", "count": 3})
    return path


def test_tensors_and_values_come_back(stored: Path) -> None:
    file = storage.File(stored, "example")
    assert sorted(file.keys) == ["x", "y"]
    assert torch.equal(file.tensor("x"), torch.arange(6.0).view(2, 3))
    assert file.tensor("x", torch.float32, (None, 3)).shape == (2, 3)
    assert file.tensor("y", shape=(0,)).shape == (0,)
    assert file.values == {"name": "ä", "count": 3}
    assert file.value("count", int) == 3


def test_any_tensor_can_be_stored(tmp_path: Path) -> None:
    x = torch.ones(4, 6, requires_grad=True)
    storage.write(tmp_path / "a.safetensors", "example", {"transposed": x.T, "part": x[:, ::2]}, {})
    assert storage.File(tmp_path / "a.safetensors", "example").tensor("transposed").shape == (6, 4)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda file: file.tensor("z"), "'z': missing"),
        (lambda file: file.tensor("x", torch.float64), r"'x': expected torch\.float64, got torch\.float32"),
        (lambda file: file.tensor("x", shape=(2, 4)), r"'x': expected the shape \(2, 4\), got \(2, 3\)"),
        (lambda file: file.tensor("x", shape=(2,)), r"'x': expected the shape \(2,\), got \(2, 3\)"),
        (lambda file: file.value("name", int), "'name': expected int, got str"),
        (lambda file: file.value("nothing", str), "'nothing': expected str, got NoneType"),
    ],
)
def test_unexpected_content_is_named_with_the_file(stored: Path, read, message: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.safetensors, {message}"):
        read(storage.File(stored, "example"))


def test_other_files_are_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.safetensors"):
        storage.File(tmp_path / "none.safetensors", "example")
    with pytest.raises(ValueError, match=r"a\.safetensors has kind 'example', format '2'; expected 'recording', format '2'"):
        storage.File(stored, "recording")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.safetensors is not a safetensors file"):
        storage.File(tmp_path / "text.safetensors", "example")
    save_file({"x": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="has kind None, format None"):
        storage.File(tmp_path / "plain.safetensors", "example")


def test_a_file_for_which_there_is_no_space(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no limits of file sizes on this system")
    path, limits = tmp_path / "a.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    storage.write(path, "example", {"x": torch.zeros(3)}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*a\.safetensors") as raised:
            storage.write(path, "example", {"x": torch.ones(1 << 16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]  # the old one, whole
    assert storage.File(path, "example").tensor("x").tolist() == [0.0] * 3


@pytest.mark.parametrize(("values", "message"), [("{", "the metadata is not JSON"), ("[1]", "expected a JSON object")])
def test_damaged_metadata_is_refused(tmp_path: Path, values: str, message: str) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors", {"format": storage.EARLIER, "kind": "example", "values": values})
    with pytest.raises(ValueError, match=rf"a\.safetensors, 'values': {message}"):
        storage.File(tmp_path / "a.safetensors", "example")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cannot save to .*: there is no folder .*nowhere"):
        storage.write(tmp_path / "nowhere" / "a.safetensors", "example", {}, {})


# -- ranks ---------------------------------------------------------------------------------------------------------------

TWO_RANKS = """
import json
from torchprobe.common.ranks import Ranks, torchrun
with torchrun() as (rank, local), Ranks() as ranks:
    ranks.barrier()
    sent = list(ranks.to_first({"from": ranks.rank}))
    print(json.dumps([rank, local, ranks.rank, ranks.size, ranks.first, ranks.from_first(f"value of {rank}"), sent]))
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_ranks_share_values() -> None:
    first, second = (json.loads(done.stdout.splitlines()[-1]) for done in group(2, TWO_RANKS))
    assert first == [0, 0, 0, 2, True, "value of 0", [{"from": 1}]]
    assert second == [1, 1, 1, 2, False, "value of 0", []]


def test_one_process_is_one_rank() -> None:
    with torchrun() as (rank, local), Ranks() as ranks:
        ranks.barrier()
        assert (rank, local) == (0, None)
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert (ranks.from_first(3), list(ranks.to_first(3))) == (3, [])


# -- progress ------------------------------------------------------------------------------------------------------------


FOREIGN = """
import torch
from torchprobe.common.ranks import Ranks, torchrun

class Foreign(OSError):  # it cannot be made of its message alone, as errors of some libraries
    def __init__(self, *, response):
        super().__init__(f"the server answers {response}")

def fail():
    raise Foreign(response=404)

with torchrun(), Ranks() as ranks:
    try:
        ranks.on_first(fail)
    except (OSError, RuntimeError) as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_an_error_that_cannot_be_sent_is_told_by_its_message() -> None:
    done = group(2, FOREIGN)
    told = [process.stdout.strip() for process in done]
    assert told == ["Foreign the server answers 404", "RuntimeError Foreign: the server answers 404"], [process.stderr for process in done]


def test_the_remaining_time_follows_the_pace_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("torchprobe.common.runs.time.monotonic", lambda: now[0])
    told: list[Progress] = []
    clock = Clock(told.append, stages=2)
    clock.start("first", done=4, total=10)  # which is reported
    now[0] = 106.0
    clock.tell(6)  # 2 items in 6 seconds: 4 more here, 10 in the next stage
    clock.finish()
    clock.start("second", done=0, total=10)
    now[0] = 107.0
    clock.tell(5)
    assert told == [
        Progress("first", 4, 10, 0.0, None),
        Progress("first", 6, 10, 6.0, 42.0),
        Progress("second", 0, 10, 6.0, None),
        Progress("second", 5, 10, 7.0, 1.0),
    ]


def test_a_clock_without_callback_is_silent() -> None:
    clock = Clock(None, stages=1)
    clock.start("stage", 0, 1)
    clock.tell(1)
    assert counting(None) is None


# -- digests, options, messages ------------------------------------------------------------------------------------------


def test_a_digest_depends_on_type_shape_values_and_order() -> None:
    x = torch.arange(6, dtype=torch.int32)
    digests = {
        digest([]),
        digest([x]),
        digest([x, x]),
        digest([x.view(2, 3)]),
        digest([x.float()]),
        digest([x.view(torch.float32)]),
        digest([x.flip(0)]),
        digest([x, x[:0]]),
    }
    assert len(digests) == 8
    assert digest([x.repeat(2)[::1][:6]]) == digest([x[None, :].expand(1, 6)[0]]) == digest([x])


def test_options_cannot_be_changed() -> None:
    options = RunOptions(batch_size=8, device="cpu")
    assert dataclasses.replace(options, seed=1) == RunOptions(8, "cpu", seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]


def test_parts_of_messages() -> None:
    assert listing([]) == "" and listing(["a", "b"]) == "a, b"
    assert listing(list("abcdefghij")) == "a, b, c, d, e, f, g, h … and 2 more"
    assert did_you_mean("nothing", ["zero-shot"]) == ""
    assert did_you_mean("abx", ["abc", "abd"]) in ("; did you mean abc or abd?", "; did you mean abd or abc?")
    assert reason(KeyError("a")) == "KeyError: 'a'" and reason(ValueError()) == "ValueError:"
    assert len(reason(ValueError("x" * 900))) == 500
    assert counted(0, "file") == "0 files" and counted(1, "file") == "1 file"


# -- deprecation ---------------------------------------------------------------------------------------------------------


def test_a_renamed_name_warns_where_it_is_used() -> None:
    module = ModuleType("example")
    module.new = 3
    sys.modules["example"] = module
    try:
        module.__getattr__ = deprecation.renamed("example", {"old": "new", "moved": "torchprobe.common.files:to_json"})
        with pytest.warns(DeprecationWarning, match=r"^example\.old is deprecated, use example\.new$") as caught:
            assert module.old == 3
        assert caught[0].filename == __file__
        with pytest.warns(DeprecationWarning, match=r"^example\.moved is deprecated, use torchprobe\.common\.files\.to_json$"):
            assert module.moved is to_json
        with pytest.raises(AttributeError, match="module 'example' has no attribute 'other'"):
            module.other  # noqa: B018
    finally:
        del sys.modules["example"]


def test_a_renamed_argument_warns_where_it_is_used() -> None:
    @deprecation.renamed_arguments(images="rows", count="limit")
    def choose(rows: int = 0, *, limit: int = 0) -> tuple[int, int]:
        return rows, limit

    assert choose(1, limit=2) == (1, 2)
    with pytest.warns(DeprecationWarning, match="choose: the argument 'count' is deprecated, use 'limit'") as caught:
        assert choose(1, count=2) == (1, 2)
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="choose: 'images' is the old name of 'rows'; give 'rows' alone"):
        choose(rows=1, images=2)


# -- the distribution ----------------------------------------------------------------------------------------------------


def test_hints_name_the_distribution() -> None:
    assert install_hint("vision") == f"pip install '{DISTRIBUTION}[vision]'"


def test_no_file_names_the_distribution_of_somebody_else() -> None:
    root = Path(__file__).parents[1]
    files = [*root.glob("torchprobe/**/*.py"), *root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/*.py")]
    wrong = [
        str(file.relative_to(root))
        for file in files
        if re.search(r"pip install[^\n]*\btorchprobe(?![-\w/])", file.read_text(encoding="utf-8"))
    ]
    assert wrong == []


def test_products_are_full_within_the_block_and_as_before_after_it() -> None:
    from products import products_in_bfloat16

    from torchprobe.common.precision import full_products, in_full

    assert full_products() and full_products("cpu") and full_products("cuda")
    with products_in_bfloat16():
        assert not full_products("cpu") and not full_products()
        with in_full():
            assert full_products("cpu")
        assert not full_products("cpu")
    assert full_products()
