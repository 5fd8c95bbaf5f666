"""Trains CLIP's ResNet from scratch with supervision, and records the kurtosis of every block meanwhile.

    python examples/train_supervised.py --digits                # real handwritten digits: no download, a minute
    torchrun --nproc-per-node 8 examples/train_supervised.py --train imagenet/train --test imagenet/val

This is the recipe of "Interpreting CLIP" for the supervised counterparts of RN50 and RN101. The network is the "modified" ResNet of CLIP,
with attention pooling. It is trained for 90 epochs with AdamW, batch 1024, weight decay 1e-2, and label smoothing. The learning rate is
1e-3 after 5,000 steps of warm-up, 1e-4 from epoch 30, and 1e-5 from epoch 60. Images are randomly cropped and flipped. finetune.py has the
loop, with recorder, checkpoints and --resume.
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
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="we chose 0.1; the paper gives no value")
    if parser.parse_known_args()[0].digits:  # 1,500 pictures
        parser.set_defaults(epochs=9, batch=100, lr=3e-3, warmup=15, window=5, save=15)
    return checked(parser)


def learning_rate(step: int, total: int, options: argparse.Namespace) -> float:
    """The rate of step 1 … total: a linear warm-up; divided by 10 after a third of the epochs, by 100 after two thirds."""
    decayed: float = options.lr * 0.1 ** min(2, 3 * (step - 1) // total)
    return decayed * min(1.0, step / options.warmup)


def main() -> None:
    options = arguments()
    with processes() as process:
        torch.manual_seed(options.seed)
        if options.digits:
            encoder = small_resnet()
            data = digits(32, transforms.RandomCrop(32, padding=2))  # a mirrored digit is not a digit, so no flips
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
    """open_clip's ResNet with an eighth of the width and two blocks per stage, for pictures of 32 × 32."""
    from open_clip.modified_resnet import ModifiedResNet

    tower = ModifiedResNet(layers=[2, 2, 2, 2], output_dim=32, heads=4, image_size=32, width=8)
    return Encoder(tower, features=32, preprocess=lambda image: image, name="small modified ResNet")


if __name__ == "__main__":
    main()
