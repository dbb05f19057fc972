"""What a model cannot do, and where it stops: probes that `rwkv probe` runs, each with what its numbers do not say."""
