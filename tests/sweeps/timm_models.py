"""One model of every family of timm, the smallest, and some more where a family holds several kinds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .case import ADVERSARIAL, Built, CannotBuild, Case, randn

SMALLEST = """
beit:beit_base_patch16_224 byoanet:halonet_h1 byobnet:test_byobnet cait:cait_xxs24_224 coat:coat_tiny convit:convit_tiny
convmixer:convmixer_768_32 convnext:test_convnext cpubone:cpubone_nano crossvit:crossvit_tiny_240 csatv2 cspnet:cs3darknet_focus_s
cspnext:cspnext_tiny davit:davit_tiny deepseek_vit:deepseek_vit_412m deit:deit_tiny_patch16_224 densenet:densenet121 dla:dla46x_c
dpn:dpn48b edgenext:edgenext_xx_small efficientformer:efficientformer_l1 efficientformer_v2:efficientformerv2_s0
efficientnet:test_efficientnet efficientvim:efficientvim_m1 efficientvit_mit:efficientvit_b0 efficientvit_msra:efficientvit_m0
eva:vit_tiny_patch16_dinov3_qkvb fasternet:fasternet_t0 fastvit:fastvit_t8 focalnet:focalnet_tiny_srf gcvit:gcvit_xxtiny
gemma4_vit:gemma4_vit_167m ghostnet:ghostnet_050 hardcorenas:hardcorenas_b hgnet:hgnetv2_b0 hiera:hiera_tiny_224
hieradet_sam2:sam2_hiera_tiny hrnet:hrnet_w18_small iformer:iformer_t inception_next:inception_next_atto inception_resnet_v2 inception_v3
inception_v4 lcnetv2:lcnetv2_small levit:levit_128s lowformer:lowformer_b0 mambaout:test_mambaout maxxvit:test_coatnet
metaformer:poolformerv2_s12 mlp_mixer:gmlp_ti16_224 mobilenetv3:mobilenetv3_small_050 mobilenetv5:mobilenetv5_base mobilevit:mobilevit_xxs
mvitv2:mvitv2_tiny naflexvit:naflexvit_base_patch16_parfac_gap nasnet:nasnetalarge nest:nest_tiny nextvit:nextvit_small nfnet:test_nfnet
pit:pit_ti_224 pnasnet:pnasnet5large pvt_v2:pvt_v2_b0 qwen3_vit:qwen3_vit_88m rdnet:rdnet_tiny regnet:regnetx_002 repghost:repghostnet_050
repvit:repvit_m1 res2net:res2next50 resnest:resnest14d resnet:test_resnet resnetv2:resnetv2_18 rexnet:rexnet_100 selecsls:selecsls42
senet:legacy_seresnet18 sequencer:sequencer2d_s shvit:shvit_s1 sknet:skresnet18 starnet:starnet_s050 swiftformer:swiftformer_xs
swin_transformer:swin_tiny_patch4_window7_224 swin_transformer_v2:swinv2_tiny_window8_256 swin_transformer_v2_cr:swinv2_cr_tiny_224
tiny_vit:tiny_vit_5m_224 tnt:tnt_s_legacy_patch16_224 tresnet:tresnet_m twins:twins_svt_small vgg:vgg11 visformer:visformer_tiny
vision_transformer:test_vit vision_transformer_hybrid:vit_tiny_r_s16_p8_224 vision_transformer_relpos:test_vit_relpos
vision_transformer_sam:samvit_base_patch16_224 vitamin:vitamin_small_224 volo:volo_d1_224 vovnet:ese_vovnet19b_slim_dw
xception:legacy_xception xception_aligned:xception41p xcit:xcit_nano_12_p8_224
"""
"""The smallest model of each module of timm 1.0; for other modules it is found by :func:`smallest`."""

MORE = """
test_maxvit test_convnext2 test_convnext3 test_efficientnet_evos test_efficientnet_gn test_efficientnet_ln test_vit2 test_vit3 test_vit4
convformer_s18 poolformer_s12 resmlp_12_224 mixer_s32_224 lambda_resnet26t eca_botnext26ts_256 twins_pcpvt_small
deit_tiny_distilled_patch16_224 convnext_zepto_rms crossvit_9_240 mobilenetv4_conv_small_035 mobilevitv2_050 convit_small
"""

FIXED_SIZE = set(
    """
    beit cait coat convit deit efficientformer_v2 gcvit hiera levit maxxvit mlp_mixer nest pit swin_transformer swin_transformer_v2
    swin_transformer_v2_cr tnt visformer vision_transformer_hybrid vision_transformer_relpos vitamin volo test_vit3
    """.split()  # noqa: SIM905 - shorter
)
"""Modules and models that are built for one size of images."""

SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "byoanet": ((256, 256), (256, 256)),
    "convit": ((64, 64), (96, 96)),
    "deepseek_vit": ((224, 224), (448, 672)),
    "efficientformer": ((224, 224), (224, 224)),
    "inception_resnet_v2": ((96, 96), (128, 160)),
    "inception_v3": ((96, 96), (128, 160)),
    "inception_v4": ((96, 96), (128, 160)),
    "nest": ((64, 64), (96, 96)),
    "test_vit3": ((160, 160), (128, 192)),
}
USUAL_SIZES = ((64, 64), (96, 128))

_THIN = {"depth": 3, "embed_dim": 96, "num_heads": 4}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "beit": _THIN,
    "deepseek_vit": _THIN,
    "gemma4_vit": _THIN,
    "naflexvit": _THIN,
    "qwen3_vit": _THIN,
    "vgg": {"mlp_ratio": 0.02},
    "vision_transformer_sam": _THIN,
}
"""For families without a small model."""


def cases() -> Iterator[Case]:
    import timm

    known = dict(word.split(":") if ":" in word else (word, word) for word in SMALLEST.split())
    for module in timm.list_modules():
        yield _case(module, known.get(module))
    for name in MORE.split():
        yield _case(timm.models._registry._model_to_module[name], name) if timm.is_model(name) else _missing(name)


def _missing(name: str) -> Case:
    def make(geometry: int) -> Built:
        raise CannotBuild("this version of timm does not have it")

    return Case("timm", name, make)


def _case(module: str, name: str | None) -> Case:
    return Case("timm", f"{module}/{name or 'smallest'}", lambda geometry: build(module, name or smallest(module), geometry))


def build(module: str, name: str, geometry: int) -> Built:
    import timm

    arguments = dict(ARGUMENTS.get(module, {}))
    sizes = SIZES.get(name, SIZES.get(module, USUAL_SIZES))
    size = coinciding(module, name, arguments) if geometry == ADVERSARIAL else sizes[geometry]
    if FIXED_SIZE & {module, name}:
        arguments["img_size"] = size
    model = timm.create_model(name, pretrained=False, **arguments)
    channels = model.pretrained_cfg.get("input_size", (3,))[0]
    return Built(model, lambda batch: ((randn(batch, channels, *size),), {}), f"{name}, images of {size[0]} × {size[1]}")


def coinciding(module: str, name: str, arguments: dict[str, Any]) -> tuple[int, int]:
    """An image for which a stage is as high and wide as it has channels, or for which there are as many tokens as features."""
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **arguments)
    if sum(p.numel() for p in model.parameters()) > 15_000_000:
        raise CannotBuild("large")
    info = getattr(model, "feature_info", None)
    stages = [(stage["reduction"], stage["num_chs"]) for stage in (info if isinstance(info, (list, tuple)) else getattr(info, "info", []))]
    if len(stages) > 1 and len(set(stages)) == 1:  # tokens of one width, as many as ...
        reduction, channels = stages[0]
        sides = [reduction * math.isqrt(channels)] if math.isqrt(channels) ** 2 == channels else []
        if module == "vision_transformer":
            arguments.update(class_token=False, global_pool="avg")
    else:
        sides = [reduction * channels for reduction, channels in stages]
    for side in sides:
        if 32 <= side <= 384 and side % 32 == 0:
            return side, side
    raise CannotBuild("no small image makes sizes coincide")


def smallest(module: str) -> str:
    """The model of a module with the fewest parameters; takes seconds."""
    import timm
    import torch

    found: list[tuple[int, str]] = []
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        found.append((sum(p.numel() for p in model.parameters()), name))
    if not found:
        raise CannotBuild("this module of timm has no models")
    return min(found)[1]
