"""The simulated world: virtual time, network, disks and faults, all from one seed."""
