"""`python -m rwkv_jax` is the `rwkv` command."""

from rwkv_jax.cli import main

if __name__ == "__main__":
    main()
