"""The counter on stderr while something is done to every layer of a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from torch import nn


def progressing(
    items: Iterable[tuple[str, nn.Module]], label: str, show: bool | None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``items``; a counter on stderr once that takes longer than a second."""
    items, start, shown = list(items), time.monotonic(), False
    show = sys.stderr.isatty() if show is None else show
    for i, item in enumerate(items):
        if show and (shown or time.monotonic() - start > 1):
            print(f"\r{label}: layer {i + 1}/{len(items)} {item[0]}\033[K", end="", file=sys.stderr, flush=True)
            shown = True
        yield item
    if shown:
        print(f"\r{label}: {len(items)} layers in {time.monotonic() - start:.1f} s\033[K", file=sys.stderr)
