"""Images in Parquet shards: where they are, which are chosen, in what order they come."""
