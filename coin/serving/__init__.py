"""Coded serving: the front end, over HTTP and on Ray Serve, and on a virtual clock its simulation."""
