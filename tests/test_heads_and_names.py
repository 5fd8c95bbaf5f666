"""Heads that do not fit the class folders, from folders to a subject."""

import interpret_sets as sets
import pytest
import torch
from torch import nn

from torchprobe.datasets import DatasetError
from torchprobe.encoders import Head
from torchprobe.studies.interpret import interpret
from torchprobe.studies.interpret.inputs import Inputs


@pytest.fixture
def images(tmp_path):
    return sets.write_classes(tmp_path / "images", each=4)


def test_without_a_fitting_head_the_images_alone_are_interpreted(images):
    encoder = sets.encoder()
    encoder.head = Head(torch.randn(len(sets.CLASSES) + 4, encoder.features))
    with pytest.warns(UserWarning, match="the trained head is left out.*rows without names"):
        subject = Inputs(images).subject(encoder, "auto")
    assert subject.head is None and len(subject.images) == 4 * len(sets.CLASSES)
    with pytest.raises(DatasetError, match="rows without names"):
        Inputs(images).subject(encoder, "own")


@pytest.mark.usefixtures("undrawn")
def test_a_linear_layer_is_a_head(images, tmp_path):
    encoder = sets.encoder()
    subject = Inputs(images).subject(encoder, "none")
    layer = nn.Linear(encoder.features, len(sets.CLASSES))
    found = interpret(encoder, subject.images, tmp_path / "out", head=layer, layer_images=0)
    assert found.results["accuracy"]["imagenet"]["images"] == 4 * len(sets.CLASSES)
