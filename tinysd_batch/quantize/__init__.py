"""From a float checkpoint to a packed one."""
