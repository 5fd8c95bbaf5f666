"""Images that show known mixtures of words, a labeler that reads them, and networks with planted units."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchprobe.dissection import SparseBasis, SparseEncoder
from torchprobe.dissection.words import dissect_words

WORDS = ["cat", "dog", "red", "striped", "sea", "tree", "wooden", "car"]
SIDE = 4


def preprocess(image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255


def mixtures(pixels: Tensor) -> Tensor:
    """The weight of each word, from the first pixels; (n, 3, H, W) → (n, words)."""
    return pixels.flatten(2)[:, 0, : len(WORDS)]


def write_images(folder: Path, count: int = 120, seed: int = 0, words: int = len(WORDS)) -> Path:
    """Pictures of 4 × 4 pixels; the red values of the first pixels are the weights of the words."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = generator.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        weights = generator.beta(0.5, 1.5, words)
        pixels[..., 0].reshape(-1)[:words] = np.round(weights * 255)
        Image.fromarray(pixels).save(folder / f"{i:04}.png")
    return folder


class PlantedClip(nn.Module):
    """The embedding of an image is the mixture of the embeddings of its words. Captions are embedded as the last word that they hold."""

    def __init__(self, width: int = 32, noise: float = 0.0, words: list[str] = WORDS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.words, self.noise, self.name = words, noise, "planted CLIP"
        self.directions = nn.Parameter(torch.linalg.qr(torch.randn(width, len(words), generator=generator)).Q.T.contiguous())
        self.preprocess = preprocess
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        found = mixtures(images) @ self.directions
        return found + self.noise * torch.sin(1000 * images.flatten(1)[:, :1] + torch.arange(found.shape[1]))

    def encode_text(self, texts: list[str]) -> Tensor:
        found = [[word for word in self.words if word in text] for text in texts]
        return torch.stack([2.5 * self.directions[self.words.index(words[-1])] for words in found]).detach()


class PlantedUnits(nn.Module):
    """Maps: the first units are functions of a word, on some of their positions; the others are noise."""

    def __init__(self, planted: list[int], others: int = 6) -> None:
        super().__init__()
        self.planted, self.units = planted, len(planted) + others
        self.maps = nn.BatchNorm2d(self.units, affine=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        weights = mixtures(images)
        own = [(weights[:, word] ** (1 + i % 2)) * 10 - 3 for i, word in enumerate(self.planted)]
        noise = [torch.sin(97.3 * (j + 1) * images[:, 1, 0, 0] + 31 * images[:, 2, 1, 1]) for j in range(self.units - len(own))]
        units = torch.stack([*own, *noise], 1)[..., None, None] * torch.tensor([[1.0, 0.5], [0.25, 1.0]])
        return self.pool(self.maps(units * self.weight)).flatten(1)


def dissect_on_rank(folder: Path, out: Path, checkpoint: Path, resume: bool, kill_after: int, rank: int, ranks: int, port: int) -> None:
    """One process, or one of several, with latents as units; saves what it found. ``kill_after``: batches after which it kills itself."""
    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    told = 0

    def tell(progress: object) -> None:
        nonlocal told
        told += 1
        if told == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    basis = SparseBasis(SparseEncoder(torch.eye(12, 10), torch.full((12,), -0.5)))
    found = dissect_words(
        PlantedUnits([3, 0, 5, 7]), "maps", folder, PlantedClip(noise=0.02), WORDS, templates=["{}"], permutations=9, preprocess=preprocess,
        batch_size=7, basis=basis, checkpoint=checkpoint, checkpoint_every=0.0, resume=resume, progress=tell,
    )["maps"]  # fmt: skip
    found.save(out / f"{rank}.safetensors")
