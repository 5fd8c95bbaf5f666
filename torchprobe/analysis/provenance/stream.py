"""The residual stream of a network: its blocks, and what each of them adds to it.

Nothing is taken from names. A block is understood if what it returns is, number by number, what it read plus the outputs of some of its
children, or else of modules further inside, as in T5 and BLOOM, whose attention adds what it read. So a network of another library works if
it adds its branches in the same way, and one that does not is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.analysis.provenance.calls import Call, same, watched
from torchprobe.analysis.provenance.norms import norm_of

GATES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Identity)
"""What the stream may pass at the end of a block: linear once it is known which values are let through."""


class UnknownStructure(ValueError):
    """A network whose representation is not a sum along a residual stream, as far as can be seen."""


@dataclass(frozen=True)
class Writer:
    """The layer whose parameters write a branch; full names of parameters, None if there is none.

    Attributes:
        weight: one row for each feature of the stream: of a linear layer, or of the convolution before a batch norm.
        axis: the dimension of ``weight`` that holds the rows: 0, or 1 in the layers of GPT-2, x @ weight.
        bias: of the layer, or of the norm.
        gain: of the norm.
        offset: what is added to ``gain`` before it multiplies: 0, or 1 in Gemma.
        norm: the name of the batch norm.
        scale: the scale of the branch after the layer (LayerScale).
    """

    weight: str | None = None
    axis: int = 0
    bias: str | None = None
    gain: str | None = None
    offset: float = 0.0
    norm: str | None = None
    scale: str | None = None


@dataclass(frozen=True)
class Branch:
    """What one branch of a block adds to the stream.

    Attributes:
        block: the name of the block.
        name: the name of the child that does the work, such as the attention.
        end: the name of the child whose output is added; the attention itself, or a scale after it.
        call: which of its calls in one forward pass, from 0.
        kind: "attention", "mlp", "convolution" or "shortcut"; "branch" if the names do not say.
        starts: the names of the children where the branch reads the stream.
        scale: a parameter of the block by which the output of ``end`` is multiplied, if any.
        writer: None if it was not found.
        features: the dimension of the output that holds the features.
        cut: the block does not pass on what it read: another branch takes its place.
    """

    block: str
    name: str
    end: str
    call: int
    kind: str
    starts: tuple[str, ...]
    scale: str | None
    writer: Writer | None
    features: int
    cut: bool

    @property
    def key(self) -> tuple[str, int]:
        """The child and the call whose output is added."""
        return self.end, self.call


@dataclass(frozen=True)
class Stream:
    """The blocks that write the stream, first to last, and their branches. ``whole``: the first block of the list is among them."""

    blocks: tuple[str, ...]
    branches: tuple[Branch, ...]
    whole: bool

    @property
    def cut(self) -> bool:
        """Whether nothing from before the first block reaches the end, but through a branch."""
        return any(branch.cut for branch in self.branches)


def find_stream(model: nn.Module, inputs: Tensor) -> Stream:
    """The residual stream of a model in float64 and eval mode, from one small batch.

    Raises:
        UnknownStructure: there is no list of blocks that add to what they read.
    """
    lists = dict(_lists(model))
    calls = watched(model, [name for members in lists.values() for name in members], inputs)
    order = {call.name: i for i, call in enumerate(calls)}
    count = {name: sum(call.name == name for call in calls) for name in order}
    by_name = {call.name: call for call in calls}
    candidates = [(name, members) for name, members in lists.items() if all(count.get(member) == 1 for member in members)]
    candidates.sort(key=lambda pair: (-order[pair[1][-1]], pair[0].count(".")))
    for inside, (_, members) in itertools.product((False, True), candidates):
        if stream := _resolve(model, [by_name[name] for name in members], inputs, inside):
            return stream
    tried = ", ".join(f"{name} ({type(model.get_submodule(members[0])).__name__})" for name, members in candidates[:4])
    why = f"the blocks of {tried} do not add outputs of their modules to what they read" if tried else "it has no list of blocks"
    raise UnknownStructure(
        f"{type(model).__name__} is not a known structure: {why}. Pre-norm transformers and residual CNNs are known, post-norm "
        "transformers are not"
    )


def _lists(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and len({type(child) for child in module}) == 1:
            members = [f"{name}.{key}".lstrip(".") for key, child in module.named_children()]
            if any(True for _ in model.get_submodule(members[0]).children()):
                yield name, members


def _resolve(model: nn.Module, blocks: Sequence[Call], inputs: Tensor, inside: bool) -> Stream | None:
    """The blocks at the end of a list that are understood and follow each other without a change in between. ``inside``: by all of their
    modules, instead of their children."""
    inner = [
        f"{block.name}.{name}"
        for block in blocks
        for name, _ in (block.module.named_modules() if inside else block.module.named_children())
        if name
    ]
    layers = [f"{block.name}.{name}" for block in blocks for name, module in block.module.named_modules() if name and _may_write(module)]
    calls = watched(model, [*inner, *layers], inputs)
    children, written = set(inner), set(layers)
    found: list[Branch] = []
    known: list[str] = []
    for position in range(len(blocks) - 1, -1, -1):
        block = blocks[position]
        own = [call for call in calls if call.name.startswith(f"{block.name}.")]
        if position + 1 < len(blocks) and not same(block.output, blocks[position + 1].input):
            break
        branches = _Block(block, [c for c in own if c.name in children], [c for c in own if c.name in written]).branches()
        if branches is None:
            break
        found, known = [*branches, *found], [block.name, *known]
        if any(branch.cut for branch in branches):
            break
    if not found:
        return None
    return Stream(tuple(known), tuple(found), len(known) == len(blocks))


def _unflattened(call: Call, stream: Tensor) -> Call:
    """The call with its images and positions in two dimensions, if it reads or returns them in one, as the MLP of OPT does."""

    def shaped(x: Tensor) -> Tensor:
        flat = x.dim() == 2 and stream.dim() == 3 and stream.shape[1] > 1 and len(x) == stream.shape[0] * stream.shape[1]
        return x.reshape(*stream.shape[:2], -1) if flat else x

    return replace(call, input=shaped(call.input), output=shaped(call.output))


def _may_write(module: nn.Module) -> bool:
    """Whether a module may be a layer whose parameters write a branch; a layer of another library has a matrix and no children."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.MultiheadAttention)) or norm_of(module) is not None:
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not any(True for _ in module.children())


