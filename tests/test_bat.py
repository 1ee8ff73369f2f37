"""The Bat row (METHODS 1.4): bat_linear in both modes, bat_weight and their operators."""

from contract import Contract
from helpers import BAT


class TestBat(Contract):
    families = BAT
