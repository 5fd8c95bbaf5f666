"""Output folders: everything in one belongs to one run, and no run replaces another without being told."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from torchprobe.cli import main
from torchprobe.common.files import replacing, unfinished
from torchprobe.common.folders import HIDDEN, OtherRunError, file_name, listed, output_folder, record
from torchprobe.common.locks import InUseError

FORKS = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


def write(path: Path, text: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text)


def files(folder: Path) -> dict[str, str]:
    """Every file but those of the record."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and HIDDEN not in path.parts
    }


def interrupted(out: Path, name: str, command: str, resume: bool | None = None) -> None:
    """A run that is stopped after its first file."""

    def run() -> None:
        with output_folder(out, command, resume=resume):
            write(out / name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output of a run, with a run within it, and files of its user."""
    out = tmp_path / "out"
    with output_folder(out, "scan", of="a"):
        write(out / "index.html", "old")
        write(out / "plots" / "one.png", "old")
        with output_folder(out / "inner", "interpret", of="b", resume=False):
            write(out / "inner" / "results.json", "old")
            write(out / "inner" / "stages" / "x.json", "old")
    (out / "notes.txt").write_text("mine")
    (out / "plots" / "mine.png").write_text("mine")
    return out


def test_the_record(out: Path) -> None:
    found = record(out)
    assert found is not None and (found["command"], found["of"], found["finished"]) == ("scan", "a", True)
    assert {name for name in listed(out) if HIDDEN not in name} == {
        "index.html",
        "plots/one.png",
        "inner/results.json",
        "inner/stages/x.json",
    }
    assert not (out / HIDDEN / "lock").exists()


@pytest.mark.parametrize(("command", "resume"), [("scan", None), ("compare", None), ("interpret", False), ("interpret", True)])
def test_another_run_is_refused(out: Path, command: str, resume: bool | None) -> None:
    before = files(out)
    message = r"out holds the results of torchprobe scan of a, from 20.*: replace it with --overwrite \(overwrite=True\), or choose"
    with pytest.raises(OtherRunError, match=message), output_folder(out, command, resume=resume):
        pass
    assert files(out) == before


def test_a_run_that_can_be_resumed_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, "one", "interpret", resume=False)
    with (
        pytest.raises(
            OtherRunError, match=r"holds an unfinished run of torchprobe interpret.*: continue it with --resume \(resume=True\), repl"
        ),
        output_folder(out, "interpret", resume=False),
    ):
        pass
    with pytest.raises(OtherRunError, match="an unfinished run of torchprobe interpret"), output_folder(out, "dissect", resume=True):
        pass
    with output_folder(out, "interpret", resume=True):
        write(out / "two")
    assert sorted(listed(out)) == ["one", "two"]


@pytest.mark.parametrize(("command", "resume"), [("scan", None), ("interpret", False)])
def test_overwriting_removes_what_belongs_to_the_run_and_nothing_else(out: Path, command: str, resume: bool | None) -> None:
    with output_folder(out, command, resume=resume, overwrite=True):
        write(out / "deep" / "new.txt", "new")
    assert files(out) == {"notes.txt": "mine", "plots/mine.png": "mine", "deep/new.txt": "new"}
    assert not (out / "inner").exists()
    found = record(out)
    assert found is not None and found["command"] == command and listed(out) == ["deep/new.txt"]


def test_what_was_written_by_hand_into_an_inner_run_stays(out: Path) -> None:
    (out / "inner" / "mine.txt").write_text("mine")
    with output_folder(out, "scan", overwrite=True):
        write(out / "new.txt", "new")
    assert files(out) == {"notes.txt": "mine", "plots/mine.png": "mine", "inner/mine.txt": "mine", "new.txt": "new"}
    assert not (out / "inner" / HIDDEN).exists()


def test_an_error_before_the_first_file_leaves_the_old_run(out: Path) -> None:
    before, known = files(out), record(out)
    with pytest.raises(RuntimeError), output_folder(out, "compare", overwrite=True):
        raise RuntimeError
    assert files(out) == before and record(out) == known
    fresh = out.parent / "fresh" / "deep"
    with pytest.raises(RuntimeError), output_folder(fresh, "interpret", resume=False):
        raise RuntimeError
    assert not fresh.exists()


def test_an_empty_folder_is_removed_again_but_not_that_of_its_user(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine", "other"):
        with output_folder(tmp_path / name, "scan"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not [*(tmp_path / "mine").iterdir()]


def test_an_unfinished_run_that_cannot_be_resumed_is_replaced(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "half.csv", "scan")
    with output_folder(tmp_path / "out", "scan"):
        write(tmp_path / "out" / "whole.csv", "new")
    assert files(tmp_path / "out") == {"whole.csv": "new"}


def test_an_input_is_not_overwritten(out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    for given in (out, out / "index.html", tmp_path / "link" / "plots", tmp_path / "link"):
        again = output_folder(tmp_path / "link", "compare", overwrite=True, inputs=[None, tmp_path / "none", given])
        with pytest.raises(OtherRunError, match="is not overwritten, because this run reads"), again:
            pass
    assert files(out)["index.html"] == "old"


def test_a_run_without_a_record_is_refused_but_not_other_folders(tmp_path: Path) -> None:
    for name in ("index.html", "results.json", "summary.json", "checkpoint"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("old")
        for overwrite in (False, True):
            again = output_folder(tmp_path / name, "scan", overwrite=overwrite)
            with pytest.raises(OtherRunError, match=rf"holds {name} of a run without a list of its files"), again:
                pass
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
        with output_folder(tmp_path / name, "interpret", resume=True):  # what it cannot continue, it refuses itself
            write(tmp_path / name / "a.csv")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with output_folder(tmp_path / "home", "scan"):
        write(tmp_path / "home" / "index.html", "new")
    assert files(tmp_path / "home") == {"index.html": "new", "thesis.tex": "mine"}


def test_a_hostile_list_removes_nothing_elsewhere(out: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("precious")
    (out / "away").symlink_to(tmp_path / "precious")
    names: list[Any] = [
        "../precious/a",
        str(tmp_path / "precious" / "a"),
        "away/a",
        "plots/../../precious/a",
        "",
        ".",
        "..",
        "\0",
        3,
        None,
        [],
        "plots",
        "a" * 5000,
        "\ud800",
    ]
    lines = "".join(json.dumps(name) + "\n" for name in names) + '{"half": '
    (out / HIDDEN / "files").write_text(lines + (out / HIDDEN / "files").read_text())
    with output_folder(out, "scan", overwrite=True):
        write(out / "new.txt", "new")
    assert (tmp_path / "precious" / "a").read_text() == "precious" and (out / "plots" / "mine.png").exists()
    (out / HIDDEN / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json is damaged"), output_folder(out, "scan", overwrite=True):
        pass


def test_leftovers_of_killed_processes_are_removed(out: Path) -> None:
    left = [out / ".index.html.elsewhere-12-0.part", out / "plots" / ".one.png.999999999.part", out / "plots" / ".tmpAb3dE9"]
    for path in left:
        path.write_text("half")
    (out / "plots" / ".mine.part").write_text("mine")
    with output_folder(out, "scan", overwrite=True):
        write(out / "new.txt", "new")
    assert not any(path.exists() for path in left) and (out / "plots" / ".mine.part").exists()


def test_the_same_folder_in_one_process(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", "scan"), output_folder(tmp_path / "out", "compare"):  # joins the run
        write(tmp_path / "out" / "a.csv")
        caught: list[BaseException] = []

        def other() -> None:
            try:
                with output_folder(tmp_path / "out", "scan"):
                    pass
            except InUseError as error:
                caught.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 1
    found = record(tmp_path / "out")
    assert found is not None and found["command"] == "scan"


def running(out: Path, told: Connection) -> None:
    with output_folder(out, "interpret", resume=False):
        write(out / "stages" / "a.json")
        half = unfinished(out / "stages" / "b.json")
        half.write_text("half")
        told.send("writes")
        told.recv()


def test_two_processes_and_a_kill(tmp_path: Path) -> None:
    mine, theirs = FORKS.Pipe()
    process = FORKS.Process(target=running, args=(tmp_path / "out", theirs))
    process.start()
    assert mine.recv() == "writes" and process.pid is not None
    for options in ({"resume": True}, {"resume": False, "overwrite": True}):
        with (
            pytest.raises(InUseError, match=rf"out is in use by process {process.pid}"),
            output_folder(tmp_path / "out", "interpret", **options),
        ):
            pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with output_folder(tmp_path / "out", "interpret", resume=True):
        write(tmp_path / "out" / "results.json")
    assert files(tmp_path / "out") == {"stages/a.json": "text", "results.json": "text"}


def test_a_list_that_was_cut_off_loses_no_other_name(tmp_path: Path) -> None:
    """A kill or a full disk can end the list within a line. What is written next has a line of its own."""
    out = tmp_path / "out"
    interrupted(out, "first.txt", "interpret", resume=False)
    (out / "whole.txt").write_text("whole")
    with open(out / HIDDEN / "files", "ab") as file:
        file.write(b'"whole.txt"\n"cut')
    with output_folder(out, "interpret", resume=True):
        write(out / "second.txt")
        write(out / "third.txt")
    assert listed(out) == ["first.txt", "whole.txt", "second.txt", "third.txt"]
    with output_folder(out, "scan", overwrite=True):
        write(out / "new.txt")
    assert files(out) == {"new.txt": "text"}


def test_threads_that_write_the_first_files_of_a_run_remove_none_of_them(out: Path) -> None:
    """The first file of a run that cannot be resumed removes those of the run before, once."""
    begin = threading.Barrier(8)

    def work(number: int) -> None:
        begin.wait(60)
        write(out / f"new-{number}.txt")

    with output_folder(out, "scan", overwrite=True):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(listed(out)) == [f"new-{number}.txt" for number in range(8)]
    assert sorted(files(out)) == sorted([*listed(out), "notes.txt", "plots/mine.png"])


def test_another_working_folder_within_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    with output_folder("out", "scan"):
        write(tmp_path / "out" / "one.txt")
        os.chdir(tmp_path / "a")
        write(tmp_path / "out" / "two.txt")
    assert not [*(tmp_path / "a").iterdir()] and listed(tmp_path / "out") == ["one.txt", "two.txt"]
    found = record(tmp_path / "out")
    assert found is not None and found["finished"] and not (tmp_path / "out" / HIDDEN / "lock").exists()


def test_names_of_folders() -> None:
    assert [file_name(text) for text in ("a/b", "../x", "", "é\n\x1b[31m", "a" * 300)] == ["a_b", "_x", "output", "____31m", "a" * 100]


# -- commands ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(str(ended.value.code)), capsys.readouterr().err

    return call


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    numpy = pytest.importorskip("numpy")
    torch.manual_seed(0)
    for name in ("one", "two"):
        numpy.save(tmp_path / f"{name}.npy", torch.randn(40, 16).numpy())
    return tmp_path


@pytest.mark.usefixtures("undrawn")
def test_commands_never_replace_each_other(run: Callable[..., tuple[int, str]], vectors: Path) -> None:
    pytest.importorskip("jinja2")
    for name in ("one", "two"):
        assert run("interpret", "--embeddings", vectors / f"{name}.npy", "--modality", name)[0] == 0
    one, two = vectors / "torchprobe-interpret-one", vectors / "torchprobe-interpret-two"
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    for arguments in (
        ("interpret", "--embeddings", vectors / "two.npy", "--out", one),
        ("compare", one, two, "--out", one),
        ("compare", one, two, "--out", one, "--overwrite"),
        ("diff", one, two, "--out", one),
        ("scan", "timm:test_vit", "--random-init", "--images", vectors, "--out", one),
        ("interpret", "--embeddings", vectors / "two.npy", "--out", one, "--resume"),
    ):
        code, err = run(*arguments)
        assert code == 1, arguments
        assert "holds" in err or "because this run reads" in err or "was made with another" in err or "no images" in err, (arguments, err)
        assert {path: path.read_bytes() for path in one.rglob("*") if path.is_file()} == before, arguments
    assert run("interpret", "--embeddings", vectors / "two.npy", "--out", one, "--resume", "--overwrite")[0] == 2
    assert run("compare", one, two)[0] == 0 and (vectors / "torchprobe-compare-torchprobe-interpret-one-torchprobe-interpret-two").is_dir()
    assert run("compare", one, two)[0] == 1 and run("compare", one, two, "--overwrite")[0] == 0


@pytest.mark.usefixtures("undrawn")
def test_an_interpretation_that_overwrites_leaves_nothing_of_the_other(run: Callable[..., tuple[int, str]], vectors: Path) -> None:
    numpy = pytest.importorskip("numpy")
    numpy.save(vectors / "w.npy", torch.randn(4, 16).numpy())
    numpy.save(vectors / "y.npy", torch.randint(4, (40,)).numpy())
    out = vectors / "out"
    more = ("--labels", vectors / "y.npy", "--head", vectors / "w.npy")
    assert run("interpret", "--embeddings", vectors / "one.npy", "--out", out, *more)[0] == 0
    first = set(files_in(out))
    assert run("interpret", "--embeddings", vectors / "two.npy", "--out", out, "--overwrite")[0] == 0
    second = files_in(out)
    shutil.rmtree(out)
    assert run("interpret", "--embeddings", vectors / "two.npy", "--out", out)[0] == 0
    assert second == files_in(out) and "accuracy.csv" in first - set(second)
    assert json.loads((out / "results.json").read_text())["name"] == "two"


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and HIDDEN not in path.parts)


def test_a_dissection_replaces_finished_and_unfinished_ones(tmp_path: Path) -> None:
    from broden_sets import write_trap_set
    from dissection_models import Net, preprocess

    from torchprobe.studies.dissect import dissect_folder

    root, out = write_trap_set(tmp_path / "broden", images=12, seed=0).root, tmp_path / "out"
    options: dict[str, Any] = {"preprocess": preprocess, "batch_size": 3, "quantile": 0.05}

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    alone = dissect_folder(Net(), root, "norm", tmp_path / "alone", **options)
    expected = sorted(files_in(tmp_path / "alone"))
    asked: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        dissect_folder(Net(), root, "conv", out, stop=stop, **options)
    assert (out / "checkpoint").is_dir()
    assert dissect_folder(Net(), root, "norm", out, overwrite=True, **options) == alone and files_in(out) == expected
    dissect_folder(Net(), root, "conv", out, overwrite=True, **options)
    assert "norm.csv" not in files_in(out)
    with pytest.raises(OtherRunError, match="because this run reads"):
        dissect_folder(Net(), root, "norm", root, overwrite=True, **options)
    with pytest.raises(OtherRunError, match="holds the results of torchprobe dissect of Net"):
        dissect_folder(Net(), root, "norm", out, **options)


def test_no_name_fakes_a_line_of_an_error(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    bad = "none\nError: everything was deleted\x1b[31m"
    for arguments in (
        ("compare", tmp_path / bad, tmp_path / "b"),
        ("interpret", "--embeddings", tmp_path / bad),
        ("scan", "timm:test_vit", "--random-init", "--images", tmp_path / bad),
        ("scan", "timm:test_vit", "--images", ".", "--device", bad),
        ("interpret", "timm:test_vit", "--images", ".", "--features", bad),
        ("diff", bad, bad),
    ):
        code, err = run(*arguments)
        assert code in (1, 2) and "\x1b" not in err and "none" in err, arguments
        assert sum(line.startswith("Error: ") for line in err.splitlines()) == 1, err
