"""The WKV operator of RWKV-7 (Goose)."""
