"""Any OpenAI-compatible server as an engine, for models and machines that ours is not made for."""
