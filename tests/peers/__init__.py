"""Reference outputs of well-kept libraries, made where these are installed and kept in ``tests/data``."""
