"""Cuts a network down to one rank's part, before any weights are read.

Matrices that widen (queries, keys, values, gate, up) are cut by outputs, those that narrow again
(attention's output, down) by inputs: the ranks' answers then only have to be added up, once for
attention and once for the MLP. Embedding and output projection are cut by vocabulary.
Source: Shoeybi et al., "Megatron-LM", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloudlm.core.errors import BadSetting
from cloudlm.engine.architectures import gpt2
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.architectures.modules import (
    Attention,
    FusedAttention,
    FusedGatedMLP,
    GatedMLP,
    PlainMLP,
    SparseMLP,
)
from cloudlm.engine.ops.norm import RMSNorm
from cloudlm.engine.parallel.layout import (
    Layout,
    Place,
    Span,
    check_divides,
    check_heads,
    check_layers,
)
from cloudlm.engine.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a tensor that a rank holds: ``spans`` of dimension ``dim``, one behind the other.
    ``outputs`` says whether these are outputs of a projection or its inputs."""

    dim: int
    spans: tuple[Span, ...]
    outputs: bool = True

    @property
    def size(self) -> int:
        return sum(end - begin for begin, end in self.spans)

    def of(self, tensor: Any) -> Tensor:
        """The part of ``tensor``, which may be a slice of a file that is not read yet."""
        parts = [tensor[(slice(None),) * self.dim + (slice(*span),)] for span in self.spans]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True)
class Split:
    """What became of a network. ``shapes`` are those of all parameters before; parameters named in
    ``cuts`` are held in part, those in ``zeroed`` as zeros (another rank adds them)."""

    shapes: Mapping[str, tuple[int, ...]]
    cuts: Mapping[str, Cut]
    zeroed: frozenset[str]


class Elsewhere(nn.Module):
    """Stands where another stage has a module."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """``x`` as it came."""
        return x


class SplitEmbedding(nn.Module):
    """Rows ``begin`` to ``end`` of a token embedding; the ranks add theirs up."""

    def __init__(self, weight: Tensor, rows: Span, ranks: Ranks) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, weight)
        self._begin, self._end = rows
        self._ranks = ranks

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens, hidden] of ``token_ids`` [tokens]."""
        here = (token_ids >= self._begin) & (token_ids < self._end)
        if len(self.weight):
            found = functional.embedding((token_ids - self._begin) * here, self.weight)
            found = found * here.unsqueeze(1)
        else:
            found = self.weight.new_zeros((len(token_ids), self.weight.shape[1]))
        return self._ranks.add(found)


