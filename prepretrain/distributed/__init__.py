"""Does what all processes do together: process group, sharding, checkpoints, heartbeat."""
