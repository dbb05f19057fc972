"""`python -m rwkv_jax` is the `rwkv` command."""

from rwkv_jax.cli import run_as_process

if __name__ == "__main__":
    run_as_process("rwkv_jax")