class SplitRMSNorm(nn.Module):
    """A norm over the heads of all ranks together; each holds as many of them."""

    def __init__(self, norm: RMSNorm, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [tokens, own part], any floating type; the answer has its type and shape."""
        wide = x.float()
        mean = self._ranks.add(wide.pow(2).mean(-1, keepdim=True))
        mean = mean / self._ranks.place.layout.tensor
        return self.weight * (wide * torch.rsqrt(mean + self.eps)).to(x.dtype)


def check_split(model: Decoder, layout: Layout) -> None:
    """Raise BadSetting if ``model`` cannot be dealt out over ``layout``."""
    check_layers(layout, model.shape.layers)
    if layout.tensor > 1:
        for layer in cast(nn.ModuleList, model.get_submodule(model.layers_path)):
            _Cutter(model, layout.at(0)).cut_layer("", layer)


def split(model: Decoder, ranks: Ranks) -> Split:
    """Turn the whole ``model``, on the meta device, into the part of one rank.

    What must be added up over ranks is, by hooks on attention and MLP, so ``model`` computes as
    before. Raises BadSetting if it cannot be split that way.
    """
    place = ranks.place
    check_split(model, place.layout)
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    _keep_stage(model, place)
    if place.layout.tensor == 1:
        return Split(shapes, {}, frozenset())
    cutter = _Cutter(model, place)
    layers = cast(nn.ModuleList, model.get_submodule(model.layers_path))
    for number, layer in enumerate(layers):
        if isinstance(layer, Elsewhere):
            continue
        cutter.cut_layer(f"{model.layers_path}.{number}", layer)
        _add_up(layer, ranks)
    if place.stage == 0:
        cutter.cut_vocabulary()
    for name, cut in cutter.cuts.items():
        _shrink(model, name, cut)
    if place.stage == 0:
        _split_embedding(model, ranks)
    _, kv_heads = _span_size(place.key_heads(model.shape.kv_heads))
    model.shape = replace(model.shape, kv_heads=kv_heads)
    for module in model.modules():
        if isinstance(module, FusedAttention):
            module.kv_heads = kv_heads
    return Split(shapes, cutter.cuts, frozenset(cutter.zeroed) if place.shard else frozenset())


def _span_size(span: Span) -> tuple[int, int]:
    return span[0], span[1] - span[0]


def _keep_stage(model: Decoder, place: Place) -> None:
    """Put ``Elsewhere`` in the place of all that other stages hold; number the own layers from 0,
    as the cache does."""
    windows = model.shape.windows
    begin, end = place.layers(len(windows))
    layers = cast(nn.ModuleList, model.get_submodule(model.layers_path))
    for number, layer in enumerate(layers):
        if begin <= number < end:
            attention = cast(Any, layer.attn if hasattr(layer, "attn") else layer.self_attn)
            attention.layer = number - begin
        else:
            layers[number] = Elsewhere()
    model.shape = replace(model.shape, windows=windows[begin:end])
    if place.stage == 0:
        return
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    for path in owners:
        if not path.startswith(f"{model.layers_path}."):
            _put(model, path, Elsewhere())


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _shrink(model: nn.Module, name: str, cut: Cut) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    shape = list(getattr(owner, leaf).shape)
    shape[cut.dim] = cut.size
    setattr(owner, leaf, nn.Parameter(torch.empty(shape, device="meta")))


def _add_up(layer: nn.Module, ranks: Ranks) -> None:
    """Hooks, not modules: what adapters add to a projection must be in the sum."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return ranks.add(output)

    for name in ("self_attn", "attn", "mlp"):
        if hasattr(layer, name):
            getattr(layer, name).register_forward_hook(add)
    for norm in ("q_norm", "k_norm"):
        attention = getattr(layer, "self_attn", None)
        if isinstance(attention, Attention) and attention.norm_whole:
            setattr(attention, norm, SplitRMSNorm(getattr(attention, norm), ranks))


def _split_embedding(model: Decoder, ranks: Ranks) -> None:
    embedding = cast(nn.Embedding, model.get_submodule(model.embedding_path))
    rows = ranks.place.rows(model.shape.vocab_size)
    _put(model, model.embedding_path, SplitEmbedding(embedding.weight, rows, ranks))


class _Cutter:
    """Collects the cuts of one rank's part, module by module."""

    def __init__(self, model: Decoder, place: Place) -> None:
        self.cuts: dict[str, Cut] = {}
        self.zeroed: set[str] = set()
        self._model = model
        self._place = place

    def cut_layer(self, path: str, layer: nn.Module) -> None:
        """Raises BadSetting for modules or sizes that cannot be cut."""
        for name, module in layer.named_children():
            kind = next((kind for kind in type(module).__mro__ if kind in _CUTTERS), None)
            if kind is not None:
                _CUTTERS[kind](self, f"{path}.{name}", module)
            elif name in ("self_attn", "attn", "mlp"):
                raise BadSetting(
                    f"{type(self._model).__name__} cannot be split over ranks "
                    f"({type(module).__name__}); set tensor_parallel to 1",
                    param="tensor_parallel",
                )

    def cut_vocabulary(self) -> None:
        """Rows of the embedding, and of the output projection if that is another matrix."""
        rows = self._place.rows(self._model.shape.vocab_size)
        self.cuts[f"{self._model.embedding_path}.weight"] = Cut(0, (rows,))
        head = getattr(self._model, "lm_head", None)
        if head is not None:
            self._wide("lm_head", head, (rows,))

    def _wide(self, path: str, module: nn.Module, spans: Sequence[Span]) -> None:
        """Keep some outputs of a projection."""
        dim = 1 if isinstance(module, gpt2.Projection) else 0
        self.cuts[f"{path}.weight"] = Cut(dim, tuple(spans))
        if getattr(module, "bias", None) is not None:
            self.cuts[f"{path}.bias"] = Cut(0, tuple(spans))

    def _narrow(self, path: str, module: nn.Module, span: Span) -> None:
        """Keep some inputs of a projection; the bias must be added once only."""
        dim = 0 if isinstance(module, gpt2.Projection) else 1
        self.cuts[f"{path}.weight"] = Cut(dim, (span,), outputs=False)
        if getattr(module, "bias", None) is not None:
            self.zeroed.add(f"{path}.bias")

    def _heads(self, module: Attention) -> tuple[Span, Span, int]:
        """Own query and key heads, and how many query heads there are."""
        heads = module.o_proj.in_features // module.head_dim
        kv_heads = self._model.shape.kv_heads
        check_heads(self._place.layout, heads, kv_heads)
        return self._place.share(heads), self._place.key_heads(kv_heads), heads

    def attention(self, path: str, module: Attention) -> None:
        queries, keys, _ = self._heads(module)
        size = module.head_dim
        self._wide(f"{path}.q_proj", module.q_proj, (_times(queries, size),))
        self._wide(f"{path}.k_proj", module.k_proj, (_times(keys, size),))
        self._wide(f"{path}.v_proj", module.v_proj, (_times(keys, size),))
        self._narrow(f"{path}.o_proj", module.o_proj, _times(queries, size))
        if module.norm_whole:
            if not isinstance(module.q_norm, RMSNorm):
                raise BadSetting(
                    f"{type(self._model).__name__} cannot be split over ranks (its norm of "
                    "queries and keys); set tensor_parallel to 1",
                    param="tensor_parallel",
                )
            self.cuts[f"{path}.q_norm.weight"] = Cut(0, (_times(queries, size),))
            self.cuts[f"{path}.k_norm.weight"] = Cut(0, (_times(keys, size),))

    def fused_attention(self, path: str, module: FusedAttention) -> None:
        queries, keys, heads = self._heads(module)
        kv_heads, size = self._model.shape.kv_heads, module.head_dim
        rows: tuple[Span, ...]
        if not module.grouped:
            behind = heads + kv_heads
            rows = (queries, _moved(keys, heads), _moved(keys, behind))
        elif kv_heads >= self._place.layout.tensor:
            rows = (_times(keys, heads // kv_heads + 2),)
        else:  # some queries of one group, with that group's key and value
            group = heads // kv_heads
            own = _moved(queries, 2 * keys[0])
            rows = (own, _moved((0, 2), keys[0] * (group + 2) + group))
        self._wide(f"{path}.qkv_proj", module.qkv_proj, [_times(row, size) for row in rows])
        self._narrow(f"{path}.o_proj", module.o_proj, _times(queries, size))

    def gated_mlp(self, path: str, module: GatedMLP) -> None:
        own = self._inner(module.down_proj.in_features)
        self._wide(f"{path}.gate_proj", module.gate_proj, (own,))
        self._wide(f"{path}.up_proj", module.up_proj, (own,))
        self._narrow(f"{path}.down_proj", module.down_proj, own)

    def fused_gated_mlp(self, path: str, module: FusedGatedMLP) -> None:
        inner = module.down_proj.in_features
        own = self._inner(inner)
        self._wide(f"{path}.gate_up_proj", module.gate_up_proj, (own, _moved(own, inner)))
        self._narrow(f"{path}.down_proj", module.down_proj, own)

    def plain_mlp(self, path: str, module: PlainMLP) -> None:
        own = self._inner(module.down_proj.in_features)
        self._wide(f"{path}.up_proj", module.up_proj, (own,))
        self._narrow(f"{path}.down_proj", module.down_proj, own)

    def sparse_mlp(self, path: str, module: SparseMLP) -> None:
        """A part of every expert; all ranks route alike."""
        for number, expert in enumerate(module.experts):
            self.gated_mlp(f"{path}.experts.{number}", cast(GatedMLP, expert))
        if module.shared_expert is not None:
            self.gated_mlp(f"{path}.shared_expert", module.shared_expert)

    def gpt2_attention(self, path: str, module: gpt2.Attention) -> None:
        width = module.c_proj.weight.shape[0]
        heads = width // module.head_dim
        check_heads(self._place.layout, heads, heads)
        own = _times(self._place.share(heads), module.head_dim)
        self._wide(
            f"{path}.c_attn", module.c_attn, (own, _moved(own, width), _moved(own, 2 * width))
        )
        self._narrow(f"{path}.c_proj", module.c_proj, own)

    def gpt2_mlp(self, path: str, module: gpt2.MLP) -> None:
        own = self._inner(module.c_proj.weight.shape[0])
        self._wide(f"{path}.c_fc", module.c_fc, (own,))
        self._narrow(f"{path}.c_proj", module.c_proj, own)

    def _inner(self, size: int) -> Span:
        check_divides(self._place.layout, "inner columns of an MLP", size)
        return self._place.share(size)


_CUTTERS: dict[type[nn.Module], Callable[[_Cutter, str, Any], None]] = {
    Attention: _Cutter.attention,
    FusedAttention: _Cutter.fused_attention,
    GatedMLP: _Cutter.gated_mlp,
    FusedGatedMLP: _Cutter.fused_gated_mlp,
    PlainMLP: _Cutter.plain_mlp,
    SparseMLP: _Cutter.sparse_mlp,
    gpt2.Attention: _Cutter.gpt2_attention,
    gpt2.MLP: _Cutter.gpt2_mlp,
}


def _times(span: Span, size: int) -> Span:
    return span[0] * size, span[1] * size


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by
