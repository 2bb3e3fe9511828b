"""Configuration groups; see train.yaml for the whole."""
