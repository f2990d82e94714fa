"""Search: encoding of passages and queries, the store, sharded indexes, and top-k search on Ray."""
