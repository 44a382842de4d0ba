"""Rated images: manifests, reading, public sets, simulated sets."""
