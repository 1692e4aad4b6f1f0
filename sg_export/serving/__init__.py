"""Serving of bundles by HTTP: an application, and the engines on Ray Serve that it asks."""
