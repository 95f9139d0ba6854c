"""The daemon: provider and coordinator peers of the network, and the protocol they speak."""
