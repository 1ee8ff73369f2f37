"""Plain text tables: numbers to the right, words to the left."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under ``header``; a column whose cells all start with a digit, a sign or - is set right."""
    widths = [max(len(str(r[i])) for r in (header, *rows)) for i in range(len(header))]
    numeric = [all(str(r[i])[:1] in "0123456789+-−." for r in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(map(str, cells), widths, numeric, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])
