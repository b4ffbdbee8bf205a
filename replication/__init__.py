"""Rules of replication: Raft, the node's log, snapshots, the message channel. Knows bytes only."""
