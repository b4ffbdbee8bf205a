"""Kvorum: a distributed transactional key-value store."""
