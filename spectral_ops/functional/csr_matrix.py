"""The sparse matrix of RoSA: CSR with int32 indices, checked once, with what its kernels need worked out once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from spectral_ops._imports import need
from spectral_ops.core import checks

INT32_MAX = 2**31 - 1


class Pattern(NamedTuple):
    """Where the entries are, in the form the operators take: int32 tensors, columns ascending within each row.

    The same entries by column: entry p of the transpose is entry ``permutation[p]`` here, in row ``rows[p]``, and
    column i owns [column_offsets[i], column_offsets[i + 1]). ``active_rows`` and ``active_columns`` hold what is not
    empty, ``compact_offsets`` and ``compact_columns`` the pattern among those.
    """

    row_offsets: torch.Tensor
    columns: torch.Tensor
    column_offsets: torch.Tensor
    rows: torch.Tensor
    permutation: torch.Tensor
    active_rows: torch.Tensor
    active_columns: torch.Tensor
    compact_offsets: torch.Tensor
    compact_columns: torch.Tensor


def _row_of_entries(row_offsets: torch.Tensor, nnz: int) -> torch.Tensor:
    entries = torch.arange(nnz, device=row_offsets.device, dtype=row_offsets.dtype)
    return torch.searchsorted(row_offsets[1:], entries, right=True)


def _offsets(owners: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [count + 1] offsets of runs of equal, ascending ``owners``."""
    bounds = torch.arange(count + 1, device=owners.device)
    return torch.searchsorted(owners.contiguous(), bounds).to(torch.int32)


def _pattern(row_offsets: torch.Tensor, columns: torch.Tensor, shape: tuple[int, int]) -> Pattern:
    rows, cols = _row_of_entries(row_offsets, columns.numel()), columns.long()
    permutation = torch.argsort(cols, stable=True)
    active_rows, active_columns = rows.unique_consecutive(), cols.unique()
    return Pattern(
        row_offsets,
        columns,
        _offsets(cols[permutation], shape[1]),
        rows[permutation].to(torch.int32),
        permutation.to(torch.int32),
        active_rows,
        active_columns,
        _offsets(torch.searchsorted(active_rows, rows), active_rows.numel()),
        torch.searchsorted(active_columns, cols).to(torch.int32),
    )


