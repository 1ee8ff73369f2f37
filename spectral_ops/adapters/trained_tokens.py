"""Chosen rows of an embedding trained in place of the whole (``trainable_token_indices``), tied heads included."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.tensor_dicts import BufferDict


class TrainedTokens(nn.Module):
    """An embedding [V, d] of which the active adapter replaces some rows, or a head or embedding tied to one.

    A row is replaced, not added to: what a file holds is then the same over an embedding that was resized and
    initialised anew. ``rows[name]`` [n, d] holds the values, ``indices[name]`` says which rows they are. What
    is tied has no tensors of its own and uses the rows of ``tied``.

    Attributes that the model reads come from the original module, ``weight`` excepted: where rows are in force it is
    the weight [V, d] with them in it, made anew at each read and differentiable, since a model may multiply by it.
    """

    def __init__(self, original: nn.Module, tied: TrainedTokens | None = None) -> None:
        """original: an nn.Embedding, or with ``tied`` a layer that shares its weight. ValueError for any other."""
        super().__init__()
        if tied is None:
            _check_embedding(original)
        else:
            _check_tied(original, tied)
        self.original_module = original
        self._tied = (tied,) if tied is not None else ()  # in a tuple: no submodule, so nothing is saved twice
        if tied is None:
            self.rows = nn.ParameterDict()
            self.index, self.slots = BufferDict(), BufferDict()
        self.indices: dict[str, list[int]] = {} if tied is None else tied.indices
        self.active: str | None = None
        self.merged: str | None = None
        self._undo: torch.Tensor | None = None
        self._disabled = 0
        self.train(original.training)

    @property
    def tied(self) -> TrainedTokens | None:
        """The embedding's unit, where this is the head tied to it."""
        return self._tied[0] if self._tied else None

    @property
    def _owner(self) -> TrainedTokens:
        return self._tied[0] if self._tied else self

    @property
    def adapter_names(self) -> list[str]:
        return list(self.indices)

    def check(self, indices: Sequence[int]) -> None:
        """Raise TypeError or ValueError where ``indices`` are not distinct rows of this embedding."""
        size = self.original_module.weight.shape[0]
        if not isinstance(indices, (list, tuple)) or not all(type(i) is int for i in indices):
            raise TypeError(f"trainable_token_indices: got {indices!r}, wanted a list of int")
        if not indices or len(set(indices)) != len(indices):
            raise ValueError(f"trainable_token_indices: got {indices!r}, wanted distinct indices, at least one")
        if outside := [i for i in indices if not 0 <= i < size]:
            raise ValueError(f"trainable_token_indices: got {outside}, wanted indices in 0..{size - 1}")

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_adapter(self, name: str, indices: Sequence[int], *, autocast_adapter_dtype: bool = True) -> None:
        """Train the rows ``indices`` under adapter ``name``, from their present values; a tied head follows by itself.

        They are float32 over a bf16/fp16 weight unless ``autocast_adapter_dtype`` is False.
        """
        if self._tied:
            return
        self.check(indices)
        weight = self.original_module.weight.detach()
        index = torch.tensor(indices, device=weight.device)
        slots = torch.full((len(weight),), len(indices), dtype=torch.int32, device=weight.device)
        slots[index] = torch.arange(len(indices), dtype=torch.int32, device=weight.device)
        dtype = accumulate_dtype(weight.dtype) if autocast_adapter_dtype else weight.dtype
        self.rows[name] = nn.Parameter(weight[index].to(dtype, copy=True), requires_grad=False)
        self.index.register_buffer(name, index, persistent=False)
        self.slots.register_buffer(name, slots, persistent=False)  # token id -> row of rows[name], or n for none
        self.indices[name] = list(indices)

    def remove_adapter(self, name: str) -> None:
        if not self._tied and name in self.indices:
            del self.rows[name], self.index[name], self.slots[name], self.indices[name]
        self.active = None if self.active == name else self.active

    def set_active(self, name: str) -> None:
        self.active = name
        self.train_only([name])

    def train_only(self, names: Collection[str]) -> None:
        """Let the rows of these adapters train, and no other."""
        for owner, rows in self.rows.items() if not self._tied else ():
            rows.requires_grad_(owner in names)

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What a file holds of adapter ``name`` by the key after the module's path; nothing of a tied head."""
        if self._tied or name not in self.indices:
            return {}
        return {"token_adapter.trainable_tokens_delta": self.rows[name].detach()}

    @property
    def running(self) -> str | None:
        """The adapter whose rows stand in for the weight's now: none while merged or disabled."""
        usable = self.merged is None and not self._disabled and self.active in self.indices
        return self.active if usable else None

    @property
    def weight(self) -> torch.Tensor:
        """The weight [V, d] that the module computes with: a copy where rows are in force, else the parameter."""
        weight, name = self.original_module.weight, self.running
        return weight if name is None else self._merged_weight(weight, name)

    def _merged_weight(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        owner = self._owner
        return weight.index_copy(0, owner.index[name], owner.rows[name].to(weight.dtype))

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the model reads from the module it put here, such as embed_tokens.padding_idx
            if name == "original_module":
                raise
            return getattr(self.original_module, name)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Token ids to [..., d]; of a head, [..., d] to [..., V]."""
        out = self.original_module(x, *args, **kwargs)
        name = self.running
        if name is None:
            return out
        return self._head(x, out, name) if isinstance(self.original_module, nn.Linear) else self._embed(x, out, name)

    def _embed(self, ids: torch.Tensor, out: torch.Tensor, name: str) -> torch.Tensor:
        base, rows = self.original_module, self._owner.rows[name]
        count = len(rows)
        slot = self._owner.slots[name][ids]
        table = F.pad(_scaled(base, rows.to(base.weight.dtype)), (0, 0, 0, 1))  # a row more, for ids not chosen
        padding = base.padding_idx
        skip = self.indices[name].index(padding) if padding in self.indices[name] else count
        new = F.embedding(slot, table, skip, scale_grad_by_freq=base.scale_grad_by_freq)
        return torch.where((slot < count).unsqueeze(-1), new.to(out.dtype), out)

    def _head(self, x: torch.Tensor, out: torch.Tensor, name: str) -> torch.Tensor:
        base, owner = self.original_module, self._owner
        index = owner.index[name]
        bias = None if base.bias is None else base.bias[index]
        columns = F.linear(x, owner.rows[name].to(base.weight.dtype), bias)
        return out.index_copy(-1, index, columns.to(out.dtype))

    def bare(self) -> nn.Module:
        """What stays where the last adapter goes."""
        return self.original_module

    def merge_result(self) -> tuple[torch.Tensor, None]:
        """The rows [n, d] that a merge of the active adapter would write, in the weight's dtype."""
        return self._owner.rows[self.active].detach().to(self.original_module.weight.dtype), None

    @torch.no_grad()
    def merge(self, *, safe: bool = False, keep_base: bool = False) -> None:
        """Write the active adapter's rows into the weight; nothing where it is merged already, or has none here.

        The rows that were there are kept, so that :meth:`unmerge` is bit-exact with or without ``keep_base``. safe:
        raise ValueError, and change nothing, where a row is not finite. A tied head shares the weight: its embedding
        writes it.
        """
        if self.merged is not None or self.active not in self.indices:
            return
        new, weight = self.merge_result()[0], self.original_module.weight
        if safe and not torch.isfinite(new).all():
            raise ValueError(f"adapter {self.active!r}: got non-finite merged rows, wanted finite ones (safe=True)")
        if not self._tied:
            index = self.index[self.active]
            self._undo = weight[index]
            weight.index_copy_(0, index, new)
        self.merged = self.active

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the rows back that were there before the merge."""
        if self._undo is not None:
            weight = self.original_module.weight
            weight.index_copy_(0, self.index[self.merged], self._undo.to(weight))
        self.merged = self._undo = None


def _scaled(base: nn.Embedding, rows: torch.Tensor) -> torch.Tensor:
    """What ``base`` makes of rows of its weight: models that scale embeddings call the factor ``embed_scale``."""
    scale = getattr(base, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows) if isinstance(scale, torch.Tensor) else scale)


def _check_embedding(base: nn.Module) -> None:
    got = f"trainable_token_indices: got a layer {type(base).__name__}"
    if not isinstance(base, nn.Embedding) or not base.weight.is_floating_point():
        raise ValueError(f"{got}, wanted an nn.Embedding with a floating-point weight")
    if base.max_norm is not None or base.sparse:
        raise ValueError(f"{got}(max_norm={base.max_norm}, sparse={base.sparse}), wanted neither")
    if type(base).forward is nn.Embedding.forward or base.weight.device.type == "meta":
        return
    with torch.no_grad():
        ids = torch.tensor([0, base.num_embeddings - 1], device=base.weight.device)
        wanted = _scaled(base, base.weight[ids])
        try:
            out = base(ids)
            same = out.shape == wanted.shape and torch.allclose(out.to(wanted), wanted, rtol=1e-2)
        except Exception as error:
            raise ValueError(f"{got}, wanted one that takes token ids ({type(error).__name__}: {error})") from error
    if not same:
        raise ValueError(f"{got} that changes its rows, wanted one that looks them up (times embed_scale, if any)")


def _check_tied(head: nn.Module, tied: TrainedTokens) -> None:
    got = f"trainable_token_indices: got a tied layer {type(head).__name__}"
    if isinstance(head, nn.Embedding):
        _check_embedding(head)
    elif not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(f"{got}, wanted a plain nn.Linear")
    if head.weight is not tied.original_module.weight:
        raise ValueError(f"{got} with a weight of its own, wanted the embedding's")
