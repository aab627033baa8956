"""Coded serving: the front end, over HTTP and on Ray Serve."""
