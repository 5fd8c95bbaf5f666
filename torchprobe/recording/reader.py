"""Reads layers: one forward pass gives the activation of every layer, and its dimensions of the images and of the features."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.recording.axes import Axis, second_shape
from torchprobe.recording.layers import Layer
from torchprobe.recording.structure import first_tensor, writes
from torchprobe.recording.trail import Trail


class Layout(NamedTuple):
    """How an activation is laid out: its number of dimensions, which of them holds the images, and which the features; all ≥ 0."""

    dims: int
    batch_dim: int
    feature_dim: int

    def images_first(self, x: Tensor) -> Tensor:
        """``x`` as (images, features, positions…), a view; the positions stay in their order.

        >>> Layout(3, batch_dim=1, feature_dim=2).images_first(torch.zeros(50, 8, 768)).shape
        torch.Size([8, 768, 50])
        """
        return x.movedim((self.batch_dim, self.feature_dim), (0, 1))


Visit = Callable[[Layer, Tensor, Layout], object]
"""Called with a layer, its activation (detached) and the layout of that activation."""


class LayerReader:
    """Forward hooks on some layers of a model, removed when the block ends. In the block the model is in eval mode, without gradients, and
    runs eagerly even if it is compiled.

    Other forward passes of the same modules are ignored.

    Args:
        model: any module.
        layers: layers of it, from :func:`torchprobe.recording.select_layers`.
        features: whether the dimension of the features matters. If not, it is the last one where nothing decides.

    Attributes:
        layers: name → layer, in the order given.
        fired: the names in the order in which the layers run; known after the first pass.

    Raises:
        ValueError: a layer that takes no hooks.

    >>> from torchprobe.recording import select_layers
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    >>> with LayerReader(model, select_layers(model, "*")) as reader:
    ...     found = reader.activations(torch.zeros(2, 3, 8, 8))
    >>> {name: tuple(x.shape) for name, (x, layout) in found.items()}
    {'0': (2, 4, 8, 8), '1': (2, 4, 8, 8)}
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer], features: bool = True) -> None:
        self.model = model
        self._features = features
        self.layers = {layer.name: layer for layer in layers}
        if scripted := [name for name, layer in self.layers.items() if isinstance(layer.module, torch.jit.ScriptModule)]:
            raise ValueError(f"layer {scripted[0]!r} is a scripted module, which takes no hooks: give the model before torch.jit.script")
        self.fired: list[str] = []
        self._batch_dim: dict[str, int] = {}
        self._trail = Trail(model)
        self._axes: dict[tuple[str, int], tuple[Axis, tuple[int, ...]]] = {}  # layer and number of dimensions → axis and first shape
        self._unclear = False
        self._overwritten: set[str] = set()  # layers whose activation is written to by what follows
        self._writes_images: bool | None = None  # whether the model writes into its input; None: unknown
        self._images = 0  # in the running forward pass
        self._see: Callable[[Layer, Tensor], object] | None = None  # None: the running forward pass is not ours
        self._called: dict[str, bool] = {}  # layer that ran → whether it gave a tensor
        self._stack = ExitStack()

    def __enter__(self) -> LayerReader:
        with ExitStack() as stack:
            self._trail.open()
            stack.callback(self._trail.close)
            for layer in self.layers.values():
                stack.callback(layer.module.register_forward_hook(partial(self._hook, layer)).remove)
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(torch.no_grad())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def device(self) -> torch.device:
        """Where the inputs belong."""
        return device_of(self.model)

    def read(self, images: Tensor, visit: Visit) -> None:
        """One forward pass; ``visit`` is called inside the hooks, before anything that follows can overwrite the activation.

        A layer that runs several times in a pass is visited several times. In the first pass the dimension of the images may be unclear,
        for example if there are as many tokens as images. Then one image is run alone. If that changes the answer, the pass is repeated.

        Raises:
            ValueError: a layer did not run, did not give a tensor, or gave a tensor without a dimension for the images.
        """

        def see(layer: Layer, x: Tensor) -> None:
            visit(layer, x, self._layout(layer, x))

        first = not self.fired
        self._forward(images, see)
        if first and self._unclear and len(images) > 1:
            before = dict(self._batch_dim)
            self._forward(images[:1], self._look_again)
            if self._batch_dim != before:
                self._forward(images, see)

    def activations(self, images: Tensor) -> dict[str, tuple[Tensor, Layout]]:
        """One forward pass: the activation of each layer with its layout, in the order of :attr:`layers`.

        For a layer that runs several times this is the activation of its last call, as the layer gave it. It is copied only if something
        after the layer overwrites it in place, such as ``nn.ReLU(inplace=True)`` or ``+=``. The first pass that shows this is repeated. In
        the very first pass values are compared too, since what writes through ``.data`` or NumPy is not counted as a write.

        Raises:
            ValueError: see :meth:`read`.
        """
        found: dict[str, tuple[Tensor, Layout, int | None]] = {}
        given: dict[str, Tensor] | None = None if self.fired else {}

        def keep(layer: Layer, x: Tensor, layout: Layout) -> None:
            copy = layer.name in self._overwritten or writes(x) is None
            found[layer.name] = (x.clone(), layout, None) if copy else (x, layout, writes(x))
            if given is not None and not copy:
                given[layer.name] = x.clone()

        self.read(images, keep)
        late = {name for name, (x, _, before) in found.items() if before is not None and writes(x) != before}
        late |= {name for name, x in (given or {}).items() if not torch.equal(x, found[name][0])}  # nan: copied, which does no harm
        given = None
        if late:
            self._overwritten |= late
            self.read(images, keep)
        return {name: found[name][:2] for name in self.layers}

    def prepare(self, images: Tensor) -> dict[str, str]:
        """Finds out from a few images how the layers are laid out, and gives up the layers that cannot be read.

        Returns:
            The names of these layers, each with the reason.

        >>> from torchprobe.recording import select_layers
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(0))
        >>> with LayerReader(model, select_layers(model, "*")) as reader:
        ...     print(list(reader.prepare(torch.zeros(2, 3, 8, 8))), list(reader.layers))
        ['1'] ['0']
        """
        problems: dict[str, str] = {}

        def see(layer: Layer, x: Tensor) -> None:
            try:
                self._layout(layer, x)
            except ValueError as error:
                problems.setdefault(layer.name, str(error))

        self._run(images, see)
        problems = self._silent() | problems
        self.layers = {name: layer for name, layer in self.layers.items() if name not in problems}
        self.fired = [name for name in self._called if name in self.layers]
        if self._unclear and len(images) > 1:
            self._run(images[:1], self._look_again)
        return problems

    @contextlib.contextmanager
    def following(self, images: int, visit: Visit) -> Iterator[dict[str, str]]:
        """During the block, one forward pass that somebody else runs is read as by :meth:`read`; see :meth:`prepare` for what comes before.

        Args:
            images: the number of images in that pass.
            visit: called inside the hooks.

        Yields:
            The layers that could not be read, each with the reason: filled in the block. They never end the pass.
        """
        problems: dict[str, str] = {}

        def see(layer: Layer, x: Tensor) -> None:
            try:
                visit(layer, x, self._layout(layer, x))
            except ValueError as error:
                problems.setdefault(layer.name, str(error))

        self._images, self._see, self._called = images, see, {}
        try:
            yield problems
            for name, problem in self._silent().items():
                problems.setdefault(name, problem)
        finally:
            self._see = None

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _forward(self, images: Tensor, see: Callable[[Layer, Tensor], object]) -> None:
        self._run(images, see)
        for problem in self._silent().values():
            raise ValueError(problem)
        self.fired = self.fired or list(self._called)

    def _run(self, images: Tensor, see: Callable[[Layer, Tensor], object]) -> None:
        self._images, self._see, self._called = len(images), see, {}
        given = as_input(images, self.model)
        # A pass may be repeated, so the model must not write into the images. The first pass shows whether it does.
        inputs = given if self._writes_images is False else given.clone()
        try:
            self.model(inputs)
        except RuntimeError as error:
            if inputs.is_floating_point() or all(not p.is_floating_point() for p in self.model.parameters()):
                raise
            raise TypeError(f"{type(self.model).__name__} does not take images of {inputs.dtype} ({error}): make them float") from error
        finally:
            self._see = None
        if self._writes_images is None:
            self._writes_images = not torch.equal(inputs, given)

    def _silent(self) -> dict[str, str]:
        """The layers that gave nothing in the last pass, each with the reason."""
        problems = {}
        for name in self.layers:
            if not self._called.get(name):
                problem = "gives no tensor in" if name in self._called else "is not called by"
                problems[name] = f"layer {name!r} {problem} the forward pass of {type(self.model).__name__}: leave it out"
        return problems

    def _hook(self, layer: Layer, module: nn.Module, args: Any, output: Any) -> None:
        if self._see is None or layer.name not in self.layers:
            return
        x = first_tensor(output)
        self._called[layer.name] = x is not None or self._called.get(layer.name, False)
        if x is not None:
            self._see(layer, x.detach())

    def _layout(self, layer: Layer, x: Tensor) -> Layout:
        """The dimension of the images is found once for each layer. The dimension of the features depends on the number of dimensions."""
        if x.is_nested or x.dim() < 2:
            given = "a nested tensor" if x.is_nested else f"shape {tuple(x.shape)}"
            raise ValueError(f"layer {layer.name!r} gives {given}; expected vectors, tokens or maps of each image")
        feature_dim = self._feature_dim(layer, x)
        if layer.name not in self._batch_dim:
            # Some transformers have (tokens, images, features).
            fitting = [dim for dim in range(2) if x.shape[dim] == self._images and dim != feature_dim]
            self._batch_dim[layer.name] = fitting[0] if fitting else 0
            self._unclear |= 1 in fitting
        batch_dim = self._batch_dim[layer.name]
        if x.shape[batch_dim] != self._images:
            count = "one image" if self._images == 1 else f"{self._images} images"
            raise ValueError(f"layer {layer.name!r} gives shape {tuple(x.shape)} for {count}: no dimension of the images was found")
        return Layout(x.dim(), batch_dim, feature_dim)

    def _look_again(self, layer: Layer, x: Tensor) -> None:
        """With one image, the dimension of the images is the only one of the first two that has size 1."""
        if x.dim() > 2 and self._feature_dim(layer, x) != 1 and (x.shape[0] == 1) != (x.shape[1] == 1):
            self._batch_dim[layer.name] = 0 if x.shape[0] == 1 else 1

    def _feature_dim(self, layer: Layer, x: Tensor) -> int:
        dims, shape = x.dim(), tuple(x.shape)
        if layer.feature_dim is not None:
            if not -dims <= layer.feature_dim < dims:
                raise ValueError(f"layer {layer.name!r} gives shape {shape}, which has no dimension feature_dim={layer.feature_dim}")
            return layer.feature_dim % dims
        known = self._axes.get((layer.name, dims))
        if known is None:
            axis, first = self._trail.output(layer, x), shape
            if axis.dim is not None:
                self._trail.note(layer.module, layer.name, x, axis.dim)
        else:
            axis, first = second_shape(*known, shape), known[1]
        self._axes[layer.name, dims] = axis, first
        if axis.dim is None and not self._features:
            return dims - 1
        if axis.dim is None:
            raise ValueError(
                f"layer {layer.name!r} gives shape {shape}, and it is unsure which of its dimensions holds features: "
                f"pass feature_dim={{{layer.name!r}: …}}"
            )
        return axis.dim


@contextlib.contextmanager
def map_sizes(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """During the block, collects the rows and columns of every map that a 2-D convolution of the model gives.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten())
    >>> with map_sizes(model) as sizes:
    ...     _ = model(torch.zeros(1, 3, 32, 16))
    >>> sizes
    [(4, 2)]
    """
    sizes: list[tuple[int, int]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            sizes.append((output.shape[2], output.shape[3]))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                stack.callback(module.register_forward_hook(note).remove)
        yield sizes


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the length of the block; afterwards every module has its own mode again. Compiled models run eagerly meanwhile, since
    their graphs do not know of hooks that were added later.
    """
    before = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for module, training in before:
            stack.callback(setattr, module, "training", training)
        model.eval()
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled yet
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def as_input(images: Tensor, model: nn.Module) -> Tensor:
    """Images on the device of a model, and if they and its first parameter are floating point, in the precision of that parameter.

    >>> as_input(torch.zeros(1, 3, 4, 4), nn.Conv2d(3, 1, 1).bfloat16()).dtype
    torch.bfloat16
    """
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), images.dtype)
    return images.to(device_of(model), dtype if images.is_floating_point() else None)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any.

    >>> device_of(nn.Linear(2, 2))
    device(type='cpu')
    """
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
