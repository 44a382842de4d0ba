"""Many images: row files that survive a kill, and many machines."""
