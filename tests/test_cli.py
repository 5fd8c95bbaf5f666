"""The command line: output, exit codes, JSON, interruptions."""

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import torchprobe
from torchprobe import cli
from torchprobe.cli.tools import terminable
from torchprobe.encoders import Encoder

for package in ("PIL", "timm", "matplotlib", "jinja2"):
    pytest.importorskip(package, reason=f"{package} is not installed")

MODEL = "timm:test_vit"


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line in this process; gives exit code, standard output and standard error."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


# -- help and wrong usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["scan"], ["layers"], ["dissect"], ["doctor"], ["demo"]])
def test_help_documents_the_exit_codes(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    for number in (0, 1, 2, 130):
        assert re.search(rf"^ +{number} ", out, re.MULTILINE)
    assert (re.search(r"^ +3 ", out, re.MULTILINE) is not None) == (command in ([], ["dissect"], ["doctor"]))


COMMANDS = [
    "scan",
    "quantize-check",
    "layers",
    "completion",
    "concepts",
    "dissect",
    "segment",
    "words",
    "interpret",
    "compare",
    "diff",
    "watch",
    "doctor",
    "demo",
]


def test_help_fits_80_columns(run, monkeypatch):
    pages = {}
    for command in ([], *([name] for name in COMMANDS)):
        monkeypatch.setenv("COLUMNS", "80")
        pages[" ".join(command)] = run(*command, "--help")[1]
    too_wide = [line for page in pages.values() for line in page.splitlines() if len(line) > 80]
    assert too_wide == []
    summaries = dict(re.findall(r"^  ([\w-]+)  +(\S.*)$", pages[""].partition("Commands:")[2].partition("Exit codes:")[0], re.MULTILINE))
    assert sorted(summaries) == sorted(COMMANDS)
    assert [text for text in summaries.values() if not text.endswith(".") or text.endswith("...")] == []


def test_version(run):
    assert run("--version")[1].split() == ["torchprobe", torchprobe.__version__]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["scan", MODEL],
        ["scan", MODEL, "--images", ".", "--batch-size", "0"],
        ["scan", MODEL, "--images", ".", "--device", "nonsense"],
        ["scan", MODEL, "--images", ".", "--random-init", "--checkpoint", "a.pt"],
        ["layers"],
        ["dissect", MODEL, "--layers", "visual.blocks.*"],
        ["dissect", "--layers", "visual.blocks.*", "--broden", "."],
        ["dissect", MODEL, "--broden", "."],
        ["dissect", MODEL, "--layers", "a", "--broden", ".", "--score", "auc"],
        ["dissect", MODEL, "--layers", "a", "--broden", ".", "--random-init", "--checkpoint", "a.pt"],
    ],
)
def test_wrong_usage_exits_with_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "--help" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "timm:test_vti"], "no model 'test_vti'"),
        (["layers", "vit"], "not the name of an encoder"),
        (["layers", "test_vit"], "did you mean timm:test_vit?"),
        (["layers", MODEL, "--layers", "visual.block.*"], "matches no layer"),
        (["scan", MODEL, "--images", "{photos}/none"], "does not exist"),
        (["scan", MODEL, "--images", "{photos}", "--checkpoint", "{photos}/none.pt"], "no checkpoint at"),
        (["scan", MODEL, "--images", "{photos}", "--random-init", "--layers", "visual.blcks"], "visual.blocks"),
        (["scan", MODEL, "--images", "{photos}", "--random-init", "--output", "{photos}/0.png"], "0.png"),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_one_message(run, photos, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*[argument.format(photos=photos) for argument in arguments])
    assert code == 1
    assert out == ""
    *progress, error = err.splitlines()
    assert error.startswith("Error: ") and message in error
    assert all(line.endswith("…") or line.startswith("scan: 0 of") for line in progress)
    assert list(tmp_path.iterdir()) == [photos]  # no empty folder of results


