"""What a chunk consists of: sections, each of some layers, heads and tokens, with their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from lmc.model.layout import KVLayout, bytes_of

# Bytes of a chunk buffer: uint8 [L, S, t, R], S = 2 for K and V, else 1, and R the bytes of a token
# in one layer, G * D * b. What there is of a section is one such array, or several that follow each
# other along T.
Rows = np.ndarray

Kind = Literal["kv", "latent", "state"]  # the order is that of the codes in files: append only
# Of all heads that a model has, those of one rank: [start, end) and how many there are.
Heads = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Form:
    """Which part of a chunk's KV a section is, and of what shape.

    Attributes:
        group: the place among the model's groups of layers that are alike.
        kind: `kv` is K and V of each layer; `latent` and `state` are one array a layer.
        heads: [start, end) of the model's heads and how many it has, whatever rank has them.
        tokens: [start, end) of the chunk's tokens: fewer than all where a window saw no more.
        L: layers of the group.
        D: values of a head and token.
        dtype: of the values.
    """

    group: int
    kind: Kind
    heads: Heads
    tokens: tuple[int, int]
    L: int
    D: int
    dtype: str

    @property
    def S(self) -> int:  # noqa: N802 the letter of arrays a layer, as in `Rows`
        return 2 if self.kind == "kv" else 1

    @property
    def R(self) -> int:  # noqa: N802
        """Bytes of a token in one array of one layer."""
        return (self.heads[1] - self.heads[0]) * self.D * bytes_of(self.dtype)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[L, S, T, R] of its rows."""
        return (self.L, self.S, self.tokens[1] - self.tokens[0], self.R)

    @property
    def nbytes(self) -> int:
        L, S, T, R = self.shape
        return L * S * T * R

    @property
    def kin(self) -> tuple[object, ...]:
        """What forms have in common that are of the same arrays, each of some heads of them."""
        return (self.group, self.kind, self.heads[2], self.tokens, self.L, self.D, self.dtype)

    def of(self, heads: Heads) -> Form:
        """The same of other heads."""
        return self if heads == self.heads else replace(self, heads=heads)


class Section(NamedTuple):
    """A form, and its bytes: parts `[L, S, t, R]` along T, each of them contiguous."""

    form: Form
    parts: Sequence[Rows]


def full_attention(layout: KVLayout, T: int, heads: Heads | None = None) -> Form:
    """The form of T tokens of a model whose layers are all alike: K and V, or latents.

    Args:
        heads: that the layout's G are; by default all there are.
    """
    heads = heads or (0, layout.G, layout.G)
    kind: Kind = "kv" if layout.sides == 2 else "latent"
    return Form(0, kind, heads, (0, T), layout.L, layout.D, layout.dtype)


def covered(form: Form, held: Iterable[Form]) -> bool:
    """Whether forms that are held have all of a form's heads between them."""
    kin = form.kin
    at, end, _ = form.heads
    for start, stop in sorted(other.heads[:2] for other in held if other.kin == kin):
        if start > at or at >= end:
            break
        at = max(at, stop)
    return at >= end


def own(forms: Iterable[Form], heads: Heads | None) -> list[Form]:
    """What a rank with these heads has of a record of these forms: each kin once, as told.

    Args:
        heads: None for one that has all.
    """
    each: dict[object, Form] = {}
    for form in forms:
        each.setdefault(form.kin, form)
    return [
        form.of(heads) if heads and form.heads[2] == heads[2] else whole(form)
        for form in each.values()
    ]


def whole(form: Form) -> Form:
    """The same of all heads that there are."""
    return form.of((0, form.heads[2], form.heads[2]))


def complete(forms: Sequence[Form]) -> bool:
    """Whether nothing is missing of any form that there is: no heads."""
    return all(covered(whole(form), forms) for form in forms)
