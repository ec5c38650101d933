"""The plane that answers requests: keys, admission, routing, retries, relay, accounting."""
