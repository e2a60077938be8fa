"""What ``qstar`` does in a shell: one file a command."""