def test_layers_takes_a_checkpoint_and_says_whether_it_fits(run, tmp_path):
    import timm

    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), tmp_path / "fits.pt")
    torch.save({"_blocks.0._bn0.weight": torch.ones(3)}, tmp_path / "another.pt")  # in the names of EfficientNet's own package
    code, out, err = run("layers", MODEL, "--checkpoint", tmp_path / "fits.pt", "--json")
    found = json.loads(out)
    assert code == 0 and found["model"] == "timm:test_vit (fits.pt)"
    assert found["layers"] == json.loads(run("layers", MODEL, "--json")[1])["layers"]
    for network in (MODEL, "timm:test_resnet"):
        code, out, err = run("layers", network, "--checkpoint", tmp_path / "another.pt")
        assert (code, out) == (1, "") and "missing" in err and "_blocks.0._bn0.weight" in err
    code, out, err = run("layers", MODEL, "--checkpoint", tmp_path / "none.pt")
    assert code == 1 and "no checkpoint at" in err


def test_the_command_says_that_it_fetches_weights_before_it_fails(run, photos, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("timm.create_model", offline)
    code, out, err = run("scan", MODEL, "--images", photos, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.startswith(f"Fetching the weights of {MODEL}")
    assert "--checkpoint FILE" in err
    assert "--random-init" in err
    assert not (tmp_path / "out").exists()


# -- layers --------------------------------------------------------------------------------------------------------------


def test_layers_lists_what_can_be_recorded(run):
    code, out, _ = run("layers", MODEL)
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "●" in lines["visual.blocks.0"]
    assert "Block" in lines["visual.blocks.0"]
    assert "●" in lines["(output)"]
    assert "●" not in lines["visual.blocks.0.attn.qkv"]
    assert "Linear" in lines["visual.blocks.0.attn.qkv"]
    assert "--layers ''" in out


def test_the_model_itself_can_be_listed(run):
    code, out, _ = run("layers", MODEL, "--layers", "")
    assert code == 0
    assert "(output)" in out
    assert "1 layer. " in out


def test_layers_as_json(run):
    code, out, _ = run("layers", MODEL, "--layers", "visual.blocks.*", "--layers", "visual.patch_embed.proj", "--json")
    assert code == 0
    found = json.loads(out)
    rows = {row["layer"]: row for row in found["layers"]}
    assert found["features"] == 64
    assert set(rows) == {"visual.patch_embed.proj", *(f"visual.blocks.{i}" for i in range(len(rows) - 1))}
    assert rows["visual.blocks.0"] == {
        "layer": "visual.blocks.0",
        "module": "Block",
        "default": True,
        "features": 64,
        "feature_dim": -1,
        "vectors_per_image": 101,
    }
    assert rows["visual.patch_embed.proj"]["feature_dim"] == 1


# -- scan ----------------------------------------------------------------------------------------------------------------


def test_scan_prints_and_writes(run, photos, tmp_path):
    (photos / "bad.jpg").write_text("no")
    code, out, err = run("scan", MODEL, "--random-init", "--images", photos, "--output", tmp_path / "out", "--device", "cpu")
    assert code == 0
    for phrase in ("vector kurtosis", "95% interval", "Gaussian features", "ceiling", "bad.jpg", "visual.blocks.0", "(output)", "6 std"):
        assert phrase in out, phrase
    assert out.strip().endswith(str(tmp_path / "out" / "index.html"))
    assert (tmp_path / "out" / "index.html").is_file()
    assert torchprobe.load(tmp_path / "out" / "recording.safetensors")[""].vectors == 5
    assert "random weights" in (tmp_path / "out" / "index.html").read_text()
    assert err.splitlines() == [f"Loading {MODEL} …", "scan: 0 of 6 images"]  # a log: each part at once


def test_scan_as_json_has_nothing_else_on_standard_output(run, photos, tmp_path):
    arguments = ["scan", MODEL, "--random-init", "--images", photos, "--output", tmp_path / "out", "--limit", 3, "--seed", 1, "--json"]
    code, out, _ = run(*arguments)
    assert code == 0
    found = json.loads(out)
    assert found["images"] == {"seen": 3, "found": 3, "unreadable": []}
    assert found["representation"]["vectors"] == 3
    assert found["settings"]["seed"] == 1
    assert set(found["files"]) == {"recording", "layers", "features", "summary", "plot", "page"}
    assert run(*arguments)[0] == 1  # the folder holds a run
    again = json.loads(run(*arguments, "--overwrite")[1])
    assert again["representation"] == found["representation"]


@pytest.mark.usefixtures("undrawn")
def test_scan_with_a_checkpoint(run, photos, tmp_path):
    import timm
    import torch

    torch.save({"state_dict": {f"module.{k}": v for k, v in timm.create_model("test_vit").state_dict().items()}}, tmp_path / "w.ckpt")
    code, out, _ = run("scan", MODEL, "--checkpoint", tmp_path / "w.ckpt", "--images", photos, "--output", tmp_path / "out")
    assert code == 0
    assert "w.ckpt" in out
    torch.save({"head.weight": torch.zeros(2, 2), "blocks.0.norm1.weight": torch.zeros(64)}, tmp_path / "w.ckpt")
    code, _, err = run("scan", MODEL, "--checkpoint", tmp_path / "w.ckpt", "--images", photos, "--output", tmp_path / "out")
    assert code == 1
    assert "missing: cls_token" in err


@pytest.mark.usefixtures("undrawn")
def test_layers_that_cannot_fire_are_a_note_not_a_failure(run, photos, tmp_path):
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}}
    config["text_cfg"] = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "cli-clip.json").write_text(json.dumps(config))
    __import__("open_clip").add_model_config(tmp_path / "cli-clip.json")
    arguments = ["open_clip:cli-clip", "--random-init", "--images", photos, "--output", tmp_path / "out", "--layers", "**.attn.*"]
    code, out, err = run("scan", *arguments, "--layers", "**.resblocks.*")
    assert code == 0
    assert "\nNote: torchprobe: 1 of 3 layers never fired" in err
    assert "Error" not in err
    assert "out_proj" in err
    assert "visual.transformer.resblocks.0" in out


