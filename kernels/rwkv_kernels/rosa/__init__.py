"""ROSA, the rapid online suffix automaton of RWKV-8: lookups of the longest match, exact, and their surrogate gradient.

automaton.py    one sequence on the host, token after token: O(log n) amortized steps a token
scan.py         many short ones on any device: S operations a token
flips.py        what a loss would be if one bit were another
lookup.py       layers of them
"""

from __future__ import annotations

from rwkv_kernels.rosa.automaton import SuffixAutomaton, is_compiled
from rwkv_kernels.rosa.lookup import IMPLEMENTATIONS, Outputs, rosa_lookup, rosa_qkv, rosa_sequence, symbols_of
from rwkv_kernels.rosa.scan import RosaState, empty_state

__all__ = [
    "IMPLEMENTATIONS",
    "Outputs",
    "RosaState",
    "SuffixAutomaton",
    "empty_state",
    "is_compiled",
    "rosa_lookup",
    "rosa_qkv",
    "rosa_sequence",
    "symbols_of",
]
