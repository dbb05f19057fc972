"""The WKV operator of RWKV-6 (Finch)."""
