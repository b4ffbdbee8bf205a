"""Rules of transactions: versions, locks, records, coordinator, recovery. Knows keys, not nodes."""
