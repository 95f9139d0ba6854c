"""How the gateway's database came to be what it is, one numbered step at a time."""
