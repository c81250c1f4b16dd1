"""The cache format: Parquet files of states with a manifest; written, read, verified, merged."""
