"""The server over loopback, with the official clients, and its parts alone."""
