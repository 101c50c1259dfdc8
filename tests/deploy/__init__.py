"""Tests of the files that are deployed: image, Compose, Kubernetes, workflow, alerts."""
