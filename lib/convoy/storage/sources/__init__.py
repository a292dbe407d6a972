"""Ways to find samples: class folders, lists, parquet files with image bytes, WebDataset tar shards."""
