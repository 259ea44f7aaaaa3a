"""Builds deploy/Dockerfile with buildah on Debian base images, without a registry or a daemon."""
