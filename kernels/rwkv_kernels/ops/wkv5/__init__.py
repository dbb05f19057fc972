"""The WKV operator of RWKV-5 (Eagle)."""
