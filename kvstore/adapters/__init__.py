"""The world behind ports: RocksDB, files, sockets, clock, randomness. Only the composition root builds these."""
