"""Real data: what ships with installed packages, and full-size sets through Hugging Face `datasets`."""
