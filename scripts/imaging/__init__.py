"""Carries out deploy/Dockerfile on a machine without a container engine, and runs what it makes."""
