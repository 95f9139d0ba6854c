"""Engines that take turns on one core, each in a process of its own."""