def interrupt_after(monkeypatch, calls, times=1):
    forward = Encoder.forward
    seen = []

    def interrupted(self, images):
        seen.append(len(images))
        if len(seen) == calls:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return forward(self, images)

    monkeypatch.setattr(Encoder, "forward", interrupted)


def test_an_interruption_that_compiled_code_loses_is_one():
    def lose():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    with pytest.raises(KeyboardInterrupt) as found, terminable():
        lose()
    assert isinstance(found.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="of its own"), terminable():
        raise ValueError("an error of its own")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("presses", "seen"), [(1, 2), (2, 1)])
def test_an_interruption_leaves_a_valid_partial_result(run, photos, tmp_path, monkeypatch, presses, seen):
    interrupt_after(monkeypatch, 3, presses)  # the first pass shows how the layers are laid out, and counts for nothing
    before = signal.getsignal(signal.SIGINT)
    arguments = ["scan", MODEL, "--random-init", "--images", photos, "--output", tmp_path / "out", "--batch-size", 1, "--json"]
    code, out, err = run(*arguments)
    assert code == 130
    assert "Interrupted" in err
    found = json.loads(out)
    assert found["partial"] is True
    assert found["images"]["seen"] == seen
    assert torchprobe.load(tmp_path / "out" / "recording.safetensors")[""].vectors == seen
    assert "Partial" in (tmp_path / "out" / "index.html").read_text()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interruption_before_anything_was_seen(run, photos, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 1, 2)
    code, _, err = run("scan", MODEL, "--random-init", "--images", photos, "--output", tmp_path / "out")
    assert code == 130
    assert "nothing was written" in err
    assert not (tmp_path / "out").exists()


# -- dissect -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broden(tmp_path):
    from broden_sets import write_trap_set

    write_trap_set(tmp_path / "broden", images=24)
    return tmp_path / "broden"


def dissecting(broden, out, *more):
    options = ["--layers", "visual.blocks.0", "--layers", "visual.blocks.1", "--broden", broden, "--out", out, "--device", "cpu"]
    return ["dissect", MODEL, "--random-init", *options, "--batch-size", 4, "--pictures", 2, *more]


