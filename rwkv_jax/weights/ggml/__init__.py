"""Files of ggml's programs: llama.cpp's GGUF, read and written, and rwkv.cpp's older ggmf, read."""
