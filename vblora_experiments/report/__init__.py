"""One HTML page from records: `kinds` says what a record of each experiment shows, `found` reads, `charts` draws."""
