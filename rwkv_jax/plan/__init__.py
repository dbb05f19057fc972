"""Ahead-of-time plans: memory, FLOPs and communication of a training step on devices that need not be present."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.plan.devices import Topology, parse_topology
    from rwkv_jax.plan.planner import Plan
    from rwkv_jax.plan.report import describe, to_json
    from rwkv_jax.plan.run import plan_run

__all__ = ["Plan", "Topology", "describe", "parse_topology", "plan_run", "to_json"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "devices": ("Topology", "parse_topology"),
        "planner": ("Plan",),
        "report": ("describe", "to_json"),
        "run": ("plan_run",),
    },
)
