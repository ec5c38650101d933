"""Who may do what: keys here; roles, limits, redaction, audit and encryption as they come."""