def test_dissect_prints_and_writes(run, broden, tmp_path):
    assert run(*dissecting(broden, tmp_path / "null", "--shuffle-labels", 1, "--json"))[0] == 0
    code, out, err = run(*dissecting(broden, tmp_path / "out", "--null", tmp_path / "null"))
    assert code == 0
    assert err.startswith(f"Loading {MODEL} …\n") and "Note" not in err and "Error" not in err
    for phrase in ("visual.blocks.0, 64 units", "  null", "detectors", "paper's rule", "encoded"):
        assert phrase in out, phrase
    assert out.strip().endswith(str(tmp_path / "out" / "visual.blocks.1.html"))
    ends = (".csv", "-ap.csv", "-concepts.csv", ".safetensors", ".html")
    files = {f"visual.blocks.{n}{end}" for n in "01" for end in ends}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"summary.json", ".torchprobe"}
    page = (tmp_path / "out" / "visual.blocks.0.html").read_text(encoding="utf-8")
    assert "random weights" in page
    assert "<img" not in page
    assert "No null" not in run(*dissecting(broden, tmp_path / "one", "--rotate"))[1]  # it is one
    code, _, err = run(*dissecting(broden, tmp_path / "out", "--resume"))
    assert code == 1
    assert "nothing to resume" in err
    code, out, _ = run("diff", tmp_path / "out", tmp_path / "null", "--out", tmp_path / "diff")
    assert code == 0 and "shuffle_labels: none and 1." in out and (tmp_path / "diff" / "visual.blocks.1.html").exists()
    code, _, err = run(*dissecting(broden, tmp_path / "out", "--null", broden))
    assert code == 1
    assert "does not hold a finished dissection" in err


