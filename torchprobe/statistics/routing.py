"""What a router of a mixture of experts does: the load of each expert, and how sure the router is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from torchprobe.common.numbers import positive, whole
from torchprobe.statistics.saved import count_problem
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import FEATURES, State

GIVEN = ("logits", "probabilities", "choices")

_BELOW = 1 - 1e-12  # 1.1 · 100 / 10 is 11, and a little more in float64


class Routing(Statistic):
    """The load of each expert, dropped tokens, and the entropy of the router, from what a router gives: one vector for each token, one
    feature for each expert.

    Args:
        features: the number of experts.
        device: the device of the state, which must be that of the activations. Default: PyTorch's default device.
        top_k: how many experts a token goes to.
        given: what the vectors are. "logits": a token goes to its ``top_k`` largest, and a softmax makes probabilities of them.
            "probabilities" (or sigmoid scores): the same, and they are divided by their sum. "choices": a value other than 0 for each
            expert that a token goes to, as :func:`router_choices` makes them; then there is no entropy. Routers that add a bias, choose
            groups first, or choose at random do not take the largest logits: give their choices.
        capacity_factor: every expert takes at most ``ceil(capacity_factor · top_k · tokens / experts)`` tokens of one call, as in GShard
            and the Switch Transformer, and the others count as dropped. None: no limit. With "choices" that were already cut, tokens with
            fewer than ``top_k`` experts count as dropped.

    A layer's ``mask`` leaves padding out, also of the capacity. Tokens with a nonfinite element, or with probabilities that are
    negative or all 0, are left out and counted.

    Per expert, float64 (features,): ``assigned`` tokens, ``mass`` (the sum of its probability), ``load`` = the share of all assignments.
    Numbers of the layer:

    * ``load_cv``: standard deviation of the load over experts / its mean (Shazeer et al., 2017); 0 is even.
    * ``load_max``: the largest load / the mean load, 1 … experts / top_k. It bounds the speed of expert parallelism.
    * ``dead_experts``: experts that no token went to.
    * ``dropped``: share of the assignments that were dropped.
    * ``router_entropy``: entropy of a token's probabilities / log(experts), mean over tokens: 0 is sure, 1 is indifferent.
    * ``balance_loss``: experts · Σ load · mean probability (Fedus et al., 2021, equation 4): 1 is even.

    All are sums over everything seen, so ranks and windows merge exactly; a window that is short has experts without tokens by chance.

    Raises:
        ValueError: an argument is out of range, or ``top_k`` is larger than the number of experts.

    >>> import torch
    >>> from torchprobe.statistics import Routing
    >>> routing = Routing(features=4)
    >>> routing.update(torch.tensor([[9.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]]))
    >>> routing.load.tolist(), routing.dead_experts, round(routing.load_max, 3)
    ([0.6666666666666666, 0.3333333333333333, 0.0, 0.0], 2.0, 2.667)
    """

    assigned: Tensor
    mass: Tensor
    entropy_sum: Tensor
    dropped_sum: Tensor
    invalid_tokens: Tensor

    states = MappingProxyType(
        {
            "assigned": State((FEATURES,)),
            "mass": State((FEATURES,)),
            "entropy_sum": State(),
            "dropped_sum": State(),
            "invalid_tokens": State(),
        }
    )
    fields = MappingProxyType(
        {
            "load_cv": "standard deviation of the load over experts / its mean; 0 is even",
            "load_max": "largest load of an expert / mean load; 1 is even",
            "dead_experts": "experts that no token went to",
            "dropped": "share of the assignments that were dropped",
            "router_entropy": "entropy of a token's probabilities / log(experts), mean over tokens",
            "balance_loss": "experts · Σ load · mean probability; 1 is even",
            "tokens": "tokens that were counted",
            "invalid_tokens": "tokens left out because an element is nonfinite, or their probabilities are negative or all 0",
        }
    )
    arguments = ("top_k", "given", "capacity_factor")

    def __init__(
        self,
        features: int,
        device: torch.device | str | None = None,
        top_k: int = 1,
        given: str = "logits",
        capacity_factor: float | None = None,
    ) -> None:
        if given not in GIVEN:
            raise ValueError(f"given must be one of {', '.join(map(repr, GIVEN))}; got {given!r}")
        top_k = whole("top_k", top_k, 1)
        if top_k > features:
            raise ValueError(f"top_k={top_k} experts of {features}: is the number of experts along another dimension?")
        super().__init__(features, device)
        self.top_k, self.given = top_k, given
        self.capacity_factor = None if capacity_factor is None else positive("capacity_factor", capacity_factor)

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        valid = kept & x.isfinite().all(-1, keepdim=True)
        self.invalid_tokens = self.invalid_tokens + (kept & ~valid).sum()
        if self.given == "probabilities":  # of a token without any, such as one that was dropped, nothing can be divided
            none = (x < 0).any(-1, keepdim=True) | (x <= 0).all(-1, keepdim=True)
            self.invalid_tokens, valid = self.invalid_tokens + (valid & none).sum(), valid & ~none
        x = x.where(valid, 0).to(self.mass.dtype)
        if self.given == "choices":
            chosen = (x != 0) & valid
        else:
            chosen = torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(self.top_k, -1).indices, True) & valid
            shares = x.softmax(-1) if self.given == "logits" else _shares(x)
            self.mass = self.mass + shares.where(valid, 0).sum(0)
            self.entropy_sum = self.entropy_sum - torch.xlogy(shares, shares).where(valid, 0).sum()
        load = chosen.sum(0).to(self.assigned.dtype)
        lost = (self.top_k * valid.sum() - load.sum()).clamp(min=0)  # of choices that were cut
        if self.capacity_factor is not None:
            tokens = valid.sum().to(self.mass.dtype)  # not in the default dtype, which may be bfloat16
            capacity = torch.ceil(self.capacity_factor * self.top_k * tokens / self.features * _BELOW)
            lost = lost + (load - capacity).clamp(min=0).sum()
        self.assigned, self.dropped_sum = self.assigned + load, self.dropped_sum + lost

    @property
    def load(self) -> Tensor:
        """The share of each expert in all assignments, (features,); nan if nothing was seen."""
        assigned = self.contents()["assigned"]
        return assigned / assigned.sum()

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens = states["vectors"] - states["invalid_tokens"]
        share = states["assigned"] / states["assigned"].sum(-1, keepdim=True)
        mass = states["mass"] / tokens[:, None]
        none = torch.full_like(tokens, math.nan)
        by_logits = self.given != "choices"
        return {
            "load_cv": share.std(-1, correction=0) * self.features,
            "load_max": share.amax(-1) * self.features,
            "dead_experts": (states["assigned"] == 0).sum(-1).to(tokens.dtype).where(tokens > 0, math.nan),
            "dropped": states["dropped_sum"] / (tokens * self.top_k),
            "router_entropy": states["entropy_sum"] / tokens / math.log(self.features) if by_logits and self.features > 1 else none,
            "balance_loss": (share * mass).sum(-1) * self.features if by_logits else none,
            "tokens": tokens,
            "invalid_tokens": states["invalid_tokens"],
        }

    def problem(self) -> tuple[str, str] | None:
        vectors = self.tensors()["vectors"]
        if wrong := super().problem() or count_problem("invalid_tokens", self.invalid_tokens, vectors):
            return wrong
        if wrong := count_problem("assigned", self.assigned, vectors - self.invalid_tokens):
            return wrong
        for name in ("mass", "entropy_sum", "dropped_sum"):
            if not bool((getattr(self, name) >= -1e-6).all()) or not bool(getattr(self, name).isfinite().all()):
                return name, "holds numbers that no tokens add up to"
        return None


def _shares(x: Tensor) -> Tensor:
    """Divided by the sum, which may be beyond the type."""
    x = x / x.amax(-1, keepdim=True)
    return x / x.sum(-1, keepdim=True)


def router_logits(output: Any) -> Tensor:
    """The logits in what a router gives, for ``select=``: the output itself, or in a tuple the widest floating-point tensor.

    Raises:
        TypeError: there is none, or it is not clear which.

    >>> router_logits((torch.zeros(5, 8), torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.long))).shape
    torch.Size([5, 8])
    """
    tensors = [x for x in _tensors(output) if x.is_floating_point()]
    widest = max((x.shape[-1] for x in tensors), default=0)
    found = [x for x in tensors if x.shape[-1] == widest]
    if len(found) != 1:
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in _tensors(output)) or "no tensor"
        raise TypeError(f"it is not clear which tensor holds the logits of the experts ({shapes}): pass select=lambda output: output[…]")
    return found[0]


def router_choices(output: Any, experts: int | None = None) -> Tensor:
    """The choices in what a router gives, for ``select=`` and ``Routing(given="choices")``: 1 for each expert that a token goes to.

    Args:
        output: holds a whole-number tensor with the indices of the experts of each token, (…, k). A whole-number tensor of the shape of the
            logits is 0 or 1 for each expert instead, as that of the Switch Transformer in transformers.
        experts: their number. Default: the width of the logits beside it.

    Raises:
        TypeError: there are no choices, it is not clear which, or the number of experts is not known.

    >>> router_choices((torch.zeros(2, 4), torch.tensor([[0, 3], [1, 0]]))).tolist()
    [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    """
    tensors = _tensors(output)
    indices = [x for x in tensors if not x.is_floating_point() and not x.is_complex() and x.dim() > 1]
    if len(indices) != 1:
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors) or "no tensor"
        raise TypeError(f"it is not clear which tensor holds the choices of the router ({shapes}): pass select=lambda output: output[…]")
    (chosen,) = indices
    if experts is None:
        experts = router_logits(output).shape[-1]
    if any(x.is_floating_point() and x.shape == chosen.shape and x.shape[-1] == experts for x in tensors):
        return chosen.to(torch.float32)
    found = torch.zeros(*chosen.shape[:-1], experts, device=chosen.device)
    return found.scatter(-1, chosen.long(), 1.0)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [part for part in parts if isinstance(part, Tensor)]
