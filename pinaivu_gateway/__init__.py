"""The gateway peer: the OpenAI HTTP API, bridged into the Pinaivu mesh."""
