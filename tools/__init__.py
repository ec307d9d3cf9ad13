"""Scripts around the project that are not installed: set-up, a server to run, the load tool."""
