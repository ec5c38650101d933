"""Where replicas run. ``base`` is the contract; each driver is an entry point ``cloudlm.drivers``."""
