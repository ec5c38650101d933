"""Object stores that hold a registry. ``base`` is the contract."""
