"""Documents in, packed token shards out."""
