"""Trains a ResNet in CLIP's manner with supervision, from scratch, and watches the kurtosis of every block while it learns.

    python examples/train_supervised.py --digits                # real handwritten digits: no download, a minute
    torchrun --nproc-per-node 8 examples/train_supervised.py --train imagenet/train --test imagenet/val

The recipe of "Interpreting CLIP" for the supervised counterparts of RN50 and RN101: the same "modified" ResNet as in CLIP, attention
pooling included; 90 epochs, batch 1024, AdamW with weight decay 1e-2, learning rate 1e-3 after 5,000 steps of warm-up, 1e-4 from
epoch 30, 1e-5 from epoch 60; horizontal flips, random crops, label smoothing. The loop, with recorder, checkpoints and --resume, is
that of finetune.py.
"""

from __future__ import annotations

import argparse
import functools

import torch
from _training import checked, digits, folders, options_of, processes
from finetune import Classifier, train
from PIL import Image
from torch import nn
from torch.nn import functional
from torchvision import transforms

import torchprobe
from torchprobe.encoders import Encoder, Head


def arguments() -> argparse.Namespace:
    parser = options_of(__doc__, epochs=90, batch=1024, lr=1e-3, warmup=5000, weight_decay=1e-2, output="supervised")
    parser.add_argument("--encoder", default="open_clip:RN50", help="the architecture: open_clip:RN50, open_clip:RN101")
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="0.1 is a choice of ours")
    if parser.parse_known_args()[0].digits:  # 1,500 pictures
        parser.set_defaults(epochs=9, batch=100, lr=3e-3, warmup=15, window=5, save=15)
    return checked(parser)


def learning_rate(step: int, total: int, options: argparse.Namespace) -> float:
    """Of step 1 … total: up in a line; a tenth of it from one third of the epochs on, a hundredth from two thirds on."""
    decayed: float = options.lr * 0.1 ** min(2, 3 * (step - 1) // total)
    return decayed * min(1.0, step / options.warmup)


def main() -> None:
    options = arguments()
    with processes() as process:
        torch.manual_seed(options.seed)
        if options.digits:
            encoder = small_resnet()
            data = digits(32, transforms.RandomCrop(32, padding=2))  # a digit in a mirror is none: no flips
        else:
            encoder = torchprobe.load_encoder(options.encoder, pretrained=False)
            size = encoder.preprocess(Image.new("RGB", (512, 512))).shape[-1]
            crop = transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC)
            augmented = transforms.Compose([crop, transforms.RandomHorizontalFlip(), encoder.preprocess])
            data = folders(options, augmented, encoder.preprocess)
        first = nn.Linear(encoder.features, len(data.names))  # for its initial values
        model = Classifier(encoder, Head(first.weight, first.bias, names=data.names))
        train(
            model,
            data,
            options,
            process,
            learning_rate,
            functools.partial(functional.cross_entropy, label_smoothing=options.label_smoothing),
        )


def small_resnet() -> Encoder:
    """open_clip's ResNet at an eighth of the width, two blocks a stage, for pictures of 32 × 32."""
    from open_clip.modified_resnet import ModifiedResNet

    tower = ModifiedResNet(layers=[2, 2, 2, 2], output_dim=32, heads=4, image_size=32, width=8)
    return Encoder(tower, features=32, preprocess=lambda image: image, name="small modified ResNet")


if __name__ == "__main__":
    main()
