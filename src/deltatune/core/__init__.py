"""The core: what is common to every method. See ARCHITECTURE.md for the map."""
