"""llama.cpp's server as a peer of benchmarks/serve_peers.py: that of llama-cpp-python, with weights of ours.

Runs in the environment of peers_llama.py, with the server: pip install "llama-cpp-python[server]==0.3.36".
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import sys


def main() -> None:
    job = json.loads(sys.argv[1])
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    model = ModelSettings(
        model=job["weights"],
        model_alias="random",
        n_ctx=job["max_length"],
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        logits_all=False,
        cache=job["cache"],
        verbose=False,
    )
    settings = ServerSettings(interrupt_requests=False, disable_ping_events=True)
    app = create_app(server_settings=settings, model_settings=[model])
    uvicorn.run(app, host="127.0.0.1", port=job["port"], log_level="warning")


if __name__ == "__main__":
    main()
