"""Ray clusters: connection, resources, process groups, calls and shared files."""
