"""Vision-RWKV's bidirectional WKV-4: what stands before and after each patch, without a state to hand on.

(Beside ops/, since what is there runs from left to right and continues a state.)
"""

from __future__ import annotations

from rwkv_kernels.biwkv4.api import IMPLEMENTATIONS, biwkv4

__all__ = ["IMPLEMENTATIONS", "biwkv4"]
