"""What ``qstar doctor`` finds: versions, the machine, and whether what runs on it is right."""