@pytest.fixture
def weights(tmp_path):
    from safetensors.torch import save_file

    from torchprobe.encoders import load_encoder

    encoder = load_encoder(MODEL, pretrained=False)
    save_file({key: value.contiguous() for key, value in encoder.visual.state_dict().items()}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_units_are_drawn_on_new_pictures(run, broden, photos, weights, tmp_path, monkeypatch):
    out, picture = tmp_path / "out", photos / "0.png"
    options = ["--layers", "visual.blocks.*", "--broden", broden, "--out", out, "--device", "cpu", "--pictures", 0]
    code, _, err = run("dissect", MODEL, "--checkpoint", weights, *options, "--preprocess", "encoder", "--disk", 0, "--json")
    assert code == 0, err
    metadata = json.loads((out / "summary.json").read_text())["layers"][0]["metadata"]
    assert "Whole" not in metadata["preprocessing"]["transform"]
    code, printed, err = run("dissect", "--segment", picture, "--segment", photos, "--checkpoint", weights, "--out", out, "--device", "cpu")
    assert code == 0, err
    assert "visual.blocks.1: 6 pictures" in printed and printed.strip().endswith(".html")
    assert len([*(out / "segments" / "visual.blocks.0").iterdir()]) == 6
    own = ["--checkpoint", weights, "--out", tmp_path / "own", "--device", "cpu"]
    code, printed, err = run(
        "segment", out / "visual.blocks.0.safetensors", picture, "--model", MODEL, "--unit", 3, "--maps", "--json", *own
    )
    assert code == 0, err
    (layer,) = json.loads(printed)["layers"]
    assert [unit["unit"] for unit in layer["units"]] == [3] and (tmp_path / "own" / layer["pictures"][0]["concepts"]).exists()
    own.append("--overwrite")
    assert run("segment", out, photos, *own, "--layers", "visual.blocks.1", "--concept", layer["units"][0]["label"], "--most", 2)[0] == 0
    (photos / "bad.png").write_bytes(b"no picture")
    code, _, err = run("segment", out, photos, *own)
    assert code == 0 and "bad.png: it is not a picture" in err
    for arguments, message in (
        (["segment", out, photos / "bad.png", *own], "bad.png: it is not a picture"),
        (["segment", out, photos / "none.png", *own], "there is no picture at"),
        (["segment", tmp_path / "none", picture, *own], "there is no dissection at"),
        (["segment", broden, picture, *own], "does not hold a finished dissection"),
        (["segment", out, picture, *own, "--layers", "visual.blocks.7"], "has no layer"),
        (["segment", out, picture, *own, "--concept", "nothing like it"], "has no concept"),
        (["segment", out, picture, *own, "--model", "timm:test_resnet"], ""),
    ):
        code, _, err = run(*arguments)
        assert code == 1 and message in err, (arguments, err)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err = run("segment", out, picture, *own)
    assert code == 130 and "Interrupted: pictures so far are in" in err
    from safetensors.torch import load_file, save_file

    save_file({key: value + 0.01 for key, value in load_file(weights).items()}, weights)
    code, _, err = run("segment", out, picture, *own)
    assert code == 1 and "another network" in err and "weights.safetensors" in err
    for arguments, message in (
        (["segment", out, picture], "--checkpoint"),
        (["segment", out, picture, *own, "--unit", 3], "--unit needs one layer"),
        (["dissect", "--segment", picture, "--broden", broden], "neither --broden"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and message in err, (arguments, err)


def test_dissect_as_json_by_average_precision(run, broden, tmp_path):
    arguments = ["dissect", MODEL, "--random-init", "--layers", "visual.blocks.1", "--broden", broden, "--out", tmp_path / "out"]
    code, out, _ = run(
        *arguments,
        "--score",
        "ap",
        "--limit",
        9,
        "--category",
        "object",
        "--rotate",
        "--pictures",
        0,
        "--pooling",
        "mean",
        "--minimum-area",
        0.1,
        "--positions",
        "all",
        "--memory",
        64,
        "--preprocess",
        "encoder",
        "--disk",
        0.5,
        "--json",
    )
    assert code == 0
    (layer,) = json.loads(out)["layers"]
    assert (layer["metadata"]["pooling"], layer["metadata"]["minimum_area"], layer["metadata"]["positions"]) == ("mean", 0.1, "all")
    assert layer["metadata"]["memory"] == 64 << 20
    assert layer["metadata"]["preprocessing"]["shows"].startswith("a part")
    assert layer["images"] == 9
    assert "detectors" not in layer
    assert layer["metadata"]["score"] == ["ap"]
    assert layer["metadata"]["basis"]
    assert not (tmp_path / "out" / "visual.blocks.1.csv").exists()


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_dissection_goes_on(run, broden, tmp_path, monkeypatch):
    assert run(*dissecting(broden, tmp_path / "whole"))[0] == 0
    with monkeypatch.context() as patch:
        forward, calls = Encoder.forward, []

        def interrupted(self, images):
            calls.append(len(images))
            if len(calls) == 6:  # after the calibration, amid a pass
                raise KeyboardInterrupt
            return forward(self, images)

        patch.setattr(Encoder, "forward", interrupted)
        code, out, err = run(*dissecting(broden, tmp_path / "out"))
    assert code == 130
    assert out == ""
    assert "--resume" in err
    code, _, err = run(*dissecting(broden, tmp_path / "out"))
    assert code == 1
    assert "resume" in err
    assert run(*dissecting(broden, tmp_path / "out", "--resume"))[0] == 0
    for name in ("visual.blocks.0.csv", "visual.blocks.1-ap.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_check_lists_every_problem(run, broden):
    code, out, _ = run("dissect", "--check", "--broden", broden)
    assert code == 0
    *notes, last = out.strip().splitlines()  # the set has rows with nothing but 0
    assert last.startswith("No problem") and re.match(r"Note: index.csv: \d of \d+ rows are left out, since nothing is annotated", notes[0])
    pictures = sorted((broden / "images").rglob("*.jpg"))[:2]
    pictures[0].unlink()
    pictures[1].write_bytes(pictures[1].read_bytes()[:50])
    code, out, _ = run("dissect", "--check", "--broden", broden)
    assert code == 3
    assert all(path.name in out for path in pictures)
    assert out.strip().splitlines()[-1].startswith("2 problems")
    code, out, _ = run("dissect", "--check", "--broden", broden, "--json")
    assert code == 3
    assert len(json.loads(out)) == 2
    index = (broden / "index.csv").read_text(encoding="utf-8").splitlines()
    (broden / "index_sm.csv").write_text("\n".join(index[:1] + index[4:]) + "\n", encoding="utf-8")
    (broden / "index.csv").unlink()
    code, out, err = run("dissect", "--check", "--broden", broden, "--index", "index_sm.csv", "--json")
    assert code in (0, 3) and len(json.loads(out)) < 2 and "index_sm.csv" in err
    assert run("dissect", "--check", "--broden", broden, "--index", "../index.csv")[0] == 1
    code, _, err = run("dissect", "resnet18", "--layers", "x", "--broden", broden, "--index", "index_xl.csv")
    assert code == 1 and "has no index_xl.csv" in err and "there are index_sm.csv" in err


def test_a_log_shows_how_far_a_dissection_is(capsys):
    from torchprobe.cli.progress import stage_bar
    from torchprobe.dissection import Progress

    with stage_bar(every=0) as tell:
        tell(Progress("overlap", 500, 63305, 10.0, 3725.4))
    with stage_bar(quiet=True, every=0) as tell:
        tell(Progress("overlap", 501, 63305, 10.0, None))
    assert capsys.readouterr().err == "overlap: 500 of 63,305 images, about 1:02:05 left\n"


def test_batch_norms_are_recalibrated(broden):
    import torch
    from torch import nn

    from torchprobe.datasets import Broden
    from torchprobe.studies.dissect import recalibrate

    def preprocess(image):
        return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32)).permute(2, 0, 1)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten())
    data = Broden(broden)
    encoder = Encoder(net, features=256, preprocess=preprocess)
    recalibrate(encoder, data, batch_size=len(data), preprocess=preprocess)
    maps = net[0](torch.stack([preprocess(data.image(i)) for i in range(len(data))]))
    torch.testing.assert_close(net[1].running_mean, maps.mean((0, 2, 3)))
    assert net[1].momentum == 0.1
    assert encoder.training


# -- doctor --------------------------------------------------------------------------------------------------------------


def test_doctor_reports_versions_kernels_and_checks(run):
    code, out, _ = run("doctor")
    assert code == 0
    for phrase in ("torchprobe", "torch", "cpu", "cuda", "checks passed"):
        assert phrase in out, phrase
    found = json.loads(run("doctor", "--json")[1])
    assert found["passed"] is True
    assert found["versions"]["torchprobe"] == torchprobe.__version__
    assert all(check["passed"] and check["error"] <= check["tolerance"] for check in found["checks"])


def test_doctor_exits_with_3_when_a_check_fails(run, monkeypatch):
    from torchprobe.ops import selfcheck

    failed = selfcheck.Check("rows", False, float("nan"), 1e-5, "raised RuntimeError")
    monkeypatch.setattr(selfcheck, "run", lambda device="cpu": [failed])
    code, out, _ = run("doctor")
    assert code == 3
    assert "FAILED" in out
    assert "raised RuntimeError" in out
    code, out, _ = run("doctor", "--json")
    assert code == 3
    assert json.loads(out)["passed"] is False


# -- demo, and the process -----------------------------------------------------------------------------------------------


def test_demo_without_its_packages_says_what_to_install(run, monkeypatch, tmp_path):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "foolbox" else found(name, *rest))
    code, _, err = run("demo", "--output", tmp_path / "out")
    assert code == 1
    assert "pip install 'foolbox==3.3.4'" in err


