"""Several models on one machine: loaded on demand, kept while used, put away when short."""
