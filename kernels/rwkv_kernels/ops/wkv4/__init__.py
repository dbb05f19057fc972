"""The WKV operator of RWKV-4 (Dove)."""
