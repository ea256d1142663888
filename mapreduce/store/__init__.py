"""What a validator keeps on disk. Knows SQLite files; knows no chain and no network."""
