"""Which bytes? Model versions: manifest, aliases, import, verification, local cache."""
