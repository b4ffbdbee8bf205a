"""The command line: `kvstore` runs nodes, `kvctl` administers a cluster."""
