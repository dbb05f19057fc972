"""The WKV operators, a folder each: `api.py` is what is called, `scan.py` its definition."""
