"""How fast the engine is: by itself, beside other engines, and within the network."""
