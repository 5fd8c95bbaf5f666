"""One small model of every family of torchvision: classification, segmentation, detection, video, optical flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .case import Built, Case, Inputs, randn

SIZES = ((64, 64), (96, 128), (256, 256))

CLASSIFICATION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf
regnet_y_400mf resnet18 resnet50 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11_bn
""".split()  # noqa: SIM905 - shorter
SEGMENTATION = ["deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"]
DETECTION = ["fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"]
DETECTION += ["retinanet_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large"]
VIDEO = ["mc3_18", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t"]

Make = Callable[[int], Built]


def cases() -> Iterator[Case]:
    for name in CLASSIFICATION:
        yield Case("torchvision", name, _images(name, SIZES))
    yield Case("torchvision", "inception_v3", _images("inception_v3", ((96, 96), (128, 160)), init_weights=False))
    yield Case("torchvision", "maxvit_t", _maxvit)
    yield Case("torchvision", "vit", _vit)
    for name in SEGMENTATION:
        yield Case("torchvision", name, _images(name, SIZES, weights_backbone=None))
    for name in DETECTION:
        yield Case("torchvision", name, _detection(name))
    for name in VIDEO:
        yield Case("torchvision", name, _video(name))
    yield Case("torchvision", "mvit", _mvit)
    yield Case("torchvision", "raft_small", _flow)


def _model(name: str, **arguments: Any) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
    if name.startswith(("vgg", "alexnet")):  # a hundred million weights of no interest
        for i, layer in enumerate(model.classifier):
            if isinstance(layer, nn.Linear):
                first = all(not isinstance(before, nn.Linear) for before in model.classifier[:i])
                model.classifier[i] = nn.Linear(layer.in_features if first else 48, 48)
    return model


def _tensors(shape: tuple[int, ...]) -> Callable[[int], Inputs]:
    return lambda batch: ((randn(batch, *shape),), {})


def _images(name: str, sizes: tuple[tuple[int, int], ...], **arguments: Any) -> Make:
    def make(geometry: int) -> Built:
        return Built(_model(name, **arguments), _tensors((3, *sizes[geometry])))

    return make


def _maxvit(geometry: int) -> Built:
    from torchvision.models.maxvit import MaxVit

    size = SIZES[geometry] if geometry == 0 else (128, 128)
    widths = {"stem_channels": 16, "block_channels": [16, 32], "block_layers": [2, 2], "head_dim": 8, "stochastic_depth_prob": 0.1}
    return Built(MaxVit(input_size=size, partition_size=4, **widths), _tensors((3, *size)))


def _vit(geometry: int) -> Built:
    from torchvision.models import VisionTransformer

    size = (64, 96)[geometry]
    return Built(VisionTransformer(size, 16, num_layers=3, num_heads=4, hidden_dim=96, mlp_dim=160), _tensors((3, size, size)))


def _detection(name: str) -> Make:
    def make(geometry: int) -> Built:
        small: dict[str, int] = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 96}
        if "rcnn" in name:
            small.update(rpn_post_nms_top_n_test=10, box_detections_per_img=5)
        model = _model(name, weights_backbone=None, num_classes=4, **small)
        height, width = SIZES[geometry]

        def inputs(batch: int) -> Inputs:
            return ([randn(3, height, width, seed=i).sigmoid() for i in range(batch)],), {}

        return Built(model, inputs, trains=False)

    return make


def _video(name: str) -> Make:
    def make(geometry: int) -> Built:
        frames, (height, width) = (4, 8)[geometry], ((32, 32), (64, 96))[geometry]
        model = _model(name)
        if name == "s3d":
            frames *= 2
            model.avgpool = nn.AdaptiveAvgPool3d(1)  # its own needs 224 × 224
        return Built(model, _tensors((3, frames, height, width)))

    return make


def _mvit(geometry: int) -> Built:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    wide = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_kv": [1, 2, 2]}
    blocks = [
        MSBlockConfig(num_heads=1, input_channels=24, output_channels=24, stride_q=[1, 1, 1], **wide),
        MSBlockConfig(num_heads=1, input_channels=24, output_channels=48, stride_q=[1, 1, 1], **wide),
        MSBlockConfig(num_heads=2, input_channels=48, output_channels=48, stride_q=[1, 2, 2], **wide),
    ]
    size, frames = ((32, 32), (64, 96))[geometry], (4, 8)[geometry]
    model = MViT(size, frames, blocks, residual_pool=False, residual_with_cls_embed=True, rel_pos_embed=False, proj_after_attn=False)
    return Built(model, _tensors((3, frames, *size)))


def _flow(geometry: int) -> Built:
    height, width = ((128, 128), (128, 192))[geometry]

    def inputs(batch: int) -> Inputs:
        return (randn(batch, 3, height, width), randn(batch, 3, height, width, seed=1)), {"num_flow_updates": 3}

    return Built(_model("raft_small"), inputs)
