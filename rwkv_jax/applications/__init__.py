"""Systems built of RWKV's layers beyond language models; a folder each, to copy from (docs/applications.md)."""
