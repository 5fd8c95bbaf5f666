"""The standard models themselves, one by one: the cloud around the published lines.

``standard_models.csv`` holds the accuracies, in percent, of the 85 models of the ImageNet testbed (Taori et al. 2020,
https://github.com/modestyachts/imagenet-testbed) that :data:`torchprobe.analysis.FITS` were fitted to.
"""

from __future__ import annotations

import functools
from pathlib import Path

from torchprobe.analysis.baseline import FITS, Baseline, Fit


@functools.cache
def standard_models() -> Baseline:
    """The models of the published fits, as a baseline.

    >>> models = standard_models()
    >>> len(models.models), models.fit("imagenet_v2").n
    (85, 85)
    """
    return Baseline.from_csv(Path(__file__).with_name("standard_models.csv"), minimum=55)


def cloud(fit: Fit) -> list[tuple[float, float]] | None:
    """The models of a published fit: ImageNet accuracy and accuracy under the shift, percent. None if the fit is not a published one.

    >>> from torchprobe.analysis import FITS
    >>> len(cloud(FITS["imagenet_r", "full"]))
    80
    """
    published = FITS.get((fit.shift, fit.imagenet_classes))
    same = published is not None and (fit.slope, fit.intercept, fit.n) == (published.slope, published.intercept, published.n)
    return standard_models().points(fit.shift, fit.imagenet_classes) if same else None