def test_demo_without_its_second_network_says_so_and_goes_on(run, monkeypatch, tmp_path):
    from types import SimpleNamespace

    done = SimpleNamespace(write=lambda folder: {}, summary=lambda: {"random": [2.9]})
    monkeypatch.setattr("torchprobe.studies.demo.demo", lambda progress: done)
    monkeypatch.setattr("torchprobe.studies.demo_dissection.demo_dissection", lambda folder, progress: done)
    monkeypatch.setattr("torchprobe.studies.demo_vit.PACKAGES", {"no_such_module": "no-such-package==1"})
    code, out, err = run("demo", "--output", tmp_path / "out", "--json")
    assert code == 0
    assert "\nThe second network is left out:" in err
    assert "pip install 'no-such-package==1', or pip install 'torchprobe-interp[demo]'" in err
    assert json.loads(out)["outliers"] is None


def test_as_a_process():
    command = [sys.executable, "-m", "torchprobe", "layers", "nonsense:x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])  # click itself takes ascii for UTF-8
def test_a_terminal_that_has_not_every_character(photos, tmp_path, encoding, monkeypatch):
    """Names and dashes are printed as escapes, and the run does not fail for them."""
    import io

    (photos / "0.png").rename(photos / "猫.png")
    (photos / "1.png").write_bytes(b"none")
    (photos / "1.png").rename(photos / "\u202e犬.png")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as caught:
        cli.main(["scan", MODEL, "--random-init", "--images", str(photos), "--out", str(tmp_path / "out"), "--batch-size", "3"])
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    assert caught.value.code == 0, err
    assert ("\\u2026" in err) == (encoding == "latin-1")  # Loading …
    assert "\\u72ac" in out + err and streams["stdout"].errors == "strict"
