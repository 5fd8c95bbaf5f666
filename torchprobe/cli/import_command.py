"""``torchprobe concepts import``: one command for each format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from torchprobe.cli.progress import progress_bar
from torchprobe.cli.tools import (
    check_output,
    console,
    exit_codes,
    json_option,
    print_json,
)
from torchprobe.common.messages import counted
from torchprobe.rendering.tables import plain_table, printable, text

if TYPE_CHECKING:
    from torchprobe.datasets import ImportReport

Command = TypeVar("Command", bound=Callable[..., object])

HELP = (
    "Write a segmentation data set in the format of Broden, for torchprobe dissect --broden. Everything that is dropped, merged or renamed "
    "is counted, printed, and kept in import.json. Images are copied byte by byte unless --size or --image-format says otherwise. The new "
    "folder appears when it is complete; nothing is left after an error."
)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A side, HEIGHTxWIDTH, or a word that stands for None."""

    name = "SIZE"

    def __init__(self, none: str) -> None:
        self.none = none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int] | None:
        if value == self.none or not isinstance(value, str):
            return None if value == self.none else value
        sides = value.lower().split("x")
        if len(sides) > 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) < 1 << 14 for side in sides):
            self.fail(f"{value!r} is not a number of pixels, HEIGHTxWIDTH or {self.none}", param, ctx)
        return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def folder_option(name: str, help: str) -> Callable[[Command], Command]:
    """A folder or file that the command needs."""
    return click.option(f"--{name}", required=True, type=click.Path(path_type=Path), metavar="PATH", help=help)


root_option = folder_option("root", "Folder of the data set.")
images_option = folder_option("images", "Folder of the images.")
category_option = click.option("--category", default="object", show_default=True, metavar="NAME", help="Category of the labels.")
supercategories_option = click.option("--supercategories", is_flag=True, help="Add a category with the supercategories.")
crowd_option = click.option(
    "--crowd", type=click.Choice(["keep", "drop"]), default="keep", show_default=True, help="Regions of iscrowd: labels, or nothing."
)
unlabeled_option = click.option(
    "--unlabeled", type=int, multiple=True, metavar="VALUE", help="Value that means none of the labels; may be repeated."
)
void_option = click.option("--void", type=int, multiple=True, metavar="VALUE", help="Value that means unknown; may be repeated.")
image_suffix_option = click.option("--image-suffix", default="", metavar="TEXT", help="End of the names of images that masks do not have.")
mask_suffix_option = click.option("--mask-suffix", default="", metavar="TEXT", help="End of the names of masks that images do not have.")


