"""What single modules say of their output: how wide it is, and which of its dimensions that width is along."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

_MAPS = {  # exact type → spatial dimensions of its output; the channels come before them
    getattr(nn, f"{kind}{n}d"): n
    for n in (1, 2, 3)
    for kind in ("Conv", "ConvTranspose", "MaxPool", "AvgPool", "LPPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "InstanceNorm")
}
_MAPS |= {nn.PixelShuffle: 2, nn.PixelUnshuffle: 2}
_SECOND = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm)
_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag, nn.RNN, nn.LSTM, nn.GRU)
_FAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they do not call their children when no hook is on them

_ELEMENTWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
_WIDTHS = ("out_features", "out_channels", "num_features", "nf", "normalized_shape", "embedding_dim", "embed_dim", "num_channels")
_VAGUE = ("hidden_size", "d_model", "dim", "channels", "width", "features")  # names that are also used for other things
_INPUT_WIDTHS = ("in_features", "in_channels", "num_features", "nx", "normalized_shape", "embed_dim", "num_channels", "input_size")


def is_leaf(module: nn.Module) -> bool:
    """Whether a module says something of its output: it has a known type, or parameters and no children."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, _FAST) or leaf_type(module) in _MAPS:
        return True
    return not _children(module) and any(True for _ in own_widths(module))


def is_bare(module: nn.Module) -> bool:
    """Whether a module has neither parameters nor children, such as an activation function, and is not a pooling."""
    return not _children(module) and not is_leaf(module)


def keeps_layout(module: nn.Module) -> bool:
    """Whether a module is known to give each number at the place of one that it takes: activation functions, dropout, ``nn.Identity``."""
    known = type(module).__module__ in _ELEMENTWISE and not isinstance(module, nn.GLU)
    return (is_bare(module) and known) or type(module) is nn.Identity


def hides_children(module: nn.Module) -> bool:
    """Whether hooks on the children of a module would change how it computes."""
    return isinstance(module, _FAST)


def _children(module: nn.Module) -> bool:
    if hasattr(module, "parametrizations"):
        return any(name != "parametrizations" for name in module._modules)
    return any(child is not None for child in module._modules.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in chain(module._parameters.values(), module._buffers.values()) if tensor is not None and tensor.dim() > 0)


def leaf_type(module: nn.Module) -> type[nn.Module]:
    """The class in the source code. FSDP2 and parametrizations replace it by a subclass at run time."""
    kind = type(module)
    swapped = hasattr(module, "parametrizations") or any(base.__name__ == "FSDPModule" for base in kind.__mro__)
    if not swapped:
        return kind
    return next(base for base in kind.__mro__[1:] if base.__name__ != "FSDPModule")


def width(module: nn.Module) -> int | None:
    """The number of features that a module of a known kind gives; None if it does not say."""
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    if isinstance(module, nn.TransformerEncoderLayer):
        return int(module.self_attn.embed_dim)
    return next(_numbers(module, _WIDTHS), None)


def input_width(module: nn.Module) -> int | None:
    """The number of features that a module of a known kind takes."""
    return next(_numbers(module, _INPUT_WIDTHS), None)


def _numbers(module: nn.Module, names: tuple[str, ...]) -> Iterator[int]:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value


def typed_dim(module: nn.Module, dims: int) -> int | None:
    """The dimension of the features by the type of a module, ≥ 0, for an activation (or input) of ``dims`` dimensions.

    Convolutions, poolings and instance norms: the one before the spatial dimensions, which is 0 without a batch. Batch and group norms: 1.
    Linear layers, layer norms over one dimension, attention, embeddings and recurrent layers: the last. Subclasses of convolutions, batch
    norms and linear layers follow their base; other subclasses may mean another dimension.
    """
    kind = leaf_type(module)
    if kind in _MAPS or isinstance(module, _ConvNd):
        spatial = _MAPS[kind] if kind in _MAPS else len(module.kernel_size)  # type: ignore[arg-type]
        return dims - 1 - spatial if dims > spatial else None
    if isinstance(module, (_BatchNorm, nn.GroupNorm)):
        return 1 if dims > 1 else None
    if kind in (nn.LayerNorm, nn.RMSNorm) and len(module.normalized_shape) != 1:  # type: ignore[arg-type]
        return None
    if kind in _LAST or isinstance(module, (nn.Linear, nn.Embedding, nn.TransformerEncoderLayer)):
        return dims - 1 if dims else None
    if kind is nn.GLU:  # it takes two halves along this dimension
        return int(module.dim) % dims if dims else None  # type: ignore[arg-type]
    if inputs_first(module):
        return dims - 1 if dims else None
    if kind is nn.Flatten and dims == 2:
        return 1
    return None


def inputs_first(module: nn.Module) -> bool:
    """Whether it is the ``Conv1D`` of transformers, which GPT-2 has: a linear layer whose weight is (inputs, outputs).

    >>> inputs_first(nn.Linear(2, 3))
    False
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def leaf_dims(module: nn.Module, shape: tuple[int, ...]) -> list[int]:
    """The dimensions of the output that may hold the features of a leaf, by what it says itself: one if it is sure, none if it says
    nothing.

    A size of 0 in ``shape`` is unknown.
    """
    dims = len(shape)
    dim, own = typed_dim(module, dims), width(module)
    if dim is not None and (own is None or shape[dim] in (0, own)):
        return [dim]
    for tensor in _tensors(module):  # such as a scale (1, C, 1, 1)
        long = [index for index, size in enumerate(tensor.shape) if size > 1]
        if tensor.dim() == dims > 2 and len(long) == 1 and shape[long[0]] == tensor.shape[long[0]]:
            return long
    for sizes in own_widths(module):
        fits = [index for index in range(1, dims) if shape[index] in sizes]
        if fits:
            return fits if len(fits) == 1 else _by_name(module, fits, dims)
    return []


def own_widths(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Sizes that may be the width of the output, those that say it best first."""
    if (own := width(module)) is not None:
        yield (own,)
    # One buffer alone, such as the kernel of a fixed filter, says nothing of the width; those of a frozen batch norm do.
    found = [tuple(size for size in tensor.shape if size > 1) for tensor in _tensors(module)]
    trained = any(parameter is not None for parameter in module._parameters.values())
    yield from (long for long in found if len(long) == 1 and (trained or found.count(long) > 1))
    if isinstance(weight := module._parameters.get("weight"), Tensor) and weight.dim() > 1:
        yield tuple({*weight.shape[:2]} - {1})
    if any(True for _ in _tensors(module)):
        yield from ((size,) for size in _numbers(module, _VAGUE) if size > 1)


def declared_features(module: nn.Module) -> int | None:
    """The length of the vectors that a whole model gives, if it says so, as :class:`torchprobe.encoders.Encoder` does."""
    features = module.__dict__.get("features")
    return features if isinstance(features, int) and not isinstance(features, bool) else None


def _by_name(module: nn.Module, fits: list[int], dims: int) -> list[int]:
    """A class for maps, such as ``LayerNorm2d``, has its channels before the map. ``Conv1D`` of transformers is a linear layer."""
    spatial = {"1d": 1, "2d": 2, "3d": 3}.get(type(module).__name__[-2:])
    if spatial is not None and dims - 1 - spatial in fits:
        return [dims - 1 - spatial]
    own_forward = type(module).forward not in (nn.LayerNorm.forward, nn.RMSNorm.forward)  # it may transpose
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and not own_forward and spatial is None and dims <= 3 and dims - 1 in fits:
        return [dims - 1]
    return fits
