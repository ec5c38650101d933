"""Where replicas run: ``base`` is the contract, each driver an entry point ``cloudlm.drivers``."""