class _Block:
    """One block: what it read and returned, the calls of its children, and those of its layers."""

    def __init__(self, block: Call, children: Sequence[Call], layers: Sequence[Call]) -> None:
        self.block = block
        self.children, self.layers = ([_unflattened(call, block.input) for call in calls] for calls in (children, layers))
        self.scales = {f"{block.name}.{name}": p.detach() for name, p in block.module.named_parameters(recurse=False) if p.dim() == 1}

    def branches(self) -> list[Branch] | None:
        stream, pending, found = self.block.input, list[Call](), list[Branch]()
        for call in self.children:
            if pending and (added := self._added(call.input, stream, pending)):
                found, stream, pending = [*found, *added], call.input, []
            pending.append(call)
        if len(pending) == 1 and found and isinstance(pending[0].module, GATES) and same(pending[0].input, stream):
            return found if same(pending[0].output, self.block.output) else None
        if not pending:
            return found or None
        added = self._added(self.block.output, stream, pending)
        return [*found, *added] if added else None

    def _added(self, target: Tensor, stream: Tensor, pending: list[Call]) -> list[Branch]:
        """The branches by which ``target`` differs from the stream; empty if that is not known."""
        ends = [(i, call) for i, call in reversed(list(enumerate(pending))) if call.output.shape == target.shape]
        if stream.shape == target.shape:
            for i, call in ends:
                if same(stream + call.output, target):
                    return [self._branch(pending[: i + 1], stream)]
                for name, scale in self.scales.items():
                    shaped = along(scale, call.output, -1)
                    if shaped is not None and same(stream + shaped * call.output, target):
                        return [replace(self._branch(pending[: i + 1], stream, name), scale=name)]
        for (later, b), (earlier, a) in itertools.combinations(ends, 2):
            parts = pending[: earlier + 1], pending[earlier + 1 : later + 1]
            if stream.shape == target.shape and same(stream + a.output + b.output, target):
                return [self._branch(part, stream) for part in parts]
            if same(a.output + b.output, target):
                branches = [replace(self._branch(part, stream), cut=True) for part in parts]
                shortest = min(range(2), key=lambda k: _size(parts[k]))
                branches[shortest] = replace(branches[shortest], kind="shortcut")
                return branches
        differs = stream.shape == target.shape and not same(stream, target)  # else anything times 0 would do
        for i, call in ends if differs else ():
            if same(stream + _factor(call.output, target - stream) * call.output, target):
                return [self._branch(pending[: i + 1], stream)]
        return []

    def _branch(self, part: Sequence[Call], stream: Tensor, scale: str | None = None) -> Branch:
        end, main = part[-1], max(part, key=lambda call: _size([call]))
        four = end.output.dim() == 4
        writer, features = self._writer(end, part, scale)
        if main.name.endswith(("conv1", "conv2", "conv3")):
            main = end
        name, kind = self._worker(main, four)
        return Branch(
            block=self.block.name,
            name=name,
            end=end.name,
            call=end.number,
            kind=kind,
            starts=tuple(call.name for call in part if same(call.input, stream) and not same(call.output, call.input)),
            scale=None,
            writer=writer,
            features=features if writer else 1 if four else -1,
            cut=False,
        )

    def _worker(self, main: Call, four: bool) -> tuple[str, str]:
        """The name and the kind of what does the work: the largest module of a branch, or what it is a part of, if that says more."""
        kind = _kind(main.name, main.module, four)
        inner = main.name.removeprefix(f"{self.block.name}.").split(".")
        for end in range(len(inner) - 1, 0, -1) if kind == "branch" else ():
            module = self.block.module.get_submodule(".".join(inner[:end]))
            outer = _kind(".".join(inner[:end]), module, four)
            if outer != "branch" and not isinstance(module, nn.ModuleList):
                return ".".join([self.block.name, *inner[:end]]), outer
        return main.name, kind

    def _writer(self, end: Call, part: Sequence[Call], scale: str | None) -> tuple[Writer | None, int]:
        """The layer whose output, times a scale, is the output of the branch, and the dimension of its features."""
        scales: dict[str | None, Tensor | None] = {None: None}
        if scale is None:
            scales.update(self.scales)
            for call in part:
                for name, p in call.module.named_parameters():
                    if p.dim() == 1 and not name.endswith("bias") and not isinstance(call.module, (nn.LayerNorm, nn.BatchNorm2d)):
                        scales[f"{call.name}.{name}"] = p.detach()
        names = tuple(call.name for call in part)
        inside = [c for c in self.layers if any(c.name == name or c.name.startswith(f"{name}.") for name in names)]
        for layer, (scale_name, gamma) in itertools.product(reversed(inside), scales.items()):
            if layer.output.shape != end.output.shape:
                continue
            features = 1 if isinstance(layer.module, (nn.BatchNorm2d, nn.Conv2d)) else -1
            shaped = None if gamma is None else along(gamma, layer.output, features)
            if gamma is not None and shaped is None:
                continue
            written = layer.output if shaped is None else shaped * layer.output
            if same(written, end.output) and (writer := self._layer_parameters(layer)):
                return replace(writer, scale=scale_name), features
        return None, -1

    def _layer_parameters(self, layer: Call) -> Writer | None:
        name, module = layer.name, layer.module
        if isinstance(module, nn.MultiheadAttention):
            name, module = f"{name}.out_proj", module.out_proj
        bias = None if getattr(module, "bias", None) is None else f"{name}.bias"
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            return Writer(f"{name}.weight", bias=bias)
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.affine:
            before = [c for c in self.layers if isinstance(c.module, nn.Conv2d) and same(c.output, layer.input)]
            return Writer(f"{before[-1].name}.weight" if before else None, bias=bias, gain=f"{name}.weight", norm=name)
        if norm := norm_of(module):
            return Writer(bias=bias, gain=f"{name}.weight", offset=norm.offset) if getattr(module, "weight", None) is not None else None
        weight: Any = module.weight
        if weight.shape[0] == layer.input.shape[-1]:
            written = layer.input @ weight if bias is None else layer.input @ weight + module.bias
            return Writer(f"{name}.weight", axis=1, bias=bias) if same(written, layer.output) else None
        return None


def along(vector: Tensor, like: Tensor, features: int) -> Tensor | None:
    """A vector shaped so that it multiplies the dimension ``features`` of ``like``; None if it has another width."""
    if like.dim() < 2 or vector.numel() != like.shape[features]:
        return None
    shape = [1] * like.dim()
    shape[features] = -1
    return vector.reshape(shape)


def _factor(output: Tensor, added: Tensor) -> Tensor:
    """The number by which an output is multiplied before it is added, as in Granite and MiniCPM, if there is one: by least squares."""
    return (output * added).sum() / output.square().sum().clamp(min=torch.finfo(output.dtype).tiny)


def _size(calls: Sequence[Call]) -> int:
    return sum(p.numel() for call in calls for p in call.module.parameters())


def _kind(name: str, module: nn.Module, four: bool) -> str:
    words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    if "att" in words:
        return "attention"
    if any(word in words for word in ("mlp", "ffn", "feed")) or words.endswith("ff"):
        return "mlp"
    return "convolution" if four else "branch"
