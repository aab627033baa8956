"""What lies on disk: safetensors with provenance, checkpoints, YAML, what packages ship; every write atomic."""
