"""The daemon: provider and coordinator peers of the Pinaivu network, and the protocol they speak."""
