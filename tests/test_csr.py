"""The CSR row (METHODS 1.5): csr_add, csr_spmm, csr_sddmm, rosa_linear, rosa_update, and the CSR type."""

from contract import Contract
from helpers import CSR as CSR_FAMILIES


class TestCSR(Contract):
    families = CSR_FAMILIES
