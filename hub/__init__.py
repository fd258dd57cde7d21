"""The world's formats and services: Llama folders, datasets of the Hub, streaming, uploads, parquet."""
