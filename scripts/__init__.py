"""Programs that a person runs; nothing in the packages imports them."""
