"""Deliberate faults in the code, each of which the tests must catch; run by hand, since it takes an hour or so.

    python tests/faults_in_code.py            # all of them; a table of which were caught, by which test
    python tests/faults_in_code.py rwkv7      # those whose file or name has this word

Each fault is made in a copy of the repository, where the named tests run until the first of them fails. The reference
numbers that are not in the repository (`shared/` beside it) are out of reach there, as they are in a fresh clone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MODELS = "tests/models/test_golden_random.py tests/models/test_modules.py"
COPIED = ("rwkv_jax", "kernels", "tests", "configs", "benchmarks", "pyproject.toml", "train.py")


class Fault(NamedTuple):
    """A line that is wrong."""

    name: str
    file: str
    right: str
    """Stands once in the file."""
    wrong: str
    tests: str
    """What must see it: arguments of pytest."""


FAULTS = (
    # Models
    Fault("rwkv7 head norm epsilon", "rwkv_jax/models/rwkv7.py", "EPSILON = 64e-5", "EPSILON = 1e-5", MODELS),
    Fault("rwkv7 value residual's sign", "rwkv_jax/models/rwkv7.py", "(v_first - v)", "(v - v_first)", MODELS),
    Fault("rwkv7 decay scale", "rwkv_jax/models/rwkv7.py", "= -math.exp(-0.5)", "= -0.606531", MODELS),
    Fault("rwkv7 bonus of other values", "rwkv_jax/models/rwkv7.py", "(y + bonus", "(y - bonus", MODELS),
    Fault("rwkv7 replacement key", "rwkv_jax/models/rwkv7.py", "(1 + (a - 1) *", "(1 - (a - 1) *", MODELS),
    Fault("rwkv7 removal sign", "rwkv_jax/models/rwkv7.py", "-kk, kk * a)", "kk, kk * a)", MODELS),
    Fault(
        "rwkv7 ffn without square", "rwkv_jax/models/rwkv7.py", "jnp.square(jax.nn.relu(", "abs(jax.nn.relu(", MODELS
    ),
    Fault("rwkv6 head norm epsilon", "rwkv_jax/models/rwkv6.py", "EPSILON = 64e-5", "EPSILON = 1e-5", MODELS),
    Fault(
        "rwkv6 order of shares", "rwkv_jax/models/rwkv6.py", "xw, xk, xv, xr, xg = (", "xw, xv, xk, xr, xg = (", MODELS
    ),
    Fault("rwkv6 gate", "rwkv_jax/models/rwkv6.py", "jax.nn.silu(", "jax.nn.sigmoid(", MODELS),
    Fault("rwkv5 head norm epsilon", "rwkv_jax/models/rwkv5.py", "EPSILON = 64e-5", "EPSILON = 1e-5", MODELS),
    Fault(
        "rwkv5 gate before norm", "rwkv_jax/models/rwkv5.py", "jax.nn.silu(self.gate", "jax.nn.relu(self.gate", MODELS
    ),
    Fault("rwkv4 decay", "rwkv_jax/models/rwkv4.py", "log_w = -jnp.exp(", "log_w = -jnp.expm1(", MODELS),
    Fault(
        "rwkv4 ffn gate",
        "rwkv_jax/models/rwkv4.py",
        "gated_linear(jax.nn.sigmoid(r)",
        "gated_linear(jax.nn.silu(r)",
        MODELS,
    ),
    Fault("layer norm epsilon", "rwkv_jax/models/layers.py", "epsilon = 1e-5", "epsilon = 1e-6", MODELS),
    Fault(
        "token shift leaks between texts",
        "rwkv_jax/models/layers.py",
        "jnp.where(begins[:, :, None], 0, x_prev)",
        "jnp.where(begins[:, :, None], x_prev, x_prev)",
        "tests/models/test_language_model.py tests/models/test_gradients.py",
    ),
    Fault(
        "transformer sees one token too few",
        "rwkv_jax/models/transformer.py",
        "queries[:, None] >= jnp.arange(",
        "queries[:, None] > jnp.arange(",
        "tests/models/test_transformer.py",
    ),
    # Operators
    Fault(
        "wkv7 last step of a chunk",
        "kernels/rwkv_kernels/ops/wkv7/chunked.py",
        "np.tri(size, k=-1, dtype=bool), np.tri(size, dtype=bool)",
        "np.tri(size, k=-1, dtype=bool), np.tri(size, k=-1, dtype=bool)",
        "tests/kernels/test_against_definition.py -k wkv7-chunked",
    ),
    Fault(
        "wkv7 gradient of the decay",
        "kernels/rwkv_kernels/ops/wkv7/chunked.py",
        "+ from_end - from_a",
        "+ from_end",
        "tests/kernels/test_against_definition.py -k wkv7-chunked",
    ),
    Fault(
        "wkv6 bonus",
        "kernels/rwkv_kernels/ops/wkv6/scan.py",
        "y = y + jnp.sum(",
        "y = y - jnp.sum(",
        "tests/kernels/test_golden.py tests/kernels/test_definitions.py -k wkv6",
    ),
    Fault(
        "wkv4 loses its largest exponent",
        "kernels/rwkv_kernels/ops/wkv4/scan.py",
        "largest = lax.stop_gradient(jnp.maximum(log_w + exponent, k))",
        "largest = lax.stop_gradient(log_w + exponent)",
        "tests/kernels/test_golden.py tests/kernels/test_wkv4.py -k wkv4",
    ),
    Fault(
        "steps beyond a row's length count",
        "kernels/rwkv_kernels/arguments.py",
        "< lengths[:, None]",
        "<= lengths[:, None]",
        "tests/kernels/test_packing.py",
    ),
    Fault(
        "a segment begins a step late",
        "kernels/rwkv_kernels/arguments.py",
        "return jnp.cumsum(changes, axis=1, dtype=jnp.int32)",
        "return jnp.cumsum(changes, axis=1, dtype=jnp.int32) * 0",
        "tests/kernels/test_packing.py",
    ),
    # Loss, schedule, optimizer
    Fault(
        "L2Wrap pulls up",
        "rwkv_jax/training/loss.py",
        "(dpeak * largest)",
        "(-dpeak * largest)",
        "tests/training/test_loss.py",
    ),
    Fault(
        "cosine ends a step late",
        "rwkv_jax/training/schedule.py",
        "rest = max(num_steps - 1 - warmup, 1)",
        "rest = max(num_steps - warmup, 1)",
        "tests/training/test_schedule.py tests/training/test_optimizer.py",
    ),
    Fault(
        "the official cosine forgets the warm-up",
        "rwkv_jax/training/schedule.py",
        "return warmup, num_steps - warmup",
        "return 0, num_steps",
        "tests/training/test_schedule.py",
    ),
    Fault(
        "vectors decay too",
        "rwkv_jax/models/language_model.py",
        'path[-1] == "weight" and ndim >= 2',
        "ndim >= 1",
        "tests/training/test_optimizer.py",
    ),
    Fault(
        "w0 learns like all others",
        "rwkv_jax/models/rwkv7.py",
        '{"w0": 2.0}',
        '{"w0": 1.0}',
        "tests/training/test_optimizer.py",
    ),
    Fault(
        "a bad step is taken",
        "rwkv_jax/training/step.py",
        "jnp.where(taken, new, old), new, old)",
        "jnp.where(taken, new, new), new, old)",
        "tests/training/test_step.py tests/train/test_bad_steps.py",
    ),
    Fault(
        "frozen parameters are trained",
        "rwkv_jax/training/partition.py",
        "(trained if is_trained((*path, name)) else frozen)[name] = value",
        "trained[name] = value",
        "tests/training/test_objective_and_partition.py",
    ),
    # Data
    Fault(
        "the official order begins at sample 0",
        "rwkv_jax/data/tokens/order.py",
        "(index + 1) ** 3",
        "index**3",
        "tests/data/tokens/test_order.py",
    ),
    Fault(
        "every epoch in one order",
        "rwkv_jax/data/tokens/order.py",
        'f"{seed} {number}"',
        'f"{seed}"',
        "tests/data/tokens/test_order.py tests/data/tokens/test_rows.py",
    ),
    Fault(
        "rows of every step are the first step's",
        "rwkv_jax/data/tokens/rows.py",
        "self._find(step * self.batch_size + ",
        "self._find(",
        "tests/data/tokens/test_rows.py",
    ),
    Fault(
        "targets are the tokens themselves",
        "rwkv_jax/training/batch.py",
        "rows[:, :-1], rows[:, 1:]",
        "rows[:, :-1], rows[:, :-1]",
        "tests/training/test_batch.py",
    ),
    # Inference
    Fault(
        "top-p keeps one token too few",
        "rwkv_jax/inference/sampling/choose.py",
        "weights >= jax.lax.cond(jnp.any(top_p < 1)",
        "weights > jax.lax.cond(jnp.any(top_p < 1)",
        "tests/inference/test_sampling.py tests/inference/test_sampling_limits.py",
    ),
    Fault(
        "repetition rewards negative logits",
        "rwkv_jax/inference/sampling/choose.py",
        "logits / repetition, logits * repetition",
        "logits / repetition, logits / repetition",
        "tests/inference/test_sampling_penalties.py tests/inference/test_sampling.py",
    ),
    Fault(
        "draws follow JAX's default dtype",
        "rwkv_jax/inference/sampling/selection.py",
        "(2,), jnp.float32)",
        "(2,))",
        "tests/inference/test_reproducible.py",
    ),
    Fault(
        "logprobs of adjusted tokens",
        "rwkv_jax/inference/sampling/choose.py",
        "return chosen - jax.nn.logsumexp(logits, axis=-1)",
        "return chosen - jnp.max(logits, axis=-1)",
        "tests/inference/test_sampling.py tests/inference/test_engine.py",
    ),
    # Resuming
    Fault(
        "another seed is no other run",
        "rwkv_jax/run_folder.py",
        '"seed": config.seed',
        '"seed": 0',
        "tests/train/test_refusals.py tests/test_run_folder.py",
    ),
)


def make_copy(fault: Fault, folder: Path) -> None:
    """The repository with the fault in it."""
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, folder / name)
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.name}: {fault.right!r} stands {text.count(fault.right)} times in {fault.file}")
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def try_fault(fault: Fault) -> tuple[bool, str]:
    """Whether the tests caught it, and the first test that did or what pytest said last."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "repository"
        folder.mkdir()
        make_copy(fault, folder)
        tests = [test for test in fault.tests.split() if not test.endswith(".py") or (folder / test).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
        environment = {"PYTHONPATH": f"{folder}:{folder / 'kernels'}", "PATH": "/usr/bin:/bin", "HOME": name}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 1, failed[1] if failed else done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Tries the faults, and exits with 1 if one of them lived."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    lived = 0
    for fault in FAULTS:
        if word in fault.name or word in fault.file:
            caught, by = try_fault(fault)
            lived += not caught
            print(f"{'caught' if caught else 'LIVED ':<7} {fault.name:<42} {by}", flush=True)
    sys.exit(bool(lived))


if __name__ == "__main__":
    main()
