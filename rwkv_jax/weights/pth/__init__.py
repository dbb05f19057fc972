"""Official .pth files, read without PyTorch and never unpickled."""