class CSR:
    """A sparse matrix S [d, k] in compressed rows: row o holds entries row_offsets[o] to row_offsets[o + 1].

    Args:
        values: [nnz], floating point, contiguous; the nn.Parameter that trains. float32 is allowed beside a bf16 x.
        row_offsets: int32 [d + 1]; col_indices: int32 [nnz], each column at most once in a row. int32 throughout: int16
            cannot hold a column past 32767.
        shape: (d, k).
        sorted: False declares that columns need not ascend within their row.

    The constructor looks at types and sizes. :meth:`validate` looks at the indices themselves, which waits for a GPU.
    Every function that takes a CSR calls it. Its answer is kept until an index tensor changes.
    """

    def __init__(self, values, row_offsets, col_indices, shape, *, sorted=True):
        self.values, self.row_offsets, self.col_indices, self.shape = values, row_offsets, col_indices, shape
        self._check_sizes()
        self.shape: tuple[int, int] = (int(shape[0]), int(shape[1]))
        self.sorted = bool(sorted)
        self.permutation: torch.Tensor | None = None  # of a transpose: its values are the original's [permutation]
        self._key: tuple | None = None
        self._pattern: Pattern | None = None
        self._order: torch.Tensor | None = None  # unsorted: position in values of each entry of the pattern

    def _check_sizes(self) -> None:
        values, row_offsets, col_indices, shape = self.values, self.row_offsets, self.col_indices, self.shape
        checks.tensor("values", values, "[nnz]", 1)
        if not values.is_contiguous():
            raise ValueError(f"values: got strides {tuple(values.stride())}, wanted a contiguous vector")
        if not isinstance(shape, (tuple, list, torch.Size)) or len(shape) != 2:
            raise TypeError(f"shape: got {checks.describe(shape)}, wanted (rows, columns)")
        for size in shape:
            checks.integer("shape", size, 0, INT32_MAX, "what int32 indices reach")
        for name, index in (("row_offsets", row_offsets), ("col_indices", col_indices)):
            if not isinstance(index, torch.Tensor):
                raise TypeError(f"{name}: got {checks.describe(index)}, wanted an int32 tensor")
            if index.dtype != torch.int32:
                raise TypeError(f"{name}: got {checks.describe(index)}, wanted int32")
            if index.layout != torch.strided or index.dim() != 1 or not index.is_contiguous():
                raise ValueError(f"{name}: got {checks.describe(index)}, wanted a contiguous vector")
        checks.device("values", values, row_offsets=row_offsets, col_indices=col_indices)
        if row_offsets.numel() != shape[0] + 1:
            raise ValueError(
                f"row_offsets: got {row_offsets.numel()} entries, wanted {shape[0] + 1} (one more than rows)"
            )
        if col_indices.numel() != values.numel():
            raise ValueError(f"col_indices: got {col_indices.numel()} entries, wanted {values.numel()} as values has")
        if values.numel() > INT32_MAX:
            raise ValueError(f"values: got {values.numel()} entries, wanted at most {INT32_MAX} (int32 offsets)")

    # properties

    @property
    def nnz(self) -> int:
        """How many entries are stored, zeros included."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """nnz over the number of places."""
        return self.nnz / max(self.shape[0] * self.shape[1], 1)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def __repr__(self) -> str:
        return f"CSR({self.shape[0]} x {self.shape[1]}, nnz={self.nnz}, {self.dtype}, {self.device})"

    # checks

    def validate(self) -> CSR:
        """Check every index; returns self. IndexError or ValueError naming row_offsets or col_indices; waits for a GPU
        the first time, then costs a few comparisons."""
        compiling = torch.compiler.is_compiling()
        if self._pattern is not None and (compiling or self._unchanged()):
            return self
        # as a decorator, disable would import the compiler with the package
        (torch.compiler.disable(self._check_and_build) if compiling else self._check_and_build)()
        return self

    def _state(self) -> tuple:
        """What the checks looked at: tensors by themselves (a freed one's address may become another's), and what may
        change in them."""
        offsets, columns, v = self.row_offsets, self.col_indices, self.values
        versions = [None if t.is_inference() else t._version for t in (offsets, columns)]
        pointers = offsets.data_ptr(), columns.data_ptr()
        return offsets, columns, *pointers, *versions, self.shape, self.sorted, v.shape, v.dtype, v.device

    def _unchanged(self) -> bool:
        """Whether the last check still holds; every call of a layer asks, so no tuple is built."""
        if self._key is None:
            return False
        offsets, columns, a, b, version, column_version, shape, ordered, nnz, dtype, device = self._key
        v = self.values
        return (
            offsets is self.row_offsets
            and columns is self.col_indices
            and isinstance(v, torch.Tensor)
            and offsets.data_ptr() == a
            and columns.data_ptr() == b
            and (version is None or offsets._version == version)
            and (column_version is None or columns._version == column_version)
            and self.shape == shape
            and self.sorted == ordered
            and v.shape == nnz
            and v.dtype == dtype
            and v.device == device
            and v.is_contiguous()
        )

    def _check_and_build(self) -> None:
        """Checks everything, then sets the pattern; a check that fails clears it.

        The old one stays until then: another thread may be about to read it.
        """
        try:
            self._check_sizes()
            state = self._state()  # of what is checked below, whatever it becomes meanwhile
            with torch.no_grad(), torch.inference_mode(False):
                self._order, self._pattern = self._check_indices()
        except BaseException:
            self._key = self._pattern = None
            raise
        self._key = state

    def _check_indices(self) -> tuple[torch.Tensor | None, Pattern]:
        """The order of unsorted values, and the pattern."""
        nnz, k = self.nnz, self.shape[1]
        if self.device.type == "meta":
            raise ValueError(f"row_offsets: got {checks.describe(self.row_offsets)}, wanted offsets that can be read")
        offsets, columns = self.row_offsets.long(), self.col_indices.long()
        steps = offsets.diff()
        first, last, monotone = (v.item() for v in (offsets[0], offsets[-1], (steps >= 0).all()))
        if first != 0:
            raise ValueError(f"row_offsets: got {first} as its first entry, wanted 0")
        if last != nnz:
            raise ValueError(f"row_offsets: got {last} as its last entry, wanted {nnz} (the number of values)")
        if not monotone:
            row = int((steps < 0).nonzero()[0])
            raise ValueError(f"row_offsets: got a decrease after entry {row}, wanted ascending offsets")
        if nnz and (int(columns.min()) < 0 or int(columns.max()) >= k):
            raise IndexError(
                f"col_indices: got columns {int(columns.min())} to {int(columns.max())}, wanted 0 to {k - 1}"
            )
        rows = _row_of_entries(self.row_offsets, nnz)
        order = None
        if self.sorted:
            wrong = (rows[1:] == rows[:-1]) & (columns[1:] <= columns[:-1])
            if wrong.any():
                place = int(wrong.nonzero()[0])
                a, b = int(columns[place]), int(columns[place + 1])
                raise ValueError(
                    f"col_indices: got column {b} after {a} in row {int(rows[place])}, wanted ascending columns without"
                    " duplicates (sorted=False declares another order)"
                )
            columns = self.col_indices
        else:
            keys, order = (rows * k + columns).sort()
            if (keys[1:] == keys[:-1]).any():
                twice = int(keys[1:][keys[1:] == keys[:-1]][0])
                raise ValueError(f"col_indices: got column {twice % k} twice in row {twice // k}, wanted each once")
            in_order = bool((order[1:] > order[:-1]).all())
            columns, order = (self.col_indices, None) if in_order else (self.col_indices[order], order)
        # copies: an index that is overwritten between a forward and its backward must not reach a kernel
        return order, _pattern(self.row_offsets.clone(), columns.clone(), self.shape)

    @property
    def pattern(self) -> Pattern:
        """The checked pattern, columns ascending."""
        self.validate()
        return self._pattern

    def ordered(self, values: torch.Tensor) -> torch.Tensor:
        """values [nnz] of this CSR in the pattern's order: themselves, unless columns were declared unsorted."""
        return values if self._order is None else values[self._order]

    def unordered(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`ordered`."""
        return values if self._order is None else torch.empty_like(values).index_copy_(0, self._order, values)

    # conversions

    def with_values(self, values: torch.Tensor) -> CSR:
        """The same pattern, already checked, with other values [nnz]."""
        other = CSR(values, self.row_offsets, self.col_indices, self.shape, sorted=self.sorted)
        if self._pattern is not None and values.device == self.device:
            other._key = (*self._key[:8], values.shape, values.dtype, values.device)
            other._pattern, other._order = self._pattern, self._order
        return other

    def to(self, *args: Any, **kwargs: Any) -> CSR:
        """A copy with the values as ``values.detach().to(...)`` and the indices on the same device."""
        values = self.values.detach().to(*args, **kwargs)
        if values.device == self.device:
            return self.with_values(values)
        indices = (self.row_offsets.to(values.device), self.col_indices.to(values.device))
        return CSR(values, *indices, self.shape, sorted=self.sorted)

    @classmethod
    def from_dense(cls, dense: torch.Tensor, *, dtype: torch.dtype | None = None) -> CSR:
        """From a mask [d, k] of bool (values start at zero, float32 unless ``dtype``) or a weight (its nonzeros)."""
        if not isinstance(dense, torch.Tensor) or dense.dtype != torch.bool:
            checks.tensor("dense", dense, "[rows, columns]: a bool mask or a weight", 2)
        elif dense.dim() != 2 or dense.layout != torch.strided:
            raise ValueError(f"dense: got {checks.describe(dense)}, wanted a strided mask [rows, columns]")
        if dense.device.type == "meta":
            raise ValueError(f"dense: got {checks.describe(dense)}, wanted entries that can be read")
        dense = dense.detach()
        mask = dense if dense.dtype == torch.bool else dense != 0
        rows, columns = mask.nonzero(as_tuple=True)
        if rows.numel() > INT32_MAX:
            raise ValueError(f"dense: got {rows.numel()} nonzeros, wanted at most {INT32_MAX} (int32 offsets)")
        if dense.dtype == torch.bool:
            values = torch.zeros(rows.numel(), dtype=dtype or torch.float32, device=dense.device)
        else:
            values = dense[rows, columns].to(dtype or dense.dtype)
        return cls(values, _offsets(rows, dense.shape[0]), columns.to(torch.int32), tuple(dense.shape)).validate()

    def to_dense(self) -> torch.Tensor:
        """S [d, k] in the values' dtype; differentiable in them."""
        self.validate()
        rows = _row_of_entries(self.row_offsets, self.nnz)
        dense = self.values.new_zeros(self.shape)
        return dense.index_put((rows, self.col_indices.long()), self.values)

    def transpose(self) -> CSR:
        """Sᵀ [k, d], explicit zeros kept; its ``permutation`` [nnz] int64 says where each of its values stood here."""
        pattern = self.pattern
        permutation = pattern.permutation.long()
        if self._order is not None:
            permutation = self._order[permutation]
        out = CSR(self.values[permutation], pattern.column_offsets, pattern.rows, self.shape[::-1])
        out.permutation = permutation
        return out.validate()

    @classmethod
    def from_sparse_csr(cls, matrix: torch.Tensor) -> CSR:
        """From a torch.sparse_csr tensor; its values are shared, its int64 indices narrowed."""
        if not isinstance(matrix, torch.Tensor) or matrix.layout != torch.sparse_csr:
            raise TypeError(f"matrix: got {type(matrix).__name__}, wanted a torch.sparse_csr tensor")
        return cls._narrowed(matrix.values(), matrix.crow_indices(), matrix.col_indices(), tuple(matrix.shape))

    def to_sparse_csr(self) -> torch.Tensor:
        """As a torch.sparse_csr tensor over the same values and indices."""
        self.validate()
        return torch.sparse_csr_tensor(self.row_offsets, self.col_indices, self.values, self.shape)

    @classmethod
    def from_scipy(cls, matrix: Any) -> CSR:
        """From a scipy sparse matrix or array, any format, float32 or float64; duplicates are summed."""
        if not hasattr(matrix, "tocsr"):
            raise TypeError(f"matrix: got {type(matrix).__name__}, wanted a scipy sparse matrix or array")
        if str(matrix.dtype) not in ("float32", "float64") or len(matrix.shape) != 2:
            raise TypeError(
                f"matrix: got {matrix.dtype} {list(matrix.shape)}, wanted float32 or float64 [rows, columns]"
            )
        try:
            matrix = matrix.tocsr().copy()
            matrix.check_format()
        except ValueError as error:
            raise ValueError(f"matrix: got a broken one ({error}), wanted one that scipy accepts") from None
        matrix.sum_duplicates()
        values = torch.from_numpy(matrix.data)
        return cls._narrowed(values, torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices), matrix.shape)

    def to_scipy(self) -> Any:
        """As a scipy.sparse.csr_array on the CPU; bfloat16 and float16, which it lacks, become float32."""
        sparse = need("scipy.sparse", "to_scipy", "scipy")
        values = self.values.detach().cpu()
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        indices = (t.cpu().numpy() for t in (self.col_indices, self.row_offsets))
        return sparse.csr_array((values.numpy(), *indices), shape=self.shape)

    @classmethod
    def _narrowed(cls, values, row_offsets, col_indices, shape) -> CSR:
        if values.numel() > INT32_MAX or max(shape) > INT32_MAX:
            raise ValueError(f"matrix: got {values.numel()} entries of {tuple(shape)}, wanted at most {INT32_MAX}")
        for name, index in (("row_offsets", row_offsets), ("col_indices", col_indices)):
            if index.numel() and (index.min() < 0 or index.max() > INT32_MAX):  # would wrap around
                raise IndexError(f"{name}: got {int(index.min())} to {int(index.max())}, wanted 0 to {INT32_MAX}")
        indices = (t.to(torch.int32).contiguous() for t in (row_offsets, col_indices))
        return cls(values.contiguous(), *indices, tuple(int(n) for n in shape), sorted=False).validate()
