"""`rwkv serve`: an HTTP server with OpenAI's API for an engine (extra `serve`)."""