def set_options(command: Command) -> Command:
    """The options of :class:`torchprobe.datasets.importers.conversion.SetOptions`."""
    options = (
        click.option("--out", "--output", "out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The new data set."),
        click.option("--size", type=Size("keep"), default="keep", show_default=True, help="Resize images to this side, or HEIGHTxWIDTH."),
        click.option(
            "--segmentation-size", type=Size("half"), default="112", show_default=True, help="Size of label maps; half: of the image."
        ),
        click.option("--image-format", type=click.Choice(["keep", "jpg", "png"]), default="keep", show_default=True),
        click.option("--min-frequency", type=click.IntRange(min=1), default=1, show_default=True, help="Fewest images of a label."),
        click.option("--min-coverage", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Least area, in whole images."),
        click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only N of the images, chosen at random."),
        click.option("--overwrite", is_flag=True, help="Replace the data set in --out."),
        json_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def _run(importer: Callable[..., ImportReport], as_json: bool, *arguments: Any, **options: Any) -> None:
    """Imports and prints what happened; the last of ``arguments`` is the new folder."""
    check_output(arguments[-1])
    with progress_bar("importing") as progress:
        report = importer(*arguments, progress=progress, **options)
    if as_json:
        print_json(report.summary())
        return
    click.echo(f"{counted(report.images, 'image')} with {counted(report.labels, 'label')} in {printable(report.root)}")
    if report.empty:
        click.echo(
            f"{counted(report.empty, 'image')} without any label of a category; they are annotated, so the concepts are absent there"
        )
    for title, remarks in (("dropped", report.dropped), ("changed", report.changed)):
        if remarks:
            table = plain_table(title, "", "why", "such as", right={title})
            for remark in remarks:
                share = f" ({remark.count / report.pixels:.1%})" if remark.what == "pixels" and report.pixels else ""
                table.add_row(f"{remark.count:,}", text(remark.what + share), text(remark.reason), text(", ".join(remark.examples[:2])))
            console().print(table)


def _chosen(values: tuple[int, ...]) -> tuple[int, ...] | None:
    """The values of an option that may be repeated; None without any."""
    return values or None


@click.group("import", epilog=exit_codes(), short_help="Import COCO, ADE20K, Pascal VOC, folders of masks and more.", help=HELP)
def import_() -> None:
    pass


@import_.command(epilog=exit_codes(), short_help="COCO instances: a JSON file and images.")
@folder_option("annotations", "JSON file, such as instances_val2017.json.")
@images_option
@category_option
@supercategories_option
@crowd_option
@set_options
def coco(annotations: Path, images: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Import a data set in the format of COCO instances: polygons and run lengths. Labels that overlap keep all their pixels."""
    from torchprobe.datasets import import_coco

    _run(import_coco, as_json, annotations, images, out, **options)


@import_.command(epilog=exit_codes(), short_help="COCO panoptic: a JSON file, PNG files and images.")
@folder_option("annotations", "JSON file, such as panoptic_val2017.json.")
@folder_option("segments", "Folder of the PNG files.")
@images_option
@category_option
@supercategories_option
@crowd_option
@set_options
def coco_panoptic(annotations: Path, segments: Path, images: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Import a data set in the format of COCO panoptic: the colors of PNG files are the ids of segments."""
    from torchprobe.datasets import import_coco_panoptic

    _run(import_coco_panoptic, as_json, annotations, segments, images, out, **options)


@import_.command(epilog=exit_codes(), short_help="ADE20K: scene parsing, or the full set with parts.")
@root_option
@click.option(
    "--names", type=click.Path(path_type=Path), metavar="FILE", help="Names of the classes, for the full set without .json files."
)
@set_options
def ade20k(root: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Import ADE20K: ADEChallengeData2016 with its 150 classes and scenes, or the full data set (*_seg.png) with parts."""
    from torchprobe.datasets import import_ade20k

    _run(import_ade20k, as_json, root, out, **options)


@import_.command(epilog=exit_codes(), short_help="Pascal VOC: JPEGImages, SegmentationClass, ImageSets.")
@root_option
@click.option("--split", metavar="NAME", help="Only the images of ImageSets/Segmentation/NAME.txt.")
@click.option("--names", type=click.Path(path_type=Path), metavar="FILE", help="Names of the values.  [default: the classes of VOC]")
@category_option
@set_options
def voc(root: Path, out: Path, names: Path | None, as_json: bool, **options: Any) -> None:
    """Import a folder in the style of Pascal VOC. 255 is void: it counts as pixels without a label, and is reported."""
    from torchprobe.datasets import import_voc

    _run(import_voc, as_json, root, out, **options, **({} if names is None else {"names": names}))


@import_.command(epilog=exit_codes(), short_help="Images, each with a mask of class indices.")
@images_option
@folder_option("masks", "Folder of the masks, with the names of the images.")
@folder_option("names", "Names of the values: JSON, or text with a value and a name in each line.")
@click.option("--first-value", type=int, metavar="VALUE", help="Value of the first name, if the names have no values.")
@unlabeled_option
@void_option
@image_suffix_option
@mask_suffix_option
@category_option
@set_options
def label_maps(images: Path, masks: Path, names: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Import images with one mask each, whose values are class indices. By default 0 and 255 are no classes unless they have names."""
    from torchprobe.datasets import import_label_maps

    options |= {key: _chosen(options[key]) for key in ("unlabeled", "void")}
    _run(import_label_maps, as_json, images, masks, names, out, **options)


@import_.command(epilog=exit_codes(), short_help="Images, and a folder of binary masks for each concept.")
@images_option
@folder_option("masks", "Folder with one folder for each concept.")
@image_suffix_option
@mask_suffix_option
@category_option
@set_options
def binary_masks(images: Path, masks: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Import images with binary masks: one folder for each concept, one mask for each image that shows it."""
    from torchprobe.datasets import import_binary_masks

    _run(import_binary_masks, as_json, images, masks, out, **options)


@import_.command(epilog=exit_codes(), short_help="A Hugging Face data set that was saved to disk.")
@folder_option("dataset", "Folder of save_to_disk.")
@folder_option("id2label", "JSON file with the names of the ids.")
@click.option("--split", metavar="NAME", help="Split, if the folder has several.")
@click.option("--image-column", metavar="NAME", help="Column of the images.  [default: the one with a usual name]")
@click.option("--label-column", metavar="NAME", help="Column of the masks.  [default: the one with a usual name]")
@click.option("--reduce-labels", is_flag=True, help="Masks hold id + 1, and 0 for what has no id, as in ADE20K.")
@unlabeled_option
@void_option
@category_option
@set_options
def hugging_face(dataset: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Import a segmentation data set of the datasets library of Hugging Face, which must be installed."""
    from torchprobe.datasets import import_hugging_face

    options |= {key: _chosen(options[key]) for key in ("unlabeled", "void")}
    _run(import_hugging_face, as_json, dataset, out, **options)
