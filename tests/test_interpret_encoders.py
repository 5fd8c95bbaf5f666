"""open_clip's encoders with random weights, from a local checkpoint, and several processes: slow, and end to end."""

from __future__ import annotations

import json
from pathlib import Path

import interpret_sets as sets
import pytest
import torch
from processes import torchrun
from safetensors.torch import save_file
from threads import threads

from torchprobe.datasets import labeled_folder
from torchprobe.encoders import load_encoder
from torchprobe.studies.interpret import interpret
from torchprobe.studies.interpret.inputs import Inputs

pytest.importorskip("open_clip", reason="open_clip is not installed")

pytestmark = pytest.mark.slow("builds CLIP models of full size, and starts torchrun")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("name", "features"), [("RN50", 1024), ("ViT-B-32", 512), ("ViT-B-16", 512), ("ViT-L-14", 768)])
def test_from_a_checkpoint_to_the_page(name: str, features: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = load_encoder(f"open_clip:{name}", pretrained=False)
    weights = {f"visual.{key}": value for key, value in source.visual.state_dict().items()} | dict(source.text.state_dict())  # type: ignore[union-attr]
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "clip.safetensors")
    del source, weights
    images = sets.write_classes(tmp_path / "images", each=3)
    encoder = load_encoder(f"open_clip:{name}", tmp_path / "clip.safetensors")
    subject = Inputs(images, templates=["a photo of a {} thing."]).subject(encoder, "zero-shot")
    found = interpret(encoder, subject.images, tmp_path / "out", head=subject.head, layer_images=3, batch_size=3)
    assert found.results["features"] == features and found.results["accuracy"]["imagenet"]["images"] == 9
    assert found.results["layers"]["images"] == 3 and len(found.results["layers"]["rows"]) > 4
    assert found.results["directions"]["rank"] == 3 and (tmp_path / "out" / "index.html").is_file()
    (tmp_path / "clip.safetensors").unlink()  # 1.7 GB for the largest


def test_ranks_share_the_images(tmp_path: Path) -> None:
    """Two processes under torchrun find what one does."""
    sets.write_classes(tmp_path / "images", each=7)
    sets.write_concepts(tmp_path / "concepts", 25)
    script = tmp_path / "run.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import interpret_sets as sets
from torchprobe.datasets import Broden, labeled_folder
from torchprobe.studies.interpret import interpret
from torchprobe.common.ranks import torchrun

with torchrun():
    model = sets.encoder()
    images = labeled_folder({str(tmp_path / "images")!r}, names=sets.CLASSES)
    broden = Broden({str(tmp_path / "concepts")!r})
    found = interpret(model, images, {str(tmp_path / "two")!r}, head=sets.head(model), broden=broden, batch_size=4)
    assert found.results["accuracy"]["imagenet"]["images"] == 21
"""
    )
    torchrun(2, script)
    from torchprobe.datasets import Broden

    model = sets.encoder()
    images = labeled_folder(tmp_path / "images", names=sets.CLASSES)
    with threads(1):  # as torchrun's processes have; LAPACK, which rotates, gives other last digits with more
        one = interpret(model, images, tmp_path / "one", head=sets.head(model), broden=Broden(tmp_path / "concepts"), batch_size=4)
    assert one.results["accuracy"]["imagenet"]["images"] == 21
    assert json.loads((tmp_path / "two" / "results.json").read_text()) == json.loads((tmp_path / "one" / "results.json").read_text())
